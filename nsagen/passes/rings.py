"""Which tokens of a cache later queries still see: of some values the first and the last alone, which a ring keeps.

Derived from the domains: `s > t − 512` keeps 511 tokens before the query, `s < 4` keeps the first four, and φ the
tokens of a block that has not ended. Where a domain says neither, or a list may name any block, all tokens stay.
"""

from __future__ import annotations

from dataclasses import replace

from nsagen.ir.graph import Attend, Graph, Pool, Source
from nsagen.ir.plan import Kernel, Op, Ring
from nsagen.sym import KEY, QUERY, AtLeast, Conjunct, as_int, const, linear_coefficient, substitute


def rings(graph: Graph) -> dict[str, Ring]:
    """The values [B, T, Hkv, D] that a ring can hold; what reads most of a value decides."""
    needs: dict[str, list[Ring | None]] = {}
    for node in graph.nodes:
        if isinstance(node, Pool):
            needs.setdefault(node.src, []).append(Ring(0, node.axis.block - 1))
        for source in node.sources if isinstance(node, Attend) else ():
            if source.axis.is_tokens:
                for value in (source.k, source.v):
                    needs.setdefault(value, []).append(_of_source(source))
    largest = {value: _largest(found) for value, found in needs.items()}
    return {value: ring for value, ring in largest.items() if ring is not None}


def over_rings(graph: Graph, ops: tuple[Op, ...], kernels: list[Kernel]) -> list[Kernel]:
    """The kernels, those over a cache with the rings that their launches bind."""
    found = rings(graph)
    bound = {(x.kernel, o): found.get(b) for op in ops for x in op.launches for o, b in x.binds}

    def ringed(kernel: Kernel) -> Kernel:
        operands = tuple(replace(o, ring=bound.get((kernel.name, o.name))) for o in kernel.operands)
        return replace(kernel, operands=operands)

    return [ringed(k) if k.cached else k for k in kernels]


def _largest(found: list[Ring | None]) -> Ring | None:
    some = [r for r in found if r is not None]
    if len(some) < len(found):
        return None  # all tokens
    return Ring(max(r.sinks for r in some), max(r.keep for r in some))


def _of_source(source: Source) -> Ring | None:
    return None if source.listed else _largest([_of_piece(piece.where) for piece in source.pieces])


def _of_piece(where: tuple[Conjunct, ...]) -> Ring | None:
    """From one conjunct that bounds the piece; the others only narrow it."""
    bounds = [bound for c in where if isinstance(c, AtLeast) if (bound := _bound(c)) is not None]
    return min(bounds, key=lambda r: r.keep + r.sinks, default=None)


def _bound(c: AtLeast) -> Ring | None:
    """s >= t − keep, or s < sinks."""
    slopes = tuple(linear_coefficient(c.expr, x) for x in (KEY, QUERY))
    constant = as_int(substitute(c.expr, {KEY: const(0), QUERY: const(0)}))
    if constant is None or constant < 0:
        return None
    if slopes == (1, -1):
        return Ring(0, constant)
    return Ring(constant + 1, 0) if slopes == (-1, 0) else None

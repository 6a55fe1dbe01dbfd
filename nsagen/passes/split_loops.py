"""split_loops: masked edges, maskless middle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from nsagen.errors import IRError
from nsagen.ir.graph import TOKENS
from nsagen.ir.plan import ALL_HI, ALL_LO, BN, BT, SOME_HI, SOME_LO, T0, Cut, Kernel, Mask, Plan, Segment, Walk
from nsagen.passes.derive_bounds import walk_tile
from nsagen.sym import (
    Conjunct,
    Expr,
    Facts,
    Interval,
    Proof,
    Symbol,
    Tile,
    above,
    as_int,
    below,
    const,
    count,
    down,
    lt,
    maximum,
    minimum,
    terms_of_max,
    terms_of_min,
    up,
)

_Rule = Callable[[Conjunct, Symbol, tuple[Expr, ...], Symbol, Tile, Facts], Proof]
C0, C1, C2, C3 = count("c0"), count("c1"), count("c2"), count("c3")
SIZES = frozenset({BN.name, BT.name})
FACTS = Facts(SIZES, ((TOKENS, T0 + 1), (T0, const(0))))  # a query tile holds a query: T > t0


@dataclass(frozen=True)
class SplitLoops:
    """Cut each walk at c0 <= c1 <= c2 <= c3 into lo, mid and hi; a segment keeps every conjunct not proved on it.

    Needs `some` of every walk. Holds: the segments cover `some`, and mid lies inside `all`.
    c0 = down(some.lo)  c1 = clamp(up(all.lo), c0, up(some.hi))  c2 = max(c1, down(all.hi))  c3 = up(some.hi)
    A walk whose `all` was refused is one segment `edge` with all its masks; so is a reverse walk, where the mask of a
    tile costs less than the registers and the drained pipelines of three loops (docs/performance.md). So is a walk that
    programs share.
    """

    name = "split_loops"

    def run(self, plan: Plan) -> Plan:
        return replace(plan, kernels=tuple(map(_split_kernel, plan.kernels)))


def _split_kernel(kernel: Kernel) -> Kernel:
    return replace(kernel, walks=tuple(_split(w, kernel.grid.split) for w in kernel.walks))


def _split(walk: Walk, shared: bool = False) -> Walk:
    if walk.some is None:
        raise IRError(f"walk {walk.piece.name}: split_loops needs the bounds of derive_bounds")
    _, _, _, step = walk_tile(walk)
    if walk.all is None or walk.direction == "reverse" or shared:
        cuts = (Cut("c0", down(SOME_LO, step)), Cut("c3", up(SOME_HI, step)))
        return replace(walk, cuts=cuts, segments=(Segment("edge", C0, C3, _masks(walk, {})),))
    return replace(walk, cuts=_cuts(walk.all.lo, step), segments=_three(walk, walk.all))


def _cuts(start: Expr, step: Symbol) -> tuple[Cut, ...]:
    if as_int(start) == 0:  # the maskless middle starts at once
        return Cut("c2", down(ALL_HI, step)), Cut("c3", up(SOME_HI, step))
    clamped = minimum(maximum(up(ALL_LO, step), C0), maximum(C3, C0))
    return (
        Cut("c0", down(SOME_LO, step)),
        Cut("c3", up(SOME_HI, step)),
        Cut("c1", clamped),
        Cut("c2", maximum(C1, down(ALL_HI, step))),
    )


def _three(walk: Walk, every: Interval) -> tuple[Segment, ...]:
    hi = Segment("hi", C2, C3, _masks(walk, _proofs(walk, above, terms_of_min(every.hi))))
    if as_int(every.lo) == 0:
        return Segment("mid", const(0), C2, ()), hi
    lo = Segment("lo", C0, C1, _masks(walk, _proofs(walk, below, terms_of_max(every.lo))))
    return lo, Segment("mid", C1, C2, ()), hi


def _conjuncts(walk: Walk) -> tuple[Conjunct, ...]:
    loop, _, length, _ = walk_tile(walk)
    return (*walk.piece.where, lt(loop, length))


def _proofs(walk: Walk, rule: _Rule, ends: tuple[Expr, ...]) -> dict[Conjunct, Proof]:
    loop, tile, _, step = walk_tile(walk)
    return {c: rule(c, loop, ends, step, tile, FACTS) for c in _conjuncts(walk)}


def _masks(walk: Walk, proofs: dict[Conjunct, Proof]) -> tuple[Mask, ...]:
    *domain, extent = _conjuncts(walk)
    masks: list[Mask] = []
    for c in (*domain, extent):
        proof = proofs.get(c, Proof(None))
        if not proof.always:
            masks.append(Mask(c, proof.conditions or (), extent=c is extent))
    return tuple(masks)

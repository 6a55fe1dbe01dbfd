"""`nsagen bench --decode`: the batch × context grid, and the bytes that a step has to read at each point. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nsagen.compiler import Compiled
from nsagen.errors import NsagenError
from nsagen.ir.graph import TOKENS, Attend, BlockList, Graph, KeyAxis, LogSumExp, Piece
from nsagen.ir.plan import N
from nsagen.spec import Spec
from nsagen.sym import KEY, QUERY, Multiple, evaluate
from nsagen.tools.costs import keys_of_query

CACHE = 4 << 30  # bytes of dense K and V at the points with many sequences
ELEMENT = 2  # bytes: bf16 and fp16
EQUAL_BYTES = (8192, 16384, 32768, 65536, 131072)
ALONE = (8192, 65536, 131072)  # batch 1
TRIAL = "96x2,160x1"  # on the CPU
MOST = 1 << 24


@dataclass(frozen=True)
class Point:
    """`batch` sequences of `context` tokens each, the one of the step included."""

    context: int
    batch: int

    @property
    def label(self) -> str:
        tokens = f"{self.context >> 10}k" if self.context % 1024 == 0 else str(self.context)
        return f"{tokens}x{self.batch}"


def grid_of(text: str | None, spec: Spec, device: str) -> list[Point]:
    """The points of `8kx256,64kx1`; by default 4 GiB of K/V at 8k to 128k tokens, then one sequence."""
    if text is None and device == "cuda":
        many = (Point(n, max(1, CACHE // dense_bytes(spec, Point(n, 1)))) for n in EQUAL_BYTES)
        return list(dict.fromkeys([*many, *(Point(n, 1) for n in ALONE)]))
    words = (TRIAL if text is None else text).lower().replace("×", "x").replace(",", " ").split()
    try:
        points = [Point(_tokens(context), int(batch)) for context, batch in (word.split("x") for word in words)]
    except ValueError:
        points = []
    if not points or any(not (1 < p.context <= MOST and 1 <= p.batch <= MOST) for p in points):
        raise NsagenError(f"--grid {text!r}: give CONTEXTxBATCH between commas, as in 8kx256,64kx1; 2 tokens or more")
    return list(dict.fromkeys(points))


def _tokens(word: str) -> int:
    return int(word.removesuffix("k")) << (10 if word.endswith("k") else 0)


def dense_bytes(spec: Spec, point: Point) -> int:
    """K and V of every token, one pair whatever `kv` says: what dense attention reads."""
    h = spec.heads
    return point.batch * point.context * h.kv * (h.qk_dim + h.v_dim) * ELEMENT


def nsa_bytes(compiled: Compiled, point: Point) -> int:
    """K and V that the step's query sees, each branch by itself: the blocks that have ended, n·l' selected, w.

    Keys that do nothing but score blocks (from: pooled) are read, too.
    """
    h = compiled.spec.heads
    numbers = sum(dims * keys for dims, keys in _reads(compiled.graph, point.context))
    return point.batch * h.kv * numbers * ELEMENT


def _reads(graph: Graph, tokens: int) -> Iterator[tuple[int, int]]:
    """(numbers of a key, keys) of one KV head."""
    h, attended = graph.heads, set[str]()
    for node in (n for n in graph.nodes if isinstance(n, Attend)):
        for source in node.sources:
            attended.add(source.k)
            keys = sum(keys_at(piece, source.axis, tokens - 1, tokens, source.listed) for piece in source.pieces)
            yield h.qk_dim + h.v_dim, keys
    for node in (n for n in graph.nodes if isinstance(n, LogSumExp)):
        if node.k not in attended:
            yield h.qk_dim, evaluate(node.axis.length(), {TOKENS.name: tokens})


def keys_at(piece: Piece, axis: KeyAxis, query: int, tokens: int, listed: BlockList | None = None) -> int:
    """The keys that one query sees, of `tokens` tokens; of a list, all of its blocks where there are so many."""
    env = {QUERY.name: query, TOKENS.name: tokens, N.name: evaluate(axis.length(), {TOKENS.name: tokens})}
    at = keys_of_query(piece, axis)
    inside = range(evaluate(at.lo, env), evaluate(at.hi, env))
    thinned = [c for c in piece.where if isinstance(c, Multiple)]
    seen = sum(all(c.holds({**env, KEY.name: s}) for c in thinned) for s in inside) if thinned else len(inside)
    return min(seen, (listed.count - 1) * listed.size + query % listed.size + 1) if listed else seen

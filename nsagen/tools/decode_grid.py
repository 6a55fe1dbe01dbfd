"""`nsagen bench --decode`: the batch × context grid, and the bytes that a step has to read at each point. No torch."""

from __future__ import annotations

import math
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
class Serving:
    """How the step and its cache are: new tokens of a sequence, tokens of a page, e4m3 keys and values."""

    tokens: int = 1
    page_size: int | None = None
    fp8: bool = False

    @property
    def label(self) -> str:
        """In words, where it is not the plain one."""
        tokens = f"{self.tokens} tokens a sequence" if self.tokens > 1 else ""
        pages = f"pages of {self.page_size}, in no order" if self.page_size else ""
        return ", ".join(x for x in (tokens, pages, "e4m3 keys and values" if self.fp8 else "") if x)

    @property
    def words(self) -> list[str]:
        """The command line's."""
        pages = ["--page-size", str(self.page_size)] if self.page_size else []
        tokens = ["--tokens", str(self.tokens)] if self.tokens > 1 else []
        return [*tokens, *pages, *(["--kv", "fp8"] if self.fp8 else [])]


PLAIN = Serving()


@dataclass(frozen=True)
class Point:
    """`batch` sequences of `context` tokens each, those of the step (the last of its round) included."""

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


def round_of(spec: Spec, tokens: int) -> int:
    """Steps of `tokens` new tokens after which compression blocks end as before: with a stride of d, d / gcd(d, m).

    1 without a compressed branch.
    """
    stride: int = getattr(spec.branches.get("compressed"), "stride", 1)
    return stride // math.gcd(stride, tokens)


def dense_bytes(spec: Spec, point: Point) -> int:
    """K and V of every token, one pair whatever `kv` says: what dense attention reads."""
    h = spec.heads
    return point.batch * point.context * h.kv * (h.qk_dim + h.v_dim) * ELEMENT


def nsa_bytes(compiled: Compiled, point: Point, serving: Serving = PLAIN) -> int:
    """K and V that the step's queries see, each branch by itself: the blocks that have ended, n·l' selected, w.

    What several tokens of a step see is read once; of their lists all, as if they chose different blocks, but no more
    than there is. Keys that do nothing but score blocks (from: pooled) are read, too. e4m3 rows come with a scale.
    """
    per = compiled.spec.heads.kv * point.batch
    return per * sum(
        keys * (dims + 4 * vectors if serving.fp8 else dims * ELEMENT)
        for dims, vectors, keys in _reads(compiled.graph, point.context, serving.tokens)
    )


def _reads(graph: Graph, tokens: int, new: int) -> Iterator[tuple[int, int, int]]:
    """(numbers of a key, vectors they make, keys) of one KV head, for the `new` last of `tokens` queries."""
    h, attended = graph.heads, set[str]()
    for node in (n for n in graph.nodes if isinstance(n, Attend)):
        for source in node.sources:
            attended.add(source.k)
            queries = range(tokens - new, tokens)
            keys = sum(keys_of(piece, source.axis, queries, tokens, source.listed) for piece in source.pieces)
            yield h.qk_dim + h.v_dim, 2, keys
    for node in (n for n in graph.nodes if isinstance(n, LogSumExp)):
        if node.k not in attended:
            yield h.qk_dim, 1, evaluate(node.axis.length(), {TOKENS.name: tokens})


def keys_of(piece: Piece, axis: KeyAxis, queries: range, tokens: int, listed: BlockList | None = None) -> int:
    """The keys that some of the queries see, of `tokens` tokens; of a list all of its blocks, if there are so many."""
    seen = [_keys_at(piece, axis, t, tokens) for t in queries]
    union = len(set[int]().union(*seen))
    if listed is None:
        return union
    own = [(listed.count - 1) * listed.size + t % listed.size + 1 for t in queries]
    return min(union, sum(min(len(s), most) for s, most in zip(seen, own, strict=True)))


def _keys_at(piece: Piece, axis: KeyAxis, query: int, tokens: int) -> range | set[int]:
    env = {QUERY.name: query, TOKENS.name: tokens, N.name: evaluate(axis.length(), {TOKENS.name: tokens})}
    at = keys_of_query(piece, axis)
    inside = range(evaluate(at.lo, env), evaluate(at.hi, env))
    thinned = [c for c in piece.where if isinstance(c, Multiple)]
    return {s for s in inside if all(c.holds({**env, KEY.name: s}) for c in thinned)} if thinned else inside

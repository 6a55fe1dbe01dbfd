"""Graph: what is computed, dense and symbolic. Axes are symbols, domains are predicates, no tiles and no order.

Shapes are tuples of axis names: B batch, T tokens, Hq and Hkv heads, Dqk and Dv head dims, C branches, and the
name of a pooled key axis; n the blocks of a selection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nsagen.sym import KEY, QUERY, Conjunct, Expr, count, floordiv, le, maximum

MOST_GROUPED = 16  # keys
TOKENS = count("T")  # length of the sequence at hand
START = count("start")  # its first row in the packed layout


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    qk_dim: int
    v_dim: int

    @property
    def group(self) -> int:
        return self.query // self.kv


@dataclass(frozen=True)
class KeyAxis:
    """Keys of blocks of `block` tokens, one every `stride`; the token axis itself has block = stride = 1."""

    name: str
    block: int = 1
    stride: int = 1

    @property
    def is_tokens(self) -> bool:
        return self.block == 1 and self.stride == 1

    def length(self, tokens: Expr = TOKENS) -> Expr:
        """max(0, ⌊(T − l)/d⌋ + 1): whole blocks only."""
        return tokens if self.is_tokens else floordiv(maximum(0, tokens - self.block + self.stride), self.stride)

    def base(self, start: Expr = START) -> Expr:
        """The row of block 0 of the sequence that starts at token `start` (packed: ⌊start/d⌋)."""
        return floordiv(start, self.stride) if not self.is_tokens else start


TOKEN_AXIS = KeyAxis("T")


@dataclass(frozen=True)
class Piece:
    """Keys that satisfy every conjunct."""

    name: str
    where: tuple[Conjunct, ...]


def ended_blocks(axis: KeyAxis) -> Piece:
    """Block i, tokens [i·d, i·d + l), is visible iff it has ended: i·d + l − 1 <= t."""
    return Piece("ended", (le(KEY * axis.stride + axis.block - 1, QUERY),))


@dataclass(frozen=True)
class BlockList:
    """A domain by enumeration: the query's KV head lists up to `count` blocks of `size` tokens, −1 for none."""

    blocks: str  # int32 [B, T, Hkv, count], unique, ascending, −1 last
    size: int
    count: int


@dataclass(frozen=True)
class Source:
    """Keys and values under one domain: a disjoint union of pieces on one axis, within the listed blocks if any."""

    k: str
    v: str
    axis: KeyAxis
    pieces: tuple[Piece, ...]
    listed: BlockList | None = None


@dataclass(frozen=True)
class Value:
    """dtype: `input` follows q; `gate` any float; the rest as said."""

    name: str
    axes: tuple[str, ...]
    dtype: Literal["input", "gate", "float32", "int32"]


Positions = Literal["none", "per_token", "constant"]


@dataclass(frozen=True)
class Pool:
    """out[i] = φ(src[i·d : i·d + l]), run by the module φ, which torch differentiates.

    positions: none, added to every token of a block, or one constant that φ's first step makes of them.
    """

    out: str
    src: str
    axis: KeyAxis
    pool: str
    positions: Positions
    because: str = ""  # why positions are a constant


@dataclass(frozen=True)
class Attend:
    """out, lse = softmax attention of q over the union of the sources (one softmax).

    rest: what rounding took from out, for dtypes of 16 bits. delta = rowsum(d_out·out) is subtracted from every key's
    dp, so its error adds up over all that a row sees; with out + rest it has float32's.
    """

    branch: str
    q: str
    sources: tuple[Source, ...]
    out: str
    lse: str
    rest: str | None = None  # set by differentiate


@dataclass(frozen=True)
class Select:
    """out = the `count` best blocks of `size` tokens by importance (paper Eq. 8–12), forced ones among them.

    Importance of block j: Σ_i w_ij·Σ_h exp(scale·q_h·k_i − lse_h) over the heads of the group, w_ij = the tokens that
    compressed block i and block j share, over d. Candidates start at or before the query; ties go to the lower block.
    """

    out: str
    q: str
    k: str
    lse: str
    axis: KeyAxis  # of the compressed keys
    size: int
    count: int
    initial: int
    local: int
    weights: tuple[int, ...] = ()  # w_ij for i = first + j·size/d …; set by derive_weights
    first: int = 0

    @property
    def grouped(self) -> int:
        """Keys whose scores may be kept as sums: those of a block; 1 where their count is no small power of two."""
        keys = self.size // self.axis.stride
        return keys if self.weights and keys & (keys - 1) == 0 and keys <= MOST_GROUPED else 1

    @property
    def group_weights(self) -> tuple[tuple[int, ...], ...]:
        """What a group's keys weigh in their own block and, if they overlap it, in the next one."""
        if self.grouped == 1:
            return ((1,),)
        own = self.weights[-self.first :]
        reach = len(own) + self.first  # from that key on they overlap the next block
        return (own, (*(0 for _ in range(reach)), *self.weights[: -self.first])) if self.first else (own,)


@dataclass(frozen=True)
class LogSumExp:
    """lse = ln Σ_i exp(scale·q·k_i) over the blocks that have ended; −inf where none has. Not differentiable.

    The normaliser of a Select's scores where no attention of the graph is a softmax over these keys alone.
    """

    q: str
    k: str
    axis: KeyAxis
    lse: str


@dataclass(frozen=True)
class Combine:
    """out = Σ_c gates[…, c]·terms[c]  (paper Eq. 5)."""

    terms: tuple[str, ...]
    gates: str
    out: str


@dataclass(frozen=True)
class CombineGrad:
    """delta_c = d_gates_c = rowsum(d_out·term_c), shift_c = lse_c − ln g_c; without gates there are deltas alone.

    term_c stands for term_c + rest_c where there is a rest. With the shift in place of lse, p is g·p: no branch's
    gradient g_c·d_out is ever made, and no kernel of a branch knows of gates.
    """

    terms: tuple[str, ...]
    rests: tuple[str | None, ...]
    lses: tuple[str, ...]
    gates: str | None
    d_out: str
    deltas: tuple[str, ...]
    shifts: tuple[str, ...]
    d_gates: str | None


@dataclass(frozen=True)
class AttendGrad:
    """Gradients of one Attend from p = exp(scale·q·k − lse): dv = pᵀd_out, ds = p·(d_out·vᵀ − delta).

    lse is the Attend's own, or the shift of a CombineGrad, which folds the gate into p.
    """

    branch: str
    q: str
    sources: tuple[Source, ...]
    lse: str
    delta: str
    d_out: str
    dq: str
    dk: tuple[str, ...]
    dv: tuple[str, ...]


Node = Pool | Attend | Select | LogSumExp | Combine | CombineGrad | AttendGrad


@dataclass(frozen=True)
class Graph:
    name: str
    heads: Heads
    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    output: str
    saved: tuple[str, ...] = ()  # kept from forward to backward; set by differentiate
    grads: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (input of an Attend or Combine, the terms of its gradient)

    def value(self, name: str) -> Value:
        return next(v for v in self.values if v.name == name)


def chosen_ahead(graph: Graph) -> tuple[Select, ...]:
    """Selections that need no attention of the graph: they run before it, and it takes their lists as arguments."""
    normalisers = {n.lse for n in graph.nodes if isinstance(n, LogSumExp)}
    return tuple(n for n in graph.nodes if isinstance(n, Select) and n.lse in normalisers)


def phi(graph: Graph) -> tuple[Pool, ...]:
    """The pools that the module φ runs, whose results are attended to. Another one only scores: a plain mean."""
    attended = {x for n in graph.nodes if isinstance(n, Attend) for s in n.sources for x in (s.k, s.v)}
    return tuple(n for n in graph.nodes if isinstance(n, Pool) and n.out in attended)


def reads(node: Node) -> tuple[str, ...]:
    """Names of the values that a node reads."""
    if isinstance(node, Pool):
        return (node.src,)
    if isinstance(node, Select):
        return (node.q, node.k, node.lse)
    if isinstance(node, LogSumExp):
        return (node.q, node.k)
    if isinstance(node, Combine):
        return (*node.terms, node.gates)
    if isinstance(node, CombineGrad):
        return (*node.terms, *(x for r in node.rests for x in _some(r)), *node.lses, node.d_out, *_some(node.gates))
    keys = tuple(x for s in node.sources for x in (s.k, s.v, *_some(s.listed.blocks if s.listed else None)))
    if isinstance(node, Attend):
        return (node.q, *keys)
    return (node.q, *keys, node.lse, node.delta, node.d_out)


def writes(node: Node) -> tuple[str, ...]:
    """Names of the values that a node defines."""
    if isinstance(node, (Pool, Combine, Select)):
        return (node.out,)
    if isinstance(node, LogSumExp):
        return (node.lse,)
    if isinstance(node, Attend):
        return (node.out, node.lse, *_some(node.rest))
    if isinstance(node, CombineGrad):
        return (*node.deltas, *node.shifts, *_some(node.d_gates))
    return (node.dq, *node.dk, *node.dv)


def _some(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)

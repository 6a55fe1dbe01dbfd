"""Spec -> forward graph. Each branch kind adds its attention; the combine rule joins them."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

from nsagen.errors import Refused
from nsagen.ir.graph import (
    TOKEN_AXIS,
    Attend,
    BlockList,
    Combine,
    Graph,
    Heads,
    KeyAxis,
    LogSumExp,
    Node,
    Piece,
    Pool,
    Select,
    Source,
    Value,
    ended_blocks,
)
from nsagen.sym import KEY, QUERY, AtLeast, Conjunct, as_int, const, expand, le, lt

if TYPE_CHECKING:
    from nsagen.spec.model import Spec


class Lowering:
    """The graph under construction, as a branch kind sees it."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.heads = Heads(spec.heads.query, spec.heads.kv, spec.heads.qk_dim, spec.heads.v_dim)
        self.values: dict[str, Value] = {"q": Value("q", ("B", "T", "Hq", "Dqk"), "input")}
        self.inputs: list[str] = ["q"]
        self.nodes: list[Node] = []
        self.sources: dict[str, tuple[Source, ...]] = {}
        self.selects: list[Select] = []

    def keys(self, branch: str) -> tuple[str, str]:
        """Names of the branch's own keys and values (inputs [B, T, Hkv, D]), or of the shared pair."""
        suffix = f"_{branch}" if self.spec.kv == "per_branch" else ""
        k, v = f"k{suffix}", f"v{suffix}"
        for name, dim in ((k, "Dqk"), (v, "Dv")):
            if name not in self.values:
                self.define(Value(name, ("B", "T", "Hkv", dim), "input"))
                self.inputs.append(name)
        return k, v

    def define(self, value: Value) -> str:
        self.values[value.name] = value
        return value.name

    def pooled(self, branch: str, axis: KeyAxis, pool: str, positions: bool) -> tuple[str, str]:
        """Names of the keys and values that φ makes of the branch's blocks."""
        k, v = self.keys(branch)
        for src, out, dim in ((k, "k_cmp", "Dqk"), (v, "v_cmp", "Dv")):
            self.define(Value(out, ("B", axis.name, "Hkv", dim), "input"))
            self.nodes.append(Pool(out, src, axis, pool, "per_token" if positions else "none"))
        return "k_cmp", "v_cmp"

    def select(self, options: Any, keys: str, axis: KeyAxis, lse: str) -> None:
        """The selected branch's lists, by the importance of keys on the axis with this log-sum-exp."""
        forced = (options.initial, options.local)
        self.selects.append(Select("blocks", "q", keys, lse, axis, options.block, options.top_n, *forced))

    def attend(self, branch: str, *sources: Source) -> None:
        """The branch's attention: softmax over the union of the sources."""
        self.sources[branch] = sources

    def attend_tokens(self, branch: str, *pieces: Piece) -> None:
        """Attention over the branch's tokens that some piece holds; pieces must not overlap."""
        k, v = self.keys(branch)
        self.attend(branch, Source(k, v, TOKEN_AXIS, pieces))


def lower_spec(spec: Spec) -> Graph:
    from nsagen.spec.registry import kind

    lowering = Lowering(spec)
    for branch, options in spec.branches.items():
        kind(branch).lower(options, lowering)
    _choose_ahead(lowering)
    output = {"gated_sum": _gated_sum, "single": _single, "one_softmax": _one_softmax}[spec.combine](lowering)
    values = tuple(lowering.values.values())
    return Graph(spec.name, lowering.heads, values, tuple(lowering.nodes), tuple(lowering.inputs), output)


def lower_window(options: Any, low: Lowering) -> None:
    """Keys t − w < s <= t, and the first `sinks` tokens (those the window holds already count once)."""
    window = Piece("window", (le(KEY, QUERY), lt(QUERY - options.size, KEY)))
    if not options.sinks:
        return low.attend_tokens("window", window)
    sinks = Piece("sinks", (lt(KEY, options.sinks), le(KEY, QUERY - options.size)))
    low.attend_tokens("window", sinks, window)


def lower_compressed(options: Any, low: Lowering) -> None:
    """The blocks that have ended, through φ."""
    axis = KeyAxis("compressed", options.block, options.stride)
    k, v = low.pooled("compressed", axis, options.pool, options.positions)
    low.attend("compressed", Source(k, v, axis, (ended_blocks(axis),)))


def lower_selected(options: Any, low: Lowering) -> None:
    """The listed blocks of l' tokens, causal inside; the list is the caller's or chosen by importance."""
    low.define(Value("blocks", ("B", "T", "Hkv", "n"), "int32"))
    k, v = low.keys("selected")
    listed = BlockList("blocks", options.block, options.top_n)
    low.attend("selected", Source(k, v, TOKEN_AXIS, (Piece("causal", (le(KEY, QUERY),)),), listed))
    if options.scores == "caller":
        low.inputs.append("blocks")
    elif options.scores == "pooled":
        axis = KeyAxis("pooled", options.block, options.block)
        low.define(Value("k_pooled", ("B", axis.name, "Hkv", "Dqk"), "input"))
        low.nodes.append(Pool("k_pooled", k, axis, "mean", "none"))
        low.select(options, "k_pooled", axis, "lse_scores")
    else:
        scores: Any = low.spec.branches["compressed"]
        alone = low.spec.combine == "gated_sum"  # the compressed branch has a softmax, and so an lse, of its own
        axis = KeyAxis("compressed", scores.block, scores.stride)
        low.select(options, "k_cmp", axis, "lse_compressed" if alone else "lse_scores")


def _choose_ahead(low: Lowering) -> None:
    """The selections whose scores no branch's attention normalises: before all of them."""
    for node in low.selects:
        if node.lse == "lse_scores":
            low.define(Value(node.lse, ("B", "T", "Hq"), "float32"))
            low.nodes += [LogSumExp(node.q, node.k, node.axis, node.lse), node]


def _attend(low: Lowering, branch: str, sources: tuple[Source, ...]) -> str:
    out = low.define(Value(f"out_{branch}", ("B", "T", "Hq", "Dv"), "input"))
    lse = low.define(Value(f"lse_{branch}", ("B", "T", "Hq"), "float32"))
    low.nodes.append(Attend(branch, "q", sources, out, lse))
    return out


def _gated_sum(low: Lowering) -> str:
    gates = low.define(Value("gates", ("B", "T", "Hq", "C"), "gate"))
    low.inputs.append(gates)
    outs: dict[str, str] = {}
    for branch in sorted(low.sources, key=lambda b: b != "compressed"):  # its lse scores the selection
        outs[branch] = _attend(low, branch, low.sources[branch])
        low.nodes += [n for n in low.selects if n.lse == f"lse_{branch}"]
    terms = tuple(outs[branch] for branch in low.sources)
    out = low.define(Value("out", ("B", "T", "Hq", "Dv"), "input"))
    low.nodes.append(Combine(terms, gates, out))
    return out


def _single(low: Lowering) -> str:
    ((branch, sources),) = low.sources.items()
    return _attend(low, branch, sources)


def _one_softmax(low: Lowering) -> str:
    """One softmax over the union of the branches: a token that an earlier one holds is taken out of later ones.

    Listed blocks come last, since other domains can be taken out of them and not they out of others.
    """
    union: list[Source] = []
    for source in sorted((s for of in low.sources.values() for s in of), key=lambda s: s.listed is not None):
        pieces = source.pieces
        for earlier in union:
            if (earlier.k, earlier.axis) == (source.k, source.axis):
                for taken in earlier.pieces:
                    pieces = tuple(rest for p in pieces for rest in _without(p, taken))
        union.append(Source(source.k, source.v, source.axis, pieces, source.listed))
    return _attend(low, "union", tuple(union))


def _without(piece: Piece, taken: Piece) -> list[Piece]:
    """piece ∖ taken as disjoint pieces: ¬c₁, then c₁ ∧ ¬c₂, and so on."""
    rest: list[Piece] = []
    held: tuple[Conjunct, ...] = ()
    for i, c in enumerate(taken.where):
        where = tuple(dict.fromkeys((*piece.where, *held, _negate(c))))
        if not _contradictory(where):
            rest.append(Piece(f"{piece.name}_{i}", where))
        held = (*held, c)
    return rest


def _contradictory(where: tuple[Conjunct, ...]) -> bool:
    """Whether two conjuncts a >= 0 and b >= 0 exclude each other because a + b is a negative constant."""
    sides = [c.expr for c in where if isinstance(c, AtLeast)]
    sums = (as_int(expand(a + b)) for a, b in combinations(sides, 2))
    return any(x is not None and x < 0 for x in sums)


def _negate(c: Conjunct) -> Conjunct:
    if not isinstance(c, AtLeast):
        raise Refused("one_softmax: a strided domain cannot be taken out of another one")
    return AtLeast(expand(const(-1) - c.expr))

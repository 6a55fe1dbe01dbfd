"""The schedules of choose_strategy: ops with their launches in order, and the buffers they run over."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from nsagen.ir.graph import (
    TOKENS,
    Attend,
    AttendGrad,
    Combine,
    CombineGrad,
    Graph,
    Heads,
    LogSumExp,
    Pool,
    Select,
    Source,
    Value,
    chosen_ahead,
    writes,
)
from nsagen.ir.plan import ALONE, PLAIN, SHARED, SPECIALISED, Buffer, Guard, Launch, Op
from nsagen.passes.decode import decode_buffers, decode_op
from nsagen.passes.joint import joined, joint_launch, taken_binds, takeover
from nsagen.passes.loop_order import by_blocks, specialised_by_blocks
from nsagen.passes.specialise import keys_are_wide, keys_may_specialise, keys_name, queries_may_specialise, queries_name
from nsagen.sym import Expr, const, count, floordiv

BATCH = count("B")
BY_BLOCKS_FROM = 2048  # queries; fewer do not pay for the inverse of their lists
Binds = tuple[tuple[str, str], ...]


def operators(graph: Graph) -> tuple[Op, ...]:
    """A part and its gradient for every attention, the selection, and the whole op with its gradient if gated.

    A selection that needs no attention stays out of the whole op, which takes its lists like a caller's.
    """
    attends = [n for n in graph.nodes if isinstance(n, Attend)]
    grads = {n.branch: n for n in graph.nodes if isinstance(n, AttendGrad)}
    ops = [op for n in attends for op in _part(n, grads[n.branch], graph.heads)]
    ops += [_normaliser_op(n) for n in graph.nodes if isinstance(n, LogSumExp)]
    ops += [_selection_op(n) for n in graph.nodes if isinstance(n, Select)]
    combine = next((n for n in graph.nodes if isinstance(n, Combine)), None)
    combine_grad = next(n for n in graph.nodes if isinstance(n, CombineGrad))
    if combine:
        ops += [_whole(graph, attends, combine), _whole_grad(graph, attends, grads, combine, combine_grad)]
        ops += [_lean(graph, attends, combine), _lean_grad(graph, attends, grads, combine, combine_grad)]
    serving = _serving(graph, attends, combine)
    return (*ops, serving, decode_op(graph, serving.inputs))


def suffixes(sources: tuple[Source, ...]) -> tuple[str, ...]:
    """'' for the only source, else its number."""
    return ("",) if len(sources) == 1 else tuple(str(i) for i in range(len(sources)))


def inputs_of(attends: list[Attend]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(keys and values, block lists) that the attentions read, each once."""
    sources = [s for n in attends for s in n.sources]
    keys = dict.fromkeys(x for s in sources for x in (s.k, s.v))
    return tuple(keys), tuple(dict.fromkeys(s.listed.blocks for s in sources if s.listed))


def _key_binds(sources: tuple[Source, ...]) -> Binds:
    binds: list[tuple[str, str]] = []
    for source, suffix in zip(sources, suffixes(sources), strict=True):
        binds += [("k" + suffix, source.k), ("v" + suffix, source.v)]
        if source.listed:
            binds.append(("blocks" + suffix, source.listed.blocks))
    return tuple(binds)


def _forward(node: Attend) -> Launch:
    outs = (("out", node.out), ("lse", node.lse), *((("rest", node.rest),) if node.rest else ()))
    return Launch(f"{node.branch}_fwd", (("q", node.q), *_key_binds(node.sources), *outs))


def _forwards(node: Attend, heads: Heads) -> tuple[Launch, ...]:
    """The forward; by the number of queries one of two where the plan has both loop orders."""
    forward = _forward(node)
    if by_blocks(node, heads, backward=False) is None:
        return (forward,)
    listed = node.sources[0].listed
    assert listed is not None
    few, many = (Guard("length", op, BY_BLOCKS_FROM) for op in ("below", "from"))
    parts: Binds = (("out_parts", f"out_parts_{node.branch}"), ("lse_parts", f"lse_parts_{node.branch}"))
    keys: Binds = (("q", node.q), ("k", node.sources[0].k), ("v", node.sources[0].v), ("items", listed.blocks))
    merge = (*parts, ("blocks", listed.blocks), ("out", node.out), ("lse", node.lse))
    return (
        replace(forward, when=(few,)),
        Launch(f"{node.branch}_list", (*keys, *parts), over="chunks", when=(many,)),
        Launch(f"{node.branch}_merge", merge, over="chunks", when=(many,)),
    )


def _select(node: Select) -> tuple[Launch, Launch]:
    binds = (("q", node.q), ("k", node.k), ("lse", node.lse), ("scores", "scores"))
    best = (("scores", "scores"), ("blocks", node.out))
    return Launch("select_scores", binds, over="chunks"), Launch("select_best", best, over="chunks")


def _selection_op(node: Select) -> Op:
    return Op("select_blocks", "part", (node.q, node.k, node.lse), (node.out,), _select(node))


def _normaliser_op(node: LogSumExp) -> Op:
    launch = Launch("select_lse", (("q", node.q), ("k", node.k), ("lse", node.lse)))
    return Op("score_lse", "part", (node.q, node.k), (node.lse,), (launch,))


def _parts(source: Source) -> str:
    """The workspace of dk and dv in parts: of items, or of programs that share a tile of a pooled axis."""
    return "parts" if source.listed else f"parts_{source.axis.name}"


class _Gradients:
    """Launches of the attentions' gradients; the first to reach a value's gradient writes it, later ones add."""

    def __init__(self, gated: bool, heads: Heads) -> None:
        self.gated = gated  # with the gate's shift in place of lse
        self.heads = heads
        self.into: dict[str, str] = {}
        self.joint: _Joint | None = None

    def launches(self, node: Attend, grad: AttendGrad) -> list[Launch]:
        lse = grad.lse if self.gated else node.lse
        rows: Binds = (("d_out", grad.d_out), ("lse", lse), ("delta", grad.delta))
        if by_blocks(node, self.heads, backward=True):
            return self._by_blocks(node, grad, rows)
        adds, dq = self._target(node.q, grad.dq)
        result = [Launch(f"{node.branch}_dq", (("q", node.q), *_key_binds(node.sources), *rows, ("dq", dq)), adds)]
        if self.joint and self.joint.has(node):
            result = [*self.joint.launch(dq, adds), replace(result[0], when=(PLAIN,))]
        elif queries_may_specialise(node, self.heads):
            result = _both_forms(result[0], queries_name(result[0].kernel))
        for source, suffix, dk, dv in zip(node.sources, suffixes(node.sources), grad.dk, grad.dv, strict=True):
            adds, dk = self._target(source.k, dk)
            dv = self._target(source.v, dv)[1]
            keys: Binds = (("q", node.q), ("k", source.k), ("v", source.v))
            result += self._keys(f"{node.branch}", suffix, source, (*keys, *rows), (("dk", dk), ("dv", dv)), adds)
        if specialised_by_blocks(node, self.heads):
            result = [*(replace(x, when=(PLAIN,)) for x in result), *_in_parts(node.branch, *result)]
        return [self.joint.taking(x) for x in result] if self.joint else result

    def _by_blocks(self, node: Attend, grad: AttendGrad, rows: Binds) -> list[Launch]:
        """Over chunks: dk and dv with parts of dq, the sums of either."""
        source, dq_parts = node.sources[0], f"dq_parts_{node.branch}"
        assert source.listed is not None
        (adds_dq, dq), (adds, dk) = self._target(node.q, grad.dq), self._target(source.k, grad.dk[0])
        dv = self._target(source.v, grad.dv[0])[1]
        keys: Binds = (("q", node.q), ("k", source.k), ("v", source.v))
        launches = self._keys(node.branch, "", source, (*keys, *rows), (("dk", dk), ("dv", dv)), adds)
        launches[0] = replace(launches[0], binds=(*launches[0].binds, ("dq_parts", dq_parts)))
        sums = (("dq_parts", dq_parts), ("blocks", source.listed.blocks), ("dq", dq))
        return [replace(x, over="chunks") for x in (*launches, Launch(f"{node.branch}_dq", sums, adds_dq))]

    def _keys(self, branch: str, suffix: str, source: Source, loads: Binds, outs: Binds, adds: bool) -> list[Launch]:
        name = f"{branch}_dkv{suffix}"
        parts: Binds = (("parts", _parts(source)),)
        if source.listed is None and source.axis.is_tokens:
            plain, *copied = self._forms(Launch(name, (*loads, *outs), adds), source)
            sums = f"{branch}_sum{suffix}"
            shares = _shared if keys_are_wide(self.heads) else _alone_or_shared
            return [plain, *(y for x in copied for y in shares(x, sums, loads, parts, outs))]
        if source.listed:
            parts = (("items", source.listed.blocks), *parts)
        sums = Launch(f"{branch}_sum{suffix}", (*parts, *outs), adds)
        return [*self._forms(Launch(name, (*loads, *parts)), source), sums]

    def _forms(self, launch: Launch, source: Source) -> list[Launch]:
        """The launch, or one of two."""
        if not keys_may_specialise(source, self.heads):
            return [launch]
        return _both_forms(launch, keys_name(launch.kernel))

    def _target(self, value: str, gradient: str) -> tuple[bool, str]:
        known = value in self.into
        return known, self.into.setdefault(value, gradient)


class _Joint:
    """The launch of the joint kernel in the whole op's gradient, and what it changes about others."""

    def __init__(self, graph: Graph, grads: dict[str, AttendGrad]) -> None:
        self.graph, self.nodes, self.over = graph, joined(graph), takeover(graph)
        self.statistics = {branch: (grad.lse, grad.delta) for branch, grad in grads.items()}
        self.launched = False

    def has(self, node: Attend) -> bool:
        return node in self.nodes

    def launch(self, dq: str, accumulate: bool) -> list[Launch]:
        """At the first of its branches; nothing at the others."""
        first, self.launched = not self.launched, True
        return [joint_launch(self.graph, self.statistics, dq, accumulate)] if first else []

    def taking(self, launch: Launch) -> Launch:
        """The launch, with the statistics of keys that its kernel takes over, or without the keys that one leaves."""
        if self.over is None:
            return launch
        giver, keys = self.over.giver.branch, keys_name(f"{self.over.taker.branch}_dkv")
        if launch.kernel == keys:
            return replace(launch, binds=(*launch.binds, *taken_binds(self.over, self.statistics)))
        leaves = launch.kernel in (f"{giver}_grads", f"{giver}_dq_sum", f"{giver}_sum") and SPECIALISED in launch.when
        return replace(launch, leaves=self.over.taken.count) if leaves else launch


def _both_forms(launch: Launch, specialised: str) -> list[Launch]:
    return [replace(launch, when=(PLAIN,)), replace(launch, kernel=specialised, when=(SPECIALISED,))]


def _alone_or_shared(launch: Launch, sums: str, loads: Binds, parts: Binds, outs: Binds) -> list[Launch]:
    """The launch whose programs have a key tile each, and the one of programs that share it, with the sum."""
    shared = (replace(x, when=(*x.when, SHARED)) for x in _shared(launch, sums, loads, parts, outs))
    return [replace(launch, when=(*launch.when, ALONE)), *shared]


def _shared(launch: Launch, sums: str, loads: Binds, parts: Binds, outs: Binds) -> list[Launch]:
    """Parts of each program, and their sum."""
    stores = replace(launch, binds=(*loads, *parts), accumulate=False)
    return [stores, Launch(sums, (*parts, *outs), launch.accumulate, when=launch.when)]


def _in_parts(branch: str, dq: Launch, keys: Launch, sums: Launch) -> list[Launch]:
    """The same by the kernel that leaves parts of all three, and their sums."""
    bound, dq_parts = dict(dq.binds), (("dq_parts", f"dq_parts_{branch}"),)
    grads = Launch(f"{branch}_grads", (*keys.binds, *dq_parts))
    dq_sum = Launch(f"{branch}_dq_sum", (*dq_parts, ("blocks", bound["blocks"]), ("dq", bound["dq"])), dq.accumulate)
    return [replace(x, over="chunks", when=(SPECIALISED,)) for x in (grads, dq_sum, sums)]


def _part(node: Attend, grad: AttendGrad, heads: Heads) -> list[Op]:
    keys, lists = inputs_of([node])
    inputs = (node.q, *keys, *lists)
    rest: Binds = (("rest", node.rest),) if node.rest else ()
    delta = Launch("row_delta", (("d_out", grad.d_out), ("term", node.out), *rest, ("delta", grad.delta)))
    gradients = _Gradients(False, heads)
    launches = (delta, *gradients.launches(node, grad))
    outputs = tuple(gradients.into[x] for x in (node.q, *keys))
    name = f"{node.branch}_attention"
    return [
        Op(name, "part", inputs, writes(node), _forwards(node, heads)),
        Op(f"{name}_grad", "part_grad", (grad.d_out, *inputs, *writes(node)), outputs, launches),
    ]


def _whole_inputs(graph: Graph, attends: list[Attend], combine: Combine) -> tuple[str, ...]:
    """Differentiable ones first; lists only where they are there before."""
    keys, lists = inputs_of(attends)
    ahead = {*graph.inputs, *(n.out for n in chosen_ahead(graph))}
    return ("q", *keys, combine.gates, *(x for x in lists if x in ahead))


def serving_sources(graph: Graph) -> list[Launch]:
    """The forward's launches whose keys lie in a cache when serving, in order; selections run among them."""
    launches: list[Launch] = []
    for node in graph.nodes:
        if isinstance(node, Attend):
            forward = _forward(node)
            launches.append(replace(forward, binds=tuple(b for b in forward.binds if b[0] != "rest")))
        elif isinstance(node, LogSumExp):
            launches += _normaliser_op(node).launches
        elif isinstance(node, Select):
            launches += _select(node)
    return launches


def cached_name(kernel: str) -> str:
    return kernel.removesuffix("_fwd") + "_cached"


def _serving(graph: Graph, attends: list[Attend], combine: Combine | None) -> Op:
    """The whole forward over a cache, selections included, with nothing kept."""
    launches = [replace(x, kernel=cached_name(x.kernel)) for x in serving_sources(graph)]
    if combine:
        launches.append(_combination(combine))
    keys, lists = inputs_of(attends)
    scored = tuple(n.k for n in graph.nodes if isinstance(n, LogSumExp) and n.k not in keys)
    gates = (combine.gates,) if combine else ()
    inputs = ("q", *keys, *scored, *gates, *(x for x in lists if x in graph.inputs))
    return Op("serve", "serve", inputs, (graph.output,), tuple(launches))


def _combination(combine: Combine) -> Launch:
    return Launch("combine_fwd", (*_terms(combine), ("gates", combine.gates), ("out", combine.out)))


def carrier(attends: list[Attend]) -> str | None:
    """The forward whose programs may combine their rows: the last, if its keys lie in a row.

    Where they are warp-specialised they have the registers for it, and products beside which memory is idle.
    """
    last = attends[-1]
    return None if len(attends) == 1 or any(s.listed for s in last.sources) else f"{last.branch}_fwd"


def _terms(combine: Combine) -> Binds:
    return tuple((f"term{i}", t) for i, t in enumerate(combine.terms))


def _whole(graph: Graph, attends: list[Attend], combine: Combine) -> Op:
    launches: list[Launch] = []
    ahead = chosen_ahead(graph)
    for node in graph.nodes:
        if isinstance(node, Attend):
            launches += _forwards(node, graph.heads)
        elif isinstance(node, Select) and node not in ahead:
            launches += _select(node)
    launches.append(replace(_combination(combine), rides=carrier(attends)))
    outputs = (combine.out, *graph.saved)
    return Op("attention", "whole", _whole_inputs(graph, attends, combine), outputs, tuple(launches))


def _whole_grad(
    graph: Graph, attends: list[Attend], grads: dict[str, AttendGrad], combine: Combine, combine_grad: CombineGrad
) -> Op:
    inputs = _whole_inputs(graph, attends, combine)
    deltas = tuple((f"delta{i}", d) for i, d in enumerate(combine_grad.deltas))
    d_gates = combine_grad.d_gates or ""
    rests = tuple((f"rest{i}", r) for i, r in enumerate(combine_grad.rests) if r)
    lses = tuple((f"lse{i}", x) for i, x in enumerate(combine_grad.lses))
    shifts = tuple((f"shift{i}", x) for i, x in enumerate(combine_grad.shifts))
    loads = (("d_out", "d_out"), *_terms(combine), *rests, *lses, ("gates", combine.gates))
    split = (*loads, *deltas, *shifts, ("d_gates", d_gates))
    launches = [Launch("combine_bwd", split)]
    gradients = _Gradients(True, graph.heads)
    gradients.joint = _Joint(graph, grads)
    for node in attends:
        launches += gradients.launches(node, grads[node.branch])
    outputs = (*(gradients.into[x] for x in ("q", *inputs_of(attends)[0])), d_gates)
    return Op("attention_grad", "whole_grad", ("d_out", *inputs, *graph.saved), outputs, tuple(launches))


def _lean(graph: Graph, attends: list[Attend], combine: Combine) -> Op:
    """The whole op that keeps nothing of a branch: only the blocks it chose."""
    whole = _whole(graph, attends, combine)
    launches = tuple(_without_rest(x) for x in whole.launches)
    return Op("attention_lean", "lean", whole.inputs, (combine.out, *_lean_saved(graph, attends)), launches)


def _lean_saved(graph: Graph, attends: list[Attend]) -> tuple[str, ...]:
    dropped = {x for n in attends for x in writes(n)}
    return tuple(x for x in graph.saved if x not in dropped)


def _without_rest(launch: Launch) -> Launch:
    return replace(launch, binds=tuple(b for b in launch.binds if b[0] != "rest"))


def _lean_grad(
    graph: Graph, attends: list[Attend], grads: dict[str, AttendGrad], combine: Combine, combine_grad: CombineGrad
) -> Op:
    """Branch by branch: its output again, its gate's gradient from that, its own gradients."""
    whole = _whole_grad(graph, attends, grads, combine, combine_grad)
    gradients = _Gradients(True, graph.heads)
    launches: list[Launch] = []
    for node in attends:
        i = combine.terms.index(node.out)
        loads: Binds = (("d_out", "d_out"), (f"term{i}", node.out), (f"lse{i}", node.lse), ("gates", combine.gates))
        rest: Binds = ((f"rest{i}", node.rest),) if node.rest else ()
        stores = ((f"delta{i}", combine_grad.deltas[i]), (f"shift{i}", combine_grad.shifts[i]))
        gate = Launch(f"{node.branch}_gate", (*loads, *rest, *stores, ("d_gates", combine_grad.d_gates or "")))
        launches += [*_forwards(node, graph.heads), gate, *gradients.launches(node, grads[node.branch])]
    inputs = ("d_out", *_whole_inputs(graph, attends, combine), *_lean_saved(graph, attends))
    return Op("attention_lean_grad", "lean_grad", inputs, whole.outputs, tuple(launches))


def buffers(graph: Graph) -> tuple[Buffer, ...]:
    """One buffer a value, and the workspaces that only the plan knows of."""
    gradients = {x for n in graph.nodes if isinstance(n, AttendGrad) for x in (n.dq, *n.dk, *n.dv)}
    outputs, inputs = {graph.output, "d_gates", *gradients}, {*graph.inputs, "d_out"}

    def kind(v: Value) -> Literal["input", "output", "saved", "workspace"]:
        if v.name in graph.saved:
            return "saved"
        return "output" if v.name in outputs else "input" if v.name in inputs else "workspace"

    sizes = _sizes(graph)
    values = [Buffer(v.name, v.axes, tuple(sizes[a] for a in v.axes), v.dtype, kind(v)) for v in graph.values]
    return (*values, *_workspaces(graph, sizes), *decode_buffers(graph))


def _sizes(graph: Graph) -> dict[str, Expr]:
    h = graph.heads
    columns = next((len(n.terms) for n in graph.nodes if isinstance(n, Combine)), 1)
    sizes: dict[str, Expr] = {"B": BATCH, "T": TOKENS, "Hq": const(h.query), "Hkv": const(h.kv)}
    sizes |= {"Dqk": const(h.qk_dim), "Dv": const(h.v_dim), "C": const(columns)}
    for node in graph.nodes:
        if isinstance(node, Pool):
            sizes[node.axis.name] = node.axis.length()
    for source in (s for n in graph.nodes if isinstance(n, Attend) for s in n.sources):
        if source.listed:
            sizes["n"], sizes["l'"] = const(source.listed.count), const(source.listed.size)
    return sizes


def _workspaces(graph: Graph, sizes: dict[str, Expr]) -> list[Buffer]:
    """Scores of a chunk of queries; parts of dk and dv, of items or of splits. All are counted when they run."""
    found: list[Buffer] = []
    width = const(graph.heads.qk_dim + graph.heads.v_dim)
    for node in graph.nodes:
        if isinstance(node, Select):
            found.append(_scores(node, sizes["Hkv"]))
        for source in node.sources if isinstance(node, Attend) else ():
            programs = "shares" if source.axis.is_tokens else "splits"
            axes: tuple[str, ...] = (programs, "B", source.axis.name, "Hkv")
            shape: tuple[Expr, ...] = (count(programs), BATCH, source.axis.length(), sizes["Hkv"])
            if source.listed:
                axes, shape = ("items", "l'"), (count("items"), sizes["l'"])
            elif source.axis.is_tokens and not keys_may_specialise(source, graph.heads):
                continue
            found.append(Buffer(_parts(source), (*axes, "D"), (*shape, width), "float32", "workspace"))
        found += _list_parts(node, graph.heads) if isinstance(node, Attend) else []
    return found


def _scores(node: Select, heads: Expr) -> Buffer:
    """Of every key; or what a block has of its own keys, and of those of the block before where they overlap it."""
    name, columns = node.axis.name, node.axis.length()
    if node.grouped > 1:
        name, columns = "blocks", floordiv(TOKENS + node.size - 1, node.size)
    shape = (BATCH, count("chunk"), heads, const(len(node.group_weights)), columns)
    return Buffer("scores", ("B", "chunk", "Hkv", "parts", name), shape, "float32", "workspace")


def _list_parts(node: Attend, heads: Heads) -> list[Buffer]:
    """What a chunk's queries get from each tile of each block that they list."""
    listed = node.sources[0].listed
    if listed is None:
        return []
    axes = ("B", "chunk", "Hkv", "n", "tiles", "G")
    shape = (BATCH, count("chunk"), const(heads.kv), const(listed.count), count("tiles"), const(heads.group))
    found: list[Buffer] = []
    if by_blocks(node, heads, backward=False):
        out = Buffer(f"out_parts_{node.branch}", (*axes, "Dv"), (*shape, const(heads.v_dim)), "input", "workspace")
        found += [out, Buffer(f"lse_parts_{node.branch}", axes, shape, "float32", "workspace")]
    if by_blocks(node, heads, backward=True) or specialised_by_blocks(node, heads):
        dq = Buffer(f"dq_parts_{node.branch}", (*axes, "Dqk"), (*shape, const(heads.qk_dim)), "input", "workspace")
        found.append(dq)
    return found

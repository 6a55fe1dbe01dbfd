"""The schedules of choose_strategy: ops with their launches in order."""

from __future__ import annotations

from dataclasses import replace

from nsagen.ir.graph import (
    Attend,
    AttendGrad,
    Combine,
    CombineGrad,
    Graph,
    Heads,
    LogSumExp,
    Select,
    chosen_ahead,
    writes,
)
from nsagen.ir.plan import Guard, Launch, Op
from nsagen.passes.binds import Binds, key_binds
from nsagen.passes.decode import decode_op
from nsagen.passes.gradients import Gradients, Joint
from nsagen.passes.loop_order import by_blocks
from nsagen.passes.takeover import forward_takeover, in_both_forms

BY_BLOCKS_FROM = 2048  # queries; fewer do not pay for the inverse of their lists


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


def inputs_of(attends: list[Attend]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(keys and values, block lists) that the attentions read, each once."""
    sources = [s for n in attends for s in n.sources]
    keys = dict.fromkeys(x for s in sources for x in (s.k, s.v))
    return tuple(keys), tuple(dict.fromkeys(s.listed.blocks for s in sources if s.listed))


def _forward(node: Attend) -> Launch:
    outs = (("out", node.out), ("lse", node.lse), *((("rest", node.rest),) if node.rest else ()))
    return Launch(f"{node.branch}_fwd", (("q", node.q), *key_binds(node.sources), *outs))


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


def _part(node: Attend, grad: AttendGrad, heads: Heads) -> list[Op]:
    keys, lists = inputs_of([node])
    inputs = (node.q, *keys, *lists)
    rest: Binds = (("rest", node.rest),) if node.rest else ()
    delta = Launch("row_delta", (("d_out", grad.d_out), ("term", node.out), *rest, ("delta", grad.delta)))
    gradients = Gradients(False, heads)
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
    launches = in_both_forms(launches, forward_takeover(graph))
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
    gradients = Gradients(True, graph.heads, Joint(graph, grads))
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
    gradients = Gradients(True, graph.heads)
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

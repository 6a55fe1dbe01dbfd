"""What the host templates ask: custom ops with their bodies, the public parts, serving."""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.ir.graph import (
    Attend,
    AttendGrad,
    BlockList,
    Graph,
    KeyAxis,
    LogSumExp,
    Pool,
    Select,
    chosen_ahead,
    phi,
)
from nsagen.ir.plan import SPECIALISED, Kernel, Launch, Op, Plan
from nsagen.passes.joint import JOINT
from nsagen.passes.rings import rings
from nsagen.render.branches import domain, if_there
from nsagen.render.view import may_complete
from nsagen.render.walks import Named


@dataclass(frozen=True)
class OpView:
    name: str
    tensors: tuple[str, ...]
    outputs: tuple[str, ...]
    lines: tuple[str, ...]
    fakes: tuple[str, ...]
    gradient: str | None
    keep_output: bool
    annotation: str


@dataclass(frozen=True)
class PartView:
    name: str
    branch: str
    k: str
    v: str
    rows: str
    doc: str
    listed: BlockList | None
    rest: bool


def op_views(graph: Graph, plan: Plan) -> tuple[OpView, ...]:
    """The custom ops; serving is plain functions."""
    names = {op.name for op in plan.ops}
    return tuple(_op(op, graph, plan, names) for op in plan.ops if op.doc not in ("serve", "decode"))


@dataclass(frozen=True)
class ServingView:
    tensors: tuple[str, ...]
    keys: tuple[str, ...]  # what lies in the cache
    more: tuple[str, ...]  # gates and lists
    rings: dict[str, tuple[int, int, int]]  # of all that lies in the cache: sinks, tokens before a query, last tokens
    stores: str  # what a path without kernels is told of the keys
    lines: tuple[str, ...]  # over the cache
    plain: tuple[str, ...]  # over keys in a row
    output: str


def serving_view(graph: Graph, plan: Plan) -> ServingView:
    op = next(o for o in plan.ops if o.doc == "serve")
    strides = {source: axis.stride for source, axis in _axes(graph)}
    keys = tuple(x for x in op.inputs if x in strides)
    lines, plain = (tuple(_lines(op, plan, graph, cached)) for cached in (True, False))
    more = tuple(x for x in op.inputs[1:] if x not in strides)
    found = {value: (ring.sinks, ring.keep, ring.size) for value, ring in rings(graph).items()}
    stores = ", ".join(f"by_sequence.Seen({x}, {strides[x]}{f', {found[x]}' if x in found else ''})" for x in keys)
    return ServingView(op.inputs, keys, more, found, stores, lines, plain, op.outputs[0])


def _axes(graph: Graph) -> list[tuple[str, KeyAxis]]:
    """Keys and values with their axis."""
    found = [(x, s.axis) for n in graph.nodes if isinstance(n, Attend) for s in n.sources for x in (s.k, s.v)]
    return [*found, *((n.k, n.axis) for n in graph.nodes if isinstance(n, LogSumExp))]


def _op(op: Op, graph: Graph, plan: Plan, names: set[str]) -> OpView:
    gradient = op.name + "_grad" if op.name + "_grad" in names else None
    count = len(op.outputs)
    return OpView(
        name=op.name,
        tensors=op.inputs,
        outputs=op.outputs,
        lines=tuple(_lines(op, plan, graph)),
        fakes=tuple(_fake(name, graph) for name in op.outputs),
        gradient=gradient,
        keep_output=op.doc == "part",
        annotation="Tensor" if count == 1 else f"tuple[{', '.join(['Tensor'] * count)}]",
    )


def _lines(op: Op, plan: Plan, graph: Graph, cached: bool = False) -> list[str]:
    """A line for each host function: kernels that it launches together ride in the line of the first.

    cached: functions over a cache, which take its lengths and table.
    """
    lines: list[str] = []
    past, name, gated = ("past, ", "_cached", False) if cached else ("", "", False)
    for launch in op.launches:
        kernel, bind = plan.kernel(launch.kernel), dict(launch.binds)
        terms = [b for o, b in launch.binds if o.startswith("term")]
        if kernel.body == "attend_fwd" and SPECIALISED in launch.when:
            continue  # the other form's call tells of it
        if kernel.body == "attend_fwd":
            arguments = ", ".join(_arguments(kernel.branch, graph))
            outs = ", ".join(bind[o] for o in ("out", "lse", "rest") if o in bind)
            drops = "rest" not in bind and not cached and _attend(kernel.branch, graph).rest
            outs, keep = (f"{outs}, _", ", keep_rest=False") if drops else (outs, "")
            function = f"_{kernel.branch}{name or '_forward'}"
            asked, told = _left(op, launch, plan, graph)
            lines += asked
            carried = _carried(op, launch)
            if carried:  # what rides comes out, too
                outs, function = f"{outs}, {carried['out']}", f"_{kernel.branch}_combined"
                others = [b for o, b in carried.items() if o.startswith("term") and b != bind["out"]]
                arguments = ", ".join([arguments, *others, carried["gates"]])
            lines.append(f"{outs} = {function}(q, {arguments}, {past}cu_seqlens, scale{keep}{told})")
        elif kernel.name == JOINT:
            lines.append(_joint(launch, kernel))
        elif kernel.body in ("attend_dq", "sum_lists"):
            lines += _backward(op, launch, kernel.branch, bind, graph, plan)
        elif kernel.body == "score_lse":
            lines.append(f"{bind['lse']} = _log_sum_exp{name}(q, {bind['k']}, {past}cu_seqlens, scale)")
        elif kernel.body == "select_scores":
            chosen = next(n.out for n in graph.nodes if isinstance(n, Select))
            lines.append(f"{chosen} = _select{name}(q, {bind['k']}, {bind['lse']}, {past}cu_seqlens, scale)")
        elif kernel.body == "combine_fwd" and launch.rides is None:
            lines.append(f"{bind['out']} = _combine({', '.join(terms)}, {bind['gates']})")
        elif kernel.body == "combine_bwd" and kernel.branch:
            lines += _gate(launch, kernel.branch, first=not gated)
            gated = True
        elif kernel.body == "combine_bwd" and "gates" in bind:
            lines.append(_split(launch, terms, bind))
        elif kernel.body == "combine_bwd":
            lines.append(f"{bind['delta']} = _delta(d_out, {bind['term']}, {bind.get('rest', 'None')})")
    return lines


def _left(op: Op, launch: Launch, plan: Plan, graph: Graph) -> tuple[list[str], str]:
    """What is asked before a forward, and what it is told, where one leaves keys and another completes its rows."""
    taker = next((x for x in op.launches if "out_taken" in dict(x.binds)), None)
    if taker is None or not may_complete(plan.kernel(taker.kernel), plan):
        return [], ""
    if launch.kernel == taker.kernel:
        return [], f", lse_taken={dict(taker.binds)['lse_taken']} if leaves else None"
    if not any(x.leaves for x in op.launches if x.kernel == launch.kernel):
        return [], ""
    branch = plan.kernel(taker.kernel).branch
    return [f"leaves = _{branch}_completes(q, {', '.join(_arguments(branch, graph))}, cu_seqlens)"], ", leaves=leaves"


def _carried(op: Op, launch: Launch) -> dict[str, str] | None:
    """What is bound in the op's combination, where that rides on the launch."""
    return next((dict(x.binds) for x in op.launches if x.rides == launch.kernel), None)


def _gate(launch: Launch, branch: str, first: bool) -> list[str]:
    """The call of one branch's _gate_backward, after which its output goes; the first makes what all write into."""
    bound = {o.rstrip("0123456789"): b for o, b in launch.binds}
    rest = [bound["rest"]] if "rest" in bound else []
    arguments = ", ".join(["d_out", bound["term"], *rest, bound["lse"], "gates", bound["d_gates"]])
    made = [f"{bound['d_gates']} = launch.empty(gates, gates.shape, None)"] if first else []
    call = f"{bound['delta']}, {bound['shift']} = _{branch}_gate_backward({arguments})"
    return [*made, call, f"del {', '.join([bound['term'], *rest])}"]


def _split(launch: Launch, terms: list[str], bind: dict[str, str]) -> str:
    """The call of _combine_backward."""

    def bound(prefix: str) -> list[str]:
        return [b for o, b in launch.binds if o.startswith(prefix)]

    outs = f"({', '.join(bound('delta'))},), ({', '.join(bound('shift'))},), {bind['d_gates']}"
    arguments = ", ".join([*terms, *bound("rest"), *bound("lse"), bind["gates"]])
    return f"{outs} = _combine_backward(d_out, {arguments})"


def _joint(launch: Launch, kernel: Kernel) -> str:
    """The call of _joint_queries; later gradients ask whether it did anything."""
    bind, keys, statistics = dict(launch.binds), list[str](), list[str]()
    for i in range(len(kernel.walks)):
        keys += [bind[f"k{i}"], bind[f"v{i}"]]
        taken = kernel.takes is not None and kernel.takes.source == i
        statistics += [bind[f"{x}{more}"] for more in (i, *(["_taken"] if taken else [])) for x in ("lse", "delta")]
    into = bind["dq"] if launch.accumulate else "None"
    arguments = f"q, {', '.join(keys)}, d_out, ({', '.join(statistics)}), {into}"
    return f"joined = _{JOINT}({arguments}, cu_seqlens, scale)"


def _beside_joint(op: Op, branch: str, plan: Plan) -> str:
    """What a branch's gradient is told where the op has a joint kernel: BranchView.more."""
    joint = next((dict(x.binds) for x in op.launches if x.kernel == JOINT), None)
    if joint is None:
        return ""
    told = "joined is not None" if if_there(plan, f"{branch}_queries") else ""
    keys = if_there(plan, f"{branch}_keys")
    if keys and plan.kernel(keys).takes:
        told += f", ({joint['lse_taken']}, {joint['delta_taken']}) if joined is not None else (None, None)"
    leaves = max((x.leaves for x in op.launches if x.kernel == f"{branch}_grads"), default=0)
    told += f"{leaves} if joined is not None else 0" if leaves else ""
    return f", {told}" if told else ""


def _backward(op: Op, launch: Launch, branch: str, bind: dict[str, str], graph: Graph, plan: Plan) -> list[str]:
    """dq and the keys' gradients of one branch; what an earlier branch wrote goes in and comes out summed.

    Where two sources of the branch itself share keys, the second's gradients come out beside and are added after.
    """
    more = _beside_joint(op, branch, plan)
    first = "joined" if more.startswith(", joined") else "None"
    outs, into, after = [bind["dq"]], [bind["dq"] if launch.accumulate else first], []
    own = [x for x in op.launches if plan.kernel(x.kernel).branch == branch and SPECIALISED not in x.when]
    for other in own:
        bound = dict(other.binds)
        if "dk" not in bound:
            continue
        for name in (bound["dk"], bound["dv"]):
            shared = name in outs
            outs.append(f"{name}_more" if shared else name)
            into.append(name if other.accumulate and not shared else "None")
            after += [f"{name} = {name} + {name}_more"] if shared else []
    statistics = next(dict(x.binds) for x in own if "delta" in dict(x.binds))
    rows = ["d_out", statistics["lse"], statistics["delta"]]
    arguments = ["q", *_arguments(branch, graph), *rows, f"({', '.join(into)})"]
    return [f"{', '.join(outs)} = _{branch}_backward({', '.join(arguments)}, cu_seqlens, scale{more})", *after]


def _attend(branch: str, graph: Graph) -> Attend:
    return next(n for n in graph.nodes if isinstance(n, Attend) and n.branch == branch)


def _arguments(branch: str, graph: Graph) -> list[str]:
    node = _attend(branch, graph)
    return [*(x for s in node.sources for x in (s.k, s.v)), *(s.listed.blocks for s in node.sources if s.listed)]


def _fake(name: str, graph: Graph) -> str:
    """An empty tensor like the output: gradients like their inputs, the rest from q."""
    like = next((value for value, parts in graph.grads if name in parts), None)
    if like is not None:
        return f"torch.empty_like({like}, memory_format=torch.contiguous_format)"
    value, heads = graph.value(name), graph.heads
    if name.startswith("rest_"):
        return f"launch.rest(q, (*q.shape[:2], {heads.query}, {heads.v_dim}))"
    if value.dtype == "int32":
        count = next(s.listed.count for n in graph.nodes if isinstance(n, AttendGrad) for s in n.sources if s.listed)
        return f"q.new_empty((*q.shape[:2], {heads.kv}, {count}), dtype=torch.int32)"
    if value.dtype == "float32":
        return f"q.new_empty((*q.shape[:2], {heads.query}), dtype=launch.statistics(q))"
    return f"q.new_empty((*q.shape[:2], {heads.query}, {heads.v_dim}))"


def part_views(graph: Graph) -> tuple[PartView, ...]:
    """One public function a branch, for branches of one source (a union of several has no parts)."""
    attends = [n for n in graph.nodes if isinstance(n, Attend) and n.branch != "union"]
    return tuple(_part(n) for n in attends)


def _part(node: Attend) -> PartView:
    source = node.sources[0]
    keys = ("k", "v", "T") if source.axis.is_tokens else ("k_cmp", "v_cmp", "⌊(T − l)/d⌋ + 1")
    what = "key s" if source.axis.is_tokens else "block s"
    inside = " in a listed block and" if source.listed else ""
    doc = f"query t sees {what} iff{inside} {domain(source)}"
    return PartView(f"{node.branch}_attention", node.branch, *keys, doc, source.listed, node.rest is not None)


def whole_call(graph: Graph, plan: Plan, branches: tuple[str, ...]) -> Named:
    """The op that the public `attention` calls, and its arguments; `checks` hands every branch its (shared) tensor."""
    op = next((o for o in plan.ops if o.doc == "whole"), None) or next(o for o in plan.ops if o.doc == "part")
    raw = [x for x in graph.inputs if x not in ("q", "gates", "blocks")]

    def argument(name: str) -> str:
        if name not in raw:
            return name
        side, _, branch = name.partition("_")
        return f'{side}["{branch or branches[0]}"]'

    return Named(op.name, ", ".join(map(argument, op.inputs)))


def select_node(graph: Graph) -> Select | None:
    return next((n for n in graph.nodes if isinstance(n, Select)), None)


def pool_node(graph: Graph) -> Pool | None:
    return next(iter(phi(graph)), None)


def ahead_view(graph: Graph) -> dict[str, str] | None:
    """The selection that runs before the attention: its keys, and what they are a plain mean of, if not φ's."""
    if not chosen_ahead(graph):
        return None
    keys = next(n.k for n in graph.nodes if isinstance(n, LogSumExp))
    means = [n for n in graph.nodes if isinstance(n, Pool) and n not in phi(graph)]
    return {"k": keys, "mean_of": next((n.src for n in means if n.out == keys), "")}

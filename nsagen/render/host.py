"""What the host templates ask: branches with their host functions, custom ops with their bodies, the public parts."""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.ir.graph import Attend, AttendGrad, Graph, Pool, Source
from nsagen.ir.plan import BN, BT, T0, Launch, N, Op, Plan, Walk
from nsagen.render.view import Named
from nsagen.sym import Interval, conjunct_text, expand, substitute, symbol, to_text


@dataclass(frozen=True)
class KeySourceView:
    suffix: str
    block: int
    stride: int
    doc: str
    mask: str
    ranges: str
    k: str
    v: str
    dk: str
    dv: str
    dkv: str  # kernel


@dataclass(frozen=True)
class BranchView:
    branch: str
    fwd: str
    dq: str
    sources: tuple[KeySourceView, ...]

    @property
    def ks(self) -> list[str]:
        return [s.k for s in self.sources]

    @property
    def vs(self) -> list[str]:
        return [s.v for s in self.sources]

    @property
    def keys(self) -> list[str]:
        return [x for s in self.sources for x in (s.k, s.v)]

    @property
    def dkeys(self) -> list[str]:
        return [x for s in self.sources for x in (s.dk, s.dv)]

    @property
    def torch_grads(self) -> str:
        return ", ".join(f"dks[{i}], dvs[{i}]" for i in range(len(self.sources)))


@dataclass(frozen=True)
class OpView:
    name: str
    tensors: tuple[str, ...]
    outputs: tuple[str, ...]
    lines: tuple[str, ...]
    fakes: tuple[str, ...]
    gradient: str | None
    keep_output: bool


@dataclass(frozen=True)
class PartView:
    name: str
    branch: str
    op: str
    k: str
    v: str
    rows: str
    doc: str


def branch_views(graph: Graph, plan: Plan) -> tuple[BranchView, ...]:
    attends = [n for n in graph.nodes if isinstance(n, Attend)]
    return tuple(_branch(n, plan) for n in attends)


def _branch(node: Attend, plan: Plan) -> BranchView:
    many = len(node.sources) > 1
    sources = tuple(_key_source(node.branch, s, str(i) if many else "", plan) for i, s in enumerate(node.sources))
    return BranchView(node.branch, f"{node.branch}_fwd", f"{node.branch}_dq", sources)


def _key_source(branch: str, source: Source, suffix: str, plan: Plan) -> KeySourceView:
    index = int(suffix or 0)
    walks = [w for w in plan.kernel(f"{branch}_fwd").walks if w.source == index]
    pieces = [[conjunct_text(c) for c in p.where] for p in source.pieces]
    doc = "; or ".join(", ".join(p) for p in pieces) + "."
    mask = " | ".join("(" + " & ".join(f"({c})" for c in p) + ")" if len(pieces) > 1 else " & ".join(f"({c})" for c in p) for p in pieces)
    return KeySourceView(
        suffix=suffix,
        block=source.axis.block,
        stride=source.axis.stride,
        doc=doc,
        mask=mask,
        ranges="[" + ", ".join(_range(w) for w in walks) + "]",
        k="k" + suffix,
        v="v" + suffix,
        dk="dk" + suffix,
        dv="dv" + suffix,
        dkv=f"{branch}_dkv{suffix}",
    )


def _range(walk: Walk) -> str:
    """The walk's `some` range for the queries [t0, t1), from the same bounds as the kernels."""
    from nsagen.ir.graph import TOKENS

    assert isinstance(walk.some, Interval)
    n, t1 = symbol("n"), symbol("t1")
    at = {BT: t1 - T0, N: n, TOKENS: n, BN: BN}
    lo, hi = (to_text(expand(substitute(x, at)) if x.is_Add else substitute(x, at)) for x in (walk.some.lo, walk.some.hi))
    return f"({lo}, {hi})"


def op_views(graph: Graph, plan: Plan) -> tuple[OpView, ...]:
    names = {op.name for op in plan.ops}
    return tuple(_op(op, graph, plan, names) for op in plan.ops)


def _op(op: Op, graph: Graph, plan: Plan, names: set[str]) -> OpView:
    gradient = op.name + "_grad" if op.name + "_grad" in names else None
    return OpView(
        name=op.name,
        tensors=op.inputs,
        outputs=op.outputs,
        lines=tuple(line for launch in op.launches for line in _call(launch, plan, graph)),
        fakes=tuple(_fake(name, op, graph) for name in op.outputs),
        gradient=gradient,
        keep_output=op.doc == "part",
    )


def _call(launch: Launch, plan: Plan, graph: Graph) -> list[str]:
    """One line a launch; dk/dv ride in the line of their dq, which is one host function."""
    kernel, bind = plan.kernel(launch.kernel), dict(launch.binds)
    if kernel.body == "attend_dkv":
        return []
    if kernel.body == "attend_fwd":
        keys = _keys(kernel.branch, graph)
        return [f"{bind['out']}, {bind['lse']} = _{kernel.branch}_forward(q, {', '.join(keys)}, cu_seqlens, scale)"]
    if kernel.body == "attend_dq":
        return [_backward(launch, kernel.branch, bind, graph)]
    terms = [b for o, b in launch.binds if o.startswith("term")]
    if kernel.body == "combine_fwd":
        return [f"{bind['out']} = _combine({', '.join(terms)}, {bind['gates']})"]
    if "gates" in bind:
        deltas = ", ".join(b for o, b in launch.binds if o.startswith("delta"))
        return [f"({deltas}), {bind['d_gates']} = _combine_backward(d_out, {', '.join(terms)}, {bind['gates']})"]
    return [f"{bind['delta']} = _delta(d_out, {bind['term']})"]


def _backward(launch: Launch, branch: str, bind: dict[str, str], graph: Graph) -> str:
    grad = next(n for n in graph.nodes if isinstance(n, AttendGrad) and n.branch == branch)
    outs = [x for pair in zip(grad.dk, grad.dv, strict=True) for x in pair]
    gates = bind.get("gates", "None")
    before = bind["dq"] if launch.accumulate else "None"
    arguments = ["q", *_keys(branch, graph), "d_out", bind["lse"], bind["delta"], gates, str(launch.gate), before]
    return f"{', '.join([bind['dq'], *outs])} = _{branch}_backward({', '.join(arguments)}, cu_seqlens, scale)"


def _keys(branch: str, graph: Graph) -> list[str]:
    node = next(n for n in graph.nodes if isinstance(n, Attend) and n.branch == branch)
    return [x for s in node.sources for x in (s.k, s.v)]


def _fake(name: str, op: Op, graph: Graph) -> str:
    """An empty tensor like the output: gradients like their inputs, the rest from q."""
    like = next((value for value, parts in graph.grads if name in parts), None)
    if like is not None:
        return f"torch.empty_like({like}, memory_format=torch.contiguous_format)"
    value = graph.value(name)
    width = f", {graph.heads.v_dim}" if value.axes[-1] == "Dv" else ""
    dtype = ", dtype=torch.float32" if value.dtype == "float32" else ""
    if dtype:
        return f"q.new_empty((*q.shape[:2], {graph.heads.query}{width}), dtype=launch.statistics(q))"
    return f"q.new_empty((*q.shape[:2], {graph.heads.query}{width}))"


def part_views(graph: Graph, per_branch: bool) -> tuple[PartView, ...]:
    """One public function a branch, for branches of one source (a union of several has no parts)."""
    attends = [n for n in graph.nodes if isinstance(n, Attend) and len(n.sources) == 1]
    return tuple(_part(n) for n in attends if n.branch != "union")


def _part(node: Attend) -> PartView:
    source = node.sources[0]
    pooled = not source.axis.is_tokens
    pieces = "; or ".join(", ".join(map(conjunct_text, p.where)) for p in source.pieces)
    keys = ("k_cmp", "v_cmp", "⌊(T − l)/d⌋ + 1") if pooled else ("k", "v", "T")
    what = "block s" if pooled else "key s"
    name = f"{node.branch}_attention"
    return PartView(name, node.branch, name, *keys, f"query t sees {what} iff {pieces}")


def whole_call(graph: Graph, plan: Plan, per_branch: bool) -> Named:
    """The op that the public `attention` calls, and its arguments."""
    op = next((o for o in plan.ops if o.doc == "whole"), None) or next(o for o in plan.ops if o.doc == "part")
    raw = [x for x in graph.inputs if x not in ("q", "gates")]
    branches = {n.branch for n in graph.nodes if isinstance(n, Attend)}

    def argument(name: str) -> str:
        if name not in raw:
            return name
        side, _, branch = name.partition("_")
        owner = branch or next(b for b in _token_branches(graph, name, branches))
        return f'{side}["{owner}"]'

    return Named(op.name, ", ".join(map(argument, op.inputs)))


def _token_branches(graph: Graph, name: str, branches: set[str]) -> list[str]:
    """Branches that read the shared k or v itself; checks hands every branch its tensor."""
    readers = [n.branch for n in graph.nodes if isinstance(n, Attend) and any(name in (s.k, s.v) for s in n.sources)]
    return [b for b in readers if b in branches]


def pool_node(graph: Graph) -> Pool | None:
    return next((n for n in graph.nodes if isinstance(n, Pool)), None)

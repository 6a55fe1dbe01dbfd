"""What the host templates ask: branches with their host functions, custom ops with their bodies, the public parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nsagen.ir.graph import (
    TOKENS,
    Attend,
    AttendGrad,
    BlockList,
    Combine,
    Graph,
    KeyAxis,
    LogSumExp,
    Pool,
    Select,
    Source,
    chosen_ahead,
    phi,
)
from nsagen.ir.plan import BT, SPECIALISED, T0, Kernel, Launch, N, Op, Plan, Ring, Walk
from nsagen.passes.joint import JOINT, joined
from nsagen.passes.operators import cached_name, suffixes
from nsagen.passes.rings import rings
from nsagen.passes.specialise import GROUP_ROWS, KEYS_TILE, keys_are_wide
from nsagen.render.view import Combined, Named, combined_view
from nsagen.sym import Expr, Symbol, conjunct_text, evaluate, expand, substitute, symbol, to_text


@dataclass(frozen=True)
class KeySourceView:
    suffix: str
    block: int
    stride: int
    doc: str
    mask: str
    ranges: str
    listed: BlockList | None
    dkv: str  # kernels
    keys: str | None  # the specialised form of dkv, where there is one
    sum: str
    split: bool  # programs share a key tile
    steps: str  # of 64 rows: those of a key tile in the specialised form, no fewer than there are
    wide: bool  # that form leaves parts always, with two of dv
    key_parts: tuple[int, ...]  # widths of its tiles of keys
    ring: Ring | None  # how the keys lie in a cache

    @property
    def k(self) -> str:
        return "k" + self.suffix

    @property
    def v(self) -> str:
        return "v" + self.suffix

    @property
    def blocks(self) -> str:
        return "blocks" + self.suffix if self.listed else "None"

    @property
    def dk(self) -> str:
        return "d" + self.k

    @property
    def dv(self) -> str:
        return "d" + self.v


@dataclass(frozen=True)
class BranchView:
    branch: str
    fwd: str
    dq: str
    sources: tuple[KeySourceView, ...]
    rest: bool
    list_fwd: str | None  # kernels that go key block by key block, where there are any
    by_blocks_from: int  # queries, from which on the forward takes them
    merge: str
    list_dq: bool  # dq comes in parts from the kernel of dk and dv
    queries: str | None  # the specialised form of dq, where there is one
    query_boxes: tuple[str, ...]  # its maps, as a launch makes them for its config c
    grads: str | None  # the specialised kernel of all three in parts, where there is one
    grads_sum: str  # of its parts of dq
    grad_boxes: tuple[str, ...]  # its maps of keys and values, as a launch makes them for its config c
    column: int  # of its gate, where there are gates
    mapped: tuple[str, ...]  # keys and values that fwd and dq can take by tensor maps
    maps: tuple[str, ...]  # those, as a launch makes them for its config c
    boxes: tuple[str, ...]  # the maps of the forward whose warp copies, where it has that form
    combined: Combined | None  # what may ride on that form
    joined: bool  # dq may come from a kernel for several branches
    takes: bool  # some keys may count for another branch's gradients, too
    leaves: int  # the last blocks of a list, which may be left to another branch

    @property
    def more(self) -> str:
        """Parameters of the gradient in the whole operation: is dq there, do keys count twice, what is left."""
        joined, takes = ", joined=False" if self.joined else "", ", taken=(None, None)" if self.takes else ""
        return joined + takes + (", leaves=0" if self.leaves else "")

    @property
    def more_doc(self) -> str:
        told = ["joined: dq is in `into` already, and a warp can copy."] if self.joined else []
        told += ["taken: lse and delta of the branch that leaves this one some keys."] if self.takes else []
        told += ["leaves: the last blocks up to a query's own, left to another branch."] if self.leaves else []
        return f"\n\n    {' '.join(told)}\n    " if told else ""

    @property
    def listed(self) -> bool:
        return any(s.listed for s in self.sources)

    @property
    def by_maps(self) -> str:
        """What `launch.pick` is told, where it matters."""
        return f", launch.mapped(cu_seqlens, {', '.join(self.mapped)})" if self.mapped else ""

    @property
    def by_boxes(self) -> str:
        """The same of the forward."""
        return f", launch.mapped(cu_seqlens, {', '.join(self.keys)})" if self.boxes else self.by_maps

    @property
    def copies(self) -> bool:
        """Whether some of its gradients have a form in which a warp copies."""
        return self.queries is not None or any(s.keys for s in self.sources)

    @property
    def keys(self) -> list[str]:
        return [x for s in self.sources for x in (s.k, s.v)]

    @property
    def gradients(self) -> list[str]:
        return [x for s in self.sources for x in (s.dk, s.dv)]

    @property
    def tuples(self) -> str:
        """Keys and values as the torch path takes them."""
        ks, vs = (", ".join(getattr(s, side) for s in self.sources) for side in ("k", "v"))
        return f"({ks},), ({vs},)"

    @property
    def lists(self) -> str:
        return f"({', '.join(s.blocks for s in self.sources)},)"

    @property
    def torch_grads(self) -> str:
        return ", ".join(f"dks[{i}], dvs[{i}]" for i in range(len(self.sources)))

    @property
    def keeps(self) -> list[str]:
        """What the kernel over a cache is told of its rings: tokens before a query."""
        return [f"min({s.ring.keep}, past.capacity)" for s in self.sources if s.ring]

    @property
    def pointers(self) -> list[str]:
        """Keys, values and lists, as the kernels take them."""
        return [x for s in self.sources for x in (s.k, s.v, *((s.blocks,) if s.listed else ()))]

    @property
    def rows(self) -> list[str]:
        """The same of a cache, whose keys and values come with scales."""
        return [f"{x}.data" if x in self.keys else x for x in self.pointers]

    @property
    def arguments(self) -> list[str]:
        """The same as the host functions take them: lists last."""
        return [*self.keys, *(s.blocks for s in self.sources if s.listed)]


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


def branch_views(graph: Graph, plan: Plan) -> tuple[BranchView, ...]:
    attends = [n for n in graph.nodes if isinstance(n, Attend)]
    terms = next((n.terms for n in graph.nodes if isinstance(n, Combine)), tuple(n.out for n in attends))
    return tuple(_branch(n, plan, terms.index(n.out)) for n in attends)


def _branch(node: Attend, plan: Plan, column: int) -> BranchView:
    pairs = enumerate(zip(node.sources, suffixes(node.sources), strict=True))
    sources = tuple(_key_source(node.branch, s, suffix, i, plan) for i, (s, suffix) in pairs)
    bodies = {k.name: k.body for k in plan.kernels}
    by_blocks, queries, grads = (_if_there(plan, f"{node.branch}_{x}") for x in ("list", "queries", "grads"))
    guards = [g for op in plan.ops for x in op.launches if x.kernel == by_blocks for g in x.when]
    maps = list(_maps(plan, f"{node.branch}_fwd", sources))
    return BranchView(
        branch=node.branch,
        fwd=f"{node.branch}_fwd",
        dq=f"{node.branch}_dq",
        sources=sources,
        rest=node.rest is not None,
        list_fwd=by_blocks,
        by_blocks_from=int(guards[0].value) if guards else 0,
        merge=f"{node.branch}_merge",
        list_dq=bodies[f"{node.branch}_dq"] == "sum_lists",
        queries=queries,
        query_boxes=tuple(_boxes(plan, queries, sources)),
        grads=grads,
        grads_sum=f"{node.branch}_dq_sum",
        grad_boxes=tuple(_boxes(plan, grads, sources)),
        column=column,
        mapped=tuple(x for x, _ in maps),
        maps=tuple(made for _, made in maps),
        boxes=tuple(_boxes(plan, f"{node.branch}_fwd", sources)),
        combined=combined_view(plan.kernel(f"{node.branch}_fwd"), plan),
        joined=queries is not None and _if_there(plan, JOINT) is not None,
        takes=any(plan.kernel(s.keys).takes for s in sources if s.keys),
        leaves=max((x.leaves for x in plan.launches(f"{node.branch}_grads")), default=0) if grads else 0,
    )


@dataclass(frozen=True)
class JointView:
    """The kernel of several branches' dq."""

    name: str
    keys: tuple[str, ...]  # keys and values, as its host function calls them
    boxes: tuple[str, ...]  # their maps, as its launch makes them for its config c
    branches: str


def joint_view(graph: Graph, plan: Plan) -> JointView | None:
    if _if_there(plan, JOINT) is None:
        return None
    kernel, nodes = plan.kernel(JOINT), joined(graph)
    operands = [o for o in kernel.operands if o.role in ("k", "v")]
    widths = {"k": kernel.qk_parts, "v": kernel.v_parts}
    boxes = tuple(f"hopper.boxes({o.name}, {widths[o.role]}, c.bn)" for o in operands)
    return JointView(JOINT, tuple(o.name for o in operands), boxes, " and ".join(n.branch for n in nodes))


def _if_there(plan: Plan, kernel: str) -> str | None:
    return kernel if any(k.name == kernel for k in plan.kernels) else None


def _maps(plan: Plan, name: str, sources: tuple[KeySourceView, ...]) -> Iterator[tuple[str, str]]:
    """(keys or values, their maps)."""
    kernel = plan.kernel(name)
    mapped = {a.operand for a in kernel.accesses if a.map}
    for s in sources:
        for operand, widths in ((s.k, kernel.qk_parts), (s.v, kernel.v_parts)):
            if operand in mapped and s.listed:
                yield operand, f"launch.maps({operand}, {widths}, c.bn, {s.listed.size}, cu_seqlens)"


def _boxes(plan: Plan, name: str | None, sources: tuple[KeySourceView, ...]) -> Iterator[str]:
    """Keys and values of a kernel whose warp copies, as its launch maps them for its config c; none of another."""
    if name is None or not plan.kernel(name).specialised:
        return
    kernel = plan.kernel(name)
    for s in sources:
        for operand, widths in ((s.k, kernel.qk_parts), (s.v, kernel.v_parts)):
            yield f"hopper.boxes({operand}, {widths}, c.bn)"


def _key_source(branch: str, source: Source, suffix: str, index: int, plan: Plan) -> KeySourceView:
    walks = [w for w in plan.kernel(f"{branch}_fwd").walks if w.source == index]
    pieces = [" & ".join(f"({conjunct_text(c)})" for c in p.where) for p in source.pieces]
    return KeySourceView(
        suffix=suffix,
        block=source.axis.block,
        stride=source.axis.stride,
        doc=_domain(source),
        mask=pieces[0] if len(pieces) == 1 else " | ".join(f"({p})" for p in pieces),
        ranges="[" + ", ".join(_range(w) for w in walks) + "]",
        listed=source.listed,
        dkv=f"{branch}_dkv{suffix}",
        keys=_if_there(plan, f"{branch}_keys{suffix}"),
        sum=f"{branch}_sum{suffix}",
        split=plan.kernel(f"{branch}_dkv{suffix}").grid.split,
        steps=_steps(f"{branch}_keys{suffix}", plan) if _if_there(plan, f"{branch}_keys{suffix}") else "",
        wide=keys_are_wide(plan.heads),
        key_parts=plan.kernel(f"{branch}_dkv{suffix}").qk_parts,
        ring=next(o.ring for o in plan.kernel(cached_name(f"{branch}_fwd")).operands if o.name == "k" + suffix),
    )


FAR = 1 << 30


def _steps(kernel: str, plan: Plan) -> str:
    """Text of a key tile's steps: of what a tile amid many tokens sees, or of all queries where that has no end."""
    walk, step = plan.kernel(kernel).walks[0], GROUP_ROWS // plan.heads.group
    tile = GROUP_ROWS if keys_are_wide(plan.heads) else KEYS_TILE
    assert walk.some is not None
    at = {"s0": FAR >> 1, "T": FAR, "BN": tile, "BT": step, "N": FAR}
    seen = evaluate(walk.some.hi, at) - evaluate(walk.some.lo, at)
    every = f"-(-length // {step})"
    return every if seen > FAR >> 2 else f"min({every}, {-(-seen // step)})"


def _domain(source: Source) -> str:
    return "; or ".join(", ".join(map(conjunct_text, p.where)) for p in source.pieces)


def _range(walk: Walk) -> str:
    """The walk's `some` range for the queries [t0, t1), from the same bounds as the kernels."""
    assert walk.some is not None
    n, t1 = symbol("n"), symbol("t1")
    at: dict[Symbol, Expr] = {BT: t1 - T0, N: n, TOKENS: n}
    if walk.listed:
        return "(0, min(n, t1))"
    lo, hi = (to_text(_flat(substitute(x, at))) for x in (walk.some.lo, walk.some.hi))
    return f"({lo}, {hi})"


def _flat(x: Expr) -> Expr:
    return expand(x) if x.is_Add else x


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
        if kernel.body == "attend_fwd":
            arguments = ", ".join(_arguments(kernel.branch, graph))
            outs = ", ".join(bind[o] for o in ("out", "lse", "rest") if o in bind)
            drops = "rest" not in bind and not cached and _attend(kernel.branch, graph).rest
            outs, keep = (f"{outs}, _", ", keep_rest=False") if drops else (outs, "")
            function = f"_{kernel.branch}{name or '_forward'}"
            carried = _carried(op, launch)
            if carried:  # what rides comes out, too
                outs, function = f"{outs}, {carried['out']}", f"_{kernel.branch}_combined"
                others = [b for o, b in carried.items() if o.startswith("term") and b != bind["out"]]
                arguments = ", ".join([arguments, *others, carried["gates"]])
            lines.append(f"{outs} = {function}(q, {arguments}, {past}cu_seqlens, scale{keep})")
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
    told = "joined is not None" if _if_there(plan, f"{branch}_queries") else ""
    keys = _if_there(plan, f"{branch}_keys")
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
    doc = f"query t sees {what} iff{inside} {_domain(source)}"
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

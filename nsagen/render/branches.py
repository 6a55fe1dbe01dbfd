"""What the host templates ask of branches: their kernels and sources, and what their host functions are called with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nsagen.ir.graph import TOKENS, Attend, BlockList, Combine, Graph, Source
from nsagen.ir.plan import BT, T0, Kernel, N, Plan, Ring, Taken, Walk
from nsagen.passes.binds import suffixes
from nsagen.passes.joint import JOINT, joined
from nsagen.passes.operators import cached_name
from nsagen.passes.specialise import GROUP_ROWS, KEYS_TILE, keys_are_wide
from nsagen.render.view import Combined, combined_view, may_complete, may_leave
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
    leaves: int  # the last blocks of a list, which may be left to another branch's gradients
    forward_leaves: bool  # the same of the forward
    completed: Taken | None  # what the forward may take over

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


def branch_views(graph: Graph, plan: Plan) -> tuple[BranchView, ...]:
    attends = [n for n in graph.nodes if isinstance(n, Attend)]
    terms = next((n.terms for n in graph.nodes if isinstance(n, Combine)), tuple(n.out for n in attends))
    return tuple(_branch(n, plan, terms.index(n.out)) for n in attends)


def _branch(node: Attend, plan: Plan, column: int) -> BranchView:
    pairs = enumerate(zip(node.sources, suffixes(node.sources), strict=True))
    sources = tuple(_key_source(node.branch, s, suffix, i, plan) for i, (s, suffix) in pairs)
    bodies = {k.name: k.body for k in plan.kernels}
    by_blocks, queries, grads = (if_there(plan, f"{node.branch}_{x}") for x in ("list", "queries", "grads"))
    guards = [g for op in plan.ops for x in op.launches if x.kernel == by_blocks for g in x.when]
    maps, forward = list(_maps(plan, f"{node.branch}_fwd", sources)), plan.kernel(f"{node.branch}_fwd")
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
        combined=combined_view(forward, plan),
        joined=queries is not None and if_there(plan, JOINT) is not None,
        takes=any(plan.kernel(s.keys).takes for s in sources if s.keys),
        leaves=max((x.leaves for x in plan.launches(f"{node.branch}_grads")), default=0) if grads else 0,
        forward_leaves=may_leave(forward, plan),
        completed=forward.takes if may_complete(forward, plan) else None,
    )


@dataclass(frozen=True)
class JointView:
    """The kernel of several branches' dq."""

    name: str
    keys: tuple[str, ...]  # keys and values, as its host function calls them
    boxes: tuple[str, ...]  # their maps, as its launch makes them for its config c
    branches: str


def joint_view(graph: Graph, plan: Plan) -> JointView | None:
    if if_there(plan, JOINT) is None:
        return None
    kernel, branches = plan.kernel(JOINT), " and ".join(n.branch for n in joined(graph))
    keys = tuple(o.name for o in kernel.operands if o.role in ("k", "v"))
    return JointView(JOINT, keys, tuple(_made(kernel, keys)), branches)


def if_there(plan: Plan, kernel: str) -> str | None:
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
    yield from _made(plan.kernel(name), [x for s in sources for x in (s.k, s.v)])


def _made(kernel: Kernel, keys: Iterable[str]) -> Iterator[str]:
    for operand in keys:
        yield f"hopper.boxes({operand}, {kernel.v_parts if operand.startswith('v') else kernel.qk_parts}, c.bn)"


def _key_source(branch: str, source: Source, suffix: str, index: int, plan: Plan) -> KeySourceView:
    walks = [w for w in plan.kernel(f"{branch}_fwd").walks if w.source == index]
    pieces = [" & ".join(f"({conjunct_text(c)})" for c in p.where) for p in source.pieces]
    return KeySourceView(
        suffix=suffix,
        block=source.axis.block,
        stride=source.axis.stride,
        doc=domain(source),
        mask=pieces[0] if len(pieces) == 1 else " | ".join(f"({p})" for p in pieces),
        ranges="[" + ", ".join(_range(w) for w in walks) + "]",
        listed=source.listed,
        dkv=f"{branch}_dkv{suffix}",
        keys=if_there(plan, f"{branch}_keys{suffix}"),
        sum=f"{branch}_sum{suffix}",
        split=plan.kernel(f"{branch}_dkv{suffix}").grid.split,
        steps=_steps(f"{branch}_keys{suffix}", plan) if if_there(plan, f"{branch}_keys{suffix}") else "",
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


def domain(source: Source) -> str:
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

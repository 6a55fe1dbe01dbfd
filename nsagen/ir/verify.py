"""Structural checks of both levels: what every pass may rely on, and owes. Messages name the IR line."""

from __future__ import annotations

from itertools import product

from nsagen.errors import IRError
from nsagen.ir.graph import Attend, AttendGrad, CombineGrad, Graph, LogSumExp, Node, Pool, Select, Value, reads, writes
from nsagen.ir.plan import (
    FACTS,
    ONLY_SPECIALISED,
    SPECIALISED,
    WALK_QUERIES,
    Access,
    Kernel,
    Launch,
    Mask,
    Op,
    Plan,
    TileConfig,
    Walk,
)
from nsagen.sym import Expr, symbols_of

# From which pass on a field of the plan must be there.
ORDER = ("choose_strategy", "derive_bounds", "split_loops", "choose_tiles", "place_accesses")
SCALARS = {"T", "N", "BM", "BT", "BN", "t0", "s0", "start", "B"}
FORWARD_STORES = {"out", "lse", "scores", "blocks", "parts", "part_lse", "sums"}
RANGE_ENDS = {"some_lo", "some_hi", "all_lo", "all_hi"}


def verify(ir: Graph | Plan, stage: str) -> None:
    """Raise IRError unless `ir` is well formed after the pass `stage`."""
    if isinstance(ir, Graph):
        _graph(ir)
    else:
        _plan(ir, ORDER.index(stage) if stage in ORDER else len(ORDER) - 1)


def _need(condition: bool, line: str, rule: str) -> None:
    if not condition:
        raise IRError(f"{line}: {rule}")


# --- graph


def _graph(graph: Graph) -> None:
    names = [v.name for v in graph.values]
    _need(len(names) == len(set(names)), f"graph {graph.name}", "a value is declared twice")
    _need(graph.heads.query % graph.heads.kv == 0, f"graph {graph.name}", "KV heads do not divide query heads")
    defined = {*graph.inputs, "d_out"}
    for node in graph.nodes:
        _node(node, graph, set(names), defined)
    _need(graph.output in defined, f"return %{graph.output}", "is not defined")
    for name in graph.saved:
        _need(name in defined, f"saved %{name}", "is not defined")
    for name, parts in graph.grads:
        shapes = {(graph.value(p).axes, graph.value(p).dtype) for p in (name, *parts)}
        _need(len(shapes) == 1, f"grad %{name}", "a gradient's axes or dtype differ from its value's")


def _node(node: Node, graph: Graph, names: set[str], defined: set[str]) -> None:
    line = f"%{' %'.join(writes(node))}"
    for name in reads(node):
        _need(name in names, line, f"%{name} is not declared")
        _need(name in defined, line, f"%{name} is read before it is defined")
    _need(len(set(writes(node))) == len(writes(node)), line, "defines a value twice itself")
    for name in writes(node):
        _need(name in names, line, f"%{name} is not declared")
        _need(name not in defined, line, f"%{name} is defined twice")
    defined.update(writes(node))
    if isinstance(node, Pool):
        _need(
            node.axis.block % node.axis.stride == 0, line, f"d = {node.axis.stride} must divide l = {node.axis.block}"
        )
        _need(node.pool != "mean" or node.positions == "none", line, "mean pooling has no positions")
        _need((node.positions == "constant") == bool(node.because), line, "folded positions come with their reason")
        rows = (graph.value(node.src).axes[1], graph.value(node.out).axes[1])
        _need(rows == ("T", node.axis.name), line, "a pool maps tokens to its axis")
    if isinstance(node, (Attend, AttendGrad)):
        _attend(node, graph, line)
    if isinstance(node, Select):
        _select(node, graph, line)
    if isinstance(node, LogSumExp):
        _need(graph.value(node.k).axes[1] == node.axis.name, line, "keys lie on the node's axis")
    if isinstance(node, CombineGrad):
        _need(len(node.deltas) == len(node.terms) == len(node.rests), line, "one delta and one rest, or none, a term")
        _need((node.gates is None) == (node.d_gates is None), line, "gates and their gradient come together")
        _need(len(node.shifts) == (len(node.terms) if node.gates else 0), line, "one shift a gated term")
        _need(len(node.lses) == len(node.terms), line, "one lse a term")


def _select(node: Select, graph: Graph, line: str) -> None:
    _need(graph.value(node.out).dtype == "int32", line, "blocks are int32")
    _need(
        node.initial >= 0 and node.local >= 0 and node.initial + node.local <= node.count,
        line,
        "too many forced blocks",
    )
    _need(node.axis.stride <= node.axis.block <= node.size, line, "needs d <= l <= l'")
    if node.weights:
        _need(
            len(node.weights) == node.size // node.axis.stride - node.first,
            line,
            "one weight for each block that overlaps",
        )
        _need(
            sum(node.weights) * node.axis.stride == node.size * (node.axis.block // node.axis.stride),
            line,
            "weights miss tokens",
        )


def _attend(node: Attend | AttendGrad, graph: Graph, line: str) -> None:
    _need(bool(node.branch), line, "an attention has a branch name")
    for source in node.sources:
        keys: tuple[Value, Value] = (graph.value(source.k), graph.value(source.v))
        _need(keys[0].axes[1] == keys[1].axes[1] == source.axis.name, line, "keys and values lie on the source's axis")
        _need(bool(source.pieces), line, "a source has at least one piece")
        if source.listed:
            blocks = graph.value(source.listed.blocks)
            _need(blocks.dtype == "int32" and source.axis.is_tokens, line, "a list names blocks of tokens")
            _need(source.listed.size > 0 and source.listed.count > 0, line, "a list of nothing")
        for piece in source.pieces:
            free = {s for c in piece.where for s in symbols_of(c.expr)}
            _need(free <= {"t", "s"}, line, f"piece {piece.name} speaks of {sorted(free - {'t', 's'})}")


# --- plan


def _plan(plan: Plan, reached: int) -> None:
    kernels = {k.name: k for k in plan.kernels}
    buffers = {b.name for b in plan.buffers}
    _need(len(kernels) == len(plan.kernels), f"plan {plan.name}", "two kernels share a name")
    for buffer in plan.buffers:
        line = f"buffer %{buffer.name}"
        _need(len(buffer.axes) == len(buffer.shape), line, "one size an axis")
        _need(buffer.kind != "saved" or buffer.dtype != "gate", line, "cannot be saved")
        _symbols(buffer.shape, {"B", "T", "chunk", "items", "splits", "shares", "tiles"}, line)
    for op in plan.ops:
        _op(op, kernels, buffers)
    for launch in (x for op in plan.ops for x in op.launches):
        guarded = kernels[launch.kernel].body not in ONLY_SPECIALISED or SPECIALISED in launch.when
        _need(guarded, f"launch {launch.kernel}", "its kernel has one form, and nothing says that it is there")
    for kernel in plan.kernels:
        _kernel(kernel, reached)


def _symbols(xs: tuple[Expr, ...], allowed: set[str], line: str) -> None:
    for x in xs:
        _need(symbols_of(x) <= allowed, line, f"speaks of {sorted(symbols_of(x) - allowed)}")


def _op(op: Op, kernels: dict[str, Kernel], buffers: set[str]) -> None:
    line = f"op {op.name}"
    _need(op.doc.endswith("_grad") == op.name.endswith("_grad"), line, "gradients are named so")
    names = [None, *(x.kernel for x in op.launches), None]
    for before, launch, after in zip(names, op.launches, names[2:], strict=False):
        _need(launch.kernel in kernels, line, f"launches {launch.kernel}, which is not there")
        rides = launch.rides in (None, before, after)
        _need(rides, line, f"{launch.kernel} rides on {launch.rides}, which is not the launch before or after")
    for form, shares in product(("plain", "specialised"), (1, 2)):
        known, found = set(op.inputs), {"form": form, "shares": shares}
        for launch in (x for x in op.launches if all(g.holds(found[g.key]) for g in x.when if g.key in found)):
            known |= _launch(launch, kernels[launch.kernel], known, buffers, f"{line}: launch {launch.kernel}")
        for name in op.outputs:
            _need(name in known, line, f"output %{name} is never written")
    _taken(op, kernels, line)


def _taken(op: Op, kernels: dict[str, Kernel], line: str) -> None:
    """Keys that launches leave are taken by others, and none else are: in the forward by one that completes the rows,
    in the gradients once for dq and once for dk and dv."""
    left = {x.leaves for x in op.launches if SPECIALISED in x.when and kernels[x.kernel].branch in _givers(op, kernels)}
    takers = [(kernels[x.kernel], x) for x in op.launches if "lse_taken" in dict(x.binds)]
    counts = {k.takes.count for k, _ in takers if k.takes}
    _need(all(SPECIALISED in x.when for _, x in takers), line, "keys are taken over where a warp copies alone")
    rule = f"launches leave {sorted(left)} blocks, others take {sorted(counts)}"
    _need(left == counts and len(left) <= 1, line, rule)
    sizes = {k.takes.size for k, _ in takers if k.takes}
    sizes |= {w.listed.size for x in op.launches if x.leaves for w in kernels[x.kernel].walks if w.listed}
    _need(len(sizes) <= 1, line, f"blocks of {sorted(sizes)} tokens are left and taken")
    if any("out_taken" in dict(x.binds) for _, x in takers):
        _completed(op, [x for _, x in takers], line)
    elif takers:
        _taken_twice(op, takers, kernels, line)


def _completed(op: Op, takers: list[Launch], line: str) -> None:
    """One launch completes the rows of one that leaves keys, and comes after it."""
    givers = [x for x in op.launches if x.leaves]
    _need(
        len(givers) == len(takers) == 1, line, f"{len(givers)} launches leave keys, {len(takers)} complete their rows"
    )
    of, by = dict(givers[0].binds), dict(takers[0].binds)
    rows = [(of[x], by.get(f"{x}_taken")) for x in ("out", "lse")]
    _need(
        all(a == b for a, b in rows),
        line,
        f"what is left of {rows[0][0]}, {rows[1][0]} completes {rows[0][1]}, {rows[1][1]}",
    )
    late = op.launches.index(givers[0]) > op.launches.index(takers[0])
    _need(not late, line, "rows are completed before they are written")


def _taken_twice(op: Op, takers: list[tuple[Kernel, Launch]], kernels: dict[str, Kernel], line: str) -> None:
    joint = [i for i, x in enumerate(op.launches) if kernels[x.kernel].apart]
    after = [i for i, x in enumerate(op.launches) if x.leaves or "lse_taken" in dict(x.binds)]
    _need(all(i >= min(joint, default=0) for i in after), line, "keys are left before it is known that they are taken")
    for shares in (1, 2):
        runs = [(k, x) for k, x in takers if all(g.holds(shares) for g in x.when if g.key == "shares")]
        stored = sorted(o.role for k, x in runs for o in k.operands if o.mode != "load" and o.name in dict(x.binds))
        wanted = ["dk", "dq", "dv"] if shares == 1 else ["dq", "parts"]
        _need(stored == wanted, line, f"the keys taken count for {stored}, not {wanted}")


def _givers(op: Op, kernels: dict[str, Kernel]) -> set[str]:
    return {kernels[x.kernel].branch for x in op.launches if x.leaves}


def _launch(launch: Launch, kernel: Kernel, known: set[str], buffers: set[str], line: str) -> set[str]:
    operands = {o.name: o for o in kernel.operands}
    bound = dict(launch.binds)
    _need(bound.keys() <= operands.keys(), line, f"no operand {sorted(bound.keys() - operands.keys())}")
    missing = [o.name for o in kernel.operands if o.name not in bound and not o.optional]
    _need(not missing, line, f"operands {missing} are not bound")
    _need(launch.over in (None, "chunks"), line, "host loops run over chunks")
    keys = [g.key for g in launch.when if g.op.startswith("is") and g.value == ""]
    _need(not keys, line, f"guard on {keys} compares with nothing")
    for name, buffer in bound.items():
        _need(buffer in buffers, line, f"%{buffer} is not declared")
        mode = operands[name].mode
        reading = mode in ("load", "update") or (launch.accumulate and mode == "accumulate")
        _need(not reading or buffer in known, line, f"%{buffer} is read before it is written")
    return {b for n, b in bound.items() if operands[n].mode != "load"}


def _kernel(kernel: Kernel, reached: int) -> None:
    line = f"kernel {kernel.name}"
    _need(bool(kernel.choices) and all(c.what and c.because for c in kernel.choices), line, "a choice has no reason")
    _need(kernel.grid.axis is not None or not kernel.walks, line, "a kernel over flat rows walks nothing")
    stores = {o.role for o in kernel.operands if o.mode != "load"}
    _need(not kernel.cached or stores <= FORWARD_STORES, line, "only a forward runs over a cache")
    parts = any(o.role in ("parts", "part_lse", "scores") and o.mode == "store" for o in kernel.operands)
    _need(parts or not kernel.grid.split, line, "programs that share a loop store parts of its result, or scores")
    _need(not kernel.body.startswith("attend") or bool(kernel.branch), line, "attention kernels belong to a branch")
    _need(
        kernel.body == "split_attend" or (kernel.select is None) == ("select" not in kernel.body),
        line,
        "selection kernels say what they select",
    )
    _need(str(kernel.grid.step) in ("BT", "BN", "BM"), line, "the grid steps by a tile size")
    _need(kernel.grid.order in ("ascending", "descending"), line, "tiles run up or down")
    _need(all(f in FACTS for f in kernel.facts), line, f"unknown facts {kernel.facts}")
    ringed = {o.role for o in kernel.operands if o.ring}
    _need(not ringed or (kernel.cached and ringed <= {"k", "v"}), line, "only keys and values of a cache lie in a ring")
    roles = {o.role for o in kernel.operands if o.rows == "key"}
    _need(roles <= {"k", "v", "dk", "dv", "items", "parts"}, line, f"{sorted(roles)} cannot lie on key rows")
    for walk in kernel.walks:
        _walk(walk, kernel, reached, f"{line}: walk {walk.piece.name}")
    if reached >= ORDER.index("choose_tiles"):
        _need(sum(kernel.qk_parts) > 0 and sum(kernel.v_parts) > 0, line, "head dims are not split in parts")
        for table in kernel.tiles:
            _tiles([c for c in table.configs if c.dropped is None], f"{line}: tiles {table.arch} {table.bits}-bit")
    if reached >= ORDER.index("place_accesses"):
        named = [a.operand for a in kernel.accesses]
        _need(named == [o.name for o in kernel.operands], line, "every operand has one access")
        for access in kernel.accesses:
            _access(access, kernel, f"{line}: access {access.operand}")


def _walk(walk: Walk, kernel: Kernel, reached: int, line: str) -> None:
    _need(walk.listed is None or walk.axis.is_tokens, line, "lists name blocks of tokens")
    sources = {o.source for o in kernel.operands if o.role == "k"}
    _need(walk.source in sources, line, f"source {walk.source} has no keys among the operands")
    _need((walk.direction == "reverse") == (kernel.body in WALK_QUERIES), line, "only a key tile walks the queries")
    if reached >= ORDER.index("derive_bounds"):
        _need(walk.some is not None, line, "has no bounds")
        _need((walk.all is None) == (walk.refused is not None), line, "either an all-range or the reason for none")
        ends = [x for r in (walk.some, walk.all) if r for x in (r.lo, r.hi)]
        _symbols(tuple(ends), SCALARS, line)
    if reached >= ORDER.index("split_loops"):
        _segments(walk, line)


def _segments(walk: Walk, line: str) -> None:
    names = {c.name for c in walk.cuts}
    known = set(RANGE_ENDS | {"BN", "BT"})
    for cut in walk.cuts:
        _symbols((cut.at,), known, f"{line}: cut {cut.name}")
        known.add(cut.name)
    _need(bool(walk.segments), line, "has no segments")
    for before, after in zip(walk.segments, walk.segments[1:], strict=False):
        _need(before.hi == after.lo, line, f"segments {before.name} and {after.name} leave a gap")
    for segment in walk.segments:
        _symbols((segment.lo, segment.hi), names, f"{line}: seg {segment.name}")
        _need(segment.name != "mid" or not segment.masks, line, "the middle has no mask")
        for mask in segment.masks:
            _mask(mask, f"{line}: seg {segment.name}")


def _mask(mask: Mask, line: str) -> None:
    _need(symbols_of(mask.conjunct.expr) <= {"t", "s", "T", "N"}, line, "a mask speaks of query and key")
    _need(mask.extent or symbols_of(mask.conjunct.expr) <= {"t", "s"}, line, "only an extent speaks of lengths")
    _symbols(mask.unless, {"BN", "BT"}, line)


def _tiles(kept: list[TileConfig], line: str) -> None:
    _need(bool(kept), line, "no candidate fits")
    _need([c.cost for c in kept] == sorted(c.cost for c in kept), line, "candidates are not ranked")
    for c in kept:
        _need(c.bm > 0 and c.bn > 0 and c.warps in (1, 2, 4, 8, 16) and c.stages > 0, line, f"impossible candidate {c}")
        _need(c.registers > 0 and c.smem >= 0, line, f"{c.bm}x{c.bn} cannot run and was not dropped")
        _need(c.cap == 0 or 32 <= c.cap <= 255, line, f"{c.label}: no program runs in so many registers")
        _need(c.spills == 0 or c.specialised, line, f"{c.label}: there is another candidate that does not spill")


def _access(access: Access, kernel: Kernel, line: str) -> None:
    operand = next(o for o in kernel.operands if o.name == access.operand)
    _need(access.bits == 64 or operand.role not in ("q", "k", "v"), line, "the caller's strides need 64-bit offsets")
    _need(access.guard == "tile" or operand.mode == "load", line, "an unguarded store")
    _need(
        not access.map or (operand.rows == "key" and operand.mode == "load"), line, "maps are of keys that are walked"
    )
    _need(bool(access.buffers) or operand.optional, line, "no launch binds it")
    _symbols((access.base,), {"start"}, line)

"""Text dumps of both levels: what goldens and `nsagen explain` show. Writing only; nothing parses them."""

from __future__ import annotations

from nsagen.ir.graph import Attend, Combine, CombineGrad, Graph, LogSumExp, Node, Pool, Select, Source, writes
from nsagen.ir.plan import Access, Buffer, Kernel, Launch, Mask, Op, Operand, Plan, TileTable, Walk
from nsagen.sym import Interval, conjunct_text, to_text

SHOWN_TILES = 3


def dump(ir: Graph | Plan) -> str:
    return _graph(ir) if isinstance(ir, Graph) else _plan(ir)


def _graph(graph: Graph) -> str:
    h = graph.heads
    lines = [f"graph {graph.name}  heads {h.query}/{h.kv}  dims {h.qk_dim}/{h.v_dim}"]
    lines += [
        f"  {'input' if v.name in graph.inputs else 'value'} %{v.name} [{', '.join(v.axes)}] {v.dtype}"
        for v in graph.values
    ]
    lines += ["", *(line for n in graph.nodes for line in _node(n)), f"  return %{graph.output}"]
    if graph.saved:
        lines.append("  saved " + _names(graph.saved))
    lines += [f"  grad %{name} = {' + '.join('%' + p for p in parts)}" for name, parts in graph.grads]
    return "\n".join(lines) + "\n"


def _names(names: tuple[str, ...]) -> str:
    return " ".join("%" + n for n in names)


def _node(node: Node) -> list[str]:
    if isinstance(node, Pool):
        positions = "" if node.positions == "none" else f" positions {node.positions.replace('_', ' ')}"
        reason = f"    because {node.because}" if node.because else ""
        blocks = f"l {node.axis.block} d {node.axis.stride}"
        return [f"  %{node.out} = pool {node.pool}{positions} %{node.src} {blocks}{reason}"]
    if isinstance(node, Select):
        return [_select(node)]
    if isinstance(node, LogSumExp):
        return [f"  %{node.lse} = logsumexp %{node.q} %{node.k} l {node.axis.block} d {node.axis.stride}"]
    if isinstance(node, Combine):
        return [f"  %{node.out} = combine {_names(node.terms)} gates %{node.gates}"]
    if isinstance(node, CombineGrad):
        outs = (*node.deltas, *node.shifts, *((node.d_gates,) if node.d_gates else ()))
        gates = f" gates %{node.gates}" if node.gates else ""
        rests = tuple(r for r in node.rests if r)
        more = f" rests {_names(rests)}" if rests else ""
        return [f"  {_names(outs)} = combine_grad %{node.d_out} {_names(node.terms)}{more}{gates}"]
    if isinstance(node, Attend):
        head = f"  {_names(writes(node))} = attend {node.branch} %{node.q}"
        return [head, *(line for s in node.sources for line in _source(s))]
    outs, read = (node.dq, *node.dk, *node.dv), (node.q, node.lse, node.delta, node.d_out)
    head = f"  {_names(outs)} = attend_grad {node.branch} {_names(read)}"
    return [head, *(line for s in node.sources for line in _source(s))]


def _select(node: Select) -> str:
    axis = node.axis
    weights = f" first {node.first} weights {' '.join(map(str, node.weights))}" if node.weights else ""
    forced = f"initial {node.initial} local {node.local}"
    return (
        f"  %{node.out} = select %{node.q} %{node.k} %{node.lse} l {axis.block} d {axis.stride} "
        f"l' {node.size} n {node.count} {forced}{weights}"
    )


def _source(source: Source) -> list[str]:
    axis = source.axis
    listed = f" blocks %{source.listed.blocks} l' {source.listed.size} n {source.listed.count}" if source.listed else ""
    lines = [f"    over %{source.k} %{source.v} axis {axis.name} l {axis.block} d {axis.stride}{listed}"]
    return lines + [f"      piece {p.name}: {', '.join(map(conjunct_text, p.where))}" for p in source.pieces]


def _plan(plan: Plan) -> str:
    lines = [f"plan {plan.name}", "", *map(_buffer, plan.buffers), ""]
    lines += [line for op in plan.ops for line in _op(op)]
    lines += [line for kernel in plan.kernels for line in ("", *_kernel(kernel))]
    return "\n".join(lines) + "\n"


def _buffer(buffer: Buffer) -> str:
    shape = ", ".join(f"{a}={to_text(s)}" for a, s in zip(buffer.axes, buffer.shape, strict=True))
    return f"buffer {buffer.kind:9} %{buffer.name} [{shape}] {buffer.dtype}"


def _op(op: Op) -> list[str]:
    return [f"op {op.name} ({op.doc}) {_names(op.inputs)} -> {_names(op.outputs)}", *map(_launch, op.launches)]


def _launch(launch: Launch) -> str:
    binds = " ".join(f"{operand}=%{buffer}" for operand, buffer in launch.binds)
    flags = f" over {launch.over}" if launch.over else ""
    flags += " accumulate" if launch.accumulate else ""
    flags += f" rides on {launch.rides}" if launch.rides else ""
    flags += f" leaves {launch.leaves}" if launch.leaves else ""
    when = "".join(f" when {g.key} {g.op} {g.value}" for g in launch.when)
    return f"  launch {launch.kernel} {binds}{flags}{when}"


def _kernel(kernel: Kernel) -> list[str]:
    grid = kernel.grid
    order = grid.order + (", split" if grid.split else "")
    rows = "rows" if grid.axis is None else f"{grid.axis.name} tiles, KV heads, batch, {order}"
    cached = ", keys in a cache" if kernel.cached else ""
    lines = [f"kernel {kernel.name:24} template {kernel.body}{cached}", f"  grid     {grid.step} per program: {rows}"]
    lines += [f"  strategy {c.what:18} because {c.because}" for c in kernel.choices]
    lines += [
        f"  operand  {o.name} ({o.role}, {o.rows} rows, {o.mode}{', optional' if o.optional else ''}{_ring(o)})"
        for o in kernel.operands
    ]
    lines += [line for w in kernel.walks for line in _walk(w)]
    if kernel.takes:
        of = kernel.takes
        lines.append(f"  takes    source {of.source}: the last {of.count} blocks of l' {of.size}")
    if kernel.qk_parts:
        lines.append(f"  parts    qk {'+'.join(map(str, kernel.qk_parts))}  v {'+'.join(map(str, kernel.v_parts))}")
    lines += [line for t in kernel.tiles for line in _tiles(t)]
    lines += [_access(a) for a in kernel.accesses]
    return lines + [f"  fact     {f}" for f in kernel.facts]


def _ring(operand: Operand) -> str:
    ring = operand.ring
    return f", ring of {ring.sinks} sinks and {ring.keep} before a query" if ring else ""


def _walk(walk: Walk) -> list[str]:
    where = ", ".join(map(conjunct_text, walk.piece.where))
    listed = f" listed n {walk.listed.count} l' {walk.listed.size}" if walk.listed else ""
    lines = [
        f"  walk     {walk.piece.name} {walk.direction} source {walk.source} axis {walk.axis.name}{listed}: {where}"
    ]
    if walk.some:
        every = f"all {_interval(walk.all)}" if walk.all else f"all refused: {walk.refused}"
        lines.append(f"    range  some {_interval(walk.some)}  {every}")
    lines += [f"    cut    {c.name} = {to_text(c.at)}" for c in walk.cuts]
    for s in walk.segments:
        masks = ", ".join(map(_mask, s.masks)) or "none"
        lines.append(f"    seg    {s.name:4} [{to_text(s.lo)}, {to_text(s.hi)})  mask {masks}")
    return lines


def _interval(interval: Interval) -> str:
    return f"[{to_text(interval.lo)}, {to_text(interval.hi)})"


def _mask(mask: Mask) -> str:
    text = conjunct_text(mask.conjunct) + (" (extent)" if mask.extent else "")
    return text + "".join(f" unless {to_text(u)} >= 0" for u in mask.unless)


def _tiles(table: TileTable) -> list[str]:
    kept = [c for c in table.configs if c.dropped is None]
    gone = [c for c in table.configs if c.dropped]
    lines = [f"  tiles    {table.arch} {table.bits}-bit: {len(kept)} kept, {len(gone)} dropped"]
    for c in (*kept[:SHOWN_TILES], *gone[:1]):
        fate = f"dropped: {c.dropped}" if c.dropped else f"smem {c.smem}, registers {c.registers}, cost {c.cost}"
        lines.append(f"    {c.label}  {fate}")
    return lines


def _access(a: Access) -> str:
    by = ", by map" if a.map else ""
    return (
        f"  access   {a.operand} = {_names(a.buffers)}: rows from {to_text(a.base)}, guard {a.guard}, {a.bits}-bit{by}"
    )

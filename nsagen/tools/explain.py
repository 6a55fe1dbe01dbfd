"""`nsagen explain`: what was decided and why, the IR after a pass, and what an operation costs at least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from nsagen.compiler import Compiled, Stage
from nsagen.errors import NsagenError
from nsagen.ir.graph import Attend, Pool, Source
from nsagen.ir.plan import Kernel, Plan, Segment, TileConfig, TileTable, Walk
from nsagen.sym import Interval, conjunct_text, to_text
from nsagen.tools import measured
from nsagen.tools.console import table, unified
from nsagen.tools.costs import H200, Work, dense_flops, flops_of_pair, formula, main_ops, work_of_op

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
SHARES_AT = 65536


def stage_of(compiled: Compiled, name: str) -> Stage:
    """The stage after the pass of that name."""
    for stage in compiled.stages:
        if stage.name == name:
            return stage
    raise NsagenError(f"no pass is named {name!r}: choose from {', '.join(s.name for s in compiled.stages)}")


def diffs(compiled: Compiled, only: str | None = None) -> str:
    """What each pass (or one of them) changed in the dump."""
    if only:
        stage_of(compiled, only)
    pairs = zip(compiled.stages, compiled.stages[1:], strict=False)
    return "\n".join(
        unified(a.text, b.text, f"after {a.name}", f"after {b.name}") for a, b in pairs if only in (None, b.name)
    )


def summary(compiled: Compiled) -> str:
    """Everything on one page."""
    h, spec, plan = compiled.plan.heads, compiled.spec, compiled.plan
    lines = [
        f"{spec.name}: {h.query} query heads on {h.kv} KV heads (group {h.group}), dims {h.qk_dim}/{h.v_dim}, "
        f"K/V {spec.kv}, combine {spec.combine}",
        "passes: " + ", ".join(f"{s.name} {1e3 * s.seconds:.0f} ms" for s in compiled.stages),
        "",
        "WHAT A QUERY SEES",
        *_domains(compiled),
        *_positions(compiled),
        *_dense(compiled),
    ]
    for kernel in plan.kernels:
        lines += ["", *_kernel(kernel)]
    return "\n".join([*lines, "", *_costs(plan), *measured.lines(plan)])


def _domains(compiled: Compiled) -> Iterator[str]:
    for node in (n for n in compiled.graph.nodes if isinstance(n, Attend)):
        for source in node.sources:
            for piece in source.pieces:
                where = ", ".join(map(conjunct_text, piece.where))
                keys = formula(piece, source.axis, source.listed)
                yield f"  {node.branch}/{piece.name} over {_axis(source)}: {where}  ({keys} keys)"


def _positions(compiled: Compiled) -> Iterator[str]:
    for node in (n for n in compiled.graph.nodes if isinstance(n, Pool) and n.because):
        yield f"  φ of %{node.src} ({node.pool}): positions folded, because {node.because}"


def _dense(compiled: Compiled) -> Iterator[str]:
    if below := compiled.spec.dense_below:
        yield f"  below {below} tokens (dense_below): all keys s <= t in every branch, through torch, without φ"


def _axis(source: Source) -> str:
    axis, listed = source.axis, source.listed
    if listed:
        return f"{listed.count} listed blocks of {listed.size} tokens"
    return "tokens" if axis.is_tokens else f"blocks of {axis.block} tokens, one every {axis.stride}"


def _kernel(kernel: Kernel) -> Iterator[str]:
    grid = kernel.grid
    rows = "flat rows" if grid.axis is None else f"{grid.axis.name} × KV heads × batch, {grid.order}"
    yield f"KERNEL {kernel.name}  ({kernel.body}; {grid.step} of {rows})"
    yield from (f"  {c.what} because {c.because}" for c in kernel.choices)
    for walk in kernel.walks:
        yield from _walk(walk)
    yield from (line for t in kernel.tiles for line in _tiles(t))


def _walk(walk: Walk) -> Iterator[str]:
    over = "keys" if walk.direction == "forward" else "queries"
    yield f"  {walk.piece.name}: {over} of a tile on {walk.axis.name}"
    if walk.some:
        every = f"all rows see {_interval(walk.all)}" if walk.all else f"no range that all rows see: {walk.refused}"
        yield f"    some row sees {_interval(walk.some)}; {every}"
    yield from map(_segment, walk.segments)


def _interval(at: Interval) -> str:
    return f"[{to_text(at.lo)}, {to_text(at.hi)})"


def _segment(segment: Segment) -> str:
    masks = [
        conjunct_text(m.conjunct) + "".join(f" (proved where {to_text(u)} >= 0)" for u in m.unless)
        for m in segment.masks
    ]
    return f"    {segment.name:4} [{to_text(segment.lo)}, {to_text(segment.hi)})  mask {', '.join(masks) or 'none'}"


def _tiles(of: TileTable) -> Iterator[str]:
    """The first choice, how many others live, and why the rest does not."""
    kept = [c for c in of.configs if c.dropped is None]
    gone = [c for c in of.configs if c.dropped]
    first = kept[0]
    use = f"shared memory {first.smem}, registers about {first.registers}, cost {first.cost}"
    yield f"  tile {of.arch} {of.bits}-bit: {_tile(first)}  {use}; {len(kept) - 1} more fit, {len(gone)} dropped"
    for reason, number in Counter(_kind(c) for c in gone).items():
        best = next(c for c in gone if _kind(c) == reason)
        yield f"    {number} dropped for {reason}, the best of them {_tile(best)}: {best.dropped}"


def _tile(c: TileConfig) -> str:
    return f"{c.bm}x{c.bn} w{c.warps} s{c.stages}"


def _kind(c: TileConfig) -> str:
    """The reason without its numbers."""
    return " ".join(w for w in (c.dropped or "").split() if w.isalpha())


def _costs(plan: Plan) -> Iterator[str]:
    name = f"{H200.name}, bf16, {H200.flops / 1e12:.0f} TFLOP/s, {H200.bandwidth / 1e12} TB/s"
    yield f"AT LEAST ({name}; batch 1; φ not counted; useful pairs only, so a bound and no forecast)"
    yield from (f"  {line}" for line in _formulas(plan))
    head = ["tokens"]
    for op in main_ops(plan):
        head += [f"{_side(op.doc)} TFLOP", "GB", "ms", "dense ms"]
    yield ""
    yield table(head, [_row(plan, tokens) for tokens in LENGTHS])
    yield ""
    yield table(("launch", f"TFLOP at {SHARES_AT >> 10}k", "GB", "ms", "bound by"), _shares(plan))


def _formulas(plan: Plan) -> Iterator[str]:
    for kernel in (k for k in plan.kernels if k.walks):
        seen = " + ".join(f"Σ_t ({formula(w.piece, w.axis, w.listed)})" for w in kernel.walks)
        yield f"{kernel.name}: {flops_of_pair(kernel, plan.heads)} FLOP × {plan.heads.query} heads × {seen}"


def _side(doc: str) -> str:
    return "bwd" if doc.endswith("_grad") else "fwd"


def _row(plan: Plan, tokens: int) -> list[str]:
    row = [f"{tokens >> 10}k"]
    for op in main_ops(plan):
        dense = dense_flops(plan.heads, tokens, op.doc.endswith("_grad")) / H200.flops
        row += [*_numbers(work_of_op(op, plan, tokens)), f"{1e3 * dense:.3f}"]
    return row


def _numbers(works: list[Work]) -> list[str]:
    flops, moved = sum(w.flops for w in works), sum(w.bytes for w in works)
    seconds = sum(w.seconds(H200) for w in works)
    return [f"{flops / 1e12:.3f}", f"{moved / 1e9:.3f}", f"{1e3 * seconds:.3f}"]


def _shares(plan: Plan) -> Iterator[list[str]]:
    for op in main_ops(plan):
        for work in work_of_op(op, plan, SHARES_AT):
            yield [work.kernel, *_numbers([work]), work.bound(H200)]

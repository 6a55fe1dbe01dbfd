"""`nsagen explain`: what was decided and why, the IR after a pass, and what an operation costs at least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from nsagen.compiler import Compiled, Stage
from nsagen.errors import NsagenError
from nsagen.ir.graph import Attend, Pool, Source
from nsagen.ir.plan import Kernel, Segment, TileConfig, TileTable, Walk
from nsagen.sym import Interval, conjunct_text, to_text
from nsagen.tools import explain_costs, measured
from nsagen.tools.console import unified
from nsagen.tools.costs import formula


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
    return "\n".join([*lines, "", *explain_costs.lines(plan), *measured.lines(plan)])


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
    return c.label


def _kind(c: TileConfig) -> str:
    """The reason without its numbers."""
    return " ".join(w for w in (c.dropped or "").split() if w.isalpha())

"""choose_tiles: head-dim parts and ranked tile candidates, with a reason for each one dropped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from nsagen.ir.graph import Heads
from nsagen.ir.plan import DEEP, HEADS_IN_TURN, Choice, Kernel, Op, Plan, TileConfig, TileTable
from nsagen.passes.machine import ARCHES, Arch, Use, loop_shape, maps, resources
from nsagen.passes.specialise import (
    GROUP_ROWS,
    SCORE_SHARE,
    SHAPES,
    UNITED_SHARE,
    WARPGROUPS,
    grads_tile,
    keys_tile,
    may_score_by_rows,
    may_unite,
    queries,
    queries_tile,
    scores_tile,
    specialised_speed,
    specialised_use,
    united_tile,
    wide_keys_tile,
)

BITS = (16, 32)
MOST_REGISTERS = 255  # a thread
THIRD = 168  # registers a thread, of 64 Ki for three programs of 128 threads
SPECIALISED = Choice(
    "warp_specialised",
    "a warp copies keys ahead by tensor maps, and two warpgroups overlap softmax with products (16-bit on sm_90)",
)
SHARES_BLOCKS = Choice(
    "union_of_lists",
    "adjacent queries share the blocks of their lists' union: a warp copies each once, by tensor maps, and four "
    "warpgroups have a query each (16-bit on sm_90)",
)
SCORES_BY_ROWS = Choice(
    "scores_by_rows",
    "a warp copies keys by tensor maps, queries × heads stay in registers: warpgroups by turns keep the tensor cores "
    "busy beside exponentials, and a warp adds its heads up (16-bit on sm_90)",
)
RIDES = Choice(
    "rides",
    "the last branch's programs, where warp-specialised, have the term in registers and memory to spare: one pass less",
)
ONLY_TILES = {
    "attend_list_grads": grads_tile,
    "attend_keys": keys_tile,
    "attend_wide_keys": wide_keys_tile,
    "attend_queries": queries_tile,
}
UNROLLED = 128  # float32 scores a warp: more, and a kernel spills and takes minutes to compile


@dataclass(frozen=True)
class ChooseTiles:
    """Set `qk_parts`, `v_parts` and `tiles`; add the fact `group_fills_tile` where rows divide evenly.

    A candidate survives iff smem <= the architecture's and registers <= 255 a thread; survivors are ranked by cost.
    before  kernel window_fwd
    after   tiles sm_90 16-bit  128×64 w8 s3 (smem 131072, 152 registers, cost 1.21) …
    """

    name = "choose_tiles"

    def run(self, plan: Plan) -> Plan:
        kernels = tuple(_with_tiles(k, plan.heads) for k in plan.kernels)
        plain = {k.name for k in kernels if k.body == "attend_fwd" and not k.specialised}
        carried = {x.kernel for k in kernels if k.specialised for x in plan.riders(k.name)}
        kernels = tuple(_because(k, RIDES) if k.name in carried else k for k in kernels)
        return replace(plan, kernels=kernels, ops=tuple(_without_carriers(op, plain) for op in plan.ops))


def _without_carriers(op: Op, plain: set[str]) -> Op:
    """Without the rides on kernels that have no form for it."""
    return replace(op, launches=tuple(replace(x, rides=None) if x.rides in plain else x for x in op.launches))


def _because(kernel: Kernel, choice: Choice) -> Kernel:
    return replace(kernel, choices=(*kernel.choices, choice))


def split_dim(dim: int) -> tuple[int, ...]:
    """At most two powers of two (>= 16, for the dot) that cover `dim` with the least padding: 192 -> (128, 64)."""
    whole = max(16, 1 << (dim - 1).bit_length())
    if whole == dim or whole == 16:
        return (whole,)
    head = whole // 2
    tail = max(16, 1 << (dim - head - 1).bit_length())
    return (head, tail) if head + tail < whole else (whole,)


def _with_tiles(kernel: Kernel, heads: Heads) -> Kernel:
    kernel = replace(kernel, qk_parts=split_dim(heads.qk_dim), v_parts=split_dim(heads.v_dim))
    places = [(a, bits) for a in ARCHES for bits in BITS]
    if kernel.body in ONLY_TILES:
        places = [(a, bits) for a, bits in places if a.specialises and bits == 16]
    tables = tuple(TileTable(a.name, bits, _ranked(kernel, heads, a, bits)) for a, bits in places)
    even = 128 % heads.group == 0
    facts = (*kernel.facts, *(("group_fills_tile",) if even and kernel.walks else ()))
    kernel = replace(kernel, tiles=tables, facts=facts)
    if kernel.scores_by_rows:
        return _because(kernel, SCORES_BY_ROWS)
    if not kernel.specialised or kernel.body != "attend_fwd":
        return kernel
    return _because(kernel, SHARES_BLOCKS if kernel.unites else SPECIALISED)


def _ranked(kernel: Kernel, heads: Heads, arch: Arch, bits: int) -> tuple[TileConfig, ...]:
    if not kernel.walks:
        return (_flat(kernel, bits),)
    if kernel.body in ONLY_TILES:
        tile = ONLY_TILES[kernel.body](kernel)
        return (replace(tile, dropped=_dropped(Use(tile.smem, tile.registers), arch, bits, 0, tile.warps)),)
    shapes = _shared_shapes(kernel, heads, bits) if kernel.body == "split_attend" else _shapes(kernel, heads)
    candidates = [_judge(kernel, heads, arch, bits, *shape) for shape in shapes]
    candidates += [_capped(c) for c in candidates if _gains_by_a_cap(kernel, arch, bits, c)]
    if arch.specialises and bits == 16:
        candidates += _with_a_copying_warp(kernel, heads, arch, min(c.cost for c in candidates))
    return tuple(sorted(candidates, key=lambda c: (c.dropped is not None, c.cost, c.smem)))


def _with_a_copying_warp(kernel: Kernel, heads: Heads, arch: Arch, best: float) -> list[TileConfig]:
    """best: the least cost of the other tiles."""
    if kernel.may_specialise() and heads.group <= GROUP_ROWS:
        return [_judge_specialised(kernel, heads, arch, *shape) for shape in SHAPES]
    if may_unite(kernel, heads):
        return [_judge_beside(united_tile(kernel, heads, arch.smem), arch, UNITED_SHARE * best)]
    if may_score_by_rows(kernel, heads):
        return [_judge_beside(scores_tile(kernel, heads, arch.smem), arch, SCORE_SHARE * best)]
    return []


def _gains_by_a_cap(kernel: Kernel, arch: Arch, bits: int, c: TileConfig) -> bool:
    """Scores in turn keep few numbers: held to a third of the registers they do not spill, with one head-dim part."""
    wants = kernel.body in HEADS_IN_TURN and arch.wgmma and bits == 16 and len(kernel.qk_parts) == 1
    return wants and (c.warps, c.stages) == (4, 2) and 3 * (c.smem + 1024) <= arch.sm and c.dropped is None


def _capped(c: TileConfig) -> TileConfig:
    """With so few registers that three programs of four warps share a multiprocessor: a tenth faster on an H100."""
    return replace(c, cap=THIRD, registers=min(c.registers, THIRD), cost=round(0.9 * c.cost, 3))


def _flat(kernel: Kernel, bits: int) -> TileConfig:
    """Kernels bound by memory: rows enough for 16-byte accesses by every thread."""
    if kernel.body == "sum_items":
        return TileConfig(1, 16, 4, 1, 0, 64, 1.0)
    if kernel.body == "sum_splits":
        return TileConfig(16, 1, 4, 1, 0, 64, 1.0)
    if kernel.body == "sum_list_parts":
        return TileConfig(1, 1, 4, 1, 0, 64, 1.0)
    if kernel.body in ("select_blocks", "merge_lists", "sum_lists"):
        return TileConfig(1, 1, 1, 1, 0, 128, 1.0)
    return TileConfig(32 if bits == 16 else 16, 1, 4, 1, 0, 64, 1.0)


def _shapes(kernel: Kernel, heads: Heads) -> list[tuple[int, int, int, int]]:
    """Rows hold a whole group. A listed block is walked alone: no tile is wider, and its few rows feed few warps. Where
    heads come in turn rows are queries, and only wider key tiles save loads."""
    listed = next((w.listed for w in kernel.walks if w.listed), None)
    rows = [m for m in (16, 32, 64, 128) if m >= heads.group]
    columns = [n for n in (16, 32, 64, 128) if listed is None or n < 2 * listed.size or n == 16]
    warps = (4, 8)
    if kernel.body in HEADS_IN_TURN:
        rows, columns = [32, 64, 128], [16, 32, 64, 128, 256]
    if listed and kernel.body in ("attend_fwd", "attend_dq"):
        rows, warps = rows[:1], (1, 2, 4) if rows[0] <= 32 else (1, 2, 4, 8)  # float32: 16 keys of 64 rows on eight
    return [
        (bm, bn, warp, stages)
        for bm, bn, warp, stages in product(rows, columns, warps, (1, 2, 3))
        if bm * bn >= 16 * 16 * warp // 2 or bn == columns[0]  # a warp without work gains nothing
    ]


def _shared_shapes(kernel: Kernel, heads: Heads, bits: int) -> list[tuple[int, int, int, int]]:
    """Rows of one query, or what the launch takes for more. Without tensor cores 16 keys are what does not spill.

    Eight warps for few sequences, measured when the merge ran behind in the same program; four at many, and over small
    pages a deeper pipeline, since its first stages read the table: the launch says which (runtime/split.py).
    """
    rows = next(m for m in (16, 32, 64) if m >= heads.group)
    sizes = [w.listed.size for w in kernel.walks if w.listed]
    columns = [n for n in (16, 32, 64) if n == 16 or (bits == 16 and all(n < 2 * size for size in sizes))]
    many = rows > 512 // bits  # their accumulators spill on four warps
    attends = kernel.select is None  # and scores for no selection
    wide = 64 if attends else 128  # from so many keys on
    shapes = [(rows, n, 8 if many or n >= wide else 4, stages) for n, stages in product(columns, (1, 2, 3))]
    if many or len(columns) < 3:
        return shapes
    blocks = any(w.axis.stride > 1 for w in kernel.walks)  # of which a page holds few
    ringed = any(o.ring for o in kernel.operands)  # a ring has no table: all five stages would be its keys
    deep = [(rows, 32, 4, DEEP)] if blocks and not ringed else []
    return [*shapes, *([(rows, 64, 4, 3)] if attends else []), *deep]


def _judge(
    kernel: Kernel, heads: Heads, arch: Arch, bits: int, bm: int, bn: int, warps: int, stages: int
) -> TileConfig:
    by_map, by_pointers = maps(kernel, arch, bits, bn), resources(kernel, bits, bm, bn, warps, stages)
    use = resources(kernel, bits, bm, bn, warps, stages, by_map)
    waste, trips = loop_shape(kernel, heads, bm, bn)
    speed = arch.efficiency(kernel.body, bits, bm, bn, warps, stages, trips) * arch.filled(bits, use.smem, warps)
    cost = round(waste / speed, 3)
    dropped = _dropped(use, arch, bits, bm * bn, warps)
    only_maps = by_map and by_pointers.registers > MOST_REGISTERS
    return TileConfig(bm, bn, warps, stages, use.smem, use.registers, cost, dropped, maps=only_maps)


def _judge_specialised(kernel: Kernel, heads: Heads, arch: Arch, bn: int, stages: int) -> TileConfig:
    bm = WARPGROUPS * GROUP_ROWS
    use = specialised_use(kernel, bn, stages)
    waste, trips = loop_shape(kernel, heads, bm, bn, queries(heads.group))
    cost = round(waste / specialised_speed(use, bn, stages, trips), 3)
    dropped = _dropped(use, arch, 16, bm * bn, 4)
    if kernel.takes and kernel.takes.size % bn:
        dropped = f"{bn} keys do not divide the blocks of {kernel.takes.size} that it takes over"
    spills = 64 if kernel.takes else 0  # around its loops
    return TileConfig(
        bm, bn, 4, stages, use.smem, use.registers, cost, dropped, maps=True, specialised=True, spills=spills
    )


def _judge_beside(tile: TileConfig, arch: Arch, cost: float) -> TileConfig:
    """Of a form that was measured beside the others: its cost is a share of the least of theirs."""
    return replace(tile, cost=round(cost, 3), dropped=_dropped(Use(tile.smem, tile.registers), arch, 16, 0, 4))


def _dropped(use: Use, arch: Arch, bits: int, scores: int, warps: int) -> str | None:
    if use.smem > arch.smem:
        return f"shared memory {use.smem} > {arch.smem}"
    if bits == 32 and scores > UNROLLED * max(warps, 4):
        return f"{scores} float32 scores on {warps} warps: without tensor cores each is unrolled"
    if use.registers > MOST_REGISTERS and bits == 16:
        return f"registers {use.registers} > {MOST_REGISTERS}"
    return None

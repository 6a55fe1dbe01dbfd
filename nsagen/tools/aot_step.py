"""The kernels of a decoding step that no plan holds, as jobs: the append, by itself and in the launch that scores; and
the whole of a query by one program.

They render from what the cache keeps and from the step's other kernels, so a plan knows their arguments alone.
"""

from __future__ import annotations

from dataclasses import replace

from nsagen.ir.plan import Kernel, Launch, Operand, Plan, TileConfig
from nsagen.render.split_view import whole_tile
from nsagen.tools.aot_chips import CHIPS, candidates
from nsagen.tools.signature import CLOSING

Job = tuple[Kernel, Launch, TileConfig]
SPILLS, QUARTER_SPILLS = 64, 160  # bytes of a whole step, and of one held to a quarter's registers: around its loops


def step_kernels(plan: Plan, arch: str, bits: int) -> list[Job]:
    """Each with a launch that binds what it takes, and its tile."""
    from nsagen.runtime import split

    splits = [k for k in plan.kernels if k.body == "split_attend"]
    scores, attend = next((k for k in splits if k.select), None), next(k for k in splits if not k.select)
    alone = TileConfig(1, 1, split.APPEND_WARPS, 1, 0, 0, 0.0)
    found = [(*_storing("cache_append", splits[0], plan), alone)]
    if scores:
        tile = candidates(scores, arch, bits)[0]
        begin, launch = _storing("decode_begin", scores, plan)
        found.append((begin, launch, tile))
        if any(b.name == "k_cmp" for b in plan.buffers):
            found.append((_closing(begin), launch, tile))
    valued = scores and any(o.role == "v" for o in scores.operands)
    block = next((w.listed.size for w in attend.walks if w.listed), 0)
    tiles = _whole_tiles(scores if scores and valued else attend, arch, bits, whole_tile(block))
    return [*found, *((*_whole(scores, attend, plan), tile) for tile in tiles)]


def _storing(name: str, kernel: Kernel, plan: Plan) -> tuple[Kernel, Launch]:
    """The kernel under another name, its keys and values under the cache's names, and beside each what comes to it."""
    kept = [o for o in kernel.operands if o.role not in ("k", "v")]
    binds = [b for b in plan.launches(kernel.name)[0].binds if b[0] in {o.name for o in kept}]
    for buffer in plan.buffers:
        side = buffer.name.partition("_")[0]
        if side in ("k", "v"):  # tokens, and blocks of them
            for operand in (buffer.name, f"new_{buffer.name}"):
                kept.append(Operand(operand, side, "key", "store"))
                binds.append((operand, buffer.name))
    return replace(kernel, name=name, operands=tuple(kept)), Launch(name, tuple(binds))


def _closing(begin: Kernel) -> Kernel:
    """decode_begin where φ is an MLP, of which some programs leave parts."""
    return replace(begin, operands=(*begin.operands, Operand(CLOSING, "parts", "key", "store")))


def _whole(scores: Kernel | None, attend: Kernel, plan: Plan) -> tuple[Kernel, Launch]:
    """The kernel that attends with what rides on it; keys and values that are scored have names of their own."""
    launch = plan.launches(attend.name)[0]
    riders, more = [plan.kernel(x.kernel) for x in plan.riders(attend.name)], plan.brought(launch)
    operands = {o.name: o for k in (*riders, attend) for o in k.operands}
    binds = dict((*launch.binds, *more))
    scored = dict(plan.launches(scores.name)[0].binds) if scores else {}
    names = {"k": "k_scored", "v": "v_scored", "part_lse": "lses"}
    for o in scores.operands if scores else ():
        if o.role in names:
            operands[names[o.role]] = replace(o, name=names[o.role])
            binds[names[o.role]] = scored[o.name]
    select = next((k.select for k in riders if k.select), None)
    kernel = replace(attend, name="decode_whole", body="split_whole", operands=tuple(operands.values()), select=select)
    return kernel, Launch(kernel.name, tuple(binds.items()))


def _whole_tiles(kernel: Kernel, arch: str, bits: int, most: int) -> list[TileConfig]:
    """Those that split.pick takes: of some programs, and of a crowd."""
    from nsagen.runtime import split

    every = candidates(kernel, arch, bits)
    four = [c for c in every if c.warps == 4]
    four = [c for c in four if c.bn <= most] or four
    fits = [c for c in four if split.quarter(c.bn, c.stages, c.smem, CHIPS[arch].smem)]
    crowd = sorted(fits, key=lambda c: -c.bn)[: bits == 16 and CHIPS[arch].backend == "cuda"]
    some = [replace(c, spills=SPILLS) for c in (four or every)[:1]]
    return [*some, *(replace(c, cap=split.QUARTER, spills=QUARTER_SPILLS) for c in crowd)]

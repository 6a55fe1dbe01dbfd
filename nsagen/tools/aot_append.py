"""The kernels of a decoding step that no plan holds, as jobs: the append, by itself and in the launch that scores.

They render from what the cache keeps, so a plan knows their arguments alone: keys and values that it names.
"""

from __future__ import annotations

from dataclasses import replace

from nsagen.ir.plan import Kernel, Launch, Operand, Plan, TileConfig
from nsagen.tools.aot_chips import candidates


def append_kernels(plan: Plan, arch: str, bits: int) -> list[tuple[Kernel, Launch, TileConfig]]:
    """Each with a launch that binds what it stores, and its tile."""
    from nsagen.runtime import split

    splits = [k for k in plan.kernels if k.body == "split_attend"]
    alone = TileConfig(1, 1, split.APPEND_WARPS, 1, 0, 0, 0.0)
    found = [(*_storing("cache_append", splits[0], plan), alone)]
    scores = next((k for k in splits if k.select), None)
    if scores:
        found.append((*_storing("decode_begin", scores, plan), candidates(scores, arch, bits)[0]))
    return found


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

"""The chips that kernels are compiled for ahead of time."""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.ir.plan import Kernel, TileConfig
from nsagen.passes.machine import ARCHES

TENSOR_MEMORY = 512  # columns a block can have, where there is any


@dataclass(frozen=True)
class Chip:
    backend: str  # backend, arch and warp: Triton's GPUTarget
    arch: int | str
    warp: int
    tiles: str  # the architecture whose candidates its kernels take
    smem: int  # bytes a block can have
    remark: str = ""  # what the reports on it do not say


GFX942 = (
    "compiled, never run. The tiles are those of sm_80 that fit into 64 KiB by the model, in sm_80's order. "
    "regs: vector registers of 512, AGPRs included; sgpr: scalar ones kept in their lanes, not in memory. "
    "No ptxas, so nothing is known of performance warnings"
)
CHIPS = {a.name: Chip("cuda", int(a.name.removeprefix("sm_")), 32, a.name, a.smem) for a in ARCHES}
CHIPS["gfx942"] = Chip("hip", "gfx942", 64, "sm_80", 64 << 10, GFX942)


def candidates(kernel: Kernel, name: str, bits: int) -> list[TileConfig]:
    """The kernel's surviving tiles that fit the chip, best first by the model; the last where none does, if any."""
    chip = CHIPS[name]
    tables = [t for t in kernel.tiles if (t.arch, t.bits) == (chip.tiles, bits)]
    kept = [c for t in tables for c in t.configs if c.dropped is None]
    return [c for c in kept if c.smem <= chip.smem] or kept[-1:]

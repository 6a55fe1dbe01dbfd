"""What the cost model predicts of the cases of `nsagen bench`: useful work at the H200's peak rates × the tile's cost.

The tile is the one that a launch takes here. φ, sorts and the host's work are torch's and not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from nsagen.compiler import Compiled
from nsagen.ir.plan import Kernel, Op
from nsagen.runtime import launch
from nsagen.tools.bench_inputs import Setting
from nsagen.tools.costs import H200, main_ops, work_of


class Model:
    """model(case, tokens) -> (forward, backward) in ms; None of what the plan has no launches for (φ, dense rivals)."""

    def __init__(self, compiled: Compiled, module: ModuleType, setting: Setting) -> None:
        self.plan, self.setting = compiled.plan, setting
        self.configs: dict[str, launch.Tiles] = getattr(module, "_CONFIGS")  # noqa: B009
        self.ops = {op.name: op for op in self.plan.ops}

    def __call__(self, case: str, tokens: int) -> tuple[float | None, float | None]:
        forward, backward = self._ops(case)
        return self._ms(forward, tokens), self._ms(backward, tokens)

    def _ops(self, case: str) -> Sequence[Op | None]:
        if case == "whole":
            return main_ops(self.plan)
        return self.ops.get(case), self.ops.get(f"{case}_grad")

    def _ms(self, op: Op | None, tokens: int) -> float | None:
        if op is None:
            return None
        works = [(x, work_of(x, self.plan, tokens)) for x in op.launches]
        return 1e3 * sum(self._cost(self.plan.kernel(x.kernel), tokens) * w.seconds(H200) for x, w in works)

    def _cost(self, kernel: Kernel, tokens: int) -> float:
        """Of the kernel's tile for that length, by the table of the device's architecture; 1 without tiles."""
        tables = {t.arch: t for t in kernel.tiles if t.bits == 16}
        if not tables:
            return 1.0
        device = torch.device(self.setting.device)
        arch = launch.chip(device.index or 0).arch if device.type == "cuda" else "sm_80"
        like: Any = torch.empty(1, tokens, 0, device=device, dtype=self.setting.dtype)
        taken = launch.pick(self.configs[kernel.name], like)
        size = (taken.bm, taken.bn, taken.warps, taken.stages)
        return next(c.cost for c in tables[arch].configs if (c.bm, c.bn, c.warps, c.stages) == size)

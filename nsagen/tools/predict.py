"""What the forecast says of the cases of `nsagen bench`, on an H200.

The tile is the one that a launch takes here. φ is torch's and not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from nsagen.compiler import Compiled
from nsagen.ir.plan import Op
from nsagen.runtime import launch
from nsagen.tools.bench_inputs import Setting
from nsagen.tools.costs import main_ops, taken
from nsagen.tools.forecast import Tile, of_op


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
        tiles = {x.kernel: self._tile(x.kernel, tokens) for x in taken(op, tokens, self.form)}
        return 1e3 * of_op(op, self.plan, tokens, tiles, self.form)

    @property
    def form(self) -> str:
        """Of the kernels that a call in a row in memory takes here."""
        some = torch.empty(1, 1, 1, 16, device=self.setting.device, dtype=self.setting.dtype)
        return "specialised" if launch.specialises(None, some) else "plain"

    def _tile(self, kernel: str, tokens: int) -> Tile:
        device = torch.device(self.setting.device)
        like: Any = torch.empty(1, tokens, 0, device=device, dtype=self.setting.dtype)
        by_maps = self.plan.kernel(kernel).body != "select_scores" or launch.orders_from(tokens)
        config = launch.pick(self.configs[kernel], like, by_maps)
        return Tile(config.bm, config.bn, config.specialised)

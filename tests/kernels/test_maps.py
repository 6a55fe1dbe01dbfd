"""Listed blocks by tensor maps and by pointers: the same numbers, whatever the keys' strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen import api
from nsagen.runtime import launch
from nsagen.tools.random_lists import random_lists

T, BATCH = 75, 2  # whole blocks and a part of one
SPEC = {
    "name": "maps", "heads": {"query": 4, "kv": 2, "qk_dim": 24, "v_dim": 40}, "kv": "shared",
    "branches": {"selected": {"block": 16, "top_n": 3, "from": "caller"}},
}  # fmt: skip


def by_head(x: Tensor) -> Tensor:
    """The same numbers with a head's rows together."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def results(module: Any, given: list[Tensor], blocks: Tensor, d_out: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given]
    out, lse = module.selected_attention(*leaves, blocks)
    return [out, lse, *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.parametrize("layout", ["by token", "by head"])
def test_the_same_as_by_pointers(layout: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = api.module_of(api.compiled_of(api.read(SPEC)))
    g = torch.Generator().manual_seed(3)
    shapes = [(BATCH, T, 4, 24), (BATCH, T, 2, 24), (BATCH, T, 2, 40), (BATCH, T, 4, 40)]
    q, k, v, d_out = (torch.randn(s, generator=g).to(device, torch.float16) for s in shapes)
    if layout == "by head":
        k, v = by_head(k), by_head(v)
    blocks = random_lists(torch.arange(T) // 16, BATCH, 2, 3, g).to(device)
    made: list[bool] = []
    real = launch.maps

    def spy(*arguments: Any) -> list[Any]:
        maps = real(*arguments)
        made.append(None not in maps)
        return maps

    monkeypatch.setattr(launch, "maps", spy)
    by_maps = results(module, [q, k, v], blocks, d_out)
    chip = launch.chip(0).arch if device == "cuda" else "sm_90"
    assert made and all(made) == (chip != "sm_80")
    monkeypatch.setattr(launch, "_can_map", lambda x: False)
    by_pointers = results(module, [q, k, v], blocks, d_out)
    for a, b in zip(by_maps, by_pointers, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    assert by_maps[0].isfinite().all() and by_maps[0].abs().sum() > 0

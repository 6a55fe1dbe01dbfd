"""Kernels with a warp that only copies: beside those without, and the oracle. On Hopper; elsewhere there are none."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from nsagen import api
from nsagen.runtime import launch

HEADS = {
    "group of 16": {"query": 32, "kv": 2, "qk_dim": 128, "v_dim": 128},
    "group of 1": {"query": 3, "kv": 3, "qk_dim": 64, "v_dim": 64},
    "group of 12, parts": {"query": 12, "kv": 1, "qk_dim": 72, "v_dim": 40},
    "group of 64": {"query": 64, "kv": 1, "qk_dim": 32, "v_dim": 192},
}
BRANCHES = {
    "compressed": {"block": 32, "stride": 16, "pool": "mean"},
    "window": {"size": 100},
}
LENGTHS = (1, 31, 47, 48, 129, 700, 1025)


def module_of(heads: str) -> Any:
    spec = {"name": "specialised", "heads": HEADS[heads], "kv": "shared", "branches": BRANCHES, "combine": "gated_sum"}
    return api.module_of(api.compiled_of(api.read(spec)))


def specialised(module: Any, kernel: str) -> list[launch.Config]:
    if not torch.cuda.is_available() or launch.chip(0).arch != "sm_90":
        return []
    return [c for c in launch.candidates(module._CONFIGS[kernel], launch.chip(0), 16) if c.specialised]


def run(module: Any, branch: str, config: launch.Config | None, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Output, lse and rest (if there is one) of one branch's forward, in this configuration."""
    tiles = module._CONFIGS[f"{branch}_fwd"]
    tiles.forced = config
    try:
        return list(getattr(module, f"_{branch}_forward")(q, k, v, None, q.shape[-1] ** -0.5))
    finally:
        tiles.forced = None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("branch", ["compressed", "window"])
@pytest.mark.parametrize("heads", HEADS)
def test_the_same_as_without(
    heads: str, branch: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(heads)
    forms = specialised(module, f"{branch}_fwd")
    if not forms:
        pytest.skip("needs a GPU of sm_90")
    monkeypatch.setattr(launch, "POISON", True)
    plain = next(c for c in launch.candidates(module._CONFIGS[f"{branch}_fwd"], launch.chip(0), 16) if not c.maps)
    for length in LENGTHS:
        given = inputs(HEADS[heads], branch, length, dtype, device)
        if given is None:
            continue
        want = run(module, branch, plain, *given)
        for form in forms:
            got, again = (run(module, branch, form, *given) for _ in range(2))
            for a, b in zip(got[:2], want, strict=False):
                torch.testing.assert_close(a, b, rtol=8e-3, atol=8e-3)
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), (length, form)
            if len(got) > 2:  # out + rest is what was rounded, of either
                whole, right = (x[0].float() + x[2].float() for x in (got, want))
                assert oracle.error(whole, right) < 1e-3, (length, form)


@pytest.mark.parametrize("heads", HEADS)
def test_what_rides_is_the_combination(heads: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last branch's programs, gates and all: the bits of a pass over the terms."""
    module = module_of(heads)
    forms = specialised(module, "window_fwd")
    if not forms:
        pytest.skip("needs a GPU of sm_90")
    monkeypatch.setattr(launch, "POISON", True)
    for length in (1, 129, 700):
        given = inputs(HEADS[heads], "window", length, torch.bfloat16, device)
        assert given is not None
        g = torch.Generator().manual_seed(length)
        term = torch.randn(*given[0].shape[:3], HEADS[heads]["v_dim"], generator=g).to(device, torch.bfloat16)
        gates = torch.rand(*given[0].shape[:3], 2, generator=g).to(device, torch.bfloat16)
        for form in forms:
            module._CONFIGS["window_fwd"].forced = form
            try:
                out, lse, whole = module._window_combined(*given, term, gates, None, 0.1)
                alone, alone_lse = module._window_forward(*given, None, 0.1)
            finally:
                module._CONFIGS["window_fwd"].forced = None
            assert torch.equal(out, alone) and torch.equal(lse, alone_lse)
            assert torch.equal(whole, module._combine(term, out, gates)), (length, form)


def inputs(h: dict[str, int], branch: str, length: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...] | None:
    """q, k, v as rows of wider tensors, so that no stride is what it would be alone; None before the first block."""
    keys = max(0, length - 16) // 16 if branch == "compressed" else length
    g = torch.Generator().manual_seed(length)
    shapes = ((length, h["query"], h["qk_dim"]), (keys, h["kv"], h["qk_dim"]), (keys, h["kv"], h["v_dim"]))
    wide = (torch.randn(2, *shape[:2], shape[2] + 8, generator=g).to(device, dtype) for shape in shapes)
    return tuple(x[..., : shape[2]] for x, shape in zip(wide, shapes, strict=True)) if keys else None


def test_a_launch_that_cannot_have_it_takes_another(device: str) -> None:
    module = module_of("group of 16")
    tiles = module._CONFIGS["compressed_fwd"]
    x = torch.empty(1, 700, 32, 128, device=device, dtype=torch.bfloat16)
    assert launch.pick(tiles, x).specialised == bool(specialised(module, "compressed_fwd"))
    assert not launch.pick(tiles, x, by_maps=False).specialised
    assert not launch.pick(tiles, x.float()).specialised

"""Adjacent queries that share the blocks of their lists: beside the kernel that goes query by query, on Hopper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from harness import needs_hopper
from torch import Tensor

from nsagen import api
from nsagen.runtime import launch
from nsagen.tools.random_lists import random_lists

HEADS = {"query": 32, "kv": 2, "qk_dim": 128, "v_dim": 128}
CASES: dict[str, dict[str, int]] = {
    "group of 16": HEADS,
    "group of 32": HEADS | {"query": 64},
    "dims of 64": HEADS | {"qk_dim": 64, "v_dim": 64},
    "the paper's dims": HEADS | {"qk_dim": 192},
}
LENGTHS = (1, 5, 64, 127, 300, 1023)
TOP = 6


def module_of(heads: dict[str, int]) -> Any:
    """Lists by the caller, so that they may be anything."""
    selected = {"block": 64, "top_n": TOP, "initial": 0, "local": 0, "from": "caller"}
    spec = {"name": "united", "heads": heads, "kv": "shared", "branches": {"selected": selected}, "combine": "single"}
    return api.module_of(api.compiled_of(api.read(spec)))


@contextmanager
def form(module: Any, united: bool) -> Iterator[None]:
    tiles = module._CONFIGS["selected_fwd"]
    table = next(t for (arch, bits), t in reversed(tiles.configs.items()) if (arch, bits) == ("sm_90", 16))
    tiles.forced = next(c for c in table if c.specialised == united)
    try:
        yield
    finally:
        tiles.forced = None


def inputs(module: Any, length: int, dtype: torch.dtype, device: str, size: float = 1.0) -> tuple[Tensor, ...]:
    """q, k, v of two batch entries, rows of a larger tensor; q's largest scores make a running maximum move."""
    g, heads = torch.Generator().manual_seed(length), module.SPEC["heads"]

    def rows(count: int, dim: int) -> Tensor:
        return torch.randn(2, length, count, 2 * dim, generator=g).to(device, dtype)[..., :dim]

    return (
        size * rows(heads["query"], heads["qk_dim"]),
        rows(heads["kv"], heads["qk_dim"]),
        rows(heads["kv"], heads["v_dim"]),
    )


def lists(length: int, device: str) -> Tensor:
    """Of any length, none at all, and the same for neighbours."""
    own = torch.arange(length, device=device) // 64
    found = random_lists(own, 2, 2, TOP, torch.Generator(device).manual_seed(length))
    found[:, 3::7] = -1
    found[:, 9::8] = found[:, 8:-1:8]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_as_query_by_query(case: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_hopper()
    module = module_of(CASES[case])
    monkeypatch.setattr(launch, "POISON", True)
    for length in LENGTHS:
        for size in (1.0, 8.0):
            given, blocks = inputs(module, length, dtype, device, size), lists(length, device)
            found = []
            for united in (True, True, False):
                with form(module, united):
                    found.append(module._selected_forward(*given, blocks, None, 0.11))
            for got, again, want in zip(*found, strict=True):
                assert torch.equal(got, again), (length, size)
                there = torch.isfinite(want)
                assert torch.equal(there, torch.isfinite(got)), (length, size)
                assert oracle.error(got.float()[there], want.float()[there]) < 5e-3, (length, size)


def test_beside_float64(device: str) -> None:
    needs_hopper()
    module = module_of(HEADS)
    given, blocks = inputs(module, 300, torch.bfloat16, device, 4.0), lists(300, device)
    with form(module, True):
        got = module._selected_forward(*given, blocks, None, 0.11)
    want = module._selected_forward(*(x.double() for x in given), blocks, None, 0.11)
    there = torch.isfinite(want[1])
    assert oracle.error(got[0].double(), want[0]) < 3e-3
    assert oracle.error(got[1].double()[there], want[1][there]) < 1e-5


@pytest.mark.parametrize("leaves", [1, 2])
def test_without_the_last_blocks(leaves: int, device: str) -> None:
    needs_hopper()
    branches = {
        "compressed": {"block": 32, "stride": 16, "pool": "mean"},
        "selected": {"block": 64, "top_n": TOP, "initial": 1, "local": 2, "from": "compressed"},
        "window": {"size": 512},
    }
    spec = {"name": "left", "heads": HEADS, "kv": "shared", "branches": branches, "combine": "gated_sum"}
    module = api.module_of(api.compiled_of(api.read(spec)))
    for length in LENGTHS:
        given, blocks = inputs(module, length, torch.bfloat16, device), lists(length, device)
        own = torch.arange(length, device=device)[:, None, None] // 64
        far = torch.where(blocks <= own - leaves, blocks, -1)
        with form(module, True):
            got = module._selected_forward(*given, blocks, None, 0.11, leaves=leaves)
            want = module._selected_forward(*given, far, None, 0.11)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b), length

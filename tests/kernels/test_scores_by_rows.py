"""Scores whose rows are queries × heads, beside the kernel that takes the heads in turn and a plain sum, on Hopper."""

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
from nsagen.runtime import lanes, launch

SCALE = 0.1
HEADS = {"query": 32, "kv": 2, "qk_dim": 128, "v_dim": 128}
NSA = {"block": 32, "stride": 16}
CASES: dict[str, tuple[dict[str, int], dict[str, int], int]] = {  # heads, compression, selection block
    "group of 16": (HEADS, NSA, 64),
    "group of 8": (HEADS | {"query": 16}, NSA, 64),
    "group of 4": (HEADS | {"query": 8}, NSA, 64),
    "the paper's dims": (HEADS | {"qk_dim": 192}, NSA, 64),
    "dims of 64": (HEADS | {"qk_dim": 64, "v_dim": 64}, NSA, 64),
    "two keys a block": (HEADS, NSA, 32),
    "eight keys a block": (HEADS, NSA, 128),
    "sixteen keys a block": (HEADS, {"block": 16, "stride": 8}, 128),
    "no key in two blocks": (HEADS, {"block": 16, "stride": 16}, 64),
    "keys over half a block": (HEADS, {"block": 64, "stride": 16}, 64),
}
LENGTHS = (1, 40, 300, 1039, 1104, 2100)
TOP = 2


def module_of(case: str) -> Any:
    """No block is forced: of each query the best two are chosen, and scores alone say which."""
    heads, compression, size = CASES[case]
    branches = {
        "compressed": compression | {"pool": "mean"},
        "selected": {"block": size, "top_n": TOP, "initial": 0, "local": 0, "from": "compressed"},
    }
    spec = {"name": "scored", "heads": heads, "kv": "shared", "branches": branches, "combine": "gated_sum"}
    return api.module_of(api.compiled_of(api.read(spec)))


@contextmanager
def form(module: Any, by_rows: bool) -> Iterator[None]:
    tiles, least = module._CONFIGS["select_scores"], launch.ORDERED_FROM
    tiles.forced = next(c for c in tiles.configs["sm_90", 16] if c.specialised == by_rows)
    launch.ORDERED_FROM = 0
    try:
        yield
    finally:
        tiles.forced, launch.ORDERED_FROM = None, least


def inputs(
    module: Any, length: int, dtype: torch.dtype, device: str, heads_first: bool = False
) -> tuple[Tensor, Tensor]:
    """q of two batch entries, rows of a larger tensor, and compressed keys."""
    g, heads, of = torch.Generator().manual_seed(length), module.SPEC["heads"], module._SELECTION
    keys, dim = max(0, length - of.block + of.stride) // of.stride, heads["qk_dim"]
    q = torch.randn(2, length, heads["query"], 2 * dim, generator=g).to(device, dtype)[..., :dim]
    k = (2 * torch.randn(2, keys, heads["kv"], dim, generator=g)).to(device, dtype)
    return q, k.transpose(1, 2).contiguous().transpose(1, 2) if heads_first else k


def exact(module: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Importance [B, T, Hkv, blocks] in float64, and the lse of its scores in float32."""
    of, given = module._SELECTION, (q.double(), k.double())
    _, lse = oracle.compressed(*given, given[1], of.block, of.stride, SCALE)
    return oracle.importance(*given, of.block, of.stride, of.size, SCALE), lse.float().contiguous()


def assert_best(module: Any, blocks: Tensor, scores: Tensor) -> None:
    """They are as many as can be, and weigh what the best do, but for the rounding of float32."""
    assert oracle.choice_gap(blocks, scores, module._SELECTION.size, TOP) <= 1e-4 * float(scores.max())


@pytest.mark.parametrize("case", CASES)
def test_heads_in_turn(case: str, device: str) -> None:
    """The other form, which every device has."""
    module = module_of(case)
    for length in (1, 40, 300) if device == "cpu" else LENGTHS:
        q, k = inputs(module, length, torch.float32, device)
        weights, lse = exact(module, q, k)
        assert_best(module, module._select(q, k, lse, None, SCALE), weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_the_best_blocks(case: str, dtype: torch.dtype, device: str) -> None:
    """The same ones on every run."""
    needs_hopper()
    module = module_of(case)
    for length in LENGTHS:
        q, k = inputs(module, length, dtype, device)
        weights, lse = exact(module, q, k)
        with form(module, True):
            got, again = (module._select(q, k, lse, None, SCALE) for _ in range(2))
        assert torch.equal(got, again), length
        assert_best(module, got, weights)


def test_the_block_behind_all_keys(device: str) -> None:
    """Of 64 · i keys the last one overlaps it, and a query that sees no further key asks for that share."""
    needs_hopper()
    module = module_of("group of 16")
    q, k = inputs(module, 4200, torch.bfloat16, device)
    k[:, 63::64] *= 4  # those keys matter
    weights, lse = exact(module, q, k)
    with form(module, True):
        got = module._select(q, k, lse, None, SCALE)
    at = torch.tensor([64 * 16 * i + 15 for i in range(1, 5)], device=device)
    best = oracle.select(weights, 64, TOP, 0, 0)[:, at]
    chosen = (best.to(device) == (at // 64).view(1, -1, 1, 1)).any(3)
    assert chosen.any() and not chosen.all()
    assert_best(module, got, weights)


@pytest.mark.parametrize("case", ["group of 16", "group of 8", "group of 4", "the paper's dims"])
def test_rings_that_wrap_and_chunks_of_queries(case: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles of queries than programs, and of keys than stages; tiles of 12 queries do not divide a chunk."""
    needs_hopper()
    module = module_of(case)
    q, k = inputs(module, 9000, torch.bfloat16, device, heads_first=True)
    weights, lse = exact(module, q, k)
    with form(module, True):
        got = module._select(q, k, lse, None, SCALE)
        monkeypatch.setattr(launch, "CHUNK_BYTES", 1)
        assert torch.equal(module._select(q, k, lse, None, SCALE), got)
    assert_best(module, got, weights)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 200])
def test_keys_in_lane_order(length: int, device: str) -> None:
    k = torch.randn(2, length, 3, 2 * 192, device=device)[..., :192]
    ordered = lanes.in_order(k)
    tiles = max(1, -(-length // 64))
    assert ordered.shape == (2, tiles * 64, 3, 192)
    for tile in range(tiles):
        for column in range(64):
            i, j, e = column // 8, column // 2 % 4, column % 2
            key = tile * 64 + 16 * j + 2 * i + e
            want = k[:, key] if key < length else torch.zeros_like(ordered[:, 0])
            assert torch.equal(ordered[:, tile * 64 + column], want), (tile, column)

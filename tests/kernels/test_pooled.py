"""Blocks scored by the mean of their own keys (from: pooled), before the attention and without a compressed branch."""

from __future__ import annotations

import pytest
import torch
from harness import check

import nsagen
from nsagen.errors import InputError

SELECTED = {"block": 6, "top_n": 3, "initial": 1, "local": 1, "from": "pooled"}
ALONE = {
    "name": "pooled_only",
    "heads": {"query": 6, "kv": 2, "qk_dim": 24, "v_dim": 16},
    "kv": "shared",
    "branches": {"selected": SELECTED},
    "combine": "single",
}
GATED = {
    **ALONE,
    "name": "pooled_beside",
    "kv": "per_branch",
    "branches": {
        "selected": SELECTED,
        "compressed": {"block": 8, "stride": 4, "pool": "weighted"},
        "window": {"size": 9},
    },
    "combine": "gated_sum",
}


def test_alone(device: str) -> None:
    check(ALONE, 2, 25, 1, device)


def test_alone_packed(device: str) -> None:
    check(ALONE, 1, 40, 2, device, [0, 5, 5, 17, 18, 40])


def test_beside_a_compressed_branch(device: str) -> None:
    check(GATED, 1, 31, 3, device, strided=True)


def test_beside_a_compressed_branch_packed(device: str) -> None:
    check(GATED, 1, 37, 4, device, [0, 5, 17, 18, 37])


def test_no_gradient_flows_through_the_choice(device: str) -> None:
    module = nsagen.load(ALONE)
    q, k, v = (torch.randn(1, 20, heads, dim, device=device) for heads, dim in ((6, 24), (2, 24), (2, 16)))
    keys = module.pool_keys(k.requires_grad_())
    lse = module.score_lse(q.requires_grad_(), keys)
    assert not keys.requires_grad
    assert not lse.requires_grad
    assert not module.select_blocks(q, keys, lse).requires_grad
    assert module.attention(q, k, v).requires_grad


def test_the_torch_path_chooses_the_same_blocks(device: str) -> None:
    """float64 goes without kernels; pooled keys, lse and lists are those of float32's kernels."""
    module = nsagen.load(ALONE)
    q, k = (torch.randn(1, 50, heads, 24, device=device) for heads in (6, 2))
    cu = torch.tensor([0, 3, 29, 50], dtype=torch.int32, device=device)
    keys, exact = (module.pool_keys(x, cu_seqlens=cu) for x in (k, k.double()))
    lse, exact_lse = (module.score_lse(a, b, cu_seqlens=cu) for a, b in ((q, keys), (q.double(), exact)))
    assert exact_lse.dtype == torch.float64
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        module.select_blocks(q, keys, lse, cu_seqlens=cu),
        module.select_blocks(q.double(), exact, exact_lse, cu_seqlens=cu),
    )


def test_wrong_arguments_are_named(device: str) -> None:
    module = nsagen.load(ALONE)
    q, k = (torch.randn(1, 50, heads, 24, device=device) for heads in (6, 2))
    with pytest.raises(InputError, match=r"pool_keys: k must be \[B, T, 2, 24\], got \[1, 50, 6, 24\]"):
        module.pool_keys(q)
    with pytest.raises(InputError, match=r"score_lse: k_cmp must have 8 rows, .*T = 50, l = 6, d = 6, got 50"):
        module.score_lse(q, k)
    keys = module.pool_keys(k)
    with pytest.raises(InputError, match=r"select_blocks: lse must be \[1, 50, 6\]"):
        module.select_blocks(q, keys, torch.zeros(1, 50, 2, device=device))

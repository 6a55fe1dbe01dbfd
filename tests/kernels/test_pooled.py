"""Blocks scored by the mean of their own keys (from: pooled), before the attention and without a compressed branch."""

from __future__ import annotations

import torch
from harness import check

import nsagen

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
    check(ALONE, 2, 43, 1, device)


def test_alone_packed(device: str) -> None:
    check(ALONE, 1, 61, 2, device, [0, 5, 5, 17, 18, 61])


def test_beside_a_compressed_branch(device: str) -> None:
    check(GATED, 1, 50, 3, device, strided=True)


def test_beside_a_compressed_branch_packed(device: str) -> None:
    check(GATED, 1, 61, 4, device, [0, 5, 17, 18, 61])


def test_no_gradient_flows_through_the_choice(device: str) -> None:
    module = nsagen.load(ALONE)
    q, k, v = (torch.randn(1, 20, heads, dim, device=device) for heads, dim in ((6, 24), (2, 24), (2, 16)))
    keys = module.pool_keys(k.requires_grad_())
    lse = module.score_lse(q.requires_grad_(), keys)
    assert not keys.requires_grad
    assert not lse.requires_grad
    assert not module.select_blocks(q, keys, lse).requires_grad
    assert module.attention(q, k, v).requires_grad

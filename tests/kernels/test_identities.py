"""Settings under which sparse attention is dense attention."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from harness import FORWARD, GRADIENT
from strategies import make_inputs

import nsagen

HEADS = {"query": 6, "kv": 2, "qk_dim": 24, "v_dim": 40}
TOKENS = 41
SPECS: dict[str, dict[str, Any]] = {
    "window as long as the sequence": {"window": {"size": TOKENS}},
    "blocks of one token": {"compressed": {"block": 1, "stride": 1, "pool": "mean"}},
    "every block selected": {"selected": {"block": 8, "top_n": 6, "from": "caller"}},
}


@pytest.mark.parametrize("name", SPECS)
def test_equals_dense_attention(name: str, device: str) -> None:
    spec = {"name": "identity", "heads": HEADS, "kv": "shared", "branches": SPECS[name], "combine": "single"}
    module = nsagen.load(spec)
    inputs = make_inputs(spec, 2, TOKENS, device=device, seed=3)
    phi = module.Compressor(device=device) if hasattr(module, "Compressor") else None
    blocks = every_block(device) if "selected" in spec["branches"] else None
    out = module.attention(*inputs, phi, blocks=blocks)
    q, k, v, _ = map(oracle.twin, inputs)
    want, _ = oracle.dense_causal(q, k, v)
    assert oracle.error(out, want) < FORWARD
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(device)
    right = oracle.gradients(want, [q, k, v], d_out.double())
    for a, b in zip(oracle.gradients(out, inputs.leaves, d_out), right, strict=True):
        assert oracle.error(a, b, max(float(g.norm()) for g in right)) < GRADIENT


def test_all_blocks_chosen_by_importance_is_dense(device: str) -> None:
    branches = {"compressed": {"block": 8, "stride": 4, "pool": "mean"}, "selected": {"block": 8, "top_n": 6}}
    spec = {"name": "identity", "heads": HEADS, "kv": "shared", "branches": branches, "combine": "gated_sum"}
    module = nsagen.load(spec)
    inputs = make_inputs(spec, 1, TOKENS, device=device, seed=4)
    gates = torch.zeros_like(inputs.gates)
    gates[..., 1] = 1
    out = module.attention(inputs.q, inputs.k, inputs.v, gates, module.Compressor(device=device))
    q, k, v, _ = map(oracle.twin, inputs)
    assert oracle.error(out, oracle.dense_causal(q, k, v)[0]) < FORWARD


def every_block(device: str) -> torch.Tensor:
    blocks = torch.arange(6, dtype=torch.int32).repeat(2, TOKENS, 2, 1)
    own = torch.arange(TOKENS)[None, :, None, None] // 8
    return torch.where(blocks <= own, blocks, -1).to(device)

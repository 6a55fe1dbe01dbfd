"""recompute: the same output and gradients, with no branch's output kept between forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import cu_of
from strategies import make_inputs

import nsagen

HEADS = {"query": 6, "kv": 2, "qk_dim": 24, "v_dim": 16}
BRANCHES = {
    "window": {"size": 9},
    "compressed": {"block": 8, "stride": 4, "pool": "weighted"},
    "selected": {"block": 8, "top_n": 3, "initial": 1, "local": 1},
}
SHARED = {"name": "lean_shared", "heads": HEADS, "kv": "shared", "branches": BRANCHES, "combine": "gated_sum"}
DENSE = {**SHARED, "name": "lean_dense", "branches": {k: BRANCHES[k] for k in ("window", "compressed")}}
OWN = {**SHARED, "name": "lean_own", "kv": "per_branch"}


def saved_by(out: torch.Tensor) -> list[torch.Size]:
    """Shapes of what the operation keeps for its backward."""
    node = out.grad_fn
    while node is not None and not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    assert node is not None
    return [x.shape for x in node.saved_tensors if x is not None]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("spec", "ends"),
    [(SHARED, None), (DENSE, [0, 5, 5, 20, 33]), (OWN, [0, 5, 5, 17])],
    ids=["shared", "packed_dense", "packed_per_branch"],
)
def test_the_same_bits(spec: dict[str, Any], ends: list[int] | None, device: str) -> None:
    module = nsagen.load(spec)
    inputs = make_inputs(spec, 1, ends[-1] if ends else 21, torch.float32, device, 5, False)
    q, k, v, gates = inputs
    torch.manual_seed(1)
    phi = module.Compressor(device=device)
    leaves = [*inputs.leaves, *phi.parameters()]
    found: list[tuple[torch.Tensor, ...]] = []
    for recompute in (False, True):
        out = module.attention(q, k, v, gates, phi, cu_seqlens=cu_of(ends, device), recompute=recompute)
        kept = sum(shape == out.shape for shape in saved_by(out))
        assert kept == (0 if recompute else len(spec["branches"]))
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_torch_path_too(device: str) -> None:
    module = nsagen.load(SHARED)
    inputs = make_inputs(SHARED, 2, 21, torch.float64, device, 6, False)
    q, k, v, gates = inputs
    phi = module.Compressor(device=device, dtype=torch.float64)
    found: list[tuple[torch.Tensor, ...]] = []
    for recompute in (False, True):
        out = module.attention(q, k, v, gates, phi, recompute=recompute)
        found.append((out, *torch.autograd.grad(out.square().sum(), inputs.leaves)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)

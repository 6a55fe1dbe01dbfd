"""A new kind of branch is a registry entry and a spec: a dilated window, keys t − i·r for i < n, without a template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field

import nsagen
from nsagen.ir.graph import Piece
from nsagen.spec import BranchKind, Options, register, unregister
from nsagen.sym import KEY, QUERY, le, lt, multiple

COUNT, STEP = 5, 3
SPEC = {
    "name": "dilated_window",
    "heads": {"query": 6, "kv": 2, "qk_dim": 16, "v_dim": 24},
    "kv": "shared",
    "branches": {"dilated": {"count": COUNT, "step": STEP}},
}


class Dilated(Options):
    count: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=1)]


def lower_dilated(options: Dilated, low: Any) -> None:
    near = lt(QUERY - options.count * options.step, KEY)
    low.attend_tokens("dilated", Piece("dilated", (le(KEY, QUERY), near, multiple(QUERY - KEY, options.step))))


@pytest.fixture(scope="module", autouse=True)
def kind() -> Iterator[None]:
    register(BranchKind("dilated", Dilated, lower_dilated, "every step-th of the last count·step tokens"))
    yield
    unregister("dilated")


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 attention over an explicit list of keys for every query."""
    t = torch.arange(q.shape[1])
    seen = torch.zeros(len(t), len(t), dtype=torch.bool)
    for i in range(COUNT):
        rows = t[t - i * STEP >= 0]
        seen[rows, rows - i * STEP] = True
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen.to(scores.device), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v), scores.logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize("tokens", [1, 2, 14, 15, 16, 47])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_backward(tokens: int, dtype: torch.dtype, device: str) -> None:
    module = nsagen.load(SPEC)
    torch.manual_seed(tokens)
    leaves = [
        torch.randn(2, tokens, h, d, dtype=dtype, device=device, requires_grad=True)
        for h, d in ((6, 16), (2, 16), (2, 24))
    ]
    out, lse = module.dilated_attention(*leaves)
    d_out = torch.randn_like(out)
    out.backward(d_out)
    twins = [x.detach().double().requires_grad_() for x in leaves]
    want, want_lse = dense(*twins)
    want.backward(d_out.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=2e-6)
    for got, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(got.grad.double(), twin.grad, rtol=1e-4, atol=5e-6)


def test_packed_equals_each_sequence_alone(device: str) -> None:
    module = nsagen.load(SPEC)
    torch.manual_seed(0)
    lengths = [1, 19, 0, 33]
    cu = torch.tensor([0, 1, 20, 20, 53], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(1, sum(lengths), h, d, device=device) for h, d in ((6, 16), (2, 16), (2, 24)))
    packed = module.attention(q, k, v, cu_seqlens=cu)
    for start, length in zip(cu.tolist(), lengths, strict=False):
        if length:
            part = slice(start, start + length)
            alone = module.attention(q[:, part], k[:, part], v[:, part])
            torch.testing.assert_close(packed[:, part], alone)


def test_no_tile_is_free_of_the_mask() -> None:
    from nsagen.compiler import compile_spec
    from nsagen.spec import spec_from_dict

    walk = compile_spec(spec_from_dict(SPEC)).plan.kernel("dilated_fwd").walks[0]
    assert walk.all is None
    assert walk.refused == f"no key tile is free of a congruence modulo {STEP}"

"""φ = mean through its kernels: the values and gradients of the path in float64, whole and packed."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from nsagen.runtime.compress import MeanCompressor

HEADS, K_DIM, V_DIM = 3, 24, 8


def both(device: str, block: int, stride: int, batch: int, tokens: int, ends: list[int] | None) -> None:
    g = torch.Generator().manual_seed(tokens)
    exact = [torch.randn(batch, tokens, HEADS, d, generator=g, dtype=torch.float64) for d in (K_DIM, V_DIM)]
    exact = [x.to(device).requires_grad_() for x in exact]
    narrow = [x.detach().float().requires_grad_() for x in exact]
    cu = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=device)
    phi = MeanCompressor(block=block, stride=stride, kv_heads=HEADS, k_dim=K_DIM, v_dim=V_DIM)
    wanted, got = phi(*exact, cu), phi(*narrow, cu)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(device) for x in wanted]
    wanted += _gradients(exact, wanted, weights)
    got += _gradients(narrow, got, [w.float() for w in weights])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def _gradients(leaves: list[Tensor], outs: tuple[Tensor, ...], weights: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum((x * w).sum() for x, w in zip(outs, weights, strict=True)), leaves)


@pytest.mark.parametrize("sizes", [(4, 4), (6, 2), (5, 1), (1, 1), (80, 40)])
@pytest.mark.parametrize("tokens", [1, 17, 121])
def test_whole(sizes: tuple[int, int], tokens: int, device: str) -> None:
    both(device, *sizes, 2, tokens, None)


@pytest.mark.parametrize("sizes", [(4, 4), (6, 2), (1, 1), (80, 40)])
def test_packed(sizes: tuple[int, int], device: str) -> None:
    """Empty sequences, one token, less than a block, unaligned starts, tokens after the last sequence."""
    both(device, *sizes, 1, 197, [0, 0, 1, 12, 15, 15, 31, 190])


@settings(max_examples=20)
@given(data=st.data())
def test_packed_anyhow(data: st.DataObject, device: str) -> None:
    stride = data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(0, 25), min_size=1, max_size=6))
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    tokens = max(1, ends[-1] + data.draw(st.integers(0, 9)))
    both(device, stride * data.draw(st.integers(1, 4)), stride, 1, tokens, ends)


def test_any_strides_and_the_keys_dtype(device: str) -> None:
    k = torch.randn(2, K_DIM, HEADS, 21, device=device, dtype=torch.float16).transpose(1, 3)
    v = torch.randn(2, HEADS, 21, V_DIM, device=device, dtype=torch.float16).transpose(1, 2)
    phi = MeanCompressor(block=6, stride=3, kv_heads=HEADS, k_dim=K_DIM, v_dim=V_DIM)
    for got, want in zip(phi(k, v), phi(k.double(), v.double()), strict=True):
        assert got.dtype == torch.float16
        torch.testing.assert_close(got, want.half(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 9), (2, 0), (2, 3)])
def test_no_row_at_all(shape: tuple[int, int], device: str) -> None:
    phi = MeanCompressor(block=4, stride=2, kv_heads=HEADS, k_dim=K_DIM, v_dim=V_DIM)
    k, v = (torch.ones(*shape, HEADS, d, device=device, requires_grad=True) for d in (K_DIM, V_DIM))
    k_cmp, v_cmp = phi(k, v)
    assert k_cmp.shape[1] == max(0, (shape[1] - 4) // 2 + 1)
    (k_cmp.sum() + v_cmp.sum()).backward()
    assert k.grad is not None and (k.grad == 0).all()


@pytest.mark.parametrize("of", ["k", "v"])
def test_a_gradient_for_one_alone(of: str, device: str) -> None:
    """What nothing is made of, or what asks for none, gets no gradient, and no kernel shares one out."""
    phi = MeanCompressor(block=4, stride=2, kv_heads=HEADS, k_dim=K_DIM, v_dim=V_DIM)
    one, other = (0, 1) if of == "k" else (1, 0)
    x = [torch.ones(1, 9, HEADS, d, device=device, requires_grad=True) for d in (K_DIM, V_DIM)]
    phi(*x)[one].sum().backward()
    assert x[one].grad is not None and x[other].grad is None
    alone = [y.detach().requires_grad_(i == one) for i, y in enumerate(x)]
    sum(y.sum() for y in phi(*alone)).backward()
    assert alone[other].grad is None
    torch.testing.assert_close(alone[one].grad, x[one].grad)

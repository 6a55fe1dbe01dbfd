"""φ = MLP of a decoding step's blocks, through its kernels: what the pool gives in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from nsagen.runtime import mlp_pool
from nsagen.runtime.compress import MLPCompressor

HEADS = 2


def phi_of(block: int, stride: int, k_dim: int, v_dim: int, positions: bool, device: str) -> MLPCompressor:
    torch.manual_seed(block)
    return MLPCompressor(
        block=block, stride=stride, kv_heads=HEADS, k_dim=k_dim, v_dim=v_dim, positions=positions, device=device
    )


def both(phi: MLPCompressor, count: int, device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(through the kernels, by torch in float64) of keys and values."""
    g = torch.Generator().manual_seed(count)
    shapes = [(count, phi.block, HEADS, pool.shape.dim) for pool in (phi.k, phi.v)]
    k, v = (torch.randn(s, generator=g).to(device, dtype) for s in shapes)
    starts = torch.arange(count, device=device)
    phi = phi.to(dtype)
    with torch.no_grad():
        return list(phi.of_blocks(k, v, starts)), list(
            copy.deepcopy(phi).double().of_blocks(k.double(), v.double(), starts)
        )


@pytest.mark.parametrize("dims", [(16, 16), (24, 40), (80, 64)])
@pytest.mark.parametrize("count", [1, 5, 70])
@pytest.mark.parametrize("positions", [True, False])
def test_as_the_pool(dims: tuple[int, int], count: int, positions: bool, device: str) -> None:
    for got, want in zip(*both(phi_of(6, 3, *dims, positions, device), count, device, torch.float32), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_in_sixteen_bits(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float16  # the interpreter multiplies no bfloat16
    for got, want in zip(*both(phi_of(32, 16, 64, 64, True, device), 9, device, dtype), strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() < 1e-2 * want.norm()


def test_it_is_the_kernels_that_ran(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = mlp_pool.pooled

    def spy(x: Tensor, weights: mlp_pool.Weights) -> Tensor:
        calls.append(len(x))
        return real(x, weights)

    monkeypatch.setattr(mlp_pool, "pooled", spy)
    phi = phi_of(4, 4, 16, 16, True, device)
    k = torch.randn(3, 4, HEADS, 16, device=device)
    starts = torch.zeros(3, dtype=torch.int64, device=device)
    with torch.no_grad():
        phi.of_blocks(k, k, starts)
    assert calls == [3, 3]
    phi.of_blocks(k, k, starts)[0].sum().backward()  # a gradient: torch
    assert calls == [3, 3]
    with torch.no_grad():
        phi.to(torch.float64).of_blocks(k, k, starts)  # weights of another dtype: torch
        assert calls == [3, 3]
        assert phi.float().of_blocks(k[:0], k[:0], starts[:0])[0].shape == (0, HEADS, 16)

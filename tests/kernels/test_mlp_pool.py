"""φ = MLP of a decoding step's blocks, through its kernels: what the pool gives in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from nsagen.runtime import mlp_pool
from nsagen.runtime.compress import MLPCompressor
from nsagen.runtime.stores import Flat

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


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the kernels' calls, how many blocks each had."""
    calls: list[int] = []
    real = mlp_pool.pool

    def spy(k: mlp_pool.Side, v: mlp_pool.Side, rows: Tensor | None, spare: int) -> None:
        calls.append(len(k.x))
        real(k, v, rows, spare)

    monkeypatch.setattr(mlp_pool, "pool", spy)
    return calls


def test_it_is_the_kernels_that_ran(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    phi = phi_of(4, 4, 16, 16, True, device)
    k = torch.randn(3, 4, HEADS, 16, device=device)
    starts = torch.zeros(3, dtype=torch.int64, device=device)
    with torch.no_grad():
        phi.of_blocks(k, k, starts)
    assert calls == [3]
    phi.of_blocks(k, k, starts)[0].sum().backward()  # a gradient: torch
    assert calls == [3]
    with torch.no_grad():
        phi.to(torch.float64).of_blocks(k, k, starts)  # weights of another dtype: torch
        assert calls == [3]
        assert phi.float().of_blocks(k[:0], k[:0], starts[:0])[0].shape == (0, HEADS, 16)


def test_positions_on_one_side(device: str) -> None:
    """A module that a user changed: torch."""
    for side in ("k", "v"):
        phi = phi_of(4, 4, 16, 16, True, device)
        getattr(phi, side).positions = None
        for got, want in zip(*both(phi, 3, device, torch.float32), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


class Twice(MLPCompressor):
    """One that a user made."""

    def of_blocks(self, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        k_cmp, v_cmp = super().of_blocks(k, v, starts)
        return 2 * k_cmp, v_cmp


@pytest.mark.parametrize("v_dim", [16, 24])
def test_straight_to_their_rows(v_dim: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in any order, others untouched; what a user's φ does to them stays."""
    calls = counted(monkeypatch)
    k, v = (torch.randn(5, 6, HEADS, dim, device=device) for dim in (16, v_dim))
    starts, rows = torch.arange(5, device=device), torch.tensor([7, 0, 3, 8, 5], device=device)
    for kind in (MLPCompressor, Twice):
        phi = kind(block=6, stride=3, kv_heads=HEADS, k_dim=16, v_dim=v_dim, device=device)
        flats = [Flat((10, HEADS, dim), torch.float32, torch.device(device), False) for dim in (16, v_dim)]
        into = [flat.all.data.fill_(-1) for flat in flats]
        with torch.no_grad():
            phi.write_blocks(k, v, starts, rows, *flats)
            want = phi.double().of_blocks(k.double(), v.double(), starts)
        for got, rest in zip(into, want, strict=True):
            torch.testing.assert_close(got[rows].double(), rest, rtol=1e-5, atol=1e-5)
            assert bool((got[[1, 2, 4, 6, 9]] == -1).all())
    assert calls == [5, 5]


def pooled(count: int, rows: dict[int, int], size: int, v_dim: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """(written, by torch in float64) of keys and values: of `count` blocks n to rows[n] of `size`, the rest unwanted.

    Those have no tokens, so a row that read them shows.
    """
    phi = MLPCompressor(block=6, stride=3, kv_heads=HEADS, k_dim=16, v_dim=v_dim, device=device)
    g = torch.Generator().manual_seed(count)
    chosen = torch.tensor(list(rows), dtype=torch.int64)
    k, v = (torch.randn(count, 6, HEADS, dim, generator=g) for dim in (16, v_dim))
    given = [torch.full_like(x, torch.nan).index_copy(0, chosen, x[chosen]).to(device) for x in (k, v)]
    flats = [Flat((size, HEADS, dim), torch.float32, torch.device(device), False) for dim in (16, v_dim)]
    to = torch.full((count,), size - 1)
    to[chosen] = torch.tensor(list(rows.values()), dtype=torch.int64)
    starts = torch.arange(count, device=device)
    with torch.no_grad():
        for flat in flats:
            flat.all.data.fill_(-1)
        phi.write_blocks(*given, starts, to.to(device), *flats)
        want = phi.double().of_blocks(k.to(device).double(), v.to(device).double(), starts)
    return [(flat.all.data, w) for flat, w in zip(flats, want, strict=True)]


@pytest.mark.parametrize("v_dim", [16, 24])
@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (1, []),
        (5, []),
        (15, []),
        (16, []),
        (70, []),  # of many, too, neither tokens nor weights are read
        (1, [0]),
        (5, [0]),
        (5, [3, 1]),
        (16, [15]),
        (40, [0, 17, 5, 18, 39]),
        (70, [69]),
        (70, [69, 0, 35, 36, 62, 63, 64]),
        (70, [n for n in range(70) if n not in (1, 30, 68)]),  # two tiles of the first kernel, five of the second
        (70, list(range(70))),
        (257, [256, 0, 255, 128]),
    ],
)
def test_blocks_that_nobody_wants(count: int, wanted: list[int], v_dim: int, device: str) -> None:
    """Only the others are pooled, each to its row, in whatever order; the spare row stays as it was."""
    size = count + 4
    rows = {n: (7 * i + 3) % (count + 3) for i, n in enumerate(wanted)}  # 7 divides none of the counts + 3: distinct
    rest = [r for r in range(size) if r not in rows.values()]
    assert size - 1 in rest and len(set(rows.values())) == len(wanted)
    for got, want in pooled(count, rows, size, v_dim, device):
        assert bool((got[rest] == -1).all())
        torch.testing.assert_close(got[list(rows.values())].double(), want[wanted], rtol=1e-5, atol=1e-5)


def test_more_blocks_than_are_asked(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are pooled, those that nobody wants to the spare row."""
    monkeypatch.setattr(mlp_pool, "ASKED", (256, 20))
    for got, want in pooled(21, {20: 1, 4: 0}, 5, 16, device):
        torch.testing.assert_close(got[[1, 0]].double(), want[[20, 4]], rtol=1e-5, atol=1e-5)
        assert bool((got[[2, 3]] == -1).all()) and not bool((got[4] == -1).all())

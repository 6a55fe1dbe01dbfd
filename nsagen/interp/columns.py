"""A head dim in its parts, as kernels hold it: powers of two, 0 past the dim's end."""

from __future__ import annotations

import numpy as np

from nsagen.interp.domains import Array


def split(x: Array, parts: tuple[int, ...]) -> list[Array]:
    """x [rows, dim] -> one [rows, width] a part."""
    starts = [sum(parts[:i]) for i in range(len(parts))]
    return [_part(x, lo, width) for lo, width in zip(starts, parts, strict=True)]


def _part(x: Array, lo: int, width: int) -> Array:
    out = np.zeros((len(x), width))
    held = x[:, lo : lo + width]
    out[:, : held.shape[1]] = held
    return out


def join(parts: list[Array], dim: int) -> Array:
    """The first `dim` columns; those that no part holds are NaN, since nobody writes them."""
    held = np.concatenate(parts, 1)[:, :dim]
    return np.pad(held, ((0, 0), (0, dim - held.shape[1])), constant_values=np.nan)


def dot(a: list[Array], b: list[Array]) -> Array:
    """a·bᵀ over the parts of a common dim."""
    return np.add.reduce([x @ y.T for x, y in zip(a, b, strict=True)])

"""Where a cache's rows lie: flat storages of keys or values, in a sequence's own row, in pages, or in a ring."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nsagen.runtime.rings import Ring

MOST = 448.0  # the largest number of e4m3


class Past(NamedTuple):
    """What kernels over a cache need of it."""

    lengths: Tensor  # int32 [B]: tokens before the queries
    table: Tensor | None  # int32 [B, pages of a sequence]
    page: int  # tokens of a page, 1 without pages
    pages: int  # that there are: a table's entry outside of [0, pages) names none
    capacity: int  # max_len
    lost: Tensor | None = None  # bool [B]: sequences whose values become NaN, since a ring lost what they need

    @property
    def table_stride(self) -> int:
        return 0 if self.table is None else self.table.stride(0)

    def part(self, first: int, end: int) -> Past:
        """Of sequences [first, end) alone."""
        table = None if self.table is None else self.table[first:end]
        return self._replace(lengths=self.lengths[first:end], table=table)


class Kept(NamedTuple):
    """Rows as kernels take them: numbers [..., Hkv, D], times scales [..., Hkv] float32 where there are scales."""

    data: Tensor
    scales: Tensor | None

    def cut(self, first: int, end: int) -> Kept:
        return self.each(lambda x: x[first:end])

    def each(self, change: Callable[[Tensor], Tensor]) -> Kept:
        """The same change of both, which must leave the last dims as they are."""
        return Kept(change(self.data), None if self.scales is None else change(self.scales))

    def view(self, *shape: int) -> Kept:
        """[N, Hkv, D] as [*shape, Hkv, D]."""
        return self.each(lambda x: x.view(*shape, *x.shape[1:]))

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """data times scales, in float32 if they are not of that dtype."""
        if self.scales is None:
            return self.data
        return (self.data.float() * self.scales.unsqueeze(-1)).to(dtype)


class Flat:
    """Rows [N, Hkv, D] to be read and written in `dtype`; kept as e4m3 with a scale a row and head if `quantised`."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, quantised: bool) -> None:
        self.dtype, self.quantised = dtype, quantised
        data = torch.zeros(shape, dtype=torch.float8_e4m3fn if quantised else dtype, device=device)
        self.all = Kept(data, torch.zeros(shape[:2], device=device) if quantised else None)

    def blank(self, count: int) -> Flat:
        """`count` rows of the same kind."""
        heads, dim = self.all.data.shape[1:]
        return Flat((count, heads, dim), self.dtype, self.all.data.device, self.quantised)

    def read(self, rows: Tensor) -> Tensor:
        """[len(rows), Hkv, D] in `dtype`."""
        return self.all.each(lambda x: x[rows]).numbers(self.dtype)

    def write(self, rows: Tensor, x: Tensor) -> None:
        """x [len(rows), Hkv, D] to its rows."""
        data, scales = self.all
        if scales is not None:
            x = x.float()
            scale = x.abs().amax(-1) / MOST  # NaN where one is, and so the row
            scales.index_copy_(0, rows, scale)
            x = x / torch.where(scale == 0, 1, scale).unsqueeze(-1)
            _bytes(data).index_copy_(0, rows, _bytes(x.to(data.dtype)))
        else:
            data.index_copy_(0, rows, x.to(data.dtype))


def _bytes(x: Tensor) -> Tensor:
    """torch copies numbers of 8 bits by index only as integers."""
    return x.view(torch.uint8)


class Store:
    """Rows of one value, and a spare row behind them for what has no place.

    stride: tokens a row. per: rows of a sequence, or of a page.
    """

    def __init__(self, flat: Flat, per: int, stride: int, ring: Ring | None = None) -> None:
        self.flat, self.per, self.stride, self.ring = flat, per, stride, ring

    @property
    def spare(self) -> int:
        return len(self.flat.all.data) - 1

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.flat.all if x is not None)

    @cached_property
    def view(self) -> Kept:
        """Without the spare row, which never moves: [B, rows, Hkv, D], or [pages, rows of a page, Hkv, D]."""
        return self.flat.all.cut(0, self.spare).view(-1, self.per)

    def part(self, first: int, end: int, past: Past) -> Kept:
        """What the queries of sequences [first, end) see: their rows, or all pages."""
        return self.view.cut(first, end) if past.table is None else self.view

    def rows(self, sequence: Tensor, position: Tensor, past: Past) -> Tensor:
        """Flat rows of row number `position` of each sequence; the spare one for what has no place.

        sequence: int64, B or more for nobody's.
        """
        batch = len(past.lengths)
        known = sequence.clamp(max=batch - 1)
        inside = (sequence < batch) & (position >= 0) & (position < past.capacity // self.stride)
        if self.ring is not None:
            return torch.where(inside, known * self.per + self.ring.row(position), self.spare)
        if past.table is None:
            return torch.where(inside, known * self.per + position, self.spare)
        page = past.table[known, torch.where(inside, position // self.per, 0)].long()
        inside &= (page >= 0) & (page < past.pages)
        return torch.where(inside, page * self.per + position % self.per, self.spare)

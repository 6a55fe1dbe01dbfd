"""Where a cache's rows lie: flat storages of keys or values, in a sequence's own row, in pages, or in a ring."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsagen.runtime.rings import Ring


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


class Store:
    """Rows [rows, Hkv, D] of one value, and a spare row behind them for what has no place.

    stride: tokens a row. per: rows of a sequence, or of a page.
    """

    def __init__(self, data: Tensor, per: int, stride: int, ring: Ring | None = None) -> None:
        self.data, self.per, self.stride, self.ring = data, per, stride, ring

    @property
    def spare(self) -> int:
        return len(self.data) - 1

    @property
    def view(self) -> Tensor:
        """Without the spare row: [B, rows, Hkv, D], or [pages, rows of a page, Hkv, D]."""
        return self.data[:-1].view(-1, self.per, *self.data.shape[1:])

    def part(self, first: int, end: int, past: Past) -> Tensor:
        """What the queries of sequences [first, end) see: their rows, or all pages."""
        return self.view[first:end] if past.table is None else self.view

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

    def read(self, rows: Tensor) -> Tensor:
        return self.data[rows]

    def write(self, rows: Tensor, x: Tensor) -> None:
        """x [N, Hkv, D] to its rows."""
        self.data.index_copy_(0, rows, x.to(self.data.dtype))

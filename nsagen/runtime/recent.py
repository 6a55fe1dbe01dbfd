"""What the queries of a prefill see of a ring: the old tokens that it has for them, and all new ones.

A prefill may add more tokens than a ring holds. So its kernels run over a store of the call: of every sequence the
sinks, the last `keep` old tokens, and the new ones, in that order; the sequences one after another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsagen.runtime.stores import Kept, Past, Store


class New(NamedTuple):
    """The tokens of a call: row i of the packed [B·m] or [T] belongs to `sequence[i]`, at `position[i]` of it."""

    sequence: Tensor  # int64; B for a row of nobody
    position: Tensor
    counts: Tensor  # int64 [B]
    starts: Tensor  # int64 [B]: a sequence's first row


class Recent:
    """Rows [T + B·(sinks + keep), Hkv, D] over `store`, a ring, with the new tokens x [T, Hkv, D]."""

    def __init__(self, store: Store, past: Past, new: New, x: Tensor) -> None:
        assert store.ring is not None
        self.ring, self.past, self.starts = store.ring, past.lengths.long(), new.starts
        batch, before = len(self.past), self.ring.before
        self.flat = store.flat.blank(len(x) + batch * before)
        self._fill_old(store, past)
        row = torch.arange(len(x), device=x.device)
        self.flat.write(row + (new.sequence + 1).clamp(max=batch) * before, x)
        if self.ring.sinks:
            self._fill_sinks(new)

    def part(self, first: int, end: int, past: Past) -> Kept:
        """Rows [1, …] of sequences [first, end): all of them, or where each has as many new tokens."""
        rows = self.flat.all
        if end - first < len(self.past):
            each = len(rows.data) // len(self.past)
            rows = rows.cut(first * each, end * each)
        return rows.view(1, -1)

    def rows(self, sequence: Tensor, position: Tensor, past: Past) -> Tensor:
        """Rows of tokens: sinks, or from past − keep on; 0 for nobody's."""
        known = sequence.clamp(max=len(self.past) - 1)
        late = position - self.past[known] + self.ring.before
        at = self._first(known) + torch.where(position < self.ring.sinks, position, late)
        return torch.where(sequence < len(self.past), at, 0)

    def _first(self, sequence: Tensor) -> Tensor:
        return self.starts[sequence] + sequence * self.ring.before

    def _places(self, width: int) -> tuple[Tensor, Tensor]:
        """(sequence, i) of the first `width` rows of every sequence."""
        at = torch.arange(len(self.past) * width, device=self.past.device)
        return at // width, at % width

    def _fill_old(self, store: Store, past: Past) -> None:
        """Zeros where there is no such token."""
        sequence, i = self._places(self.ring.before)
        position = torch.where(i < self.ring.sinks, i, self.past[sequence] - self.ring.before + i)
        first = torch.where(i < self.ring.sinks, 0, self.ring.sinks)
        there = (position >= first) & (position < self.past[sequence])
        old = store.flat.read(store.rows(sequence, position, past))
        self.flat.write(self._first(sequence) + i, torch.where(there.view(-1, 1, 1), old, 0))

    def _fill_sinks(self, new: New) -> None:
        """Those that are among the new tokens also stand in front."""
        sequence, i = self._places(self.ring.sinks)
        past = self.past[sequence]
        fresh = (i >= past) & (i < past + new.counts[sequence])
        row = self._first(sequence) + i
        late = self._first(sequence) + self.ring.before + i - past
        self.flat.write(row, self.flat.read(torch.where(fresh, late, row)))

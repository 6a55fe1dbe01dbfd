"""Serving without kernels: one sequence after the other, its keys in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nsagen.runtime.rings import Ring
from nsagen.runtime.stores import Kept, Past


class Seen(NamedTuple):
    """What a call's queries see of a value: its storage, tokens a row, and the ring that it is the `recent` rows of."""

    rows: Kept
    stride: int
    ring: tuple[int, int, int] | None = None


def run(
    forward: Callable[..., Tensor], q: Tensor, keys: tuple[Seen, ...], more: tuple[Tensor, ...],
    past: Past, cu_seqlens: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """A sequence's queries behind rows of nothing for what came before. Waits for the lengths.

    forward(q, *keys, *more, cu_seqlens, scale) -> out; more: gates, lists.
    """
    out = torch.zeros(*q.shape[:3], keys[1].rows.data.shape[-1], dtype=q.dtype, device=q.device)
    batch = len(past.lengths)
    ends = [i * q.shape[1] for i in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    flat = [x.flatten(0, 1) for x in (q, *more)]
    for s, before in enumerate(past.lengths.tolist()):
        rows = slice(ends[s], ends[s + 1])
        total = before + ends[s + 1] - ends[s]
        if total == before:
            continue
        of = [_contiguous(x, s, ends[s], before, total, past).numbers(q.dtype).unsqueeze(0) for x in keys]
        behind = [torch.nn.functional.pad(x[rows].unsqueeze(0), (0, 0, 0, 0, before, 0)) for x in flat]
        out.flatten(0, 1)[rows] = forward(behind[0], *of, *behind[1:], None, scale)[0, before:]
    return out


def _contiguous(seen: Seen, s: int, start: int, before: int, total: int, past: Past) -> Kept:
    """[rows, Hkv, D]: a sequence's first rows; of a pooled store all of the blocks that could have ended."""
    count = total // seen.stride if seen.stride > 1 else total
    if seen.ring is not None:
        ring = Ring(*seen.ring).within(past.capacity)
        return seen.rows.each(lambda x: _unrolled(x[0], ring, s, start, before, total))
    if past.table is None:
        return seen.rows.each(lambda x: x[s, :count])
    per = past.page // seen.stride
    row = torch.arange(count, device=past.table.device)
    page = past.table[s, row // per].long()
    there = (page >= 0) & (page < past.pages)
    at = torch.where(there, page * per + row % per, 0)
    return seen.rows.each(lambda x: _where(there, x.flatten(0, 1)[at]))


def _where(there: Tensor, x: Tensor) -> Tensor:
    """x, with zeros in the rows that are not there."""
    return torch.where(there.view(-1, *(1 for _ in x.shape[1:])), x, torch.zeros_like(x))


def _unrolled(recent: Tensor, ring: Ring, s: int, start: int, before: int, total: int) -> Tensor:
    """Zeros for the tokens that nobody sees any more."""
    first = start + s * ring.before
    out = recent.new_zeros(total, *recent.shape[1:])
    sinks, lo = min(ring.sinks, total), max(0, before - ring.keep)
    late = first + ring.before - before
    out[lo:] = recent[late + lo : late + total]
    out[:sinks] = recent[first : first + sinks]
    return out

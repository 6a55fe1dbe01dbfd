"""The inverse of the block lists: for every key block the queries that list it, in items of bounded length.

Built on the device from sorts and sums alone: no host sync, no atomics, the same order on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsagen.runtime.launch import sequences


class Inverse(NamedTuple):
    """queries int32 [entries]: token rows b·T + t, grouped by key block, ascending within one.

    items int32 [most, 3]: (key block, first entry, end entry) of at most `per_item` entries each; unused ones name
    block `blocks`. A hot block is split over several items. first int32 [blocks + 1]: each key block's first item.
    Key blocks are numbered (b·Hkv + h)·slots + slot; packed, block i of sequence s has slot ⌊cu[s]/size⌋ + s + i.
    """

    queries: Tensor
    items: Tensor
    first: Tensor
    slots: int


def invert(blocks: Tensor, size: int, cu_seqlens: Tensor | None, per_item: int) -> Inverse:
    """Invert blocks int32 [B, T, Hkv, n] of `size` tokens, −1 for none."""
    batch, length, heads, count = blocks.shape
    slots = -(-length // size) if cu_seqlens is None else length // size + sequences(cu_seqlens)
    total = batch * heads * slots
    keys, order = torch.sort(_keys(blocks, size, cu_seqlens, slots, total).flatten(), stable=True)
    bounds = torch.searchsorted(keys, torch.arange(total + 1, device=keys.device, dtype=keys.dtype))
    queries = (order // (heads * count)).to(torch.int32)
    items, first = _items(bounds, per_item, total + keys.numel() // per_item)
    return Inverse(queries, items, first, slots)


def _keys(blocks: Tensor, size: int, cu_seqlens: Tensor | None, slots: int, total: int) -> Tensor:
    """The number of the key block of every entry; `total`, which sorts last, for none."""
    batch, length, heads, _ = blocks.shape
    device = blocks.device
    if cu_seqlens is None:
        base = torch.zeros(1, dtype=torch.int64, device=device)
    else:
        token = torch.arange(length, device=device)
        sequence = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
        base = cu_seqlens.long()[sequence.clamp(max=cu_seqlens.shape[0] - 1)] // size + sequence
    head = torch.arange(batch * heads, device=device).view(batch, 1, heads, 1) * slots
    keys = head + base.view(1, -1, 1, 1) + blocks
    return torch.where((blocks < 0) | (blocks >= slots), total, keys).to(
        torch.int32 if total < 2**31 - 1 else torch.int64
    )


def _items(bounds: Tensor, per_item: int, most: int) -> tuple[Tensor, Tensor]:
    """items [most, 3] and first [blocks + 1] from the blocks' entry bounds [blocks + 1]."""
    entries = bounds[1:] - bounds[:-1]
    first = torch.zeros_like(bounds)
    torch.cumsum((entries + per_item - 1) // per_item, 0, out=first[1:])
    item = torch.arange(most, device=bounds.device)
    block = torch.searchsorted(first[1:], item, right=True)  # the last block, plus one, for unused items
    known = block.clamp(max=entries.shape[0] - 1)
    start = bounds[known] + (item - first[known]) * per_item
    end = torch.minimum(start + per_item, bounds[known + 1])
    return torch.stack([block, start, end], 1).to(torch.int32), first.to(torch.int32)


def per_item(length: int, entries: int) -> int:
    """Entries of an item: about what a block has on average (n·l'), a little less where there are few queries."""
    return max(64, min(entries, length))

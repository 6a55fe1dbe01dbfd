"""What runtime/lists.py gives, from torch's sorts and sums: the tests' oracle of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.runtime.lists import Inverse


def invert(blocks: Tensor, size: int, cu_seqlens: Tensor | None, per_item: int, chunk: int | None = None) -> Inverse:
    batch, length, heads, count = blocks.shape
    step = min(chunk or length, length)
    chunks = -(-length // step)
    slots = -(-length // size) if cu_seqlens is None else length // size + len(cu_seqlens) - 1
    total = batch * heads * slots
    keys, order = torch.sort(_keys(blocks, size, cu_seqlens, slots, step).flatten(), stable=True)
    bounds = torch.searchsorted(keys, torch.arange(chunks * total + 1, device=keys.device))
    items, first = _items(bounds, chunks, per_item, total + batch * step * heads * count // per_item)
    entries = order if chunk else order // (heads * count)
    return Inverse(entries[: int(bounds[-1])].int(), items, first, slots)


def _keys(blocks: Tensor, size: int, cu_seqlens: Tensor | None, slots: int, chunk: int) -> Tensor:
    """The number of the chunk and key block of every entry; one that sorts last for none."""
    batch, length, heads, _ = blocks.shape
    token = torch.arange(length, device=blocks.device)
    if cu_seqlens is None:
        base, end = torch.zeros_like(token), torch.full_like(token, slots)
    else:
        ends = cu_seqlens.long()
        sequence = torch.searchsorted(ends[1:], token, right=True).clamp(max=len(ends) - 2)
        base = ends[sequence] // size + sequence
        end = (ends[sequence + 1] - ends[sequence] + size - 1) // size
    total = batch * heads * slots
    head = torch.arange(batch * heads, device=blocks.device).view(batch, 1, heads, 1) * slots
    keys = head + (base + token // chunk * total).view(1, -1, 1, 1) + blocks
    there = (blocks >= 0) & (blocks < end.view(1, -1, 1, 1))
    return torch.where(there, keys, total * -(-length // chunk))


def _items(bounds: Tensor, chunks: int, per_item: int, most: int) -> tuple[Tensor, Tensor]:
    """items [chunks, most, 3] and first [chunks, blocks + 1] from the entry bounds [chunks·blocks + 1] of all."""
    start, end = bounds[:-1].view(chunks, -1), bounds[1:].view(chunks, -1)
    first = torch.zeros((chunks, start.shape[1] + 1), dtype=torch.int64, device=bounds.device)
    torch.cumsum((end - start + per_item - 1) // per_item, 1, out=first[:, 1:])
    item = torch.arange(most, device=bounds.device).expand(chunks, -1).contiguous()
    block = torch.searchsorted(first[:, 1:].contiguous(), item, right=True)  # the last, plus one, for unused items
    known = block.clamp(max=start.shape[1] - 1)
    begin = start.gather(1, known) + (item - first.gather(1, known)) * per_item
    stop = torch.minimum(begin + per_item, end.gather(1, known))
    return torch.stack([block, begin, stop], 2).int(), first.int()

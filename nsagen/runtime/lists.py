"""The inverse of the block lists: for every key block the queries that list it, in items of bounded length.

Built on the device from sorts and sums alone: no host sync, no atomics, the same order on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsagen.errors import InputError
from nsagen.runtime import launch
from nsagen.runtime.launch import empty, sequences


class Inverse(NamedTuple):
    """The entries of the lists [B, T, Hkv, n] by chunk of queries, then by key block, ascending within one.

    places int32 [entries]: where each stands in the flat lists. items int32 [chunks, most, 3]: (key block, first entry,
    end entry) of at most `per_item` entries each; unused ones name block `blocks`. A hot block is split over several.
    first int32 [chunks, blocks + 1]: each key block's first item of the chunk. Key blocks are numbered
    (b·Hkv + h)·slots + slot; packed, block i of sequence s has slot ⌊cu[s]/size⌋ + s + i.
    """

    places: Tensor
    items: Tensor
    first: Tensor
    slots: int
    per_query: int  # entries, Hkv·n

    @property
    def queries(self) -> Tensor:
        """Token rows b·T + t of the entries, int32."""
        return (self.places // self.per_query).to(torch.int32)


def invert(blocks: Tensor, size: int, cu_seqlens: Tensor | None, per_item: int, chunk: int | None = None) -> Inverse:
    """Invert blocks int32 [B, T, Hkv, n] of `size` tokens, −1 for none, in chunks of queries (default: one)."""
    batch, length, heads, count = blocks.shape
    if blocks.numel() >= 2**31:
        raise InputError(f"blocks must hold fewer than 2³¹ entries, got {tuple(blocks.shape)}: pass fewer sequences")
    chunk = min(chunk or length, length)
    chunks = -(-length // chunk)
    slots = -(-length // size) if cu_seqlens is None else length // size + sequences(cu_seqlens)
    total = batch * heads * slots
    keys, order = torch.sort(_keys(blocks, size, cu_seqlens, slots, chunk).flatten(), stable=True)
    ends = torch.arange(chunks * total + 1, device=keys.device, dtype=keys.dtype)
    bounds = torch.searchsorted(keys, ends)
    items, first = _items(bounds, chunks, per_item, total + batch * chunk * heads * count // per_item)
    return Inverse(order.to(torch.int32), items, first, slots, heads * count)


def _keys(blocks: Tensor, size: int, cu_seqlens: Tensor | None, slots: int, chunk: int) -> Tensor:
    """The number of the chunk and key block of every entry; one that sorts last for none."""
    batch, length, heads, _ = blocks.shape
    token = torch.arange(length, device=blocks.device)
    if cu_seqlens is None:
        base, end = torch.zeros_like(token), torch.full_like(token, slots)
    else:
        ends = cu_seqlens.long()
        sequence = torch.searchsorted(ends[1:], token, right=True).clamp(max=ends.shape[0] - 2)
        base = ends[sequence] // size + sequence
        end = (ends[sequence + 1] - ends[sequence] + size - 1) // size
    total = batch * heads * slots
    head = torch.arange(batch * heads, device=blocks.device).view(batch, 1, heads, 1) * slots
    keys = head + (base + token // chunk * total).view(1, -1, 1, 1) + blocks
    last = total * -(-length // chunk)
    there = (blocks >= 0) & (blocks < end.view(1, -1, 1, 1))
    return torch.where(there, keys, last).to(torch.int32 if last < 2**31 - 1 else torch.int64)


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
    return torch.stack([block, begin, stop], 2).to(torch.int32), first.to(torch.int32)


def per_item(length: int, entries: int) -> int:
    """Entries of an item: about what a block has on average (n·l'), a little less where there are few queries."""
    return max(64, min(entries, length))


PART_BYTES = 1 << 31  # of the parts of one chunk of queries


def part_chunk(length: int, row_bytes: int) -> int:
    """Queries of a chunk whose parts, row_bytes each, fit in PART_BYTES."""
    return launch.chunk(length, row_bytes, PART_BYTES)


def sums(gradients: tuple[Tensor, ...], chunked: bool, adds: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """Where chunks add up dk and dv: the gradients themselves, or float32 where a chunk's sum would be rounded."""
    if not chunked or gradients[0].dtype == torch.float32:
        return gradients
    if adds:
        return tuple(x.float() for x in gradients)
    return tuple(empty(x, tuple(x.shape), cu_seqlens, torch.float32) for x in gradients)


def round_sums(gradients: tuple[Tensor, ...], sums: tuple[Tensor, ...]) -> None:
    """Write the gradients from what `sums` gave, unless they are it."""
    for gradient, total in zip(gradients, sums, strict=True):
        if total is not gradient:
            gradient.copy_(total)

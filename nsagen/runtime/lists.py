"""The inverse of the block lists: for every key block the queries that list it, in items of bounded length.

Built on the device by the kernels of inverse.py: no host sync, the same bits on every run.
"""

from __future__ import annotations

# pyright: reportArgumentType=false
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from nsagen.errors import InputError
from nsagen.runtime import inverse, launch, launcher
from nsagen.runtime.launch import empty, sequences


class Inverse(NamedTuple):
    """The entries of the lists [B, T, Hkv, n] by chunk of queries, then by key block, ascending within one.

    entries int32 [B·T·Hkv·n]: places in the flat lists, or token rows b·T + t; behind the last one nothing is written.
    items int32 [chunks, most, 3]: (key block, first entry, end entry) of at most `per_item` entries each; unused ones
    name block `blocks`. A hot block is split over several. first int32 [chunks, blocks + 1]: each key block's first
    item of the chunk. Key blocks are numbered (b·Hkv + h)·slots + slot; packed, block i of sequence s has slot
    ⌊cu[s]/size⌋ + s + i.
    """

    entries: Tensor
    items: Tensor
    first: Tensor
    slots: int


def invert(
    blocks: Tensor, size: int, cu_seqlens: Tensor | None, per_item: int, chunk: int | None = None, leaves: int = 0
) -> Inverse:
    """Invert contiguous blocks int32 [B, T, Hkv, n] of `size` tokens, −1 for none, in chunks of queries.

    Entries are the places in the lists, where kernels leave parts for a chunk of queries at a time; without a chunk
    there are no parts, and entries are token rows. leaves: the last blocks up to each query's own that are left out;
    not of packed sequences. Raises InputError from 2³¹ entries on.
    """
    batch, length, heads, count = blocks.shape
    if blocks.numel() >= 2**31:
        raise InputError(f"blocks must hold fewer than 2³¹ entries, got {tuple(blocks.shape)}: pass fewer sequences")
    packed = sequences(cu_seqlens)
    slots = length // size + packed if packed else -(-length // size)
    g = _grid(blocks.shape, slots, min(chunk or length, length))
    shape = (cu_seqlens, length, heads, g.pairs, slots, packed, g.chunk, g.tiles, g.tile)
    shape = (*shape, count, size, leaves, g.step, g.bits)
    counts = blocks.new_empty(g.programs * slots)
    launcher.start(inverse.count_entries, (g.programs,), blocks, counts, *shape, **g.options)
    starts, first = _totals(counts, g, g.pairs * slots, per_item)
    entries = blocks.new_empty(blocks.numel())
    key = tl.int32 if (slots + 1) << g.bits <= LARGEST_KEY else tl.int64
    places = chunk is not None
    found = (blocks, counts, starts, entries)
    launcher.start(inverse.place_entries, (g.programs,), *found, *shape, key, places, **g.options)
    most = g.pairs * slots + batch * g.chunk * heads * count // per_item
    return Inverse(entries, _items(starts, first, most, per_item), first, slots)


def _totals(counts: Tensor, g: _Grid, total: int, per_item: int) -> tuple[Tensor, Tensor]:
    """Each key block's first entry of all and first item of the chunk, [chunks, total + 1]; counts: of tiles before."""
    totals = counts.new_empty(g.chunks * total)
    launcher.start(inverse.sum_tiles, (-(-total // 16), g.chunks), counts, totals, g.tiles, total, 128, 16)
    starts, first = (counts.new_empty(g.chunks, total + 1) for _ in range(2))
    launcher.start(inverse.sum_blocks, (1,), totals, starts, first, g.chunks, total, per_item, 2048)
    return starts, first


def _items(starts: Tensor, first: Tensor, most: int, per_item: int) -> Tensor:
    chunks, bounds = starts.shape
    items = starts.new_empty(chunks, most, 3)
    grid = (-(-most // 256), chunks)
    launcher.start(inverse.write_items, grid, starts, first, items, most, bounds - 1, per_item, 256)
    return items


WIDTH = 256  # entries that a warp sorts at once: more would take registers from other warps
PROGRAMS = 2048  # of a launch: enough to fill a GPU, and no more counts than that takes
COUNT_BYTES = 1 << 26  # of the counts, where so many programs would need more
LARGEST_KEY = 1 << 31


class _Grid(NamedTuple):
    """`chunks` of `chunk` queries in `tiles` of `tile` queries, `step` queries, 2**bits entries or fewer, at a time."""

    pairs: int  # (batch, KV head)
    chunk: int
    chunks: int
    tiles: int
    tile: int
    step: int
    bits: int

    @property
    def programs(self) -> int:
        return self.chunks * self.tiles * self.pairs

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": max(1, (1 << self.bits) // WIDTH)}


def _grid(shape: torch.Size, slots: int, chunk: int) -> _Grid:
    """Tiles as short as leave PROGRAMS and COUNT_BYTES, so that few counts are summed and none takes long."""
    batch, length, heads, count = shape
    pairs, chunks = batch * heads, -(-length // chunk)
    width = max(launch.power_of_two(count), min(WIDTH, launch.power_of_two(chunk * count)))
    step = width // count
    most = max(1, min(PROGRAMS // (pairs * chunks), COUNT_BYTES // (4 * pairs * slots * chunks)))
    tile = step * -(-chunk // (most * step))
    return _Grid(pairs, chunk, chunks, -(-chunk // tile), tile, step, width.bit_length() - 1)


def per_item(length: int, entries: int) -> int:
    """Entries of an item: about what a block has on average (n·l'), a little less where there are few queries."""
    return max(64, min(entries, length))


ITEMS = 1024  # of a launch of one program a multiprocessor: some rounds, so that few are idle in the last
LEAST = 256  # entries of such an item: less than that is mostly start and end


def in_rounds(total: int, most: int) -> int:
    """Entries of an item, `most` or fewer, where a launch has `total` entries and each program a multiprocessor."""
    return max(min(LEAST, most), min(most, total // ITEMS))


PART_BYTES = 1 << 31  # of the parts of one chunk of queries


def part_chunk(length: int, row_bytes: int) -> int:
    """Queries of a chunk whose parts, row_bytes each, fit in PART_BYTES."""
    return launch.chunk(length, row_bytes, PART_BYTES)


def pair_chunk(length: int, pairs: int, row_bytes: int) -> tuple[int, int]:
    """(queries of a chunk, pairs of batch entry and KV head at once) whose parts, row_bytes each, fit in PART_BYTES.

    As many queries as can be: a block's item then has more of them.
    """
    chunk = part_chunk(length, row_bytes)
    return chunk, max(1, min(pairs, PART_BYTES // (row_bytes * chunk)))


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

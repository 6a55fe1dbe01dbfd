"""Unions of the block lists of adjacent queries: each block once, with the queries that list it."""

from __future__ import annotations

# pyright: reportOperatorIssue=false
import triton
import triton.language as tl
from torch import Tensor

from nsagen.runtime import launch, launcher
from nsagen.runtime.inverse import sort


def unite(blocks: Tensor, size: int, queries: int, leaves: int = 0) -> tuple[Tensor, Tensor]:
    """Unite lists int32 [B, T, Hkv, n] of blocks of `size` tokens, ascending, −1 last, in tiles of `queries` queries.

    entries int32 [B·Hkv·tiles, queries·n]: block << queries | bits of the tile's queries that list it, bit i for query
    tile·queries + i; ascending. Behind the last one nothing is written. counts int32 [B·Hkv·tiles]. The row of a tile
    is (b·Hkv + h)·tiles + tile. leaves: the last blocks up to each query's own that are left out. Blocks must be below
    2^(31 − queries), queries at most 15; what a list repeats counts once.
    """
    assert 1 <= queries <= 15
    batch, length, heads, count = blocks.shape
    tiles = -(-length // queries)
    rows, bits = batch * heads * tiles, launch.power_of_two(queries * count).bit_length() - 1
    entries = launch.empty(blocks, (rows, queries * count), None)
    counts = launch.empty(blocks, (rows,), None)
    shape = (length, tiles, heads, count, size, queries, leaves, bits)
    if rows:
        launcher.start(unite_lists, (rows,), blocks.contiguous(), entries, counts, *shape, num_warps=1)
    return entries, counts


@triton.jit(do_not_specialize=["length", "tiles"])
def unite_lists(
    blocks_ptr, entries_ptr, counts_ptr, length, tiles, HEADS: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr,
    QUERIES: tl.constexpr, LEAVES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A program unites the lists of a tile: sorts their entries, 2**BITS at most, and merges each run of one block."""
    row = tl.program_id(0)
    pair, t0 = row // tiles, row % tiles * QUERIES
    WIDTH: tl.constexpr = 1 << BITS
    i = tl.arange(0, WIDTH)
    query = i // COUNT
    t = t0 + query
    lists = blocks_ptr + (((pair // HEADS).to(tl.int64) * length + t0) * HEADS + pair % HEADS) * COUNT
    block = tl.load(lists + query * (HEADS * COUNT) + i % COUNT, mask=(query < QUERIES) & (t < length), other=-1)
    if LEAVES:
        block = tl.where(block <= t // SIZE - LEAVES, block, -1)
    # Unsigned, so that none (−1) comes last.
    entry = sort((block.to(tl.uint32, bitcast=True) << QUERIES) | (1 << query).to(tl.uint32), i, BITS)
    before = tl.gather(entry, tl.maximum(i - 1, 0), 0)
    first = (entry < 1 << 31) & ((i == 0) | (entry >> QUERIES != before >> QUERIES))
    for step in tl.static_range(BITS):  # then the first of a run has the bits of all, even where a list repeats itself
        later = tl.gather(entry, tl.minimum(i + (1 << step), WIDTH - 1), 0)
        entry |= tl.where(later >> QUERIES == entry >> QUERIES, later, 0)
    place = tl.cumsum(first.to(tl.int32), 0) - 1
    tl.store(entries_ptr + row.to(tl.int64) * (QUERIES * COUNT) + place, entry.to(tl.int32, bitcast=True), mask=first)
    tl.store(counts_ptr + row, tl.sum(first.to(tl.int32), 0))

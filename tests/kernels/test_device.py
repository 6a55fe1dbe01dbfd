"""The shared device functions, each on its own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl

from nsagen.runtime import device as d

ENDS = [0, 1, 1, 8, 8, 8, 40, 41]


@triton.jit
def tile_owner(cu_ptr, out_ptr, sequences, STRIDE: tl.constexpr, STEP: tl.constexpr):
    tile = tl.program_id(0)
    tl.store(out_ptr + tile, d.find_sequence(cu_ptr, tile, sequences, STRIDE, STEP))


@triton.jit
def row_owner(cu_ptr, out_ptr, sequences):
    row = tl.program_id(0)
    tl.store(out_ptr + row, d.sequence_of(cu_ptr, row, sequences))


@triton.jit
def add(ptr, value_ptr, mask_ptr, ACCUMULATE: tl.constexpr):
    i = tl.arange(0, 16)
    mask = tl.load(mask_ptr + i) > 0
    d.add_to(ptr + i, tl.load(value_ptr + i), mask, ACCUMULATE)


@triton.jit
def best_of(
    bits_ptr, blocks_ptr, kept_ptr, SIZE: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, RANKED: tl.constexpr
):
    i = tl.arange(0, SIZE)
    d.store_best(tl.load(bits_ptr + i), i, blocks_ptr, kept_ptr, COUNT, WIDTH, RANKED)


@triton.jit
def rows_of_tiles(table_ptr, out_ptr, pages, n, STEP: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr):
    s0 = tl.program_id(0) * STEP
    s = s0 + tl.arange(0, BN)
    row = d.tile_rows(table_ptr, pages, s0, s, n, BN, PAGE, 0, 0, 0 if STEP == BN else STEP)
    tl.store(out_ptr + s, row, mask=(s < n) & (s < s0 + STEP))


@pytest.mark.parametrize("page", [2, 4, 8, 16, 48, 64])  # eight pages a tile, four, two, one of one to four
@pytest.mark.parametrize("step", [16, 12, 8])  # tiles one after the other, or listed blocks that are none
def test_rows_of_a_tile_through_the_table(page: int, step: int, device: str) -> None:
    """As one look-up a key gives them; −1 where the table names no page that there is."""
    n, pages = 187, 200
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(page)).to(torch.int32)[: -(-n // page)]
    table[1], table[-1] = -1, pages
    s = torch.arange(n)
    named = table[s // page].long()
    want = torch.where((named >= 0) & (named < pages), named * page + s % page, -1)
    out = torch.full((n + 1,), 7, dtype=torch.int64, device=device)
    rows_of_tiles[(-(-n // step),)](table.to(device), out, pages, n, step, 16, page)
    assert out.tolist() == [*want.tolist(), 7]


@triton.jit
def starts_of_tiles(blocks_ptr, out_ptr, end):
    step = tl.program_id(0)
    tl.store(out_ptr + step, d.listed_tile(blocks_ptr, step, end, 2, 24, 16))


@pytest.mark.parametrize(("end", "want"), [(0, [0] * 4), (4, [48, 64, 120, 136]), (3, [48, 64, 120, 120])])
def test_tiles_of_listed_blocks(end: int, want: list[int], device: str) -> None:
    """Past the end the last one; of an empty list, which may hold anything, the first."""
    blocks = torch.tensor([2, 5] if end else [-1, -1], dtype=torch.int32, device=device)
    out = torch.empty(4, dtype=torch.int32, device=device)
    starts_of_tiles[(4,)](blocks, out, end)
    assert out.tolist() == want


@pytest.mark.parametrize("values", [1, 3, 50, 1 << 30])  # of few, many are equal to the last one chosen
@pytest.mark.parametrize("there", [0, 1, 4, 5, 64])
@pytest.mark.parametrize(("size", "ranked"), [(4, 128), (64, 128), (256, 128), (256, 256)])
def test_the_best_are_those_of_a_stable_sort(values: int, there: int, size: int, ranked: int, device: str) -> None:
    """Of few in its order, of many ascending. With their bits, or without."""
    there = min(there, size)
    bits = torch.randint(values, (size,), generator=torch.Generator().manual_seed(there)).to(torch.int32)
    bits[0] = 0x7F800000  # +inf: a forced block
    bits[there:] = -1
    best = bits[:there].argsort(descending=True, stable=True)[:5].tolist()
    best = best if size <= ranked else sorted(best)
    missing = [-1] * (5 - len(best))
    blocks, kept = (torch.full((6,), 7, dtype=torch.int32, device=device) for _ in range(2))
    best_of[(1,)](bits.to(device), blocks, kept, size, 5, 8, ranked)
    assert blocks.tolist() == [*best, *missing, 7]
    assert kept.tolist() == [*bits[best].tolist(), *missing, 7]
    blocks.fill_(7)
    best_of[(1,)](bits.to(device), blocks, None, size, 5, 8, ranked)
    assert blocks.tolist() == [*best, *missing, 7]


@pytest.mark.parametrize(("stride", "step"), [(1, 4), (1, 16), (4, 2)])
def test_every_sequence_has_room_for_its_tiles(stride: int, step: int, device: str) -> None:
    cu = torch.tensor(ENDS, dtype=torch.int32, device=device)
    sequences = len(ENDS) - 1
    tiles = ENDS[-1] // stride // step + sequences
    out = torch.full((tiles,), -1, dtype=torch.int32, device=device)
    tile_owner[(tiles,)](cu, out, sequences, stride, step)
    first = [start // stride // step + s for s, start in enumerate(ENDS[:-1])]
    assert out.tolist() == [max(s for s in range(sequences) if first[s] <= tile) for tile in range(tiles)]
    for s, (start, end) in enumerate(pairwise(ENDS)):
        needed = -(-((end - start) // stride) // step)
        assert out[first[s] : first[s] + needed].tolist() == [s] * needed


def test_a_row_belongs_to_the_last_sequence_that_starts_before_it(device: str) -> None:
    cu = torch.tensor(ENDS, dtype=torch.int32, device=device)
    out = torch.full((ENDS[-1],), -1, dtype=torch.int32, device=device)
    row_owner[(ENDS[-1],)](cu, out, len(ENDS) - 1)
    for row, s in enumerate(out.tolist()):
        assert ENDS[s] <= row < ENDS[s + 1]


@pytest.mark.parametrize("accumulate", [False, True])
def test_add_to_touches_only_what_the_mask_holds(accumulate: bool, device: str) -> None:
    old, value = torch.randn(16, device=device), torch.randn(16, device=device)
    mask = torch.arange(16, device=device) % 3
    out = old.clone()
    add[(1,)](out, value, mask, accumulate)
    torch.testing.assert_close(out, torch.where(mask > 0, value + old if accumulate else value, old))


@triton.jit
def a_step(
    new_ptr, store_ptr, mean_ptr, copy_ptr, table_ptr, start, past, total, lost, PAGE: tl.constexpr, RING: tl.constexpr
):
    d.mean_of_block(
        new_ptr, 5, store_ptr, 5, None, 1, mean_ptr, None, table_ptr, 4, start, past, lost, 20, 16, 5, 8, PAGE, 3, RING
    )
    d.copy_block(
        new_ptr, 5, store_ptr, 5, None, 1, copy_ptr, 5, table_ptr, 4, start, past, total, lost, 20, 5, 8, PAGE, 3, RING
    )


@triton.jit
def tokens_in(new_ptr, store_ptr, table_ptr, past, total, PAGE: tl.constexpr, RING: tl.constexpr):
    d.append_rows(new_ptr, 5, store_ptr, 5, None, 1, table_ptr, 4, past, total, None, 5, 8, 8, PAGE, 3, RING)


@pytest.mark.parametrize(("pages", "ring"), [(None, 0), ([2, 0, 3, 1], 0), (None, 27)])
def test_a_block_is_of_old_and_new_tokens(pages: list[int] | None, ring: int, device: str) -> None:
    """Tokens 7 … 26, of which 22 … 26 are new, from a store in a row, in pages of 8, or in a ring behind 3 sinks."""
    store, new = torch.randn(32, 5, device=device), torch.randn(5, 5, device=device)
    rows = list(range(32)) if pages is None else [pages[s // 8] * 8 + s % 8 for s in range(32)]
    if ring:
        rows = [s if s < 3 else 3 + (s - 3) % ring for s in range(32)]
    table = None if pages is None else torch.tensor(pages, dtype=torch.int32, device=device)
    page = 1 if pages is None else 8
    want = torch.cat([store[rows[7:22]], new])
    mean, copy = torch.empty(5, device=device), torch.empty(20, 5, device=device)
    a_step[(1,)](new, store, mean, copy, table, 7, 22, 27, None, page, ring)
    torch.testing.assert_close(mean, want.mean(0))
    assert torch.equal(copy, want)
    before = store.clone()
    tokens_in[(1,)](new, store, table, 22, 26, page, ring)  # room for four
    assert torch.equal(store[rows[22:26]], new[:4])
    others = [row for row in range(32) if row not in rows[22:26]]
    assert torch.equal(store[others], before[others])

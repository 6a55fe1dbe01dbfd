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

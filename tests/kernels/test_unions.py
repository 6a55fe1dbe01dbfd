"""The unions of adjacent queries' block lists against a plain Python loop."""

from __future__ import annotations

import pytest
import torch

from nsagen.runtime.unions import unite


def some_lists(length: int, count: int, most: int, device: str) -> torch.Tensor:
    """Lists int32 [2, length, 2, count] of blocks below `most`, ascending, −1 last: full ones, short ones, empty ones.

    Neighbours list many of the same; the lists of the first tile's queries are empty.
    """
    g = torch.Generator().manual_seed(length + count)
    shape = (2, length, 2, count)
    found = torch.rand(*shape[:3], most, generator=g).topk(count, -1).indices.sort(-1).values.int()
    listed = torch.randint(-count, 2 * count, shape[:3], generator=g)
    listed[:, :6] = 0
    return found.masked_fill(torch.arange(count) >= listed[..., None], -1).to(device)


def plain(blocks: torch.Tensor, size: int, queries: int, leaves: int) -> list[list[int]]:
    """The entries of every tile of every (batch, KV head)."""
    batch, length, heads, _ = blocks.shape
    found: list[list[int]] = []
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        for t0 in range(0, length, queries):
            bits: dict[int, int] = {}
            for t in range(t0, min(t0 + queries, length)):
                for block in blocks[b, t, h].tolist():
                    if block >= 0 and (not leaves or block <= t // size - leaves):
                        bits[block] = bits.get(block, 0) | 1 << (t - t0)
            found.append([block << queries | bits[block] for block in sorted(bits)])
    return found


def check(blocks: torch.Tensor, size: int, queries: int, leaves: int) -> None:
    entries, counts = unite(blocks, size, queries, leaves)
    wanted = plain(blocks, size, queries, leaves)
    assert entries.dtype == counts.dtype == torch.int32
    assert entries.shape == (len(wanted), queries * blocks.shape[-1])
    assert [row[:n] for row, n in zip(entries.tolist(), counts.tolist(), strict=True)] == wanted
    assert all((row[n:] == -1).all() for row, n in zip(entries, counts.tolist(), strict=True))  # as before the launch


@pytest.mark.parametrize("leaves", [0, 2])
@pytest.mark.parametrize("queries", [4, 6, 15])
@pytest.mark.parametrize(("length", "size", "count", "most"), [(83, 8, 6, 11), (83, 8, 16, 20), (205, 64, 6, 7)])
def test_the_same_as_a_plain_loop(
    length: int, size: int, count: int, most: int, queries: int, leaves: int, device: str
) -> None:
    """Of tokens that no tile divides; some queries list blocks past their own, which only `leaves` leaves out."""
    check(some_lists(length, count, most, device), size, queries, leaves)


def test_the_last_block_and_lists_apart_in_memory(device: str) -> None:
    blocks = some_lists(18, 16, 40, device)
    blocks[:, 7, :, 2:] = blocks[:, 5, :, 2:] = -1
    blocks[:, 7, :, 1] = blocks[:, 5, :, 1] = 2**27 - 1
    check(blocks.repeat_interleave(2, 2)[:, :, ::2], 64, 4, 0)


@pytest.mark.parametrize("length", [0, 1, 7])
def test_a_query_a_tile(length: int, device: str) -> None:
    check(some_lists(length, 3, 5, device), 8, 1, 0)


def test_a_block_left_out_by_one_query_is_listed_by_the_next(device: str) -> None:
    """Query 16 is the first that has block 0 two blocks behind."""
    blocks = torch.tensor([0, 1, 2], dtype=torch.int32, device=device).expand(1, 20, 1, 3)
    entries, counts = unite(blocks, 8, 5, 2)
    assert counts.tolist() == [0, 0, 0, 1]
    assert entries[3, 0] == 0b11110
    check(blocks, 8, 5, 2)


def test_what_a_list_repeats_takes_nothing_from_its_neighbours(device: str) -> None:
    blocks = torch.tensor([3, 3, 3, 3, 3, 5], dtype=torch.int32, device=device).expand(1, 4, 1, 6)
    entries, counts = unite(blocks, 64, 4)
    assert counts.tolist() == [2]
    assert entries[0, :2].tolist() == [3 << 4 | 0b1111, 5 << 4 | 0b1111]

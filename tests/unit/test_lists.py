"""The inverse of block lists against a plain Python one, and its kernels against torch's sorts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import hypothesis.strategies as st
import pytest
import sorted_lists
import torch
from hypothesis import example, given, settings

from nsagen.errors import InputError
from nsagen.runtime import inverse, lists
from nsagen.runtime.lists import Inverse, invert


def some_lists(shape: Sequence[int], seed: int, blocks: int) -> torch.Tensor:
    """Lists [B, T, Hkv, n] that name most blocks below `blocks`, in no order, some twice, with holes and strangers."""
    g = torch.Generator().manual_seed(seed)
    found = torch.randint(0, blocks, shape, generator=g, dtype=torch.int32)
    kind = torch.rand(shape, generator=g)
    return found.masked_fill(kind < 0.2, -1).masked_fill(kind > 0.95, 2**31 - 1).masked_fill(kind > 0.98, blocks)


def cu_of(ends: Sequence[int] | None, device: str) -> torch.Tensor | None:
    return None if ends is None else torch.tensor(ends, dtype=torch.int32, device=device)


def check(one: Inverse, other: Inverse) -> None:
    assert one.slots == other.slots
    assert torch.equal(one.first, other.first)
    assert torch.equal(one.items, other.items)
    assert torch.equal(one.entries[: len(other.entries)], other.entries)


def plain(blocks: torch.Tensor, size: int, ends: list[int] | None, slots: int, rows: range) -> dict[int, list[int]]:
    """Key block number -> where the token rows list it, in order."""
    batch, length, heads, count = blocks.shape
    found: dict[int, list[int]] = {}
    for b in range(batch):
        for t in (x for x in range(length) if x in rows):
            s = 0 if ends is None else max(i for i, end in enumerate(ends[:-1]) if end <= t)
            tokens = length if ends is None else ends[s + 1] - ends[s]
            base = 0 if ends is None else ends[s] // size + s
            for h in range(heads):
                for i, block in enumerate(blocks[b, t, h].tolist()):
                    if 0 <= block < -(-tokens // size):
                        place = ((b * length + t) * heads + h) * count + i
                        found.setdefault((b * heads + h) * slots + base + block, []).append(place)
    return found


@pytest.mark.parametrize(("batch", "tokens", "ends"), [(2, 41, None), (1, 50, [0, 1, 8, 8, 31, 49])])
@pytest.mark.parametrize(("per_item", "chunk"), [(1, 16), (1000, 50)])
def test_every_entry_is_in_one_item_of_its_block(
    batch: int, tokens: int, ends: list[int] | None, per_item: int, chunk: int, device: str
) -> None:
    blocks = some_lists((batch, tokens, 2, 3), 7, -(-tokens // 8)).to(device)
    found = invert(blocks, 8, cu_of(ends, device), per_item, chunk)
    for number, (items, first) in enumerate(zip(found.items.tolist(), found.first.tolist(), strict=True)):
        got: dict[int, list[int]] = {}
        for item, (block, start, end) in enumerate(items):
            if block < batch * 2 * found.slots:
                assert end - start <= per_item
                assert first[block] <= item < first[block + 1]
                got.setdefault(block, []).extend(found.entries[start:end].tolist())
        assert got == plain(blocks, 8, ends, found.slots, range(number * chunk, (number + 1) * chunk))


SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 150), st.integers(1, 2), st.sampled_from([1, 3, 4, 16, 20]))
LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=5)


@given(
    shape=SHAPES,
    lengths=LENGTHS | st.none(),
    size=st.sampled_from([1, 8, 24]),
    per_item=st.sampled_from([1, 5, 64]),
    chunk=st.sampled_from([None, 16, 128]),
    programs=st.sampled_from([1, 2048]),
    seed=st.integers(0, 9),
)
@example((2, 150, 2, 16), None, 8, 5, 128, 16, 0)  # several steps a tile, several tiles a chunk, several chunks
@example((1, 100, 2, 16), [60, 0, 39], 8, 64, None, 1, 1)
@example((1, 1, 1, 1), None, 8, 1, None, 2048, 2)
@settings(max_examples=8)
def test_the_same_as_torch_s_sorts(
    device: str, shape: tuple[int, ...], lengths: list[int] | None, size: int, per_item: int, chunk: int | None,
    programs: int, seed: int,
) -> None:  # fmt: skip
    """Few programs take many queries each, step by step."""
    ends = None if lengths is None else [0, *accumulate(lengths)]
    shape = shape if ends is None else (1, max(1, ends[-1]), *shape[2:])
    blocks = some_lists(shape, seed, -(-shape[1] // size)).to(device)
    arguments = (blocks, size, cu_of(ends, device), per_item, chunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lists, "PROGRAMS", programs)
        check(invert(*arguments), sorted_lists.invert(*arguments))


def test_many_blocks_and_keys_of_64_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over blocks, and items, past the first step."""
    monkeypatch.setattr(lists, "LARGEST_KEY", 1 << 15)
    blocks = some_lists((1, 2100, 1, 1), 0, 2100).to(device)
    arguments = (blocks, 1, None, 2)
    check(invert(*arguments), sorted_lists.invert(*arguments))


def test_sums_of_many_tiles(device: str) -> None:
    counts = torch.randint(0, 99, (2, 150, 20), dtype=torch.int32, device=device)
    sums, totals = counts.clone(), counts.new_empty(2, 20)
    inverse.sum_tiles[(2, 2)](sums, totals, 150, 20, 128, 16)
    assert torch.equal(sums, counts.cumsum(1) - counts)
    assert torch.equal(totals, counts.sum(1))


def test_memory_of_the_counts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for length, heads in ((1 << 20, 4), (1 << 16, 16), (1000, 2)):
        slots = -(-length // 64)
        g = lists._grid(torch.Size((1, length, heads, 16)), slots, length)
        assert g.chunks * g.tiles * g.pairs * slots * 4 <= lists.COUNT_BYTES
        assert g.tiles * g.tile >= length > (g.tiles - 1) * g.tile
        assert g.tile % g.step == 0


def test_too_many_entries_are_refused() -> None:
    with pytest.raises(InputError, match="fewer than"):
        invert(torch.empty((1, 2**27, 1, 16), dtype=torch.int32, device="meta"), 64, None, 64)


@pytest.mark.parametrize("leaves", [1, 3])
@pytest.mark.parametrize("chunk", [None, 16])
def test_the_last_blocks_up_to_a_query_can_be_left_out(leaves: int, chunk: int | None, device: str) -> None:
    """As if the lists did not name them; nothing is left of a query near the start."""
    blocks = some_lists((2, 61, 2, 5), 3, 8).to(device)
    own = (torch.arange(61, device=device) // 8)[None, :, None, None]
    far = torch.where(blocks > own - leaves, torch.full_like(blocks, -1), blocks)
    assert (far != blocks).any() and (far >= 0).any()
    got, want = invert(blocks, 8, None, 4, chunk, leaves), invert(far, 8, None, 4, chunk)
    check(got, want._replace(entries=want.entries[: int(((far >= 0) & (far < 8)).sum())]))

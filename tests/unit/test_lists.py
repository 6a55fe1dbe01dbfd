"""The inverse of block lists against a plain Python one."""

from __future__ import annotations

import pytest
import torch
from harness import caller_lists
from strategies import make_inputs

from nsagen.runtime.lists import invert

SPEC = {
    "heads": {"query": 2, "kv": 2, "qk_dim": 16, "v_dim": 16},
    "branches": {"selected": {"block": 8, "top_n": 3, "from": "caller"}},
    "combine": "single",
}


def plain(lists: torch.Tensor, size: int, ends: list[int] | None, slots: int, rows: range) -> dict[int, list[int]]:
    """Key block number -> those of the token rows that list it, in order."""
    batch, length, heads, _ = lists.shape
    found: dict[int, list[int]] = {}
    for b in range(batch):
        for t in (x for x in range(length) if x in rows):
            s = 0 if ends is None else max(i for i, end in enumerate(ends[:-1]) if end <= t)
            base = 0 if ends is None else ends[s] // size + s
            for h in range(heads):
                for block in lists[b, t, h].tolist():
                    if block >= 0:
                        found.setdefault((b * heads + h) * slots + base + block, []).append(b * length + t)
    return found


@pytest.mark.parametrize(("batch", "tokens", "ends"), [(2, 41, None), (1, 1, None), (1, 50, [0, 1, 8, 8, 31, 50])])
@pytest.mark.parametrize(("per_item", "chunk"), [(1, None), (5, 50), (1000, 16), (3, 16)])
def test_every_entry_is_in_one_item_of_its_block(
    batch: int, tokens: int, ends: list[int] | None, per_item: int, chunk: int | None
) -> None:
    lists = caller_lists(SPEC, make_inputs(SPEC, batch, tokens), 7, ends)
    assert lists is not None
    cu = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    inverse = invert(lists, 8, cu, per_item, chunk)
    blocks, step = batch * 2 * inverse.slots, chunk or tokens
    for number, (items, first) in enumerate(zip(inverse.items.tolist(), inverse.first, strict=True)):
        got: dict[int, list[int]] = {}
        for item, (block, start, end) in enumerate(items):
            if block < blocks:
                assert end - start <= per_item
                assert first[block] <= item < first[block + 1]
                got.setdefault(block, []).extend(inverse.queries[start:end].tolist())
                places = lists.flatten()[inverse.places[start:end]]
                assert (places == places[0]).all()  # the block's own number in its sequence
        assert got == plain(lists, 8, ends, inverse.slots, range(number * step, (number + 1) * step))


def test_blocks_past_the_sequence_are_nobodys() -> None:
    lists = torch.tensor([[[[0, 99]]]], dtype=torch.int32)
    inverse = invert(lists, 8, None, 4)
    assert inverse.first.tolist() == [[0, 1]]
    assert inverse.items[0, 0].tolist() == [0, 0, 1]


def test_a_block_past_its_packed_sequence_is_not_the_nexts() -> None:
    lists = torch.zeros(1, 20, 1, 2, dtype=torch.int32)
    lists[..., 1] = -1
    lists[0, 3, 0, 1] = 1  # of a sequence of 8 tokens, which has one block
    inverse = invert(lists, 8, torch.tensor([0, 8, 20], dtype=torch.int32), 64)
    items = {block: inverse.queries[start:end].tolist() for block, start, end in inverse.items[0].tolist()}
    assert items[0] == list(range(8))
    assert items[2] == list(range(8, 20))  # the next sequence's first

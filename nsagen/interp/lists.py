"""The inverse of block lists (runtime/lists.py) and the kernels over it: attend_list_dkv and sum_items."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from nsagen.interp.attend import KeyGrads
from nsagen.interp.domains import Array
from nsagen.interp.program import Program, Rows, Run, Sequence, write_once
from nsagen.interp.walks import Step, tested

PER_ITEM = 7  # far below what the runtime takes, so that short sequences split their hot blocks too


@dataclass(frozen=True)
class Block:
    """A key block of one batch entry, sequence and KV head."""

    batch: int
    sequence: Sequence
    head: int
    number: int


@dataclass(frozen=True)
class Item:
    """Some of the queries, ascending, that list one key block."""

    block: Block
    queries: tuple[int, ...]


def key_blocks(blocks: Array, size: int, sequences: tuple[Sequence, ...]) -> Iterator[Block]:
    for b, sequence, h in product(range(blocks.shape[0]), sequences, range(blocks.shape[2])):
        for number in range(-(-sequence.tokens // size)):
            yield Block(b, sequence, h, number)


def invert(blocks: Array, size: int, sequences: tuple[Sequence, ...]) -> list[Item]:
    """The items of blocks [B, T, Hkv, n], those of one key block side by side."""
    found: list[Item] = []
    for block in key_blocks(blocks, size, sequences):
        start, end = block.sequence.start, block.sequence.start + block.sequence.tokens
        lists = blocks[block.batch, start:end, block.head]
        queries = tuple(int(t) for t in np.flatnonzero((lists == block.number).any(-1)))
        found += [Item(block, queries[i : i + PER_ITEM]) for i in range(0, len(queries), PER_ITEM)]
    return found


def attend_list_dkv(run: Run) -> None:
    """An item's part of dk and dv: its key block against its queries, BT entries at a time."""
    size = run.arrays["parts"].shape[1]
    for number, item in enumerate(invert(run.arrays["items"], size, run.sequences)):
        for offset in range(0, size, run.bn):
            block = item.block
            p = Program(run, block.batch, block.sequence, block.head, block.number * size + offset)
            dk, dv = _item_grads(p, _keys(p, block.number, size), item)
            local = np.arange(offset, min(offset + run.bn, size))
            part = np.concatenate([dk, dv], 1)[: len(local)]
            write_once(run.arrays["parts"], (number, local), part, f"{run.line}: store parts")


def _item_grads(p: Program, keys: Rows, item: Item) -> tuple[Array, Array]:
    total = KeyGrads(p, keys)
    entry = np.arange(p.run.bm) // p.run.rows_per_query
    for walk, segment in ((w, s) for w in p.run.kernel.walks for s in w.segments):
        masks = tested(segment.masks, p.env(walk.axis))
        for first in range(0, len(item.queries), p.run.bt):
            step = Step(segment.name, first, p.run.bt, len(item.queries), masks)
            step.check_loads(f"{p.run.line}: walk {walk.piece.name}")
            total.add(p.query_rows(_listed(item, first + entry, p.sequence.tokens)), step, step.guarded)
    return total.result()


def _listed(item: Item, entries: Array, past: int) -> Array:
    """The queries at entries of the item; past its end a row beyond the sequence."""
    return np.array([item.queries[e] if e < len(item.queries) else past for e in entries])


def _keys(p: Program, block: int, size: int) -> Rows:
    end = min(p.sequence.tokens, (block + 1) * size)
    return p.keys(p.first + np.arange(p.run.bn), end)


def sum_items(run: Run) -> None:
    """dk and dv of a key block: its items' parts, added in order."""
    parts = run.arrays["parts"]
    size = parts.shape[1]
    items = invert(run.arrays["items"], size, run.sequences)
    for block in key_blocks(run.arrays["items"], size, run.sequences):
        own = [i for i, item in enumerate(items) if item.block == block]
        for offset in range(0, size, run.bn):
            p = Program(run, block.batch, block.sequence, block.head, block.number * size + offset)
            total = np.zeros((run.bn, parts.shape[2]))
            for i in own:
                held = parts[i, offset : offset + run.bn]
                total[: len(held)] += held
            keys = _keys(p, block.number, size)
            p.store("dk", keys, total[:, : run.heads.qk_dim])
            p.store("dv", keys, total[:, run.heads.qk_dim :])

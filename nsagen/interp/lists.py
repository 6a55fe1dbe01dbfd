"""The inverse of block lists (runtime/lists.py) and the kernels over it: what templates/*list* and sum_items do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from nsagen.interp.attend import FLOOR, KeyGrads
from nsagen.interp.columns import dot, join, split
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


def invert(
    blocks: Array, size: int, sequences: tuple[Sequence, ...], chunk: range = range(0), leaves: int = 0
) -> list[Item]:
    """The items of blocks [B, T, Hkv, n], those of one key block side by side; of the chunk's rows if there is one.

    Without the last `leaves` blocks up to each query's own.
    """
    found: list[Item] = []
    for block in key_blocks(blocks, size, sequences):
        start, end = block.sequence.start, block.sequence.start + block.sequence.tokens
        lists = blocks[block.batch, start:end, block.head]
        queries = tuple(int(t) for t in np.flatnonzero((lists == block.number).any(-1)))
        queries = tuple(t for t in queries if not chunk or start + t in chunk)
        queries = tuple(t for t in queries if not leaves or block.number <= t // size - leaves)
        found += [Item(block, queries[i : i + PER_ITEM]) for i in range(0, len(queries), PER_ITEM)]
    return found


def attend_list_dkv(run: Run) -> None:
    """An item's part of dk and dv: its key block against its queries, BT entries at a time."""
    size = run.arrays["parts"].shape[1]
    for number, item in enumerate(invert(run.arrays["items"], size, run.sequences, run.chunk, run.leaves)):
        for offset in range(0, size, run.bn):
            block = item.block
            p = Program(run, block.batch, block.sequence, block.head, block.number * size + offset)
            dk, dv = _item_grads(p, _keys(p, block.number, size), item)
            local = np.arange(offset, min(offset + run.bn, size))
            part = np.concatenate([dk, dv], 1)[: len(local)]
            write_once(run.arrays["parts"], (number, local), part, f"{run.line}: store parts")


def _item_grads(p: Program, keys: Rows, item: Item) -> tuple[Array, Array]:
    total = KeyGrads(p, keys)
    for step, rows in _steps(p, item):
        ds = total.add(rows, step, step.guarded)
        if "dq_parts" in p.run.arrays:
            dq = join([ds @ k for k in total.k], p.run.heads.qk_dim) * p.run.scale
            _store_parts(p, "dq_parts", rows, item.block.number, dq)
    return total.result()


def _steps(p: Program, item: Item) -> Iterator[tuple[Step, Rows]]:
    """The item's queries, BT entries at a time, each step checked not to load past its end."""
    entry = np.arange(p.run.bm) // p.run.rows_per_query
    for walk, segment in ((w, s) for w in p.run.kernel.walks for s in w.segments):
        masks = tested(segment.masks, p.env(walk.axis))
        for first in range(0, len(item.queries), p.run.bt):
            step = Step(segment.name, first, p.run.bt, len(item.queries), masks)
            step.check_loads(f"{p.run.line}: walk {walk.piece.name}")
            yield step, p.query_rows(_listed(item, first + entry, p.sequence.tokens))


def _store_parts(p: Program, operand: str, rows: Rows, block: int, value: Array) -> None:
    """Write what the block's tile at p.first gives each row, at the block's place in the query's list."""
    run, live = p.run, rows.live
    size = next(w.listed.size for w in run.kernel.walks if w.listed)
    at = p.sequence.start + rows.at[live]
    lists = run.arrays["items"][p.batch, at, p.head]
    place, tile = np.argmax(lists == block, axis=1), np.full(len(at), (p.first - block * size) // run.bn)
    group = rows.heads[live] - p.head * run.heads.group
    index = (p.batch, at - run.chunk.start, p.head, place, tile, group)
    write_once(run.arrays[operand], index, value[live], f"{run.line}: store {operand}")


def attend_list_fwd(run: Run) -> None:
    """An item's parts of out: its key block's tiles, each with a softmax of its own, for its queries."""
    size = next(w.listed.size for w in run.kernel.walks if w.listed)
    for item in invert(run.arrays["items"], size, run.sequences, run.chunk):
        block = item.block
        for offset in range(0, size, run.bn):
            p = Program(run, block.batch, block.sequence, block.head, block.number * size + offset)
            keys = _keys(p, block.number, size)
            k, v = split(p.load("k", keys), run.kernel.qk_parts), split(p.load("v", keys), run.kernel.v_parts)
            for step, rows in _steps(p, item):
                _part(p, step, rows, keys, k, v, block.number)


def _part(p: Program, step: Step, rows: Rows, keys: Rows, k: list[Array], v: list[Array], block: int) -> None:
    """The part of one query tile; its lse in natural log, −inf for a row that sees nothing of the tile."""
    q = split(p.load("q", rows, step.guarded), p.run.kernel.qk_parts)
    seen = step.seen(rows.at[:, None], keys.at[None, :], {"T": rows.length}, extents=False) & keys.live[None, :]
    scores = np.where(seen, dot(q, k) * p.run.scale, -np.inf)
    top = np.maximum(scores.max(1), FLOOR)
    weight = np.exp(scores - top[:, None])
    z = weight.sum(1)
    with np.errstate(divide="ignore"):
        _store_parts(p, "lse_parts", rows, block, top + np.log(z))
    out = join([weight @ x for x in v], p.run.heads.v_dim) / np.where(z > 0, z, 1.0)[:, None]
    _store_parts(p, "out_parts", rows, block, out)


def merge_lists(run: Run) -> None:
    """out and lse of the chunk's queries from the parts of their blocks."""
    for p, index, live in _chunk_queries(run):
        lse = np.where(live[:, None, None], run.arrays["lse_parts"][index], -np.inf)
        top = np.maximum(lse.max((0, 1)), FLOOR)
        weight = np.exp(lse - top)
        z = weight.sum((0, 1))
        parts = np.where(live[:, None, None, None], run.arrays["out_parts"][index], 0.0)
        rows = _own_rows(p)
        p.store("out", rows, (weight[..., None] * parts).sum((0, 1)) / np.where(z > 0, z, 1.0)[:, None])
        with np.errstate(divide="ignore"):
            p.store("lse", rows, top + np.log(z))


def sum_lists(run: Run) -> None:
    """dq of the chunk's queries from the parts of their blocks."""
    for p, index, live in _chunk_queries(run):
        parts = np.where(live[:, None, None, None], run.arrays["dq_parts"][index], 0.0)
        p.store("dq", _own_rows(p), parts.sum((0, 1)))


def _chunk_queries(run: Run) -> Iterator[tuple[Program, tuple[int, int, int], Array]]:
    """Each query of the chunk and KV head: its program, where its parts are, which of its blocks there are."""
    lists = run.arrays["blocks"]
    for b, sequence, h in product(range(run.batch), run.sequences, range(run.heads.kv)):
        for t in range(sequence.tokens):
            row = sequence.start + t
            if row in run.chunk:
                own = lists[b, row, h]
                live = (own >= 0) & ((own <= t // run.size - run.leaves) if run.leaves else True)
                yield Program(run, b, sequence, h, t), (b, row - run.chunk.start, h), live


def _own_rows(p: Program) -> Rows:
    """The rows of the group's heads of the program's query."""
    group = p.run.heads.group
    heads = p.head * group + np.arange(group)
    return Rows(np.full(group, p.first), heads, np.ones(group, bool), p.sequence.tokens)


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
    items = invert(run.arrays["items"], size, run.sequences, run.chunk, run.leaves)
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

"""The bodies of the selection: templates/score_lse.py.j2, and over one chunk of queries templates/select_*.py.j2."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from nsagen.errors import IRError
from nsagen.interp.attend import FLOOR, store_lse
from nsagen.interp.columns import dot, split
from nsagen.interp.domains import Array
from nsagen.interp.importance import best_blocks
from nsagen.interp.program import Program, Rows, Run, programs, write_once
from nsagen.ir.graph import Select


def score_lse(p: Program) -> None:
    """The running softmax of attend_fwd without values."""
    kernel, rows = p.run.kernel, p.queries(p.first)
    q = split(p.load("q", rows), kernel.qk_parts)
    m, z = np.full(len(rows.at), FLOOR), np.zeros(len(rows.at))
    for walk in kernel.walks:
        for step in p.steps(walk):
            keys = p.keys(step.indices, step.limit)
            k = split(p.load("k", keys, step.guarded), kernel.qk_parts)
            seen = step.seen(rows.at[:, None], keys.at[None, :], p.env(walk.axis))
            scores = np.where(seen, dot(q, k) * p.run.scale, -np.inf)
            top = np.maximum(m, scores.max(1))
            m, z = top, z * np.exp(m - top) + np.exp(scores - top[:, None]).sum(1)
    store_lse(p, rows, m, z)


def select_scores(run: Run) -> None:
    """exp(scale·q·k − lse), summed over the group's heads (and a block's keys), for the chunk's queries and keys."""
    for p in programs(run):
        here = p.sequence.start + p.first
        if here < run.chunk.stop and here + run.bt > run.chunk.start:
            _score_tile(p)


def _score_tile(p: Program) -> None:
    """Every step of a walk is a program: the heads of the group come by in turn."""
    kernel, rows = p.run.kernel, p.queries(p.first)
    group = p.run.heads.group
    for walk in kernel.walks:
        for step in p.steps(walk):
            keys = p.keys(step.indices, step.limit)
            k = split(p.load("k", keys, step.guarded), kernel.qk_parts)
            total = np.zeros((len(rows.at), len(keys.at)))
            for head in range(p.head * group, (p.head + 1) * group):
                of_head = replace(rows, heads=np.full(len(rows.at), head))
                q = split(p.load("q", of_head), kernel.qk_parts)
                total += np.exp(dot(q, k) * p.run.scale - p.load("lse", of_head)[:, None])
            seen = step.seen(rows.at[:, None], keys.at[None, :], p.env(walk.axis))
            _store_scores(p, rows, keys, np.where(seen, total, 0.0))


def _store_scores(p: Program, rows: Rows, keys: Rows, total: Array) -> None:
    """total [queries, keys], or its weighted sums over each block's keys: for the block itself, and for the next."""
    node, scores = p.run.kernel.select, p.run.arrays["scores"][p.batch, :, p.head]
    assert node is not None
    row = p.sequence.start + rows.at
    stored = rows.live & (row >= p.run.chunk.start) & (row < p.run.chunk.stop)
    blocks = total.reshape(len(row), -1, node.grouped)
    first = keys.at[0] // node.grouped
    for part, weights in enumerate(node.group_weights):
        at = first + part + np.arange(blocks.shape[1])
        there = at < scores.shape[2] if node.grouped > 1 else keys.live
        index = np.ix_(row[stored] - p.run.chunk.start, at[there])
        value = (blocks @ np.array(weights, float))[stored][:, there]
        write_once(scores[:, part], index, value, f"{p.run.line}: store scores")


def select_blocks(run: Run) -> None:
    """The best blocks of every query of the chunk and KV head; none for rows of no sequence."""
    node = run.kernel.select
    if node is None:
        raise IRError(f"{run.line}: does not say what it selects")
    scores, blocks = run.arrays["scores"], run.arrays["blocks"]
    for b, row, h in product(range(run.batch), run.chunk, range(run.heads.kv)):
        chosen = np.full(node.count, -1, np.int32)
        for sequence in run.sequences:
            if 0 <= (t := row - sequence.start) < sequence.tokens:
                best = best_blocks(node, t, importance(node, scores[b, row - run.chunk.start, h], t))
                chosen[: len(best)] = best
        write_once(blocks, (b, row, h), chosen, f"{run.line}: store blocks")


def importance(node: Select, scores: Array, t: int) -> Array:
    """[blocks up to the query's own] from scores [parts, …]: Σ weights·scores of the keys that have ended."""
    axis, step = node.axis, node.size // node.axis.stride
    ended = max(0, t + 1 - axis.block + axis.stride) // axis.stride
    total = np.zeros(t // node.size + 1)
    if node.grouped > 1:
        for j, part in product(range(len(total)), range(len(scores))):
            if 0 <= (j - part) * node.grouped < ended:
                total[j] += scores[part, j]
        return total
    for j, (i, weight) in product(range(len(total)), enumerate(node.weights, node.first)):
        if 0 <= j * step + i < ended:
            total[j] += weight * scores[0, j * step + i]
    return total

"""The bodies of the selection: templates/score_lse.py.j2, and over one chunk of queries templates/select_*.py.j2."""

from __future__ import annotations

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
    """exp(scale·q·k − lse), summed over the heads of the group, for the chunk's queries and the keys they walk."""
    for p in programs(run):
        here = p.sequence.start + p.first
        if here < run.chunk.stop and here + run.bt > run.chunk.start:
            _score_tile(p)


def _score_tile(p: Program) -> None:
    kernel, rows = p.run.kernel, p.queries(p.first)
    q = split(p.load("q", rows), kernel.qk_parts)
    lse = p.load("lse", rows)
    lse = np.where(np.isneginf(lse), np.inf, lse)[:, None]
    for walk in kernel.walks:
        for step in p.steps(walk):
            keys = p.keys(step.indices, step.limit)
            k = split(p.load("k", keys, step.guarded), kernel.qk_parts)
            seen = step.seen(rows.at[:, None], keys.at[None, :], p.env(walk.axis)) & rows.live[:, None]
            _store_scores(p, keys, np.where(seen, np.exp(dot(q, k) * p.run.scale - lse), 0.0))


def _store_scores(p: Program, keys: Rows, weight: Array) -> None:
    """Sum [BM, BN] over each query's heads; store the queries of the chunk."""
    per = p.run.rows_per_query
    total = weight[: p.run.bt * per].reshape(p.run.bt, per, -1).sum(1)
    t = p.first + np.arange(p.run.bt)
    row = p.sequence.start + t
    stored = (t < p.sequence.tokens) & (row >= p.run.chunk.start) & (row < p.run.chunk.stop)
    index = np.ix_(row[stored] - p.run.chunk.start, keys.at[keys.live])
    line = f"{p.run.line}: store scores"
    write_once(p.run.arrays["scores"][p.batch, :, p.head], index, total[stored][:, keys.live], line)


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
    """[blocks up to the query's own]: Σ weights·scores of the keys that have ended."""
    axis, step = node.axis, node.size // node.axis.stride
    ended = max(0, t + 1 - axis.block + axis.stride) // axis.stride
    total = np.zeros(t // node.size + 1)
    for j, (i, weight) in product(range(len(total)), enumerate(node.weights, node.first)):
        if 0 <= j * step + i < ended:
            total[j] += weight * scores[j * step + i]
    return total

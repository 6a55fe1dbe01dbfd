"""The bodies of a decoding step: templates/split_*.py.j2. A program's keys are shared out in runs, merged in order."""

from __future__ import annotations

from itertools import product

import numpy as np

from nsagen.errors import IRError
from nsagen.interp.attend import FLOOR
from nsagen.interp.columns import dot, join, split
from nsagen.interp.domains import Array
from nsagen.interp.importance import best_blocks
from nsagen.interp.program import Program, Rows, Run, programs, write_once
from nsagen.interp.walks import Step
from nsagen.ir.graph import Select
from nsagen.ir.plan import Walk


def split_attend(run: Run) -> None:
    """Every source's parts: of each run of its keys, the output (0 where nothing is seen) and lse."""
    for p, source in product(programs(run), sorted({w.source for w in run.kernel.walks})):
        walks = [w for w in run.kernel.walks if w.source == source]
        names = {o.role: o.name for o in run.kernel.operands if o.source == source}
        rows = p.queries(p.first)
        for i in range(len(run.arrays[names["part_lse"]])):
            _part(p, walks, names, rows, i)


def _part(p: Program, walks: list[Walk], names: dict[str, str], rows: Rows, i: int) -> None:
    q = split(p.load("q", rows), p.run.kernel.qk_parts)
    m, z = np.full(len(rows.at), FLOOR), np.zeros(len(rows.at))
    acc = split(np.zeros((len(rows.at), 0)), p.run.kernel.v_parts)
    count = len(p.run.arrays[names["part_lse"]])
    for walk in walks:
        steps = list(p.steps(walk))
        each = -(-len(steps) // count)
        for step in steps[i * each : (i + 1) * each]:
            scores = _scores(p, walk, step, rows, q, names["k"])
            top = np.maximum(m, scores.max(1))
            weight, fade = np.exp(scores - top[:, None]), np.exp(m - top)
            m, z = top, z * fade + weight.sum(1)
            if "v" in names:
                v = split(p.load(names["v"], p.keys(step.indices, step.limit), step.guarded), p.run.kernel.v_parts)
                acc = [a * fade[:, None] + weight @ x for a, x in zip(acc, v, strict=True)]
            if p.run.kernel.select:
                _store_sums(p, p.run.kernel.select, step, rows, scores, top)
    some = z > 0
    lse = np.where(some, m + np.log(np.where(some, z, 1.0)), -np.inf)
    _store(p, names["part_lse"], i, rows, lse)
    if "parts" in names:
        out = join([a / np.where(some, z, 1.0)[:, None] for a in acc], p.run.heads.v_dim)
        _store(p, names["parts"], i, rows, out)


def _scores(p: Program, walk: Walk, step: Step, rows: Rows, q: list[Array], operand: str) -> Array:
    """[rows, keys], −inf where a query does not see a key."""
    k = split(p.load(operand, p.keys(step.indices, step.limit), step.guarded), p.run.kernel.qk_parts)
    seen = step.seen(rows.at[:, None], step.indices[None, :], {"T": step.limit, "N": step.limit})
    return np.where(seen, dot(q, k) * p.run.scale, -np.inf)


def _store(p: Program, operand: str, part: int, rows: Rows, value: Array) -> None:
    index = (part, p.batch, p.sequence.start + rows.at[rows.live], rows.heads[rows.live])
    write_once(p.run.arrays[operand], index, value[rows.live], f"{p.run.line}: store {operand}")


def _store_sums(p: Program, select: Select, step: Step, rows: Rows, scores: Array, top: Array) -> None:
    """Σ weight·exp(score − top) of groups of keys: for their own block, and for the next one; of single keys scores."""
    sums, per = p.run.arrays["sums"], select.grouped
    live = (p.batch, p.sequence.start + rows.at[rows.live], rows.heads[rows.live])
    if per == 1:
        upto = min(step.at + step.width, step.limit)
        sums[(*live, 0, slice(step.at, upto))] = scores[rows.live, : upto - step.at]
        return
    for i, (ahead, weights) in product(range(0, step.width, per), enumerate(select.group_weights)):
        weight = np.exp(scores[rows.live, i : i + per] - top[rows.live, None])
        if (group := (step.at + i) // per) < sums.shape[-1]:
            sums[(*live, ahead, group)] = weight @ np.array(weights[: weight.shape[1]])
            p.run.arrays["tops"][(*live, group)] = top[rows.live]


def split_select(run: Run) -> None:
    """The best blocks of every query and KV head, from sums of scores and the parts' lse; none for rows of nobody."""
    node = run.kernel.select
    if node is None:
        raise IRError(f"{run.line}: does not say what it selects")
    group, blocks = run.heads.group, run.arrays["blocks"]
    lse = merged_lse(run.arrays["lses_scores"])
    for b, row, h in product(range(run.batch), range(blocks.shape[1]), range(run.heads.kv)):
        chosen = np.full(node.count, -1, np.int32)
        heads = slice(h * group, (h + 1) * group)
        for sequence in run.sequences:
            if 0 <= (t := row - sequence.start) < sequence.tokens:
                of_row = (b, row, heads)
                tops = run.arrays["tops"][of_row] if "tops" in run.arrays else None
                importance = _importance(node, run.arrays["sums"][of_row], tops, lse[of_row], t)
                run.arrays["scores"][b, row, h, : len(importance)] = importance
                best = best_blocks(node, t, importance)
                chosen[: len(best)] = best
        write_once(blocks, (b, row, h), chosen, f"{run.line}: store blocks")


def _importance(node: Select, sums: Array, tops: Array | None, lse: Array, t: int) -> Array:
    """[blocks up to the query's own] from sums [heads, blocks, groups]: a group adds to its own block and the next.

    tops [heads, groups]: what sums of groups are relative to; single keys' are their scores.
    """
    ended = max(0, t + 1 - node.axis.block + node.axis.stride) // node.axis.stride
    groups = -(-ended // node.grouped)
    sums, total = sums[..., :groups], np.zeros(t // node.size + 2)
    if tops is not None:
        weight = np.exp(tops[:, None, :groups] - lse[:, None, None])
        for ahead, of_groups in enumerate((sums * weight).sum(0)):
            total[ahead : ahead + groups] += of_groups[: len(total) - ahead]
        return total[:-1]
    p = np.exp(sums - lse[:, None, None]).sum(0)
    step = node.size // node.axis.stride
    for j, (i, weight) in product(range(len(total)), enumerate(node.weights, node.first)):
        if 0 <= j * step + i < ended:
            total[j] += weight * p[0, j * step + i]
    return total[:-1]


def split_merge(run: Run) -> None:
    """out = Σ_term gate·Σ_parts exp(lse_part − lse)·part; a term that sees nothing is 0."""
    lanes = [o for o in run.kernel.operands if o.role == "parts"]
    gates, total = run.arrays.get("gates"), np.zeros(run.arrays["out"].shape)
    for term in sorted({o.source for o in lanes}):
        names = [o.name.removeprefix("parts") for o in lanes if o.source == term]
        lses = np.concatenate([run.arrays[f"lses{x}"] for x in names])
        parts = np.concatenate([run.arrays[f"parts{x}"] for x in names])
        lse = merged_lse(lses)
        weight = np.exp(lses - np.where(np.isneginf(lse), 0.0, lse))
        out = (weight[..., None] * parts).sum(0)
        total += out if gates is None else gates[..., term, None] * out
    write_once(run.arrays["out"], (slice(None),), total, f"{run.line}: store out")


def merged_lse(lses: Array) -> Array:
    """ln Σ exp over the parts, axis 0; NaN for rows of nobody."""
    return np.logaddexp.reduce(lses, axis=0)

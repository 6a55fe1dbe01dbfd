"""A (differentiated) graph, run densely: every value a float64 array [B, T, H, D], every domain a boolean one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nsagen.errors import Refused
from nsagen.interp.domains import Array, union
from nsagen.interp.importance import best_blocks, importance
from nsagen.interp.numbers import evaluate
from nsagen.ir.graph import (
    Attend,
    AttendGrad,
    Combine,
    CombineGrad,
    Graph,
    LogSumExp,
    Node,
    Pool,
    Select,
    Source,
    ended_blocks,
)

Values = dict[str, Array]


def run_graph(graph: Graph, inputs: Mapping[str, Array], scale: float | None = None) -> Values:
    """Every value of the graph, and the gradient of its value x under "grad:x", the sum of x's terms.

    inputs: by value name; without `d_out` the gradient nodes are left out. A pooled value that is given is used as it
    is; otherwise it is computed, which only the mean can be here. scale defaults to Dqk^-½.
    """
    values: Values = {name: exact(x) for name, x in inputs.items()}
    backward = "d_out" in values
    for node in graph.nodes:
        if backward or not isinstance(node, (CombineGrad, AttendGrad)):
            _run(node, values, graph.heads.qk_dim**-0.5 if scale is None else scale)
    for name, terms in graph.grads if backward else ():
        values[f"grad:{name}"] = sum((values[x] for x in terms[1:]), values[terms[0]])
    return values


def exact(x: Array) -> Array:
    """x in float64, or as it is if it holds integers."""
    x = np.asarray(x)
    return x if x.dtype.kind in "iu" else x.astype(np.float64)


def _run(node: Node, values: Values, scale: float) -> None:
    """Define what the node writes."""
    if isinstance(node, Pool):
        _pool(node, values)
    elif isinstance(node, Attend):
        values[node.out], values[node.lse] = _attend(node, values, scale)
        if node.rest:
            values[node.rest] = np.zeros_like(values[node.out])  # nothing is rounded here
    elif isinstance(node, LogSumExp):
        values[node.lse] = _log_sum_exp(node, values, scale)
    elif isinstance(node, Select):
        values[node.out] = _select(node, values, scale)
    elif isinstance(node, Combine):
        gates = values[node.gates]
        values[node.out] = np.add.reduce([gates[..., i, None] * values[x] for i, x in enumerate(node.terms)])
    elif isinstance(node, CombineGrad):
        _combine_grad(node, values)
    else:
        _attend_grad(node, values, scale)


def _pool(node: Pool, values: Values) -> None:
    if node.out in values:
        return
    if node.pool != "mean":
        raise Refused(f"%{node.out}: pool {node.pool} has parameters that the graph does not hold; give its result")
    src, axis = values[node.src], node.axis
    blocks = evaluate(axis.length(), {"T": src.shape[1]})
    means = [src[:, i * axis.stride : i * axis.stride + axis.block].mean(1) for i in range(blocks)]
    values[node.out] = np.stack(means, 1) if means else src[:, :0]


def _visible(source: Source, values: Values, tokens: int) -> Array:
    """[B, T, Hkv, keys]: what the queries may see of a source."""
    batch, keys, heads = values[source.k].shape[:3]
    seen = np.broadcast_to(union(source.pieces, tokens, keys)[None, :, None], (batch, tokens, heads, keys))
    if source.listed is None:
        return seen
    block = np.arange(keys) // source.listed.size
    return seen & (values[source.listed.blocks][..., None] == block).any(3)


def _grouped(x: Array, kv_heads: int) -> Array:
    """[B, T, Hq, …] -> [B, T, Hkv, group, …]."""
    return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])


def _scores(q: Array, source: Source, values: Values, scale: float) -> Array:
    """[B, T, Hkv, group, keys]: scale·q·k, −inf where the query does not see the key."""
    k = values[source.k]
    scores = np.einsum("bthgd,bshd->bthgs", _grouped(q, k.shape[2]), k) * scale
    return np.where(_visible(source, values, q.shape[1])[:, :, :, None], scores, -np.inf)


def _attend(node: Attend, values: Values, scale: float) -> tuple[Array, Array]:
    """One softmax over the keys of all sources."""
    q = values[node.q]
    scores = np.concatenate([_scores(q, s, values, scale) for s in node.sources], -1)
    v = np.concatenate([values[s.v] for s in node.sources], 1)
    p, lse = _softmax(scores)
    out = np.einsum("bthgs,bshd->bthgd", p, v)
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def _softmax(scores: Array) -> tuple[Array, Array]:
    """Probabilities over the last axis, and lse [..., 1]; 0 and −inf where every score is −inf, or there is none."""
    top = np.max(scores, -1, keepdims=True, initial=-np.inf)
    p = np.exp(scores - np.where(np.isneginf(top), 0.0, top))
    total = p.sum(-1, keepdims=True)
    lse = np.full(total.shape, -np.inf)
    np.log(total, out=lse, where=total > 0)
    lse += np.where(np.isneginf(top), 0.0, top)
    return p / np.where(total > 0, total, 1.0), lse


def _log_sum_exp(node: LogSumExp, values: Values, scale: float) -> Array:
    q = values[node.q]
    keys = Source(node.k, node.k, node.axis, (ended_blocks(node.axis),))
    return _softmax(_scores(q, keys, values, scale))[1].reshape(q.shape[:3])


def _combine_grad(node: CombineGrad, values: Values) -> None:
    """Row sums of d_out·term, which are the gates' gradients too; shift = lse − ln g."""
    whole = [values[x] + (values[r] if r else 0.0) for x, r in zip(node.terms, node.rests, strict=True)]
    sums = [(values[node.d_out] * term).sum(-1) for term in whole]
    values.update(zip(node.deltas, sums, strict=True))
    if node.gates and node.d_gates:
        values[node.d_gates] = np.stack(sums, -1)
        for i, (shift, lse) in enumerate(zip(node.shifts, node.lses, strict=True)):
            values[shift] = shifted(values[lse], values[node.gates][..., i])


def shifted(lse: Array, gate: Array) -> Array:
    """lse − ln g: with it in place of lse, p is g·p; +inf where the gate is shut or the row sees nothing: p is 0."""
    some = (gate > 0) & ~np.isneginf(lse)
    return np.where(some, lse - np.log(np.where(some, gate, 1.0)), np.inf)


def _attend_grad(node: AttendGrad, values: Values, scale: float) -> None:
    """p from lse, so that each source stands alone: dv = pᵀd_out, ds = p·(d_out·vᵀ − delta)."""
    dq = np.zeros_like(values[node.q])
    for source, dk, dv in zip(node.sources, node.dk, node.dv, strict=True):
        part, values[dk], values[dv] = _source_grad(node, source, values, scale)
        dq += part
    values[node.dq] = dq


def _source_grad(node: AttendGrad, source: Source, values: Values, scale: float) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) from the keys of one source."""
    q, k, v = values[node.q], values[source.k], values[source.v]
    heads = k.shape[2]
    rows, above = _grouped(q, heads), _grouped(values[node.d_out], heads)
    p = _probabilities(_scores(q, source, values, scale), _grouped(values[node.lse], heads))
    dp = np.einsum("bthgd,bshd->bthgs", above, v)
    ds = p * (dp - _grouped(values[node.delta], heads)[..., None]) * scale
    dq = np.einsum("bthgs,bshd->bthgd", ds, k).reshape(q.shape)
    return dq, np.einsum("bthgs,bthgd->bshd", ds, rows), np.einsum("bthgs,bthgd->bshd", p, above)


def _probabilities(scores: Array, lse: Array) -> Array:
    """exp(scores − lse); 0 for a row that sees nothing."""
    return np.exp(scores - np.where(np.isneginf(lse), np.inf, lse)[..., None])


def _select(node: Select, values: Values, scale: float) -> Array:
    """int32 [B, T, Hkv, count]: ascending, −1 last."""
    p = _group_probabilities(node, values, scale)
    batch, tokens, heads = p.shape[:3]
    chosen = np.full((batch, tokens, heads, node.count), -1, np.int32)
    for b, t, h in np.ndindex(batch, tokens, heads):
        best = best_blocks(node, t, importance(node, p[b, t, h], t // node.size + 1))
        chosen[b, t, h, : len(best)] = best
    return chosen


def _group_probabilities(node: Select, values: Values, scale: float) -> Array:
    """[B, T, Hkv, keys]: exp(scale·q·k − lse), summed over the heads of the group; 0 for blocks that have not ended."""
    q, k = values[node.q], values[node.k]
    scores = np.einsum("bthgd,bshd->bthgs", _grouped(q, k.shape[2]), k) * scale
    ends = np.arange(k.shape[1]) * node.axis.stride + node.axis.block - 1
    ended = ends[None, :] <= np.arange(q.shape[1])[:, None]
    p = _probabilities(scores, _grouped(values[node.lse], k.shape[2])).sum(3)
    return np.where(ended[None, :, None], p, 0.0)

"""The tests' oracle: the paper's equations in dense float64 torch, plain and slow. It shares no code with nsagen.

Shapes: q [B, T, Hq, Dqk]; k, v [B, N, Hkv, D], query head h reads KV head h // (Hq / Hkv). Inputs of any dtype are
upcast to float64; all is differentiable, lse is not. Packed: B = 1 and cu_seqlens [S + 1], list or tensor; sequences
may be empty, rows past the last one belong to none. Positions and block indices count from the start of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

Ends = Sequence[int] | Tensor | None
Phi = Callable[[Tensor], Tensor]  # the tokens of a block [l, Hkv, D] -> [Hkv, D]
Domain = tuple[Tensor, Tensor, Tensor]  # k [B, N, Hkv, Dqk], v [B, N, Hkv, Dv], visible [B, T, Hkv, N]
INF = float("inf")


# Attention over a mask


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """visible bool [T, N] or [B, T, Hkv, N] -> out [B, T, Hq, Dv], lse [B, T, Hq]; a row that sees nothing: 0, −inf."""
    group = q.shape[2] // k.shape[2]
    visible = _by_head(visible, q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [], []
    for b, h in product(range(q.shape[0]), range(q.shape[2])):
        out, lse = _one_head(q[b, :, h], k[b, :, h // group], v[b, :, h // group], visible[b, :, h // group], scale)
        outs.append(out)
        lses.append(lse)
    return _stack_heads(outs, q), _stack_heads(lses, q)


def _one_head(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [T, Dqk], k [N, Dqk], v [N, Dv], visible [T, N] -> out [T, Dv], lse [T]."""
    sees, seen = visible.any(1)[:, None], visible.any(0)[:, None]
    # Rows without a partner may hold anything, NaN too: 0 · NaN must not reach the others.
    q, k, v = (torch.where(used, x.double(), 0.0) for used, x in ((sees, q), (seen, k), (seen, v)))
    scores = (scale * (q @ k.T)).masked_fill(~visible, -INF)
    top = _row_maximum(scores)
    p = (scores - top).exp()
    total = p.sum(1, keepdim=True)
    lse = torch.where(sees, top + total.detach().log(), -INF)
    return p @ v / torch.where(sees, total, 1.0), lse[:, 0]


def _row_maximum(scores: Tensor) -> Tensor:
    """[T, 1], a constant that only keeps exp in range; 0 for a row that sees nothing."""
    none = scores.new_full((scores.shape[0], 1), -INF)  # there may be no key at all
    top = torch.cat([scores.detach(), none], 1).amax(1, keepdim=True)
    return torch.where(top == -INF, 0.0, top)


def _by_head(visible: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """[T, N] or [B, T, Hkv, N] -> [B, T, Hkv, N] on q's device."""
    visible = visible.to(q.device)
    if visible.ndim == 2:
        visible = visible[None, :, None, :]
    return visible.expand(q.shape[0], q.shape[1], k.shape[2], k.shape[1])


def _stack_heads(rows: list[Tensor], q: Tensor) -> Tensor:
    """B·Hq tensors [T, …] -> [B, T, Hq, …]."""
    return torch.stack(rows).unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


# Sequences, blocks and who sees what


def _sequences(length: int, cu_seqlens: Ends) -> list[tuple[int, int]]:
    """(first row, end) of each sequence; one sequence if not packed."""
    if cu_seqlens is None:
        return [(0, length)]
    ends = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    return list(pairwise(ends))


def _tokens(length: int, cu_seqlens: Ends) -> tuple[Tensor, Tensor]:
    """Of every row its sequence, −1 for none, and its position there; [T] both."""
    sequence, position = torch.full((length,), -1), torch.zeros(length, dtype=torch.int64)
    for s, (start, end) in enumerate(_sequences(length, cu_seqlens)):
        sequence[start:end] = s
        position[start:end] = torch.arange(end - start)
    return sequence, position


def block_count(length: int, block: int, stride: int) -> int:
    """Whole blocks of l tokens, one every d, in a sequence of `length`."""
    return max(0, (length - block) // stride + 1)


def _block_rows(length: int, block: int, stride: int, cu_seqlens: Ends) -> tuple[Tensor, Tensor]:
    """Of every row of compressed keys its sequence, −1 for an unused row, and its block's index there; [N] both."""
    rows = block_count(length, block, stride) if cu_seqlens is None else length // stride
    sequence, index = torch.full((rows,), -1), torch.zeros(rows, dtype=torch.int64)
    for s, (start, end) in enumerate(_sequences(length, cu_seqlens)):
        for i in range(block_count(end - start, block, stride)):
            assert sequence[start // stride + i] == -1, "two blocks in one row"
            sequence[start // stride + i] = s
            index[start // stride + i] = i
    return sequence, index


def _same(of_queries: Tensor, of_keys: Tensor) -> Tensor:
    """[T], [N] -> [T, N]: both are of one sequence."""
    return (of_queries[:, None] == of_keys[None, :]) & (of_queries[:, None] >= 0)


def see_window(length: int, size: int, sinks: int = 0, cu_seqlens: Ends = None) -> Tensor:
    """[T, T]: the last `size` tokens, the query's own among them, and the first `sinks` ones, none after the query."""
    sequence, position = _tokens(length, cu_seqlens)
    t, s = position[:, None], position[None, :]
    return _same(sequence, sequence) & (s <= t) & ((s > t - size) | (s < sinks))


def see_compressed(length: int, block: int, stride: int, cu_seqlens: Ends = None) -> Tensor:
    """[T, N]: block i, tokens i·d … i·d + l − 1, is visible iff it ends at the query or before."""
    (sequence, position), (of_rows, index) = _tokens(length, cu_seqlens), _block_rows(length, block, stride, cu_seqlens)
    return _same(sequence, of_rows) & (index[None, :] * stride + block - 1 <= position[:, None])


def see_selected(blocks: Tensor, block: int, cu_seqlens: Ends = None) -> Tensor:
    """blocks int [B, T, Hkv, n], −1 for none -> [B, T, Hkv, T]: tokens of the listed blocks, none after the query."""
    blocks = blocks.cpu()
    length = blocks.shape[1]
    of_key = _tokens(length, cu_seqlens)[1] // block
    listed = torch.zeros(*blocks.shape[:3], length, dtype=torch.bool)
    for one in blocks.unbind(-1):
        listed |= one[..., None] == of_key
    return listed & see_window(length, length, 0, cu_seqlens)[:, None, :]


# The branches


def dense_causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, cu_seqlens: Ends = None
) -> tuple[Tensor, Tensor]:
    """Every token up to the query -> out, lse."""
    length = q.shape[1]
    return softmax_attention(q, k, v, see_window(length, length, 0, cu_seqlens), scale)


def window(
    q: Tensor, k: Tensor, v: Tensor, size: int, sinks: int = 0, scale: float | None = None, cu_seqlens: Ends = None
) -> tuple[Tensor, Tensor]:
    """The window branch with its sinks, one softmax -> out, lse."""
    return softmax_attention(q, k, v, see_window(q.shape[1], size, sinks, cu_seqlens), scale)


def compressed(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    block: int,
    stride: int,
    scale: float | None = None,
    cu_seqlens: Ends = None,
) -> tuple[Tensor, Tensor]:
    """The compressed branch (Eq. 7); k_cmp, v_cmp as `compress` lays them out -> out, lse."""
    return softmax_attention(q, k_cmp, v_cmp, see_compressed(q.shape[1], block, stride, cu_seqlens), scale)


def selected(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int, scale: float | None = None, cu_seqlens: Ends = None
) -> tuple[Tensor, Tensor]:
    """The selected branch over blocks int [B, T, Hkv, n] of l' tokens, −1 for none -> out, lse."""
    return softmax_attention(q, k, v, see_selected(blocks, block, cu_seqlens), scale)


def gated_sum(outs: Sequence[Tensor], gates: Tensor) -> Tensor:
    """Σ_c gates[…, c]·outs[c]  (Eq. 5); outs [B, T, Hq, Dv], gates [B, T, Hq, C]."""
    assert gates.shape[-1] == len(outs)
    gates = gates.double()
    return torch.stack([gates[..., c, None] * out.double() for c, out in enumerate(outs)]).sum(0)


# φ


def pool(x: Tensor, block: int, stride: int, phi: Phi, cu_seqlens: Ends = None) -> Tensor:
    """x [B, T, Hkv, D] -> [B, N, Hkv, D]: φ of block i of sequence s at row cu[s]//d + i, zero in unused rows."""
    x = x.double()
    sequence, index = _block_rows(x.shape[1], block, stride, cu_seqlens)
    if not len(sequence):
        return x[:, :0]
    starts = [start for start, _ in _sequences(x.shape[1], cu_seqlens)]
    rows = []
    for s, i in zip(sequence.tolist(), index.tolist(), strict=True):
        first = starts[s] + i * stride
        rows.append(torch.stack([torch.zeros_like(one[0]) if s < 0 else phi(one[first : first + block]) for one in x]))
    return torch.stack(rows, 1)


def mean(tokens: Tensor) -> Tensor:
    """φ without parameters."""
    return tokens.mean(0)


def mean_pool(x: Tensor, block: int, stride: int, cu_seqlens: Ends = None) -> Tensor:
    return pool(x, block, stride, mean, cu_seqlens)


def phi_of(kind: str, parameters: Mapping[str, Tensor]) -> Phi:
    """φ from its parameters, named and shaped as a generated module's (`dict(phi.k.named_parameters())`).

    weighted: weight [Hkv, l]. linear: weight [Hkv, l·D, D]. mlp: weight_in [Hkv, l·D, W], bias_in [Hkv, W],
    weight_out [Hkv, W, D], bias_out [Hkv, D]. All but mean: positions [Hkv, l, D] if there are any.
    """
    if kind == "mean":
        return mean
    given = {name: p.double() for name, p in parameters.items()}
    affine = {"weighted": _weighted, "linear": _linear, "mlp": _mlp}[kind]
    positions = given.get("positions")
    return lambda tokens: affine(tokens if positions is None else tokens + positions.transpose(0, 1), given)


def _weighted(tokens: Tensor, given: dict[str, Tensor]) -> Tensor:
    return torch.einsum("lhd,hl->hd", tokens, given["weight"])


def _linear(tokens: Tensor, given: dict[str, Tensor]) -> Tensor:
    return torch.einsum("hx,hxe->he", tokens.transpose(0, 1).flatten(1), given["weight"])


def _mlp(tokens: Tensor, given: dict[str, Tensor]) -> Tensor:
    hidden = torch.einsum("hx,hxe->he", tokens.transpose(0, 1).flatten(1), given["weight_in"]) + given["bias_in"]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU
    return torch.einsum("hx,hxe->he", hidden, given["weight_out"]) + given["bias_out"]


def compress(
    k: Tensor,
    v: Tensor,
    block: int,
    stride: int,
    phi: tuple[Phi, Phi] = (mean, mean),
    rope: Callable[[Tensor, Tensor], Tensor] | None = None,
    cu_seqlens: Ends = None,
) -> tuple[Tensor, Tensor]:
    """k_cmp, v_cmp by φ of the keys and φ of the values; rope(k_cmp, positions [N]) turns block i's key at i·d."""
    k_cmp, v_cmp = (pool(x, block, stride, one, cu_seqlens) for x, one in zip((k, v), phi, strict=True))
    if rope is not None:
        sequence, index = (x.to(k.device) for x in _block_rows(k.shape[1], block, stride, cu_seqlens))
        k_cmp = torch.where((sequence >= 0)[:, None, None], rope(k_cmp, index * stride), 0.0)
    return k_cmp, v_cmp


# Importance and choice


def overlap_weights(block: int, stride: int, sel_block: int, n_cmp: int, n_sel: int) -> Tensor:
    """w [n_cmp, n_sel]: the tokens that compressed block i and selection block j share, over d (Eq. 9)."""
    weights = torch.zeros(n_cmp, n_sel, dtype=torch.float64)
    for i in range(n_cmp):
        tokens = range(i * stride, i * stride + block)
        for token in tokens:
            if token // sel_block < n_sel:
                weights[i, token // sel_block] += 1
    return weights / stride


def importance(
    q: Tensor,
    k_cmp: Tensor,
    block: int,
    stride: int,
    sel_block: int,
    scale: float | None = None,
    cu_seqlens: Ends = None,
) -> Tensor:
    """[B, T, Hkv, n_sel]: Σ_i w_ij·p_cmp[i], summed over the query heads of a group (Eq. 8–10)."""
    longest = max(end - start for start, end in _sequences(q.shape[1], cu_seqlens))
    index = _block_rows(q.shape[1], block, stride, cu_seqlens)[1]
    weights = overlap_weights(block, stride, sel_block, max(1, len(index)), -(-longest // sel_block))[index]
    # The scores are an attention whose values are the weights.
    weights = weights.to(q.device)[None, :, None].expand(q.shape[0], -1, k_cmp.shape[2], -1)
    scores, _ = compressed(q, k_cmp, weights, block, stride, scale, cu_seqlens)
    return scores.unflatten(2, (k_cmp.shape[2], -1)).sum(3)


def pooled_importance(
    q: Tensor, k: Tensor, sel_block: int, scale: float | None = None, cu_seqlens: Ends = None
) -> Tensor:
    """k [B, T, Hkv, Dqk] of the selected branch -> [B, T, Hkv, n_sel]: p_j, summed over the query heads of a group.

    p is the softmax over the means of the blocks that have ended; a block that has not scores 0.
    """
    # With l = d = l' a key stands for one selection block: the weights are the identity.
    means = mean_pool(k, sel_block, sel_block, cu_seqlens)
    return importance(q, means, sel_block, sel_block, sel_block, scale, cu_seqlens)


def select(
    scores: Tensor, sel_block: int, top_n: int, initial: int = 0, local: int = 0, cu_seqlens: Ends = None
) -> Tensor:
    """scores [B, T, Hkv, n_sel] -> int32 [B, T, Hkv, n]: the n best, forced ones among them, ascending, −1 last."""
    sequence, position = (x.tolist() for x in _tokens(scores.shape[1], cu_seqlens))
    chosen = torch.full((*scores.shape[:3], top_n), -1, dtype=torch.int32)
    table = scores.tolist()
    for b, t, h in product(*map(range, scores.shape[:3])):
        if sequence[t] >= 0:
            best = _best(table[b][t][h], position[t] // sel_block, top_n, initial, local)
            chosen[b, t, h, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return chosen.to(scores.device)


def _best(scores: list[float], own: int, top_n: int, initial: int, local: int) -> list[int]:
    """Candidates are blocks 0 … own, the query's block; ties go to the lower one."""
    candidates = range(own + 1)
    forced = [j for j in candidates if j < initial or j > own - local]
    others = sorted((j for j in candidates if j not in forced), key=lambda j: (-scores[j], j))
    return sorted((forced + others)[:top_n])


def choice_gap(
    blocks: Tensor,
    scores: Tensor,
    sel_block: int,
    top_n: int,
    initial: int = 0,
    local: int = 0,
    cu_seqlens: Ends = None,
) -> float:
    """How far the listed blocks' sorted scores fall short of the best ones', at most; inf if a list breaks a rule.

    The rules: as many as there can be, unique, ascending, −1 last, all forced ones, none after the query's.
    """
    best = select(scores, sel_block, top_n, initial, local, cu_seqlens).tolist()
    if list(blocks.shape) != [*scores.shape[:3], top_n]:
        return INF
    given, table, gap = blocks.tolist(), scores.tolist(), 0.0
    position = _tokens(scores.shape[1], cu_seqlens)[1].tolist()
    for b, t, h in product(*map(range, scores.shape[:3])):
        mine, wanted = (x[b][t][h][: top_n - best[b][t][h].count(-1)] for x in (given, best))
        own = position[t] // sel_block
        forced = {j for j in wanted if j < initial or j > own - local}
        legal = mine == sorted(set(mine)) and forced <= set(mine) <= set(range(own + 1))
        if not legal or any(j != -1 for j in given[b][t][h][len(mine) :]):
            return INF
        pairs = zip(*(sorted((table[b][t][h][j] for j in x), reverse=True) for x in (wanted, mine)), strict=True)
        gap = max([gap, *(w - m for w, m in pairs)])
    return gap


# The whole operation


def attention(
    spec: Mapping[str, Any],
    q: Tensor,
    k: Tensor | Mapping[str, Tensor],
    v: Tensor | Mapping[str, Tensor],
    gates: Tensor | None = None,
    phi: tuple[Phi, Phi] | None = None,
    *,
    blocks: Tensor | None = None,
    k_raw: Tensor | None = None,
    rope: Callable[[Tensor, Tensor], Tensor] | None = None,
    scale: float | None = None,
    cu_seqlens: Ends = None,
) -> Tensor:
    """out [B, T, Hq, Dv] of a spec with the YAML's keys; k, v a tensor, or a mapping by branch for per_branch.

    phi: for any pool but mean. blocks: used as they are, whatever `from` says. k_raw: un-rotated keys for φ alone.
    """
    parts = domains(spec, q, k, v, phi, blocks=blocks, k_raw=k_raw, rope=rope, scale=scale, cu_seqlens=cu_seqlens)
    combine = spec.get("combine", "single" if len(parts) == 1 else "gated_sum")
    assert (gates is not None) == (combine == "gated_sum")
    if combine == "one_softmax":
        return softmax_attention(q, *union(parts, spec.get("kv", "shared") == "shared"), scale)[0]
    outs = [softmax_attention(q, *part, scale)[0] for part in parts.values()]
    if gates is not None:
        return gated_sum(outs, gates)
    (out,) = outs
    return out


def domains(
    spec: Mapping[str, Any],
    q: Tensor,
    k: Tensor | Mapping[str, Tensor],
    v: Tensor | Mapping[str, Tensor],
    phi: tuple[Phi, Phi] | None = None,
    *,
    blocks: Tensor | None = None,
    k_raw: Tensor | None = None,
    rope: Callable[[Tensor, Tensor], Tensor] | None = None,
    scale: float | None = None,
    cu_seqlens: Ends = None,
) -> dict[str, Domain]:
    """Every branch's keys, values and what is visible of them, in the spec's order."""
    branches, length = spec["branches"], q.shape[1]
    ks, vs = ({name: x[name] if isinstance(x, Mapping) else x for name in branches} for x in (k, v))
    found: dict[str, Domain] = {}
    if "compressed" in branches:
        o = branches["compressed"]
        assert phi is not None or o["pool"] == "mean"
        raw = ks["compressed"] if k_raw is None else k_raw
        pair = compress(raw, vs["compressed"], o["block"], o["stride"], phi or (mean, mean), rope, cu_seqlens)
        found["compressed"] = *pair, see_compressed(length, o["block"], o["stride"], cu_seqlens)
    if "window" in branches:
        o = branches["window"]
        found["window"] = ks["window"], vs["window"], see_window(length, o["size"], o.get("sinks", 0), cu_seqlens)
    if "selected" in branches:
        if blocks is None:
            scoring = found["compressed"][0] if _source(spec) == "compressed" else ks["selected"]
            blocks = choose(spec, q, scoring, scale, cu_seqlens)
        visible = see_selected(blocks, branches["selected"]["block"], cu_seqlens)
        found["selected"] = ks["selected"], vs["selected"], visible
    return {name: (found[name][0], found[name][1], _by_head(found[name][2], q, found[name][0])) for name in branches}


def choose(
    spec: Mapping[str, Any], q: Tensor, k: Tensor, scale: float | None = None, cu_seqlens: Ends = None
) -> Tensor:
    """The selected branch's blocks, int32 [B, T, Hkv, n]; k as `block_scores` takes it."""
    s = spec["branches"]["selected"]
    scores = block_scores(spec, q, k, scale, cu_seqlens)
    return select(scores, s["block"], s["top_n"], s.get("initial", 1), s.get("local", 2), cu_seqlens)


def block_scores(
    spec: Mapping[str, Any], q: Tensor, k: Tensor, scale: float | None = None, cu_seqlens: Ends = None
) -> Tensor:
    """[B, T, Hkv, n_sel], without a gradient; the softmax is over the scoring axis alone, whatever the combine.

    k: for `from: compressed` k_cmp [B, N, Hkv, Dqk], for `from: pooled` the selected branch's keys [B, T, Hkv, Dqk].
    """
    source, size = _source(spec), spec["branches"]["selected"]["block"]
    q, k = q.detach(), k.detach()
    if source == "pooled":
        return pooled_importance(q, k, size, scale, cu_seqlens)
    assert source == "compressed", f"from: {source} has no scores"
    c = spec["branches"]["compressed"]
    return importance(q, k, c["block"], c["stride"], size, scale, cu_seqlens)


def _source(spec: Mapping[str, Any]) -> str:
    """Where the blocks come from: compressed, pooled or caller."""
    return spec["branches"]["selected"].get("from", "compressed")


def union(parts: Mapping[str, Domain], shared: bool) -> Domain:
    """One domain of all (source, key) pairs; branches on the same tokens' keys are one source, so a key counts once."""
    sources: dict[str, Domain] = {}
    for name, (k, v, visible) in parts.items():
        source = "tokens" if shared and name != "compressed" else name
        if source in sources:
            visible = visible | sources[source][2]
        sources[source] = k.double(), v.double(), visible
    ks, vs, visibles = zip(*sources.values(), strict=True)
    return torch.cat(ks, 1), torch.cat(vs, 1), torch.cat(visibles, -1)


# The measure


def error(a: Tensor, b: Tensor, floor: float | Tensor = 0.0) -> float:
    """‖a − b‖ / max(‖b‖, 10⁻³·floor); b is right, floor the largest gradient norm of the case.

    Infinities must stand at the same places with the same sign (lse −inf), any other one and every NaN gives inf.
    """
    assert a.shape == b.shape, f"shapes {list(a.shape)} and {list(b.shape)}"
    a, b = a.detach().double().to(b.device), b.detach().double()
    finite = b.isfinite()
    if not (torch.equal(finite, a.isfinite()) and torch.equal(a[~finite], b[~finite]) and math.isfinite(floor)):
        return INF  # NaN is not equal to itself
    difference, size = (float(torch.linalg.vector_norm(x[finite])) for x in (a - b, b))
    if difference == 0:
        return 0.0
    below = max(size, 1e-3 * float(floor))
    return difference / below if 0 < below < INF else INF


def twin(x: Any) -> Any:
    """A float64 leaf with the values of x, so that its gradient is not rounded to x's dtype; mappings and None too."""
    if isinstance(x, Mapping):
        return {name: twin(one) for name, one in x.items()}
    return None if x is None else x.detach().double().requires_grad_()


def gradients(out: Tensor, leaves: Sequence[Tensor], d_out: Tensor) -> list[Tensor]:
    """Of Σ out·d_out; zeros for a leaf that out does not depend on."""
    found = torch.autograd.grad(out, leaves, d_out.to(out.dtype), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]

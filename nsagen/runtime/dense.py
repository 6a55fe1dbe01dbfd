"""Attention over all keys up to the query, for sequences that are too short for sparse kernels to pay (`dense_below`).

torch's scaled_dot_product_attention, which chooses among cuDNN, FlashAttention and its other kernels, with autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(
    q: Tensor, k: dict[str, Tensor], v: dict[str, Tensor], gates: Tensor | None, per_branch: bool, scale: float
) -> Tensor:
    """Every branch over all of its keys s <= t -> out [B, T, Hq, Dv] in q's dtype.

    q [B, T, Hq, Dqk]; k, v by branch [B, T, Hkv, D], one pair under every name if not per_branch; gates [B, T, Hq,
    branches] in k's order, or None: then one softmax over the keys of all branches, where a shared key counts once.
    """
    pairs = [(k[branch], v[branch]) for branch in (k if per_branch else list(k)[:1])]
    if gates is None:
        return _causal(q, *pairs[0], scale) if len(pairs) == 1 else _union(q, pairs, scale)
    weights = gates.float() if gates.dtype.itemsize < 4 else gates
    if not per_branch:
        return (_causal(q, *pairs[0], scale) * weights.sum(-1, keepdim=True)).to(q.dtype)
    terms = [_causal(q, *pair, scale) * weights[..., i : i + 1] for i, pair in enumerate(pairs)]
    return sum(terms[1:], terms[0]).to(q.dtype)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, T, Hq, Dv]. FlashAttention knows groups of heads where all dims are equal; other kernels get every head."""
    grouped = q.shape[3] == v.shape[3] and q.dtype in (torch.bfloat16, torch.float16)
    if not grouped:
        k, v = _every_head(k, q), _every_head(v, q)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)


def _union(q: Tensor, pairs: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """One softmax over the keys of several pairs; the mask takes T² bytes a pair."""
    ks, vs = zip(*pairs, strict=True)
    length = q.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().repeat(1, len(pairs))
    q, k, v = (x.transpose(1, 2) for x in (q, *(_every_head(torch.cat(xs, 1), q) for xs in (ks, vs))))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _every_head(x: Tensor, q: Tensor) -> Tensor:
    """[B, T, Hkv, D] -> [B, T, Hq, D]: query head h reads KV head h // group."""
    return x.repeat_interleave(q.shape[2] // x.shape[2], 2)

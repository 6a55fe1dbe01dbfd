"""Selection without kernels: importance of every block and the n best, chunked over queries, in float32 or float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_BUDGET = 1 << 26  # bytes of one chunk's probabilities


class Selection(NamedTuple):
    """l' = size, n = count, forced first and last blocks; importance of j: Σ weights[i]·p[first + j·step + i]."""

    block: int  # l, d: the compressed axis
    stride: int
    size: int
    count: int
    initial: int
    local: int
    weights: tuple[int, ...]
    first: int


@torch.no_grad()
def select(
    q: Tensor, k_cmp: Tensor, lse: Tensor, selection: Selection, scale: float, cu_seqlens: Tensor | None
) -> Tensor:
    """q [B, T, Hq, D], k_cmp [B, N, Hkv, D], lse [B, T, Hq] -> blocks int32 [B, T, Hkv, n], ascending, −1 last."""
    blocks = torch.full((*q.shape[:2], k_cmp.shape[2], selection.count), -1, dtype=torch.int32, device=q.device)
    for c in _chunks(q, k_cmp, selection, cu_seqlens):
        scores = _scores(q[:, c.rows], c, selection, scale, lse.dtype)
        shift = lse[:, c.rows].unflatten(2, (k_cmp.shape[2], -1)).unsqueeze(-1)
        p = (scores - torch.where(shift == float("-inf"), float("inf"), shift)).exp().sum(3)
        blocks[:, c.rows] = best(_importance(p, selection, -(-c.tokens // selection.size)), c.t, selection)
    return blocks


@torch.no_grad()
def log_sum_exp(q: Tensor, k_cmp: Tensor, selection: Selection, scale: float, cu_seqlens: Tensor | None) -> Tensor:
    """ln Σ_i exp(scale·q·k_i) over the ended blocks, [B, T, Hq] float32 (float64 for float64 q); −inf where none is."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full(q.shape[:3], float("-inf"), dtype=dtype, device=q.device)
    for c in _chunks(q, k_cmp, selection, cu_seqlens):
        lse[:, c.rows] = _scores(q[:, c.rows], c, selection, scale, dtype).logsumexp(-1).flatten(2)
    return lse


class _Chunk(NamedTuple):
    """Some queries of one sequence, and the sequence's keys."""

    rows: slice
    t: Tensor  # [m]
    k: Tensor  # [B, keys, Hkv, D]
    tokens: int  # of the sequence


def _chunks(q: Tensor, k_cmp: Tensor, selection: Selection, cu_seqlens: Tensor | None) -> Iterator[_Chunk]:
    ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    for start, end in pairwise(ends):
        keys = max(0, (end - start - selection.block) // selection.stride + 1)
        row = start // selection.stride
        step = max(1, _BUDGET // (8 * q.shape[0] * q.shape[2] * max(1, keys)))
        for t0 in range(start, end, step):
            t1 = min(t0 + step, end)
            t = torch.arange(t0 - start, t1 - start, device=q.device)
            yield _Chunk(slice(t0, t1), t, k_cmp[:, row : row + keys], end - start)


def _scores(q: Tensor, c: _Chunk, selection: Selection, scale: float, dtype: torch.dtype) -> Tensor:
    """scale·q·k [B, m, Hkv, group, keys]; −inf where block i has not ended."""
    heads = c.k.shape[2]
    scores = torch.einsum("bmhgd,bshd->bmhgs", q.to(dtype).unflatten(2, (heads, -1)), c.k.to(dtype)) * scale
    ends = torch.arange(c.k.shape[1], device=q.device) * selection.stride + selection.block - 1
    return scores.masked_fill((ends > c.t.unsqueeze(1))[:, None, None], float("-inf"))


def _importance(p: Tensor, selection: Selection, blocks: int) -> Tensor:
    """[B, m, Hkv, keys] -> [B, m, Hkv, blocks]."""
    step = selection.size // selection.stride
    width = blocks * step + len(selection.weights)
    padded = torch.nn.functional.pad(p, (-selection.first, max(0, width + selection.first - p.shape[-1])))
    total = torch.zeros(*p.shape[:3], blocks, dtype=p.dtype, device=p.device)
    for i, weight in enumerate(selection.weights):
        total += weight * padded[..., i : i + blocks * step : step][..., :blocks]
    return total


def best(importance: Tensor, t: Tensor, selection: Selection) -> Tensor:
    """The n best candidates of importance [B, m, Hkv, blocks] for queries at t [m]; ties go to the lower block."""
    j = torch.arange(importance.shape[-1], device=t.device)
    own = (t // selection.size).unsqueeze(1)
    forced = (j < selection.initial) | (j > own - selection.local)
    score = importance.masked_fill(forced[:, None], float("inf")).masked_fill((j > own)[:, None], -1.0)
    value, order = torch.sort(score, dim=-1, descending=True, stable=True)
    none = importance.shape[-1]
    chosen = torch.where(value < 0, none, order)[..., : selection.count].sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, selection.count - chosen.shape[-1]), value=none)
    return torch.where(chosen == none, -1, chosen).to(torch.int32)

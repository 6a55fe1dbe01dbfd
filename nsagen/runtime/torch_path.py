"""The path without kernels: CPU tensors outside the interpreter, and float64 anywhere.

Attention is computed for a chunk of queries at a time over the key ranges that the chunk may see, so memory is linear
in T. Everything is float32 inside, float64 for float64 inputs. Shapes: q [B, T, Hq, Dqk]; k, v [B, rows, Hkv, D], query
head h reads KV head h // (Hq/Hkv). Packed: B = 1 and cu_seqlens int32 [S + 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_QUERIES = 256  # a chunk; more only widens a window's key range beyond what its queries see
_BUDGET = 64 << 20  # bytes of a chunk's temporaries
_COPIES = 4  # score-sized temporaries alive at once: mask, scores, probabilities, their gradient

_Range = tuple[int, int]


@dataclass(frozen=True)
class KeySource:
    """One key axis of an attention and the domain on it.

    block, stride: 1, 1 are tokens; else key i covers tokens [i·stride, i·stride + block) of its sequence.
    mask(t [m, 1], s [1, n]) -> bool [m, n]: query t sees key s; int64, both counted within the sequence.
    ranges(t0, t1, n_keys): half-open key ranges with every key that a query of [t0, t1) may see; they may overlap.
    """

    block: int
    stride: int
    mask: Callable[[Tensor, Tensor], Tensor]
    ranges: Callable[[int, int, int], list[_Range]]
    block_size: int = 0  # of the blocks that a list names, where the source has one

    def keys(self, length: int) -> int:
        """Keys of a sequence of `length` tokens."""
        return max(0, (length - self.block) // self.stride + 1)


Lists = tuple["Tensor | None", ...]


class _Piece(NamedTuple):
    """A run of keys that one chunk of queries attends to."""

    source: int  # which of ks, vs
    rows: slice  # of ks[source]
    mask: Tensor  # bool [m, n], or [B, Hkv, 1, m, n] where the KV heads list blocks of their own


@torch.no_grad()
def attend(
    q: Tensor,
    ks: tuple[Tensor, ...],
    vs: tuple[Tensor, ...],
    sources: tuple[KeySource, ...],
    scale: float,
    cu_seqlens: Tensor | None,
    lists: Lists = (),
) -> tuple[Tensor, Tensor]:
    """One softmax over the union of the sources -> out [B, T, Hq, Dv] in q's dtype, lse [B, T, Hq].

    lists: for each source with a block_size its block list, int32 [B, T, Hkv, n], −1 for none; else None.
    lse: natural log, float32 (float64 for float64 inputs). A row that sees nothing: output 0, lse −inf.
    """
    batch, length, heads = q.shape[:3]
    out = q.new_zeros(batch, length, heads, vs[0].shape[-1])
    lse = torch.full((batch, length, heads), float("-inf"), dtype=_accumulator(q), device=q.device)
    groups = ks[0].shape[2]
    for rows, pieces in _chunks(q, sources, cu_seqlens, lists):
        q_rows = _by_group(q, rows, groups, lse.dtype)
        scores = [_scores(q_rows, _keys(ks, p, lse.dtype), p, scale) for p in pieces]
        norm = torch.stack([s.logsumexp(-1) for s in scores]).logsumexp(0)
        shift = _finite(norm).unsqueeze(-1)
        sums = [s.sub_(shift).exp_() @ _keys(vs, p, lse.dtype) for s, p in zip(scores, pieces, strict=True)]
        out[:, rows] = _by_query(torch.stack(sums).sum(0), heads).to(out.dtype)
        lse[:, rows] = _by_query(norm.unsqueeze(-1), heads).squeeze(-1)
    return out, lse


@torch.no_grad()
def attend_grad(
    q: Tensor,
    ks: tuple[Tensor, ...],
    vs: tuple[Tensor, ...],
    sources: tuple[KeySource, ...],
    lse: Tensor,
    delta: Tensor,
    d_out: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    lists: Lists = (),
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients of attend(…) given d_out -> dq, dks, dvs in the inputs' dtypes.

    lse and delta = rowsum(d_out·out) are [B, T, Hq]. With p = exp(scale·q·k − lse): dv = Σ_t p·d_out,
    ds = p·(d_out·v − delta), dq = scale·ds·k, dk = scale·ds·q. With lse − ln g in place of lse all of it is g times
    as much: the gradients of g·attend(…). A row whose lse is ±inf has none.
    Key rows that belong to no sequence get zeros.
    """
    dtype, heads, groups = _accumulator(q), q.shape[2], ks[0].shape[2]
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dks = tuple(torch.zeros(k.shape, dtype=dtype, device=k.device) for k in ks)
    dvs = tuple(torch.zeros(v.shape, dtype=dtype, device=v.device) for v in vs)
    for rows, pieces in _chunks(q, sources, cu_seqlens, lists):
        q_rows, d_rows = _by_group(q, rows, groups, dtype), _by_group(d_out, rows, groups, dtype)
        shift = _finite(_by_group(lse.unsqueeze(-1), rows, groups, dtype))
        delta_rows = _by_group(delta.unsqueeze(-1), rows, groups, dtype)
        dq_rows = torch.zeros_like(q_rows)
        for piece in pieces:
            k, v = _keys(ks, piece, dtype), _keys(vs, piece, dtype)
            p = _scores(q_rows, k, piece, scale).sub_(shift).exp_()
            ds = (d_rows @ v.mT).sub_(delta_rows).mul_(p).mul_(scale)
            _keys(dvs, piece, dtype).add_(p.mT @ d_rows)  # a view: dvs has this dtype already
            _keys(dks, piece, dtype).add_(ds.mT @ q_rows)
            dq_rows += ds @ k
        dq[:, rows] = _by_query(dq_rows, heads).to(dq.dtype)
    return (
        dq,
        tuple(d.to(k.dtype) for d, k in zip(dks, ks, strict=True)),
        tuple(d.to(v.dtype) for d, v in zip(dvs, vs, strict=True)),
    )


@torch.no_grad()
def combine(terms: tuple[Tensor, ...], gates: Tensor) -> Tensor:
    """Σ_c gates[…, c]·terms[c], summed in float32 or better; terms [B, T, Hq, Dv], gates [B, T, Hq, C]."""
    dtype = _accumulator(terms[0])
    total = torch.zeros(terms[0].shape, dtype=dtype, device=terms[0].device)
    for term, gate in zip(terms, gates.to(dtype).unbind(-1), strict=True):
        total.addcmul_(term.to(dtype), gate.unsqueeze(-1))
    return total.to(terms[0].dtype)


@torch.no_grad()
def combine_grad(
    terms: tuple[Tensor, ...], gates: Tensor | None, d_out: Tensor, lses: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
    """(deltas, shifts, d_gates) of terms [B, T, Hq, Dv] under gates [B, T, Hq, C]: with r_c = rowsum(d_out·term_c),

    deltas r_c [B, T, Hq] in lse's dtype, shifts lse_c − ln g_c (+inf where the gate is 0 or the row sees nothing), and
    d_gates r in gates' dtype. Without gates: the deltas alone.
    """
    dtype = _accumulator(terms[0])
    sums = tuple(torch.einsum("...d,...d->...", d_out.to(dtype), term.to(dtype)) for term in terms)
    if gates is None:
        return sums, (), None
    shifts = tuple(_shift(lse, gate) for lse, gate in zip(lses, gates.to(dtype).unbind(-1), strict=True))
    return sums, shifts, torch.stack(sums, -1).to(gates.dtype)


def _shift(lse: Tensor, gate: Tensor) -> Tensor:
    none = (gate <= 0) | (lse == float("-inf"))
    return torch.where(none, float("inf"), lse - gate.log())


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _finite(lse: Tensor) -> Tensor:
    """0 where a row sees nothing: its scores are −inf too, and −inf − −inf would be NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _chunks(
    q: Tensor, sources: tuple[KeySource, ...], cu_seqlens: Tensor | None, lists: Lists
) -> Iterator[tuple[slice, list[_Piece]]]:
    """Chunks of query rows, each with the pieces it may see; a chunk that sees nothing is left out."""
    per_score = q.shape[0] * q.shape[2] * q.new_empty(0, dtype=_accumulator(q)).element_size() * _COPIES
    for start, length in _sequences(q.shape[1], cu_seqlens):
        t0 = 0
        while t0 < length:
            t1, ranges = _fit(sources, t0, length, _BUDGET // per_score)
            pieces = _pieces(sources, ranges, range(t0, t1), start, lists or (None,) * len(sources), q.device)
            if pieces:
                yield slice(start + t0, start + t1), pieces
            t0 = t1


def _sequences(length: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """(first row, length) of every sequence."""
    if cu_seqlens is None:
        return [(0, length)]
    ends = cu_seqlens.tolist()
    return [(a, b - a) for a, b in pairwise(ends)]


def _fit(sources: tuple[KeySource, ...], t0: int, length: int, scores: int) -> tuple[int, list[list[_Range]]]:
    """The end t1 of a chunk of at most `scores` scores a head that starts at t0, and its key ranges by source."""
    m = min(_MOST_QUERIES, length - t0)
    while True:
        ranges = [_clip(s.ranges(t0, t0 + m, s.keys(length)), s.keys(length)) for s in sources]
        if m == 1 or m * sum(hi - lo for pairs in ranges for lo, hi in pairs) <= scores:
            return t0 + m, ranges
        m //= 2


def _clip(ranges: list[_Range], keys: int) -> list[_Range]:
    """The ranges within [0, keys), joined where the pieces of a domain meet: a chunk's sinks may touch its window."""
    joined: list[_Range] = []
    for lo, hi in sorted((max(0, lo), min(hi, keys)) for lo, hi in ranges):
        if joined and lo <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(hi, joined[-1][1]))
        elif lo < hi:
            joined.append((lo, hi))
    return joined


def _pieces(
    sources: tuple[KeySource, ...],
    ranges: list[list[_Range]],
    queries: range,
    start: int,
    lists: Lists,
    device: torch.device,
) -> list[_Piece]:
    t = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
    pieces: list[_Piece] = []
    for index, (source, pairs, blocks) in enumerate(zip(sources, ranges, lists, strict=True)):
        row = start // source.stride  # a sequence's first key: the packed layout of φ's rows
        for lo, hi in pairs:
            s = torch.arange(lo, hi, device=device).unsqueeze(0)
            mask = source.mask(t, s).expand(len(queries), hi - lo)
            if blocks is not None:
                mask = mask & _listed(
                    blocks[:, start + queries.start : start + queries.stop], s[0] // source.block_size
                )
            pieces.append(_Piece(index, slice(row + lo, row + hi), mask))
    return pieces


def _listed(blocks: Tensor, of_key: Tensor) -> Tensor:
    """Whether a query's list [B, m, Hkv, n] holds the key's block [keys] -> bool [B, Hkv, 1, m, keys]."""
    chosen = torch.zeros(*blocks.shape[:3], int(of_key.max()) + 2, dtype=torch.bool, device=blocks.device)
    last = chosen.shape[-1] - 1  # −1 and blocks past these keys fall into a column that no key reads
    chosen.scatter_(3, torch.where((blocks < 0) | (blocks > last), last, blocks).long(), True)
    return chosen[..., of_key].transpose(1, 2).unsqueeze(2)


def _scores(q_rows: Tensor, keys: Tensor, piece: _Piece, scale: float) -> Tensor:
    """scale·q·k [B, Hkv, G·m, n], −inf where masked."""
    scores = (q_rows @ keys.mT).mul_(scale)
    scores.unflatten(2, (-1, piece.mask.shape[-2])).masked_fill_(~piece.mask, float("-inf"))
    return scores


def _keys(xs: tuple[Tensor, ...], piece: _Piece, dtype: torch.dtype) -> Tensor:
    """The piece's rows of [B, rows, Hkv, D] as [B, Hkv, n, D]; a view if they have this dtype."""
    return xs[piece.source][:, piece.rows].transpose(1, 2).to(dtype)


def _by_group(x: Tensor, rows: slice, groups: int, dtype: torch.dtype) -> Tensor:
    """Rows of [B, T, Hq, D] -> [B, Hkv, G·m, D]."""
    return x[:, rows].to(dtype).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _by_query(x: Tensor, heads: int) -> Tensor:
    """[B, Hkv, G·m, D] -> [B, m, Hq, D], the inverse of `_by_group`."""
    return x.unflatten(2, (heads // x.shape[1], -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)

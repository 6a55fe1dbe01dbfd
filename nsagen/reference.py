"""Layer 5: the paper's equations in torch with autograd; what `nsagen verify` compares the generated kernels with.

A Reference runs a graph's forward nodes one by one. Attention takes a chunk of queries at a time over the keys that the
chunk can see; backward computes each chunk again and lets autograd differentiate it. Memory is linear in T.

Shapes: q [B, T, Hq, Dqk]; k, v [B, N, Hkv, D], query head h reads KV head h // (Hq / Hkv). Packed: B = 1 and cu_seqlens
int [S + 1]; rows of q past the last sequence get 0 and lse −inf. Results have the dtype asked for, gradients that of
their leaf: pass float64 leaves for float64 gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsagen.errors import InputError, Refused
from nsagen.ir.graph import Attend, Combine, Graph, KeyAxis, Pool, Select, Source, writes
from nsagen.ir.graph import phi as phi_of
from nsagen.sym import KEY, QUERY, Conjunct, Multiple, evaluate, linear_coefficient, symbols_of

_MOST_QUERIES = 512  # in a chunk; more only widens the keys of a window beyond what each query sees
_BUDGET = 1 << 25  # numbers in a chunk's scores or gathered keys; about six such tensors are alive in backward
_NEVER = float("-inf")


class Reference:
    """The graph's forward nodes as torch functions; those that a pass added for the backward are ignored."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        attends = [n for n in graph.nodes if isinstance(n, Attend)]
        self._domains = {n.branch: tuple(_domain(s) for s in n.sources) for n in attends}

    def inputs(
        self, q: Tensor, k: Tensor | Mapping[str, Tensor], v: Tensor | Mapping[str, Tensor], **others: Tensor | None
    ) -> dict[str, Tensor]:
        """The graph's inputs by name, from arguments as a generated module's `attention` takes them.

        others: gates, blocks; None is left out.
        """
        found = {"q": q} | {name: x for name, x in others.items() if x is not None}
        for name, x in (("k", k), ("v", v)):
            found |= {f"{name}_{b}": one for b, one in x.items()} if isinstance(x, Mapping) else {name: x}
        return found

    def attention(self, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
        """The graph's output [B, T, Hq, Dv]; options as in `run`."""
        return self.run(inputs, **options)[self.graph.output]

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        phi: Callable[..., tuple[Tensor, Tensor]] | None = None,
        k_raw: Tensor | None = None,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> dict[str, Tensor]:
        """Every value of the graph by name, but for the log-sum-exp of a selection, which normalises its own scores.

        Values in `inputs` are not computed, so blocks or k_cmp may be given too.

        phi(k, v, cu_seqlens=…) -> k_cmp, v_cmp: for pools other than mean, or a mean with rope; k_raw: its keys.
        """
        call = _Call(self._scale(scale), cu_seqlens, dtype)
        values = dict(inputs)
        for node in self.graph.nodes:
            if all(name in values for name in writes(node)):
                continue
            if isinstance(node, Pool):
                values |= self._pooled(node, values, phi, k_raw, call)
            elif isinstance(node, Attend):
                values |= dict(zip((node.out, node.lse), self._attended(node, values, call), strict=True))
            elif isinstance(node, Select):
                values[node.out] = self.select(values[node.q], values[node.k], **call._asdict())
            elif isinstance(node, Combine):
                values[node.out] = self.combine(tuple(values[t] for t in node.terms), values[node.gates])
        return values

    def attend(
        self,
        branch: str,
        q: Tensor,
        ks: tuple[Tensor, ...],
        vs: tuple[Tensor, ...],
        *,
        blocks: Tensor | None = None,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> tuple[Tensor, Tensor]:
        """One softmax over the branch's sources -> out [B, T, Hq, Dv], lse [B, T, Hq] (natural log, no gradient).

        ks, vs: one for each source. blocks int [B, T, Hkv, n], −1 for none: for the sources that have a list.
        A row that sees nothing: output 0, lse −inf.
        """
        domains = self._domains[branch]
        if any(d.size for d in domains) and blocks is None:
            raise InputError(f"{branch}: a source has block lists, and no blocks were given")
        walk = _Walk(domains, blocks, self._scale(scale), _sequences(q.shape[1], cu_seqlens), dtype)
        return _Attention.apply(walk, q, *ks, *vs)

    def combine(self, outs: tuple[Tensor, ...], gates: Tensor) -> Tensor:
        """Σ_c gates[…, c]·outs[c]; outs [B, T, Hq, Dv], gates [B, T, Hq, C]."""
        total = torch.zeros_like(outs[0])
        for out, gate in zip(outs, gates.to(total.dtype).unbind(-1), strict=True):
            total = total + gate.unsqueeze(-1) * out
        return total

    def pool(
        self, branch: str, x: Tensor, cu_seqlens: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """The mean of the branch's blocks: x [B, T, Hkv, D] -> [B, rows, Hkv, D].

        rows = max(0, ⌊(T − l)/d⌋ + 1); packed: ⌊T/d⌋, block i of sequence s at row ⌊cu[s]/d⌋ + i, unused rows zero.
        """
        axis = next(n.axis for n in self.graph.nodes if isinstance(n, Pool) and n.axis.name == branch)
        if cu_seqlens is None:
            return _means(x.to(dtype), axis)
        out = torch.zeros(1, x.shape[1] // axis.stride, *x.shape[2:], dtype=dtype, device=x.device)
        for start, length in _sequences(x.shape[1], cu_seqlens):
            row = start // axis.stride
            out[:, row : row + _count(axis, length)] = _means(x[:, start : start + length].to(dtype), axis)
        return out

    @torch.no_grad()
    def select(
        self,
        q: Tensor,
        k_cmp: Tensor,
        *,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """The n best blocks by importance, int32 [B, T, Hkv, n]: ascending, −1 last; ties go to the lower block."""
        node = self._select()
        chosen = torch.full((*q.shape[:2], k_cmp.shape[2], node.count), -1, dtype=torch.int32, device=q.device)
        for rows, t, scores in _importance(node, q, k_cmp, _Call(self._scale(scale), cu_seqlens, dtype)):
            chosen[:, rows] = _best(scores, t, node).to(torch.int32)
        return chosen

    @torch.no_grad()
    def choice_gap(
        self,
        blocks: Tensor,
        q: Tensor,
        k_cmp: Tensor,
        *,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> float:
        """How far the sorted scores of `blocks` fall short of the best ones', at most; inf if a list breaks a rule.

        The rules: as many as there can be, unique, ascending, −1 last, all forced ones, none after the query's.
        """
        node, gap = self._select(), 0.0
        for rows, t, scores in _importance(node, q, k_cmp, _Call(self._scale(scale), cu_seqlens, dtype)):
            gap = max(gap, _gap(blocks[:, rows].long(), _best(scores, t, node), scores, t, node))
        return gap

    def _scale(self, scale: float | None) -> float:
        return self.graph.heads.qk_dim**-0.5 if scale is None else scale

    def _select(self) -> Select:
        return next(n for n in self.graph.nodes if isinstance(n, Select))

    def _pooled(
        self, node: Pool, values: dict[str, Tensor], phi: Callable[..., tuple[Tensor, Tensor]] | None,
        k_raw: Tensor | None, call: _Call,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Both results of φ: the keys' node stands before the values' one. A pool that only scores is a plain mean."""
        if node not in phi_of(self.graph):
            return {node.out: self.pool(node.axis.name, values[node.src], call.cu_seqlens, call.dtype)}
        keys, vals = phi_of(self.graph)
        pair = values[keys.src] if k_raw is None else k_raw, values[vals.src]
        if phi is not None:
            pooled = phi(*pair, cu_seqlens=call.cu_seqlens)
        elif node.pool == "mean":
            pooled = tuple(self.pool(node.axis.name, x, call.cu_seqlens, call.dtype) for x in pair)
        else:
            raise InputError(f"pool {node.pool} needs phi, the module with its parameters")
        return dict(zip((keys.out, vals.out), pooled, strict=True))

    def _attended(self, node: Attend, values: dict[str, Tensor], call: _Call) -> tuple[Tensor, Tensor]:
        ks, vs = (
            tuple(values[name] for name in names) for names in zip(*((s.k, s.v) for s in node.sources), strict=True)
        )
        lists = [values[s.listed.blocks] for s in node.sources if s.listed]
        return self.attend(node.branch, values[node.q], ks, vs, blocks=lists[0] if lists else None, **call._asdict())


class _Call(NamedTuple):
    scale: float
    cu_seqlens: Tensor | None
    dtype: torch.dtype


# Domains


@dataclass(frozen=True)
class _Line:
    """t·(query) + s·(key) + rest: >= 0, or ≡ 0 modulo `modulus` if that is not 0."""

    t: int
    s: int
    rest: int
    modulus: int

    def holds(self, t: Tensor, s: Tensor) -> Tensor:
        value = self.t * t + self.s * s + self.rest
        return value % self.modulus == 0 if self.modulus else value >= 0

    def clip(self, keys: tuple[int, int], first: int, last: int) -> tuple[int, int]:
        """The keys of [lo, hi) that some query of first … last may see."""
        lo, hi = keys
        most = max(self.t * first, self.t * last) + self.rest  # s·key + most >= 0
        if self.modulus:
            return lo, hi
        if self.s > 0:
            return max(lo, -(most // self.s)), hi
        if self.s < 0:
            return lo, min(hi, most // -self.s + 1)
        return (lo, hi) if most >= 0 else (lo, lo)


@dataclass(frozen=True)
class _Domain:
    """A source's pieces on its axis; size: tokens of a listed block, 0 if the source has no list."""

    axis: KeyAxis
    pieces: tuple[tuple[_Line, ...], ...]
    size: int
    count: int

    def sees(self, t: Tensor, s: Tensor) -> Tensor:
        """Some piece holds the key; t and s broadcast."""
        seen = torch.zeros(torch.broadcast_shapes(t.shape, s.shape), dtype=torch.bool, device=s.device)
        for lines in self.pieces:
            held = torch.ones_like(seen)
            for line in lines:
                held &= line.holds(t, s)
            seen |= held
        return seen

    def runs(self, first: int, last: int, keys: int) -> list[tuple[int, int]]:
        """Disjoint [lo, hi) within [0, keys) with every key that a query of first … last sees."""
        found: list[tuple[int, int]] = []
        for lo, hi in sorted(self._run(lines, first, last, keys) for lines in self.pieces):
            lo = max(lo, found[-1][1]) if found else lo
            if lo < hi:
                found.append((lo, hi))
        return found

    @staticmethod
    def _run(lines: tuple[_Line, ...], first: int, last: int, keys: int) -> tuple[int, int]:
        run = (0, keys)
        for line in lines:
            run = line.clip(run, first, last)
        return run


def _domain(source: Source) -> _Domain:
    pieces = tuple(tuple(_line(c) for c in piece.where) for piece in source.pieces)
    listed = source.listed
    return _Domain(source.axis, pieces, listed.size if listed else 0, listed.count if listed else 0)


def _line(c: Conjunct) -> _Line:
    t, s = linear_coefficient(c.expr, QUERY), linear_coefficient(c.expr, KEY)
    if t is None or s is None or not symbols_of(c.expr) <= {QUERY.name, KEY.name}:
        raise Refused(f"{c.expr} is not linear in {QUERY} and {KEY} with constant coefficients")
    rest = evaluate(c.expr, {QUERY.name: 0, KEY.name: 0})
    return _Line(t, s, rest, c.modulus if isinstance(c, Multiple) else 0)


def _count(axis: KeyAxis, tokens: int) -> int:
    """Keys of a sequence: whole blocks only."""
    return max(0, (tokens - axis.block) // axis.stride + 1)


def _sequences(length: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """(first row, length) of every sequence."""
    if cu_seqlens is None:
        return [(0, length)]
    return [(a, b - a) for a, b in pairwise(cu_seqlens.tolist())]


def _steps(length: int, cost: Callable[[int, int], int]) -> Iterator[tuple[int, int]]:
    """Positions first … last of every chunk, so many that cost(first, last) keeps the budget."""
    first = 0
    while first < length:
        m = min(_MOST_QUERIES, length - first)
        while m > 1 and cost(first, first + m - 1) > _BUDGET:
            m //= 2
        yield first, first + m - 1
        first += m


# Attention


class _Keys(NamedTuple):
    """The keys of one source that a chunk of m queries looks at."""

    rows: Tensor  # int64 [n], or [B, m, Hkv, n] where each query and KV head looks at its own
    visible: Tensor  # bool [m, 1, n] or [B, m, Hkv, n]

    @property
    def axes(self) -> str:
        return "bnhd" if self.rows.ndim == 1 else "bmhnd"

    def index(self) -> tuple[Any, ...]:
        if self.rows.ndim == 1:
            return slice(None), self.rows
        batch, _, heads, _ = self.rows.shape
        device = self.rows.device
        b, h = torch.arange(batch, device=device), torch.arange(heads, device=device)
        return b[:, None, None, None], self.rows, h[:, None]

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add a chunk's gradient to the rows it was taken from."""
        if self.rows.ndim == 1:
            total.index_add_(1, self.rows, part)
        else:
            total.index_put_(self.index(), part, accumulate=True)


class _Chunk(NamedTuple):
    rows: slice  # of q
    keys: tuple[_Keys, ...]


@dataclass(frozen=True)
class _Walk:
    """Queries in chunks, each with its keys."""

    domains: tuple[_Domain, ...]
    blocks: Tensor | None
    scale: float
    sequences: list[tuple[int, int]]
    dtype: torch.dtype

    def chunks(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[_Chunk]:
        for start, length in self.sequences:
            for first, last in _steps(length, lambda a, b, n=length: self._cost(q, k, v, a, b, n)):
                keys = tuple(self._keys(d, start, length, first, last, q.device) for d in self.domains)
                if any(one.rows.numel() for one in keys):
                    yield _Chunk(slice(start + first, start + last + 1), keys)

    def _cost(self, q: Tensor, k: Tensor, v: Tensor, first: int, last: int, length: int) -> int:
        """Numbers in the chunk's scores, and in its keys and values where every query gathers its own."""
        batch, heads, groups, total = q.shape[0], q.shape[2], k.shape[2], 0
        for d in self.domains:
            if d.size:
                total += d.count * d.size * (heads + groups * (k.shape[3] + v.shape[3]))
            else:
                total += heads * sum(hi - lo for lo, hi in d.runs(first, last, _count(d.axis, length)))
        return batch * (last - first + 1) * total

    def _keys(self, d: _Domain, start: int, length: int, first: int, last: int, device: torch.device) -> _Keys:
        t, keys = torch.arange(first, last + 1, device=device), _count(d.axis, length)
        base = start // d.axis.stride
        if d.size and self.blocks is not None:
            listed = self.blocks[:, start + first : start + last + 1].long()
            s = (listed.unsqueeze(-1) * d.size + torch.arange(d.size, device=device)).flatten(3)
            visible = (s >= 0) & (s < keys) & d.sees(t[:, None, None], s)  # none is −1, so s < 0
            return _Keys(base + torch.where(visible, s, 0), visible)
        runs = [torch.arange(lo, hi, device=device) for lo, hi in d.runs(first, last, keys)]
        s = torch.cat([torch.arange(0, device=device), *runs])
        return _Keys(base + s, d.sees(t[:, None, None], s))

    def take(self, chunk: _Chunk, q: Tensor, *kv: Tensor) -> list[Tensor]:
        """The chunk's rows of q, ks, vs in the dtype of the computation."""
        twice = (*chunk.keys, *chunk.keys)
        taken = [q[:, chunk.rows], *(x[one.index()] for x, one in zip(kv, twice, strict=True))]
        return [x.to(self.dtype) for x in taken]

    def attend(self, chunk: _Chunk, q: Tensor, *kv: Tensor) -> tuple[Tensor, Tensor]:
        """The softmax of `take`'s rows -> out [B, m, Hq, Dv], lse [B, m, Hq]."""
        ks, vs = kv[: len(chunk.keys)], kv[len(chunk.keys) :]
        q = q.unflatten(2, (ks[0].shape[2], -1))
        parts = [_scores(q, k, one, self.scale) for k, one in zip(ks, chunk.keys, strict=True)]
        p, total, lse = _exponentials(torch.cat(parts, -1))
        shares = p.split([x.shape[-1] for x in parts], -1)
        sums = [
            torch.einsum(f"bmhgn,{one.axes}->bmhgd", x, v) for x, v, one in zip(shares, vs, chunk.keys, strict=True)
        ]
        return (torch.stack(sums).sum(0) / total).flatten(2, 3), lse.flatten(2, 3)


def _scores(q: Tensor, k: Tensor, keys: _Keys, scale: float) -> Tensor:
    """scale·q·k [B, m, Hkv, G, n], −inf where not visible."""
    scores = torch.einsum(f"bmhgd,{keys.axes}->bmhgn", q, k) * scale
    return scores.masked_fill(~keys.visible.unsqueeze(-2), _NEVER)


def _exponentials(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[…, n] -> exp(scores − c) [… , n], their sum [… , 1] and lse […]; all-masked rows: zeros, 1 and −inf, no NaN."""
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top == _NEVER, 0.0, top)
    p = (scores - top).exp()
    total = p.sum(-1, keepdim=True)
    lse = (top + total.detach().log()).squeeze(-1)
    return p, torch.where(total == 0, 1.0, total), lse


class _Attention(torch.autograd.Function):
    """walk, q, *ks, *vs -> out, lse; keeps its inputs alone and recomputes each chunk in backward."""

    @staticmethod
    def forward(ctx: Any, walk: _Walk, q: Tensor, *kv: Tensor) -> tuple[Tensor, Tensor]:
        ctx.walk = walk
        ctx.save_for_backward(q, *kv)
        out = torch.zeros(*q.shape[:3], kv[-1].shape[-1], dtype=walk.dtype, device=q.device)
        lse = torch.full(q.shape[:3], _NEVER, dtype=walk.dtype, device=q.device)
        for chunk in walk.chunks(q, kv[0], kv[-1]):
            out[:, chunk.rows], lse[:, chunk.rows] = walk.attend(chunk, *walk.take(chunk, q, *kv))
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        walk, (q, *kv) = ctx.walk, ctx.saved_tensors
        grads = [torch.zeros(x.shape, dtype=walk.dtype, device=x.device) for x in (q, *kv)]
        for chunk in walk.chunks(q, kv[0], kv[-1]):
            leaves = [x.detach().requires_grad_() for x in walk.take(chunk, q, *kv)]
            with torch.enable_grad():
                out, _lse = walk.attend(chunk, *leaves)
            parts = torch.autograd.grad(out, leaves, d_out[:, chunk.rows])
            grads[0][:, chunk.rows] = parts[0]
            for total, part, keys in zip(grads[1:], parts[1:], (*chunk.keys, *chunk.keys), strict=True):
                keys.add(total, part)
        return None, *(g.to(x.dtype) for g, x in zip(grads, (q, *kv), strict=True))


# Pooling and choice


def _means(x: Tensor, axis: KeyAxis) -> Tensor:
    """x [B, T, Hkv, D] -> [B, blocks, Hkv, D]."""
    if not _count(axis, x.shape[1]):
        return x[:, :0]
    pooled = torch.nn.functional.avg_pool1d(x.flatten(2).transpose(1, 2), axis.block, axis.stride)
    return pooled.transpose(1, 2).unflatten(2, x.shape[2:])


def _importance(node: Select, q: Tensor, k: Tensor, call: _Call) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows of q, their positions t [m], importance [B, m, Hkv, blocks]) for every chunk of queries."""
    if node.axis.block > node.size:
        raise Refused(f"l' {node.size} is less than l {node.axis.block}: a block would reach past two selection blocks")
    per_key = q.shape[0] * q.shape[2]
    for start, length in _sequences(q.shape[1], call.cu_seqlens):
        row, blocks = start // node.axis.stride, -(-length // node.size)
        for first, last in _steps(length, lambda a, b: per_key * (b - a + 1) * _count(node.axis, b + 1)):
            t = torch.arange(first, last + 1, device=q.device)
            rows = slice(start + first, start + last + 1)
            keys = k[:, row : row + _count(node.axis, last + 1)].to(call.dtype)
            p = _probabilities(node, q[:, rows].to(call.dtype), keys, t, call.scale)
            yield rows, t, _by_block(node, p, blocks)


def _probabilities(node: Select, q: Tensor, k: Tensor, t: Tensor, scale: float) -> Tensor:
    """p_cmp summed over a group's heads: q [B, m, Hq, D], k [B, n, Hkv, D] -> [B, m, Hkv, n]  (Eq. 8, 10)."""
    n = k.shape[1]
    if not n:
        return q.new_zeros(*q.shape[:2], k.shape[2], 0)
    i = torch.arange(n, device=q.device)
    ended = i * node.axis.stride + node.axis.block - 1 <= t[:, None, None]
    p, total, _ = _exponentials(_scores(q.unflatten(2, (k.shape[2], -1)), k, _Keys(i, ended), scale))
    return (p / total).sum(3)


def _by_block(node: Select, p: Tensor, blocks: int) -> Tensor:
    """Σ_i w_ij·p[…, i] -> [B, m, Hkv, blocks], w_ij the tokens that blocks i and j share, over d  (Eq. 9).

    l <= l', so block i shares tokens with the selection block of its first token and with that of its last.
    """
    start = torch.arange(p.shape[-1], device=p.device) * node.axis.stride
    end = start + node.axis.block
    one, other = start // node.size, (end - 1) // node.size
    total = p.new_zeros(*p.shape[:3], blocks)
    for j, counted in ((one, torch.ones_like(one)), (other, other != one)):
        shared = torch.minimum(end, (j + 1) * node.size) - torch.maximum(start, j * node.size)
        total.index_add_(3, j, p * (shared * counted / node.axis.stride))
    return total


def _best(scores: Tensor, t: Tensor, node: Select) -> Tensor:
    """scores [B, m, Hkv, blocks] of queries at t [m] -> int64 [B, m, Hkv, n]; ascending, −1 last."""
    j, own, none = torch.arange(scores.shape[-1], device=t.device), (t // node.size)[:, None, None], scores.shape[-1]
    ranked = scores.masked_fill(_forced(j, own, node), float("inf")).masked_fill(j > own, -1.0)
    value, order = ranked.sort(dim=-1, descending=True, stable=True)  # stable: the lower block of a tie first
    chosen = torch.where(value < 0, none, order)[..., : node.count].sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, node.count - chosen.shape[-1]), value=none)
    return torch.where(chosen == none, -1, chosen)


def _forced(j: Tensor, own: Tensor, node: Select) -> Tensor:
    """Blocks that are always taken: the first ones, and the query's own with those before it."""
    return (j >= 0) & (j <= own) & ((j < node.initial) | (j > own - node.local))


def _gap(given: Tensor, best: Tensor, scores: Tensor, t: Tensor, node: Select) -> float:
    """How far scores[given] fall short of scores[best], rank by rank; inf if some list of `given` is not legal."""
    own = (t // node.size)[:, None, None]
    order = torch.where(given < 0, scores.shape[-1], given)
    legal = [
        given.shape == best.shape,
        ((order[..., 1:] > order[..., :-1]) | (given[..., 1:] == -1)).all(),
        ((given >= -1) & (given <= own)).all(),
        torch.equal((given >= 0).sum(-1), (best >= 0).sum(-1)),
        torch.equal(_forced(given, own, node).sum(-1), _forced(best, own, node).sum(-1)),
    ]
    if not all(legal):
        return float("inf")
    mine, wanted = (_sorted_scores(x, scores) for x in (given, best))
    return float((wanted - mine).max())


def _sorted_scores(blocks: Tensor, scores: Tensor) -> Tensor:
    """Scores of the listed blocks, the highest first; 0 for none."""
    return (scores.gather(3, blocks.clamp(min=0)) * (blocks >= 0)).sort(-1, descending=True).values

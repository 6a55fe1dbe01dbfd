"""The keys and values of sequences that grow: tokens and pooled blocks, in rows of their own or in pages.

Nothing here waits for the device: lengths stay on it, positions are computed there, and rows of nobody (unused ones of
a packed batch, tokens past the end) go to a spare row. Shapes: B sequences; tokens [B, max_len, Hkv, D] or
[num_pages, page_size, Hkv, D]; pooled keys the same with max_len/d and page_size/d rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsagen.errors import InputError
from nsagen.runtime import compress
from nsagen.runtime.checks import DTYPES, Layout


class Past(NamedTuple):
    """What kernels over a cache need of it."""

    lengths: Tensor  # int32 [B]: tokens before the queries
    table: Tensor | None  # int32 [B, pages]
    page: int  # tokens of a page, 1 without pages
    capacity: int  # max_len
    arrivals: Tensor  # int32, zeros between launches: a count for every query tile of a step and KV head

    @property
    def table_stride(self) -> int:
        return 0 if self.table is None else self.table.stride(0)


class Staged(NamedTuple):
    """Where a step puts the blocks that φ is to pool; None where a kernel takes their mean. N ≥ those that can end."""

    k: Tensor | None  # [N, l, Hkv, Dqk]
    v: Tensor | None
    rows: Tensor | None  # int32 [N]: the block's row in the flat storage, the spare one if it has not ended
    starts: Tensor | None  # int32 [N]: its first token
    spare: int = 0


class _New(NamedTuple):
    """The tokens of a call: row i of the packed [B·m] or [T] belongs to `sequence[i]`, at `position[i]` of it."""

    sequence: Tensor  # int64; B for a row of nobody
    position: Tensor
    counts: Tensor  # int64 [B]


_Pooling = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]  # rows of tokens, cu_seqlens, first tokens


class KVCache:
    """Keys and values of `batch` sequences of up to `max_len` tokens; empty at first.

    lengths: int32 [B], on the device. Pages: `table` int32 [B, ⌈max_len/page_size⌉] names the page of every page_size
    tokens; it starts with pages in order, and may be written between calls.
    """

    def __init__(
        self,
        layout: Layout,
        batch: int,
        max_len: int,
        device: torch.device | str,
        dtype: torch.dtype,
        page_size: int | None,
        num_pages: int | None,
        most_new: int,
        mean_of: str = "",
    ) -> None:
        self.layout, self.batch, self.max_len, self.page_size, self.mean_of = layout, batch, max_len, page_size, mean_of
        self._check(num_pages, dtype)
        pages = -(-max_len // page_size) if page_size else 0
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.table: Tensor | None = None
        rows = batch * self.max_len
        if page_size:
            count = batch * pages if num_pages is None else num_pages
            order = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
            self.table, rows = torch.where(order < count, order, -1), count * page_size
        self._before = torch.zeros_like(self.lengths)  # the lengths before the call that runs
        self._arrivals = torch.zeros(batch * layout.kv_heads * most_new, dtype=torch.int32, device=device)
        self._most = 0  # no sequence is longer, as far as the host knows
        self._stores: dict[str, Tensor] = {}
        for name, dim, stride in self._wanted():
            self._stores[name] = torch.zeros(rows // stride + 1, layout.kv_heads, dim, device=device, dtype=dtype)
        self.dtype, self.device = dtype, self.lengths.device

    def __getitem__(self, name: str) -> Tensor:
        """The storage of a value, without its spare row: [B, rows, Hkv, D], or [pages, rows of a page, Hkv, D]."""
        store = self._stores[name][:-1]
        per = (self.page_size or self.max_len) // self._stride(name)
        return store.view(-1, per, *store.shape[1:])

    @property
    def past(self) -> Past:
        """Before the last call; the next one overwrites it."""
        return Past(self._before, self.table, self.page_size or 1, self.max_len, self._arrivals)

    def truncate(self, lengths: Tensor) -> None:
        """Forget all tokens from `lengths` (int32 [B], on the device) on; longer ones stay as they are."""
        if lengths.shape != self.lengths.shape or lengths.device != self.device:
            self._fail("lengths must be [B] on the cache's device", f"{list(lengths.shape)} on {lengths.device}",
                       "pass one number a sequence")  # fmt: skip
        self.lengths.copy_(torch.minimum(self.lengths, lengths.to(torch.int32).clamp(min=0)))

    @torch.no_grad()
    def append(self, k: dict[str, Tensor], v: dict[str, Tensor], phi: Any, cu_seqlens: Tensor | None) -> Past:
        """Add tokens k, v (by branch, [B, m, Hkv, D] or packed [1, T, Hkv, D]) and the blocks that end with them.

        Returns the cache as it was before, for the queries that come with the tokens.
        """
        first = next(iter(k.values()))
        self._room(first, cu_seqlens)
        self._before.copy_(self.lengths)
        past, new = self.past, self._new(first, cu_seqlens)
        at = self._rows(new.sequence, new.position, 1)
        for side, given in (("k", k), ("v", v)):
            for name, x in self._named(side, given).items():
                self._stores[name].index_copy_(0, at, x.flatten(0, 1).to(self.dtype))
        self.lengths.copy_((past.lengths + new.counts).clamp(max=self.max_len))
        if self.layout.pooled:
            _, block, stride = self.layout.pooled
            key, value = (self._token_store(side, "compressed") for side in ("k", "v"))

            def compressed(rows: Tensor, cu: Tensor, start: Tensor) -> dict[str, Tensor]:
                pair = (self._stores[name][rows].unsqueeze(0) for name in (key, value))
                return dict(zip(("k_cmp", "v_cmp"), phi(*pair, cu_seqlens=cu, start=start), strict=True))

            self._pool(block, stride, past, new, compressed)
        if self.mean_of:
            assert self.layout.scored is not None
            size = self.layout.scored[0]

            def means(rows: Tensor, cu: Tensor, start: Tensor) -> dict[str, Tensor]:
                return {"k_pooled": compress.block_means(self._stores[self.mean_of][rows].unsqueeze(0), size, cu)}

            self._pool(size, size, past, new, means)
        return past

    def step(self, first: Tensor) -> Past:
        """Room for a decoding step whose first keys are `first`; its kernels fill `past`, the rows, and the lengths."""
        self._room(first, None)
        return self.past

    def staged(self, phi: Any, queries: int) -> Staged:
        """Room for the blocks that a step of `queries` tokens can end, for `close`; none where φ is a plain mean."""
        assert self.layout.pooled is not None
        _, block, stride = self.layout.pooled
        if phi.plain_mean:
            return Staged(None, None, None, None)
        count = self.batch * -(-(1 << (queries - 1).bit_length()) // stride)

        def new(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((count, *shape), dtype=dtype, device=self.device)

        k, v = (new(block, self.layout.kv_heads, d, dtype=self.dtype) for d in (self.layout.qk_dim, self.layout.v_dim))
        return Staged(k, v, new(dtype=torch.int32), new(dtype=torch.int32), self._spare(stride))

    def close(self, phi: Any, staged: Staged) -> None:
        """Pool the staged blocks; those that have not ended go to the spare row."""
        if staged.k is None:
            return
        assert staged.rows is not None and staged.starts is not None
        rows = staged.rows.long()
        for name, x in zip(("k_cmp", "v_cmp"), phi.of_blocks(staged.k, staged.v, staged.starts.long()), strict=True):
            self._stores[name].index_copy_(0, rows, x.to(self.dtype))

    def _pool(self, block: int, stride: int, past: Past, new: _New, pool: _Pooling) -> None:
        """Pool the blocks that end within the new tokens: of each sequence, from its first block that had not ended on.

        Those stretches are packed, at most block − 1 old tokens a sequence and the new ones.
        """
        done = ((past.lengths.long() - block) // stride + 1).clamp(min=0)
        start = done * stride
        counts = past.lengths.long() + new.counts - start
        cu = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        row = torch.arange(new.sequence.shape[0] + self.batch * (block - 1), device=self.device)
        sequence = torch.searchsorted(cu[1:], row, right=True)
        known = sequence.clamp(max=self.batch - 1)
        tokens = self._rows(sequence, start[known] + row - cu[known], 1)
        out = torch.arange(row.shape[0] // stride, device=self.device)
        owner = (torch.searchsorted(cu[:-1] // stride, out, right=True) - 1).clamp(min=0)
        number = out - cu[owner] // stride
        ended = number * stride + block <= counts[owner]
        at = self._rows(torch.where(ended, owner, self.batch), done[owner] + number, stride)
        for name, x in pool(tokens, cu.to(torch.int32), start).items():
            self._stores[name].index_copy_(0, at, x[0].to(self.dtype))

    def _new(self, x: Tensor, cu_seqlens: Tensor | None) -> _New:
        rows = torch.arange(x.shape[0] * x.shape[1], device=self.device)
        if cu_seqlens is None:
            sequence, within = rows // x.shape[1], rows % x.shape[1]
            counts = torch.full_like(self.lengths, x.shape[1], dtype=torch.int64)
        else:
            cu = cu_seqlens.long()
            sequence = torch.searchsorted(cu[1:], rows, right=True)
            counts, within = cu[1:] - cu[:-1], rows - cu[sequence.clamp(max=self.batch - 1)]
        return _New(sequence, self.lengths.long()[sequence.clamp(max=self.batch - 1)] + within, counts)

    def _rows(self, sequence: Tensor, position: Tensor, stride: int) -> Tensor:
        """Rows of a storage with one row every `stride` tokens; the spare row for what has no place."""
        spare = self._spare(stride)
        known = sequence.clamp(max=self.batch - 1)
        inside = (sequence < self.batch) & (position >= 0) & (position < self.max_len // stride)
        if self.table is None:
            return torch.where(inside, known * (self.max_len // stride) + position, spare)
        assert self.page_size is not None
        per = self.page_size // stride
        number = torch.where(inside, position // per, 0)
        page = self.table[known, number].long()
        return torch.where(inside & (page >= 0), page * per + position % per, spare)

    def _spare(self, stride: int) -> int:
        return next(len(x) - 1 for name, x in self._stores.items() if self._stride(name) == stride)

    def _stride(self, name: str) -> int:
        if name in ("k_cmp", "v_cmp"):
            assert self.layout.pooled is not None
            return self.layout.pooled[2]
        if name == "k_pooled":
            assert self.layout.scored is not None
            return self.layout.scored[1]
        return 1

    def _token_store(self, side: str, branch: str) -> str:
        return f"{side}_{branch}" if self.layout.per_branch else side

    def _named(self, side: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self._token_store(side, branch): x for branch, x in given.items()}

    def _wanted(self) -> list[tuple[str, int, int]]:
        """(name, head dim, tokens a row) of every storage."""
        of = self.layout
        branches = of.branches if of.per_branch else of.branches[:1]
        dims = (("k", of.qk_dim), ("v", of.v_dim))
        found = [(self._token_store(side, branch), dim, 1) for branch in branches for side, dim in dims]
        if of.pooled:
            found += [(f"{side}_cmp", dim, of.pooled[2]) for side, dim in dims]
        if self.mean_of:
            assert of.scored is not None
            found.append(("k_pooled", of.qk_dim, of.scored[1]))
        return found

    def _check(self, num_pages: int | None, dtype: torch.dtype) -> None:
        unit = math.lcm(*(self.layout.scored or (1,)), *(self.layout.pooled[2:] if self.layout.pooled else (1,)))
        if self.batch < 1 or self.max_len < 1:
            self._fail("batch and max_len must be 1 or more", f"{self.batch} and {self.max_len}", "make room for one")
        if dtype not in DTYPES:
            self._fail("dtype must be float32, bfloat16, float16 or float64", dtype, "take that of q")
        if self.page_size is None:
            if num_pages is not None:
                self._fail("num_pages goes with a page_size", num_pages, "pass page_size too")
            self.max_len = -(-self.max_len // unit) * unit
        elif self.page_size < 1 or self.page_size % unit:
            self._fail(f"page_size must be a multiple of {unit}", self.page_size, "whole blocks lie in a page")
        else:
            self.max_len = -(-self.max_len // self.page_size) * self.page_size

    def _room(self, x: Tensor, cu_seqlens: Tensor | None) -> None:
        """The host counts what it appended at most; only where that passes max_len does it ask the device."""
        count = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if count != self.batch or (cu_seqlens is None and x.shape[0] != self.batch):
            given = x.shape[0] if cu_seqlens is None else count
            self._fail(f"a call has the cache's {self.batch} sequences", given, "packed, one may have no tokens")
        if x.device != self.device or x.dtype != self.dtype:
            self._fail(f"k must be {self.dtype} on {self.device}, as the cache is", f"{x.dtype} on {x.device}",
                       "make the cache for the model")  # fmt: skip
        self._most += x.shape[1]
        capturing = self.lengths.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._most <= self.max_len or capturing:
            return
        counts = x.shape[1] if cu_seqlens is None else cu_seqlens[1:] - cu_seqlens[:-1]
        longest = int((self.lengths + counts).max())
        if longest > self.max_len:
            self._most = self.max_len
            self._fail(
                f"the cache holds {self.max_len} tokens a sequence", longest, "truncate it, or make a longer one"
            )
        self._most = longest

    def _fail(self, rule: str, got: object, way_out: str) -> None:
        raise InputError(f"{self.layout.name}.KVCache: {rule}, got {got}: {way_out}")


def by_sequence(
    forward: Callable[..., Tensor], q: Tensor, stores: tuple[tuple[Tensor, int], ...], more: tuple[Tensor, ...],
    past: Past, cu_seqlens: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """The path without kernels: a sequence's keys in a row, its queries behind rows of nothing for what came before.

    forward(q, *keys, *more, cu_seqlens, scale) -> out; stores: (storage, tokens a row); more: gates, lists. Waits for
    the lengths.
    """
    out = torch.zeros(*q.shape[:3], stores[1][0].shape[-1], dtype=q.dtype, device=q.device)
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    for s, before in enumerate(past.lengths.tolist()):
        rows = (s, slice(None)) if ends is None else (0, slice(ends[s], ends[s + 1]))
        here = q[rows].unsqueeze(0)
        total = before + here.shape[1]
        if not here.shape[1]:
            continue
        keys = [_contiguous(x, s, total, stride, past) for x, stride in stores]
        behind = [torch.nn.functional.pad(x[rows].unsqueeze(0), (0, 0, 0, 0, before, 0)) for x in (q, *more)]
        out[rows] = forward(behind[0], *keys, *behind[1:], None, scale)[0, before:]
    return out


def _contiguous(store: Tensor, sequence: int, tokens: int, stride: int, past: Past) -> Tensor:
    """[1, rows, Hkv, D]: a sequence's first rows; of a pooled store all of the blocks that could have ended."""
    if past.table is None:
        return store[sequence : sequence + 1, : tokens // stride if stride > 1 else tokens]
    flat = store.flatten(0, 1)
    per = past.page // stride
    row = torch.arange(tokens // stride if stride > 1 else tokens, device=store.device)
    return flat[past.table[sequence, row // per].long() * per + row % per].unsqueeze(0)

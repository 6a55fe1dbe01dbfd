"""The keys and values of sequences that grow: tokens and pooled blocks, in rows of their own, in pages, or in rings.

A step never waits for the device: lengths stay on it, positions are computed there, and rows of nobody (unused ones of
a packed batch, tokens past the end) go to a spare row. Shapes: B sequences; tokens [B, max_len, Hkv, D] or
[num_pages, page_size, Hkv, D]; pooled keys the same with max_len/d and page_size/d rows. Tokens of which later queries
see only the last (a window's, and those that only φ reads) lie in rings [B, rows, Hkv, D], with pages or without.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsagen.runtime import cache_shape, compress, launch, pooling
from nsagen.runtime.cache_shape import CachedValue
from nsagen.runtime.checks import Layout
from nsagen.runtime.recent import New, Recent
from nsagen.runtime.rings import Ring, TakenBack
from nsagen.runtime.stores import Flat, Kept, Past, Store

ROW_NUMBERS = 1 << 31  # of a storage: in 32 bits


class Staged(NamedTuple):
    """Where a step puts the blocks that φ is to pool; None where a kernel takes their mean. N ≥ those that can end."""

    k: Tensor | None  # [N, l, Hkv, Dqk]
    v: Tensor | None
    rows: Tensor | None  # int64 [N]: the block's row in the flat storage, the spare one if it has not ended
    starts: Tensor | None  # int64 [N]: its first token
    spare: int = 0


class Appended(NamedTuple):
    """The cache as it was before a call, and what the call's queries see, by name."""

    past: Past
    seen: dict[str, Store | Recent]

    def part(self, first: int, end: int) -> tuple[Past, dict[str, Kept]]:
        """Of sequences [first, end); of packed ones only all."""
        return self.past.part(first, end), {name: x.part(first, end, self.past) for name, x in self.seen.items()}


class KVCache:
    """Keys and values of `batch` sequences of up to `max_len` tokens; empty at first.

    lengths: int32 [B], on the device. Pages: `table` int32 [B, ⌈max_len/page_size⌉] names the page of every page_size
    tokens; it starts with pages in order, and may be written between calls. Where it names no page (−1, or one that is
    not there), keys and values are zeros, and what is appended is dropped.
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
        kv_dtype: torch.dtype | None = None,
        mean_of: str = "",
    ) -> None:
        self.layout, self.batch, self.page_size, self.mean_of = layout, batch, page_size, mean_of
        self.max_len = cache_shape.whole_length(layout, batch, max_len, page_size, num_pages)
        cache_shape.check_dtypes(layout, dtype, kv_dtype, torch.device(device))
        self.kv_dtype = dtype if kv_dtype is None else kv_dtype
        per_sequence = -(-self.max_len // page_size) if page_size else 0
        self._pages = (batch * per_sequence if num_pages is None else num_pages) if page_size else 0
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.table: Tensor | None = None
        if page_size:
            order = torch.arange(batch * per_sequence, dtype=torch.int32, device=device).view(batch, per_sequence)
            self.table = torch.where(order < self._pages, order, -1)
        self._before = torch.zeros_like(self.lengths)  # the lengths before the call that runs
        # Of a step that pools in the launch that scores (mlp_step.py): the parts of a block that are there.
        self.arrived = torch.zeros((batch, layout.kv_heads), dtype=torch.int32, device=device)
        self._most = 0  # no sequence is longer, as far as the host knows
        self.dtype, self.device = dtype, self.lengths.device
        self._stores = {value.name: self._store(value) for value in cache_shape.values(layout, mean_of)}
        rings = [s.ring for s in self._stores.values() if s.ring is not None]
        self._taken_back = TakenBack(rings, self.lengths) if rings else None

    def __getitem__(self, name: str) -> Tensor:
        """The storage of a value, in `kv_dtype`: [B, rows, Hkv, D], or [pages, rows of a page, Hkv, D]."""
        return self.rows(name).data

    def rows(self, name: str) -> Kept:
        """The same with scales [B, rows, Hkv], or [pages, rows of a page, Hkv], that it is to be multiplied by."""
        return self._stores[name].view

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(s.nbytes for s in self._stores.values())

    @property
    def past(self) -> Past:
        """Before the last call; the next one overwrites it."""
        lost = self._taken_back and self._taken_back.lost
        return Past(self._before, self.table, self.page_size or 1, self._pages, self.max_len, lost)

    def truncate(self, lengths: Tensor) -> None:
        """Forget all tokens from `lengths` (int32 [B], on the device) on; longer ones stay as they are.

        Without rings any number, and nothing waits. A ring has room to take back 8 tokens from the longest that the
        sequence has been, or all of them (to 0: a new sequence). More raises InputError, for which this waits for the
        device; within a CUDA graph's capture it cannot, and such a sequence gives NaN until it is taken back to 0.
        """
        if lengths.shape != self.lengths.shape or lengths.device != self.device:
            self._fail("lengths must be [B] on the cache's device", f"{list(lengths.shape)} on {lengths.device}",
                       "pass one number a sequence")  # fmt: skip
        after = torch.minimum(self.lengths, lengths.to(torch.int32).clamp(min=0))
        if self._taken_back is not None and self._taken_back.unwrapped < self.max_len:
            if not self._capturing():
                self._refuse_loss(self._taken_back, after)
            self._taken_back.cut(self.lengths, after)
        self.lengths.copy_(after)

    @torch.no_grad()
    def append(self, k: dict[str, Tensor], v: dict[str, Tensor], phi: Any, cu_seqlens: Tensor | None) -> Appended:
        """Add tokens k, v (by branch, [B, m, Hkv, D] or packed [1, T, Hkv, D]) and the blocks that end with them.

        Returns what the queries that come with the tokens see.
        """
        first = next(iter(k.values()))
        self._room(first, cu_seqlens)
        self._before.copy_(self.lengths)
        past, new = self.past, self._new(first, cu_seqlens)
        seen: dict[str, Store | Recent] = dict(self._stores)
        for side, given in (("k", k), ("v", v)):
            named = {cache_shape.token_value(self.layout, side, branch): x for branch, x in given.items()}
            for name, x in named.items():
                seen[name] = self._add(self._stores[name], past, new, self._sound(side, x.flatten(0, 1), new))
        self.lengths.copy_((past.lengths + new.counts).clamp(max=self.max_len))
        self._pool(phi, past, new, seen)
        return Appended(past, seen)

    def step(self, first: Tensor) -> Past:
        """Room for a decoding step whose first keys are `first`; its kernels fill `past`, the rows, and the lengths."""
        self._room(first, None)
        return self.past

    def staged(self, phi: Any, queries: int, joins: bool = False) -> Staged:
        """Room for the blocks that a step of `queries` tokens can end, for `close`; none where φ is a plain mean.

        joins: they are pooled in the launch that scores, and need none.
        """
        assert self.layout.pooled is not None
        _, block, stride = self.layout.pooled
        if joins or phi.plain_mean:
            return Staged(None, None, None, None)
        count = self.batch * -(-launch.power_of_two(queries, 1) // stride)

        def new(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((count, *shape), dtype=dtype, device=self.device)

        k, v = (new(block, self.layout.kv_heads, d, dtype=self.dtype) for d in (self.layout.qk_dim, self.layout.v_dim))
        return Staged(k, v, new(dtype=torch.int64), new(dtype=torch.int64), self._stores["k_cmp"].spare)

    def close(self, phi: Any, staged: Staged) -> None:
        """Pool the staged blocks; those that have not ended go to the spare row."""
        if staged.k is None:
            return
        k, v, rows, starts, _ = staged
        assert v is not None and rows is not None and starts is not None
        phi.write_blocks(k, v, starts, rows, *(self._stores[name].flat for name in ("k_cmp", "v_cmp")))

    def _add(self, store: Store, past: Past, new: New, x: Tensor) -> Store | Recent:
        """Write new tokens [T, Hkv, D]; returns where their queries see them, and the old ones."""
        if store.ring is None:
            store.flat.write(store.rows(new.sequence, new.position, past), x)
            return store
        seen = Recent(store, past, new, x)
        known = new.sequence.clamp(max=self.batch - 1)
        total = (past.lengths + new.counts)[known]
        stays = torch.where(store.ring.stays(new.position, total), new.sequence, self.batch)
        store.flat.write(store.rows(stays, new.position, past), x)
        return seen

    def _sound(self, side: str, x: Tensor, new: New) -> Tensor:
        """Values of sequences that lost what they need are NaN, so that no output is silently wrong."""
        if side == "k" or self._taken_back is None:
            return x
        lost = self._taken_back.lost[new.sequence.clamp(max=self.batch - 1)]
        return torch.where(lost.view(-1, 1, 1), float("nan"), x)

    def _pool(self, phi: Any, past: Past, new: New, seen: dict[str, Store | Recent]) -> None:
        """The blocks that end within the new tokens: φ's, and the plain means that score blocks."""
        if self.layout.pooled:
            pair = tuple(seen[cache_shape.token_value(self.layout, side, "compressed")] for side in ("k", "v"))
            into = tuple(self._stores[name] for name in ("k_cmp", "v_cmp"))
            pooling.pool(self.layout.pooled[1], pair, into, past, new, phi)
        if self.mean_of:
            assert self.layout.scored is not None
            size = self.layout.scored[0]

            def means(k: Tensor, cu_seqlens: Tensor, start: Tensor) -> tuple[Tensor]:
                return (compress.block_means(k, size, cu_seqlens),)

            pooling.pool(size, (seen[self.mean_of],), (self._stores["k_pooled"],), past, new, means)

    def _new(self, x: Tensor, cu_seqlens: Tensor | None) -> New:
        rows = torch.arange(x.shape[0] * x.shape[1], device=self.device)
        if cu_seqlens is None:
            sequence, within = rows // x.shape[1], rows % x.shape[1]
            counts = torch.full_like(self.lengths, x.shape[1], dtype=torch.int64)
            starts = torch.arange(self.batch, device=self.device) * x.shape[1]
        else:
            cu = cu_seqlens.long()
            sequence = torch.searchsorted(cu[1:], rows, right=True)
            counts, starts, within = cu[1:] - cu[:-1], cu[:-1], rows - cu[sequence.clamp(max=self.batch - 1)]
        return New(sequence, self.lengths.long()[sequence.clamp(max=self.batch - 1)] + within, counts, starts)

    def _store(self, value: CachedValue) -> Store:
        ring = self.layout.rings.get(value.name)
        ring = ring and Ring(*ring).within(self.max_len)
        per = (self.page_size or self.max_len) // value.stride
        count = self.batch if self.page_size is None else self._pages
        if ring is not None:
            per, count = min(ring.rows, self.max_len), self.batch
        shape = (count * per + 1, self.layout.kv_heads, value.dim)
        if shape[0] >= ROW_NUMBERS:
            self._fail(f"a storage has less than {ROW_NUMBERS} rows", shape[0], "make caches of fewer sequences")
        return Store(Flat(shape, self.dtype, self.device, self.kv_dtype != self.dtype), per, value.stride, ring)

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
        if self._most <= self.max_len or self._capturing():
            return
        counts = x.shape[1] if cu_seqlens is None else cu_seqlens[1:] - cu_seqlens[:-1]
        longest = int((self.lengths + counts).max())
        if longest > self.max_len:
            self._most = self.max_len
            self._fail(
                f"the cache holds {self.max_len} tokens a sequence", longest, "truncate it, or make a longer one"
            )
        self._most = longest

    def _refuse_loss(self, of: TakenBack, after: Tensor) -> None:
        losing = of.loses(self.lengths, after)
        if bool(losing.any()):
            self._fail(f"a ring takes back {of.slack} tokens from the longest that a sequence has been, or all",
                       f"lengths {after[losing].tolist()} for sequences {losing.nonzero().flatten().tolist()}",
                       "truncate to 0 and prefill again")  # fmt: skip

    def _capturing(self) -> bool:
        return self.lengths.is_cuda and torch.cuda.is_current_stream_capturing()

    def _fail(self, rule: str, got: object, way_out: str) -> None:
        cache_shape.fail(self.layout, rule, got, way_out)

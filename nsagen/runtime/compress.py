"""φ: the keys and values of a block of l tokens, one block every d tokens, pooled to one key and one value.

All pools share the blocks: tokens are laid out in chunks of d, and block i is chunks i … i + l/d − 1 (d divides l), so
a token is read once however much blocks overlap. Packed sequences need not start on a multiple of d; their chunks are
gathered, and everything after that is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsagen.errors import InputError
from nsagen.runtime import launch, mean_pool, mlp_pool, mlp_step
from nsagen.runtime.stores import Flat

Rope = Callable[[Tensor, Tensor], Tensor]


class _Rows(NamedTuple):
    """Which block stands in which row of the result."""

    size: int
    positions: Tensor  # int64 [size]: i·d of the row's block i, within its sequence; 0 in an unused row
    tokens: Tensor | None = None  # packed: int64 [size + l/d − 1, d], the tokens of chunk i
    used: Tensor | None = None  # packed: bool [size, 1, 1], the row holds a block

    def cleared(self, x: Tensor) -> Tensor:
        """x [B, size, Hkv, D] with zeros in the unused rows."""
        return x if self.used is None else torch.where(self.used, x, 0)


class Shape(NamedTuple):
    """What a pool works on: l, d, KV heads, head dim."""

    block: int
    stride: int
    heads: int
    dim: int

    @property
    def overlap(self) -> int:
        """l/d: the chunks of a block, and the blocks that a token is in."""
        return self.block // self.stride


class Compressor(nn.Module):
    """φ with a pool for keys and one for values; a subclass names the kind of pool.

    block, stride: l, d. positions: learned in-block positions, which the mean has none of.
    rope(x [B, rows, Hkv, Dqk], positions int64 [rows]) -> x rotates the compressed keys at i·d.
    """

    pool: type[Pool]

    def __init__(
        self,
        *,
        block: int,
        stride: int,
        kv_heads: int,
        k_dim: int,
        v_dim: int,
        positions: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rope: Rope | None = None,
    ) -> None:
        super().__init__()
        if block % stride:
            raise InputError(f"φ: d must divide l, got block={block}, stride={stride}: change one of them")
        self.block, self.stride, self.overlap, self.rope = block, stride, block // stride, rope
        self.k = self.pool(Shape(block, stride, kv_heads, k_dim), positions, device, dtype)
        self.v = self.pool(Shape(block, stride, kv_heads, v_dim), positions, device, dtype)

    def forward(
        self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """k [B, T, Hkv, Dqk], v [B, T, Hkv, Dv] -> k_cmp, v_cmp [B, rows, Hkv, D] in k's and v's dtype.

        rows = max(0, ⌊(T − l)/d⌋ + 1); packed: ⌊T/d⌋, block i of sequence s at row ⌊cu[s]/d⌋ + i, unused rows zero.
        start: int64 [S], the token that packed sequence s begins with, where it is the end of a longer one.
        """
        self._check(k, v, cu_seqlens)
        rows = self._rows(k, cu_seqlens, start)
        k_cmp, v_cmp = self._pooled(self.k, k, rows), self._pooled(self.v, v, rows)
        if self.rope is not None:
            k_cmp = self.rope(k_cmp, rows.positions).to(k.dtype)
        return rows.cleared(k_cmp), rows.cleared(v_cmp)

    def of_blocks(self, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """k [N, l, Hkv, Dqk], v [N, l, Hkv, Dv]: a block a row, from token starts (int64 [N]) on -> two [N, Hkv, D]."""
        self._check(k, v, None)
        k_cmp, v_cmp = self._of_blocks(k, v)
        return k_cmp if self.rope is None else self.rope(k_cmp.unsqueeze(0), starts)[0].to(k.dtype), v_cmp

    def write_blocks(self, k: Tensor, v: Tensor, starts: Tensor, rows: Tensor, k_cmp: Flat, v_cmp: Flat) -> None:
        """What of_blocks gives, to rows (int64 [N]) of k_cmp and v_cmp; their last one is for what nobody wants."""
        for into, x in zip((k_cmp, v_cmp), self.of_blocks(k, v, starts), strict=True):
            into.write(rows, x)

    def _of_blocks(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.k.of_blocks(k).to(k.dtype), self.v.of_blocks(v).to(v.dtype)

    @property
    def plain_mean(self) -> bool:
        """Whether φ is the mean and nothing else, which a kernel may take in its place."""
        own = type(self)
        untouched = own.forward is MeanCompressor.forward and own.of_blocks is Compressor.of_blocks
        return isinstance(self, MeanCompressor) and untouched and own.pool is MeanPool and self.rope is None

    def closing(self, k: Tensor, v: Tensor, arrived: Tensor) -> mlp_step.Closing | None:
        """What the launch of a step needs that pools, where it scores, the blocks that end with the step's tokens.

        k, v: those tokens, [B, m, Hkv, D]; arrived: the cache's. None where no launch does: write_blocks is for that.
        """
        return mlp_step.Closing() if self.plain_mean else None

    def _pooled(self, pool: Pool, x: Tensor, rows: _Rows) -> Tensor:
        return pool(self._chunks(x, rows), rows.size).to(x.dtype)

    def _rows(self, k: Tensor, cu_seqlens: Tensor | None, start: Tensor | None = None) -> _Rows:
        if cu_seqlens is not None:
            return self._packed_rows(k, cu_seqlens, start)
        count = max(0, (k.shape[1] - self.block) // self.stride + 1)
        return _Rows(count, torch.arange(count, device=k.device) * self.stride)

    def _packed_rows(self, k: Tensor, cu_seqlens: Tensor, begin: Tensor | None) -> _Rows:
        """Rows of packed sequences, from values that stay on the device.

        With T_s = cu[s+1] − cu[s], ⌊cu[s]/d⌋ + ⌊T_s/d⌋ ≤ ⌊cu[s+1]/d⌋. So the ⌊T_s/d⌋ chunks of sequence s, put at
        rows from ⌊cu[s]/d⌋ on, end before the first row of sequence s + 1, and so do its fewer blocks: a row belongs to
        one sequence at most, and that is the last s with ⌊cu[s]/d⌋ ≤ row. (Sequences before it with the same first
        row have no room for a chunk.) The same bound with cu[S] ≤ T keeps all rows below ⌊T/d⌋.
        """
        count = k.shape[1] // self.stride
        cu = cu_seqlens.long()
        row = torch.arange(count, device=k.device)
        first_rows = cu[:-1] // self.stride
        sequence = (torch.searchsorted(first_rows, row, right=True) - 1).clamp_(min=0)
        start, length = cu[sequence], (cu[1:] - cu[:-1])[sequence]
        first = (row - first_rows[sequence]) * self.stride  # the row's first token within its sequence
        # Rows without a chunk read token 0, not what follows the last sequence: a NaN there would reach φ's gradients.
        inside = (first >= 0) & (first + self.stride <= length)
        tokens = (start + first).unsqueeze(1) + torch.arange(self.stride, device=k.device)
        used = inside & (first + self.block <= length)
        tokens = torch.where(inside.unsqueeze(1), tokens, 0)
        # Unused rows at the end reach past the last chunk.
        tokens = nn.functional.pad(tokens, (0, 0, 0, self.overlap - 1))
        positions = first if begin is None else first + begin[sequence]
        return _Rows(count, torch.where(used, positions, 0), tokens, used.view(-1, 1, 1))

    def _chunks(self, x: Tensor, rows: _Rows) -> Tensor:
        """[B, T, Hkv, D] -> [B, C, d, Hkv, D]; C ≥ rows.size + l/d − 1 where there is a row."""
        if rows.tokens is not None:
            return x.index_select(1, rows.tokens.flatten()).unflatten(1, rows.tokens.shape)
        chunks = x.shape[1] // self.stride
        return x[:, : chunks * self.stride].unflatten(1, (chunks, self.stride))

    def _check(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
        for name, x, shape in (("k", k, self.k.shape), ("v", v, self.v.shape)):
            if x.ndim != 4 or tuple(x.shape[2:]) != (shape.heads, shape.dim):
                raise InputError(
                    f"φ: {name} must be [B, T, {shape.heads}, {shape.dim}], got {list(x.shape)}: "
                    "pass the KV heads and dims of the spec"
                )
        if k.shape[:2] != v.shape[:2]:
            raise InputError(f"φ: k and v must have equal B and T, got {list(k.shape[:2])} and {list(v.shape[:2])}")
        if cu_seqlens is not None and k.shape[0] != 1:
            raise InputError(f"φ: with cu_seqlens B must be 1, got {k.shape[0]}: pack the sequences along T")


class Pool(nn.Module):
    """φ of one part, keys or values: chunks -> blocks -> one row each.

    A subclass defines `pool`, or `forward` where blocks need not be laid out, which takes l/d times the tokens' memory.
    Positions are added to every token of a block. All pools are affine in the tokens at first, so the positions'
    contribution is the same for every block: it is computed once, and a block plus its positions never exists.
    """

    has_positions = True

    def __init__(
        self, shape: Shape, positions: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.shape = shape
        self._options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.positions: nn.Parameter | None = None
        if positions and self.has_positions:
            self.positions = self.parameter(0.02, shape.heads, shape.block, shape.dim)

    def parameter(self, bound: float, *size: int) -> nn.Parameter:
        """Uniform in [−bound, bound]."""
        return nn.Parameter(torch.empty(size, **self._options).uniform_(-bound, bound))

    def extra_repr(self) -> str:
        return f"l={self.shape.block}, d={self.shape.stride}, heads={self.shape.heads}, dim={self.shape.dim}"

    def forward(self, chunks: Tensor, count: int) -> Tensor:
        """[B, C, d, Hkv, D] -> [B, count, Hkv, D], float32 or better or the chunks' dtype."""
        by_head = chunks.transpose(2, 3)
        return self.pool(torch.cat([by_head[:, j : j + count] for j in range(self.shape.overlap)], 3))

    def of_blocks(self, x: Tensor) -> Tensor:
        """[N, l, Hkv, D], a block a row -> [N, Hkv, D]."""
        return self(x.unflatten(1, (self.shape.overlap, self.shape.stride)), 1)[:, 0]

    def pool(self, blocks: Tensor) -> Tensor:
        """[B, n, Hkv, l, D] -> [B, n, Hkv, D]."""
        raise NotImplementedError(f"{type(self).__name__} must define pool or forward")


class MeanPool(Pool):
    """The mean of a block's tokens; no parameters."""

    has_positions = False

    def forward(self, chunks: Tensor, count: int) -> Tensor:
        sums = chunks.sum(2, dtype=_accumulator(chunks.dtype))
        return _slide([sums] * self.shape.overlap, count) / self.shape.block


class WeightedPool(Pool):
    """A weighted sum of a block's tokens, weights [Hkv, l] learned from 1/l on."""

    def __init__(self, shape: Shape, *options: Any) -> None:
        super().__init__(shape, *options)
        self.weight = nn.Parameter(torch.full((shape.heads, shape.block), 1 / shape.block, **self._options))

    def forward(self, chunks: Tensor, count: int) -> Tensor:
        dtype = _accumulator(torch.promote_types(chunks.dtype, self.weight.dtype))
        weight = self.weight.to(dtype)
        by_chunk = weight.unflatten(1, (self.shape.overlap, self.shape.stride))
        sums = torch.einsum("bcdhe,hjd->bcjhe", chunks.to(dtype), by_chunk)
        pooled = _slide(list(sums.unbind(2)), count)
        if self.positions is None:
            return pooled
        return pooled + torch.einsum("hle,hl->he", self.positions.to(dtype), weight)


class LinearPool(Pool):
    """A linear map of a block's l·D numbers to D, weight [Hkv, l·D, D]."""

    def __init__(self, shape: Shape, *options: Any) -> None:
        super().__init__(shape, *options)
        fan_in = shape.block * shape.dim
        self.weight = self.parameter(fan_in**-0.5, shape.heads, fan_in, shape.dim)

    def pool(self, blocks: Tensor) -> Tensor:
        return _affine(blocks, self.weight, self.positions)


class MLPPool(Pool):
    """Linear(l·D → 2D), GELU, Linear(2D → D), with biases."""

    def __init__(self, shape: Shape, *options: Any) -> None:
        super().__init__(shape, *options)
        heads, fan_in, width = shape.heads, shape.block * shape.dim, 2 * shape.dim
        self.weight_in = self.parameter(fan_in**-0.5, heads, fan_in, width)
        self.bias_in = self.parameter(fan_in**-0.5, heads, width)
        self.weight_out = self.parameter(width**-0.5, heads, width, shape.dim)
        self.bias_out = self.parameter(width**-0.5, heads, shape.dim)

    @property
    def weights(self) -> mlp_pool.Weights:
        return mlp_pool.Weights(self.positions, self.weight_in, self.bias_in, self.weight_out, self.bias_out)

    @property
    def plain(self) -> bool:
        """Whether nothing of it is a subclass's, so that kernels may take its place."""
        own = type(self)
        return own.forward is Pool.forward and own.of_blocks is Pool.of_blocks and own.pool is MLPPool.pool

    def pool(self, blocks: Tensor) -> Tensor:
        hidden = nn.functional.gelu(_affine(blocks, self.weight_in, self.positions) + self.bias_in)
        return torch.einsum("bnhx,hxe->bnhe", hidden, self.weight_out.to(hidden.dtype)) + self.bias_out


class MeanCompressor(Compressor):
    """φ = mean; on a GPU through kernels of its own, which differentiate once."""

    pool = MeanPool

    def forward(
        self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not (launch.use_kernels(k) and launch.use_kernels(v)):
            return super().forward(k, v, cu_seqlens, start)
        self._check(k, v, cu_seqlens)
        k_cmp, v_cmp = mean_pool.pooled_pair(k, v, cu_seqlens, self.block, self.stride)
        if self.rope is None:
            return k_cmp, v_cmp
        rows = self._rows(k, cu_seqlens, start)
        return rows.cleared(self.rope(k_cmp, rows.positions).to(k.dtype)), v_cmp


class WeightedCompressor(Compressor):
    pool = WeightedPool


class LinearCompressor(Compressor):
    pool = LinearPool


class MLPCompressor(Compressor):
    """φ = MLP; the few blocks of a decoding step go through kernels of their own."""

    pool = MLPPool

    def write_blocks(self, k: Tensor, v: Tensor, starts: Tensor, rows: Tensor, k_cmp: Flat, v_cmp: Flat) -> None:
        self._check(k, v, None)
        plain = self._plain_blocks and not k_cmp.quantised
        if not (plain and self._pool_by_kernels(k, v, rows, k_cmp.all.data, v_cmp.all.data)):
            super().write_blocks(k, v, starts, rows, k_cmp, v_cmp)

    def closing(self, k: Tensor, v: Tensor, arrived: Tensor) -> mlp_step.Closing | None:
        self._check(k, v, None)
        weights = self._plain_weights
        if weights is None or not self._plain_blocks or type(self).write_blocks is not MLPCompressor.write_blocks:
            return None
        takes = all(mlp_pool.takes(x, of) for x, of in zip((k, v), weights, strict=True))
        return mlp_step.closing(*weights, arrived) if takes else None

    def _of_blocks(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k_cmp, v_cmp = (x.new_empty((len(x), *x.shape[2:])) for x in (k, v))
        return (k_cmp, v_cmp) if self._pool_by_kernels(k, v, None, k_cmp, v_cmp) else super()._of_blocks(k, v)

    @property
    def _plain_blocks(self) -> bool:
        """Whether what φ makes of a block is its pools' alone: no subclass's, and not turned by its position."""
        return type(self).of_blocks is Compressor.of_blocks and self.rope is None

    @property
    def _plain_weights(self) -> tuple[mlp_pool.Weights, mlp_pool.Weights] | None:
        """Of keys and values; None where a pool is a subclass's."""
        of_k, of_v = self.k, self.v
        if not (isinstance(of_k, MLPPool) and isinstance(of_v, MLPPool) and of_k.plain and of_v.plain):
            return None
        return of_k.weights, of_v.weights

    def _pool_by_kernels(self, k: Tensor, v: Tensor, rows: Tensor | None, k_cmp: Tensor, v_cmp: Tensor) -> bool:
        """Whether they did; else nothing happened."""
        weights = self._plain_weights
        if weights is None:
            return False
        sides = mlp_pool.Side(k, weights[0], k_cmp), mlp_pool.Side(v, weights[1], v_cmp)
        if not mlp_pool.fits(*sides):
            return False
        mlp_pool.pool(*sides, rows, len(k_cmp) - 1)
        return True


@torch.no_grad()
def block_means(k: Tensor, size: int, cu_seqlens: Tensor | None) -> Tensor:
    """The mean of every whole block of `size` tokens, [B, rows, Hkv, D] in k's dtype, rows as φ's with l = d = size."""
    if launch.use_kernels(k):
        return mean_pool.pooled(k, cu_seqlens, size, size)
    heads, dim = k.shape[2:]
    phi = MeanCompressor(block=size, stride=size, kv_heads=heads, k_dim=dim, v_dim=dim)
    rows = phi._rows(k, cu_seqlens)
    return rows.cleared(phi._pooled(phi.k, k, rows))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slide(sums: list[Tensor], count: int) -> Tensor:
    """Σ_j sums[j][:, i + j] for every block i < count.

    sums[j] [B, C, Hkv, D]: what each chunk adds to the block that it is the j-th chunk of.
    """
    total = sums[0][:, :count]
    for j, share in enumerate(sums[1:], 1):
        total = total + share[:, j : j + count]
    return total


def _affine(blocks: Tensor, weight: Tensor, positions: Tensor | None) -> Tensor:
    """(blocks + positions)·weight; [B, n, Hkv, l, D], [Hkv, l·D, E], [Hkv, l, D] -> [B, n, Hkv, E].

    One product over all of l·D, so that 16-bit operands are summed in float32 to the end.
    """
    dtype = torch.promote_types(blocks.dtype, weight.dtype)
    weight = weight.to(dtype)
    mapped = torch.einsum("bnhx,hxe->bnhe", blocks.flatten(3).to(dtype), weight)
    if positions is None:
        return mapped
    return mapped + torch.einsum("hx,hxe->he", positions.flatten(1).to(dtype), weight)

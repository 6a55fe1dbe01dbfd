"""φ = mean on a GPU: two small kernels in place of a dozen passes over tokens and rows. As torch operators."""

# ruff: noqa: UP045 (what torch 2.6 makes schemas of)

from __future__ import annotations

from typing import Any, Optional

import triton
import triton.language as tl
from torch import Tensor

from nsagen.runtime import device, launch, launcher
from nsagen.runtime.ops import differentiate, register

NAMESPACE = "nsagen_mean_pool_2"  # copies of other versions in the process share what they register


def pooled(x: Tensor, cu_seqlens: Tensor | None, block: int, stride: int) -> Tensor:
    """The means of blocks of `block` tokens, one every `stride`: x [B, T, Hkv, D] -> [B, rows, Hkv, D] in x's dtype.

    Sums in float32. rows = max(0, ⌊(T − block)/stride⌋ + 1); packed: ⌊T/stride⌋, block i of sequence s at row
    ⌊cu[s]/stride⌋ + i, unused rows zero. Without a gradient.
    """
    return _one(_last_contiguous(x), cu_seqlens, block, stride)


def pooled_pair(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, block: int, stride: int) -> tuple[Tensor, Tensor]:
    """`pooled` of k and v in one operator, which has a gradient: half of what torch does beside the kernels."""
    return _pair(_last_contiguous(k), _last_contiguous(v), cu_seqlens, block, stride)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor, cu_seqlens: Tensor | None, block: int, stride: int) -> int:
    return x.shape[1] // stride if cu_seqlens is not None else max(0, (x.shape[1] - block) // stride + 1)


def _mean(x: Tensor, cu_seqlens: Optional[Tensor], block: int, stride: int) -> Tensor:
    batch, length, heads, dim = x.shape
    rows = _rows(x, cu_seqlens, block, stride)
    out = launch.empty(x, (batch, rows, heads, dim), None)
    if rows and batch:
        launcher.start(
            mean_of_blocks, (batch * rows * heads,),
            x, out, cu_seqlens, length, rows, launch.sequences(cu_seqlens), *launch.strides(x),
            heads, block, stride, dim, launch.power_of_two(dim), min(64, launch.power_of_two(block)), num_warps=1,
        )  # fmt: skip
    return out


def _mean_fake(x: Tensor, cu_seqlens: Optional[Tensor], block: int, stride: int) -> Tensor:
    return x.new_empty((x.shape[0], _rows(x, cu_seqlens, block, stride), *x.shape[2:]))


def _means(k: Tensor, v: Tensor, cu_seqlens: Optional[Tensor], block: int, stride: int) -> tuple[Tensor, Tensor]:
    return _mean(k, cu_seqlens, block, stride), _mean(v, cu_seqlens, block, stride)


def _means_fake(k: Tensor, v: Tensor, cu_seqlens: Optional[Tensor], block: int, stride: int) -> tuple[Tensor, Tensor]:
    return _mean_fake(k, cu_seqlens, block, stride), _mean_fake(v, cu_seqlens, block, stride)


def _grad(d_out: Tensor, cu_seqlens: Optional[Tensor], length: int, block: int, stride: int) -> Tensor:
    batch, rows, heads, dim = d_out.shape
    d_x = launch.empty(d_out, (batch, length, heads, dim), cu_seqlens)
    tiles = launch.tiles(length, stride, cu_seqlens)
    if d_x.numel():
        launcher.start(
            share_to_tokens, (batch * tiles * heads,),
            d_out, d_x, cu_seqlens, length, rows, tiles, launch.sequences(cu_seqlens),
            heads, block, stride, dim, launch.power_of_two(dim), min(64, launch.power_of_two(stride)), num_warps=1,
        )  # fmt: skip
    return d_x


def _grad_fake(d_out: Tensor, cu_seqlens: Optional[Tensor], length: int, block: int, stride: int) -> Tensor:
    return d_out.new_empty((d_out.shape[0], length, *d_out.shape[2:]))


_one = register(NAMESPACE, "mean", _mean, _mean_fake)
_pair = register(NAMESPACE, "means", _means, _means_fake)
_one_grad = register(NAMESPACE, "mean_grad", _grad, _grad_fake)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    k, _, cu_seqlens, ctx.block, ctx.stride = inputs
    ctx.length = k.shape[1]
    ctx.set_materialize_grads(False)  # a mean that nothing was made of has no gradient to share out
    ctx.save_for_backward(cu_seqlens)


def _gradients(ctx: Any, *d_outs: Tensor | None) -> tuple[Any, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    sizes = cu_seqlens, ctx.length, ctx.block, ctx.stride
    d_inputs = (
        _one_grad(d.contiguous(), *sizes) if d is not None and needed else None
        for d, needed in zip(d_outs, ctx.needs_input_grad[:2], strict=True)
    )
    return *d_inputs, None, None, None


differentiate(_pair, _keep, _gradients)


@triton.jit(do_not_specialize=["T", "rows", "sequences"])
def mean_of_blocks(
    x_ptr, out_ptr, cu_ptr, T, rows, sequences, x_sb, x_st, x_sh, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A program a row and head: the mean of its block, 0 where the row has none. STEP tokens at a time."""
    pid = tl.program_id(0)
    h = (pid % HEADS).to(tl.int64)
    row = pid // HEADS % rows
    b = (pid // HEADS // rows).to(tl.int64)
    start = tl.full([], 0, dtype=tl.int64)
    first = row * STRIDE
    if cu_ptr is not None:
        sequence = device.sequence_of(cu_ptr, row, sequences, STRIDE)
        start = tl.load(cu_ptr + sequence).to(tl.int64)
        T = (tl.load(cu_ptr + sequence + 1) - start).to(tl.int32)
        first -= (start // STRIDE * STRIDE).to(tl.int32)
    used = (first >= 0) & (first + BLOCK <= T)
    d = tl.arange(0, WIDTH)
    tokens = x_ptr + b * x_sb + (start + first) * x_st + h * x_sh
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for i0 in range(0, BLOCK, STEP):
        i = i0 + tl.arange(0, STEP)
        mask = (used & (i < BLOCK))[:, None] & (d < DIM)[None, :]
        total += tl.sum(tl.load(tokens + i[:, None] * x_st + d[None, :], mask=mask, other=0.0).to(tl.float32), 0)
    out = out_ptr + ((b * rows + row) * HEADS + h) * DIM
    tl.store(out + d, (total / BLOCK).to(out_ptr.dtype.element_ty), mask=d < DIM)


@triton.jit(do_not_specialize=["T", "rows", "tiles", "sequences"])
def share_to_tokens(
    d_out_ptr, d_x_ptr, cu_ptr, T, rows, tiles, sequences, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A program STRIDE tokens and a head: those share their blocks, so each gets the same sum of gradients / BLOCK."""
    pid = tl.program_id(0)
    h = pid % HEADS
    tile = pid // HEADS % tiles
    b = (pid // HEADS // tiles).to(tl.int64)
    start = b * T
    first_row = b * rows
    if cu_ptr is not None:
        sequence = device.find_sequence(cu_ptr, tile, sequences, 1, STRIDE)
        begin = tl.load(cu_ptr + sequence)
        T = tl.load(cu_ptr + sequence + 1) - begin
        tile -= device.first_tile(begin, sequence, 1, STRIDE)
        start = begin.to(tl.int64)
        first_row = start // STRIDE
    d = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for j in tl.static_range(0, BLOCK // STRIDE):
        block = tile - j
        ended = (block >= 0) & (block * STRIDE + BLOCK <= T)
        at = d_out_ptr + ((first_row + block) * HEADS + h) * DIM
        total += tl.load(at + d, mask=ended & (d < DIM), other=0.0).to(tl.float32)
    share = (total / BLOCK).to(d_x_ptr.dtype.element_ty)
    for i0 in range(0, STRIDE, STEP):
        i = i0 + tl.arange(0, STEP)
        mask = ((i < STRIDE) & (tile * STRIDE + i < T))[:, None] & (d < DIM)[None, :]
        to = d_x_ptr + ((start + tile * STRIDE + i[:, None]) * HEADS + h) * DIM + d[None, :]
        tl.store(to, tl.broadcast_to(share[None, :], [STEP, WIDTH]), mask=mask)

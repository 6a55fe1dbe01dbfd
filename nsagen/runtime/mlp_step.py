"""φ = MLP of the block that ends with a step's tokens, by programs of the launch that scores it (decode_begin).

A program has COLUMNS numbers of the hidden row of a block's key or value, and what they add to the pooled row: a part.
Whoever needs the row waits until all of its parts are there, and adds them up. Fifteen of sixteen steps end no block:
then these programs end at once, and nobody waits.
"""

from __future__ import annotations

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsagen.runtime import device, launch
from nsagen.runtime.mlp_pool import Weights

COLUMNS = tl.constexpr(32)  # of the hidden row: 64 bytes in a row of the weights
# Loads of so many bytes, and how many of them (the last is added up). With twice the bytes every step took 6 µs more on
# an H200, those that end no block too, for a reason that is not known.
BYTES = tl.constexpr(1 << 14)
STAGES = tl.constexpr(4)


class Closing(NamedTuple):
    """Arguments of decode_begin: of both sides the weights; where parts go, how many of a block's are there."""

    k: tuple[Tensor | None, ...] = (None,) * 5
    v: tuple[Tensor | None, ...] = (None,) * 5
    parts: Tensor | None = None  # float32 [B, Hkv, programs of a block, the wider of a key's and a value's numbers]
    arrived: Tensor | None = None  # int32 [B, Hkv], 0 before a step and, by decode_merge, after it
    programs: int = 0
    k_hidden: int = 0
    v_hidden: int = 0

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        return *self.k, *self.v, self.parts, self.arrived


def closing(k: Weights, v: Weights, arrived: Tensor) -> Closing:
    """For the blocks that end with a step, one of each sequence and KV head at most. arrived: int32 [B, Hkv], zeros."""
    hidden = [side.bias_in.shape[1] for side in (k, v)]
    each = sum(columns_of(n) for n in hidden)
    widest = max(side.bias_out.shape[1] for side in (k, v))
    parts = launch.empty(arrived, (*arrived.shape, each, widest), None, torch.float32)
    return Closing(k, v, parts, arrived, arrived.numel() * each, *hidden)


@triton.constexpr_function
def columns_of(HIDDEN):
    """Programs that share a hidden row of so many numbers."""
    return -(-HIDDEN // COLUMNS.value)


@triton.constexpr_function
def tokens_of(SIZE):
    """Tokens whose weights, SIZE bytes each, a program takes at once."""
    return max(1, BYTES.value // SIZE)


@triton.jit
def close_part(
    column, new_ptr, new_st, old_ptr, old_st, table_ptr, pages, start, past, positions_ptr, weight_in_ptr, bias_in_ptr,
    weight_out_ptr, bias_out_ptr, part_ptr, h, BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr, PAGE: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """One program's part [DIM] of the row of tokens start … start + BLOCK − 1, which are old, or new from `past` on."""
    TOKENS: tl.constexpr = tokens_of(weight_in_ptr.dtype.element_ty.primitive_bitwidth // 8 * COLUMNS * WIDTH)
    e = column * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, WIDTH)
    inside = (d < DIM)[:, None] & (e < HIDDEN)[None, :]
    sums = tl.zeros([WIDTH, COLUMNS], dtype=tl.float32)
    for first in tl.range(0, BLOCK, TOKENS, num_stages=STAGES):
        i = first + tl.arange(0, TOKENS)
        s = start + i
        row = device.block_rows(table_ptr, pages, start, s, (i < BLOCK) & (s < past), BLOCK, PAGE, SINKS, RING)
        x = device.plain_rows(new_ptr, new_st, old_ptr, old_st, table_ptr, row, s, i < BLOCK, past, DIM, WIDTH)
        x = x.to(tl.float32)
        if positions_ptr is not None:
            known = (i < BLOCK)[:, None] & (d < DIM)[None, :]
            at = (h * BLOCK + i)[:, None] * DIM + d[None, :]
            x += tl.load(positions_ptr + at, mask=known, other=0.0).to(tl.float32)
        k = ((h * BLOCK + i)[:, None] * DIM + d[None, :]).to(tl.int64)
        there = (i < BLOCK)[:, None, None] & inside[None, :, :]
        w = tl.load(weight_in_ptr + k[:, :, None] * HIDDEN + e[None, None, :], mask=there, other=0.0)
        sums += tl.sum(x[:, :, None] * w.to(tl.float32), 0)
    hidden = tl.sum(sums, 0) + tl.load(bias_in_ptr + h * HIDDEN + e, mask=e < HIDDEN, other=0.0).to(tl.float32)
    hidden = 0.5 * hidden * (1.0 + tl.erf(hidden * 0.7071067811865476))
    hidden = hidden.to(weight_in_ptr.dtype.element_ty).to(tl.float32)
    at = (h * HIDDEN + e).to(tl.int64)[None, :] * DIM + d[:, None]
    w = tl.load(weight_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    part = tl.sum(w * tl.where(e < HIDDEN, hidden, 0.0)[None, :], 1)
    if column == 0:
        part += tl.load(bias_out_ptr + h * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    tl.store(part_ptr + d, part, mask=d < DIM)


@triton.jit
def arrive(arrived_ptr):
    """What this program stored is there for whoever has waited."""
    tl.debug_barrier()  # all threads have stored
    tl.atomic_add(arrived_ptr, 1, sem="release")


@triton.jit
def closed_row(
    parts_ptr, arrived_ptr, VALUE: tl.constexpr, CLOSES_K: tl.constexpr, CLOSES_V: tl.constexpr, STEP: tl.constexpr, d,
    inside,
):  # fmt: skip
    """Columns d of a pooled key, or VALUE, in float32: the sum of its parts [., STEP], once all are there."""
    FIRST: tl.constexpr = CLOSES_K if VALUE else 0
    COUNT: tl.constexpr = CLOSES_V if VALUE else CLOSES_K
    while tl.atomic_add(arrived_ptr, 0, sem="acquire") < CLOSES_K + CLOSES_V:
        pass
    n = tl.arange(0, triton.next_power_of_2(COUNT))
    at = parts_ptr + (FIRST + n)[:, None] * STEP + d[None, :]
    return tl.sum(tl.load(at, mask=(n < COUNT)[:, None] & inside[None, :], other=0.0), 0)

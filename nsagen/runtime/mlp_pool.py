"""φ = MLP of the few blocks that a decoding step ends: two small kernels in place of eight passes of torch.

Such a step is as long as its launches and the weights' bytes. So the first product is shared out over columns and
tokens of a block, until every multiprocessor reads some of the weights; the second adds its parts up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsagen.runtime import launch

PROGRAMS = 128  # of the first kernel: about one a multiprocessor
COLUMNS = 64  # of a product that a program makes
SPLITS = 8  # more parts of a hidden row would not be loaded at once
ROWS = 16  # that a program of the second kernel makes
WARPS = 4


class Weights(NamedTuple):
    """Of an MLP of every KV head: l·D numbers to E, GELU, E to D."""

    positions: Tensor | None  # [Hkv, l, D], added to a block's tokens
    weight_in: Tensor  # [Hkv, l·D, E]
    bias_in: Tensor  # [Hkv, E]
    weight_out: Tensor  # [Hkv, E, D]
    bias_out: Tensor  # [Hkv, D]


def fits(x: Tensor, weights: Weights) -> bool:
    """Whether the kernels take these: of one dtype, contiguous, no gradient wanted."""
    given = [w for w in weights if w is not None]
    wanted = torch.is_grad_enabled() and any(w.requires_grad for w in (x, *given))
    return launch.use_kernels(x) and not wanted and all(w.dtype == x.dtype and w.is_contiguous() for w in (x, *given))


def pooled(x: Tensor, weights: Weights) -> Tensor:
    """x [N, l, Hkv, D], a block a row -> [N, Hkv, D] in x's dtype; sums and the GELU in float32."""
    count, block, heads, dim = x.shape
    hidden = weights.bias_in.shape[1]
    out = launch.empty(x, (count, heads, dim), None)
    if not count:
        return out
    bm = min(64, launch.power_of_two(count + 1))
    tiles, parts_of = -(-(count + 1) // bm), -(-hidden // COLUMNS)
    splits = max(1, min(block, SPLITS, PROGRAMS // (tiles * heads * parts_of)))
    run = -(-block // splits)
    splits = -(-block // run)
    parts = launch.empty(x, (splits, heads, count + 1, hidden), None, torch.float32)
    first: Any = hidden_parts[(tiles * heads * parts_of * splits,)]
    first(
        x, weights.positions, weights.weight_in, parts, count, run, splits, heads, block, dim, hidden,
        bm, launch.power_of_two(dim), COLUMNS, launch.precision(x), num_warps=WARPS,
    )  # fmt: skip
    second: Any = hidden_to_rows[(-(-count // ROWS) * heads * -(-dim // COLUMNS),)]
    second(
        parts, weights.bias_in, weights.weight_out, weights.bias_out, out, count, splits, heads, dim, hidden,
        ROWS, COLUMNS, SPLITS, launch.precision(x), num_warps=WARPS,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count", "run", "splits"])
def hidden_parts(
    x_ptr, positions_ptr, weight_ptr, parts_ptr, count, run, splits, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    DIM: tl.constexpr, HIDDEN: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr, BE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A run of a block's tokens times their rows of the weights: parts [splits, HEADS, count + 1, HIDDEN] float32.

    One program: BM blocks of a head by BE columns. Row `count` is the positions', the same for every block.
    """
    pid = tl.program_id(0)
    split = pid % splits
    e = pid // splits % ((HIDDEN + BE - 1) // BE) * BE + tl.arange(0, BE)
    h = pid // splits // ((HIDDEN + BE - 1) // BE) % HEADS
    n = pid // splits // ((HIDDEN + BE - 1) // BE) // HEADS * BM + tl.arange(0, BM)
    d = tl.arange(0, WIDTH)
    total = tl.zeros([BM, BE], dtype=tl.float32)
    for i in range(split * run, tl.minimum(BLOCK, (split + 1) * run)):
        at = x_ptr + ((n.to(tl.int64)[:, None] * BLOCK + i) * HEADS + h) * DIM + d[None, :]
        x = tl.load(at, mask=(n < count)[:, None] & (d < DIM)[None, :], other=0.0)  # [BM, WIDTH]
        if positions_ptr is not None:
            p = tl.load(positions_ptr + (h * BLOCK + i) * DIM + d, mask=d < DIM, other=0.0)
            x = tl.where((n == count)[:, None], p[None, :], x)
        row = ((h * BLOCK + i) * DIM + d).to(tl.int64)
        w = tl.load(
            weight_ptr + row[:, None] * HIDDEN + e[None, :], mask=(d < DIM)[:, None] & (e < HIDDEN)[None, :], other=0.0
        )
        total = tl.dot(x, w, total, input_precision=PRECISION)
    to = parts_ptr + ((split * HEADS + h).to(tl.int64) * (count + 1) + n)[:, None] * HIDDEN + e[None, :]
    tl.store(to, total, mask=(n <= count)[:, None] & (e < HIDDEN)[None, :])


@triton.jit(do_not_specialize=["count", "splits"])
def hidden_to_rows(
    parts_ptr, bias_ptr, weight_ptr, out_bias_ptr, out_ptr, count, splits, HEADS: tl.constexpr, DIM: tl.constexpr,
    HIDDEN: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The parts added in their order, GELU, and the second product: out [count, HEADS, DIM].

    One program: BM blocks of a head by BE columns.
    """
    pid = tl.program_id(0)
    d = pid % ((DIM + BE - 1) // BE) * BE + tl.arange(0, BE)
    h = pid // ((DIM + BE - 1) // BE) % HEADS
    n = pid // ((DIM + BE - 1) // BE) // HEADS * BM + tl.arange(0, BM)
    total = tl.zeros([BM, BE], dtype=tl.float32)
    split = tl.arange(0, SPLITS)
    for e0 in tl.static_range(0, HIDDEN, BE):  # unrolled: its loads are under way together
        e = e0 + tl.arange(0, BE)
        there = (split < splits)[:, None] & (e < HIDDEN)[None, :]
        part = parts_ptr + (split * HEADS + h).to(tl.int64)[:, None] * (count + 1) * HIDDEN + e[None, :]
        own = tl.sum(tl.load(part + count * HIDDEN, mask=there, other=0.0), 0)  # the positions'
        own += tl.load(bias_ptr + h * HIDDEN + e, mask=e < HIDDEN, other=0.0).to(tl.float32)
        at = part[:, None, :] + n[None, :, None] * HIDDEN
        x = tl.sum(tl.load(at, mask=there[:, None, :] & (n < count)[None, :, None], other=0.0), 0)  # [BM, BE]
        x += own[None, :]
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        at = weight_ptr + (h * HIDDEN + e)[:, None] * DIM + d[None, :]
        w = tl.load(at, mask=(e < HIDDEN)[:, None] & (d < DIM)[None, :], other=0.0)
        total = tl.dot(x.to(w.dtype), w, total, input_precision=PRECISION)
    total += tl.load(out_bias_ptr + h * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
    to = out_ptr + (n.to(tl.int64)[:, None] * HEADS + h) * DIM + d[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=(n < count)[:, None] & (d < DIM)[None, :])

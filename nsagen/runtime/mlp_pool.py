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

PROGRAMS = 512  # of the first kernel: for the many blocks of a large batch some wait, for one block a run is a token
COLUMNS = 64  # of a product that a program makes
SPLITS = 8  # parts of a hidden row, all loaded at once
ROWS = 16  # that a program of the second kernel makes
HIDDEN = 256  # of a hidden row that it holds at once
WARPS = 4


class Weights(NamedTuple):
    """Of an MLP of every KV head: l·D numbers to E, GELU, E to D."""

    positions: Tensor | None  # [Hkv, l, D], added to a block's tokens
    weight_in: Tensor  # [Hkv, l·D, E]
    bias_in: Tensor  # [Hkv, E]
    weight_out: Tensor  # [Hkv, E, D]
    bias_out: Tensor  # [Hkv, D]


class Side(NamedTuple):
    """Blocks' keys or values, and where their rows go."""

    x: Tensor  # [N, l, Hkv, D], a block a row
    weights: Weights
    into: Tensor  # [R, Hkv, D]

    @property
    def columns(self) -> int:
        """Programs that share a hidden row."""
        return -(-self.weights.bias_in.shape[1] // COLUMNS)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of a token's numbers, the power of two that holds them, and a hidden row."""
        dim = self.x.shape[3]
        return dim, launch.power_of_two(dim), self.weights.bias_in.shape[1]


def fits(*sides: Side) -> bool:
    """Whether the kernels take these: of one dtype, contiguous, no gradient wanted."""
    return all(_fits(s) for s in sides)


def _fits(side: Side) -> bool:
    given = [w for w in side.weights if w is not None]
    wanted = torch.is_grad_enabled() and any(w.requires_grad for w in (side.x, *given))
    same = all(w.dtype == side.x.dtype and w.is_contiguous() for w in (side.x, side.into, *given))
    return launch.use_kernels(side.x) and not wanted and same


def pool(k: Side, v: Side, rows: Tensor | None) -> None:
    """Every block's key and value to row rows[n] (int64 [N]; n without rows) of `into`; sums and the GELU in float32."""
    count, block, heads, _ = k.x.shape
    if not count:
        return
    bm = min(64, launch.power_of_two(count + 1))
    tiles = -(-(count + 1) // bm)
    splits = max(1, min(block, SPLITS, PROGRAMS // (tiles * heads * (k.columns + v.columns))))
    run = -(-block // splits)
    splits = -(-block // run)
    parts = [launch.empty(s.x, (splits, heads, count + 1, s.sizes[2]), None, torch.float32) for s in (k, v)]
    of_k, of_v = (tiles * heads * s.columns * splits for s in (k, v))
    first: Any = hidden_parts[(of_k + of_v,)]
    first(
        k.x, k.weights.positions, k.weights.weight_in, parts[0], v.x, v.weights.positions, v.weights.weight_in, parts[1],
        count, run, splits, of_k, heads, block, *k.sizes, *v.sizes, bm, COLUMNS,
        launch.precision(k.x), num_warps=WARPS,
    )  # fmt: skip
    of_k, of_v = (-(-count // ROWS) * heads * -(-s.sizes[0] // COLUMNS) for s in (k, v))
    second: Any = hidden_to_rows[(of_k + of_v,)]
    at_once = min(HIDDEN, launch.power_of_two(max(k.sizes[2], v.sizes[2])))
    second(
        parts[0], *k.weights[2:], k.into, parts[1], *v.weights[2:], v.into, rows, count, splits, of_k, heads,
        *k.sizes, *v.sizes, ROWS, COLUMNS, SPLITS, at_once, launch.precision(k.x), num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def hidden_parts_of(
    pid, x_ptr, positions_ptr, weight_ptr, parts_ptr, count, run, splits, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A run of a block's tokens times their rows of the weights: parts [splits, HEADS, count + 1, HIDDEN] float32.

    One program: BM blocks of a head by BE columns. Row `count` is the positions', the same for every block.
    """
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


@triton.jit(do_not_specialize=["count", "run", "splits", "of_k"])
def hidden_parts(
    k_ptr, k_positions_ptr, k_weight_ptr, k_parts_ptr, v_ptr, v_positions_ptr, v_weight_ptr, v_parts_ptr,
    count, run, splits, of_k, HEADS: tl.constexpr, BLOCK: tl.constexpr, K_DIM: tl.constexpr, K_WIDTH: tl.constexpr,
    K_HIDDEN: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, V_HIDDEN: tl.constexpr, BM: tl.constexpr,
    BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden_parts_of the keys, by the first of_k programs, and of the values."""
    pid = tl.program_id(0)
    if pid < of_k:
        hidden_parts_of(
            pid, k_ptr, k_positions_ptr, k_weight_ptr, k_parts_ptr, count, run, splits, HEADS, BLOCK, K_DIM, K_WIDTH,
            K_HIDDEN, BM, BE, PRECISION,
        )  # fmt: skip
    else:
        hidden_parts_of(
            pid - of_k, v_ptr, v_positions_ptr, v_weight_ptr, v_parts_ptr, count, run, splits, HEADS, BLOCK, V_DIM,
            V_WIDTH, V_HIDDEN, BM, BE, PRECISION,
        )  # fmt: skip


@triton.jit
def hidden_to_rows_of(
    pid, parts_ptr, bias_ptr, weight_ptr, out_bias_ptr, out_ptr, rows_ptr, count, splits, HEADS: tl.constexpr,
    DIM: tl.constexpr, HIDDEN: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, SPLITS: tl.constexpr,
    BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The parts added in their order, GELU, and the second product: rows of out [., HEADS, DIM].

    One program: BM blocks of a head by BE columns, BH of a hidden row at once.
    """
    d = pid % ((DIM + BE - 1) // BE) * BE + tl.arange(0, BE)
    h = pid // ((DIM + BE - 1) // BE) % HEADS
    n = pid // ((DIM + BE - 1) // BE) // HEADS * BM + tl.arange(0, BM)
    total = tl.zeros([BM, BE], dtype=tl.float32)
    for e0 in tl.static_range(0, HIDDEN, BH):
        e = e0 + tl.arange(0, BH)
        at = weight_ptr + (h * HIDDEN + e)[:, None] * DIM + d[None, :]
        w = tl.load(at, mask=(e < HIDDEN)[:, None] & (d < DIM)[None, :], other=0.0)  # [BH, BE], under way meanwhile
        own = tl.load(bias_ptr + h * HIDDEN + e, mask=e < HIDDEN, other=0.0).to(tl.float32)
        x = tl.zeros([BM, BH], dtype=tl.float32)
        for split in tl.static_range(0, SPLITS):  # all parts' loads are under way together
            part = parts_ptr + (split * HEADS + h).to(tl.int64) * (count + 1) * HIDDEN + e
            there = (e < HIDDEN) & (split < splits)
            own += tl.load(part + count * HIDDEN, mask=there, other=0.0)  # the positions'
            x += tl.load(part[None, :] + n[:, None] * HIDDEN, mask=there[None, :] & (n < count)[:, None], other=0.0)
        x += own[None, :]
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        total = tl.dot(x.to(w.dtype), w, total, input_precision=PRECISION)
    total += tl.load(out_bias_ptr + h * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
    if rows_ptr is None:
        row = n.to(tl.int64)
    else:
        row = tl.load(rows_ptr + n, mask=n < count, other=0)
    to = out_ptr + (row[:, None] * HEADS + h) * DIM + d[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=(n < count)[:, None] & (d < DIM)[None, :])


@triton.jit(do_not_specialize=["count", "splits", "of_k"])
def hidden_to_rows(
    k_parts_ptr, k_bias_ptr, k_weight_ptr, k_out_bias_ptr, k_out_ptr, v_parts_ptr, v_bias_ptr, v_weight_ptr,
    v_out_bias_ptr, v_out_ptr, rows_ptr, count, splits, of_k, HEADS: tl.constexpr, K_DIM: tl.constexpr,
    K_WIDTH: tl.constexpr, K_HIDDEN: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, V_HIDDEN: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr, SPLITS: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden_to_rows_of the keys, by the first of_k programs, and of the values."""
    pid = tl.program_id(0)
    if pid < of_k:
        hidden_to_rows_of(
            pid, k_parts_ptr, k_bias_ptr, k_weight_ptr, k_out_bias_ptr, k_out_ptr, rows_ptr, count, splits, HEADS,
            K_DIM, K_HIDDEN, BM, BE, SPLITS, BH, PRECISION,
        )  # fmt: skip
    else:
        hidden_to_rows_of(
            pid - of_k, v_parts_ptr, v_bias_ptr, v_weight_ptr, v_out_bias_ptr, v_out_ptr, rows_ptr, count, splits,
            HEADS, V_DIM, V_HIDDEN, BM, BE, SPLITS, BH, PRECISION,
        )  # fmt: skip

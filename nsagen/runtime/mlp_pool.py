"""φ = MLP of the few blocks that a decoding step ends: two small kernels in place of sixteen passes of torch.

Such a step is as long as its launches and the weights' bytes: keys and values share the launches, and few blocks' first
product is shared out by narrow columns, until every multiprocessor reads some of the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsagen.runtime import device, launch, launcher

ROWS = (64, 16)  # of a program of the two kernels, one of the first's the positions'
COLUMNS = (16, 64)  # of a program of the first one, if one tile of rows is all and if not
WIDE = 64  # columns of one of the second
DEPTH = 256  # numbers of a hidden row that it holds at once
WARPS = 4
FEW = 16  # blocks: the kernels of fewer took 4 µs longer where they began early
ASKED = (256, 1024)  # the fewest blocks that a kernel asks which are wanted, two a thread, and the most
DEEPEST = 7  # stages of the first one's pipeline: few blocks wait for nothing but the weights


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
    def sizes(self) -> tuple[int, int, int]:
        """Of a token's numbers, the power of two that holds them, and a hidden row."""
        dim = self.x.shape[3]
        return dim, launch.power_of_two(dim), self.weights.bias_in.shape[1]


def fits(k: Side, v: Side) -> bool:
    """Whether the kernels take these: of one dtype, contiguous, both with positions or none, no gradient wanted."""
    alike = k.x.dtype == v.x.dtype and (k.weights.positions is None) == (v.weights.positions is None)
    contiguous = all(x.is_contiguous() for s in (k, v) for x in (s.x, s.into))
    return alike and contiguous and all(s.into.dtype == s.x.dtype and takes(s.x, s.weights) for s in (k, v))


def takes(x: Tensor, weights: Weights) -> bool:
    """Whether kernels take the weights for blocks or tokens x: of its dtype, contiguous, no gradient wanted."""
    given = [w for w in weights if w is not None]
    wanted = torch.is_grad_enabled() and any(w.requires_grad for w in (x, *given))
    same = all(w.dtype == x.dtype and w.is_contiguous() for w in given)
    return launch.use_kernels(x) and not wanted and same


def pool(k: Side, v: Side, rows: Tensor | None, spare: int | None = None) -> None:
    """Block n's key and value to row rows[n] (int64 [N]; n without rows) of `into`; sums and the GELU in float32.

    spare: the row of blocks that nobody wants. Of 1024 or fewer only the others are pooled: a step ends a block of one
    sequence in sixteen or so, and where all have one length of none, as a rule. Such a step reads no weight.
    """
    count, block, heads, _ = k.x.shape
    if not count:
        return
    bm, be, stages = _shape(k, v)
    tiles = -(-count // (bm - 1))
    asks = rows is not None and spare is not None and count <= ASKED[1]
    asked = max(ASKED[0], launch.power_of_two(count)) if asks else 0
    blocks = (rows, spare if asks else 0, count)
    hidden = [launch.empty(s.x, (count, heads, s.sizes[2]), None) for s in (k, v)]
    overlaps = launch.overlaps(k.x.device) and count >= FEW
    early = {"EARLY": 2, "launch_pdl": True} if overlaps else {"EARLY": 0}
    of_k, of_v = (tiles * heads * -(-s.sizes[2] // be) for s in (k, v))
    launcher.start(
        hidden_rows, (of_k + of_v,),
        k.x, *k.weights[:3], hidden[0], v.x, *v.weights[:3], hidden[1], *blocks, of_k, asked, heads, block,
        *k.sizes, *v.sizes, bm, be, launch.precision(k.x), num_warps=WARPS, num_stages=stages, **early,
    )  # fmt: skip
    depth = min(DEPTH, launch.power_of_two(max(s.sizes[2] for s in (k, v))))
    of_k, of_v = (-(-count // ROWS[1]) * heads * -(-s.sizes[0] // WIDE) for s in (k, v))
    launcher.start(
        rows_of_hidden, (of_k + of_v,),
        hidden[0], *k.weights[3:], k.into, hidden[1], *v.weights[3:], v.into, *blocks, of_k, asked, heads,
        *k.sizes, *v.sizes, ROWS[1], WIDE, depth, launch.precision(k.x), num_warps=WARPS, **early,
    )  # fmt: skip


def _shape(k: Side, v: Side) -> tuple[int, int, int]:
    """Of the first kernel: rows, columns, and stages, as many as fit beside another program, or alone for few rows."""
    rows = launch.power_of_two(len(k.x) + 1)
    few = rows <= ROWS[0]
    shapes = [(max(16, rows), COLUMNS[0])] if few else [(ROWS[0], COLUMNS[1]), (ROWS[0], COLUMNS[0])]
    if not k.x.is_cuda:
        return *shapes[0], 2
    widths = [s.sizes[1] for s in (k, v)]
    wide = widths[0] if k.sizes == v.sizes else sum(widths)  # else each side has its own
    room = launch.chip(k.x.device.index or 0).smem * 7 // 8 // (1 if few else 2)
    stages = 1
    for bm, be in (*shapes, (32, COLUMNS[0]), (16, COLUMNS[0])):
        stages = room // ((bm + be) * k.x.element_size() * wide)
        if stages >= 2:
            return bm, be, min(DEEPEST, stages)
    return 16, COLUMNS[0], max(1, stages)


@triton.jit
def wanted(rows_ptr, spare, count, ASKED: tl.constexpr):
    """Which of `count` blocks, ASKED at most, are wanted, 1 or 0, and how many: those whose row is not the spare one.

    ASKED = 0: all of them.
    """
    if ASKED == 0:
        return 1, count
    else:
        n = tl.arange(0, ASKED)
        chosen = (tl.load(rows_ptr + n, mask=n < count, other=spare) != spare).to(tl.int32)
        return chosen, tl.sum(chosen)


@triton.jit
def numbers(chosen, first, ROWS: tl.constexpr, ASKED: tl.constexpr):
    """Which blocks the chosen ones of ranks `first` to first + ROWS − 1 are; any where there are not so many.

    Before the one of rank r stand all blocks up to and with which r are chosen, or fewer: a histogram, added up. A
    comparison of all blocks with all ranks takes three times the instructions.
    """
    if ASKED == 0:
        return first + tl.arange(0, ROWS)
    else:
        upto = tl.maximum(tl.cumsum(chosen, 0) - first, 0)
        return tl.cumsum(tl.histogram(upto, ROWS, upto < ROWS), 0)


@triton.jit
def hidden_tile(
    pid, x_ptr, positions_ptr, weight_ptr, bias_ptr, hidden_ptr, chosen, total, ASKED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GELU of the first product: hidden [total, HEADS, HIDDEN] in x's dtype, the wanted blocks' one after the other.

    One program: BM − 1 blocks of a head by BE columns. The last row is the positions', which every block adds.
    """
    e = pid % ((HIDDEN + BE - 1) // BE) * BE + tl.arange(0, BE)
    h = pid // ((HIDDEN + BE - 1) // BE) % HEADS
    first = pid // ((HIDDEN + BE - 1) // BE) // HEADS * (BM - 1)
    if first < total:
        row = tl.arange(0, BM)
        n = numbers(chosen, first, BM, ASKED)
        live = (row < BM - 1) & (first + row < total)
        d = tl.arange(0, WIDTH)
        sums = tl.zeros([BM, BE], dtype=tl.float32)
        for i in range(BLOCK):
            at = x_ptr + ((n.to(tl.int64)[:, None] * BLOCK + i) * HEADS + h) * DIM + d[None, :]
            given = live
            if positions_ptr is not None:
                at = tl.where((row == BM - 1)[:, None], positions_ptr + (h * BLOCK + i) * DIM + d[None, :], at)
                given = live | (row == BM - 1)
            x = tl.load(at, mask=given[:, None] & (d < DIM)[None, :], other=0.0)  # [BM, WIDTH]
            k = ((h * BLOCK + i) * DIM + d).to(tl.int64)
            inside = (d < DIM)[:, None] & (e < HIDDEN)[None, :]
            w = tl.load(weight_ptr + k[:, None] * HIDDEN + e[None, :], mask=inside, other=0.0)
            sums = tl.dot(x, w, sums, input_precision=PRECISION)
        shared = tl.sum(tl.where((row == BM - 1)[:, None], sums, 0.0), 0)
        shared += tl.load(bias_ptr + h * HIDDEN + e, mask=e < HIDDEN, other=0.0).to(tl.float32)
        sums += shared[None, :]
        sums = 0.5 * sums * (1.0 + tl.erf(sums * 0.7071067811865476))
        to = hidden_ptr + ((first + row).to(tl.int64)[:, None] * HEADS + h) * HIDDEN + e[None, :]
        tl.store(to, sums.to(hidden_ptr.dtype.element_ty), mask=live[:, None] & (e < HIDDEN)[None, :])


@triton.jit(do_not_specialize=["spare", "count", "of_k"])
def hidden_rows(
    k_ptr, k_positions_ptr, k_weight_ptr, k_bias_ptr, k_hidden_ptr, v_ptr, v_positions_ptr, v_weight_ptr, v_bias_ptr,
    v_hidden_ptr, rows_ptr, spare, count, of_k, ASKED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    K_DIM: tl.constexpr, K_WIDTH: tl.constexpr, K_HIDDEN: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr,
    V_HIDDEN: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """hidden_tile of the keys, by the first of_k programs, and of the values."""
    device.begin_early(EARLY)
    pid = tl.program_id(0)
    chosen, total = wanted(rows_ptr, spare, count, ASKED)
    if K_DIM == V_DIM and K_HIDDEN == V_HIDDEN:  # one body, so that one pipeline has all of the shared memory
        of_v = pid >= of_k
        if k_positions_ptr is None:
            positions_ptr = None
        else:
            positions_ptr = tl.where(of_v, v_positions_ptr, k_positions_ptr)
        hidden_tile(
            tl.where(of_v, pid - of_k, pid), tl.where(of_v, v_ptr, k_ptr), positions_ptr,
            tl.where(of_v, v_weight_ptr, k_weight_ptr), tl.where(of_v, v_bias_ptr, k_bias_ptr),
            tl.where(of_v, v_hidden_ptr, k_hidden_ptr), chosen, total, ASKED, HEADS, BLOCK, K_DIM, K_WIDTH, K_HIDDEN,
            BM, BE, PRECISION,
        )  # fmt: skip
    elif pid < of_k:
        hidden_tile(
            pid, k_ptr, k_positions_ptr, k_weight_ptr, k_bias_ptr, k_hidden_ptr, chosen, total, ASKED, HEADS, BLOCK,
            K_DIM, K_WIDTH, K_HIDDEN, BM, BE, PRECISION,
        )  # fmt: skip
    else:
        hidden_tile(
            pid - of_k, v_ptr, v_positions_ptr, v_weight_ptr, v_bias_ptr, v_hidden_ptr, chosen, total, ASKED, HEADS,
            BLOCK, V_DIM, V_WIDTH, V_HIDDEN, BM, BE, PRECISION,
        )  # fmt: skip


@triton.jit
def row_tile(
    pid, hidden_ptr, weight_ptr, bias_ptr, out_ptr, rows_ptr, chosen, total, ASKED: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, HIDDEN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The second product, to rows of out [., HEADS, DIM]. One program: BM wanted blocks of a head by BD columns."""
    d = pid % ((DIM + BD - 1) // BD) * BD + tl.arange(0, BD)
    h = pid // ((DIM + BD - 1) // BD) % HEADS
    first = pid // ((DIM + BD - 1) // BD) // HEADS * BM
    if first < total:
        rank = first + tl.arange(0, BM)
        row = numbers(chosen, first, BM, ASKED).to(tl.int64)
        if rows_ptr is not None:
            row = tl.load(rows_ptr + row, mask=rank < total, other=0)
        sums = tl.zeros([BM, BD], dtype=tl.float32)
        for e0 in tl.static_range(0, HIDDEN, BE):
            e = e0 + tl.arange(0, BE)
            inside = (e < HIDDEN)[None, :] & (rank < total)[:, None]
            at = hidden_ptr + (rank.to(tl.int64)[:, None] * HEADS + h) * HIDDEN + e[None, :]
            x = tl.load(at, mask=inside, other=0.0)
            inside = (e < HIDDEN)[:, None] & (d < DIM)[None, :]
            w = tl.load(weight_ptr + (h * HIDDEN + e)[:, None] * DIM + d[None, :], mask=inside, other=0.0)
            sums = tl.dot(x, w, sums, input_precision=PRECISION)
        sums += tl.load(bias_ptr + h * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
        to = out_ptr + (row[:, None] * HEADS + h) * DIM + d[None, :]
        tl.store(to, sums.to(out_ptr.dtype.element_ty), mask=(rank < total)[:, None] & (d < DIM)[None, :])


@triton.jit(do_not_specialize=["spare", "count", "of_k"])
def rows_of_hidden(
    k_hidden_ptr, k_weight_ptr, k_bias_ptr, k_out_ptr, v_hidden_ptr, v_weight_ptr, v_bias_ptr, v_out_ptr, rows_ptr,
    spare, count, of_k, ASKED: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, K_WIDTH: tl.constexpr,
    K_HIDDEN: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, V_HIDDEN: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """row_tile of the keys, by the first of_k programs, and of the values."""
    device.begin_early(EARLY)
    pid = tl.program_id(0)
    chosen, total = wanted(rows_ptr, spare, count, ASKED)
    if pid < of_k:
        row_tile(
            pid, k_hidden_ptr, k_weight_ptr, k_bias_ptr, k_out_ptr, rows_ptr, chosen, total, ASKED, HEADS, K_DIM,
            K_HIDDEN, BM, BD, BE, PRECISION,
        )  # fmt: skip
    else:
        row_tile(
            pid - of_k, v_hidden_ptr, v_weight_ptr, v_bias_ptr, v_out_ptr, rows_ptr, chosen, total, ASKED, HEADS, V_DIM,
            V_HIDDEN, BM, BD, BE, PRECISION,
        )  # fmt: skip

"""Keys in lane order: a lane of a product's warp then has keys in a row, and adds up those of a block by itself.

Of a row of a product [64, C] a lane, the j-th of four, has columns 8·i + 2·j and the one behind, for every i. Where key
C/4·j + 2·i + e lies at column 8·i + 2·j + e, it has the C/4 keys from C/4·j on.
"""

from __future__ import annotations

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nsagen.runtime import launch, launcher


def in_order(k: Tensor, keys: int = 64) -> Tensor:
    """Keys [B, N, H, D] in lane order by tiles of `keys`, zeros behind the last: [B, keys·max(1, ⌈N / keys⌉), H, D]."""
    batch, length, heads, dim = k.shape
    tiles = max(1, -(-length // keys))
    ordered = launch.empty(k, (batch, tiles * keys, heads, dim), None)
    shape = (*launch.strides(k), heads, dim, launch.power_of_two(dim), keys)
    launcher.start(order_keys, (tiles * heads * batch,), k, ordered, length, tiles, *shape, num_warps=4)
    return ordered


@triton.jit(do_not_specialize=["length", "tiles"])
def order_keys(
    k_ptr, out_ptr, length, tiles, k_sb, k_st, k_sh, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """A program copies a tile of one head."""
    tile = tl.program_id(0) % tiles
    h = tl.program_id(0) // tiles % HEADS
    b = (tl.program_id(0) // tiles // HEADS).to(tl.int64)
    column = tl.arange(0, KEYS)
    key = tile * KEYS + column // 2 % 4 * (KEYS // 4) + column // 8 * 2 + column % 2
    d = tl.arange(0, WIDTH)[None, :]
    keys = k_ptr + b * k_sb + key.to(tl.int64)[:, None] * k_st + h.to(tl.int64) * k_sh
    x = tl.load(keys + d, mask=(key < length)[:, None] & (d < DIM), other=0.0)
    row = (b * tiles + tile) * KEYS + column[:, None]
    tl.store(out_ptr + (row * HEADS + h) * DIM + d, x, mask=d < DIM)


@gluon.jit
def by_lane(x):
    """x [64, C], a product of keys in lane order, as [64, 4, C / 4]: keys in a row, in the lane that has them."""
    C: gl.constexpr = x.shape[1]
    return gl.reshape(gl.permute(gl.reshape(x, [64, C // 8, 4, 2]), (0, 2, 1, 3)), [64, 4, C // 4])


@gluon.jit
def lane_columns(x, row):
    """For x [64, 4, K] by lane: a key's number as register, 0 … K − 1, and lane, K·j, have it; row [64] beside them."""
    K: gl.constexpr = x.shape[2]
    key = gl.arange(0, K, layout=gl.SliceLayout(0, gl.SliceLayout(1, x.type.layout)))
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, x.type.layout)))
    lane = gl.expand_dims(gl.expand_dims(lane * K, 0), 2)
    return gl.expand_dims(gl.expand_dims(key, 0), 1), lane, beside_lanes(row, x)


@gluon.jit
def beside_lanes(row, x):
    """row [64], numbers of a product's rows, as [64, 1, 1] beside x [64, 4, K] by lane."""
    row = gl.convert_layout(row, gl.SliceLayout(1, gl.SliceLayout(2, x.type.layout)))
    return gl.expand_dims(gl.expand_dims(row, 1), 2)


# [64, 4]: one number of each row and lane, where a product has them.
LANES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
)  # fmt: skip


@gluon.jit
def lane_before(x):
    """x [64, 4] of the lane before; the first one has the last one's."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 lane, from;
            mov.u32 lane, %laneid;
            add.u32 from, lane, 3;
            and.b32 from, from, 3;
            and.b32 lane, lane, 28;
            or.b32 from, from, lane;
            shfl.sync.idx.b32 $0, $1, from, 0x1f, 0xffffffff;
        }""",
        "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def one_later(x, carry):
    """x [64, 4, N] of a tile, N a power of two, each number one place later, through all lanes; and what falls out.

    Into the first lane comes `carry` [64, 4], what fell out of the tile before.
    """
    N: gl.constexpr = x.shape[2]
    if N == 1:
        out = lane_before(gl.convert_layout(gl.reshape(x, [64, 4]), LANES))
        lane = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, LANES)), 0)
        later = gl.where(lane == 0, carry, out)
    else:  # numbers at odd places go to even ones, one such place later; those at even ones just stand behind
        even, odd = gl.split(gl.reshape(x, [64, 4, N // 2, 2]))
        later, out = one_later(odd, carry)
        later = gl.join(gl.convert_layout(later, even.type.layout), even)
    return gl.convert_layout(gl.reshape(later, [64, 4, N]), x.type.layout), out


@gluon.constexpr_function
def heads_sum_layout(GROUP, N):
    """Of [64 / GROUP, 4, N], what 64 rows by lane leave summed over heads: numbers in a row, a lane's, first.

    Bit i of a row is, from the lowest, a lane's three, a register's, a warp's two; those of heads are gone.
    """
    heads = GROUP.bit_length() - 1
    rows = [[1 << i - heads, 0, 0] if i >= heads else [0, 0, 0] for i in range(6)]
    registers = [[0, 0, 1 << i] for i in range(N.bit_length() - 1)] + (rows[3:4] if heads <= 3 else [])
    lanes = [[0, 1, 0], [0, 2, 0], *rows[:3]]
    return gl.DistributedLinearLayout(registers, lanes, rows[4:], [], [64 // GROUP, 4, N])

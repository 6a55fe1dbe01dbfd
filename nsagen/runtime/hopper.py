"""Warp specialisation on Hopper, in Gluon: what a kernel with a warp that only copies needs on the device and the host.

A ring of `stages` tiles in shared memory: the copying warp fills one after the other by tensor maps, warpgroups, two
of 64 rows as a rule, read them. Two barriers a stage say that it is full, and that all have read it; a stage's turn is
`number // stages`, counted over all tiles that a program ever copies.
"""

from __future__ import annotations

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Boxes

from nsagen.runtime import launch

# What later versions of Triton call these, or 3.6 does.
copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the first name from 3.8 on
sync = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """A barrier a stage, each done when COUNT arrive."""
    made = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(made.index(i), count=COUNT)
    return made


@gluon.jit
def tiles(DTYPE: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """COUNT tiles [ROWS, WIDTH], as the tensor cores read them."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], DTYPE)
    return gl.allocate_shared_memory(DTYPE, [COUNT, ROWS, WIDTH], LAYOUT)


@gluon.jit
def wait_full(full, number, STAGES: gl.constexpr):
    """Until the tile of that number is there."""
    mbarrier.wait(full.index(number % STAGES), number // STAGES & 1)


@gluon.jit
def wait_empty(empty, number, STAGES: gl.constexpr):
    """Until the tile that was in its place has been read; at once where none was."""
    mbarrier.wait(empty.index(number % STAGES), number // STAGES & 1 ^ 1)


@gluon.jit
def release(empty, number, STAGES: gl.constexpr):
    """This warpgroup has read the tile of that number."""
    mbarrier.arrive(empty.index(number % STAGES), count=1)


@gluon.jit
def fetch(boxes, b, s0, h, column, tile, full):
    """Have the keys s0, … of KV head h, columns from `column` on, copied into the tile."""
    copy(boxes, [b, s0, h, column], full, tile.reshape(boxes.block_shape))


@gluon.jit
def numbers(COUNT: gl.constexpr, WIDTH: gl.constexpr):
    """COUNT rows of WIDTH float32 numbers."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    return gl.allocate_shared_memory(gl.float32, [COUNT, WIDTH], LAYOUT)


@gluon.jit
def fetch_rows(boxes, b, t, head, column, tile, NUMBER: gl.constexpr, full):
    """Have rows of queries from t on and heads from `head` on, 64 columns from `column` on, copied into box NUMBER.

    A tile [64, D] lies in memory by 64 columns, and by rows within: boxes of rows, those of the first columns first.
    """
    ROWS: gl.constexpr = boxes.block_shape[1] * boxes.block_shape[2]
    COUNT: gl.constexpr = tile.shape[0] * tile.shape[1] // (ROWS * 64)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 64], boxes.dtype)
    box = tile._reinterpret(boxes.dtype, [COUNT, ROWS, 64], LAYOUT).index(NUMBER)
    copy(boxes, [b, t, head, column], full, box.reshape(boxes.block_shape))


@gluon.jit
def fetch_numbers(pointers, row):
    """Have 64 float32 numbers copied into a row of them; `numbers_arrive` says where they are counted."""
    async_copy.async_copy_global_to_shared(row, pointers)


@gluon.jit
def numbers_arrive(full):
    """Each lane arrives when what it fetched is there."""
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def part_of(place, row, first_part, LISTS: gl.constexpr, COUNT: gl.constexpr):
    """The number of a part: of the entry at `place` in the lists [B, T, Hkv, COUNT], which have LISTS entries a token.

    Parts are COUNT a query; `first_part` counts the queries from the first that has some to that of token row `row`.
    """
    return (first_part + place // LISTS - row) * COUNT + place % COUNT


# [4, lines of 256, 32, 8]: the 16 rows of each warp, 16 bytes of two a thread; and a number a warp.
PART = gl.constexpr(gl.BlockedLayout([1, 1, 1, 8], [1, 1, 32, 1], [4, 1, 1, 1], [3, 2, 1, 0]))
WARP = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PART.value))))


@gluon.jit
def put_part(ptr, x, start, there, HALF: gl.constexpr, D: gl.constexpr):
    """Store x [64, W], columns HALF·W, … of D, a product's rows: warp w's 16 from ptr + start[w] on, where there[w].

    As the threads hold them, so that none moves: [2 (8 rows apart), D/32, 8 (rows), 4 (lanes), 4 (by 8 columns), 2].
    Templates that read them (sum_list_parts.py.j2) undo it.
    """
    W: gl.constexpr = x.shape[1]
    OTHERS: gl.constexpr = gl.SliceLayout(0, PART)
    x = gl.permute(gl.reshape(x, [4, 2, 8, W // 32, 4, 4, 2]), (0, 1, 3, 2, 5, 4, 6))
    x = gl.convert_layout(gl.reshape(x, [4, W // 16, 32, 8]), PART)  # where they are
    i = gl.arange(0, W // 16, layout=gl.SliceLayout(1, gl.SliceLayout(2, OTHERS)))
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, OTHERS)))
    e = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, OTHERS)))
    i = i // (W // 32) * (D // 32) + HALF * (W // 32) + i % (W // 32)
    place = gl.expand_dims(gl.expand_dims(i * 256, 1), 2) + gl.expand_dims(gl.expand_dims(lane * 8, 0), 2)
    place = gl.expand_dims(place + gl.expand_dims(gl.expand_dims(e, 0), 1), 0)
    start = gl.expand_dims(gl.expand_dims(gl.expand_dims(start, 1), 2), 3)
    there = gl.expand_dims(gl.expand_dims(gl.expand_dims(there, 1), 2), 3)
    gl.store(ptr + start + place, x, mask=there)


@gluon.jit
def store_sum(ptr, value, mask, ACCUMULATE: gl.constexpr):
    """Store value [rows, columns], added in float32 to what is there if ACCUMULATE."""
    if ACCUMULATE:
        value += gl.load(ptr, mask=mask, other=0.0).to(gl.float32)
    gl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@gluon.jit
def fresh(x):
    """x, int32: what follows from it is computed after here, and takes no registers before."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def columns(x, time):
    """For x [R, C, 4, 2]: a column's number as register, 8·i + e, and lane, 2·j, have it; time [R] beside them."""
    OUTER: gl.constexpr = gl.SliceLayout(3, x.type.layout)
    i = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, OUTER)))
    i = gl.expand_dims(gl.expand_dims(gl.expand_dims(i, 0), 2), 3)
    j = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, OUTER)))
    j = gl.expand_dims(gl.expand_dims(gl.expand_dims(j, 0), 1), 3)
    e = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, x.type.layout))))
    e = gl.expand_dims(gl.expand_dims(gl.expand_dims(e, 0), 1), 2)
    time = gl.convert_layout(time, gl.SliceLayout(1, gl.SliceLayout(2, OUTER)))
    return 8 * i + e, 2 * j, gl.expand_dims(gl.expand_dims(gl.expand_dims(time, 1), 2), 3)


_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def boxes(x: torch.Tensor, widths: tuple[int, ...], rows: int) -> list[Boxes]:
    """Tensor maps of keys or values [B, N, H, D] for boxes of `rows` rows of one head, one for each part of D."""
    return [_map_of(x, (1, rows, 1, width)) for width in widths]


def row_boxes(x: torch.Tensor, heads: int, tokens: int = 1) -> Boxes:
    """A tensor map of rows [B, T, H, D] for boxes of 64 columns of the `heads` heads of so many tokens."""
    return _map_of(x, (1, tokens, heads, 64))


def key_maps(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor, group: int, widths: tuple[int, ...]
) -> list[Boxes]:
    """Of k, in parts of those widths, and v by 64 keys, of q and d_out by 64 rows of whole queries."""
    rows = (row_boxes(x, group, 64 // group) for x in (q, d_out))
    return [*boxes(k, widths, 64), *boxes(v, (v.shape[-1],), 64), *rows]


def _map_of(x: torch.Tensor, box: tuple[int, ...]) -> Boxes:
    return launch.placed(_form(x.shape, x.stride(), x.dtype, box), x)


@lru_cache(maxsize=1024)
def _form(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, box: tuple[int, ...]) -> Boxes:
    layout = gl.NVMMASharedLayout.get_default_for(list(box), _TYPES[dtype])  # how a box lies in shared memory
    steps = launch.map_strides(shape, strides, dtype)
    return Boxes(launch.nowhere(dtype), list(shape), steps, list(box), layout)


def programs(total: int, x: torch.Tensor) -> int:
    """Programs of a launch that do `total` pieces of work in turn: one a multiprocessor, whose registers it takes."""
    return min(total, _multiprocessors(x.device.index or 0))


MOST_SHARES = 16
EXTRA = 5  # steps that a program's start and end take
PARTS = 0.05  # steps that it takes all multiprocessors to write and read a program's parts, of 128 keys


@lru_cache(maxsize=1024)
def shares(tiles: int, steps: int, device: torch.device) -> int:
    """How many programs share a key tile of so many steps: as few as fill the multiprocessors' rounds best.

    A program has a multiprocessor to itself, so 192 equal ones take as long as 264 on 132. Programs that share leave
    parts, which one alone does not: many tiles fill the rounds well enough.
    """
    places = _multiprocessors(device.index or 0)

    def cost(n: int) -> float:
        rounds = -(-tiles * n // places) * (-(-steps // n) + EXTRA)
        return rounds + (n * tiles * PARTS if n > 1 else 0.0)

    return min(range(1, max(1, min(MOST_SHARES, steps // EXTRA)) + 1), key=cost)


@lru_cache(maxsize=64)
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count

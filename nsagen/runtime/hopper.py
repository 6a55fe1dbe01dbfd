"""Warp specialisation on Hopper, in Gluon: what a kernel with a warp that only copies needs on the device and the host.

A ring of `stages` tiles in shared memory: the copying warp fills one after the other by tensor maps, two warpgroups of
64 rows each read them. Two barriers a stage say that it is full, and that both have read it; a stage's turn is
`number // stages`, counted over all tiles that a program ever copies.
"""

from __future__ import annotations

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
from functools import lru_cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
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
    shape, strides = list(x.shape), launch.map_strides(x)
    return [Boxes(x, shape, strides, [1, rows, 1, width], _layout(rows, width, x.dtype)) for width in widths]


@lru_cache(maxsize=256)
def _layout(rows: int, width: int, dtype: torch.dtype) -> Any:
    """How a box lies in shared memory. Kept, since a launch that asks for it anew takes longer."""
    return gl.NVMMASharedLayout.get_default_for([1, rows, 1, width], _TYPES[dtype])


def programs(total: int, x: torch.Tensor) -> int:
    """Programs of a launch that do `total` pieces of work in turn: one a multiprocessor, whose registers it takes."""
    return min(total, _multiprocessors(x.device.index or 0))


@lru_cache(maxsize=64)
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count

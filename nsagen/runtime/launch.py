"""Host side of a launch: which path, which tile configuration, how many programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from nsagen.runtime import tuned

ARCHES = ("sm_80", "sm_90", "sm_100")


class Config(NamedTuple):
    """A tile configuration: BM rows (queries × heads of a group) by BN keys."""

    bm: int
    bn: int
    warps: int
    stages: int
    smem: int  # bytes it needs
    cap: int = 0  # registers a thread that the compiler is held to, 0 for its own choice
    maps: bool = False  # only by tensor maps: by pointers it would spill, or a warp copies by them
    specialised: bool = False  # a warp copies, warpgroups of `warps` multiply: kernels of its own (hopper.py)

    @property
    def options(self) -> dict[str, int]:
        held = {"maxnreg": self.cap} if self.cap else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **held}

    @property
    def label(self) -> str:
        more = (f"r{self.cap}" if self.cap else "") + ("ws" if self.specialised else "")
        return f"{self.bm}x{self.bn}w{self.warps}s{self.stages}{more}"


Configs = dict[tuple[str, int], tuple[Config, ...]]  # (from this architecture on, operand bits) -> best first


@dataclass(eq=False)
class Tiles:
    """A kernel's tile candidates, and what this process picked of them for a device, dtype and length."""

    kernel: str
    key: str  # the hash of its source
    configs: Configs
    lengths: tuple[int, int | None] = (0, None)  # the whole operation launches it from so many queries to below so many
    carries: str | None = None  # the kernel that is launched beside some of its forms only: its time is theirs
    forced: Config | None = None  # what the tuner is measuring
    picked: dict[tuple[object, ...], Config] = field(default_factory=dict)


class Chip(NamedTuple):
    arch: str
    smem: int  # bytes a block can have
    gpu: str


def use_kernels(x: torch.Tensor) -> bool:
    """Kernels run on GPU tensors, and on CPU tensors under TRITON_INTERPRET=1; float64 takes the torch path."""
    if x.dtype == torch.float64:
        return False
    if x.is_cuda or torch.compiler.is_compiling():  # which does not see through the interpreter's switch
        return x.is_cuda
    return triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue]


def pick(tiles: Tiles, x: torch.Tensor, by_maps: bool = True) -> Config:
    """The configuration for x's device, dtype and length: the fastest measured, else the first that fits the device.

    by_maps: whether the launch can take a tile that comes by tensor maps alone (`mapped`). Under the interpreter the
    smallest, which is the fastest there. Compiles and measures nothing; again, a look-up.
    """
    if tiles.forced is not None and (by_maps or not tiles.forced.specialised):
        return tiles.forced
    at = (x.device, x.dtype, x.dtype == torch.float32 and precision(x), by_maps, tuned.bucket(x.shape[1]))
    config = tiles.picked.get(at)
    if config is None:
        config = tiles.picked[at] = _look_up(tiles, x, by_maps)
    return config


def _look_up(tiles: Tiles, x: torch.Tensor, by_maps: bool) -> Config:
    bits = 16 if x.dtype in (torch.bfloat16, torch.float16) else 32
    if not x.is_cuda:
        return min(tiles.configs["sm_80", bits], key=lambda c: c.bm * c.bn)
    here = chip(x.device.index or 0)
    fitting = {c.label: c for c in candidates(tiles, here, bits) if by_maps or not c.maps}
    fastest = tuned.fastest(tiles.kernel, tiles.key, place(here, x.dtype, x.shape[1]), list(fitting))
    return fitting[fastest or next(iter(fitting))]


def candidates(tiles: Tiles, chip: Chip, bits: int) -> tuple[Config, ...]:
    """Those that fit the chip, best first by the model; the smallest where none does, if the chip has any."""
    older = ARCHES[: ARCHES.index(chip.arch) + 1]
    table = next((tiles.configs[a, bits] for a in reversed(older) if (a, bits) in tiles.configs), ())
    return tuple(c for c in table if c.smem <= chip.smem) or table[-1:]


def place(chip: Chip, dtype: torch.dtype, length: int) -> tuned.Place:
    """Where a measurement of that length is kept; float32 dots in full and in reduced precision are two."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    kind = "16" if narrow else "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return tuned.Place(chip.gpu, triton.__version__, kind, length)


@lru_cache(maxsize=64)
def chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    known = {} if torch.version.hip else {9: "sm_90", 10: "sm_100"}  # AMD's chips count their generations alike
    arch = known.get(properties.major, "sm_80")
    return Chip(arch, getattr(properties, "shared_memory_per_block_optin", 99 << 10), properties.name)


@lru_cache(maxsize=64)
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before it still runs (programmatic dependent launch)."""
    known = device.type == "cuda" and torch.version.hip is None
    return known and torch.cuda.get_device_capability(device)[0] >= 9


def precision(x: torch.Tensor) -> str:
    """tl.dot's precision for x's dtype: torch.get_float32_matmul_precision() for float32 operands."""
    if x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def sequences(cu_seqlens: torch.Tensor | None) -> int:
    return 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1


def tiles(rows: int, step: int, cu_seqlens: torch.Tensor | None) -> int:
    """Tiles of `step` rows; packed: room for a broken tile at the end of every sequence."""
    return -(-rows // step) if cu_seqlens is None else rows // step + sequences(cu_seqlens)


MOST_SPLITS = 16
PROGRAMS = 2048  # a launch of so many keeps every multiprocessor busy to the end


def splits(programs: int, length: int, step: int) -> int:
    """How many programs share the loop of each of `programs` key tiles over `length` queries, `step` at a time.

    As many as fill the GPU, each with a few steps or more, so that a tile that all queries see is no straggler.
    """
    return max(1, min(MOST_SPLITS, -(-PROGRAMS // max(1, programs)), length // (4 * step)))


def strides(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of [B, T, H, D] but the last, which is 1."""
    return x.stride()[:3]


def mapped(cu_seqlens: torch.Tensor | None, *keys: torch.Tensor) -> bool:
    """Whether a launch brings tensor maps of these keys and values [B, T, H, D].

    Not on chips without a copy engine for them, not of addresses that 16 bytes do not divide, nor of float32 (whose
    products take rows out of boxes at the price of spills), nor where a box may pass the end of a packed sequence.
    """
    return cu_seqlens is None and all(map(_can_map, keys))


def specialises(cu_seqlens: torch.Tensor | None, *tensors: torch.Tensor) -> bool:
    """Whether a warp can copy rows of these, q, k, v or d_out, by tensor maps: on a GPU of sm_90."""
    if PLAIN:
        return False
    return tensors[0].is_cuda and chip(tensors[0].device.index or 0).arch == "sm_90" and mapped(cu_seqlens, *tensors)


def orders_keys(cu_seqlens: torch.Tensor | None, q: torch.Tensor) -> bool:
    """Whether scores may be of rows that are queries × heads, for which keys are copied in lane order (lanes.py)."""
    return orders_from(q.shape[1]) and mapped(cu_seqlens, q)


def orders_from(queries: int) -> bool:
    """Whether so many queries are worth it."""
    return PLAIN or queries >= ORDERED_FROM


def maps(
    x: torch.Tensor, widths: tuple[int, ...], rows: int, block: int, cu_seqlens: torch.Tensor | None
) -> list[TensorDescriptor | None]:
    """Tensor maps of x for boxes of `rows` rows of one head, one for each part of D.

    None, and the kernel goes by pointers, where there are no maps or rows do not divide a block.
    """
    if block % rows or not mapped(cu_seqlens, x):
        return [None] * len(widths)
    return [placed(_form(x.shape, x.stride(), x.dtype, (1, rows, 1, width)), x) for width in widths]


def placed(form: Any, x: torch.Tensor) -> Any:
    """A copy of the tensor map at x. Its checks were the form's, and to repeat them takes as long as a launch.

    Of an address Triton asks what `mapped` does.
    """
    made = object.__new__(type(form))  # `copy` takes ten times as long
    vars(made).update(vars(form), base=x)
    return made


@lru_cache(maxsize=1024)
def _form(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, box: tuple[int, ...]) -> TensorDescriptor:
    return TensorDescriptor(nowhere(dtype), list(shape), map_strides(shape, strides, dtype), list(box))


def nowhere(dtype: torch.dtype) -> torch.Tensor:
    """What a form is made with in place of a tensor, which would be kept."""
    return torch.empty(0, dtype=dtype, device="meta")


def map_strides(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> list[int]:
    """Strides as a tensor map takes them, which asks for whole 16 bytes of a dim of one, too."""
    some = shape[-1] * dtype.itemsize
    return [*(stride if size > 1 else some for size, stride in zip(shape[:-1], strides[:-1], strict=True)), 1]


def _can_map(x: torch.Tensor) -> bool:
    if x.data_ptr() % 16 or not _mappable(x.shape, x.stride(), x.dtype):
        return False
    if not x.is_cuda:
        return True  # the interpreter has them, for every dtype
    return x.element_size() == 2 and chip(x.device.index or 0).arch != ARCHES[0]


@lru_cache(maxsize=1024)
def _mappable(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> bool:
    steps = [stride * dtype.itemsize for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size > 1]
    return bool(shape.numel()) and all(s > 0 and s % 16 == 0 for s in steps)


def rest(q: torch.Tensor, shape: tuple[int, ...] | None = None, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """Where a kernel keeps what rounding takes from its output; empty where nothing is rounded, or without a shape."""
    if shape is None or not use_kernels(q) or q.dtype == torch.float32:
        return q.new_empty(0)
    return empty(q, shape, cu_seqlens)


def kept(rest: torch.Tensor | None) -> torch.Tensor | None:
    """A kernel's argument: the rest, or None where it is empty."""
    return rest if rest is not None and rest.numel() else None


def target(into: torch.Tensor | None, like: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, bool]:
    """(a gradient like `like` to write, False), or (`into`, True) to add to."""
    return (empty(like, like.shape, cu_seqlens), False) if into is None else (into, True)


def added(gradients: tuple[torch.Tensor, ...], into: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor, ...]:
    """Each gradient, plus its tensor of `into` if there is one."""
    return tuple(g if before is None else g + before for g, before in zip(gradients, into, strict=True))


ORDERED_FROM = 8192  # queries: below, one launch more, which orders the keys, costs the host what is gained
CHUNK_BYTES = 1 << 28  # of the scores of one chunk of queries
CHUNK_STEP = 128  # no query tile is larger, and tiles of a power of two are whole ones of a chunk
SLICE_BYTES = 4 << 30  # of what the branches of a prefill leave at once


def slices(q: torch.Tensor, numbers: int, cu_seqlens: torch.Tensor | None) -> list[tuple[int, int]]:
    """Sequences [first, end) that a prefill serves at a time; `numbers`, of q's dtype, are kept for each query.

    Packed ones are served at once.
    """
    batch = q.shape[0] if cu_seqlens is None else sequences(cu_seqlens)
    each = q.shape[1] * numbers * q.element_size()
    step = batch if cu_seqlens is not None or not each else max(1, SLICE_BYTES // each)
    return [(first, min(first + step, batch)) for first in range(0, batch, step)]


def chunk(length: int, row_bytes: int, most: int = CHUNK_BYTES) -> int:
    """Queries of a chunk whose rows of `row_bytes` fit in `most` bytes; a multiple of CHUNK_STEP."""
    fitting = max(1, most // (row_bytes * CHUNK_STEP)) * CHUNK_STEP
    return min(fitting, -(-length // CHUNK_STEP) * CHUNK_STEP)


def power_of_two(count: int, least: int = 16) -> int:
    """The smallest power of two, at least `least`, that is not below count."""
    return max(least, 1 << (count - 1).bit_length())


def warps_for(candidates: int) -> int:
    """Warps of a program that holds a row of candidates in registers: 32 numbers a lane, more would spill."""
    return min(16, max(1, candidates // 1024))


def statistics(x: torch.Tensor) -> torch.dtype:
    """dtype of row statistics (lse): float32, float64 where x is float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty(
    like: torch.Tensor,
    shape: tuple[int, ...],
    cu_seqlens: torch.Tensor | None,
    dtype: torch.dtype | None = None,
    unused: float = 0.0,
) -> torch.Tensor:
    """A contiguous output. Packed ones are filled with `unused`: rows that belong to no sequence are not written."""
    dtype = dtype or like.dtype
    if cu_seqlens is not None:
        return torch.full(shape, unused, dtype=dtype, device=like.device)
    if POISON:
        nothing = float("nan") if dtype.is_floating_point else -1
        return torch.full(shape, nothing, dtype=dtype, device=like.device)
    return like.new_empty(shape, dtype=dtype)


# The tuner: kernels that leave it no choice stand aside for those of packed calls, and no length forbids a candidate.
PLAIN = False
POISON = False  # tests: outputs are NaN (lists −1) before a launch, so that a row nobody wrote shows

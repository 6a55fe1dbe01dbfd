"""Running a module's whole operation on the GPU with chosen tiles: is it right, and how long does each kernel take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from nsagen.errors import NsagenError
from nsagen.runtime import launch
from nsagen.tools.random_lists import DTYPES, random_lists
from nsagen.tools.tune_search import CandidateFailed, DeviceLost, TooLarge, Tried

SETS = 3  # of inputs, in turn: none is in the L2 cache from the run before
REPEATS = 5
FLOOR = 1e-2  # of the largest norm
TOLERANCE = 0.05  # between two candidates: rounding, and now and then another choice among equal blocks


@dataclass
class Inputs:
    """One call's arguments and what its gradients are taken of."""

    arguments: tuple[Any, ...]
    blocks: Tensor | None
    leaves: list[Tensor]
    d_out: Tensor


class GpuMeasurer:
    """tune_search.Measurer: all kernels' times from one profiled run, the median of several."""

    def __init__(self, module: Any, length: int, dtype: str, sets: int = SETS, repeats: int = REPEATS) -> None:
        self.module, self.repeats = module, repeats
        try:
            self.inputs = [inputs_of(module, length, DTYPES[dtype], seed) for seed in range(sets)]
        except torch.OutOfMemoryError as error:
            raise TooLarge(str(error).splitlines()[0]) from error
        self.reference: list[Tensor] = []

    def prepare(self) -> None:
        with forced(self.module._CONFIGS, first_choices(self.module, self.inputs[0].d_out)):
            self.reference = self.run(0)

    def __call__(self, tried: Tried) -> dict[str, float]:
        first = first_choices(self.module, self.inputs[0].d_out)
        with forced(self.module._CONFIGS, {**first, **tried}):
            self._check(self.run(0))
            spent = [self._profiled(i % len(self.inputs)) for i in range(self.repeats)]
        unseen = [kernel for kernel in tried if not all(s[kernel] for s in spent)]
        if unseen:
            raise NsagenError(f"the profiler saw no launch of {', '.join(unseen)}: is CUPTI there, the length enough?")
        return {kernel: round(median(s[kernel] for s in spent), 4) for kernel in tried}

    def run(self, index: int) -> list[Tensor]:
        """Output and gradients. Running out of memory is no candidate's fault."""
        x = self.inputs[index]
        blocks = {} if x.blocks is None else {"blocks": x.blocks}
        try:
            out = self.module.attention(*x.arguments, dense_below=0, **blocks)
            grads = torch.autograd.grad(out, x.leaves, x.d_out, allow_unused=True)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError as error:
            raise TooLarge(str(error).splitlines()[0]) from error
        except Exception as error:  # Triton, LLVM, ptxas and the driver each raise their own
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            _require_alive(text)
            raise CandidateFailed(text) from error
        return [out.detach(), *(g for g in grads if g is not None)]

    def _check(self, results: list[Tensor]) -> None:
        """Near the first choice's results; some gradients are exactly 0, and what they have there is rounding alone."""
        sizes = [float(first.float().norm()) for first in self.reference]
        for ours, first, own in zip(results, self.reference, sizes, strict=False):
            size = max(own, FLOOR * max(sizes))
            far = float((ours.float() - first.float()).norm())
            if not far <= TOLERANCE * size:  # NaN, too
                raise CandidateFailed(f"its result is {far:.3g} from the first choice's of norm {size:.3g}")

    def _profiled(self, index: int) -> Counter[str]:
        """Milliseconds by kernel name, all launches together, with those of what may ride on it."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            self.run(index)
        spent: Counter[str] = Counter()
        for event in trace.events() or ():
            spent[event.name.removesuffix("_specialised")] += event.device_time / 1e3  # pyright: ignore[reportArgumentType]
        for kernel, tiles in self.module._CONFIGS.items():
            if tiles.carries:  # launched beside some forms: where it is not, they do its work or need none
                spent[kernel] += spent[tiles.carries]
        return spent


def _require_alive(text: str) -> None:
    """After an illegal access nothing runs any more in this process."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception as error:
        raise DeviceLost(f"the GPU stopped working for this process: {text}") from error


def first_choices(module: Any, like: Tensor) -> Tried:
    """The model's first choice of every kernel, whatever was measured before."""
    bits, here = 16 if like.element_size() == 2 else 32, launch.chip(like.device.index or 0)
    found = {name: launch.candidates(tiles, here, bits) for name, tiles in module._CONFIGS.items()}
    return {name: configs[0] for name, configs in found.items() if configs}


@contextmanager
def forced(tables: dict[str, launch.Tiles], tried: Tried) -> Iterator[None]:
    """Launches take these configurations, and gradients the kernels that have a choice."""
    for kernel, config in tried.items():
        tables[kernel].forced = config
    launch.PLAIN = True
    try:
        yield
    finally:
        launch.PLAIN = False
        for kernel in tried:
            tables[kernel].forced = None


def inputs_of(module: Any, length: int, dtype: torch.dtype, seed: int, device: str = "cuda") -> Inputs:
    """Standard normal q, k, v and d_out, gates in [0, 1), made on the device."""
    torch.manual_seed(seed)
    layout = module._LAYOUT

    def new(heads: int, dim: int, make: Any = torch.randn) -> Tensor:
        return make(1, length, heads, dim, device=device, dtype=dtype)

    def keys(dim: int) -> Any:
        if not layout.per_branch:
            return new(layout.kv_heads, dim).requires_grad_()
        return {b: new(layout.kv_heads, dim).requires_grad_() for b in layout.branches}

    q = new(layout.query_heads, layout.qk_dim).requires_grad_()
    k, v = keys(layout.qk_dim), keys(layout.v_dim)
    gates = new(layout.query_heads, len(layout.branches), torch.rand).requires_grad_() if layout.gated else None
    phi = module.Compressor(device=device, dtype=dtype, rope=_of_unit_size) if layout.pooled else None
    leaves = [q, *(x for side in (k, v) for x in (side.values() if layout.per_branch else [side]))]
    leaves += [x for x in (gates, *(phi.parameters() if phi else ())) if x is not None]
    blocks = _blocks(module, length, device) if layout.caller_blocks else None
    return Inputs((q, k, v, gates, phi), blocks, leaves, new(layout.query_heads, layout.v_dim))


def _of_unit_size(k_cmp: Tensor, positions: Tensor) -> Tensor:
    """In the place of rotation: a fresh φ makes keys that are nearly equal, and rounding would choose the blocks."""
    return k_cmp / k_cmp.float().std().clamp(min=1e-6).to(k_cmp.dtype) if k_cmp.numel() > 1 else k_cmp


def _blocks(module: Any, length: int, device: str) -> Tensor:
    branch = module.SPEC["branches"]["selected"]
    own = torch.arange(length, device=device) // branch["block"]
    return random_lists(own, 1, module._LAYOUT.kv_heads, branch["top_n"])

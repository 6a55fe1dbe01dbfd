"""Launches. What Triton works out of a launch's arguments, every time anew, is kept from the first launch of its like.

Triton binds arguments to names, asks each for its type and alignment, names what it would compile and looks that up:
with some thirty arguments most of the 60 µs of the host that a launch takes, and more than a kernel of few tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

MOST_KEPT = 4096  # launches: lengths that differ every time would fill memory
_kept: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}
_numbers_from: dict[Any, int] = {}  # of a kernel's arguments: from here on all are numbers, or words


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options); options are Triton's, or constexprs behind the last of `args`.

    Hooks on launches are called as ever. What `triton.knobs` says of compiling holds for launches unlike any before.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel[grid](*args, **options)
        return
    kept = _kept.get(_key(kernel.fn, args, options))
    if kept is None:
        compiled = kernel[grid](*args, **options)
        _keep(kernel, args, options, compiled)
    else:
        compiled, others = kept
        compiled[(*grid, 1, 1)[:3]](*args, *others)


def _key(fn: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[object, ...]:
    """What Triton compiles a kernel for, and more: types, whether 16 divides an address, boxes of maps, numbers."""
    first = _numbers_from.get(fn, len(args))
    found: list[object] = []
    for x in args[:first]:
        if isinstance(x, Tensor):
            found += x.dtype, x.data_ptr() % 16 == 0
        elif hasattr(x, "block_shape"):  # a tensor map, whose address 16 divides
            found += x.base.dtype, x.padding, *x.block_shape
        else:
            found.append(x)
    return fn, torch.cuda.current_device(), *map(type, args), *args[first:], *options.items(), *found


def _keep(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], compiled: Any) -> None:
    others = kernel.params[len(args) :]
    if not all(p.is_constexpr for p in others):
        return
    if len(_kept) >= MOST_KEPT:
        _kept.clear()
    numbers = (int, bool, float, str)  # None may stand for a tensor
    first = max((i + 1 for i, x in enumerate(args) if not isinstance(x, numbers)), default=0)
    if first > _numbers_from.get(kernel.fn, -1):
        _kept.clear()  # keys before were made otherwise
        _numbers_from[kernel.fn] = first
    _kept[_key(kernel.fn, args, options)] = compiled, tuple(options.get(p.name, p.default) for p in others)

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
_PLAIN = frozenset((int, bool, float, str, type(None)))  # most arguments, so asked first
_kept: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options); options are Triton's, or constexprs behind the last of `args`.

    Hooks on launches are called as ever. What `triton.knobs` says of compiling holds for launches unlike any before.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel[grid](*args, **options)
        return
    key = _key(kernel.fn, args, options)
    kept = _kept.get(key)
    if kept is None:
        _keep(key, kernel, len(args), options, kernel[grid](*args, **options))
    else:
        compiled, others = kept
        compiled[(*grid, 1, 1)[:3]](*args, *others)


def _key(fn: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[object, ...]:
    """What Triton compiles a kernel for, and more: types, whether 16 divides an address, boxes of maps, numbers."""
    found: list[object] = []
    for x in args:
        if type(x) in _PLAIN:
            found.append(x)
        elif isinstance(x, Tensor):
            found += x.dtype, x.data_ptr() % 16 == 0
        elif hasattr(x, "block_shape"):  # a tensor map, whose address 16 divides
            found += x.base.dtype, x.padding, *x.block_shape
        else:
            found.append(x)
    return fn, torch.cuda.current_device(), *map(type, args), *options.items(), *found


def _keep(key: tuple[object, ...], kernel: Any, given: int, options: dict[str, Any], compiled: Any) -> None:
    """given: arguments by position. The others must be constexprs, whose values a compiled kernel is handed, too."""
    others = kernel.params[given:]
    if not all(p.is_constexpr for p in others):
        return
    if len(_kept) >= MOST_KEPT:
        _kept.clear()
    _kept[key] = compiled, tuple(options.get(p.name, p.default) for p in others)

"""A generated module's functions as torch custom operators.

An operator's name is process-wide, while a module may be imported twice: from the cache and from `generated/`, or by
two threads. Equal names mean equal content here, so the first registration wins and every later one returns it.
Registering again in torch would instead destroy the operator that the first module still holds. A standalone module
carries a copy of this file, so what is registered is written down where all copies in the process find it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.library import CustomOpDef  # pyright: ignore[reportPrivateImportUsage]

# Copies of other versions read this, too: its name stands for this layout, and another layout takes another name.
_shared = vars(sys.modules.setdefault("_nsagen_operators_1", ModuleType("_nsagen_operators_1")))
_lock = _shared.setdefault("lock", threading.RLock())
_ops: dict[str, CustomOpDef] = _shared.setdefault("ops", {})
_differentiable: set[CustomOpDef] = _shared.setdefault("differentiable", set())


def register(namespace: str, name: str, fn: Callable[..., Any], fake: Callable[..., Any]) -> CustomOpDef:
    """The operator `namespace::name`, made from `fn` unless it exists already.

    fn: annotated with what torch's schemas know (Tensor, Optional[Tensor], list[Tensor], float, int, bool; a Tensor or
    a tuple of them is returned); it mutates no argument and returns fresh tensors, none of them an argument or a view.
    fake: the same signature; returns empty tensors of the right shape, dtype and device without reading values.
    """
    qualified = f"{namespace}::{name}"
    with _lock:
        op = _ops.get(qualified)
        if op is None:
            op = torch.library.custom_op(qualified, fn, mutates_args=())
            op.register_fake(fake)
            # Entered last: another thread sees an operator only once it is complete.
            _ops[qualified] = op
    return op


def differentiate(op: CustomOpDef, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives `op` its gradient, once; again for the same operator does nothing.

    setup(ctx, inputs, output) saves what the backward needs; backward(ctx, *d_outputs) returns one gradient, or None,
    for each input. To be seen through by torch.compile, backward calls operators or plain torch.
    """
    with _lock:
        if op not in _differentiable:
            op.register_autograd(backward, setup_context=setup)
            _differentiable.add(op)

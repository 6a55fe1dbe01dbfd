"""The joint of a forward operator and its gradient."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nsagen.runtime import autograd, ops

# ruff: noqa: UP045 (what torch's schemas are made of)


def twice(x: Tensor, cu_seqlens: Optional[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    return 2 * x, x + 1


def twice_fake(x: Tensor, cu_seqlens: Any, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def twice_grad(d_out: Tensor, x: Tensor, kept: Tensor, cu_seqlens: Optional[Tensor], scale: float) -> Tensor:
    return 2 * d_out


def twice_grad_fake(d_out: Tensor, x: Tensor, kept: Tensor, cu_seqlens: Any, scale: float) -> Tensor:
    return torch.empty_like(x)


def test_no_zeros_are_written_for_outputs_without_a_gradient() -> None:
    op = ops.register("nsagen_test_autograd", "twice", twice, twice_fake)
    grad = ops.register("nsagen_test_autograd", "twice_grad", twice_grad, twice_grad_fake)
    autograd.connect(op, _as_tuple(grad), 1, keep_output=False)
    x = torch.randn(31, 7, requires_grad=True)
    out, _ = op(x, None, 1.0)
    d_out = torch.randn_like(x)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        (dx,) = torch.autograd.grad(out, x, d_out)
    torch.testing.assert_close(dx, 2 * d_out)
    zeroed = [e for e in seen.events() or () if e.name == "aten::zero_" and [31, 7] in e.input_shapes]
    assert not zeroed


def _as_tuple(op: Any) -> Any:
    return lambda *args: (op(*args),)

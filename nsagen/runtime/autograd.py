"""Autograd of a generated module's operators: every forward op has a gradient op with a fixed argument order."""

from __future__ import annotations

from typing import Any

from torch.library import CustomOpDef  # pyright: ignore[reportPrivateImportUsage]

from nsagen.runtime.ops import differentiate


def connect(op: CustomOpDef, grad_op: CustomOpDef, tensors: int, keep_output: bool) -> None:
    """Give `op` the gradient `grad_op`.

    op(*tensors, cu_seqlens, scale) -> (out, *saved), or out alone; only `out` is differentiable.
    grad_op(d_out, *tensors, [out,] *saved, cu_seqlens, scale) -> the gradients of the first of `tensors`; the others
    (block lists) have none. With `out` iff keep_output.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # else zeros as large as every other output are written for each backward
        outputs = output if isinstance(output, tuple) else (output,)
        kept = outputs if keep_output else outputs[1:]
        ctx.save_for_backward(*inputs[:tensors], *kept, inputs[tensors])
        ctx.scale = inputs[tensors + 1]

    def backward(ctx: Any, d_out: Any, *unused: Any) -> tuple[Any, ...]:
        if d_out is None:
            return (None,) * (tensors + 2)
        *saved, cu_seqlens = ctx.saved_tensors
        gradients = grad_op(d_out.contiguous(), *saved, cu_seqlens, ctx.scale)
        return (*gradients, *(None for _ in range(tensors + 2 - len(gradients))))

    differentiate(op, setup, backward)

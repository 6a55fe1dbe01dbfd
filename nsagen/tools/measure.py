"""How far two tensors are apart, and the gradients to compare."""

from __future__ import annotations

import torch
from torch import Tensor

Named = dict[str, Tensor]


def gradients(out: Tensor, leaves: Named, d_out: Tensor) -> Named:
    """Gradients of every leaf; zeros of one that the output does not depend on (φ before the first block)."""
    if not out.requires_grad:
        return {name: torch.zeros_like(x) for name, x in leaves.items()}
    grads = torch.autograd.grad(out, list(leaves.values()), d_out.to(out.dtype), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads, strict=True)}


def finite_where_both_are(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """lse without the rows that see nothing, if both sides agree on which those are; NaN for ours if not."""
    never = theirs == float("-inf")
    if not torch.equal(never, ours == float("-inf")):
        return torch.full_like(ours, float("nan")), theirs.masked_fill(never, 0.0)
    return ours.masked_fill(never, 0.0), theirs.masked_fill(never, 0.0)


def error(ours: Tensor, theirs: Tensor, floor: float) -> float:
    theirs = theirs.detach()
    difference = float((ours.detach().to(theirs.dtype) - theirs).norm())
    if difference == 0.0:
        return 0.0
    size = max(float(theirs.norm()), floor)
    return difference / size if size else float("inf")

"""What `nsagen bench` times, in the form that its clock takes, and the random tensors that it is fed with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsagen.spec import Spec
from nsagen.tools.random_lists import random_lists


@dataclass(frozen=True)
class Setting:
    """What holds for a whole run."""

    spec: Spec
    dtype: torch.dtype
    device: str

    def source(self, length: int, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(1_000_003 * seed + length)

    def randn(self, source: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, device=self.device, dtype=self.dtype)

    def rand(self, source: torch.Generator, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=source, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Work:
    """One call on one set of inputs, and what its backward starts from and arrives at."""

    call: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor] = ()
    d_outs: Sequence[Tensor] = ()

    def backward(self, outs: Sequence[Tensor]) -> None:
        torch.autograd.backward(outs, self.d_outs, retain_graph=True)


@dataclass(frozen=True)
class Case:
    """One row of the tables. `make` takes a length and a seed; no two seeds give the same numbers."""

    name: str
    kind: str  # whole, part, dense or peer
    make: Callable[[int, int], Work]
    forward_only: str | None = None  # why there is no backward to time
    note: str | None = None  # what the numbers leave out


def dense_inputs(setting: Setting, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of one dense attention and the gradient of its output: standard normal [1, T, H, D]."""
    h, source = setting.spec.heads, setting.source(length, seed)
    q = setting.randn(source, 1, length, h.query, h.qk_dim).requires_grad_()
    k = setting.randn(source, 1, length, h.kv, h.qk_dim).requires_grad_()
    v = setting.randn(source, 1, length, h.kv, h.v_dim).requires_grad_()
    return q, k, v, setting.randn(source, 1, length, h.query, h.v_dim)


def random_blocks(setting: Setting, source: torch.Generator, length: int) -> Tensor:
    """Lists as a caller would give them."""
    selected = setting.spec.branches["selected"]
    size, count = int(getattr(selected, "block")), int(getattr(selected, "top_n"))  # noqa: B009
    own = torch.arange(length, device=setting.device) // size
    return random_lists(own, 1, setting.spec.heads.kv, count, source)

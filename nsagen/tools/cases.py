"""Inputs of `nsagen verify`: lengths, tensors and what a gradient is taken of, from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nsagen.spec import Spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Leaves = dict[str, Tensor]  # by name: q, k, k.window, gates, phi.weight …


@dataclass(frozen=True)
class Case:
    """Sequences of these lengths: one length in a batch, or all packed in one row."""

    lengths: tuple[int, ...]
    packed: bool
    dtype: str
    batch: int = 1

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def label(self) -> str:
        return f"packed {'+'.join(map(str, self.lengths))}" if self.packed else f"T={self.tokens} B={self.batch}"

    @property
    def options(self) -> str:
        """The command line's options that make this case."""
        lengths = " ".join(f"--length {n}" for n in self.lengths)
        return f"{lengths} --dtype {self.dtype}{' --packed' if self.packed else ''}"


@dataclass
class Inputs:
    """Arguments of one call. The leaves are what gradients are taken of."""

    leaves: Leaves
    phi: nn.Module | None
    cu_seqlens: Tensor | None
    d_out: Tensor
    branches: tuple[str, ...] = field(default=())

    def keys(self, side: str) -> Tensor | dict[str, Tensor]:
        """k or v as the module takes it: a tensor, or one a branch."""
        if side in self.leaves:
            return self.leaves[side]
        return {b: self.leaves[f"{side}.{b}"] for b in self.branches}

    def of_branch(self, side: str, branch: str) -> Tensor:
        return self.leaves.get(f"{side}.{branch}", self.leaves.get(side, self.d_out))


def cases_of(spec: Spec, on_gpu: bool, lengths: tuple[int, ...], packed: bool, dtypes: tuple[str, ...]) -> list[Case]:
    """The lengths asked for, or those where things go wrong: one token, a block less one, ragged tiles, packed ones."""
    cases: list[Case] = []
    for dtype in dtypes:
        dense, together = _lengths(spec, on_gpu)
        if lengths:
            dense, together = lengths, lengths
        if not packed:
            cases += [Case((n,), False, dtype, _batch(spec, n, on_gpu)) for n in dense]
        if packed or not lengths:
            cases.append(Case(together, True, dtype))
    return cases


def _lengths(spec: Spec, on_gpu: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(one at a time, packed). The interpreter does a few thousand rows of a head a second."""
    compressed = spec.branches.get("compressed")
    short = getattr(compressed, "block", 8) - 1
    if on_gpu:
        return (1, 700, 8192), (1, max(1, short), 33, 700, 1, 2050)
    if _is_large(spec):
        return (1, min(40, short + 6)), (1, 7, 33)
    return (1, max(1, short), 45), (1, max(1, short), 33)


def _is_large(spec: Spec) -> bool:
    return spec.heads.query * spec.heads.qk_dim > 1024


def _batch(spec: Spec, tokens: int, on_gpu: bool) -> int:
    return 2 if tokens <= 1024 and (on_gpu or not _is_large(spec)) else 1


def inputs_of(module: ModuleType, spec: Spec, case: Case, seed: int, device: str) -> Inputs:
    """Standard normal q, k, v and d_out, gates in (0, 1), φ as it is made; the same on every device."""
    torch.manual_seed(seed)
    h, dtype, rows = spec.heads, DTYPES[case.dtype], (case.batch, case.tokens)
    suffixes = [f".{b}" for b in spec.branches] if spec.kv == "per_branch" else [""]
    leaves = {"q": torch.randn(*rows, h.query, h.qk_dim)}
    for suffix in suffixes:
        leaves["k" + suffix] = torch.randn(*rows, h.kv, h.qk_dim)
        leaves["v" + suffix] = torch.randn(*rows, h.kv, h.v_dim)
    if spec.combine == "gated_sum":
        leaves["gates"] = torch.rand(*rows, h.query, len(spec.branches))
    d_out = torch.randn(*rows, h.query, h.v_dim)
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in leaves.items()}
    phi = module.Compressor(device=device, dtype=dtype) if hasattr(module, "Compressor") else None
    if phi is not None:
        leaves |= {f"phi.{name}": parameter for name, parameter in phi.named_parameters()}
    return Inputs(leaves, phi, _cu_seqlens(case, device), d_out.to(device, dtype), tuple(spec.branches))


def _cu_seqlens(case: Case, device: str) -> Tensor | None:
    if not case.packed:
        return None
    ends = torch.tensor([0, *case.lengths]).cumsum(0)
    return ends.to(device, torch.int32)


def arguments(inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
    """Of the module's `attention`."""
    positional = [inputs.leaves["q"], inputs.keys("k"), inputs.keys("v"), inputs.leaves.get("gates"), inputs.phi]
    return positional, {"cu_seqlens": inputs.cu_seqlens}

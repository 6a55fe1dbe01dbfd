"""Inputs of `nsagen verify`: lengths, and tensors from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from nsagen.spec import Spec
from nsagen.tools.random_lists import DTYPES, random_lists

LARGE = 1024  # numbers of a query's heads: from here on the interpreter gets few tokens


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
    """Arguments of one call. Gradients are taken of the leaves: q, k or k.window, gates, phi.weight, …"""

    leaves: dict[str, Tensor]
    phi: nn.Module | None
    blocks: Tensor | None  # the caller's
    cu_seqlens: Tensor | None
    d_out: Tensor
    branches: tuple[str, ...] = field(default=())

    def keys(self, side: str) -> Tensor | dict[str, Tensor]:
        """k or v as the module takes it: a tensor, or one a branch."""
        if side in self.leaves:
            return self.leaves[side]
        return {b: self.leaves[f"{side}.{b}"] for b in self.branches}

    def keys_of(self, side: str, branch: str) -> Tensor:
        return self.leaves[side] if side in self.leaves else self.leaves[f"{side}.{branch}"]


def cases_of(spec: Spec, on_gpu: bool, lengths: tuple[int, ...], packed: bool, dtypes: tuple[str, ...]) -> list[Case]:
    """The lengths asked for, or those where things go wrong: one token, a block less one, ragged tiles, packed ones."""
    dense, together = (lengths, lengths) if lengths else _lengths(spec, on_gpu)
    cases: list[Case] = []
    for dtype in dtypes:
        if not packed:
            cases += [Case((n,), False, dtype, _batch(spec, n, on_gpu)) for n in dense]
        if packed or not lengths:
            cases.append(Case(together, True, dtype))
    return cases


def _lengths(spec: Spec, on_gpu: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(one at a time, packed)."""
    short = max(1, getattr(spec.branches.get("compressed"), "block", 8) - 1)  # no block has ended yet
    if on_gpu:
        return (1, 700, 8192), (1, short, 33, 700, 1, 2050)
    if is_large(spec):
        return (min(40, short + 2),), (1, 2)
    return (1, short, 45), (1, short, 33)


def is_large(spec: Spec) -> bool:
    """The interpreter takes about a second a token: a minute in all."""
    return spec.heads.query * spec.heads.qk_dim > LARGE


def _batch(spec: Spec, tokens: int, on_gpu: bool) -> int:
    return 2 if tokens <= 1024 and (on_gpu or not is_large(spec)) else 1


def inputs_of(module: ModuleType, spec: Spec, case: Case, seed: int, device: str) -> Inputs:
    """Standard normal q, k, v and d_out, gates in [0, 1), φ as it is made; the same on every device."""
    torch.manual_seed(seed)
    h, dtype, rows = spec.heads, DTYPES[case.dtype], (case.batch, case.tokens)
    leaves = {"q": torch.randn(*rows, h.query, h.qk_dim)}
    for suffix in [f".{b}" for b in spec.branches] if spec.kv == "per_branch" else [""]:
        leaves["k" + suffix] = torch.randn(*rows, h.kv, h.qk_dim)
        leaves["v" + suffix] = torch.randn(*rows, h.kv, h.v_dim)
    if spec.combine == "gated_sum":
        leaves["gates"] = torch.rand(*rows, h.query, len(spec.branches))
    d_out = torch.randn(*rows, h.query, h.v_dim).to(device, dtype)
    phi = module.Compressor(dtype=dtype).to(device) if hasattr(module, "Compressor") else None
    blocks = _blocks(spec, case)
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in leaves.items()}
    leaves |= {f"phi.{name}": parameter for name, parameter in phi.named_parameters()} if phi else {}
    cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0).to(device, torch.int32) if case.packed else None
    return Inputs(leaves, phi, None if blocks is None else blocks.to(device), cu_seqlens, d_out, tuple(spec.branches))


def _blocks(spec: Spec, case: Case) -> Tensor | None:
    """Random lists where the caller gives them."""
    selected = spec.branches.get("selected")
    if selected is None or getattr(selected, "scores", "") != "caller":
        return None
    size, count = (int(getattr(selected, name)) for name in ("block", "top_n"))
    position = torch.cat([torch.arange(n) for n in case.lengths])
    return random_lists(position // size, case.batch, spec.heads.kv, count)

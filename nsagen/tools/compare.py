"""One case of `nsagen verify`: the module's call beside the reference's, quantity by quantity."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nsagen.compiler import Compiled
from nsagen.errors import NsagenError
from nsagen.ir.graph import Attend, Select
from nsagen.reference import Reference
from nsagen.tools.cases import Case, Inputs, inputs_of
from nsagen.tools.choice import scores_of
from nsagen.tools.measure import Named, error, finite_where_both_are, gradients

FORWARD = {("fp32", "cpu"): 2e-5, ("fp32", "cuda"): 1e-4}  # 16-bit ones: COARSE
COARSE, GRADIENT, CHOICE = 1e-2, 1e-4, 1e-4
FLOOR = 1e-3  # of the largest gradient norm: some gradients are exactly 0,
NOISE = 10  # and what a kernel has there is rounding alone: so many times the bar
ROOM = 40 << 30  # bytes of float64 tensors that the reference may keep; it takes float32 beyond


@dataclass(frozen=True)
class Result:
    name: str
    error: float
    bar: float
    shape: tuple[int, ...]

    @property
    def good(self) -> bool:
        return self.error <= self.bar  # no NaN passes


def compare(compiled: Compiled, module: ModuleType, case: Case, seed: int, device: str) -> Iterator[Result]:
    """The whole operation, then each public part with inputs of its own kind."""
    with _exact_float32():
        inputs = inputs_of(module, compiled.spec, case, seed, device)
        _require_kernels(inputs.leaves["q"])
        side = _Sides(compiled, module, case, inputs)
        yield from side.whole()
        for node in compiled.graph.nodes:
            if isinstance(node, Attend) and hasattr(module, f"{node.branch}_attention"):
                yield from side.part(node)
            if device == "cuda":
                torch.cuda.empty_cache()


@contextmanager
def _exact_float32() -> Iterator[None]:
    """float32 products in full precision, in the kernels and in the reference."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _require_kernels(q: Tensor) -> None:
    from nsagen.runtime import launch

    if not launch.use_kernels(q):
        raise NsagenError(f"no kernel would run on {q.device.type}: set TRITON_INTERPRET=1 before triton is imported")


class _Sides:
    """Both sides of a case."""

    def __init__(self, compiled: Compiled, module: ModuleType, case: Case, inputs: Inputs) -> None:
        self.graph, self.module, self.case, self.inputs = compiled.graph, module, case, inputs
        self.reference = Reference(compiled.graph)
        self.dtype = _reference_dtype(inputs.leaves["q"])
        self.call: dict[str, Any] = {"cu_seqlens": inputs.cu_seqlens}
        self.pooled = self._pooled()
        self.scored, self.blocks = self._chosen()

    def whole(self) -> Iterator[Result]:
        """out and the gradients of q, k, v, gates and φ, under the blocks that the module chose."""
        if any(isinstance(n, Select) for n in self.graph.nodes):
            yield self._choice()
        ours = self._ours(self.inputs)
        leaves = {name: x.detach().to(self.dtype).requires_grad_() for name, x in self.inputs.leaves.items()}
        theirs = self._theirs(leaves)
        yield self._result("out", ours.pop("out"), theirs.pop("out"))
        yield from self._gradients("", ours, theirs)

    def part(self, node: Attend) -> Iterator[Result]:
        """out, lse and the gradients of one branch by itself."""
        name, listed = f"{node.branch}_attention", node.sources[0].listed
        own = [x.detach().clone().requires_grad_() for x in (self.inputs.leaves["q"], *self._keys(node))]
        lists = (self.blocks,) if listed else ()
        out, lse = getattr(self.module, name)(*own, *lists, **self.call)
        ours = gradients(out, dict(zip("qkv", own, strict=True)), self.inputs.d_out)
        exact = [x.detach().to(self.dtype).requires_grad_() for x in own]
        q, k, v = exact
        ref, ref_lse = self.reference.attend(
            node.branch, q, (k,), (v,), blocks=self.blocks, dtype=self.dtype, **self.call
        )
        theirs = gradients(ref, dict(zip("qkv", exact, strict=True)), self.inputs.d_out)
        yield self._result(f"{name} out", out, ref)
        yield self._result(f"{name} lse", *finite_where_both_are(lse, ref_lse))
        yield from self._gradients(f"{name} ", ours, theirs)

    def _ours(self, inputs: Inputs) -> Named:
        out = self.module.attention(
            inputs.leaves["q"], inputs.keys("k"), inputs.keys("v"), inputs.leaves.get("gates"), inputs.phi,
            blocks=inputs.blocks, dense_below=0, **self.call,
        )  # fmt: skip
        return {"out": out.detach()} | gradients(out, inputs.leaves, inputs.d_out)

    def _theirs(self, leaves: Named) -> Named:
        i = Inputs(leaves, None, None, None, self.inputs.d_out, self.inputs.branches)
        named = self.reference.inputs(
            leaves["q"], i.keys("k"), i.keys("v"), gates=leaves.get("gates"), blocks=self.blocks
        )
        phi = self._exact_phi(leaves)
        out = self.reference.attention(named, phi=phi, dtype=self.dtype, **self.call)
        return {"out": out.detach()} | gradients(out, leaves, self.inputs.d_out)

    def _exact_phi(self, leaves: Named) -> Any:
        """φ with the reference's leaves for parameters; None where it has none and the reference pools itself."""
        names = [name for name in leaves if name.startswith("phi.")]
        if not names or self.inputs.phi is None:
            return None
        phi = copy.deepcopy(self.inputs.phi).to(self.dtype)
        parameters = {name.removeprefix("phi."): leaves[name] for name in names}
        return lambda k, v, cu_seqlens: torch.func.functional_call(phi, parameters, (k, v, cu_seqlens))

    @torch.no_grad()
    def _pooled(self) -> tuple[Tensor, Tensor] | None:
        """The module's own k_cmp and v_cmp."""
        i = self.inputs
        if i.phi is None:
            return None
        return i.phi(i.keys_of("k", "compressed"), i.keys_of("v", "compressed"), cu_seqlens=i.cu_seqlens)

    @torch.no_grad()
    def _chosen(self) -> tuple[Tensor | None, Tensor | None]:
        """(keys that score blocks, the blocks that the whole operation attends to): the caller's, or its own choice."""
        if not hasattr(self.module, "select_blocks"):
            return None, self.inputs.blocks
        q, k = self.inputs.leaves["q"], self.inputs.keys_of("k", "selected")
        keys, lse = scores_of(self.module, q, k, self.pooled, **self.call)
        return keys, self.module.select_blocks(q, keys, lse, **self.call)

    def _choice(self) -> Result:
        assert self.scored is not None
        assert self.blocks is not None
        q = self.inputs.leaves["q"]
        gap = self.reference.choice_gap(self.blocks, q, self.scored, dtype=self.dtype, **self.call)
        return Result("blocks' score gap", gap, CHOICE, tuple(self.blocks.shape))

    def _keys(self, node: Attend) -> tuple[Tensor, Tensor]:
        if not node.sources[0].axis.is_tokens and self.pooled is not None:
            return self.pooled
        return self.inputs.keys_of("k", node.branch), self.inputs.keys_of("v", node.branch)

    def _gradients(self, prefix: str, ours: Named, theirs: Named) -> Iterator[Result]:
        largest = max(float(x.norm()) for x in theirs.values())
        bar = GRADIENT if self.case.dtype == "fp32" else COARSE
        floor = FLOOR * largest
        for name, exact in theirs.items():
            own_bar = bar if float(exact.norm()) >= floor else NOISE * bar
            yield Result(f"{prefix}d{name}", error(ours[name], exact, floor), own_bar, tuple(exact.shape))

    def _result(self, name: str, ours: Tensor, theirs: Tensor) -> Result:
        bar = FORWARD.get((self.case.dtype, ours.device.type), COARSE)
        return Result(name, error(ours, theirs, 0.0), bar, tuple(theirs.shape))


def _reference_dtype(q: Tensor) -> torch.dtype:
    """A graph of three branches keeps about sixteen tensors like q."""
    return torch.float64 if 16 * 8 * q.numel() <= ROOM else torch.float32

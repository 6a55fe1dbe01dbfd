"""What `nsagen bench` times of a module: the whole operation and each of its public parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nsagen.compiler import Compiled
from nsagen.ir.graph import Attend
from nsagen.tools.bench_inputs import Case, Setting, Work, random_blocks
from nsagen.tools.choice import scores_of

NO_GRADIENT = "a choice of blocks has no gradient"


def own_cases(compiled: Compiled, module: ModuleType, setting: Setting, parts: bool) -> list[Case]:
    """The whole operation first."""
    cases = [Case("whole", "whole", _maker(module, setting, _whole))]
    return [*cases, *_parts(compiled, module, setting)] if parts else cases


def _parts(compiled: Compiled, module: ModuleType, setting: Setting) -> Iterator[Case]:
    if hasattr(module, "Compressor"):
        yield Case("compressor", "part", _maker(module, setting, _compressor))
    for node in (n for n in compiled.graph.nodes if isinstance(n, Attend)):
        name = f"{node.branch}_attention"
        if hasattr(module, name):
            if node.sources[0].listed and hasattr(module, "select_blocks"):
                yield Case("select_blocks", "part", _maker(module, setting, _select_blocks), NO_GRADIENT)
            yield Case(name, "part", _maker(module, setting, _attention_of(node)))


@dataclass(frozen=True)
class _Tensors:
    """Everything that a call of the module may need, drawn from one seed."""

    module: Any
    setting: Setting
    length: int
    source: torch.Generator

    def query(self) -> Tensor:
        h = self.setting.spec.heads
        return self.new(h.query, h.qk_dim).requires_grad_()

    def keys(self) -> tuple[Tensor, Tensor]:
        h = self.setting.spec.heads
        return self.new(h.kv, h.qk_dim).requires_grad_(), self.new(h.kv, h.v_dim).requires_grad_()

    def d_out(self) -> Tensor:
        h = self.setting.spec.heads
        return self.new(h.query, h.v_dim)

    def new(self, heads: int, dim: int) -> Tensor:
        return self.setting.randn(self.source, 1, self.length, heads, dim)

    def gates(self) -> Tensor | None:
        spec = self.setting.spec
        if spec.combine != "gated_sum":
            return None
        return self.setting.rand(
            self.source, 1, self.length, spec.heads.query, len(spec.branches)
        ).requires_grad_()  # fmt: skip

    def compressor(self) -> Any:
        """φ as it is made; None where the spec has none."""
        if not hasattr(self.module, "Compressor"):
            return None
        return self.module.Compressor(device=self.setting.device, dtype=self.setting.dtype)

    @torch.no_grad()
    def pooled(self) -> tuple[Tensor, Tensor]:
        return self.compressor()(*self.keys())

    def caller_blocks(self) -> Tensor | None:
        selected = self.setting.spec.branches.get("selected")
        by_caller = getattr(selected, "scores", "") == "caller"
        return random_blocks(self.setting, self.source, self.length) if by_caller else None

    @torch.no_grad()
    def blocks(self, q: Tensor) -> Tensor:
        """Lists for the selected branch alone: the caller's, or those that the module chooses by other keys."""
        lists = self.caller_blocks()
        return self.module.select_blocks(q, *self.scores(q)) if lists is None else lists

    def scores(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The keys that score blocks, and their log-sum-exp."""
        pooled = self.pooled() if hasattr(self.module, "Compressor") else None
        return scores_of(self.module, q, self.keys()[0].detach(), pooled)


def _maker(module: ModuleType, setting: Setting, build: Callable[[_Tensors], Work]) -> Callable[[int, int], Work]:
    def make(length: int, seed: int) -> Work:
        torch.manual_seed(seed)  # φ's parameters
        return build(_Tensors(module, setting, length, setting.source(length, seed)))

    return make


def _whole(of: _Tensors) -> Work:
    spec = of.setting.spec
    q, gates, phi, blocks = of.query(), of.gates(), of.compressor(), of.caller_blocks()
    pairs = {b: of.keys() for b in (spec.branches if spec.kv == "per_branch" else ("all",))}
    k: Any = {b: pair[0] for b, pair in pairs.items()}
    v: Any = {b: pair[1] for b, pair in pairs.items()}
    if spec.kv == "shared":
        k, v = pairs["all"]
    leaves = [q, *(x for pair in pairs.values() for x in pair)]
    leaves += [gates] if gates is not None else []
    leaves += phi.parameters() if phi is not None else []
    attention = of.module.attention  # sparse at every length, so that the break-even shows
    return Work(lambda: (attention(q, k, v, gates, phi, blocks=blocks, dense_below=0),), leaves, [of.d_out()])


def _compressor(of: _Tensors) -> Work:
    phi, (k, v) = of.compressor(), of.keys()
    with torch.no_grad():
        shapes = [x.shape for x in phi(k, v)]
    d_outs = [of.setting.randn(of.source, *shape) for shape in shapes]
    return Work(lambda: phi(k, v), [k, v, *phi.parameters()], d_outs)


def _select_blocks(of: _Tensors) -> Work:
    q = of.query().detach()
    keys, lse = of.scores(q)
    return Work(lambda: (of.module.select_blocks(q, keys, lse),))


def _attention_of(node: Attend) -> Callable[[_Tensors], Work]:
    """One branch by itself, on keys of its own kind."""
    source = node.sources[0]

    def build(of: _Tensors) -> Work:
        attend = getattr(of.module, f"{node.branch}_attention")
        q = of.query()
        k, v = of.keys() if source.axis.is_tokens else (x.requires_grad_() for x in of.pooled())
        lists = (of.blocks(q),) if source.listed else ()
        return Work(lambda: (attend(q, k, v, *lists)[0],), [q, k, v], [of.d_out()])

    return build

"""What the benchmark scripts share: a generated module from its file, seeded inputs, the whole operation on them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("measured", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(module: Any, length: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    h = module.SPEC["heads"]

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    return (
        new(1, length, h["query"], h["qk_dim"]),
        new(1, rows, h["kv"], h["qk_dim"]),
        new(1, rows, h["kv"], h["v_dim"]),
        new(1, length, h["query"], h["v_dim"]),
    )


def operation(
    module: Any, length: int, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[Callable[[], torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """The whole op on seeded inputs, the named tensors that gradients are taken of, and its output's gradient.

    options go to the module's `attention`.
    """
    q, k, v, d_out = inputs(module, length, length, dtype)
    branches = list(module.SPEC["branches"])
    named = {"q": q}
    if module.SPEC["kv"] == "per_branch":
        k, v = ({b: torch.randn_like(x) for b in branches} for x in (k, v))
        named |= {f"k.{b}": x for b, x in k.items()} | {f"v.{b}": x for b, x in v.items()}
    else:
        named |= {"k": k, "v": v}
    gates = None
    if module._LAYOUT.gated:
        gates = named["gates"] = torch.rand(1, length, q.shape[2], len(branches), device="cuda", dtype=dtype)
    phi = module.Compressor(device="cuda", dtype=dtype) if module._LAYOUT.pooled else None
    named |= dict(phi.named_parameters()) if phi is not None else {}
    for x in named.values():
        x.requires_grad_()
    return lambda: module.attention(q, k, v, gates, phi, **options), named, d_out

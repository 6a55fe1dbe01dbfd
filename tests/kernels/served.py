"""Specs of serving's tests, and a module with inputs of whole sequences beside what attention makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from strategies import make_inputs

import nsagen

SMALL = {"query": 2, "kv": 1, "qk_dim": 16, "v_dim": 16}
HEADS = {"query": 6, "kv": 2, "qk_dim": 24, "v_dim": 16}
COMPRESSED = {"block": 8, "stride": 4}
SELECTED = {"block": 8, "top_n": 3, "initial": 1, "local": 1}
WINDOW = {"size": 9, "sinks": 2}
LISTED = {"block": 20, "top_n": 3, "from": "caller"}


def spec(name: str, combine: str, kv: str = "shared", heads: dict[str, int] = HEADS, **branches: Any) -> dict[str, Any]:
    return {"name": name, "heads": heads, "kv": kv, "branches": branches, "combine": combine}


SPECS = {
    "window": spec("serve_window", "single", window=WINDOW),
    "whole": spec(
        "serve_whole",
        "gated_sum",
        "per_branch",
        compressed=COMPRESSED | {"pool": "mlp"},
        selected=SELECTED,
        window=WINDOW,
    ),
    "shared": spec(
        "serve_shared", "gated_sum", compressed=COMPRESSED | {"pool": "mean"}, selected=SELECTED, window=WINDOW
    ),
    "pooled": spec("serve_pooled", "single", selected=SELECTED | {"from": "pooled"}),
    "thirds": spec(  # three keys a block: their scores are kept one by one
        "serve_thirds", "gated_sum", compressed=COMPRESSED | {"pool": "linear"}, selected=SELECTED | {"block": 12}
    ),
    "union": spec("serve_union", "one_softmax", compressed=COMPRESSED | {"pool": "weighted"}, selected=SELECTED),
    "rings": spec(
        "serve_rings", "gated_sum", "per_branch", SMALL, compressed={"block": 4, "stride": 2, "pool": "linear"},
        selected={"block": 4, "top_n": 2, "initial": 1, "local": 1}, window={"size": 3, "sinks": 2},
    ),
    "near": spec(  # a ring that φ and the window read, and pooled keys in pages, in one kernel
        "serve_near", "one_softmax", "shared", SMALL, compressed={"block": 4, "stride": 2, "pool": "mean"},
        window={"size": 3, "sinks": 2},
    ),
}  # fmt: skip


def cut(x: Any, rows: slice) -> Any:
    if x is None:
        return None
    return {b: one[:, rows] for b, one in x.items()} if isinstance(x, Mapping) else x[:, rows]


def packed(x: Any, spans: list[slice]) -> Any:
    """Of sequence i the tokens spans[i], one sequence after another."""
    if x is None:
        return None
    if isinstance(x, Mapping):
        return {b: packed(one, spans) for b, one in x.items()}
    return torch.cat([x[i : i + 1, span] for i, span in enumerate(spans)], 1)


class Served:
    """A spec's module with inputs of whole sequences, what attention makes of them, and a cache."""

    def __init__(
        self,
        name: str,
        tokens: int,
        device: str,
        page: int | None,
        dtype: torch.dtype = torch.float32,
        room: int = 64,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.module: Any = nsagen.load(SPECS[name])
        with torch.no_grad():
            x = make_inputs(SPECS[name], 2, tokens, dtype, device, seed=3)
            self.q, self.k, self.v, self.gates = (detached(one) for one in x)
            torch.manual_seed(3)
            made = hasattr(self.module, "Compressor")
            self.phi = self.module.Compressor(device=device, dtype=dtype) if made else None
        self.cache = self.module.KVCache(2, room, device=device, dtype=dtype, page_size=page, kv_dtype=kv_dtype)

    @cached_property
    def want(self) -> torch.Tensor:
        with torch.no_grad():
            return self.module.attention(self.q, self.k, self.v, self.gates, self.phi)

    def outputs(self, first: int, end: int, decode: bool = False) -> torch.Tensor:
        """Append tokens [first, end) of both sequences."""
        x = [cut(one, slice(first, end)) for one in (self.q, self.k, self.v, self.gates)]
        return (self.module.decode if decode else self.module.prefill)(*x, self.phi, self.cache)

    def step(self, first: int, end: int, decode: bool = False) -> None:
        """Append tokens [first, end) of both sequences; their outputs must be attention's."""
        out = self.outputs(first, end, decode)
        torch.testing.assert_close(out, self.want[:, first:end], rtol=1e-4, atol=2e-5)
        assert self.cache.lengths.tolist() == [end, end]


def detached(x: Any) -> Any:
    if x is None:
        return None
    return {b: one.detach() for b, one in x.items()} if isinstance(x, Mapping) else x.detach()

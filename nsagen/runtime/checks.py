"""What a generated module asks of its arguments: one clear error, before anything runs.

Only shapes, dtypes, devices and strides are read, never values: nothing here waits for the device, and torch.compile
traces it. A last dimension that is not contiguous is copied into one that is, which is no error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from nsagen.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Layout:
    """What a module's spec fixes about its arguments."""

    name: str
    query_heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    branches: tuple[str, ...]
    per_branch: bool  # k and v are mappings from branch to tensor
    gated: bool
    pooled: tuple[str, int, int] | None  # branch, l, d
    caller_blocks: bool  # the selected blocks are an argument
    scored: tuple[int, int] | None = None  # l, d of the keys that score the blocks
    rings: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)  # value of a cache -> rings.Ring


class Checked(NamedTuple):
    """`attention`'s arguments, checked: last dims contiguous, k and v by branch, the scale filled in."""

    q: Tensor
    k: dict[str, Tensor]
    v: dict[str, Tensor]
    gates: Tensor | None  # contiguous
    k_raw: Tensor | None
    scale: float
    cu_seqlens: Tensor | None


def attention(
    layout: Layout,
    q: Tensor,
    k: Tensor | Mapping[str, Tensor],
    v: Tensor | Mapping[str, Tensor],
    gates: Tensor | None,
    phi: Any,
    blocks: Tensor | None,
    k_raw: Tensor | None,
    scale: float | None,
    cu_seqlens: Tensor | None,
) -> Checked:
    """Checks the arguments of the whole operation. Raises InputError for the first rule that one of them breaks."""
    call = _Call(layout, "attention")
    q = call.query(q)
    ks = call.by_branch("k", k, q, layout.qk_dim)
    vs = call.by_branch("v", v, q, layout.v_dim)
    call.presence("gates", gates, layout.gated, "combine: gated_sum")
    call.presence("phi", phi, layout.pooled is not None, "a compressed branch")
    call.presence("blocks", blocks, layout.caller_blocks, "from: caller")
    if gates is not None:
        gates = call.gates(gates, q)
    if phi is not None and not callable(phi):
        call.fail("phi must be callable", type(phi).__name__, "pass an instance of the module's Compressor")
    if blocks is not None:
        call.blocks(blocks, q)
    if k_raw is not None:
        k_raw = call.raw_keys(k_raw, q)
    return Checked(q, ks, vs, gates, k_raw, call.scale(scale), call.sequences(cu_seqlens, q))


def part(
    layout: Layout,
    branch: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
    """Checks the arguments of one branch's attention; those of the compressed one are k_cmp and v_cmp.

    Returns q, k, v, scale, cu_seqlens as `attention` does.
    """
    call = _Call(layout, f"{branch}_attention")
    q = call.query(q)
    cu_seqlens = call.sequences(cu_seqlens, q)
    if layout.pooled is None or branch != layout.pooled[0]:
        k = call.keys("k", k, q, layout.qk_dim)
        v = call.keys("v", v, q, layout.v_dim)
    else:
        k = call.pooled_keys("k_cmp", k, q, layout.qk_dim, layout.pooled[1:], cu_seqlens)
        v = call.pooled_keys("v_cmp", v, q, layout.v_dim, layout.pooled[1:], cu_seqlens)
    return q, k, v, call.scale(scale), cu_seqlens


def pool(layout: Layout, k: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Checks the arguments of `pool_keys`; returns k detached: no gradient flows through the choice."""
    call = _Call(layout, "pool_keys")
    call.tensor("k", k)
    heads, dim = layout.kv_heads, layout.qk_dim
    if k.ndim != 4 or tuple(k.shape[2:]) != (heads, dim):
        call.fail(f"k must be [B, T, {heads}, {dim}]", list(k.shape), "these are the spec's KV heads and qk_dim")
    return k.detach(), call.sequences(cu_seqlens, k)


def score(
    layout: Layout, function: str, q: Tensor, k_cmp: Tensor, scale: float | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """Checks what scores blocks; returns it detached: no gradient flows through the choice."""
    assert layout.scored is not None
    call = _Call(layout, function)
    q = call.query(q)
    cu_seqlens = call.sequences(cu_seqlens, q)
    k_cmp = call.pooled_keys("k_cmp", k_cmp, q, layout.qk_dim, layout.scored, cu_seqlens)
    return q.detach(), k_cmp.detach(), call.scale(scale), cu_seqlens


def select(
    layout: Layout, q: Tensor, k_cmp: Tensor, lse: Tensor, scale: float | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
    """Checks the arguments of `select_blocks`; returns them detached."""
    q, k_cmp, factor, cu_seqlens = score(layout, "select_blocks", q, k_cmp, scale, cu_seqlens)
    call = _Call(layout, "select_blocks")
    call.tensor("lse", lse)
    call.shape("lse", lse, tuple(q.shape[:3]))
    call.same_device("lse", lse, q)
    return q, k_cmp, lse.detach().contiguous(), factor, cu_seqlens


def blocks(layout: Layout, function: str, lists: Tensor, q: Tensor, count: int) -> Tensor:
    """Checks block lists int32 [B, T, Hkv, count] (values are not read: no host sync); returns them contiguous."""
    call = _Call(layout, function)
    call.blocks(lists, q)
    if lists.shape[-1] != count:
        call.fail(f"blocks must list {count} blocks", lists.shape[-1], "the spec's top_n; fill up with −1")
    return lists.contiguous()


def short(layout: Layout, q: Tensor, dense_below: int, cu_seqlens: Tensor | None) -> bool:
    """Whether T < dense_below; that of packed sequences is known on the device alone, which nothing waits for."""
    call = _Call(layout, "attention")
    if isinstance(dense_below, bool) or not isinstance(dense_below, (int, torch.SymInt)) or dense_below < 0:
        call.fail("dense_below must be an integer of 0 or more", repr(dense_below), "pass a number of tokens")
    if dense_below and cu_seqlens is not None:
        rule = "dense_below must be 0 with cu_seqlens (the sequences' lengths stay on the device)"
        call.fail(rule, dense_below, "pass dense_below=0, or the sequences one by one")
    return q.shape[1] < dense_below


def cache(layout: Layout, given: Any, kind: type) -> None:
    """Checks that `given` is a cache of this module."""
    if not isinstance(given, kind):
        _Call(layout, "prefill").fail(
            "cache must be the module's KVCache", type(given).__name__, "make one with KVCache(batch, max_len, …)"
        )


def few(layout: Layout, q: Tensor, most: int) -> None:
    """Checks that a step of decoding has at most `most` tokens a sequence."""
    call = _Call(layout, "decode")
    q = call.query(q)
    if q.shape[1] > most:
        call.fail(f"a step takes up to {most} tokens a sequence", q.shape[1], "use prefill for more")


@dataclass(frozen=True)
class _Call:
    """One call of a module's function; every method checks one argument and returns what the kernels get."""

    layout: Layout
    function: str

    def fail(self, rule: str, got: object, way_out: str) -> NoReturn:
        raise InputError(f"{self.layout.name}.{self.function}: {rule}, got {got}: {way_out}")

    def query(self, q: Tensor) -> Tensor:
        heads, dim = self.layout.query_heads, self.layout.qk_dim
        self.tensor("q", q)
        if q.ndim != 4 or q.shape[2] != heads or q.shape[3] != dim:
            self.fail(f"q must be [B, T, {heads}, {dim}]", list(q.shape), "these are the spec's query heads and qk_dim")
        if q.shape[0] < 1 or q.shape[1] < 1:
            self.fail("q must have B ≥ 1 and T ≥ 1", list(q.shape), "skip the call where there are no tokens")
        if q.dtype not in DTYPES:
            self.fail("q must be float32, bfloat16, float16 or float64", q.dtype, "convert it with .to(dtype)")
        return _last_contiguous(q)

    def by_branch(self, name: str, x: Tensor | Mapping[str, Tensor], q: Tensor, dim: int) -> dict[str, Tensor]:
        branches = self.layout.branches
        if not self.layout.per_branch:
            if isinstance(x, Mapping):
                self.fail(f"{name} must be one tensor (kv: shared)", f"a mapping {list(x)}", "pass the tensor itself")
            shared = self.keys(name, x, q, dim)
            return {branch: shared for branch in branches}
        if not isinstance(x, Mapping):
            rule = f"{name} must be a mapping from branch to tensor (kv: per_branch)"
            self.fail(rule, type(x).__name__, f"pass a dict with the keys {list(branches)}")
        if set(x) != set(branches):
            missing = [branch for branch in branches if branch not in x]
            unknown = [key for key in x if key not in branches]
            rule = f"{name} must have exactly the keys {list(branches)}"
            self.fail(rule, list(x), f"add {missing}, drop {unknown}")
        return {branch: self.keys(f"{name}[{branch!r}]", x[branch], q, dim) for branch in branches}

    def keys(self, name: str, x: Tensor, q: Tensor, dim: int) -> Tensor:
        """Keys or values of tokens, [B, T, Hkv, dim]."""
        self.tensor(name, x)
        self.shape(name, x, (q.shape[0], q.shape[1], self.layout.kv_heads, dim))
        return self.like_query(name, x, q)

    def pooled_keys(
        self, name: str, x: Tensor, q: Tensor, dim: int, axis: tuple[int, int], cu_seqlens: Tensor | None
    ) -> Tensor:
        """Keys or values of blocks of the axis l, d: [B, rows, Hkv, dim]."""
        block, stride = axis
        length = q.shape[1]
        if cu_seqlens is None:
            rows, formula = max(0, (length - block) // stride + 1), "max(0, ⌊(T − l)/d⌋ + 1)"
        else:
            rows, formula = length // stride, "⌊T/d⌋"
        self.tensor(name, x)
        if x.ndim == 4 and x.shape[1] != rows:
            rule = f"{name} must have {rows} rows, {formula} for q's T = {length}, l = {block}, d = {stride}"
            self.fail(rule, x.shape[1], "pool this q's keys with the module's own function for it")
        self.shape(name, x, (q.shape[0], rows, self.layout.kv_heads, dim))
        return self.like_query(name, x, q)

    def raw_keys(self, k_raw: Tensor, q: Tensor) -> Tensor:
        if self.layout.pooled is None:
            self.fail("k_raw must be None without a compressed branch", "a value", "leave it out")
        if self.layout.per_branch:
            branch = self.layout.pooled[0]
            self.fail("k_raw must be None with kv: per_branch", "a value", f"pass un-rotated keys as k[{branch!r}]")
        return self.keys("k_raw", k_raw, q, self.layout.qk_dim)

    def gates(self, gates: Tensor, q: Tensor) -> Tensor:
        self.tensor("gates", gates)
        self.shape("gates", gates, (q.shape[0], q.shape[1], self.layout.query_heads, len(self.layout.branches)))
        if not gates.is_floating_point():
            self.fail("gates must be floating-point", gates.dtype, "convert them with .to(q.dtype)")
        self.same_device("gates", gates, q)
        return gates.contiguous()

    def blocks(self, blocks: Tensor, q: Tensor) -> None:
        self.tensor("blocks", blocks)
        rows = (q.shape[0], q.shape[1], self.layout.kv_heads)
        if blocks.ndim != 4 or tuple(blocks.shape[:3]) != rows:
            self.fail(f"blocks must be {_text(rows, 'n')}", list(blocks.shape), "one list per query and KV head")
        if blocks.dtype != torch.int32:
            self.fail("blocks must be int32", blocks.dtype, "convert them with .int()")
        self.same_device("blocks", blocks, q)

    def scale(self, scale: float | None) -> float:
        if scale is None:
            return self.layout.qk_dim**-0.5
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            self.fail("scale must be a Python number", type(scale).__name__, "pass a float, or None for qk_dim**-0.5")
        if not (math.isfinite(scale) and scale > 0):
            self.fail("scale must be finite and positive", scale, "pass None for qk_dim**-0.5")
        return float(scale)

    def sequences(self, cu_seqlens: Tensor | None, q: Tensor) -> Tensor | None:
        if cu_seqlens is None:
            return None
        self.tensor("cu_seqlens", cu_seqlens)
        if cu_seqlens.dtype != torch.int32:
            self.fail("cu_seqlens must be int32", cu_seqlens.dtype, "convert it with .int()")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
            shape = list(cu_seqlens.shape)
            self.fail("cu_seqlens must be [S + 1] with S ≥ 1", shape, "pass 0 and every sequence's end")
        if q.shape[0] != 1:
            self.fail("B must be 1 with cu_seqlens", f"q {list(q.shape)}", "pack the sequences along T")
        self.same_device("cu_seqlens", cu_seqlens, q)
        return cu_seqlens.contiguous()

    def presence(self, name: str, x: object, wanted: bool, feature: str) -> None:
        """`name` is given iff the spec has `feature`."""
        if wanted and x is None:
            self.fail(f"{name} is required with {feature}", None, f"pass {name}=…")
        if not wanted and x is not None:
            self.fail(f"{name} must be None without {feature}", type(x).__name__, "leave it out")

    def tensor(self, name: str, x: object) -> None:
        if not isinstance(x, Tensor):
            self.fail(f"{name} must be a tensor", type(x).__name__, "pass a torch.Tensor")

    def shape(self, name: str, x: Tensor, expected: tuple[int, ...]) -> None:
        if tuple(x.shape) != expected:
            self.fail(f"{name} must be {list(expected)}", list(x.shape), "B and T are q's, the rest is the spec's")

    def like_query(self, name: str, x: Tensor, q: Tensor) -> Tensor:
        if x.dtype != q.dtype:
            self.fail(f"{name} must have q's dtype {q.dtype}", x.dtype, "convert one of them with .to(dtype)")
        self.same_device(name, x, q)
        return _last_contiguous(x)

    def same_device(self, name: str, x: Tensor, q: Tensor) -> None:
        if x.device != q.device:
            self.fail(f"{name} must be on q's device {q.device}", x.device, "move one of them with .to(device)")


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _text(shape: tuple[int, ...], last: str) -> str:
    return f"[{', '.join(map(str, shape))}, {last}]"

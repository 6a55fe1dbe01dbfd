"""What `nsagen bench --decode` times: a step of the module over a full cache, and of dense attention beside it.

One step in d (the compression stride) ends a compression block and pools it. A context is a multiple of d as a rule, so
the step that ends there is that one, the slowest. So there is a round of steps, that one the last.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from nsagen.errors import NsagenError
from nsagen.tools.bench_inputs import Setting
from nsagen.tools.decode_grid import PLAIN, Point, Serving, round_of
from nsagen.tools.dense import FA3_MODULES, installed
from nsagen.tools.random_lists import random_lists

ROOM = 64  # steps past the context at least, so that several follow each other before any is taken back
WHOLE = 256  # max_len is a multiple: whole blocks of every spec's size
CHUNK = 16 << 20  # numbers of K that are drawn and appended at once
DENSE = ("fa3", "sdpa")


def _nothing(i: int) -> None:
    pass


@dataclass(frozen=True)
class Step:
    """One step, and what brings the cache to where step i of the round begins (outside of the time)."""

    call: Callable[[], Any]
    at: Callable[[int], Any] = _nothing
    round: int = 1  # steps after which they are as before; the last ends at the context


@dataclass(frozen=True)
class Case:
    """What a row or two of the table are of. `make` fills the cache of a point."""

    name: str
    kind: Literal["ours", "dense"]
    make: Callable[[Point], Step]


@dataclass
class _Served:
    """A cache with all of every sequence but the tokens of the round's last step, and the tensors of a step."""

    module: Any
    setting: Setting
    point: Point
    serving: Serving = PLAIN
    source: torch.Generator = field(init=False)
    phi: Any = None

    def __post_init__(self) -> None:
        self.source = self.setting.source(self.point.context, self.point.batch)
        if hasattr(self.module, "Compressor"):
            self.phi = self.module.Compressor(device=self.setting.device, dtype=self.setting.dtype)

    @property
    def round(self) -> int:
        return round_of(self.setting.spec, self.serving.tokens)

    @property
    def before(self) -> int:
        """Tokens of a sequence ahead of the last step."""
        return self.start(self.round - 1)

    def start(self, i: int) -> int:
        """Tokens of a sequence ahead of step i of the round."""
        return self.point.context - self.serving.tokens * (self.round - i)

    def filled(self) -> Any:
        """Keys and values go straight to the cache: nothing attends to them before the step.

        Steps of the round write over the last of them.
        """
        before, batch, heads = self.before, self.point.batch, self.setting.spec.heads
        cache = self.empty(-(-(self.point.context + ROOM * self.serving.tokens) // WHOLE) * WHOLE)
        chunk = max(1, CHUNK // (batch * heads.kv * heads.qk_dim))
        for first in range(0, before, chunk):
            cache.append(*self.keys(min(chunk, before - first)), self.phi, None)
        return cache

    def empty(self, length: int) -> Any:
        """Pages lie in no order, as after other sequences have come and gone."""
        options: dict[str, Any] = {"device": self.setting.device, "dtype": self.setting.dtype}
        if self.serving.page_size:
            options["page_size"] = self.serving.page_size
        if self.serving.fp8:
            options["kv_dtype"] = torch.float8_e4m3fn
        cache = self.module.KVCache(self.point.batch, length, **options)
        if cache.table is not None:
            shuffle = self.setting.source(self.point.batch, self.point.context)  # the same q, k, v in any layout
            order = torch.randperm(cache.table.numel(), generator=shuffle, device=cache.table.device)
            cache.table.copy_(order.view_as(cache.table))
        return cache

    def keys(self, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """k and v of new tokens by branch; one pair under every name where K/V is shared."""
        h, names = self.setting.spec.heads, list(self.setting.spec.branches)
        if self.setting.spec.kv == "shared":
            k, v = self.new(count, h.kv, h.qk_dim), self.new(count, h.kv, h.v_dim)
            return dict.fromkeys(names, k), dict.fromkeys(names, v)
        k, v = ({name: self.new(count, h.kv, dim) for name in names} for dim in (h.qk_dim, h.v_dim))
        return k, v

    def new(self, *shape: int) -> Tensor:
        return self.setting.randn(self.source, self.point.batch, *shape)

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Of `decode`, but for the cache: q, k, v, gates, φ; the caller's lists."""
        spec = self.setting.spec
        count = self.serving.tokens
        k, v = self.keys(count)
        by_branch = spec.kv == "per_branch"
        pair = (k, v) if by_branch else (next(iter(k.values())), next(iter(v.values())))
        gates = None
        if spec.combine == "gated_sum":
            gates = self.setting.rand(self.source, self.point.batch, count, spec.heads.query, len(spec.branches))
        return [self.new(count, spec.heads.query, spec.heads.qk_dim), *pair, gates, self.phi], self.lists()

    def lists(self) -> dict[str, Any]:
        """For every step of the round: no block is later than the first step's own."""
        selected: Any = self.setting.spec.branches.get("selected")
        if getattr(selected, "scores", "") != "caller":
            return {}
        first = self.start(0)
        own = torch.arange(first, first + self.serving.tokens, device=self.setting.device) // selected.block
        heads = self.setting.spec.heads.kv
        return {"blocks": random_lists(own, self.point.batch, heads, selected.top_n, self.source)}


def ours(module: ModuleType, setting: Setting, serving: Serving = PLAIN) -> Case:
    @torch.no_grad()
    def make(point: Point) -> Step:
        torch.manual_seed(0)  # φ's parameters
        of = _Served(module, setting, point, serving)
        cache, (arguments, more) = of.filled(), of.arguments()
        starts = [torch.full_like(cache.lengths, of.start(i)) for i in range(of.round)]
        decode: Any = getattr(module, "decode")  # noqa: B009
        # Not truncate: it refuses what a ring has lost, and what lies there is random anyway.
        return Step(lambda: decode(*arguments, cache, **more), lambda i: cache.lengths.copy_(starts[i]), of.round)

    return Case("nsagen", "ours", make)


def dense(setting: Setting, against: Sequence[str] | None, tokens: int = 1) -> list[Case]:
    """Those asked for, also to say why one cannot run; by default all; their keys lie in a row, in q's dtype."""
    chosen = DENSE if against is None else tuple(n for n in against if n != "none")
    for name in chosen:
        if name not in DENSE:
            raise NsagenError(f"--decode --against knows no {name!r}: choose from {', '.join(DENSE)}, or none")
    makers = {"fa3": ("dense FA3", _fa3), "sdpa": ("dense SDPA", _sdpa)}
    return [
        Case(label, "dense", _maker(setting, make, tokens))
        for label, make in (makers[n] for n in dict.fromkeys(chosen))
    ]


def _maker(setting: Setting, make: Callable[[Setting, Point, int], Step], tokens: int) -> Callable[[Point], Step]:
    return lambda point: make(setting, point, tokens)


def _dense_inputs(setting: Setting, point: Point, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q of the step; k and v of every token, [B, T, H, D]."""
    h, source = setting.spec.heads, setting.source(point.context, point.batch)
    rows = (point.batch, point.context, h.kv)
    q = setting.randn(source, point.batch, tokens, h.query, h.qk_dim)
    return q, setting.randn(source, *rows, h.qk_dim), setting.randn(source, *rows, h.v_dim)


def _sdpa(setting: Setting, point: Point, tokens: int) -> Step:
    from torch.nn.functional import scaled_dot_product_attention

    if tokens > 1:
        raise NsagenError("it has no causal mask for several tokens after others but a dense one")
    q, k, v = (x.transpose(1, 2) for x in _dense_inputs(setting, point, tokens))
    return Step(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True))


def _fa3(setting: Setting, point: Point, tokens: int) -> Step:
    if setting.device != "cuda":
        raise NsagenError("it needs a CUDA device")
    name = installed(FA3_MODULES)
    if not name:
        raise NsagenError("not installed: pip install fa3-fwd")
    attend = importlib.import_module(name).flash_attn_with_kvcache
    q, k, v = _dense_inputs(setting, point, tokens)
    lengths = torch.full((point.batch,), point.context, device=setting.device, dtype=torch.int32)
    return Step(lambda: attend(q, k, v, cache_seqlens=lengths, causal=True))

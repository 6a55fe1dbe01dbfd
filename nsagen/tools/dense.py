"""Causal attention over every token, as torch and FlashAttention-3 compute it: what `nsagen bench` is beside."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from nsagen.tools.bench_inputs import Setting, Work, dense_inputs

FA3_MODULES = ("fa3_fwd_interface", "fa3_fwd", "flash_attn_interface")  # the wheel's names, then upstream's
TILE = 128  # tokens of a block in FlexAttention's mask
Maker = Callable[[Setting, int, int], Work]


def sdpa(backend: str | None) -> Maker:
    """torch's scaled_dot_product_attention by one backend alone, or by torch's own choice."""

    def make(setting: Setting, length: int, seed: int) -> Work:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if backend is None:
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return _heads_first(setting, length, seed, attend)

    return make


def flex(setting: Setting, length: int, seed: int) -> Work:
    """FlexAttention compiled for this length alone, as a user who wants its best would."""
    from torch._functorch import config
    from torch.nn.attention.flex_attention import flex_attention

    config.donated_buffer = False  # so that its backward can be repeated
    if seed == 0:
        torch._dynamo.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    mask = causal_mask(length, setting.device)
    return _heads_first(
        setting, length, seed, lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)
    )  # fmt: skip


def causal_mask(length: int, device: str) -> Any:
    """FlexAttention's causal mask, made of its blocks: no T × T matrix, so it fits at every length."""
    from torch.nn.attention.flex_attention import BlockMask

    count = -(-length // TILE)
    block = torch.arange(count, device=device, dtype=torch.int32)
    every = block.expand(1, 1, count, count).contiguous()
    diagonal = torch.zeros_like(every)
    diagonal[..., 0] = block
    ones = torch.ones(1, 1, count, device=device, dtype=torch.int32)
    return BlockMask.from_kv_blocks(
        ones, diagonal, block.expand(1, 1, count).contiguous(), every,
        BLOCK_SIZE=TILE, mask_mod=_causal, seq_lengths=(length, length),
    )  # fmt: skip


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def fa3(setting: Setting, length: int, seed: int) -> Work:
    attend = importlib.import_module(installed(FA3_MODULES)).flash_attn_func
    q, k, v = (x.detach() for x in dense_inputs(setting, length, seed)[:3])
    return Work(lambda: first(attend(q, k, v, causal=True)))


def first(out: Any) -> tuple[Tensor, ...]:
    """The output alone: some versions give lse too."""
    return (out[0] if isinstance(out, tuple) else out,)


def installed(modules: Sequence[str]) -> str:
    """The first of them that can be imported, or nothing."""
    return next((m for m in modules if find_spec(m)), "")


def _heads_first(setting: Setting, length: int, seed: int, attend: Callable[..., Tensor]) -> Work:
    """torch's attention takes [B, H, T, D]: views, nothing is copied."""
    *leaves, d_out = dense_inputs(setting, length, seed)
    q, k, v = (x.transpose(1, 2) for x in leaves)
    return Work(lambda: (attend(q, k, v),), leaves, [d_out.transpose(1, 2)])

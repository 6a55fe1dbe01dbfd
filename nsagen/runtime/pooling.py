"""Pooled rows of a cache: the blocks that end within a call's new tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nsagen.runtime.recent import New, Recent
from nsagen.runtime.stores import Past, Store


def pool(
    block: int, sources: tuple[Store | Recent, ...], into: tuple[Store, ...], past: Past, new: New,
    phi: Callable[..., Any],
) -> None:  # fmt: skip
    """Pool the blocks that end with the new tokens: of each sequence, from its first block that had not ended on.

    Those stretches are packed, at most block − 1 old tokens a sequence and the new ones. phi(*tokens [1, N, Hkv, D],
    cu_seqlens, start) -> a tensor [1, ⌊N/d⌋, Hkv, D] for each of `into`.
    """
    stride, batch, device = into[0].stride, len(past.lengths), past.lengths.device
    done = ((past.lengths.long() - block) // stride + 1).clamp(min=0)
    start = done * stride
    counts = past.lengths.long() + new.counts - start
    cu = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    row = torch.arange(new.sequence.shape[0] + batch * (block - 1), device=device)
    sequence = torch.searchsorted(cu[1:], row, right=True)
    known = sequence.clamp(max=batch - 1)
    position = start[known] + row - cu[known]
    tokens = [x.flat.read(x.rows(sequence, position, past)).unsqueeze(0) for x in sources]
    out = torch.arange(row.shape[0] // stride, device=device)
    owner = (torch.searchsorted(cu[:-1] // stride, out, right=True) - 1).clamp(min=0)
    number = out - cu[owner] // stride
    ended = number * stride + block <= counts[owner]
    at = into[0].rows(torch.where(ended, owner, batch), done[owner] + number, past)
    for store, x in zip(into, phi(*tokens, cu_seqlens=cu.to(torch.int32), start=start), strict=True):
        store.flat.write(at, x[0])

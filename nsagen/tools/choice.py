"""The blocks that a module chooses, through its public parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def scores_of(
    module: Any, q: Tensor, k: Tensor, pooled: tuple[Tensor, Tensor] | None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(keys that score blocks, their log-sum-exp); k: the selected branch's, pooled: k_cmp and v_cmp if there are."""
    if hasattr(module, "pool_keys"):
        keys = module.pool_keys(k, cu_seqlens=cu_seqlens)
    else:
        assert pooled is not None
        keys = pooled[0]
    if hasattr(module, "score_lse"):
        return keys, module.score_lse(q, keys, cu_seqlens=cu_seqlens)
    return keys, module.compressed_attention(q, *(pooled or ()), cu_seqlens=cu_seqlens)[1]

"""What verify, tune and bench draw alike: dtypes by name, and block lists as a caller would give them. torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHUNK = 4096  # queries whose lists are drawn at once


def random_lists(own: Tensor, batch: int, heads: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """int32 [batch, T, heads, count] on own's device; own int [T]: the block that each query stands in.

    Unique, ascending, −1 last, none after the query's own block; every block up to it is as likely.
    """
    candidates = max(count, int(own.max()) + 1)
    lists: list[Tensor] = []
    for part in own.split(CHUNK):
        rank = torch.rand(batch, len(part), heads, candidates, generator=generator, device=own.device)
        late = torch.arange(candidates, device=own.device) > part[:, None, None]
        best = rank.masked_fill(late, -1.0).topk(count, dim=-1)
        chosen = best.indices.masked_fill(best.values < 0, candidates).sort(-1).values
        lists.append(chosen.masked_fill(chosen == candidates, -1).to(torch.int32))
    return torch.cat(lists, 1)

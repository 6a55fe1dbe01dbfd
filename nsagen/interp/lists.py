"""The inverse of block lists: which queries list a key block, in items of bounded length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nsagen.errors import IRError
from nsagen.ir.graph import BlockList

Array = np.ndarray[Any, Any]
PER_ITEM = 7  # far below what the runtime takes, so that short sequences split their hot blocks too


@dataclass(frozen=True)
class Item:
    """Some of the queries, ascending, that list one key block of one batch entry and KV head."""

    batch: int
    head: int
    block: int
    queries: tuple[int, ...]


def invert(blocks: Array, listed: BlockList | None) -> list[Item]:
    """The items of blocks [B, T, Hkv, n], those of one key block side by side."""
    if listed is None:
        raise IRError("an inverse list needs a walk over listed blocks")
    batch, tokens, heads = blocks.shape[:3]
    found: list[Item] = []
    for b, h, block in np.ndindex(batch, heads, -(-tokens // listed.size)):
        queries = tuple(int(t) for t in np.flatnonzero((blocks[b, :, h] == block).any(-1)))
        parts = [queries[i : i + PER_ITEM] for i in range(0, len(queries), PER_ITEM)]
        found += [Item(b, h, block, part) for part in parts]
    return found

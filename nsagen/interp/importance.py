"""The selection of a graph: the best blocks by importance, from their definition alone."""

from __future__ import annotations

import numpy as np

from nsagen.interp.domains import Array
from nsagen.ir.graph import Select


def importance(node: Select, p: Array, blocks: int) -> Array:
    """[blocks] from p [keys]: each key weighs by the tokens that its block shares with the other, over d.

    From l, d and l', not from the weights that derive_weights found: so the plan's selection checks them.
    """
    axis = node.axis
    start, block = np.arange(len(p)) * axis.stride, np.arange(blocks)[:, None] * node.size
    shared = np.minimum(start + axis.block, block + node.size) - np.maximum(start, block)
    return (np.maximum(shared, 0) / axis.stride) @ p


def best_blocks(node: Select, t: int, scores: Array) -> list[int]:
    """The blocks of the query t, ascending: forced ones, then the best of scores [own + 1], ties to the lower block."""
    own = t // node.size
    forced = [j for j in range(own + 1) if j < node.initial or j > own - node.local]
    others = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-scores[j], j))
    return sorted((forced + others)[: node.count])

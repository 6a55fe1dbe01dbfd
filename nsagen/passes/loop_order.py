"""The loop order of an attention over block lists, by the bytes each moves: by query, or by key block."""

from __future__ import annotations

from nsagen.ir.graph import Attend, Heads
from nsagen.ir.plan import Choice

BYTES = 2  # of an element, in the dtypes that matter
L2 = 11.1e12  # bytes a second of random key blocks out of the L2 cache, by tensor maps; an H200 (docs/performance.md)
MEMORY = 3.2e12  # of rows gathered and parts written and read again, likewise
MARGIN = 1.5  # how much faster the second order must promise to be: the model is off by up to 1.4


def by_blocks(node: Attend, heads: Heads, backward: bool) -> Choice | None:
    """Key block by key block, with the reason, where that moves so much less; None for query by query.

    Query by query, each (query, block) pair reads the block: l'·(Dqk + Dv). Key block by key block it reads the group's
    rows of the query and leaves their part of the result, which is read once more: bytes that shrink with the group.
    """
    if len(node.sources) != 1 or node.sources[0].listed is None or len(node.sources[0].pieces) != 1:
        return None
    rows, block = heads.group * BYTES, node.sources[0].listed.size * (heads.qk_dim + heads.v_dim) * BYTES
    key_grads = rows * (heads.qk_dim + heads.v_dim) / MEMORY if backward else 0.0
    queries = block / L2 + key_grads
    part = 2 * (heads.qk_dim if backward else heads.v_dim)
    blocks = key_grads + rows * (part + (0 if backward else heads.qk_dim)) / MEMORY
    if queries < MARGIN * blocks:
        return None
    return Choice(
        "block_major",
        f"group {heads.group}: a (query, block) pair costs {1e9 * blocks:.2f} ns in parts, against "
        f"{1e9 * queries:.2f} ns for reading the block once a query",
    )

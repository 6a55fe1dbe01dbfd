"""The loop order of an attention over block lists, by the bytes each moves: by query, or by key block."""

from __future__ import annotations

from nsagen.ir.graph import Attend, Heads
from nsagen.ir.plan import Choice
from nsagen.sym import KEY, QUERY, le

BYTES = 2  # of an element, in the dtypes that matter
L2 = 11.1e12  # bytes a second of random key blocks out of the L2 cache, by tensor maps; an H200 (docs/performance.md)
MEMORY = 3.2e12  # of rows gathered and parts written and read again, likewise
DQ_SHARE = 0.87  # of L2, what dq gets of it: it has more to do with a block
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


GRADS = 400e12  # FLOPs a second of dq, dk and dv in one kernel, warp-specialised; an H200 (docs/performance.md)
KEYS_ALONE = 345e12  # of dk and dv in a kernel of their own
MOST_DIMS = (192, 128)  # of keys and values, whose gradients stay in registers
SPECIALISED_GROUPS = (16, 32)  # heads whose rows fill the 16 of a warp; 64 read so many that it never pays
WORTH = 1.15  # how much faster it must promise to be, for 2 GiB of parts


def specialised_by_blocks(node: Attend, heads: Heads) -> Choice | None:
    """dq, dk and dv key block by key block in a warp-specialised kernel, with the reason; None for the other kernels.

    That needs blocks of 64 keys, rows that fill a warp, head dims of whole 64s that fit the registers, a causal mask
    alone, and that it promises to be so much faster.
    """
    if by_blocks(node, heads, backward=True) or len(node.sources) != 1 or len(node.sources[0].pieces) != 1:
        return None
    listed, piece = node.sources[0].listed, node.sources[0].pieces[0]
    if listed is None or listed.size != 64 or piece.where != (le(KEY, QUERY),) or heads.group not in SPECIALISED_GROUPS:
        return None
    qk, v = heads.qk_dim, heads.v_dim
    if qk % 64 or v % 64 or qk > MOST_DIMS[0] or v > MOST_DIMS[1]:
        return None
    rows = heads.group * BYTES
    pair = 2 * heads.group * listed.size  # FLOPs a column of a product
    queries = listed.size * (qk + v) * BYTES / (DQ_SHARE * L2) + pair * 2 * (qk + v) / KEYS_ALONE
    parts = pair * (3 * qk + 2 * v) / GRADS + rows * qk / MEMORY
    if queries < WORTH * parts:
        return None
    return Choice(
        "gradients_by_blocks",
        "a warp copies the rows of the queries that list a block (16-bit on sm_90): a (query, block) pair costs "
        f"{1e9 * parts:.2f} ns, its part of dq and all, against {1e9 * queries:.2f} for dq by query beside dk and dv",
    )

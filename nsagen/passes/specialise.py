"""The tiles of warp-specialised kernels: a warp copies, warpgroups multiply, two of 64 rows as a rule."""

from __future__ import annotations

from dataclasses import replace

from nsagen.ir.graph import Attend, Heads, Source
from nsagen.ir.plan import Kernel, TileConfig
from nsagen.passes.machine import Use
from nsagen.sym import KEY, QUERY, le, moves_along

GROUP_ROWS = 64  # rows of a warpgroup, of whole queries
WARPGROUPS = 2
REGISTERS = 240  # of a warpgroup's thread: two of them, and 24 for the copying one's
SPARE = 200  # of those, for what a row holds
SHAPES = ((64, 2), (64, 3), (64, 4), (128, 2))  # keys of a tile, stages


def queries(group: int) -> int:
    """Of a tile: whole ones in the rows of each warpgroup."""
    return WARPGROUPS * (GROUP_ROWS // group)


def ahead(v_dim: int, others: int) -> int:
    """Keys of a tile up to which `others` terms of two bytes fit in registers beside the products; 0: of no tile.

    A thread has half of a row's output, a quarter of each term's, and a number a key for scores and weights.
    """
    spare = SPARE - v_dim // 2 - others * v_dim // 4
    return max((bn for bn, _ in SHAPES if bn <= spare), default=0)


def specialised_use(kernel: Kernel, bn: int, stages: int) -> Use:
    """Queries, a ring of keys and values, and room for a warpgroup's output on its way to memory, all of two bytes.

    Registers of a warpgroup's thread: the output, the scores of a tile, and the weights of that and the one before.
    """
    qk, v = sum(kernel.qk_parts), sum(kernel.v_parts)
    moved = min(2 * WARPGROUPS * GROUP_ROWS * max(kernel.v_parts), 8192)
    smem = 2 * (WARPGROUPS * GROUP_ROWS * qk + stages * bn * (qk + v)) + moved + 512
    more = 16 * (len(kernel.qk_parts) + len(kernel.v_parts) - 2) + (qk + v) // 32  # where parts and rows lie
    return Use(smem, round(GROUP_ROWS * (v + 2 * bn) / 128) + 40 + more)


def specialised_speed(use: Use, bn: int, stages: int, trips: float) -> float:
    """Fraction of the peak rate, fitted on an H200: wide tiles read a query's rows less often from shared memory."""
    depth = 0.97 if stages * bn < 192 else 1.0
    tight = 0.9 if use.registers > REGISTERS else 1.0  # it may spill
    return depth * tight * bn / (bn + 18) * trips / (trips + 1)


UNITED_QUERIES = 4  # of a tile that share the union of their lists, a warpgroup each
UNITED_GROUPS = (16, 32)  # heads that fill a product's columns, and whose output fits 112 registers a thread
UNITED_LIST = 64  # blocks of a list at most: a warp sorts those of four (runtime/unions.py)
UNITED_SHARE = 0.9  # of the other tiles' time, what it took on random lists of 8k to 64k tokens; an H200


def may_unite(kernel: Kernel, heads: Heads) -> bool:
    """Whether adjacent queries of a forward over lists may share their blocks: of 64 keys, under a causal mask alone.

    Outputs leave through the queries' room in shared memory, part by part.
    """
    if kernel.body != "attend_fwd" or kernel.cached or len(kernel.walks) != 1 or heads.group not in UNITED_GROUPS:
        return False
    listed, where = kernel.walks[0].listed, kernel.walks[0].piece.where
    if listed is None or listed.size != GROUP_ROWS or listed.count > UNITED_LIST or where != (le(KEY, QUERY),):
        return False
    whole = heads.qk_dim % 64 == heads.v_dim % 64 == 0 and heads.v_dim <= 128
    whole = whole and all(o.role != "rest" for o in kernel.operands)
    return whole and kernel.qk_parts[: len(kernel.v_parts)] == kernel.v_parts


def _stages(room: int, each: int) -> int:
    """Of a ring in `room` bytes, `each` a stage: from six on all are under way."""
    return max(2, min(6, room // each))


def united_tile(kernel: Kernel, heads: Heads, smem: int) -> TileConfig:
    """As many blocks on their way as fit in `smem` bytes, beside queries and weights of the warpgroups.

    Registers of a warpgroup's thread: output, scores, weights, and each thread's sums of those.
    """
    qk, v = sum(kernel.qk_parts), sum(kernel.v_parts)
    fixed = 2 * UNITED_QUERIES * heads.group * (qk + GROUP_ROWS) + 2048
    each = 2 * GROUP_ROWS * (qk + v)
    stages = _stages(smem - fixed, each)
    bm, size = UNITED_QUERIES * heads.group, fixed + stages * each
    registers = heads.group * (v + 3 * GROUP_ROWS) // 128 + 48
    spills = 12 * heads.group  # once a tile
    return TileConfig(bm, GROUP_ROWS, 4, stages, size, registers, 1.0, maps=True, specialised=True, spills=spills)


SCORE_GROUPS = (4, 8, 16)  # heads of a group whose rows lie in a warp
SCORE_SHARE = 0.85  # of the other tiles' time: 0.61 to 0.76 at 64k tokens, 0.83 to 0.96 at 8k; an H200


def scoring_warpgroups(qk_dim: int) -> tuple[int, int]:
    """Warpgroups of a tile of scores, and registers of their threads: a row's q takes a quarter of its dims.

    The first one's threads have what is left: 96 and 168.
    """
    return (4, 120) if qk_dim <= 128 else (3, 160)


def may_score_by_rows(kernel: Kernel, heads: Heads) -> bool:
    """Whether rows of importance may be queries × heads: keys of a selection block lie in a lane, heads in a warp."""
    if kernel.body != "select_scores" or kernel.cached or kernel.select is None or kernel.select.grouped == 1:
        return False
    fits = heads.group in SCORE_GROUPS and heads.qk_dim % 64 == 0 and heads.qk_dim <= 192
    return fits and all(moves_along(c, w.axis.stride) for w in kernel.walks for c in w.piece.where)


def scores_tile(kernel: Kernel, heads: Heads, smem: int) -> TileConfig:
    """Queries of all warpgroups, and as many tiles of keys on their way as fit in `smem` bytes.

    Registers of a warpgroup's thread: a row's q, and scores.
    """
    qk = sum(kernel.qk_parts)
    rows = scoring_warpgroups(heads.qk_dim)[0] * GROUP_ROWS
    fixed, each = 2 * rows * qk + 1024, 2 * GROUP_ROWS * qk
    stages = _stages(smem - fixed, each)
    registers = (qk + GROUP_ROWS) // 2 // 2 + GROUP_ROWS // 4 + 40
    size, spills = fixed + stages * each, 1536 // heads.group  # once a tile of queries
    return TileConfig(
        rows // heads.group, GROUP_ROWS, 4, stages, size, registers, 1.0, maps=True, specialised=True, spills=spills
    )


GRADS_STAGES = 4  # steps of 64 rows: an even number, so that a stage is always the same warpgroup's


def grads_tile(kernel: Kernel) -> TileConfig:
    """Of a gradient by blocks: a block's keys and values, the ring, a tile of score gradients for each warpgroup.

    Registers of the warpgroups by turns: dv, two tiles of scores in float32, one in 16 bits.
    """
    qk, v = sum(kernel.qk_parts), sum(kernel.v_parts)
    smem = 2 * GROUP_ROWS * (qk + v) * (1 + GRADS_STAGES) + 2 * WARPGROUPS * GROUP_ROWS * GROUP_ROWS
    smem += 8 * GROUP_ROWS * GRADS_STAGES + 1024  # lse and delta, barriers and what the compiler moves about
    registers = (v + 2 * GROUP_ROWS) // 2 + GROUP_ROWS // 4 + 40
    spills = 150 if qk <= 128 else 900  # the third warpgroup's dk; docs/performance.md, step 40
    return TileConfig(
        GROUP_ROWS, GROUP_ROWS, 4, GRADS_STAGES, smem, registers, 1.0, maps=True, specialised=True, spills=spills
    )


KEYS_TILE, KEYS_STAGES = WARPGROUPS * GROUP_ROWS, 4  # keys of a tile; steps of 64 rows


def keys_name(kernel: str) -> str:
    """Of the specialised form of dk and dv."""
    return "_keys".join(kernel.rsplit("_dkv", 1))


def keys_may_specialise(source: Source, heads: Heads) -> bool:
    """Whether dk and dv of a source have it: one walk of queries in a row, groups and head dims that fill its tiles."""
    dims = heads.qk_dim % 64 == heads.v_dim % 64 == 0 and heads.qk_dim <= 192 and heads.v_dim <= 128
    return source.listed is None and len(source.pieces) == 1 and dims and GROUP_ROWS % heads.group == 0


def keys_are_wide(heads: Heads) -> bool:
    """Whether dk and dv do not fit a warpgroup beside two tiles of scores: dk then has one of its own."""
    return heads.qk_dim > 128


def wide_keys_tile(kernel: Kernel) -> TileConfig:
    """As that of a gradient by blocks, without parts of dq."""
    return replace(grads_tile(kernel), spills=64)


def keys_tile(kernel: Kernel) -> TileConfig:
    """Keys, values, and the ring. Registers: dk, dv, two tiles of scores, two of weights."""
    qk, v = sum(kernel.qk_parts), sum(kernel.v_parts)
    smem = 2 * (qk + v) * (KEYS_TILE + KEYS_STAGES * GROUP_ROWS) + 8 * GROUP_ROWS * KEYS_STAGES + 1024
    registers = (qk + v + 2 * GROUP_ROWS) // 2 + GROUP_ROWS // 2 + 20
    smem += 8 * GROUP_ROWS * KEYS_STAGES if kernel.takes else 0  # another branch's lse and delta
    spills = (150 if kernel.takes else 16) if qk + v == 256 else 0  # around its loops
    return TileConfig(
        GROUP_ROWS, KEYS_TILE, 4, KEYS_STAGES, smem, registers, 1.0, maps=True, specialised=True, spills=spills
    )


QUERIES_KEYS = 64  # keys of a tile


def queries_name(kernel: str) -> str:
    """Of the specialised form of dq."""
    return "_queries".join(kernel.rsplit("_dq", 1))


def queries_may_specialise(node: Attend, heads: Heads) -> bool:
    """Whether dq has it: a tile holds a whole query, and its dims fit."""
    return walks_once(node) and heads.group <= GROUP_ROWS and heads.qk_dim <= 192 and heads.v_dim <= 128


def walks_once(node: Attend) -> bool:
    """Keys of one source, walked once, in a row, under masks that speak of distances; as Kernel.may_specialise asks."""
    source = node.sources[0]
    once = len(node.sources) == len(source.pieces) == 1 and source.listed is None
    return once and all(moves_along(c, source.axis.stride) for c in source.pieces[0].where)


def queries_tile(kernel: Kernel) -> TileConfig:
    """Rows of q and d_out, keys and values, dq on its way. Registers: dq, two tiles of scores, one of weights."""
    qk, v, rows, bn = sum(kernel.qk_parts), sum(kernel.v_parts), WARPGROUPS * GROUP_ROWS, QUERIES_KEYS
    stages = 4 if qk + v <= 256 else 3
    smem = 2 * (rows + stages * bn) * (qk + v) + min(2 * rows * max(kernel.qk_parts), 8192) + 512
    registers = (qk + 2 * bn) // 2 + bn // 4 + 40
    return TileConfig(rows, bn, 4, stages, smem, registers, 1.0, maps=True, specialised=True)

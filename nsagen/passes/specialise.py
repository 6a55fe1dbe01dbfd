"""The tiles of a warp-specialised kernel: a warp copies, two warpgroups of 64 rows multiply."""

from __future__ import annotations

from nsagen.ir.plan import Kernel
from nsagen.passes.machine import Use

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

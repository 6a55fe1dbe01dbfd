"""What choose_tiles knows of the chips: sizes, and a model of a tile's resources and speed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from nsagen.ir.graph import TOKENS, Heads
from nsagen.ir.plan import BN, BT, HEADS_IN_TURN, S0, T0, Body, Kernel, N, Walk
from nsagen.sym import evaluate


@dataclass(frozen=True)
class Arch:
    name: str
    smem: int  # bytes a block can have
    sm: int  # bytes a multiprocessor has, of which every block takes 1 KiB more than it asks for
    wgmma: bool  # tensor cores read both operands from shared memory, from 64 rows on
    maps: bool  # a copy engine takes boxes out of tensors (TMA)
    specialises: bool = False  # kernels whose warps have tasks of their own are written for it (runtime/hopper.py)

    def efficiency(self, body: Body, bits: int, bm: int, bn: int, warps: int, stages: int, trips: float) -> float:
        """Fraction of the peak rate that a tile reaches; constants fitted on an H200 (docs/performance.md).

        rows: a warpgroup wants 64 rows of its own (16 a warp without wgmma). reuse: a short walked tile pays for its
        loads; less where a query walks alone, whose rows never fill a warpgroup. together: warpgroups, or two warps of
        one query, wait for each other. overlap: stages hide loads, but every loop drains its pipeline once a segment.
        """
        if body in HEADS_IN_TURN:
            return self._in_turn(bits, bm, bn, warps, stages, trips)
        wide, narrow = (bn, bm) if body.endswith("dkv") else (bm, bn)
        rows = min(1.0, wide / (16 * warps))
        alone = warps < 4  # one query's heads: warps share out the keys, 16 each
        if alone:
            rows = min(1.0, wide * narrow / (256 * warps))
        if bits == 32:  # full float32 has no tensor cores: only the rows count
            return 0.03 * rows * narrow / (narrow + 16)
        reuse = narrow / (narrow + 8) if alone else min(narrow, 64) / (min(narrow, 64) + 18)
        together = 0.92 if warps > 4 and not body.endswith("dkv") else 0.88 if warps == 2 else 1.0
        hidden = {1: 0.6, 2: 1.0 if body == "score_lse" else 0.93}.get(stages, 1.0)
        if alone:  # many programs hide each other's loads
            hidden = {1: 0.8, 2: 1.0, 3: 1.03}[stages]
        if body == "split_attend":  # streams a run of keys: bound by memory, its rows never fill a warpgroup
            return reuse * hidden
        return rows * reuse * together * hidden * trips / (trips + 1.5 * stages)

    def _in_turn(self, bits: int, bm: int, bn: int, warps: int, stages: int, trips: float) -> float:
        """A key tile stays, q comes by, a head a trip: warpgroups may share out the keys, too."""
        rows = min(1.0, max(bm, min(2 * bm, bn)) / (16 * warps))
        if bits == 32:
            return 0.03 * rows * bn / (bn + 16)
        reuse = 1 / (1 + 18 / bn + 18 / (bm * trips))
        whole = 0.5 if self.wgmma and bm < 64 else 1.0
        together = 0.92 if warps > 4 else 1.0
        return whole * rows * reuse * together * (0.6 if stages == 1 else 1.0) * trips / (trips + 1.5 * stages)

    def filled(self, bits: int, smem: int, warps: int) -> float:
        """What is left of the speed where shared memory lets too few warps share a multiprocessor.

        Measured on an H200 for dq at 64 × 64 (docs/performance.md): four warps reach three quarters of eight's speed.
        Where a query walks alone on tensor cores, seven are enough.
        """
        return min(1.0, 0.5 + self.sm // (smem + 1024) * warps / (7 if warps < 4 and bits == 16 else 14))


ARCHES = (
    Arch("sm_80", 163 << 10, 164 << 10, False, False),
    Arch("sm_90", 227 << 10, 228 << 10, True, True, specialises=True),
    Arch("sm_100", 227 << 10, 228 << 10, True, True),
)


@dataclass(frozen=True)
class Use:
    smem: int
    registers: int


def maps(kernel: Kernel, arch: Arch, bits: int, bn: int) -> bool:
    """Whether all keys can come by tensor maps; the launch decides (runtime/launch.py)."""
    return arch.maps and bits == 16 and bool(kernel.walks) and all(kernel.mapped(w.source, bn) for w in kernel.walks)


def resources(kernel: Kernel, bits: int, bm: int, bn: int, warps: int, stages: int, by_map: bool = False) -> Use:
    """Shared memory: the resident tile plus `stages` of the walked one. Registers: accumulators, scores, pointers."""
    listed = bool(kernel.walks) and all(kernel.follows_lists(w.source) for w in kernel.walks)
    if listed:
        stages = max(1, stages - 1)  # the first stage reads the list
    size, qk, v = bits // 8, sum(kernel.qk_parts), sum(kernel.v_parts)
    threads = 32 * warps
    walked = bn
    if kernel.body == "score_lse":
        smem = size * (bm * qk + stages * bn * qk)
        words = bm * bn * 2
    elif kernel.body in HEADS_IN_TURN:
        smem, v, walked = size * (bn * qk + stages * bm * qk), 0, bm
        words = bm * bn * 2
    elif kernel.body in ("attend_fwd", "split_attend"):
        smem = size * (bm * qk + stages * bn * (qk + v))
        words = bm * (v + bn * (1 + bits / 32))
    elif kernel.body == "attend_list_fwd":
        walked = bm
        smem = size * (bn * (qk + v) + stages * bm * qk)
        words = bm * (v + bn * (1 + bits / 32))
    elif kernel.body == "attend_dq":
        smem = size * (bm * (qk + v) + stages * bn * (qk + v))
        words = bm * (qk + 2 * bn)
    else:
        walked = bm
        smem = size * (bn * (qk + v) + stages * bm * (qk + v) + bm * bn)
        words = bn * (qk + v + 2 * bm)
    by_query = kernel.body in ("attend_fwd", "split_attend", "attend_dq")
    if bits == 16 and by_query and bm < 64:  # mma.sync: operands in registers
        words += bm * (qk + (v if kernel.body == "attend_dq" else 0)) // 2 + bn * qk // 4
    pointers = 2 * walked * (qk + v) / (16 // size)  # one 64-bit address a 16-byte load
    if by_map:
        pointers = 0
    if any(o.role in ("out_parts", "dq_parts") for o in kernel.operands):
        pointers /= 2  # one gather of rows: q and d_out lie alike, and a block's keys are held
    return Use(round(smem), round((words + pointers) / threads) + 40)


def loop_shape(kernel: Kernel, heads: Heads, bm: int, bn: int, bt: int | None = None) -> tuple[float, float]:
    """(waste, trips) of the widest walk on a long sequence; bt: queries of a tile, if not as many as its rows hold.

    waste: score elements computed over elements needed, padded rows and edge tiles included. trips: loop iterations.
    """
    if kernel.body in HEADS_IN_TURN:
        return max(_walk_shape(w, bm, bm, 1, bn)[0] for w in kernel.walks), heads.group
    bt = bt or max(1, bm // heads.group)
    return max(_walk_shape(w, bt, bm, heads.group, bn) for w in kernel.walks)


@lru_cache(maxsize=4096)
def _walk_shape(walk: Walk, bt: int, bm: int, group: int, bn: int) -> tuple[float, float]:
    if walk.listed:
        tiles = -(-walk.listed.size // bn)
        padding = bm / group if walk.direction == "forward" else bm / (bt * group)
        entries = (
            walk.listed.count * tiles if walk.direction == "forward" else walk.listed.size * walk.listed.count / bt
        )
        return tiles * bn / walk.listed.size * padding, entries
    tokens = 65536
    length = evaluate(walk.axis.length(), {TOKENS.name: tokens})
    at = {TOKENS.name: tokens, N.name: length, BT.name: bt, BN.name: bn}
    at |= {T0.name: tokens // 2 // bt * bt, S0.name: length // 2 // bn * bn}
    assert walk.some is not None
    lo, hi = evaluate(walk.some.lo, at), evaluate(walk.some.hi, at)
    step, tile = (bn, bt) if walk.direction == "forward" else (bt, bn)
    walked = max(0, -(-hi // step) * step - lo // step * step)
    padding = bm / (bt * group)
    # The band of what a tile's rows see is slanted: each of them sees fewer than the hi − lo that the tile walks.
    slant = tile / walk.axis.stride if walk.direction == "forward" else tile * walk.axis.stride
    return max(1.0, walked / max(1.0, hi - lo - slant)) * padding, walked / step

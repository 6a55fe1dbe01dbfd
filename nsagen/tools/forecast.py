"""How long a launch takes on an H200: a forecast beside costs.py's bound, fitted to what was measured there.

A tile kernel runs its padded score elements at the rate of its body, pays for each program's start and end, and for
its tail. A query that walks its own list is bound by L2. The rest is bound by memory. Fitted to nsa_128 and nsa_paper
at 8k and 64k tokens in bfloat16 (runtime/shipped); tests/unit/test_forecast.py holds it to 25 % of these times and of
those in benchmarks/results, from 4k to 128k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nsagen.ir.graph import TOKENS
from nsagen.ir.plan import BN, BT, HEADS_IN_TURN, S0, T0, Kernel, Launch, N, Op, Plan, Walk
from nsagen.passes.loop_order import DQ_SHARE, GRADS, KEYS_ALONE, L2
from nsagen.passes.specialise import UNITED_SHARE, queries
from nsagen.sym import evaluate
from nsagen.tools.costs import flops_of_pair, pairs, taken, updated, work_of


@dataclass(frozen=True)
class Rate:
    flops: float  # a second, of padded tiles
    program: float = 0.0  # seconds a program, all multiprocessors at work
    tail: float = 0.0  # seconds a launch


RATES = {
    "attend_fwd": Rate(476e12, 12.2e-9, 49e-6),
    "attend_dq": Rate(584e12, 12.2e-9, 46e-6),
    "attend_dkv": Rate(575e12, 0.0, 70e-6),
    "attend_keys": Rate(680e12, 0.0, 70e-6),
    "attend_wide_keys": Rate(640e12, 0.0, 70e-6),
    "attend_queries": Rate(690e12, 27e-9, 40e-6),
    "attend_list_dkv": Rate(KEYS_ALONE, 0.0, 100e-6),
    "attend_list_grads": Rate(GRADS, 0.0, 40e-6),
    "score_lse": Rate(370e12, 9.3e-9),
    "select_scores": Rate(410e12, 1.0e-9),
}
BY_ROWS = Rate(620e12, 0.0, 50e-6)  # of scores whose rows are queries × heads
SPECIALISED = Rate(690e12, 27e-9, 40e-6)  # of an attend_fwd with a warp that only copies
RIDING = 0.5  # of its own time, what a combination costs in the epilogue of such a kernel
LISTED = {"attend_fwd": L2, "attend_dq": DQ_SHARE * L2}  # bytes a second, of the blocks that each query reads
PARTS = {"attend_list_fwd": 2.95e12, "attend_list_dkv": 2.6e12}  # of rows gathered and parts written; by a prototype
BEST = 2.8e12, 0.5e-9  # a selection: bytes of scores a second, seconds a query and KV head
COPY = 3.9e12
LAUNCH = 4e-6  # seconds: less does not show
INVERSE = 10e-6, 33e-12  # seconds for the inverse of the lists: a call, an entry
SAMPLES = 64  # tiles whose loops are counted


class Tile(NamedTuple):
    bm: int
    bn: int
    specialised: bool = False


def first_choices(plan: Plan, arch: str = "sm_90", bits: int = 16) -> dict[str, Tile]:
    """The tile of every kernel that the model ranks first."""
    tables = {k.name: next((t for t in k.tiles if (t.arch, t.bits) == (arch, bits)), None) for k in plan.kernels}
    first = {name: t.configs[0] for name, t in tables.items() if t}
    return {name: Tile(c.bm, c.bn, c.specialised) for name, c in first.items()}


def seconds(launch: Launch, plan: Plan, tokens: int, tile: Tile) -> float:
    """Of one launch, batch 1, with its kernel's tile."""
    kernel, work = plan.kernel(launch.kernel), work_of(launch, plan, tokens)
    if kernel.body == "select_blocks":
        return LAUNCH + work.bytes / BEST[0] + tokens * plan.heads.kv * BEST[1]
    if not kernel.walks:
        return LAUNCH + work.bytes / COPY
    if kernel.body in PARTS and any(o.role in ("out_parts", "dq_parts") for o in kernel.operands):
        return _parts(kernel, plan, tokens)
    if any(w.listed for w in kernel.walks):
        return _listed(launch, plan, tokens, work.flops) * (UNITED_SHARE if tile.specialised else 1.0)
    return _tiled(kernel, plan, tokens, tile) + updated(launch, plan, tokens) / COPY


def of_op(op: Op, plan: Plan, tokens: int, tiles: dict[str, Tile], form: str = "specialised") -> float:
    """Of an op's launches at that length, with the host's work on block lists between them."""
    launches = taken(op, tokens, form)
    total = sum(in_op(x, plan, tokens, tiles) for x in launches)
    items = [x for x in launches if "items" in dict(x.binds) and plan.kernel(x.kernel).walks]
    if not items:
        return total
    listed = next(w.listed for w in plan.kernel(items[0].kernel).walks if w.listed)
    return total + len(items) * (INVERSE[0] + INVERSE[1] * tokens * plan.heads.kv * listed.count)


def in_op(launch: Launch, plan: Plan, tokens: int, tiles: dict[str, Tile]) -> float:
    """Of one launch, or what its work adds to the specialised kernel that it rides on."""
    return seconds(launch, plan, tokens, tiles[launch.kernel]) * (RIDING if on_another(launch, tiles) else 1.0)


def on_another(launch: Launch, tiles: dict[str, Tile]) -> bool:
    """Whether a specialised kernel does the launch's work."""
    return launch.rides is not None and tiles[launch.rides].specialised


def _seen(kernel: Kernel, tokens: int, leaves: int = 0) -> int:
    """(query, key) pairs of one head, without the last blocks of a list that another kernel takes."""
    return sum(pairs(w.piece, w.axis, tokens, w.listed, leaves) for w in kernel.walks)


def _listed(launch: Launch, plan: Plan, tokens: int, flops: int) -> float:
    heads, kernel = plan.heads, plan.kernel(launch.kernel)
    if kernel.body not in LISTED:
        rate = RATES[kernel.body]
        return rate.tail + flops / rate.flops
    read = _seen(kernel, tokens, launch.leaves) * heads.kv * (heads.qk_dim + heads.v_dim) * 2
    return LAUNCH + read / LISTED[kernel.body]


def _parts(kernel: Kernel, plan: Plan, tokens: int) -> float:
    heads = plan.heads
    size = next(w.listed.size for w in kernel.walks if w.listed)
    dims = heads.qk_dim + heads.v_dim + (0 if kernel.body == "attend_list_fwd" else heads.qk_dim)
    return LAUNCH + _seen(kernel, tokens) / size * heads.query * dims * 2 / PARTS[kernel.body]


def _tiled(kernel: Kernel, plan: Plan, tokens: int, tile: Tile) -> float:
    heads, (bm, bn, specialised) = plan.heads, tile
    in_turn = kernel.body in HEADS_IN_TURN
    forms = {"attend_fwd": SPECIALISED, "select_scores": BY_ROWS} if specialised else {}
    rate = forms.get(kernel.body, RATES[kernel.body])
    halves = specialised and kernel.body in ("attend_fwd", "attend_queries")  # of a tile, whole queries each
    bt = bm if in_turn else queries(heads.group) if halves else max(1, bm // heads.group)
    loops = [_loops(w, bt, bn, tokens) for w in kernel.walks]
    steps = sum(steps for steps, _ in loops) * heads.kv
    elements = steps * bm * bn * (heads.group if in_turn else 1)
    programs = steps if in_turn else max(count for _, count in loops) * heads.kv
    return elements * flops_of_pair(kernel, heads) / rate.flops + programs * rate.program + rate.tail


def _loops(walk: Walk, bt: int, bn: int, tokens: int) -> tuple[float, int]:
    """(loop steps of all tiles, tiles) of a walk, counted on evenly spaced tiles."""
    forward = walk.direction == "forward"
    keys = evaluate(walk.axis.length(), {TOKENS.name: tokens})
    tile, step, length = (bt, bn, tokens) if forward else (bn, bt, keys)
    tiles = -(-length // tile)
    sample = range(0, tiles, max(1, tiles // SAMPLES))
    total = 0
    for i in sample:
        at = {TOKENS.name: tokens, N.name: keys, BT.name: bt, BN.name: bn, T0.name: i * tile, S0.name: i * tile}
        assert walk.some is not None
        lo, hi = evaluate(walk.some.lo, at), evaluate(walk.some.hi, at)
        total += max(0, -(-hi // step) - lo // step)
    return total * tiles / max(1, len(sample)), tiles

"""What an operation has to do at least: (query, key) pairs, FLOPs and bytes, from the plan's formulas.

Pairs are counted on the domain's predicate, key by key, so padding and masked parts of tiles are not in them: the
time that follows is a bound, not a forecast. φ is torch's and not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from nsagen.ir.graph import TOKENS, BlockList, Heads, KeyAxis, Piece
from nsagen.ir.plan import Buffer, Kernel, Launch, N, Op, Plan
from nsagen.sym import KEY, QUERY, Interval, Multiple, Tile, evaluate, some_range, to_text

BYTES = {"input": 2, "gate": 2, "float32": 4, "int32": 4}  # bfloat16 inputs and gates


@dataclass(frozen=True)
class Machine:
    name: str
    flops: float  # a second, bfloat16 matrix products
    bandwidth: float  # bytes a second, a device copy


MOST_SPLITS = 16  # as the runtime's launch has it, which needs torch
H200 = Machine("H200", 700e12, 4.3e12)


@dataclass(frozen=True)
class Work:
    """One launch."""

    kernel: str
    flops: int
    bytes: int

    def seconds(self, machine: Machine) -> float:
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)

    def bound(self, machine: Machine) -> str:
        return "math" if self.flops / machine.flops > self.bytes / machine.bandwidth else "memory"


def keys_of_query(piece: Piece, axis: KeyAxis) -> Interval:
    """Exact: the keys of one query between its bounds (but for congruences, which thin them)."""
    length = TOKENS if axis.is_tokens else N
    return some_range(piece.where, KEY, Tile(QUERY, QUERY, QUERY), length)


def formula(piece: Piece, axis: KeyAxis, listed: BlockList | None = None) -> str:
    """Text of the number of keys that query t sees; of a list's blocks, where all of them are there."""
    at = keys_of_query(piece, axis)
    low, high = to_text(at.lo), to_text(at.hi)
    every = "".join(f", every {c.modulus}th" for c in piece.where if isinstance(c, Multiple))
    seen = (high if low == "0" else f"{high} - {low}") + every
    return f"at most {_in_blocks(listed)} of {seen}" if listed else seen


def _in_blocks(listed: BlockList) -> str:
    """Keys of the query's own block up to itself, and of full blocks before it."""
    return f"{(listed.count - 1) * listed.size} + t % {listed.size} + 1"


@lru_cache(maxsize=256)
def pairs(piece: Piece, axis: KeyAxis, tokens: int, listed: BlockList | None = None, leaves: int = 0) -> int:
    """Σ_t of the keys that query t sees, t < tokens; of a list without its last `leaves` blocks up to t's own."""
    n = evaluate(axis.length(), {TOKENS.name: tokens})
    at = keys_of_query(piece, axis)
    thinned = [c for c in piece.where if isinstance(c, Multiple)]
    if thinned:
        return _thinned(thinned, at, tokens, n)
    seen = f"max(0, {to_text(at.hi)} - ({to_text(at.lo)}))"
    if listed and leaves:
        return _before(listed, leaves, tokens)
    count = _function(f"min({seen}, {_in_blocks(listed)})" if listed else seen)
    return sum(count(t, tokens, n) for t in range(tokens))


def _before(listed: BlockList, leaves: int, tokens: int) -> int:
    """The same of whole blocks alone, those before the last `leaves` ones."""
    most = listed.count - leaves
    return sum(min(max(0, t // listed.size - leaves + 1), most) * listed.size for t in range(tokens))


def _thinned(conditions: list[Multiple], at: Interval, tokens: int, n: int) -> int:
    """As `pairs` under congruences: they depend on t and s only modulo all their moduli."""
    low, high = _function(to_text(at.lo)), _function(to_text(at.hi))
    cycle = math.lcm(*(c.modulus for c in conditions))
    ring = range(cycle)
    residues = {t: [s for s in ring if all(c.holds({"t": t, "s": s}) for c in conditions)] for t in ring}
    total = 0
    for t in range(tokens):
        lo, hi = low(t, tokens, n), high(t, tokens, n)
        total += sum(len(range(lo + (r - lo) % cycle, hi, cycle)) for r in residues[t % cycle])
    return total


def _function(text: str) -> Callable[..., int]:
    return eval(f"lambda t, T, N: {text}")  # text of our own printer, never a user's


def flops_of_pair(kernel: Kernel, heads: Heads) -> int:
    """Of one (query, key) pair of one head: 2 for each multiply-add of the kernel's matrix products."""
    qk, v = heads.qk_dim, heads.v_dim
    keys_grad = 2 * qk + 2 * v
    products = {
        "attend_fwd": qk + v,
        "attend_dq": 2 * qk + v,
        "attend_queries": 2 * qk + v,
        "attend_dkv": keys_grad,
        "attend_keys": keys_grad,
        "attend_wide_keys": keys_grad,
        "attend_list_fwd": qk + v,
        "attend_list_dkv": keys_grad + (qk if any(o.role == "dq_parts" for o in kernel.operands) else 0),
        "attend_list_grads": keys_grad + qk,
        "score_lse": qk,
        "select_scores": qk,
    }
    return 2 * products.get(kernel.body, 0)


def work_of(launch: Launch, plan: Plan, tokens: int) -> Work:
    kernel = plan.kernel(launch.kernel)
    seen = sum(pairs(w.piece, w.axis, tokens, w.listed, launch.leaves) for w in kernel.walks)
    flops = seen * plan.heads.query * flops_of_pair(kernel, plan.heads)
    modes = {o.name: o.mode for o in kernel.operands}
    twice = ("update", "accumulate") if launch.accumulate else ("update",)  # read and written
    sizes = [_size(plan.buffer(b), tokens, plan) * (2 if modes[o] in twice else 1) for o, b in launch.binds]
    left = sum(_left(launch, o, plan.buffer(b), tokens, plan) for o, b in launch.binds)
    return Work(kernel.name, flops, sum(sizes) - left)


def updated(launch: Launch, plan: Plan, tokens: int) -> int:
    """Bytes, read and written, of what the launch completes of another's."""
    modes = {o.name: o.mode for o in plan.kernel(launch.kernel).operands}
    return sum(2 * _size(plan.buffer(b), tokens, plan) for o, b in launch.binds if modes[o] == "update")


def _left(launch: Launch, operand: str, buffer: Buffer, tokens: int, plan: Plan) -> int:
    """Bytes of parts that nobody writes or reads, since another kernel takes their blocks."""
    if operand != "dq_parts" or not launch.leaves:
        return 0
    count = evaluate(buffer.shape[buffer.axes.index("n")], {})
    return _size(buffer, tokens, plan) * launch.leaves // count


def _size(buffer: Buffer, tokens: int, plan: Plan) -> int:
    """Bytes. A workspace that is filled in chunks counts as if whole; one of items as if each block had one, one of
    splits as if there were as many as can be."""
    sizes = [w.listed.size for k in plan.kernels for w in k.walks if w.listed]
    items = plan.heads.kv * -(-tokens // min(sizes, default=1))
    size = BYTES[buffer.dtype]
    at = {"T": tokens, "B": 1, "chunk": tokens, "items": items, "splits": MOST_SPLITS, "shares": 1, "tiles": 1}
    for extent in buffer.shape:
        size *= evaluate(extent, at)
    return size


def work_of_op(op: Op, plan: Plan, tokens: int) -> list[Work]:
    return [work_of(launch, plan, tokens) for launch in taken(op, tokens)]


def taken(op: Op, tokens: int, form: str = "specialised") -> list[Launch]:
    """The op's launches at that length: of a node's variants the one whose guards hold.

    form: "specialised" in 16 bits on sm_90, unless packed; else "plain". As if no key tile were shared.
    """
    found: dict[str, int | str] = {"length": tokens, "form": form, "shares": 1}
    return [x for x in op.launches if all(g.holds(found[g.key]) for g in x.when if g.key in found)]


def saved_bytes(op: Op, gradient: Op, plan: Plan) -> int:
    """A token's share of what the op hands to its gradient: its outputs that the gradient takes."""
    tokens = 1 << 16
    return sum(_size(plan.buffer(x), tokens, plan) for x in op.outputs if x in gradient.inputs) // tokens


def main_ops(plan: Plan) -> list[Op]:
    """Forward and backward of the whole operation (the only attention's, where there is one branch).

    A selection that runs before the attention counts in the forward.
    """
    named = {op.name: op for op in plan.ops}
    forward, backward = next(
        (named[name], named[name + "_grad"])
        for name in ("attention", *(op.name for op in plan.ops if op.doc == "part"))
        if name + "_grad" in named
    )
    ahead = [x for name in ("score_lse", "select_blocks") if "score_lse" in named for x in named[name].launches]
    return [replace(forward, launches=(*ahead, *forward.launches)), backward]


def dense_flops(heads: Heads, tokens: int, backward: bool) -> int:
    """Causal attention over every token, for comparison; backward with the least: five products a pair."""
    products = 3 * heads.qk_dim + 2 * heads.v_dim if backward else heads.qk_dim + heads.v_dim
    return tokens * (tokens + 1) // 2 * heads.query * 2 * products

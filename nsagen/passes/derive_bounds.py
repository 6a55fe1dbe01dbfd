"""derive_bounds: what a tile may see, and what all of it sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nsagen.errors import Refused
from nsagen.ir.graph import TOKENS
from nsagen.ir.plan import BN, BT, S0, T0, Kernel, N, Plan, Walk
from nsagen.sym import KEY, QUERY, Expr, Interval, Symbol, Tile, all_range, const, some_range


@dataclass(frozen=True)
class DeriveBounds:
    """Set `some` and `all` of every walk from its piece's predicate, keys for a query tile or queries for a key tile.

    Holds: all ⊆ {loop | the whole tile sees it} ⊆ {loop | some row sees it} ⊆ some ⊆ [0, length).
    before  walk window forward
    after   range some [max(0, t0 − 511), min(T, t0 + BT))  all [max(0, t0 + BT − 512), t0 + 1)
    """

    name = "derive_bounds"

    def run(self, plan: Plan) -> Plan:
        kernels = tuple(replace(k, walks=tuple(map(_bounded, k.walks)), facts=_facts(k)) for k in plan.kernels)
        return replace(plan, kernels=kernels)


def walk_tile(walk: Walk) -> tuple[Symbol, Tile, Expr, Symbol]:
    """(loop variable, tile, length of the loop's axis, step of the loop) of a walk."""
    if walk.direction == "forward":
        return KEY, Tile(QUERY, T0, T0 + BT - 1), TOKENS if walk.axis.is_tokens else N, BN
    return QUERY, Tile(KEY, S0, S0 + BN - 1), TOKENS, BT


def _bounded(walk: Walk) -> Walk:
    loop, tile, length, _ = walk_tile(walk)
    if walk.listed:
        return replace(walk, some=Interval(const(0), length), refused="the list says which blocks, tile by tile")
    some = some_range(walk.piece.where, loop, tile, length)
    try:
        return replace(walk, some=some, all=all_range(walk.piece.where, loop, tile, length))
    except Refused as refusal:
        return replace(walk, some=some, refused=str(refusal))


def _facts(kernel: Kernel) -> tuple[str, ...]:
    """A row surely sees a key only if a domain holds s = t, for every t: checked on the predicates.

    Of sources that have a softmax each, each must have such a domain.
    """
    if not kernel.body.startswith(("attend", "score_lse")):
        return ()
    own_key = (all if kernel.apart else any)(_sees_itself(w) for w in kernel.walks)
    return () if own_key else ("rows_may_be_empty",)


def _sees_itself(walk: Walk) -> bool:
    from nsagen.sym import AtLeast, as_int, expand, substitute

    if walk.listed or not walk.axis.is_tokens:
        return False  # a list may leave the query's own block out
    for c in walk.piece.where:
        value = as_int(expand(substitute(c.expr, {KEY: QUERY})))
        if value is None or (value < 0 if isinstance(c, AtLeast) else value % c.modulus != 0):
            return False
    return True

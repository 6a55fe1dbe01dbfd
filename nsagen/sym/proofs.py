"""Which conjuncts hold on a whole edge segment, and under what condition on the tile sizes."""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.sym.bounds import Tile, worst_or_best
from nsagen.sym.expr import Expr, Symbol, as_int, expand, linear_coefficient, substitute, symbols_of, terms_of_max
from nsagen.sym.predicate import AtLeast, Conjunct


@dataclass(frozen=True)
class Facts:
    """What is known: tile sizes stay symbolic in a condition; the others have lower bounds, replaced in order."""

    sizes: frozenset[str]
    at_least: tuple[tuple[Symbol, Expr], ...]


@dataclass(frozen=True)
class Proof:
    """The conjunct holds on the segment wherever every `condition` >= 0; None: it cannot be proved at all."""

    conditions: tuple[Expr, ...] | None

    @property
    def always(self) -> bool:
        return self.conditions == ()


UNPROVED = Proof(None)


def below(c: Conjunct, loop: Symbol, ends: tuple[Expr, ...], step: Symbol, tile: Tile, facts: Facts) -> Proof:
    """c on a segment that stops at max(ends) rounded up to `step`.

    The segment is empty where the largest end is 0, so a constant end of 0 proves nothing against it.
    """
    last = tuple(e + step - 2 for e in ends if as_int(e) != 0)
    return _prove(c, loop, last, upper=True, tile=tile, facts=facts)


def above(c: Conjunct, loop: Symbol, ends: tuple[Expr, ...], step: Symbol, tile: Tile, facts: Facts) -> Proof:
    """c on a segment that starts at min(ends) rounded down to `step`."""
    first = tuple(_unclamped(e) - step + 1 for e in ends)
    return _prove(c, loop, first, upper=False, tile=tile, facts=facts)


def _prove(c: Conjunct, loop: Symbol, ends: tuple[Expr, ...], upper: bool, tile: Tile, facts: Facts) -> Proof:
    if not isinstance(c, AtLeast):
        return UNPROVED
    a = linear_coefficient(c.expr, loop)
    if a is None or a == 0 or (a < 0) != upper:
        return UNPROVED  # the segment has no end on the side where c fails
    worst = worst_or_best(c, tile, best=False)
    conditions: list[Expr] = []
    for end in ends:
        value = _least(expand(substitute(worst, {loop: end})), facts)
        if value is None or not symbols_of(value) <= facts.sizes:
            return UNPROVED
        known = as_int(value)
        if known is not None and known < 0:
            return UNPROVED
        if known is None:
            conditions.append(value)
    return Proof(tuple(dict.fromkeys(conditions)))


def _least(value: Expr, facts: Facts) -> Expr | None:
    """A lower bound of value with every symbol of `facts.at_least` replaced by its own lower bound."""
    for symbol, bound in facts.at_least:
        a = linear_coefficient(value, symbol)
        if a is None or a < 0:
            return None
        value = expand(substitute(value, {symbol: bound}))
    return value


def _unclamped(x: Expr) -> Expr:
    """x without the clamp at zero of bounds.py: not above x, and equal to it wherever x > 0."""
    rest = [e for e in terms_of_max(x) if as_int(e) != 0]
    return rest[0] if len(rest) == 1 else x

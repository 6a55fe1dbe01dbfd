"""Bounds of a tile loop from the predicate, in either direction.

A tile fixes one variable to an interval [first, last]; the loop runs over the other. `some` holds every loop
index that any row of the tile may see; `all` holds only indexes that every row sees, where no mask is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.errors import Refused
from nsagen.sym.expr import (
    Expr,
    Given,
    Symbol,
    const,
    expand,
    floordiv,
    linear_coefficient,
    maximum,
    minimum,
    substitute,
)
from nsagen.sym.predicate import AtLeast, Conjunct, Multiple


@dataclass(frozen=True)
class Interval:
    """Half-open [lo, hi)."""

    lo: Expr
    hi: Expr


@dataclass(frozen=True)
class Tile:
    """The tile's variable and its first and last value."""

    var: Symbol
    first: Expr
    last: Expr


def some_range(where: tuple[Conjunct, ...], loop: Symbol, tile: Tile, length: Expr) -> Interval:
    """A superset of {loop | some value of the tile satisfies every conjunct}, within [0, length)."""
    return _range(where, loop, tile, length, best=True)


def all_range(where: tuple[Conjunct, ...], loop: Symbol, tile: Tile, length: Expr) -> Interval:
    """A subset of {loop | every value of the tile satisfies every conjunct}, within [0, length).

    Raises Refused where a conjunct cannot be decided for a whole tile (a congruence).
    """
    for c in where:
        if isinstance(c, Multiple) and c.modulus > 1:
            raise Refused(f"no key tile is free of a congruence modulo {c.modulus}")
    return _range(where, loop, tile, length, best=False)


def _range(where: tuple[Conjunct, ...], loop: Symbol, tile: Tile, length: Expr, best: bool) -> Interval:
    lows: list[Expr] = [const(0)]
    highs: list[Expr] = [length]
    conditions: list[Expr] = []
    for c in where:
        if isinstance(c, Multiple):
            continue  # it only thins a superset
        rest = worst_or_best(c, tile, best)
        a = _coefficient(rest, loop)
        rest = expand(rest - a * loop)
        if a > 0:
            lows.append(floordiv(maximum(0, expand(a - 1 - rest)), a))
        elif a < 0:
            highs.append(floordiv(maximum(0, expand(rest - a)), -a))
        else:
            conditions.append(rest)
    high = minimum(*highs)
    for condition in conditions:
        high = Given(condition, high)
    return Interval(maximum(*lows), high)


def worst_or_best(c: AtLeast, tile: Tile, best: bool) -> Expr:
    """The conjunct's left side with the tile's variable at the end that makes it largest (best) or smallest."""
    a = _coefficient(c.expr, tile.var)
    return expand(substitute(c.expr, {tile.var: tile.last if (a > 0) == best else tile.first}))


def _coefficient(x: Expr, var: Symbol) -> int:
    a = linear_coefficient(x, var)
    if a is None:
        raise Refused(f"{x} is not linear in {var}")
    return a

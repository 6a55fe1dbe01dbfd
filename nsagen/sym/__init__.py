"""Layer 1: integer expressions, predicates over (query, key), bounds and proofs. The only importer of sympy."""

from nsagen.sym.bounds import Interval, Tile, all_range, some_range
from nsagen.sym.expr import (
    Expr,
    Symbol,
    as_int,
    const,
    count,
    down,
    evaluate,
    expand,
    floordiv,
    linear_coefficient,
    maximum,
    minimum,
    substitute,
    symbol,
    symbols_of,
    terms_of_max,
    terms_of_min,
    to_text,
    up,
)
from nsagen.sym.predicate import KEY, QUERY, AtLeast, Conjunct, Multiple, conjunct_text, le, lt, moves_along, multiple
from nsagen.sym.proofs import Facts, Proof, above, below

__all__ = [
    "KEY", "QUERY", "AtLeast", "Conjunct", "Expr", "Facts", "Interval", "Multiple", "Proof", "Symbol", "Tile",
    "above", "all_range", "as_int", "below", "conjunct_text", "const", "count", "down", "evaluate", "expand",
    "floordiv", "le", "linear_coefficient", "lt", "maximum", "minimum", "moves_along", "multiple", "some_range",
    "substitute", "symbol", "symbols_of", "terms_of_max", "terms_of_min", "to_text", "up",
]  # fmt: skip

"""Domains as arrays: where a predicate holds for queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nsagen.errors import IRError
from nsagen.interp.numbers import evaluate
from nsagen.ir.graph import Piece
from nsagen.sym import KEY, QUERY, AtLeast, Conjunct

Array = np.ndarray[Any, Any]


def sees(where: tuple[Conjunct, ...], t: Array, s: Array) -> Array:
    """Where every conjunct holds, for broadcast arrays of queries and keys."""
    seen = np.ones(np.broadcast(t, s).shape, bool)
    for conjunct in where:
        seen &= holds(conjunct, t, s)
    return seen


def holds(conjunct: Conjunct, t: Array, s: Array, sizes: Mapping[str, int] | None = None) -> Array:
    """The conjunct on broadcast arrays of queries and keys; `sizes` binds what else it names (T, N)."""
    value = _linear(conjunct, t, s, dict(sizes or {}))
    return value >= 0 if isinstance(conjunct, AtLeast) else value % conjunct.modulus == 0


def _linear(conjunct: Conjunct, t: Array, s: Array, env: dict[str, int]) -> Array:
    """The left side, from its value at the origin and its two integer slopes."""
    names = (QUERY.name, KEY.name)

    def at(query: int, key: int) -> int:
        return evaluate(conjunct.expr, {**env, names[0]: query, names[1]: key})

    origin = at(0, 0)
    return origin + (at(1, 0) - origin) * t + (at(0, 1) - origin) * s


def union(pieces: tuple[Piece, ...], tokens: int, keys: int) -> Array:
    """[T, keys]: keys inside some piece; no two pieces may hold the same pair."""
    t, s = np.arange(tokens)[:, None], np.arange(keys)[None, :]
    seen = np.zeros((tokens, keys), bool)
    for piece in pieces:
        more = sees(piece.where, t, s)
        if (seen & more).any():
            raise IRError(
                f"piece {piece.name}: (t, key) {tuple(np.argwhere(seen & more)[0])} is in an earlier piece too"
            )
        seen |= more
    return seen

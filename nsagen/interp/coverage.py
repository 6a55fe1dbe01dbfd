"""How often a kernel's walks count every (query, key): once inside the domain, never outside, for any tile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from nsagen.errors import IRError
from nsagen.interp.graph import sees, union
from nsagen.interp.walks import bounds, one_query, steps
from nsagen.ir.plan import Kernel, Plan, Walk
from nsagen.sym import evaluate

Array = np.ndarray[Any, Any]


def count(walks: Iterable[Walk], tokens: int, bm: int, bn: int, group: int) -> Array:
    """[T, keys]: how often the masked segments of walks over one source count each key; a tile is bm // group queries.

    Raises IRError where a step would load past the end of its axis without a guard.
    """
    walks = tuple(walks)
    found = np.zeros((tokens, _keys(walks[0], tokens)), int)
    for walk in walks:
        _add(found, walk, bm, bn, bm // group)
    return found


def check_coverage(plan: Plan, lengths: Iterable[int], tiles: Iterable[tuple[int, int]]) -> None:
    """Raise IRError, naming kernel, t, key and count, unless every attention kernel counts as its pieces say.

    `some` and `all` of every walk are held against the predicate too, tile by tile. Walks over lists are left out:
    the list says what they visit. So are tiles that hold no query.
    """
    tiles = tuple(tiles)
    for tokens in lengths:
        for kernel in plan.kernels:
            for bm, bn in tiles:
                _check(kernel, tokens, bm, bn, bm if one_query(kernel) else plan.heads.group)


def _check(kernel: Kernel, tokens: int, bm: int, bn: int, group: int) -> None:
    walks = [w for w in kernel.walks if not w.listed]
    if bm < group:
        return
    for walk in walks:
        _check_ranges(kernel, walk, tokens, bm, bn, group)
    if kernel.body == "select_scores":
        return  # it tests no mask: scores of blocks that have not ended are never read
    for source in sorted({w.source for w in walks}):
        _check_counts(kernel, [w for w in walks if w.source == source], tokens, bm, bn, group)


def _check_counts(kernel: Kernel, walks: list[Walk], tokens: int, bm: int, bn: int, group: int) -> None:
    where = f"{kernel.name} at T {tokens}, BM {bm}, BN {bn}"
    try:
        found = count(walks, tokens, bm, bn, group)
    except IRError as error:
        raise IRError(f"{where}: {error}") from error
    due = union(tuple(w.piece for w in walks), *found.shape).astype(int)
    wrong = np.argwhere(found != due)
    if len(wrong):
        t, s = (int(x) for x in wrong[0])
        raise IRError(f"{where}: t {t}, key {s}, count {found[t, s]}, not {due[t, s]}")


def _add(found: Array, walk: Walk, bm: int, bn: int, queries: int) -> None:
    """Add what one walk counts."""
    tokens, keys = found.shape
    sizes = {"T": tokens, "N": keys}
    for first, tile, env in _tiles(walk, tokens, bm, bn, queries):
        del first
        for step in steps(walk, env):
            other = step.indices(keys if walk.direction == "forward" else tokens)
            t, s = (tile, other) if walk.direction == "forward" else (other, tile)
            found[np.ix_(t, s)] += step.seen(t[:, None], s[None, :], sizes)


def _tiles(walk: Walk, tokens: int, bm: int, bn: int, queries: int) -> Iterable[tuple[int, Array, dict[str, int]]]:
    """(first, rows inside the axis, what a step's expressions may name) of every tile of a walk."""
    keys = _keys(walk, tokens)
    forward = walk.direction == "forward"
    length, width = (tokens, queries) if forward else (keys, bn)
    sizes = {"T": tokens, "N": keys, "BM": bm, "BT": queries, "BN": bn}
    for first in range(0, length, width):
        yield first, np.arange(first, min(first + width, length)), {**sizes, "t0" if forward else "s0": first}


def _keys(walk: Walk, tokens: int) -> int:
    return evaluate(walk.axis.length(), {"T": tokens})


def _check_ranges(kernel: Kernel, walk: Walk, tokens: int, bm: int, bn: int, group: int) -> None:
    """`some` holds whatever a row of the tile sees, `all` only what the whole tile sees, rows past the end included."""
    forward = walk.direction == "forward"
    loop = np.arange(tokens if not forward else _keys(walk, tokens))
    for first, tile, env in _tiles(walk, tokens, bm, bn, bm // group):
        whole = np.arange(first, first + env["BT" if forward else "BN"])
        for name, interval in (("some", walk.some), ("all", walk.all)):
            if interval is None:
                continue
            lo, hi = bounds(interval, env)
            inside = (loop >= lo) & (loop < hi)
            seen = _seen(walk, tile, loop).any(0) if name == "some" else ~_seen(walk, whole, loop).all(0)
            # some: what is seen lies inside. all: what is not seen by the whole tile lies outside.
            wrong = np.flatnonzero(seen & (~inside if name == "some" else inside))
            line = f"{kernel.name} at T {tokens}, BM {bm}, BN {bn}: walk {walk.piece.name}, tile {first}"
            if lo < hi and (lo < 0 or hi > len(loop)):
                raise IRError(f"{line}: {name} [{lo}, {hi}) leaves [0, {len(loop)})")
            if len(wrong):
                raise IRError(f"{line}: {name} [{lo}, {hi}) is wrong about {int(wrong[0])}")


def _seen(walk: Walk, tile: Array, loop: Array) -> Array:
    """[tile, loop]: the piece's predicate, the tile's variable first."""
    if walk.direction == "forward":
        return sees(walk.piece.where, tile[:, None], loop[None, :])
    return sees(walk.piece.where, loop[None, :], tile[:, None])

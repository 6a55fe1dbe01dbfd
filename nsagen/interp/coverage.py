"""The plan verifier's count: how often the walks of a kernel visit each (query, key), against the domains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from nsagen.errors import IRError
from nsagen.interp.domains import Array, sees
from nsagen.interp.numbers import evaluate
from nsagen.interp.program import rows_per_query
from nsagen.interp.walks import Env, Step, bounds, listed_steps, steps, tested
from nsagen.ir.plan import Kernel, Plan, Walk
from nsagen.sym import Interval


@dataclass(frozen=True)
class Case:
    """A length and tile sizes at which a walk is counted; lists [T, n] of blocks for a walk over listed ones."""

    tokens: int
    bm: int
    bt: int
    bn: int
    lists: Array

    def env(self, walk: Walk) -> Env:
        keys = evaluate(walk.axis.length(), {"T": self.tokens})
        return {"T": self.tokens, "N": keys, "BM": self.bm, "BT": self.bt, "BN": self.bn}

    def __str__(self) -> str:
        return f"T {self.tokens}, BM {self.bm}, BT {self.bt}, BN {self.bn}"


def check_coverage(plan: Plan, lengths: Iterable[int], tiles: Iterable[tuple[int, int]]) -> None:
    """Raise IRError where a walk counts a pair of its piece other than once or any other pair, where the walks of a
    source count a pair twice, or where a range is unsound. tiles: (BM, BN), BM at least a group's rows."""
    lengths, tiles = tuple(lengths), tuple(tiles)
    for kernel in (k for k in plan.kernels if k.walks):
        for case in (c for n in lengths for t in tiles for c in _cases(kernel, plan, n, t)):
            for walk in kernel.walks:
                _check_ranges(walk, case, f"kernel {kernel.name}: walk {walk.piece.name}")
            for source in {w.source for w in kernel.walks}:
                _check_source([w for w in kernel.walks if w.source == source], case, kernel)


def coverage(walk: Walk, case: Case, line: str = "walk") -> Array:
    """[T, keys]: how many segments of the walk count each pair, with the masks they test."""
    env = case.env(walk)
    counts = np.zeros((case.tokens, env["N"]), int)
    for first, step, t, s in _visits(walk, case):
        if walk.listed is None or walk.direction == "forward":
            step.check_loads(line)
        _count(counts, walk, step, t, s, f"{line}: tile at {first}")
    return counts


def expected(walk: Walk, case: Case) -> Array:
    """[T, keys]: 1 in the walk's piece (and the listed blocks), else 0."""
    t, s = np.arange(case.tokens)[:, None], np.arange(case.env(walk)["N"])[None, :]
    seen = sees(walk.piece.where, t, s)
    if walk.listed:
        seen &= (case.lists[:, :, None] == s[None] // walk.listed.size).any(1)
    return seen.astype(int)


# --- visits


def _visits(walk: Walk, case: Case) -> Iterator[tuple[int, Step, Array, Array]]:
    """(tile, step, queries, keys) of every step of every tile."""
    if walk.direction == "forward":
        yield from _forward(walk, case)
    elif walk.listed:
        yield from _inverse(walk, case)
    else:
        for s0 in range(0, case.env(walk)["N"], case.bn):
            for step in steps(walk, case.env(walk) | {"s0": s0}):
                yield s0, step, step.indices, np.arange(s0, s0 + case.bn)


def _forward(walk: Walk, case: Case) -> Iterator[tuple[int, Step, Array, Array]]:
    for t0 in range(0, case.tokens, case.bt):
        env = case.env(walk) | {"t0": t0}
        found = listed_steps(walk, walk.listed, case.lists[t0], env) if walk.listed else steps(walk, env)
        for step in found:
            yield t0, step, np.arange(t0, t0 + case.bt), step.indices


def _inverse(walk: Walk, case: Case) -> Iterator[tuple[int, Step, Array, Array]]:
    """A key block meets the queries that list it, BT of them at a time."""
    size = walk.listed.size if walk.listed else 1
    for s0 in range(0, case.tokens, size):
        queries = np.flatnonzero((case.lists == s0 // size).any(1))
        for segment in walk.segments:
            masks = tested(segment.masks, case.env(walk))
            for at in range(0, len(queries), case.bt):
                step = Step(segment.name, at, case.bt, len(queries), masks)
                yield s0, step, queries[at : at + case.bt], np.arange(s0, s0 + size)


def _count(counts: Array, walk: Walk, step: Step, t: Array, s: Array, line: str) -> None:
    """Add one where the step's masks let (t, s) pass. Rows of the tile past the end are nobody's; walked ones
    past it must be masked by the extent."""
    tokens, keys = counts.shape
    limit = step.limit if walk.direction == "forward" else keys
    seen = step.seen(t[:, None], s[None, :], {"T": limit if walk.listed else tokens, "N": limit})
    inside = (t[:, None] < tokens) & (s[None, :] < limit)
    walked = s[None, :] < limit if walk.direction == "forward" else t[:, None] < tokens
    if (seen & ~walked).any():
        raise IRError(f"{line}: seg {step.segment} counts rows past the end of its axis")
    rows, columns = np.nonzero(seen & inside)
    np.add.at(counts, (t[rows], s[columns]), 1)


# --- checks


def _cases(kernel: Kernel, plan: Plan, tokens: int, tile: tuple[int, int]) -> Iterator[Case]:
    per = rows_per_query(kernel, plan.heads, tile[0])
    if tile[0] >= per:
        size = next((w.listed.size for w in kernel.walks if w.listed), 1)
        yield Case(tokens, tile[0], tile[0] // per, tile[1], _some_lists(tokens, size))


def _some_lists(tokens: int, size: int) -> Array:
    """For every query two thirds of the blocks up to its own; −1 for the others."""
    t, block = np.arange(tokens)[:, None], np.arange(-(-tokens // size))[None, :]
    return np.where((block <= t // size) & ((t + block) % 3 != 1), block, -1)


def _check_source(walks: list[Walk], case: Case, kernel: Kernel) -> None:
    total = 0
    for walk in walks:
        line = f"kernel {kernel.name}: walk {walk.piece.name}"
        counted = coverage(walk, case, line)
        _compare(counted, expected(walk, case), line, case)
        total = total + counted
        _compare(total, np.minimum(total, 1), f"{line} and those before it", case)


def _compare(counted: Array, wanted: Array, line: str, case: Case) -> None:
    wrong = np.argwhere(counted != wanted)
    if len(wrong):
        t, s = (int(x) for x in wrong[0])
        raise IRError(f"{line}: (t, key) ({t}, {s}) is counted {counted[t, s]} times, not {wanted[t, s]}, at {case}")


def _check_ranges(walk: Walk, case: Case, line: str) -> None:
    """some holds all that a row of the tile sees, all holds only what every row sees, both within the axis."""
    env = case.env(walk)
    forward = walk.direction == "forward"
    length, end, width = (env["N"], case.tokens, case.bt) if forward else (case.tokens, env["N"], case.bn)
    for first in range(0, end, width):
        tile, loop = np.arange(first, first + width)[:, None], np.arange(length)[None, :]
        seen = sees(walk.piece.where, tile, loop) if forward else sees(walk.piece.where, loop, tile)
        at = env | {"t0": first, "s0": first}
        if missed := set(np.flatnonzero(seen[tile[:, 0] < end].any(0))) - _held(walk.some, at):
            raise IRError(f"{line}: tile at {first}: some misses {min(missed)}, at {case}")
        if walk.all and (more := _held(walk.all, at) - set(np.flatnonzero(seen.all(0)))):
            raise IRError(f"{line}: tile at {first}: all holds {min(more)}, which some row does not see, at {case}")


def _held(interval: Interval | None, env: Env) -> set[int]:
    return set(range(*bounds(interval, env))) if interval else set()

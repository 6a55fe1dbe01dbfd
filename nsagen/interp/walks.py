"""A plan's walks with numbers for symbols: which steps a tile takes, what each tests, what it may load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from nsagen.errors import IRError
from nsagen.interp.domains import Array, holds
from nsagen.interp.numbers import evaluate
from nsagen.ir.graph import BlockList
from nsagen.ir.plan import BN, BT, Mask, Walk
from nsagen.sym import Interval

Env = dict[str, int]


@dataclass(frozen=True)
class Step:
    """One turn of a segment's loop: indices [at, at + width), `masks` to test; the axis or list ends at `limit`."""

    segment: str
    at: int
    width: int
    limit: int
    masks: tuple[Mask, ...]

    @property
    def guarded(self) -> bool:
        """Whether loads are masked at the end of the axis: only where the extent's mask is tested."""
        return any(m.extent for m in self.masks)

    @property
    def indices(self) -> Array:
        return np.arange(self.at, self.at + self.width)

    def check_loads(self, line: str) -> None:
        """Raise where an unguarded step passes the end of its axis: what split_loops proved is not so."""
        if self.at < 0 or (self.at + self.width > self.limit and not self.guarded):
            rows = f"[{self.at}, {self.at + self.width})"
            raise IRError(f"{line}: seg {self.segment} loads rows {rows} of {self.limit} without a guard")

    def seen(self, t: Array, s: Array, sizes: Mapping[str, int], extents: bool = True) -> Array:
        """Where the tested masks hold, for broadcast arrays of queries and keys; `sizes` binds T and N."""
        seen = np.ones(np.broadcast(t, s).shape, bool)
        for mask in self.masks:
            if extents or not mask.extent:
                seen &= holds(mask.conjunct, t, s, sizes)
        return seen


def steps(walk: Walk, env: Mapping[str, int]) -> Iterator[Step]:
    """The steps of a tile, segment by segment; env binds T, N, BT, BN and the tile's first row, t0 or s0."""
    forward = walk.direction == "forward"
    limit = env["T"] if walk.axis.is_tokens or not forward else env["N"]
    step = env[BN.name if forward else BT.name]
    named = points(walk, env)
    for segment in walk.segments:
        masks = tested(segment.masks, env)
        for at in range(evaluate(segment.lo, named), evaluate(segment.hi, named), step):
            yield Step(segment.name, at, step, limit, masks)


def listed_steps(walk: Walk, listed: BlockList, blocks: Array, env: Mapping[str, int]) -> Iterator[Step]:
    """The steps of a query over its list of blocks: each block in tiles, which end with the block."""
    for segment in walk.segments:
        masks = tested(segment.masks, env)
        for block in (int(x) for x in blocks if x >= 0):
            end = min(env["T"], (block + 1) * listed.size)
            for at in range(block * listed.size, (block + 1) * listed.size, env[BN.name]):
                yield Step(segment.name, at, env[BN.name], end, masks)


def points(walk: Walk, env: Mapping[str, int]) -> Env:
    """env with the ends of the ranges and the cuts, which may name earlier ones."""
    named = dict(env)
    for name, interval in (("some", walk.some), ("all", walk.all)):
        if interval:
            named[f"{name}_lo"], named[f"{name}_hi"] = bounds(interval, env)
    for cut in walk.cuts:
        named[cut.name] = evaluate(cut.at, named)
    return named


def bounds(interval: Interval, env: Mapping[str, int]) -> tuple[int, int]:
    return evaluate(interval.lo, env), evaluate(interval.hi, env)


def tested(masks: tuple[Mask, ...], env: Mapping[str, int]) -> tuple[Mask, ...]:
    """The masks that are not proved at these tile sizes."""
    return tuple(m for m in masks if not (m.unless and all(evaluate(x, env) >= 0 for x in m.unless)))

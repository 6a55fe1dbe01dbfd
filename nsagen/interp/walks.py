"""A plan's walks with numbers for symbols: which steps a tile takes, what each tests, what it may load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsagen.errors import IRError
from nsagen.interp.graph import holds
from nsagen.ir.plan import BN, BT, Kernel, Mask, Walk
from nsagen.sym import Interval, evaluate

Array = np.ndarray[Any, Any]
Env = dict[str, int]


@dataclass(frozen=True)
class Step:
    """One turn of a segment's loop: it starts at `at` and tests `masks`. Its extent is checked on loads."""

    at: int
    width: int
    segment: str
    masks: tuple[Mask, ...]  # those that are tested

    @property
    def guarded(self) -> bool:
        return any(m.extent for m in self.masks)

    def indices(self, length: int) -> Array:
        """What the step loads of an axis of `length` rows. Rows past its end need a guard: the extent's mask."""
        end = self.at + self.width
        if self.at < 0 or (end > length and not self.guarded):
            raise IRError(f"segment {self.segment} loads rows [{self.at}, {end}) of {length} without a guard")
        return np.arange(self.at, max(self.at, min(end, length)))

    def seen(self, t: Array, s: Array, sizes: Mapping[str, int]) -> Array:
        """Where all tested masks hold, for broadcast arrays of queries and keys."""
        seen = np.ones(np.broadcast(t, s).shape, bool)
        for mask in self.masks:
            seen &= holds(mask.conjunct, t, s, sizes)
        return seen


def steps(walk: Walk, env: Mapping[str, int]) -> list[Step]:
    """The steps of a tile; env binds T, N, BM, BT, BN and the tile's first row, t0 or s0."""
    named = {**env, **ends(walk, env)}
    for cut in walk.cuts:  # in order: a cut may name earlier ones
        named[cut.name] = evaluate(cut.at, named)
    step = named[(BN if walk.direction == "forward" else BT).name]
    found: list[Step] = []
    for segment in walk.segments:
        masks = tested(segment.masks, env)
        for at in range(evaluate(segment.lo, named), evaluate(segment.hi, named), step):
            found.append(Step(at, step, segment.name, masks))
    return found


def ends(walk: Walk, env: Mapping[str, int]) -> Env:
    """The ends of the walk's ranges, by the names that the cuts use."""
    found: Env = {}
    for name, interval in (("some", walk.some), ("all", walk.all)):
        if interval:
            found[f"{name}_lo"], found[f"{name}_hi"] = bounds(interval, env)
    return found


def bounds(interval: Interval, env: Mapping[str, int]) -> tuple[int, int]:
    return evaluate(interval.lo, dict(env)), evaluate(interval.hi, dict(env))


def tested(masks: tuple[Mask, ...], env: Mapping[str, int]) -> tuple[Mask, ...]:
    """The masks that are not proved at these tile sizes."""
    return tuple(m for m in masks if not (m.unless and all(evaluate(x, dict(env)) >= 0 for x in m.unless)))


def one_query(kernel: Kernel) -> bool:
    """Whether a tile of the kernel holds one query: its list decides which keys the tile walks."""
    return any(w.listed and w.direction == "forward" for w in kernel.walks)

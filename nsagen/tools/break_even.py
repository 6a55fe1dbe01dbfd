"""From which length on one operation is faster than another, by their times at a few lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BreakEven:
    """`where`: between (then `length`), below the shortest length measured, above the longest one, or unknown."""

    where: str
    length: int | None = None
    shortest: int | None = None
    longest: int | None = None
    against: str | None = None  # the rival at that place

    @property
    def text(self) -> str:
        rival = f" ({self.against})" if self.against else ""
        return {
            "between": f"about {self.length:,} tokens{rival}" if self.length else "",
            "below": f"below the shortest length, {self.shortest} tokens{rival}",
            "above": f"above the longest length, {self.longest} tokens{rival}",
            "unknown": "unknown: no length at which both were measured",
        }[self.where]


def fastest(rivals: Mapping[str, Mapping[int, float]]) -> tuple[dict[int, float], dict[int, str]]:
    """At each length the least time of any rival, and whose it is.

    A length is left out where the fastest of the length before has no time: a slower rival would stand in for it.
    """
    times: dict[int, float] = {}
    names: dict[int, str] = {}
    champion: str | None = None
    for length in sorted({n for measured in rivals.values() for n in measured}):
        there = {name: measured[length] for name, measured in rivals.items() if length in measured}
        if champion is None or champion in there:
            names[length] = champion = min(there, key=there.__getitem__)
            times[length] = there[champion]
    return times, names


def break_even(ours: Mapping[int, float], rivals: Mapping[str, Mapping[int, float]]) -> BreakEven:
    """The length from which on `ours` stays faster than the fastest rival.

    Between two lengths both times are taken as powers of the length: straight lines in a log-log picture.
    """
    theirs, names = fastest(rivals)
    lengths = sorted(ours.keys() & theirs.keys())
    if not lengths:
        return BreakEven("unknown")
    lead = {n: math.log(theirs[n] / ours[n]) for n in lengths}  # above 0: ours is faster
    ends = {"shortest": lengths[0], "longest": lengths[-1]}
    slower = [n for n in lengths if lead[n] <= 0]
    if not slower:
        return BreakEven("below", **ends, against=names[lengths[0]])
    if slower[-1] == lengths[-1]:
        return BreakEven("above", **ends, against=names[lengths[-1]])
    low = slower[-1]
    high = lengths[lengths.index(low) + 1]
    share = -lead[low] / (lead[high] - lead[low])
    crossing = math.exp(math.log(low) + share * math.log(high / low))
    return BreakEven("between", round(crossing), **ends, against=names[high if share > 0.5 else low])

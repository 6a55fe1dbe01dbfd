"""The search of `nsagen tune`: which candidates to measure together, which of them fails, what is kept.

Times come from a measurer, so nothing here needs a GPU. A round runs the whole operation once with a candidate of
every kernel: the kernels' times are told apart by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Protocol

from nsagen.errors import NsagenError
from nsagen.runtime import tuned

if TYPE_CHECKING:
    from nsagen.runtime.launch import Config

Tried = dict[str, "Config"]  # kernel -> the candidate it runs with; the others run with their first choice
Rounds = list[Tried]


class CandidateFailed(NsagenError):
    """A candidate does not compile, does not fit, or computes something else."""


class TooLarge(NsagenError):
    """The GPU's memory does not hold the inputs and what is made of them."""


class DeviceLost(NsagenError):
    """A candidate left the GPU unusable for this process."""


class Measurer(Protocol):
    def prepare(self) -> None:
        """Run every kernel with its first choice, for its results. Raises CandidateFailed."""

    def __call__(self, tried: Tried) -> dict[str, float]:
        """Milliseconds of each kernel of `tried`. Raises CandidateFailed, DeviceLost or TooLarge."""
        ...


@dataclass(frozen=True)
class Subject:
    """A kernel with its candidates for the GPU at hand, the model's first choice first."""

    kernel: str
    key: str
    configs: tuple[Config, ...]
    lengths: tuple[int, int | None] = (0, None)  # as launch.Tiles has them

    def runs_at(self, length: int) -> bool:
        least, end = self.lengths
        return least <= length and (end is None or length < end)

    def config(self, label: str) -> Config:
        return next(c for c in self.configs if c.label == label)

    @property
    def labels(self) -> list[str]:
        return [c.label for c in self.configs]


def known(subject: Subject, place: tuned.Place) -> tuned.Times:
    """What was measured of the subject's candidates at exactly this place."""
    times = tuned.measured(subject.kernel, subject.key).get(place, {})
    return {label: times[label] for label in subject.labels if label in times}


def rounds(subjects: Sequence[Subject], place: tuned.Place, force: bool = False) -> Rounds:
    """The candidates not measured yet (all, if forced), side by side: the i-th of every kernel in round i.

    A kernel that does not run at that length has none.
    """
    subjects = [s for s in subjects if s.runs_at(place.length)]
    pending = [_pending(s, {} if force else known(s, place)) for s in subjects]
    named = [(s.kernel, configs) for s, configs in zip(subjects, pending, strict=True) if configs]
    columns = zip_longest(*(configs for _, configs in named))
    return [{k: c for (k, _), c in zip(named, column, strict=True) if c is not None} for column in columns]


def _pending(subject: Subject, times: tuned.Times) -> list[Config]:
    return [c for c in subject.configs if c.label not in times]


def search(
    subjects: Sequence[Subject],
    place: tuned.Place,
    wanted: Rounds,
    measurer: Measurer,
    report: Callable[[Tried, tuned.Times], None],
) -> None:
    """Measure the rounds and keep each at once: whoever interrupts goes on after the last whole one."""
    by_name = {s.kernel: s for s in subjects}
    if wanted:
        measurer.prepare()
    for tried in wanted:
        for kernel, ms in attempts(measurer, tried):
            subject = by_name[kernel]
            times: tuned.Times = {tried[kernel].label: ms}
            tuned.record(kernel, subject.key, place, times)
            report({kernel: tried[kernel]}, times)


def attempts(measure: Callable[[Tried], Mapping[str, float]], tried: Tried) -> Iterator[tuple[str, float | None]]:
    """(kernel, milliseconds), None for one that fails: found by halving until it fails alone."""
    try:
        yield from measure(tried).items()
    except DeviceLost:
        if len(tried) == 1:
            yield next(iter(tried)), None  # kept, so that the next run passes it by
        raise
    except CandidateFailed:
        names = list(tried)
        if len(names) == 1:
            yield names[0], None
            return
        half = len(names) // 2
        for part in (names[:half], names[half:]):
            yield from attempts(measure, {name: tried[name] for name in part})

"""What `nsagen tune` shows while it works: a bar a kernel, on stderr; lines instead where that is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn

from nsagen.runtime import tuned
from nsagen.tools.tune_search import Rounds, Subject, Tried


class Board:
    """The kernel, its candidate, and the best so far."""

    def __init__(self, progress: Progress, subjects: Sequence[Subject], place: tuned.Place, wanted: Rounds) -> None:
        self.progress, self.place, self.tasks = progress, place, dict[str, TaskID]()
        self.subjects = {s.kernel: s for s in subjects}
        self.best = {s.kernel: _best(s, place) for s in subjects}
        for kernel in dict.fromkeys(k for tried in wanted for k in tried):
            total = sum(kernel in tried for tried in wanted)
            self.tasks[kernel] = progress.add_task(kernel, total=total, now="", best=self.best[kernel])

    def measured(self, tried: Tried, times: tuned.Times) -> None:
        for kernel, config in tried.items():
            ms = times[config.label]
            now = f"{config.label} {'failed' if ms is None else f'{ms:.3f} ms'}"
            self.best[kernel] = _best(self.subjects[kernel], self.place)
            self.progress.update(self.tasks[kernel], advance=1, now=now, best=self.best[kernel])
            if not self.progress.console.is_terminal:
                print(f"{self.place.length} {kernel}: {now}, {self.best[kernel]}", file=sys.stderr, flush=True)


def _best(subject: Subject, place: tuned.Place) -> str:
    times = tuned.measured(subject.kernel, subject.key).get(place, {})
    label = tuned.best(times, subject.labels)
    return f"best {label} {times[label]:.3f} ms" if label else ""


def columns() -> tuple[ProgressColumn, ...]:
    now, best = TextColumn("{task.fields[now]}"), TextColumn("[bold]{task.fields[best]}")
    return TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), now, best, TimeElapsedColumn()


@contextmanager
def board(subjects: Sequence[Subject], place: tuned.Place, wanted: Rounds) -> Iterator[Board]:
    console = Console(stderr=True)
    with Progress(*columns(), console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Board(progress, subjects, place, wanted)

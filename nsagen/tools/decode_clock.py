"""The clock of `nsagen bench --decode`: milliseconds of a step, eager and in a CUDA graph; a failure is a reason.

What a user sees a step: the mean over a round, the steps up to the context of which some end a compression block.
In a graph: the time on the device, each step after a write of 256 MiB (so nothing of it lies in L2, as in a model,
where other layers come between). Eager: steps one after the other, the host's work included.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from nsagen.errors import NsagenError
from nsagen.tools.bench_clock import clear, reason_of, wall
from nsagen.tools.decode_cases import Case, Step
from nsagen.tools.decode_grid import Point
from nsagen.tools.kernel_times import kernel_times

FLUSH = 256 << 20  # bytes, more than any L2
COPY = 1 << 30
RUN = 8  # eager steps in a row at least, in whole rounds
LEAST, MOST = 5, 2000  # times of each step of a round, or runs, at least; steps at most
PROFILED = 20  # steps at least, and
ROUNDS = 3  # of them, whose median is no outlier
NO_GRAPH = "there are no CUDA graphs on the CPU"
Times = tuple[float, float | None]  # ms of a step, the mean over the round; of the slowest, where they are told apart


@dataclass(frozen=True)
class Row:
    """One case at one point; None where there is no number, and then a reason."""

    name: str
    kind: str  # ours, dense or bytes
    context: int
    batch: int
    ms: float | None = None  # of a step: the mean of the medians of a round's steps
    reason: str | None = None
    kernels: dict[str, float] | None = None  # µs of each, of our step in a graph, the mean over the round too
    slowest_ms: float | None = None  # the greatest of those medians; None where steps are timed in a row
    round: int = 1  # steps that ms is the mean over

    @property
    def point(self) -> Point:
        return Point(self.context, self.batch)

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Clock:
    device: str
    rep: int  # ms of one measurement
    rows: list[Row] = field(default_factory=list)
    _flush: Any = None

    def of(self, case: Case, point: Point) -> list[Row]:
        """A row eager (of ours) and one in a graph; raises nothing but an interrupt."""
        wanted = [("in a graph", self._graphed)]
        if case.kind == "ours" or self.device != "cuda":
            wanted.insert(0, ("eager", self._eager))
        found: list[Row] = []
        try:
            with torch.no_grad():
                step = case.make(point)
                found += [self._row(f"{case.name} {how}", case.kind, point, step, time_of) for how, time_of in wanted]
                found[-1] = self._with_kernels(found[-1], step)
                del step
        except Exception as error:
            found = [Row(f"{case.name} {how}", case.kind, *_place(point), reason=reason_of(error)) for how, _ in wanted]
        finally:
            clear(self.device)
        self.rows += found
        return found

    def _row(self, name: str, kind: str, point: Point, step: Step, time_of: Callable[[Step], Times]) -> Row:
        try:
            ms, slowest = time_of(step)
            return Row(name, kind, *_place(point), ms=ms, slowest_ms=slowest, round=step.round)
        except Exception as error:
            return Row(name, kind, *_place(point), reason=reason_of(error))

    def _with_kernels(self, row: Row, step: Step) -> Row:
        """Of ours in a graph; without what the profiler can't tell, a time is a time still."""
        if row.kind != "ours" or row.ms is None or self.device != "cuda":
            return row
        replay = captured(step)

        def before(i: int) -> None:
            step.at(i)
            self._overwrite()

        try:
            rounds = max(ROUNDS, _rounds(PROFILED, step))
            return replace(row, kernels=kernel_times(replay, before, step.round, rounds) or None)
        except Exception as error:
            return replace(row, reason=f"its kernels: {reason_of(error)}")

    def _eager(self, step: Step) -> Times:
        step.at(0)
        step.call()  # compiles
        if self.device == "cuda":
            return statistics.median(self._runs(step)), None
        turn = itertools.cycle(range(step.round))
        return over_round(wall(step.call, lambda: step.at(next(turn)), self.rep, LEAST * step.round, MOST), step.round)

    def _runs(self, step: Step) -> list[float]:
        """ms a step of runs of whole rounds; the steps of a run follow each other."""
        times: list[float] = []
        run = _rounds(RUN, step) * step.round
        while len(times) < LEAST or (sum(times) * run < self.rep and len(times) < MOST // run):
            step.at(0)
            torch.cuda.synchronize()
            start, end = _events(1)[0]
            start.record()
            for _ in range(run):
                step.call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / run)
        return times

    def _graphed(self, step: Step) -> Times:
        """Of about `rep` ms of steps, whatever the round."""
        if self.device != "cuda":
            raise NsagenError(NO_GRAPH)
        replay = replace(step, call=captured(step))
        guess = statistics.median(self._cold(replay, _rounds(LEAST, step)))
        count = min(MOST, int(self.rep / guess))
        return over_round(self._cold(replay, max(LEAST, count // step.round)), step.round)

    def _cold(self, step: Step, rounds: int) -> list[float]:
        """ms of every step of the rounds. The write before each step hides the host's part of it, too."""
        events = _events(rounds * step.round)
        for i, (start, end) in enumerate(events):
            step.at(i % step.round)
            self._overwrite()
            start.record()
            step.call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def _overwrite(self) -> None:
        """All of L2."""
        if self._flush is None:
            self._flush = torch.empty(FLUSH, dtype=torch.int8, device=self.device)
        self._flush.zero_()


def over_round(times: Sequence[float], round: int) -> tuple[float, float]:
    """Mean and greatest of the medians of a round's steps; `times` of them in turn, from the first on."""
    medians = [statistics.median(times[i::round]) for i in range(round)]
    return statistics.fmean(medians), max(medians)


def captured(step: Step) -> Callable[[], None]:
    """The step as a CUDA graph, which keeps its output alive; it must have room for three more."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and fills the allocator
        for _ in range(2):
            step.at(0)
            step.call()
    torch.cuda.current_stream().wait_stream(stream)
    step.at(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step.call()

    def replay(kept: Any = out) -> None:
        graph.replay()

    return replay


def copy_bandwidth(device: str, rep: int) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    size = COPY if device == "cuda" else 16 << 20
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    if device == "cuda":
        from triton.testing import do_bench

        ms: Any = do_bench(lambda: target.copy_(source), rep=rep, return_mode="median")
    else:
        ms = statistics.median(wall(lambda: target.copy_(source), lambda: None, rep, LEAST, MOST))
    return 2 * size / (1e-3 * ms)


def _events(count: int) -> list[tuple[Any, Any]]:
    return [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]  # type: ignore[misc]


def _rounds(steps: int, step: Step) -> int:
    """Whole rounds of so many steps at least."""
    return -(-steps // step.round)


def _place(point: Point) -> tuple[int, int]:
    return point.context, point.batch

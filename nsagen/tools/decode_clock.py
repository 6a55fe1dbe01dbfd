"""The clock of `nsagen bench --decode`: milliseconds of one step, eager and in a CUDA graph; a failure is a reason.

In a graph: the time on the device, each step after a write of 256 MiB (so nothing of it lies in L2, as in a model,
where other layers come between). Eager: steps one after the other, the host's work included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
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
RUN = 8  # eager steps in a row
LEAST, MOST = 5, 2000  # steps or runs that are timed
PROFILED = 20  # steps
NO_GRAPH = "there are no CUDA graphs on the CPU"


@dataclass(frozen=True)
class Row:
    """One case at one point; None where there is no number, and then a reason."""

    name: str
    kind: str  # ours, dense or bytes
    context: int
    batch: int
    ms: float | None = None
    reason: str | None = None
    kernels: dict[str, float] | None = None  # µs of each, of our step in a graph

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

    def _row(self, name: str, kind: str, point: Point, step: Step, time_of: Callable[[Step], float]) -> Row:
        try:
            return Row(name, kind, *_place(point), ms=time_of(step))
        except Exception as error:
            return Row(name, kind, *_place(point), reason=reason_of(error))

    def _with_kernels(self, row: Row, step: Step) -> Row:
        """Of ours in a graph; without what the profiler can't tell, a time is a time still."""
        if row.kind != "ours" or row.ms is None or self.device != "cuda":
            return row
        replay = captured(step)

        def before() -> None:
            step.reset()
            self._overwrite()

        try:
            return replace(row, kernels=kernel_times(replay, before, PROFILED) or None)
        except Exception as error:
            return replace(row, reason=f"its kernels: {reason_of(error)}")
        finally:
            step.reset()

    def _eager(self, step: Step) -> float:
        step.call()  # compiles
        if self.device != "cuda":
            return statistics.median(wall(step.call, step.reset, self.rep, LEAST, MOST))
        return statistics.median(self._runs(step))

    def _runs(self, step: Step) -> list[float]:
        times: list[float] = []
        while len(times) < LEAST or (sum(times) * RUN < self.rep and len(times) < MOST // RUN):
            step.reset()
            torch.cuda.synchronize()
            start, end = _events(1)[0]
            start.record()
            for _ in range(RUN):
                step.call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / RUN)
        step.reset()
        return times

    def _graphed(self, step: Step) -> float:
        if self.device != "cuda":
            raise NsagenError(NO_GRAPH)
        replay = Step(captured(step), step.reset)
        guess = statistics.median(self._cold(replay, LEAST))
        return statistics.median(self._cold(replay, min(MOST, max(LEAST, int(self.rep / guess)))))

    def _cold(self, step: Step, count: int) -> list[float]:
        """The write before each step hides the host's part of it, too."""
        events = _events(count)
        for start, end in events:
            step.reset()
            self._overwrite()
            start.record()
            step.call()
            end.record()
        torch.cuda.synchronize()
        step.reset()
        return [start.elapsed_time(end) for start, end in events]

    def _overwrite(self) -> None:
        """All of L2."""
        if self._flush is None:
            self._flush = torch.empty(FLUSH, dtype=torch.int8, device=self.device)
        self._flush.zero_()


def captured(step: Step) -> Callable[[], None]:
    """The step as a CUDA graph, which keeps its output alive; it must have room for three more."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and fills the allocator
        for _ in range(2):
            step.reset()
            step.call()
    torch.cuda.current_stream().wait_stream(stream)
    step.reset()
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


def _place(point: Point) -> tuple[int, int]:
    return point.context, point.batch

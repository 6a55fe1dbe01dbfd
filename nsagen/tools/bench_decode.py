"""`nsagen bench --decode`: a step over a full cache, eager and in a CUDA graph, beside dense attention and the limit.

A time is the mean over a round: the steps up to the context after which compression blocks end as before.
The cache holds random keys and values, written to it without attention. What does not fit or is not installed is a
dash with its reason; the other cases run on.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsagen.compiler import Compiled
from nsagen.errors import NsagenError
from nsagen.tools.bench import settle
from nsagen.tools.console import track
from nsagen.tools.decode_grid import PLAIN, Point, Serving, grid_of, round_of

if TYPE_CHECKING:
    from nsagen.tools.decode_cases import Case
    from nsagen.tools.decode_clock import Clock, Row


@dataclass(frozen=True)
class Request:
    """The command line."""

    spec: str
    grid: str | None = None
    dtype: str = "bf16"
    device: str = "cuda"
    against: str | None = None
    rep: int = 200
    json: Path | None = None
    plot: Path | None = None
    serving: Serving = PLAIN

    def command(self, points: Sequence[Point]) -> str:
        """The command line again, with the choices that decide the numbers."""
        words = ["nsagen", "bench", self.spec, "--decode", "--grid", ",".join(p.label for p in points)]
        words += ["--dtype", self.dtype, "--device", self.device, "--rep", str(self.rep), *self.serving.words]
        return shlex.join([*words, *(["--against", self.against] if self.against is not None else [])])


def run(compiled: Compiled, request: Request) -> bool:
    """Measure, print, and write what was asked for; False if interrupted, or no step of ours ran.

    What cannot work is said before anything is measured.
    """
    points = grid_of(request.grid, compiled.spec, request.device)
    settle(request.json, request.plot, request.device)
    _check(compiled, points, request.serving)
    from nsagen.tools import bench_report, decode_report
    from nsagen.tools.decode_clock import Clock, copy_bandwidth

    cases = _cases(compiled, request)
    where = bench_report.environment(request.device)
    what = "_".join(["decode", *(w.strip("-").replace("-", "_") for w in request.serving.words)])
    default = bench_report.default_file(compiled.spec.name, request.dtype, where, what) if where["gpu"] else None
    json = request.json or default
    bandwidth = copy_bandwidth(request.device, request.rep)
    clock = Clock(request.device, request.rep)
    clock.rows += decode_report.byte_rows(compiled, points, bandwidth, request.serving)

    def save() -> None:
        if json:
            command = request.command(points)
            record = decode_report.record(
                compiled, command, request.dtype, where, bandwidth, clock.rows, request.serving
            )
            bench_report.write_json(json, record)

    whole_run = _measured(clock, cases, points, save)
    print(f"{_title(compiled, request, where)}\n\n{decode_report.text(clock.rows, bandwidth)}")
    if request.plot:
        from nsagen.tools.decode_plot import plot

        on = ", ".join(filter(None, (where["gpu"] or "CPU, torch path", request.dtype, request.serving.label)))
        print(f"wrote {plot(clock.rows, f'{compiled.spec.name}: one step on {on}', request.plot)}")
    if json:
        save()
        print(f"wrote {json}")
    return whole_run and any(r.kind == "ours" and r.ms is not None for r in clock.rows)


def _check(compiled: Compiled, points: Sequence[Point], serving: Serving) -> None:
    """Refuse what no point, or one of them, can be."""
    from nsagen.api import module_of
    from nsagen.runtime.cache_shape import whole_length

    steps = round_of(compiled.spec, serving.tokens)
    tokens = steps * serving.tokens
    short = [p.label for p in points if p.context <= tokens]
    if short:
        of, way_out = "the step", "raise it or lower --tokens"
        if steps > 1:
            of, way_out = f"the {steps} steps of a round", "raise it"
        raise NsagenError(f"--grid {','.join(short)}: a context holds more than the {tokens} tokens of {of}: {way_out}")
    layout: Any = getattr(module_of(compiled), "_LAYOUT")  # noqa: B009
    whole_length(layout, 1, 1, serving.page_size, None)


def _cases(compiled: Compiled, request: Request) -> list[Case]:
    from nsagen.api import module_of
    from nsagen.tools.bench_inputs import Setting
    from nsagen.tools.decode_cases import dense, ours
    from nsagen.tools.random_lists import DTYPES

    setting = Setting(compiled.spec, DTYPES[request.dtype], request.device)
    against = None if request.against is None else request.against.replace(",", " ").split()
    serving = request.serving
    return [*dense(setting, against, serving.tokens), ours(module_of(compiled), setting, serving)]


def _measured(clock: Clock, cases: Sequence[Case], points: Sequence[Point], save: Callable[[], None]) -> bool:
    """Whether all of it was measured; each point is on disk before the next one begins."""

    def rows() -> Iterator[list[Row]]:
        for point in points:
            for case in cases:
                yield clock.of(case, point)
            save()

    try:
        for found in track(rows(), len(cases) * len(points), "timing a step"):
            _tell(found)
    except KeyboardInterrupt:
        print("interrupted: what follows was measured before", file=sys.stderr)
        return False
    return True


def _tell(rows: Sequence[Row]) -> None:
    """Where no progress bar shows: what is done."""
    for row in [] if sys.stderr.isatty() else rows:
        what = row.reason if row.ms is None else f"{1e3 * row.ms:.1f} µs"
        print(f"{row.name} at {row.point.label}: {what}", file=sys.stderr, flush=True)


def _title(compiled: Compiled, request: Request, where: dict[str, Any]) -> str:
    h = compiled.spec.heads
    what = f"{h.query} query heads on {h.kv} KV heads, dims {h.qk_dim}/{h.v_dim}, {request.dtype}"
    step = request.serving.label or "one token a sequence"
    steps = round_of(compiled.spec, request.serving.tokens)
    of_round = f"a time: the mean of the {steps} steps up to the context, a round: some end a compression block\n"
    on = where["gpu"] or "the CPU through the torch path, wall clock: a trial, no measurement of the kernels"
    return (
        f"{compiled.spec.name} {compiled.digest}: a step ({step}), {what}; on {on}; "
        f"torch {where['torch']}, triton {where['triton']}\n"
        f"{of_round if steps > 1 else ''}"
        "in a graph: time on the device, L2 written over before each step; eager: steps in a row, host included"
    )

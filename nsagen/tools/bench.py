"""`nsagen bench`: the whole operation and its parts beside dense attention; medians, peak memory, break-even length.

Inputs are standard normal and never zero (a GPU clocks higher on zeros), gates uniform; where they are small, several
sets are used in turn. A case that fails, or would take too long, is a dash with a reason; the others run on.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsagen.compiler import Compiled
from nsagen.errors import NsagenError
from nsagen.tools.console import track
from nsagen.tools.process import compiled_kernels

if TYPE_CHECKING:
    from nsagen.tools.bench_clock import Clock, Row
    from nsagen.tools.bench_inputs import Case

LENGTHS = {"cuda": "4k,8k,16k,32k,64k,128k", "cpu": "128,256"}
LONGEST = 1 << 24


@dataclass(frozen=True)
class Request:
    """The command line."""

    spec: str
    lengths: str | None = None
    dtype: str = "bf16"
    device: str = "cuda"
    forward_only: bool = False
    parts: bool = True
    against: str | None = None
    rep: int = 200
    slowest: float = 4.0
    json: Path | None = None
    plot: Path | None = None

    @property
    def command(self) -> str:
        """The command line again, with the choices that decide the numbers."""
        words = ["nsagen", "bench", self.spec, "--lengths", ",".join(map(str, lengths_of(self)))]
        words += [
            "--dtype",
            self.dtype,
            "--device",
            self.device,
            "--rep",
            str(self.rep),
            "--slowest",
            f"{self.slowest:g}",
        ]
        words += ["--against", self.against] if self.against is not None else []
        words += ["--forward-only"] if self.forward_only else []
        return shlex.join([*words, *([] if self.parts else ["--no-parts"])])


def lengths_of(request: Request) -> list[int]:
    """Ascending: a length says something of the next one. `64k` is 65536."""
    words = (request.lengths or LENGTHS[request.device]).lower().replace(",", " ").split()
    try:
        found = sorted({int(word.removesuffix("k")) << (10 if word.endswith("k") else 0) for word in words})
    except ValueError:
        found = []
    if not found or found[0] < 1 or found[-1] > LONGEST:
        raise NsagenError(f"--lengths {request.lengths!r}: give tokens between commas, as in 4096,8192 or 4k,8k")
    return found


def run(compiled: Compiled, request: Request) -> bool:
    """Measure, print, and write what was asked for; False if interrupted, or the whole operation ran at no length.

    What cannot work is said before anything is measured.
    """
    lengths = lengths_of(request)
    settle(request.json, request.plot, request.device)
    from nsagen.tools import bench_report as report

    where = report.environment(request.device)
    json = request.json or (report.default_file(compiled.spec.name, request.dtype, where) if where["gpu"] else None)
    clock, cases = _prepared(compiled, request)
    whole_run = False

    def save() -> None:
        if json:
            report.write_json(json, report.record(compiled, request.command, request.dtype, where, clock.rows))

    try:
        for row in track(_rows(clock, cases, lengths, save), len(cases) * len(lengths), "timing"):
            _tell(row)
        whole_run = True
    except KeyboardInterrupt:
        print("interrupted: what follows was measured before", file=sys.stderr)
    print(f"{_title(compiled, request, where)}\n\n{report.text(clock.rows)}")
    _write(compiled, request, where, clock.rows)
    if json:
        save()
        print(f"wrote {json}")
    return whole_run and any(row.kind == "whole" and row.forward_ms is not None for row in clock.rows)


def _prepared(compiled: Compiled, request: Request) -> tuple[Clock, list[Case]]:
    from nsagen.api import module_of
    from nsagen.tools.bench_cases import own_cases
    from nsagen.tools.bench_clock import Clock
    from nsagen.tools.bench_inputs import Setting
    from nsagen.tools.predict import Model
    from nsagen.tools.random_lists import DTYPES
    from nsagen.tools.rivals import rivals

    setting = Setting(compiled.spec, DTYPES[request.dtype], request.device)
    names = None if request.against is None else [n for n in request.against.replace(",", " ").split() if n != "none"]
    others = rivals(setting, names)
    module = module_of(compiled)
    own = own_cases(compiled, module, setting, request.parts)
    clock = Clock(request.device, request.rep, not request.forward_only, request.slowest)
    if request.device == "cuda":  # the model knows no CPU
        clock = replace(clock, predict=Model(compiled, module, setting))
    return clock, [*own, *others]


def _rows(clock: Clock, cases: Sequence[Case], lengths: Sequence[int], save: Any) -> Iterator[Row]:
    """Length by length, and kept on disk after each one: a run that is cut short is not lost."""
    for length in lengths:
        for case in cases:
            yield clock.row(case, length)
        save()


def settle(json: Path | None, plot: Path | None, device: str) -> None:
    """Real kernels or, on the CPU, the torch path; files that can be written; a device."""
    for file in (json, plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise NsagenError(f"cannot write {file}: there is no folder {file.parent}")
    if plot:
        from nsagen.tools.bench_plot import require_matplotlib

        require_matplotlib(plot)
    compiled_kernels()
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise NsagenError(
            "there is no CUDA device to measure: run it on a machine with one, "
            "or try the command with --device cpu (torch path, short lengths, wall clock)"
        )


def _tell(row: Row) -> None:
    """Where no progress bar shows: what is done."""
    if sys.stderr.isatty():
        return
    numbers = [f"{name} {x:.3f}" for name, x in row.record().items() if isinstance(x, float)]
    print(
        f"{row.name} T={row.length}: {', '.join([*numbers, *filter(None, [row.reason])])}", file=sys.stderr, flush=True
    )


def _title(compiled: Compiled, request: Request, where: dict[str, Any]) -> str:
    h = compiled.spec.heads
    what = f"{h.query} query heads on {h.kv} KV heads, dims {h.qk_dim}/{h.v_dim}, {request.dtype}, batch 1"
    on = where["gpu"] or "the CPU through the torch path, wall clock: a trial, no measurement of the kernels"
    return f"{compiled.spec.name} {compiled.digest}: {what}; on {on}; torch {where['torch']}, triton {where['triton']}"


def _write(compiled: Compiled, request: Request, where: dict[str, Any], rows: Sequence[Row]) -> None:
    if request.plot:
        from nsagen.tools.bench_plot import plot

        on = where["gpu"] or "CPU, torch path"
        print(f"wrote {plot(rows, f'{compiled.spec.name} on {on}, {request.dtype}', request.plot)}")

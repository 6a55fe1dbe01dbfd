"""`nsagen tune`: measures the candidates that a module carries on the GPU at hand and keeps what it measured.

Works on a spec or on a generated module's file, for which it needs nothing of the compiler. What was measured before
is not measured again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nsagen.errors import NsagenError
from nsagen.files import write_text
from nsagen.runtime import cache, tuned
from nsagen.tools.console import table, track
from nsagen.tools.process import compiled_kernels
from nsagen.tools.tune_progress import board
from nsagen.tools.tune_search import CandidateFailed, Measurer, Rounds, Subject, TooLarge, known, rounds, search

LENGTHS = (8192, 65536)
CANDIDATES = 12


@dataclass(frozen=True)
class Request:
    """The command line."""

    spec: str
    lengths: tuple[int, ...] = LENGTHS
    dtype: str = "bf16"
    candidates: int = CANDIDATES
    force: bool = False
    export: Path | None = None


@dataclass(frozen=True)
class Bench:
    """What a search needs of the machine: tests bring their own."""

    place: Callable[[int], tuned.Place]  # of a length
    compile: Callable[[Rounds, int], None]  # for this length
    measurer: Callable[[int], Measurer]  # of a length


def run(request: Request) -> bool:
    """Tune, print the table; False where it was interrupted."""
    compiled_kernels()
    _require_gpu()
    module = _module(request.spec)
    subjects, bench = subjects_of(module, request), bench_of(module, request)
    done = tune(subjects, request, bench)
    places = [bench.place(n) for n in request.lengths]
    print(text(subjects, places))
    if request.export:
        export(subjects, places[0], request.export)
        print(f"wrote {request.export}")
    return done


def tune(subjects: Sequence[Subject], request: Request, bench: Bench) -> bool:
    """Every length in turn; False where Ctrl-C came: what was measured by then is kept."""
    try:
        for length in request.lengths:
            _tune_at(subjects, length, request.force, bench)
    except KeyboardInterrupt:
        again = "the same command without --force" if request.force else "the same command"
        left = sum(len(tried) for n in request.lengths for tried in rounds(subjects, bench.place(n)))
        print(f"interrupted: {left} candidates are not measured yet, {again} goes on from here", file=sys.stderr)
        return False
    return True


def _tune_at(subjects: Sequence[Subject], length: int, force: bool, bench: Bench) -> None:
    place = bench.place(length)
    wanted = rounds(subjects, place, force)
    if not wanted:
        return
    try:
        bench.compile(wanted, length)
        with board(subjects, place, wanted) as shown:
            search(subjects, place, wanted, bench.measurer(length), shown.measured)
    except TooLarge as error:
        print(f"{length} tokens are left out: {error}", file=sys.stderr)
    except CandidateFailed as error:  # no other candidate can be measured beside first choices that fail
        raise NsagenError(f"{length} tokens: the kernels do not run with their first choices: {error}") from error


def bench_of(module: Any, request: Request) -> Bench:
    from nsagen.runtime import launch
    from nsagen.tools.random_lists import DTYPES
    from nsagen.tools.tune_measure import GpuMeasurer

    compiled: list[tuple[int, Rounds]] = []

    def compile_(wanted: Rounds, length: int) -> None:
        from nsagen.tools.tune_compile import compile_all, short

        if (short(length), wanted) in compiled:
            return
        compiled.append((short(length), wanted))
        done = compile_all(wanted, module.__file__, length, request.dtype)
        for _ in track(done, len(wanted), f"compiling for {length} tokens"):
            pass

    return Bench(
        place=lambda length: launch.place(launch.chip(0), DTYPES[request.dtype], length),
        compile=compile_,
        measurer=lambda length: GpuMeasurer(module, length, request.dtype),
    )


def subjects_of(module: Any, request: Request) -> list[Subject]:
    """The kernels that have a choice, with the best candidates that fit the GPU."""
    from nsagen.runtime import launch

    bits = 32 if request.dtype == "fp32" else 16
    fitting = {name: launch.candidates(t, launch.chip(0), bits) for name, t in module._CONFIGS.items()}
    return [
        Subject(name, tiles.key, fitting[name][: request.candidates], tiles.lengths)
        for name, tiles in module._CONFIGS.items()
        if len(fitting[name]) > 1
    ]


def text(subjects: Sequence[Subject], places: Sequence[tuned.Place]) -> str:
    """A row a kernel and length: the model's first choice, the fastest, and what that gains."""
    gpu, version, kind = places[0][:3]
    head = ("kernel", "tokens", "measured", "first choice", "ms", "winner", "ms", "gain")
    rows = [row for s in subjects for p in places if (row := _row(s, p))]
    return f"{gpu}, triton {version}, {kind}: kept in {cache.directory()}\n{table(head, rows)}"


def _row(subject: Subject, place: tuned.Place) -> list[object]:
    times, first = known(subject, place), subject.labels[0]
    winner = tuned.best(times, subject.labels)
    if winner is None:
        return []
    before, after = times.get(first), times[winner]
    assert after is not None
    counted = f"{sum(ms is not None for ms in times.values())}/{len(subject.labels)}"
    shown = ("failed" if first in times else "-", "-") if before is None else (f"{before:.3f}", _gain(before, after))
    return [subject.kernel, place.length, counted, first, shown[0], winner, f"{after:.3f}", shown[1]]


def _gain(before: float, after: float) -> str:
    return f"{100 * (before / after - 1):.1f}%"


def export(subjects: Sequence[Subject], place: tuned.Place, file: Path) -> None:
    """Write what is known on this GPU with this triton, at every length and dtype, beside what FILE holds already."""
    found = tuned.parse(file.read_text(encoding="utf-8")) if file.exists() else {}
    for s in subjects:
        known = tuned.measured(s.kernel, s.key)
        found[s.kernel, s.key] = {p: times for p, times in known.items() if p[:2] == place[:2]}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, tuned.dump({kernel: places for kernel, places in found.items() if places}))


def _module(spec: str) -> ModuleType:
    if spec.endswith(".py"):
        from nsagen.tools.tune_compile import import_file

        return import_file(str(Path(spec).resolve()))
    from nsagen.api import load

    return load(spec)


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise NsagenError("tuning measures on a CUDA device, and there is none: `nsagen compile` needs no GPU")

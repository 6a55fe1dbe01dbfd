"""`nsagen compile`: every kernel ahead of time, without a GPU: registers, spills, shared memory, compiler warnings."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from nsagen.api import module_of
from nsagen.compiler import Compiled
from nsagen.ir.plan import Plan
from nsagen.tools.aot import Report, compile_job, jobs_of
from nsagen.tools.console import table, track
from nsagen.tools.process import compiled_kernels
from nsagen.tools.signature import Job

HEAD = (
    "kernel",
    "arch",
    "dtype",
    "tile",
    "warps",
    "stages",
    "regs",
    "stack",
    "spill st/ld",
    "smem",
    "wgmma",
    "mma",
    "notes",
)


def compile_all(compiled: Compiled, arches: list[str], dtype: str, all_candidates: bool = False) -> list[Report]:
    """A report a kernel, architecture and candidate, in that order."""
    compiled_kernels()
    jobs = [j for arch in arches for j in jobs_of(compiled.plan, arch, dtype, all_candidates)]
    module = module_of(compiled)
    # On failure Triton prints pages to stdout, where the table goes; what they say is in the report.
    with contextlib.redirect_stdout(io.StringIO()):
        return list(track(_reports(module, jobs, compiled.plan), len(jobs), "compiling"))


def _reports(module: ModuleType, jobs: list[Job], plan: Plan) -> Iterator[Report]:
    """On all cores: LLVM and ptxas run outside the interpreter's lock."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(lambda job: compile_job(module, job, plan), jobs)


def text(reports: list[Report]) -> str:
    """The table; below it, what a cell cannot hold."""
    lines = [table(HEAD, [_row(r) for r in reports])]
    lines += [f"{_name(r)}: {r.error}" for r in reports if r.error]
    lines += [f"{_name(r)}: ptxas {w}" for r in reports for w in r.warnings]
    return "\n".join(lines)


def write_json(reports: list[Report], file: str | Path) -> None:
    Path(file).write_text(json.dumps([_record(r) for r in reports], indent=1) + "\n")


def failed_first_choices(reports: list[Report]) -> list[Report]:
    """First choices that do not compile, or spill."""
    first: dict[tuple[str, str], Report] = {}
    for r in reports:
        first.setdefault((r.job.kernel.name, r.job.arch), r)
    return [r for r in first.values() if r.failed]


def _name(r: Report) -> str:
    t = r.job.tile
    return f"{r.job.kernel.name} {r.job.arch} {r.job.dtype} {t.bm}x{t.bn} w{t.warps} s{t.stages}"


def _row(r: Report) -> list[object]:
    t = r.job.tile
    start: list[object] = [r.job.kernel.name, r.job.arch, r.job.dtype, f"{t.bm}x{t.bn}", t.warps, t.stages]
    if r.error:
        return [*start, *["-"] * 6, "FAILED"]
    notes = [*(["SPILLS"] if r.spills else []), *(w[1:6] for w in r.warnings)]
    return [*start, r.registers, r.stack, f"{r.spill_stores}/{r.spill_loads}", r.smem, r.wgmma, r.mma, " ".join(notes)]


def _record(r: Report) -> dict[str, Any]:
    t = r.job.tile
    tile = {"bm": t.bm, "bn": t.bn, "warps": t.warps, "stages": t.stages}
    names = ("registers", "stack", "spill_stores", "spill_loads", "smem", "wgmma", "mma", "warnings", "error")
    measured = {name: getattr(r, name) for name in names}
    estimated = {"smem": t.smem, "registers": t.registers}
    return {
        "kernel": r.job.kernel.name,
        "arch": r.job.arch,
        "dtype": r.job.dtype,
        **tile,
        **measured,
        "estimated": estimated,
    }

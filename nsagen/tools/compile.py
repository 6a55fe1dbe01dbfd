"""`nsagen compile`: every kernel ahead of time, without a GPU: registers, spills, shared memory, compiler warnings."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from nsagen.api import module_of
from nsagen.compiler import Compiled
from nsagen.ir.plan import Plan
from nsagen.tools.aot import Report, compile_job, jobs_of
from nsagen.tools.aot_chips import CHIPS
from nsagen.tools.aot_listing import Listing
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
    "mfma",
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
    lines += [f"{_name(r)}: ptxas {w}" for r in reports for w in _warnings(r)]
    arches = dict.fromkeys(r.job.arch for r in reports)
    lines += [f"{arch}: {CHIPS[arch].remark}" for arch in arches if CHIPS[arch].remark]
    return "\n".join(lines)


def write_json(reports: list[Report], file: str | Path) -> None:
    Path(file).write_text(json.dumps([_record(r) for r in reports], indent=1) + "\n")


def failed_first_choices(reports: list[Report]) -> list[Report]:
    """First choices, of each form, that do not compile, do not fit the chip, or spill."""
    first: dict[tuple[str, str, bool], Report] = {}
    for r in reports:
        first.setdefault((r.job.kernel.name, r.job.arch, r.job.tile.specialised), r)
    return [r for r in first.values() if r.failed]


def _name(r: Report) -> str:
    t = r.job.tile
    return f"{r.job.kernel.name} {r.job.arch} {r.job.dtype} {t.label}"


def _row(r: Report) -> list[object]:
    t, x = r.job.tile, r.listing
    size = f"{t.bm}x{t.bn}{' ws' if t.specialised else ''}"
    start: list[object] = [r.job.kernel.name, r.job.arch, r.job.dtype, size, t.warps, t.stages]
    if x is None:
        return [*start, *["-"] * 7, "FAILED"]
    counts = [x.registers, x.stack, f"{x.spill_stores}/{x.spill_loads}", r.smem, x.wgmma, x.mma, x.mfma]
    return [*start, *counts, " ".join(_notes(r, x))]


def _notes(r: Report, x: Listing) -> list[str]:
    spills = ["SPILLS" if r.spills else "spills as known"] if x.spills else []
    failed = [*(["FAILED"] if r.error else []), *spills]
    return [*failed, *(w[1:6] for w in _warnings(r)), *([f"sgpr {x.scalar_spills}"] if x.scalar_spills else [])]


def _warnings(r: Report) -> tuple[str, ...]:
    return (r.listing and r.listing.warnings) or ()


def _record(r: Report) -> dict[str, Any]:
    """Null: not known, or nothing was compiled."""
    t = r.job.tile
    tile = {"bm": t.bm, "bn": t.bn, "warps": t.warps, "stages": t.stages, "specialised": t.specialised}
    return {
        "kernel": r.job.kernel.name,
        "arch": r.job.arch,
        "dtype": r.job.dtype,
        **tile,
        **{field.name: getattr(r.listing, field.name, None) for field in fields(Listing)},
        "smem": r.smem,
        "error": r.error,
        "estimated": {"smem": t.smem, "registers": t.registers},
    }

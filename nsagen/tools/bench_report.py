"""What `nsagen bench` says of its rows: tables, break-even lengths, a JSON record with the machine that they are of."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nsagen.compiler import Compiled
from nsagen.files import PACKAGE, write_text
from nsagen.tools.bench_clock import Row
from nsagen.tools.break_even import BreakEven, break_even, fastest
from nsagen.tools.console import table

NONE = "–"
CLOSE = 1.25
PREDICTED = "predicted, for an H200 and the tile that runs, without φ"
RATIO = "ratio: measured / predicted, or / host, what a short call keeps the host busy, where that is more"
QUANTITIES = {"forward": "forward_ms", "backward": "backward_ms", "forward + backward": "both_ms"}


def times(rows: Sequence[Row], quantity: str, kind: str | None = None) -> dict[str, dict[int, float]]:
    """Case -> length -> milliseconds, where there are any."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        ms = getattr(row, QUANTITIES[quantity])
        if ms is not None and kind in (None, row.kind):
            found.setdefault(row.name, {})[row.length] = ms
    return found


def break_evens(rows: Sequence[Row]) -> dict[str, BreakEven]:
    """Of the whole operation with the fastest dense attention; empty where no dense attention was asked for."""
    quantities = QUANTITIES if any(r.backward_ms is not None for r in rows) else ("forward",)
    if not any(r.kind == "dense" for r in rows):
        return {}
    return {q: break_even(times(rows, q).get("whole", {}), times(rows, q, "dense")) for q in quantities}


def text(rows: Sequence[Row]) -> str:
    """A table a quantity, the whole beside the fastest dense, break-even lengths, and why a number is not there."""
    lines = [
        *_table(rows, "forward, ms", "forward_ms", 3, _beside("forward")),
        *_table(rows, "backward, ms", "backward_ms", 3, _beside("backward")),
        *_table(rows, "peak memory, GiB", "peak_gib", 2),
        *_ratios(rows),
        *(f"break-even {quantity}: {found.text}" for quantity, found in break_evens(rows).items()),
        *_predictions(rows),
        *_reasons(rows),
    ]
    return "\n".join(lines)


Line = tuple[str, str, int]  # label, attribute of a row, digits


def _beside(quantity: str) -> tuple[Line, ...]:
    """The lines below a case's own: what the model says, how long the host is busy with a short call, the ratio."""
    line = ("  host", f"host_{quantity}_ms", 3)
    return ("  predicted", f"predicted_{quantity}_ms", 3), line, ("  ratio", f"{quantity}_ratio", 2)


def _table(rows: Sequence[Row], title: str, attribute: str, digits: int, below: tuple[Line, ...] = ()) -> Iterator[str]:
    """Nothing where there is not one number."""
    if all(getattr(r, attribute) is None for r in rows):
        return
    lengths = sorted({r.length for r in rows})
    cells: list[list[str]] = []
    for name in dict.fromkeys(r.name for r in rows):
        at = {r.length: r for r in rows if r.name == name}
        for label, number, places in ((name, attribute, digits), *below):
            found = [getattr(at[n], number) if n in at else None for n in lengths]
            if label == name or any(x is not None for x in found):
                cells.append([label, *(_cell(x, places) for x in found)])
    yield table([title, *map(short_length, lengths)], cells)
    yield ""


def _predictions(rows: Sequence[Row]) -> Iterator[str]:
    """What a prediction is, and how many of them hold."""
    ratios = [x for r in rows for x in (r.forward_ratio, r.backward_ratio) if x is not None]
    if ratios:
        near = sum(1 / CLOSE <= x <= CLOSE for x in ratios)
        yield f"{PREDICTED}: {near} of {len(ratios)} within 25 % of the measured time ({RATIO})"


def _ratios(rows: Sequence[Row]) -> Iterator[str]:
    """How many times faster the whole operation is than the fastest dense attention."""
    lengths = sorted({r.length for r in rows})
    lines: list[list[str]] = []
    for quantity in QUANTITIES:
        ours, (theirs, _) = times(rows, quantity).get("whole", {}), fastest(times(rows, quantity, "dense"))
        if ours.keys() & theirs.keys():
            cells = (_cell(theirs[n] / ours[n] if n in ours and n in theirs else None, 2) for n in lengths)
            lines.append([quantity, *cells])
    if lines:
        yield table(["× faster than dense", *map(short_length, lengths)], lines)
        yield ""


def _cell(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def short_length(tokens: int) -> str:
    return f"{tokens >> 10}k" if tokens % 1024 == 0 else str(tokens)


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    yield from reasons((row.name, row.reason, short_length(row.length)) for row in rows)
    for name, note in dict.fromkeys((r.name, r.note) for r in rows if r.note):
        yield f"{name}: {note}"


def reasons(found: Iterable[tuple[str, str | None, str]]) -> Iterator[str]:
    """(case, why a number is not there, at which point) -> one line for equal reasons of one case."""
    points: dict[tuple[str, str], list[str]] = {}
    for name, reason, at in found:
        if reason:
            points.setdefault((name, reason), []).append(at)
    for (name, reason), at in points.items():
        yield f"{NONE} {name} at {', '.join(at)}: {reason}"


def environment(device: str) -> dict[str, Any]:
    """The machine, the versions, and the commit of nsagen where it runs from its source tree."""
    import torch

    import nsagen

    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "gpu": gpu,
        "cpu": None if gpu else platform.machine(),
        "cuda": torch.version.cuda if gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "nsagen": nsagen.__version__,
        "commit": commit(PACKAGE.parent),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(root: Path) -> str | None:
    """Of a source tree's own repository, with -dirty where files differ; None without one."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def record(compiled: Compiled, command: str, dtype: str, where: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    found = {q: vars(b) for q, b in break_evens(rows).items()}
    return {**heading(compiled, command, dtype, where), "break_even": found, "rows": [r.record() for r in rows]}


def heading(compiled: Compiled, command: str, dtype: str, where: dict[str, Any]) -> dict[str, Any]:
    """Where and of what a record is."""
    what = {"spec": compiled.spec.to_dict(), "digest": compiled.digest, "dtype": dtype, "command": command}
    return {**where, **what}


def write_json(file: Path, record: dict[str, Any]) -> None:
    write_text(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def default_file(name: str, dtype: str, where: dict[str, Any], what: str = "bench") -> Path:
    """benchmarks/results/h200_NAME_WHAT_bf16.json, or the same here, where there is no such folder."""
    machine = re.sub(r"[^a-z0-9]+", "_", (where["gpu"] or "cpu").lower().replace("nvidia", "")).strip("_")
    folder = Path("benchmarks/results")
    return (folder if folder.is_dir() else Path()) / f"{machine}_{name}_{what}_{dtype}.json"

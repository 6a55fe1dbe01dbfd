"""What `nsagen bench --decode` says of its rows: a table by point, ratios, reasons, a JSON record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nsagen.compiler import Compiled
from nsagen.tools.bench_report import NONE, heading, reasons
from nsagen.tools.console import table
from nsagen.tools.decode_clock import Row
from nsagen.tools.decode_grid import PLAIN, Point, Serving, dense_bytes, nsa_bytes
from nsagen.tools.kernel_times import BETWEEN, shares

SLOWEST = "  its slowest step"  # of the round
DENSE, LIMIT, OURS = "dense at copy bandwidth", "limit: NSA bytes", "nsagen in a graph"
MILLISECONDS_FROM = 10.0  # below, a column is in microseconds


def byte_rows(compiled: Compiled, points: Sequence[Point], bandwidth: float, serving: Serving = PLAIN) -> list[Row]:
    """What the bytes alone would take: of dense attention, then of the spec's."""
    sizes = {
        DENSE: lambda p: dense_bytes(compiled.spec, p),
        LIMIT: lambda p: nsa_bytes(compiled, p, serving),
    }
    return [
        Row(name, "bytes", p.context, p.batch, ms=1e3 * size(p) / bandwidth)
        for name, size in sizes.items()
        for p in points
    ]


def text(rows: Sequence[Row], bandwidth: float) -> str:
    """Times a step, then how far from the limit and from dense attention, then why a number is not there."""
    points = list(dict.fromkeys(r.point for r in rows))
    at = {(r.name, r.point): r.ms for r in rows}
    names = _in_order(dict.fromkeys(r.name for r in rows))
    units = {p: _unit([at.get((name, p)) for name in names]) for p in points}
    head = ["a step, context x batch", *(f"{p.label}, {units[p][0]}" for p in points)]
    slowest = {(r.name, r.point): r.slowest_ms for r in rows if r.round > 1}
    cells: list[list[str]] = []
    for name in names:
        cells.append([name, *(_cell(at.get((name, p)), *units[p][1:]) for p in points)])
        if any(slowest.get((name, p)) is not None for p in points):
            cells.append([SLOWEST, *(_cell(slowest.get((name, p)), *units[p][1:]) for p in points)])
    return "\n".join(
        [
            table(head, cells),
            "",
            *_ratios(at, names, points),
            *_kernels(rows, points),
            f"copy bandwidth {bandwidth / 1e12:.3g} TB/s, bytes read and written",
            *reasons((r.name, r.reason, r.point.label) for r in rows),
        ]
    )


def _in_order(names: Any) -> list[str]:
    """Dense first, ours, the limit last."""
    ends = {DENSE: 0, LIMIT: 2}
    return sorted(names, key=lambda name: ends.get(name, 1))


def _unit(times: Sequence[float | None]) -> tuple[str, float, int]:
    """(name, factor, digits) of a column."""
    known = [ms for ms in times if ms is not None]
    return ("ms", 1.0, 2) if max(known, default=0.0) >= MILLISECONDS_FROM else ("µs", 1e3, 1)


def _cell(value: float | None, factor: float, digits: int) -> str:
    return NONE if value is None else f"{factor * value:.{digits}f}"


def _ratios(at: dict[tuple[str, Point], float | None], names: Sequence[str], points: Sequence[Point]) -> Iterator[str]:
    """Of the graphed step: times the limit, and how many times faster than each dense attention."""
    lines = [("× the limit", [_ratio(at.get((OURS, p)), at.get((LIMIT, p))) for p in points])]
    for name in (n for n in names if n.startswith("dense")):
        lines.append((f"× faster than {name}", [_ratio(at.get((name, p)), at.get((OURS, p))) for p in points]))
    known = [[name, *cells] for name, cells in lines if any(c != NONE for c in cells)]
    if known:
        yield table([OURS, *(p.label for p in points)], known)
        yield ""


def _kernels(rows: Sequence[Row], points: Sequence[Point]) -> Iterator[str]:
    """Of the graphed step, µs of each kernel."""
    at = {r.point: dict(shares(r.kernels, 1e3 * r.ms)) for r in rows if r.kernels and r.ms is not None}
    names = dict.fromkeys(name for times in at.values() for name in times)
    names = [*(name for name in names if name != BETWEEN), *([BETWEEN] if names else [])]
    if names:
        cells = [[name, *(_cell(at.get(p, {}).get(name), 1.0, 1) for p in points)] for name in names]
        yield table(["its kernels by the profiler, µs", *(p.label for p in points)], cells)
        if any(times[BETWEEN] < 0 for times in at.values()):
            yield f"{BETWEEN} less than 0: launches overlap, and what one waits for the one before is in its time"
        yield ""


def _ratio(a: float | None, b: float | None) -> str:
    return NONE if a is None or not b else f"{a / b:.2f}"


def record(
    compiled: Compiled,
    command: str,
    dtype: str,
    where: dict[str, Any],
    bandwidth: float,
    rows: Sequence[Row],
    serving: Serving = PLAIN,
) -> dict[str, Any]:
    """The machine, the spec, the bandwidth, the step, bytes of every point, and the rows."""
    points = dict.fromkeys(r.point for r in rows)
    sizes = [
        {**vars(p), "dense_bytes": dense_bytes(compiled.spec, p), "nsa_bytes": nsa_bytes(compiled, p, serving)}
        for p in points
    ]
    head = {**heading(compiled, command, dtype, where), "step": vars(serving)}
    return {**head, "copy_bandwidth": bandwidth, "points": sizes, "rows": [r.record() for r in rows]}

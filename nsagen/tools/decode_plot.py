"""`nsagen bench --decode --plot`: time of a step by context, a panel for batches and one for a single sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsagen.errors import NsagenError
from nsagen.tools.bench_plot import logarithmic
from nsagen.tools.bench_report import short_length
from nsagen.tools.decode_clock import Row
from nsagen.tools.decode_report import LIMIT

STYLES = {
    "ours": {"linewidth": 2.5, "marker": "o"},
    "dense": {"linewidth": 1.8, "marker": "s"},
    "bytes": {"linewidth": 1.2, "linestyle": "--", "marker": "."},
}


def plot(rows: Sequence[Row], title: str, file: Path) -> Path:
    """Write the picture; its kind follows the file's ending."""
    from matplotlib.figure import Figure

    timed = [r for r in rows if r.ms is not None]
    panels = {"several sequences": [r for r in timed if r.batch > 1], "batch 1": [r for r in timed if r.batch == 1]}
    panels = {name: found for name, found in panels.items() if found}
    if not panels:
        raise NsagenError(f"nothing was measured: {file} is not written")
    figure = Figure(figsize=(6.4 * len(panels), 5.4), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r.name for r in rows if r.name != LIMIT))}
    for (name, found), axes in zip(panels.items(), figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        _panel(axes, name, found, colours | {LIMIT: "black"})
    figure.suptitle(title)
    figure.savefig(file, dpi=150)
    return file


def _panel(axes: Any, title: str, rows: Sequence[Row], colours: dict[str, str]) -> None:
    for name, kind in {r.name: r.kind for r in rows}.items():
        found = sorted((r.context, r.ms) for r in rows if r.name == name and r.ms is not None)
        axes.plot(*zip(*found, strict=True), label=name, color=colours[name], **STYLES[kind])
    batches: dict[int, int] = {r.context: r.batch for r in rows}
    several = any(b > 1 for b in batches.values())
    labels = [short_length(n) + (f"\nx {batches[n]}" if several else "") for n in sorted(batches)]
    logarithmic(axes, sorted(batches), labels, title=title, xlabel="context", ylabel="ms a step")
    axes.legend(fontsize="small")

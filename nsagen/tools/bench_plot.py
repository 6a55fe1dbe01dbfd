"""`nsagen bench --plot`: milliseconds by length, a panel each for forward and backward, break-even lengths marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsagen.errors import NsagenError
from nsagen.tools.bench_clock import Row
from nsagen.tools.bench_report import break_evens, short_length, times

STYLES = {
    "whole": {"color": "black", "linewidth": 2.5, "marker": "o"},
    "part": {"linestyle": "--", "linewidth": 1.0, "marker": ".", "alpha": 0.8},
    "dense": {"linewidth": 1.8, "marker": "s"},
    "peer": {"linewidth": 1.8, "linestyle": ":", "marker": "^"},
}


def require_matplotlib(file: Path) -> None:
    """Before anything is measured: whether the picture can be drawn in the end."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NsagenError("--plot needs matplotlib: install it with `pip install 'nsagen[bench]'`") from None
    known = Figure().canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".").lower() not in known:
        raise NsagenError(f"--plot cannot write {file}: a picture's name ends in one of {', '.join(sorted(known))}")


def plot(rows: Sequence[Row], title: str, file: Path) -> Path:
    """Write the picture; its kind follows the file's ending."""
    from matplotlib.figure import Figure

    quantities = [q for q in ("forward", "backward") if times(rows, q)]
    if not quantities:
        raise NsagenError(f"nothing was measured: {file} is not written")
    figure = Figure(figsize=(6.4 * len(quantities), 5.4), layout="constrained")
    for quantity, axes in zip(quantities, figure.subplots(1, len(quantities), squeeze=False)[0], strict=True):
        _panel(axes, rows, quantity)
    both = break_evens(rows).get("forward + backward")
    figure.suptitle(title + (f"\nbreak-even forward + backward: {both.text}" if both else ""))
    figure.savefig(file, dpi=150)
    return file


def _panel(axes: Any, rows: Sequence[Row], quantity: str) -> None:
    found = times(rows, quantity)
    for i, (name, kind) in enumerate({r.name: r.kind for r in rows}.items()):  # the same colour in both panels
        if name in found:
            lengths = sorted(found[name])
            axes.plot(lengths, [found[name][n] for n in lengths], label=name, **{"color": f"C{i}", **STYLES[kind]})
    ticks = sorted({r.length for r in rows})
    logarithmic(axes, ticks, [short_length(n) for n in ticks], title=quantity, xlabel="tokens", ylabel="ms")
    _mark(axes, rows, quantity)
    axes.legend(fontsize="small", loc="upper left")


def logarithmic(axes: Any, ticks: Sequence[int], labels: Sequence[str], **names: str) -> None:
    """Both axes, with these ticks alone; names: its title and what is along it."""
    axes.set(xscale="log", yscale="log", **names)
    axes.set_xticks(ticks, labels)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _mark(axes: Any, rows: Sequence[Row], quantity: str) -> None:
    """A line where the whole operation passes the fastest dense attention, or in words where that is."""
    found = break_evens(rows).get(quantity)
    if found is None:
        return
    if found.length:
        axes.axvline(found.length, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(f"break-even: {found.text}", (0.02, 0.01), xycoords="axes fraction", fontsize="small")

"""What `nsagen tune` measured, beside what the model predicts: for `nsagen explain`."""

from __future__ import annotations

from collections.abc import Iterator

from nsagen.ir.plan import Kernel, Plan, TileConfig
from nsagen.render.module import kernel_keys
from nsagen.runtime import tuned
from nsagen.tools.console import table
from nsagen.tools.costs import H200, main_ops
from nsagen.tools.forecast import Tile, first_choices, in_op

HEAD = ("kernel", "GPU", "triton", "dots", "tokens", "first choice", "predicted", "ms", "fastest", "predicted", "ms")


def lines(plan: Plan) -> list[str]:
    """A row a kernel and place; nothing where nothing was measured."""
    rows = [row for name, key in kernel_keys(plan).items() for row in _rows(plan.kernel(name), plan, key)]
    if not rows:
        return []
    about = f"MEASURED (predicted: useful work at the {H200.name}'s peak rate × the tile's cost; ms: by `nsagen tune`)"
    return ["", about, "", table(HEAD, rows)]


def _rows(kernel: Kernel, plan: Plan, key: str) -> Iterator[list[str]]:
    for place, times in sorted(tuned.measured(kernel.name, key).items()):
        tiles = _tiles(kernel, place, set(times))
        best = tuned.best(times, tiles)
        if best is None:
            continue
        row = [kernel.name, place.gpu, place.triton, place.kind, str(place.length)]
        for label in (next(iter(tiles)), best):
            row += [label, _predicted(kernel, plan, tiles[label], place), _shown(times.get(label))]
        yield row


def _tiles(kernel: Kernel, place: tuned.Place, measured: set[str]) -> dict[str, TileConfig]:
    """Surviving candidates, best first, on the newest architecture where most of the measured ones are such."""
    bits = 16 if place.kind == "16" else 32
    tables = [
        {c.label.replace(" ", ""): c for c in t.configs if c.dropped is None}
        for t in reversed(kernel.tiles)
        if t.bits == bits
    ]
    return max(tables, key=lambda labels: len(measured & labels.keys()))


def _predicted(kernel: Kernel, plan: Plan, tile: TileConfig, place: tuned.Place) -> str:
    if H200.name not in place.gpu or place.kind != "16":
        return "-"  # the model knows no other rates
    tiles = first_choices(plan) | {kernel.name: Tile(tile.bm, tile.bn, tile.specialised)}
    launches = [x for op in main_ops(plan) for x in op.launches if kernel.name in (x.kernel, x.rides)]
    return _shown(1e3 * sum(in_op(x, plan, place.length, tiles) for x in launches))


def _shown(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.3f}"

"""A plan's op, run launch by launch: what the host of a generated module does, over NaN-filled float64 buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nsagen.errors import Refused
from nsagen.interp import bodies, lists
from nsagen.ir.plan import Buffer, Kernel, Launch, Op, Plan
from nsagen.sym import evaluate

Array = np.ndarray[Any, Any]
Tile = tuple[int, int]
Tiles = Mapping[str, Tile] | Tile

POISON = np.iinfo(np.int32).min  # in what nobody has written


def run_op(plan: Plan, op_name: str, inputs: Mapping[str, Array], tiles: Tiles) -> dict[str, Array]:
    """The outputs of one op. inputs: by buffer name; tiles: (bm, bn), or those by the name or body of a kernel.

    Queries are one chunk, and one sequence makes a batch entry: nothing is packed.
    """
    op = next(o for o in plan.ops if o.name == op_name)
    sizes = _sizes(op, inputs)
    buffers = {name: _exact(inputs[name]) for name in op.inputs}
    for launch in op.launches:
        _launch(plan, launch, buffers, sizes, tiles)
    return {name: buffers[name] for name in op.outputs}


def _exact(x: Array) -> Array:
    x = np.asarray(x)
    return x if x.dtype.kind in "iu" else x.astype(np.float64)


def _sizes(op: Op, inputs: Mapping[str, Array]) -> dict[str, int]:
    """The symbols of the buffers' shapes, from q; the items of an inverse list are counted where it is made."""
    batch, tokens = inputs["q" if "q" in op.inputs else op.inputs[0]].shape[:2]
    return {"B": batch, "T": tokens, "chunk": tokens}


def _launch(plan: Plan, launch: Launch, buffers: dict[str, Array], sizes: dict[str, int], tiles: Tiles) -> None:
    """Run one launch; buffers that it is the first to name are made for it."""
    if launch.when:
        raise Refused(f"launch {launch.kernel}: guarded variants are not interpreted")
    kernel = plan.kernel(launch.kernel)
    sizes = {**sizes, "items": _items(kernel, launch, buffers)}
    for _, name in launch.binds:
        if name not in buffers:
            buffers[name] = _poisoned(plan.buffer(name), sizes)
    operands = {operand: buffers[name] for operand, name in launch.binds}
    bodies.run(kernel, plan.heads, launch, operands, sizes, _tile(kernel, tiles))


def _items(kernel: Kernel, launch: Launch, buffers: dict[str, Array]) -> int:
    """How many items the inverse of a launch's block lists has; 0 without lists."""
    if kernel.body != "attend_list_dkv":
        return 0
    return len(lists.invert(buffers[dict(launch.binds)["items"]], kernel.walks[0].listed))


def _poisoned(buffer: Buffer, sizes: dict[str, int]) -> Array:
    shape = tuple(evaluate(x, sizes) for x in buffer.shape)
    return np.full(shape, POISON, np.int32) if buffer.dtype == "int32" else np.full(shape, np.nan)


def _tile(kernel: Kernel, tiles: Tiles) -> Tile:
    if not isinstance(tiles, Mapping):
        return tiles
    for key in (kernel.name, kernel.body):
        if key in tiles:
            return tiles[key]
    raise Refused(f"no tile for kernel {kernel.name}, body {kernel.body}")

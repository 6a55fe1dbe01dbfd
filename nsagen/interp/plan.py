"""A plan's op, run launch by launch: what the host of a generated module does, over NaN-filled float64 buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise

import numpy as np

from nsagen.errors import IRError
from nsagen.interp.attend import attend_dkv, attend_dq, attend_fwd
from nsagen.interp.domains import Array
from nsagen.interp.flat import combine_bwd, combine_fwd, sum_splits
from nsagen.interp.graph import exact
from nsagen.interp.lists import attend_list_dkv, attend_list_fwd, invert, merge_lists, sum_items, sum_lists
from nsagen.interp.numbers import evaluate
from nsagen.interp.program import Program, Run, poisoned, programs
from nsagen.interp.program import Sequence as Packed
from nsagen.interp.select import score_lse, select_blocks, select_scores
from nsagen.interp.split import split_attend, split_merge, split_select
from nsagen.ir.plan import Body, Buffer, Guard, Kernel, Launch, Op, Plan

Tile = tuple[int, int]  # BM, BN
Tiles = Tile | Mapping[str, Tile]  # one for all, or by the name or the body of a kernel


def _each(body: Callable[[Program], None]) -> Callable[[Run], None]:
    def run(launch: Run) -> None:
        for program in programs(launch):
            body(program)

    return run


SPLITS = 3  # programs that share a tile's loop

BODIES: dict[Body, Callable[[Run], None]] = {
    "attend_fwd": _each(attend_fwd),
    "attend_dq": _each(attend_dq),
    "attend_dkv": _each(attend_dkv),
    "attend_keys": _each(attend_dkv),
    "attend_wide_keys": _each(attend_dkv),
    "attend_queries": _each(attend_dq),
    "attend_list_dkv": attend_list_dkv,
    "attend_list_grads": attend_list_dkv,
    "attend_list_fwd": attend_list_fwd,
    "merge_lists": merge_lists,
    "sum_lists": sum_lists,
    "sum_list_parts": sum_lists,
    "sum_items": sum_items,
    "sum_splits": sum_splits,
    "combine_fwd": combine_fwd,
    "combine_bwd": combine_bwd,
    "score_lse": _each(score_lse),
    "select_scores": select_scores,
    "select_blocks": select_blocks,
    "split_attend": split_attend,
    "split_select": split_select,
    "split_merge": split_merge,
}


def run_op(
    plan: Plan,
    op: str,
    inputs: Mapping[str, Array],
    tiles: Tiles,
    *,
    scale: float | None = None,
    cu_seqlens: Sequence[int] | None = None,
    chunk: int | None = None,
    form: str = "plain",
    shares: int = SPLITS,
) -> dict[str, Array]:
    """The outputs of one op, by buffer name.

    inputs: by buffer name. Packed, with cu_seqlens, B is 1 and axes have the inputs' lengths; rows of no sequence stay
    NaN. chunk: queries of a host loop over chunks, all of them by default. scale defaults to Dqk^-½. form: "plain" or
    "specialised" kernels, where there are both. shares: programs of such that share a key tile of tokens, if any do.
    """
    host = _Host(plan, next(o for o in plan.ops if o.name == op), inputs, tiles, cu_seqlens)
    host.form, host.sizes["shares"] = form, shares
    host.scale = plan.heads.qk_dim**-0.5 if scale is None else scale
    with np.errstate(over="ignore", invalid="ignore"):  # masked scores may be anything
        host.run(chunk)
    return {name: host.buffers[name] for name in host.op.outputs}


class _Host:
    """Buffers and sizes of one call of an op."""

    def __init__(
        self, plan: Plan, op: Op, inputs: Mapping[str, Array], tiles: Tiles, cu_seqlens: Sequence[int] | None
    ) -> None:
        self.plan, self.op, self.tiles, self.scale, self.form = plan, op, tiles, 1.0, "plain"
        self.buffers = {name: exact(inputs[name]) for name in op.inputs}
        batch, tokens = self.buffers["q"].shape[:2]
        self.sizes = {"B": batch, "T": tokens, "chunk": tokens, "splits": SPLITS, "shares": SPLITS}
        self.packed = cu_seqlens is not None
        ends = [0, tokens] if cu_seqlens is None else cu_seqlens
        self.sequences = tuple(Packed(a, b - a) for a, b in pairwise(ends))
        self.axes: dict[str, int] = {}
        for name, array in self.buffers.items():
            self._measure(plan.buffer(name), array)

    def _measure(self, buffer: Buffer, array: Array) -> None:
        """Check the shape of an input; packed, take the lengths of pooled axes from it."""
        if self.packed:
            self.axes.update(zip(buffer.axes, array.shape, strict=True))
        elif array.shape != self._shape(buffer):
            raise IRError(f"buffer %{buffer.name}: {array.shape} is not {self._shape(buffer)}")

    def _shape(self, buffer: Buffer) -> tuple[int, ...]:
        pairs = zip(buffer.axes, buffer.shape, strict=True)
        return tuple(self.axes[a] if a in self.axes else evaluate(size, self.sizes) for a, size in pairs)

    def run(self, chunk: int | None) -> None:
        """Launches in order; neighbours over chunks share their loop and its buffers."""
        for over, launches in groupby(self.op.launches, key=lambda launch: launch.over):
            if over is None:
                for launch in launches:
                    self._launch(launch, range(0))
            else:
                self._chunked(list(launches), chunk)

    def _chunked(self, launches: list[Launch], chunk: int | None) -> None:
        """Buffers of one chunk's size live through one turn; what they leave is in the others."""
        for rows in _chunks(self.sizes["T"], chunk):
            self.sizes["chunk"] = len(rows)
            for launch in launches:
                self._launch(launch, rows)
            for name in [n for n in self.buffers if {"chunk", "items"} & {*self.plan.buffer(n).axes}]:
                del self.buffers[name]

    def _launch(self, launch: Launch, chunk: range) -> None:
        if not all(_holds(guard, self.op, self.sizes, self.form) for guard in launch.when):
            return
        kernel = self.plan.kernel(launch.kernel)
        arrays = {operand: self._bound(kernel, operand, launch, chunk) for operand, _ in launch.binds}
        bm, bn = self._tile(kernel)
        batch = self.sizes["B"]
        later = kernel.body == "sum_items" and chunk.start > 0  # adds to what earlier chunks gave every key
        add = launch.accumulate or later
        left = (launch.leaves, next((k.takes.size for k in self.plan.kernels if k.takes), 0))
        run = Run(kernel, self.plan.heads, arrays, self.sequences, batch, bm, bn, self.scale, add, chunk, *left)
        BODIES[kernel.body](run)

    def _bound(self, kernel: Kernel, operand: str, launch: Launch, chunk: range) -> Array:
        """The buffer of an operand; the first launch to name it finds it empty."""
        name = dict(launch.binds)[operand]
        if name not in self.buffers:
            if next(o for o in kernel.operands if o.name == operand).mode in ("load", "update"):
                raise IRError(f"op {self.op.name}: launch {kernel.name}: %{name} is read before it is written")
            buffer = self.plan.buffer(name)
            if "items" in buffer.axes:
                self.sizes["items"] = self._items(launch, evaluate(buffer.shape[1], self.sizes), chunk)
            if "tiles" in buffer.axes:
                size = next(w.listed.size for w in kernel.walks if w.listed)
                self.sizes["tiles"] = -(-size // self._tile(kernel)[1])
            self.buffers[name] = poisoned(self._shape(buffer), buffer.dtype == "int32")
        return self.buffers[name]

    def _items(self, launch: Launch, size: int, chunk: range) -> int:
        """How many items the inverse of the launch's block lists has."""
        return len(invert(self.buffers[dict(launch.binds)["items"]], size, self.sequences, chunk, launch.leaves))

    def _tile(self, kernel: Kernel) -> Tile:
        if isinstance(self.tiles, tuple):
            return self.tiles
        return next(self.tiles[key] for key in (kernel.name, kernel.body) if key in self.tiles)


def _chunks(tokens: int, chunk: int | None) -> Iterator[range]:
    step = chunk or tokens
    for first in range(0, tokens, step):
        yield range(first, min(first + step, tokens))


def _holds(guard: Guard, op: Op, sizes: Mapping[str, int], form: str) -> bool:
    """Whether a variant is taken here: training, on no particular chip."""
    direction = "backward" if op.doc.endswith("_grad") else "forward"
    found: dict[str, str | int] = {"mode": "train", "direction": direction, "arch": "", "form": form}
    return guard.holds((found | {"length": sizes["T"], "shares": sizes["shares"]})[guard.key])

"""One launch in numpy, and one program of its grid: its tile, its rows, and how it loads and stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from nsagen.errors import IRError
from nsagen.interp.domains import Array
from nsagen.interp.numbers import evaluate
from nsagen.interp.walks import Env, Step, listed_steps, steps
from nsagen.ir.graph import Heads, KeyAxis
from nsagen.ir.plan import HEADS_IN_TURN, Kernel, Operand, Walk


@dataclass(frozen=True)
class Sequence:
    """Tokens [start, start + tokens) of the packed rows; the whole batch entry where nothing is packed."""

    start: int
    tokens: int


@dataclass(frozen=True)
class Run:
    """One launch: its kernel, the arrays bound to the operands, and the tile sizes."""

    kernel: Kernel
    heads: Heads
    arrays: Mapping[str, Array]
    sequences: tuple[Sequence, ...]
    batch: int
    bm: int
    bn: int
    scale: float
    accumulate: bool = False
    chunk: range = range(0)  # query rows of a launch over chunks
    leaves: int = 0  # of each list, the last blocks up to the query's own, which another kernel takes
    size: int = 0  # tokens of a listed block

    @property
    def line(self) -> str:
        return f"kernel {self.kernel.name}"

    @property
    def rows_per_query(self) -> int:
        return rows_per_query(self.kernel, self.heads, self.bm)

    @cached_property
    def bt(self) -> int:
        if self.bm < self.rows_per_query:
            raise IRError(f"{self.line}: a tile of {self.bm} rows holds no query of {self.rows_per_query}")
        return self.bm // self.rows_per_query

    @cached_property
    def operands(self) -> dict[str, Operand]:
        return {o.name: o for o in self.kernel.operands}

    def base(self, operand: str, start: int) -> int:
        access = next(a for a in self.kernel.accesses if a.operand == operand)
        return evaluate(access.base, {"start": start})

    def needs_guard(self, operand: str) -> bool:
        return next(a for a in self.kernel.accesses if a.operand == operand).guard == "tile"


def rows_per_query(kernel: Kernel, heads: Heads, bm: int) -> int:
    """Rows of a tile that one query has: its group's heads; all where it walks a list of its own; one where the heads
    come in turn."""
    if any(w.listed and w.direction == "forward" for w in kernel.walks):
        return bm
    return 1 if kernel.body in HEADS_IN_TURN else heads.group


@dataclass(frozen=True)
class Rows:
    """Rows of a tile: index on an axis of `length`, head, and which of them stand for something."""

    at: Array
    heads: Array
    live: Array
    length: int


@dataclass(frozen=True)
class Program:
    """A tile that starts at `first`, for one batch entry, sequence and KV head."""

    run: Run
    batch: int
    sequence: Sequence
    head: int
    first: int

    def env(self, axis: KeyAxis) -> Env:
        """Numbers for a walk's symbols; the tile is one of queries or one of keys, so `first` is t0 and s0."""
        tokens = self.sequence.tokens
        env = {"T": tokens, "N": evaluate(axis.length(), {"T": tokens}), "BM": self.run.bm}
        return env | {"BT": self.run.bt, "BN": self.run.bn, "t0": self.first, "s0": self.first}

    def steps(self, walk: Walk) -> Iterator[Step]:
        """The walk's steps, each checked not to load past its end."""
        line = f"{self.run.line}: walk {walk.piece.name}"
        for step in self._steps(walk):
            step.check_loads(line)
            yield step

    def _steps(self, walk: Walk) -> Iterator[Step]:
        env = self.env(walk.axis)
        if walk.listed is None:
            return steps(walk, env)
        lists = next(o.name for o in self.run.kernel.operands if o.role == "blocks" and o.source == walk.source)
        blocks = self.run.arrays[lists][self.batch, self.sequence.start + self.first, self.head]
        if self.run.leaves:
            blocks = blocks[blocks <= self.first // walk.listed.size - self.run.leaves]
        return listed_steps(walk, walk.listed, blocks, env)

    # --- rows

    def queries(self, first: int) -> Rows:
        """BM rows from query `first` on, heads of the group fastest."""
        row = np.arange(self.run.bm)
        return self.query_rows(first + row // self.run.rows_per_query)

    def query_rows(self, t: Array) -> Rows:
        """The rows of queries t [BM]; those past the sequence, the group or the tile's whole queries are dead."""
        per, group = self.run.rows_per_query, self.run.heads.group
        row = np.arange(len(t))
        head, whole = row % per, row < self.run.bt * per
        live = (t < self.sequence.tokens) & (t >= 0) & (head < group) & whole
        return Rows(t, self.head * group + np.minimum(head, group - 1), live, self.sequence.tokens)

    def keys(self, at: Array, length: int) -> Rows:
        return Rows(at, np.full(len(at), self.head), at < length, length)

    # --- memory

    def load(self, operand: str, rows: Rows, guarded: bool = True) -> Array:
        """[rows, …]: 0 for dead rows where the access is guarded; else every row is read, and must be there."""
        array, base = self.run.arrays[operand], self.run.base(operand, self.sequence.start)
        pick = rows.live
        if not guarded and not self.run.needs_guard(operand):
            pick = np.ones(len(rows.at), bool)
            if (rows.at >= rows.length).any():
                raise IRError(
                    f"{self.run.line}: access {operand}: row {rows.at.max()} of {rows.length} without a guard"
                )
        out = np.zeros((len(rows.at), *array.shape[3:]), array.dtype)
        out[pick] = array[self.batch, base + rows.at[pick], rows.heads[pick]]
        return out

    def store(self, operand: str, rows: Rows, value: Array) -> None:
        """Write the live rows, or add to what is there; an operand that the launch leaves out takes nothing."""
        if operand not in self.run.arrays:
            return
        array, base = self.run.arrays[operand], self.run.base(operand, self.sequence.start)
        index = (self.batch, base + rows.at[rows.live], rows.heads[rows.live])
        mode = self.run.operands[operand].mode
        if mode == "update":
            array[index] = value[rows.live]
        elif mode == "accumulate" and self.run.accumulate:
            array[index] += value[rows.live]
        else:
            write_once(array, index, value[rows.live], f"{self.run.line}: store {operand}")


POISON = np.iinfo(np.int32).min  # an integer that nobody has written; floats are NaN


def poisoned(shape: tuple[int, ...], integer: bool) -> Array:
    return np.full(shape, POISON, np.int32) if integer else np.full(shape, np.nan)


def write_once(array: Array, index: tuple[Any, ...], value: Array, line: str) -> None:
    """array[index] = value, where nobody has written yet."""
    before = array[index]
    if not (before == POISON if array.dtype.kind == "i" else np.isnan(before)).all():
        raise IRError(f"{line}: a row is written twice")
    array[index] = value


def programs(run: Run) -> Iterator[Program]:
    """The programs of a grid over an axis, tiles fastest."""
    axis = run.kernel.grid.axis
    if axis is None:
        raise IRError(f"{run.line}: a grid over flat rows has no tiles of an axis")
    step = {"BT": run.bt, "BN": run.bn, "BM": run.bm}[run.kernel.grid.step.name]
    for b, sequence, h in product(range(run.batch), run.sequences, range(run.heads.kv)):
        firsts = range(0, evaluate(axis.length(), {"T": sequence.tokens}), step)
        for first in firsts if run.kernel.grid.order == "ascending" else reversed(firsts):
            yield Program(run, b, sequence, h, first)

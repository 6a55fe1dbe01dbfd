"""The bodies of kernels over flat rows [B·T·Hq]: templates/combine_fwd.py.j2 and combine_bwd.py.j2."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nsagen.errors import IRError
from nsagen.interp.columns import join, split
from nsagen.interp.domains import Array
from nsagen.interp.graph import shifted
from nsagen.interp.program import Run, write_once


def combine_fwd(run: Run) -> None:
    """out = Σ_c gates[…, c]·term_c."""
    terms = _named(run, "term")
    for rows in _tiles(run, "out"):
        gates = _rows(run, "gates", rows)
        out = [np.zeros((len(rows), width)) for width in run.kernel.v_parts]
        for c, term in enumerate(terms):
            held = split(_rows(run, term, rows), run.kernel.v_parts)
            out = [a + gates[:, c, None] * x for a, x in zip(out, held, strict=True)]
        _store(run, "out", rows, join(out, run.heads.v_dim))


def combine_bwd(run: Run) -> None:
    """delta_c = d_gates_c = rowsum(d_out·(term_c + rest_c)); with gates, shift_c = lse_c − ln g_c too."""
    for rows in _tiles(run, "d_out"):
        sums = [_row_sum(run, term, rows) for term in _named(run, "term")]
        for delta, total in zip(_named(run, "delta"), sums, strict=True):
            _store(run, delta, rows, total[:, None])
        if "gates" in run.arrays:
            _store_columns(run, rows, _columns(run), np.stack(sums, 1))
            _store_shifts(run, rows)


def sum_splits(run: Run) -> None:
    """dk and dv of every row: the parts of the programs that shared its tile, added in order."""
    parts = run.arrays["parts"]
    parts = parts.reshape(len(parts), -1, parts.shape[-1])
    for rows in _tiles(run, "dk"):
        total = np.add.reduce(parts[:, rows], 0)
        for operand, value in (("dk", total[:, : run.heads.qk_dim]), ("dv", total[:, run.heads.qk_dim :])):
            if run.accumulate:
                value = value + _rows(run, operand, rows)
                run.arrays[operand].reshape(-1, value.shape[1])[rows] = np.nan
            _store(run, operand, rows, value)


def _columns(run: Run) -> list[int]:
    """The gates of the launch's terms."""
    return [int(x.removeprefix("term")) for x in _named(run, "term")]


def _store_columns(run: Run, rows: Array, columns: list[int], value: Array) -> None:
    array = run.arrays["d_gates"]
    flat = array.reshape(int(np.prod(array.shape[:3])), -1)
    write_once(flat, (rows[:, None], np.array(columns)[None, :]), value, f"{run.line}: store d_gates")


def _store_shifts(run: Run, rows: Array) -> None:
    gates = _rows(run, "gates", rows)
    for c, shift, lse in zip(_columns(run), _named(run, "shift"), _named(run, "lse"), strict=True):
        _store(run, shift, rows, shifted(_rows(run, lse, rows)[:, 0], gates[:, c])[:, None])


def _row_sum(run: Run, term: str, rows: Array) -> Array:
    value, rest = _rows(run, term, rows), "rest" + term.removeprefix("term")
    if rest in run.arrays:
        value = value + _rows(run, rest, rows)
    parts = run.kernel.v_parts
    pairs = zip(split(_rows(run, "d_out", rows), parts), split(value, parts), strict=True)
    return np.add.reduce([(d * v).sum(1) for d, v in pairs])


def _named(run: Run, role: str) -> list[str]:
    return [o.name for o in run.kernel.operands if o.role == role]


def _tiles(run: Run, like: str) -> Iterator[Array]:
    """BM rows a program; the last one may pass the end, where every access has to be guarded."""
    total = int(np.prod(run.arrays[like].shape[:3]))
    unguarded = [a.operand for a in run.kernel.accesses if a.guard != "tile"]
    for first in range(0, total, run.bm):
        if unguarded and first + run.bm > total:
            raise IRError(f"{run.line}: access {unguarded[0]}: rows to {first + run.bm} of {total} without a guard")
        yield np.arange(first, min(first + run.bm, total))


def _rows(run: Run, operand: str, rows: Array) -> Array:
    array = run.arrays[operand]
    return array.reshape(int(np.prod(array.shape[:3])), -1)[rows]


def _store(run: Run, operand: str, rows: Array, value: Array) -> None:
    array = run.arrays[operand]
    write_once(array.reshape(int(np.prod(array.shape[:3])), -1), (rows,), value, f"{run.line}: store {operand}")

"""What the templates' bodies compute, tile by tile in float64. Heads, batch entries and tiles are plain loops.

Rows are loaded as the kernels load them: a step that passes the end of its axis without testing the extent raises
IRError, so a proof that does not hold shows, and what nobody writes stays NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsagen.errors import IRError, Refused
from nsagen.interp import lists
from nsagen.interp.graph import best_blocks, importance
from nsagen.interp.walks import Step, one_query, steps
from nsagen.ir.graph import Heads, Select
from nsagen.ir.plan import Kernel, Launch, Walk
from nsagen.sym import evaluate

Array = np.ndarray[Any, Any]


def run(launch: Launched) -> None:
    """Run one launch; what it stores is written in place."""
    _BODIES[launch.kernel.body](launch)


@dataclass(frozen=True)
class Launched:
    """A launch with numbers for its symbols and arrays for its operands."""

    kernel: Kernel
    heads: Heads
    launch: Launch
    operands: dict[str, Array]  # by the operand's name
    sizes: dict[str, int]  # B, T
    bm: int
    bn: int

    @property
    def tokens(self) -> int:
        return self.sizes["T"]

    @property
    def scale(self) -> float:
        return self.heads.qk_dim**-0.5

    @property
    def queries(self) -> int:
        """Queries of a tile, BT."""
        rows = self.heads.group
        if self.kernel.body == "select_scores":
            rows = 1 << (rows - 1).bit_length()  # heads are added by a reshape
        if self.bm < rows:
            raise Refused(f"{self.kernel.name}: a tile of {self.bm} rows holds no query of {rows} heads")
        if "group_fills_tile" in self.kernel.facts and self.bm % rows:
            raise Refused(f"{self.kernel.name}: was promised a BM that {rows} heads fill, got {self.bm}")
        return 1 if one_query(self.kernel) else self.bm // rows

    def named(self, role: str, source: int = 0) -> Array:
        """The array bound to the operand of a role (of one of the sources)."""
        found = next(o for o in self.kernel.operands if o.role == role and o.source == source)
        return self.operands[found.name]

    def env(self, walk: Walk, **first: int) -> dict[str, int]:
        keys = evaluate(walk.axis.length(), {"T": self.tokens})
        return {"T": self.tokens, "N": keys, "BM": self.bm, "BT": self.queries, "BN": self.bn, **first}

    def each_head(self) -> Iterator[tuple[int, int, slice]]:
        """(batch entry, KV head, its query heads)."""
        for b, h in np.ndindex(self.sizes["B"], self.heads.kv):
            yield b, h, slice(h * self.heads.group, (h + 1) * self.heads.group)

    def store(self, role: str, at: tuple[Any, ...], x: Array) -> None:
        """Write, or add where the launch says so, column part by column part: columns of no part stay as they are."""
        target = self.named(role)[at]
        columns = self.v_columns if role in ("dv", "out") else self.qk_columns
        adds = self.launch.accumulate and any(o.role == role and o.mode == "accumulate" for o in self.kernel.operands)
        for part in columns:
            target[..., part] = x[..., part] + (target[..., part] if adds else 0.0)

    @property
    def qk_columns(self) -> tuple[slice, ...]:
        return _columns(self.kernel.qk_parts)

    @property
    def v_columns(self) -> tuple[slice, ...]:
        return _columns(self.kernel.v_parts)


def _columns(widths: tuple[int, ...]) -> tuple[slice, ...]:
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return tuple(slice(lo, lo + width) for lo, width in zip(starts, widths, strict=True))


def _dot(a: Array, b: Array, columns: tuple[slice, ...]) -> Array:
    """a·bᵀ, summed over the parts of the head dim."""
    total = np.zeros((len(a), len(b)))
    for part in columns:
        total += a[:, part] @ b[:, part].T
    return total


# --- query tiles


@dataclass(frozen=True)
class _Rows:
    """Rows of a query tile: the queries `t`, each with the heads of one group."""

    batch: int
    kv_head: int
    t: Array  # [queries], as they come
    heads: slice
    group: int

    @property
    def column(self) -> Array:
        """The query of every row, [rows, 1]."""
        return np.repeat(self.t, self.group)[:, None]

    def load(self, x: Array) -> Array:
        """x [B, T, Hq, …] -> [rows, …]."""
        tile = x[self.batch, self.t, self.heads]
        return tile.reshape(-1, *tile.shape[2:])

    def shaped(self, x: Array) -> Array:
        """[rows, …] -> [queries, group, …]."""
        return x.reshape(len(self.t), self.group, *x.shape[1:])

    @property
    def place(self) -> tuple[int, slice, slice]:
        """Of consecutive queries, in [B, T, Hq, …]."""
        return self.batch, slice(int(self.t[0]), int(self.t[-1]) + 1), self.heads


def _rows(run: Launched, b: int, h: int, heads: slice, t: Array) -> _Rows:
    return _Rows(b, h, t, heads, run.heads.group)


def _query_tiles(run: Launched) -> Iterator[tuple[int, Array, list[list[Step]]]]:
    """(t0, queries, the steps of each walk without a list)."""
    for t0 in range(0, run.tokens, run.queries):
        found = [[] if w.listed else steps(w, run.env(w, t0=t0)) for w in run.kernel.walks]
        yield t0, np.arange(t0, min(t0 + run.queries, run.tokens)), found


@dataclass(frozen=True)
class _KeyTile:
    k: Array  # [keys, Dqk]
    v: Array  # [keys, Dv]
    seen: Array  # [rows, keys]


def _key_tiles(run: Launched, rows: _Rows, found: list[list[Step]]) -> Iterator[_KeyTile]:
    """The key tiles that a query tile walks, source after source."""
    for walk, planned in zip(run.kernel.walks, found, strict=True):
        k, v = (run.named(role, walk.source)[rows.batch, :, rows.kv_head] for role in ("k", "v"))
        for step, length in _listed(run, rows, walk) if walk.listed else ((s, len(k)) for s in planned):
            s = step.indices(length)
            seen = step.seen(rows.column, s[None, :], {"T": run.tokens, "N": length})
            yield _KeyTile(k[s], v[s], seen)


def _listed(run: Launched, rows: _Rows, walk: Walk) -> Iterator[tuple[Step, int]]:
    """(step, where its keys end) over the blocks that the tile's one query lists: those before the first −1."""
    assert walk.listed is not None
    (segment,) = walk.segments
    (t,) = rows.t
    blocks = run.named("blocks", walk.source)[rows.batch, t, rows.kv_head]
    for block in blocks[: np.count_nonzero(blocks >= 0)]:
        first = int(block) * walk.listed.size
        end = min(run.tokens, first + walk.listed.size)
        for at in range(first, first + walk.listed.size, run.bn):
            yield Step(at, run.bn, segment.name, segment.masks), end


def _attend_fwd(run: Launched) -> None:
    for _, t, found in _query_tiles(run):
        for b, h, heads in run.each_head():
            rows = _rows(run, b, h, heads, t)
            _softmax(run, rows, _key_tiles(run, rows, found))


def _softmax(run: Launched, rows: _Rows, tiles: Iterator[_KeyTile]) -> None:
    """One running softmax over the tiles."""
    q = rows.load(run.named("q"))
    m, z = np.full(len(q), -1e30), np.zeros(len(q))  # finite: a first tile may be masked whole
    acc = np.zeros((len(q), run.heads.v_dim))
    for tile in tiles:
        x = np.where(tile.seen, _dot(q, tile.k, run.qk_columns) * run.scale, -np.inf)
        m_new = np.maximum(m, x.max(1, initial=-np.inf))
        p, fade = np.exp(x - m_new[:, None]), np.exp(m - m_new)
        m, z, acc = m_new, z * fade + p.sum(1), acc * fade[:, None] + p @ tile.v
    if "rows_may_be_empty" not in run.kernel.facts and (z == 0).any():
        raise IRError(f"{run.kernel.name}: query {rows.column[z == 0][0, 0]} sees no key, and no fact allows it")
    full = np.where(z > 0, z, 1.0)
    run.store("out", rows.place, rows.shaped(acc / full[:, None]))
    run.named("lse")[rows.place] = rows.shaped(np.where(z > 0, m + np.log(full), -np.inf))


@dataclass(frozen=True)
class _Statistics:
    """Of every row, as a column: lse (+inf where it sees nothing, so that p = 0), delta and gate."""

    lse: Array
    delta: Array
    gate: Array


def _statistics(run: Launched, rows: _Rows) -> _Statistics:
    lse, delta = rows.load(run.named("lse")), rows.load(run.named("delta"))
    gate = np.ones(len(lse))
    if run.launch.gate is not None:
        gate = rows.load(run.named("gates"))[:, run.launch.gate]
    if "rows_may_be_empty" in run.kernel.facts:
        lse = np.where(np.isneginf(lse), np.inf, lse)
    return _Statistics(lse[:, None], delta[:, None], gate[:, None])


def _attend_dq(run: Launched) -> None:
    for _, t, found in _query_tiles(run):
        for b, h, heads in run.each_head():
            rows = _rows(run, b, h, heads, t)
            dq = np.zeros((len(rows.column), run.heads.qk_dim))
            for tile in _key_tiles(run, rows, found):
                _, ds = _score_gradient(run, rows, tile)
                dq += ds @ tile.k
            run.store("dq", rows.place, rows.shaped(dq * run.scale))


def _score_gradient(run: Launched, rows: _Rows, tile: _KeyTile) -> tuple[Array, Array]:
    """(gate·p, ds), [rows, keys] both: p = exp(s − lse), ds = p·(gate·dp − delta)."""
    of = _statistics(run, rows)
    x = _dot(rows.load(run.named("q")), tile.k, run.qk_columns) * run.scale
    dp = _dot(rows.load(run.named("d_out")), tile.v, run.v_columns)
    with np.errstate(over="ignore"):  # of keys that the row does not see
        p = np.where(tile.seen, np.exp(x - of.lse), 0.0)
    return p * of.gate, p * (dp * of.gate - of.delta)


# --- key tiles


def _attend_dkv(run: Launched) -> None:
    keys = run.named("k").shape[1]
    for s0 in range(0, keys, run.bn):
        s = np.arange(s0, min(s0 + run.bn, keys))
        found = [step for w in run.kernel.walks for step in steps(w, run.env(w, s0=s0))]
        for b, h, heads in run.each_head():
            loads = ((step, step.indices(run.tokens)) for step in found)
            dk, dv = _key_gradients(run, s, ((step, _rows(run, b, h, heads, t)) for step, t in loads if len(t)))
            place = (b, slice(s0, s0 + len(s)), h)
            run.store("dk", place, dk * run.scale)
            run.store("dv", place, dv)


def _key_gradients(run: Launched, s: Array, queries: Iterator[tuple[Step, _Rows]]) -> tuple[Array, Array]:
    """dk without the scale, and dv, of the keys s from the query tiles that see them."""
    dk, dv = np.zeros((len(s), run.heads.qk_dim)), np.zeros((len(s), run.heads.v_dim))
    sizes = {"T": run.tokens, "N": run.named("k").shape[1]}
    for step, rows in queries:
        k, v = (run.named(role)[rows.batch, s, rows.kv_head] for role in ("k", "v"))
        p, ds = _score_gradient(run, rows, _KeyTile(k, v, step.seen(rows.column, s[None, :], sizes)))
        dk += ds.T @ rows.load(run.named("q"))
        dv += p.T @ rows.load(run.named("d_out"))
    return dk, dv


def _attend_list_dkv(run: Launched) -> None:
    """One part an item of the inverse list; rows past the sequence hold zeros, since the sums read them."""
    (walk,) = run.kernel.walks
    (segment,) = walk.segments
    assert walk.listed is not None
    size, parts = walk.listed.size, run.named("parts")
    for i, item in enumerate(lists.invert(run.named("items"), size)):
        parts[i] = 0.0
        s = np.arange(item.block * size, min((item.block + 1) * size, run.tokens))
        heads = slice(item.head * run.heads.group, (item.head + 1) * run.heads.group)
        starts = range(0, len(item.queries), run.queries)
        tiles = [np.array(item.queries[at : at + run.queries]) for at in starts]
        step = Step(0, run.queries, segment.name, segment.masks)
        rows = ((step, _rows(run, item.batch, item.head, heads, t)) for t in tiles)
        dk, dv = _key_gradients(run, s, rows)
        parts[i, : len(s)] = np.concatenate([dk * run.scale, dv], 1)


def _sum_items(run: Launched) -> None:
    """dk and dv of every key block: the parts of its items, added in order."""
    parts, (batch, tokens, heads) = run.named("parts"), run.named("dk").shape[:3]
    size = parts.shape[1]
    sums = np.zeros((batch, -(-tokens // size), heads, *parts.shape[1:]))
    for part, item in zip(parts, lists.invert(run.named("items"), size), strict=True):
        sums[item.batch, item.block, item.head] += part
    rows = sums.swapaxes(2, 3).reshape(batch, -1, heads, parts.shape[2])[:, :tokens]
    run.store("dk", (slice(None),), rows[..., : run.heads.qk_dim])
    run.store("dv", (slice(None),), rows[..., run.heads.qk_dim :])


# --- flat rows [B·T·Hq]


def _flat_tiles(run: Launched, rows: int) -> Iterator[slice]:
    for at in range(0, rows, run.bm):
        yield slice(at, min(at + run.bm, rows))


def _flat(x: Array) -> Array:
    """A view of [B, T, Hq, …] as [rows, …]."""
    view = x.view()
    view.shape = (-1, *x.shape[3:])  # raises where a copy would be needed, whose writes were lost
    return view


def _terms(run: Launched) -> list[Array]:
    return [_flat(run.operands[o.name]) for o in run.kernel.operands if o.role == "term"]


def _combine_fwd(run: Launched) -> None:
    terms, gates, out = _terms(run), _flat(run.named("gates")), _flat(run.named("out"))
    for rows in _flat_tiles(run, len(out)):
        for part in run.v_columns:
            out[rows, part] = sum(gates[rows, c, None] * x[rows, part] for c, x in enumerate(terms))


def _combine_bwd(run: Launched) -> None:
    """delta_c = g_c·rowsum(d_out·term_c), the gates' gradient without g_c; g_c = 1 without gates."""
    terms, d_out = _terms(run), _flat(run.named("d_out"))
    deltas = [_flat(run.operands[o.name]) for o in run.kernel.operands if o.role == "delta"]
    gated = any(o.role == "gates" for o in run.kernel.operands)
    for rows in _flat_tiles(run, len(d_out)):
        for c, (term, delta) in enumerate(zip(terms, deltas, strict=True)):
            sums = np.zeros(len(d_out[rows]))
            for part in run.v_columns:
                sums += (d_out[rows, part] * term[rows, part]).sum(1)
            delta[rows] = sums * (_flat(run.named("gates"))[rows, c] if gated else 1.0)
            if gated:
                _flat(run.named("d_gates"))[rows, c] = sums


# --- selection


def _select_scores(run: Launched) -> None:
    """exp(scale·q·k − lse), summed over the heads of the group, up to the walk's last cut: no mask is tested."""
    scores, keys = run.named("scores"), run.named("k").shape[1]
    for t0, t, found in _query_tiles(run):
        end = max((step.at + step.width for step in found[0]), default=0)
        for b, h, heads in run.each_head():
            rows = _rows(run, b, h, heads, t)
            k = run.named("k")[b, : min(end, keys), h]
            lse = rows.load(run.named("lse"))
            x = _dot(rows.load(run.named("q")), k, run.qk_columns) * run.scale
            with np.errstate(over="ignore"):  # blocks that have not ended hold anything
                p = np.exp(x - np.where(np.isneginf(lse), np.inf, lse)[:, None])
            scores[b, t0 : t0 + len(t), h, : len(k)] = rows.shaped(p).sum(1)


def _select_blocks(run: Launched) -> None:
    """The best blocks of every query and KV head; only scores of blocks that have ended are read."""
    node: Select | None = run.kernel.select
    if node is None:
        raise IRError(f"{run.kernel.name}: nothing says what it selects")
    scores, blocks = run.named("scores"), run.named("blocks")
    for b, t, h in np.ndindex(*blocks.shape[:3]):
        ended = max(0, t + 1 - node.axis.block + node.axis.stride) // node.axis.stride
        best = best_blocks(node, t, importance(node, scores[b, t, h, :ended], t // node.size + 1))
        blocks[b, t, h] = best + [-1] * (node.count - len(best))


_BODIES: dict[str, Callable[[Launched], None]] = {
    "attend_fwd": _attend_fwd,
    "attend_dq": _attend_dq,
    "attend_dkv": _attend_dkv,
    "attend_list_dkv": _attend_list_dkv,
    "sum_items": _sum_items,
    "combine_fwd": _combine_fwd,
    "combine_bwd": _combine_bwd,
    "select_scores": _select_scores,
    "select_blocks": _select_blocks,
}

"""The bodies of attention kernels in numpy: what templates/attend_*.py.j2 do to one tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsagen.errors import IRError
from nsagen.interp.columns import dot, join, split
from nsagen.interp.domains import Array
from nsagen.interp.program import Program, Rows, write_once
from nsagen.interp.walks import Step
from nsagen.ir.plan import Kernel, Walk

FLOOR = -1.0e30  # the running maximum starts finite: a first tile that is masked whole must not give NaN


def attend_fwd(p: Program) -> None:
    """One running softmax over all walks of a query tile; and one of the keys that it takes over, if it does."""
    kernel, rows = p.run.kernel, p.queries(p.first)
    q = split(p.load("q", rows), kernel.qk_parts)
    own = taken = Softmax.empty(rows, kernel.v_parts)
    takes = "lse_taken" in p.run.arrays
    for walk in kernel.walks:
        for step in p.steps(walk):
            k, v = _keys(p, walk, step)
            scores = np.where(_seen(p, walk, step, rows.at), dot(q, k) * p.run.scale, -np.inf)
            own = own.then(scores, v)
            if takes:
                taken = taken.then(np.where(taken_keys(kernel, rows, step.indices), scores, -np.inf), v)
    z = store_lse(p, rows, own.m, own.z)
    out = join([a / z[:, None] for a in own.acc], p.run.heads.v_dim)
    p.store("out", rows, out)
    p.store("rest", rows, out - out)  # float64 keeps all of it
    if takes:
        _complete(p, rows, taken)


@dataclass(frozen=True)
class Softmax:
    """A running one of each row: the maximum, the sum of weights relative to it, and theirs with the values."""

    m: Array
    z: Array
    acc: list[Array]

    @classmethod
    def empty(cls, rows: Rows, v_parts: tuple[int, ...]) -> Softmax:
        count = len(rows.at)
        return cls(np.full(count, FLOOR), np.zeros(count), split(np.zeros((count, 0)), v_parts))

    def then(self, scores: Array, v: list[Array]) -> Softmax:
        top = np.maximum(self.m, scores.max(1))
        weight, fade = np.exp(scores - top[:, None]), np.exp(self.m - top)
        acc = [a * fade[:, None] + weight @ x for a, x in zip(self.acc, v, strict=True)]
        return Softmax(top, self.z * fade + weight.sum(1), acc)


def taken_keys(kernel: Kernel, rows: Rows, keys: Array) -> Array:
    """Which of the keys count for the other branch of a row, too [rows, keys]."""
    taken = kernel.takes
    if taken is None:
        raise IRError(f"kernel {kernel.name} takes no keys over")
    return keys[None, :] >= ((rows.at // taken.size - taken.count + 1) * taken.size)[:, None]


def _complete(p: Program, rows: Rows, taken: Softmax) -> None:
    """The other branch's rows, which lack the keys taken over, with them."""
    out, lse = p.load("out_taken", rows), p.load("lse_taken", rows)
    top = np.maximum(taken.m, lse)
    own, rest = np.exp(taken.m - top), np.exp(lse - top)
    z = np.where(rows.live, taken.z * own + rest, 1.0)
    of = join(taken.acc, p.run.heads.v_dim) * own[:, None]
    p.store("out_taken", rows, (of + out * rest[:, None]) / z[:, None])
    p.store("lse_taken", rows, top + np.log(z))


def store_lse(p: Program, rows: Rows, m: Array, z: Array) -> Array:
    """z, or 1 for a row that sees nothing: it has output 0 and lse −inf, and must have been foretold."""
    some = z > 0
    if "rows_may_be_empty" not in p.run.kernel.facts and not some[rows.live].all():
        raise IRError(f"{p.run.line}: query {rows.at[rows.live & ~some][0]} sees nothing, and no fact says so")
    z = np.where(some, z, 1.0)
    p.store("lse", rows, np.where(some, m + np.log(z), -np.inf))
    return z


def attend_dq(p: Program) -> None:
    """dq of a query tile, its scores from lse."""
    kernel, rows = p.run.kernel, p.queries(p.first)
    q, d_out = split(p.load("q", rows), kernel.qk_parts), split(p.load("d_out", rows), kernel.v_parts)
    dq = split(np.zeros((len(rows.at), 0)), kernel.qk_parts)
    for walk in kernel.walks:
        statistics = row_statistics(p, rows, source=walk.source)
        for step in p.steps(walk):
            k, v = _keys(p, walk, step)
            seen = _seen(p, walk, step, rows.at)
            scored = Scored(rows, step.indices, seen, dot(q, k) * p.run.scale, dot(d_out, v))
            ds = scored.weighed(p, statistics, walk.source, guarded=True)[1]
            dq = [a + ds @ x for a, x in zip(dq, k, strict=True)]
    p.store("dq", rows, join(dq, p.run.heads.qk_dim) * p.run.scale)


@dataclass(frozen=True)
class Scored:
    """Scores and d_out·vᵀ of a tile's rows [rows] and keys [keys], and which pairs are `seen`."""

    rows: Rows
    keys: Array
    seen: Array
    scores: Array
    products: Array

    def weighed(self, p: Program, statistics: tuple[Array, Array], source: int, guarded: bool) -> tuple[Array, Array]:
        """p and ds by the rows' lse and delta; and of keys that the kernel takes over, where the launch says so."""
        weight, ds = self._by(self.seen, statistics)
        taken = p.run.kernel.takes
        if taken is None or taken.source != source or "lse_taken" not in p.run.arrays:
            return weight, ds
        lse, delta = (p.load(f"{x}_taken", self.rows, guarded) for x in ("lse", "delta"))
        counts = taken_keys(p.run.kernel, self.rows, self.keys)
        more, more_ds = self._by(self.seen & counts, (lse, delta))
        return weight + more, ds + more_ds

    def _by(self, seen: Array, statistics: tuple[Array, Array]) -> tuple[Array, Array]:
        lse, delta = statistics
        weight = np.where(seen, np.exp(self.scores - lse[:, None]), 0.0)
        return weight, weight * (self.products - delta[:, None])


def attend_dkv(p: Program) -> None:
    """dk and dv of a key tile, over the queries that see it; or parts of them, each of a run of the queries."""
    walks = p.run.kernel.walks
    env = p.env(walks[0].axis)
    keys = p.keys(p.first + np.arange(p.run.bn), env["T"] if walks[0].axis.is_tokens else env["N"])
    if "parts" not in p.run.arrays:
        dk, dv = _key_grads(p, keys, range(env["T"]))
        p.store("dk", keys, dk)
        return p.store("dv", keys, dv)
    parts = p.run.arrays["parts"]
    run = -(-env["T"] // (p.run.bt * len(parts))) * p.run.bt
    at = (p.batch, p.run.base("parts", p.sequence.start) + keys.at[keys.live], p.head)
    for i in range(len(parts)):
        part = np.concatenate(_key_grads(p, keys, range(i * run, (i + 1) * run)), 1)
        write_once(parts, (i, *at), part[keys.live], f"{p.run.line}: store parts")


def _key_grads(p: Program, keys: Rows, queries: range) -> tuple[Array, Array]:
    """dk and dv of the keys from the query tiles that start in `queries`."""
    total = KeyGrads(p, keys)
    for walk in p.run.kernel.walks:
        for step in p.steps(walk):
            if step.at in queries:
                total.add(p.queries(step.at), step, step.guarded)
    return total.result()


class KeyGrads:
    """dk and dv of a key tile, summed over query tiles."""

    def __init__(self, p: Program, keys: Rows) -> None:
        kernel = p.run.kernel
        self.p, self.keys = p, keys
        self.k, self.v = split(p.load("k", keys), kernel.qk_parts), split(p.load("v", keys), kernel.v_parts)
        self.dk, self.dv = [np.zeros_like(x) for x in self.k], [np.zeros_like(x) for x in self.v]

    def add(self, rows: Rows, step: Step, guarded: bool) -> Array:
        """One query tile: dv += pᵀ·d_out, dk += dsᵀ·q; ds. Extents guard the loads, they mask no score."""
        p, kernel = self.p, self.p.run.kernel
        q = split(p.load("q", rows, guarded), kernel.qk_parts)
        d_out = split(p.load("d_out", rows, guarded), kernel.v_parts)
        seen = step.seen(rows.at[:, None], self.keys.at[None, :], {"T": rows.length}, extents=False)
        seen &= self.keys.live[None, :]
        scored = Scored(rows, self.keys.at, seen, dot(q, self.k) * p.run.scale, dot(d_out, self.v))
        weight, ds = scored.weighed(p, row_statistics(p, rows, guarded), 0, guarded)
        self.dv = [a + weight.T @ x for a, x in zip(self.dv, d_out, strict=True)]
        self.dk = [a + ds.T @ x for a, x in zip(self.dk, q, strict=True)]
        return ds

    def result(self) -> tuple[Array, Array]:
        heads = self.p.run.heads
        return join(self.dk, heads.qk_dim) * self.p.run.scale, join(self.dv, heads.v_dim)


def row_statistics(p: Program, rows: Rows, guarded: bool = True, source: int = 0) -> tuple[Array, Array]:
    """(lse, delta) of the rows, of the source where each has its own; a row that sees nothing: lse = +inf, so p = 0."""
    suffix = str(source) if p.run.kernel.apart else ""
    lse, delta = (p.load(f"{x}{suffix}", rows, guarded) for x in ("lse", "delta"))
    if "rows_may_be_empty" in p.run.kernel.facts:
        lse = np.where(np.isneginf(lse), np.inf, lse)
    return lse, delta


def _keys(p: Program, walk: Walk, step: Step) -> tuple[list[Array], list[Array]]:
    """The parts of k and v of a step's keys."""
    operands = {o.role: o.name for o in p.run.kernel.operands if o.source == walk.source and o.role in ("k", "v")}
    keys = p.keys(step.indices, step.limit)
    k, v = (p.load(operands[role], keys, step.guarded) for role in ("k", "v"))
    return split(k, p.run.kernel.qk_parts), split(v, p.run.kernel.v_parts)


def _seen(p: Program, walk: Walk, step: Step, t: Array) -> Array:
    """[rows, keys]; the extent of a listed block is the block's own end."""
    sizes = {"T": step.limit, "N": step.limit}
    return step.seen(t[:, None], step.indices[None, :], sizes)

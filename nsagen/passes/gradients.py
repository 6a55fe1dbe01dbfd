"""The launches of the attentions' gradients, in their forms."""

from __future__ import annotations

from dataclasses import replace

from nsagen.ir.graph import Attend, AttendGrad, Graph, Heads, Source
from nsagen.ir.plan import ALONE, PLAIN, SHARED, SPECIALISED, Launch
from nsagen.passes.binds import Binds, key_binds, suffixes
from nsagen.passes.buffers import parts_of
from nsagen.passes.joint import gradients_takeover, joined, joint_launch, taken_binds
from nsagen.passes.loop_order import by_blocks, specialised_by_blocks
from nsagen.passes.specialise import (
    keys_are_wide,
    keys_may_specialise,
    keys_name,
    queries_may_specialise,
    queries_name,
)


class Gradients:
    """Launches of the attentions' gradients; the first to reach a value's gradient writes it, later ones add."""

    def __init__(self, gated: bool, heads: Heads, joint: Joint | None = None) -> None:
        self.gated = gated  # with the gate's shift in place of lse
        self.heads = heads
        self.joint = joint
        self.into: dict[str, str] = {}

    def launches(self, node: Attend, grad: AttendGrad) -> list[Launch]:
        lse = grad.lse if self.gated else node.lse
        rows: Binds = (("d_out", grad.d_out), ("lse", lse), ("delta", grad.delta))
        if by_blocks(node, self.heads, backward=True):
            return self._by_blocks(node, grad, rows)
        adds, dq = self._target(node.q, grad.dq)
        result = [Launch(f"{node.branch}_dq", (("q", node.q), *key_binds(node.sources), *rows, ("dq", dq)), adds)]
        if self.joint and node in self.joint.nodes:
            first = [self.joint.launch(dq, adds)] if node == self.joint.nodes[0] else []
            result = [*first, replace(result[0], when=(PLAIN,))]
        elif queries_may_specialise(node, self.heads):
            result = _both_forms(result[0], queries_name(result[0].kernel))
        for source, suffix, dk, dv in zip(node.sources, suffixes(node.sources), grad.dk, grad.dv, strict=True):
            adds, dk = self._target(source.k, dk)
            dv = self._target(source.v, dv)[1]
            keys: Binds = (("q", node.q), ("k", source.k), ("v", source.v))
            result += self._keys(f"{node.branch}", suffix, source, (*keys, *rows), (("dk", dk), ("dv", dv)), adds)
        if specialised_by_blocks(node, self.heads):
            result = [*(replace(x, when=(PLAIN,)) for x in result), *_in_parts(node.branch, *result)]
        return [self.joint.taking(x) for x in result] if self.joint else result

    def _by_blocks(self, node: Attend, grad: AttendGrad, rows: Binds) -> list[Launch]:
        """Over chunks: dk and dv with parts of dq, the sums of either."""
        source, dq_parts = node.sources[0], f"dq_parts_{node.branch}"
        assert source.listed is not None
        (adds_dq, dq), (adds, dk) = self._target(node.q, grad.dq), self._target(source.k, grad.dk[0])
        dv = self._target(source.v, grad.dv[0])[1]
        keys: Binds = (("q", node.q), ("k", source.k), ("v", source.v))
        launches = self._keys(node.branch, "", source, (*keys, *rows), (("dk", dk), ("dv", dv)), adds)
        launches[0] = replace(launches[0], binds=(*launches[0].binds, ("dq_parts", dq_parts)))
        sums = (("dq_parts", dq_parts), ("blocks", source.listed.blocks), ("dq", dq))
        return [replace(x, over="chunks") for x in (*launches, Launch(f"{node.branch}_dq", sums, adds_dq))]

    def _keys(self, branch: str, suffix: str, source: Source, loads: Binds, outs: Binds, adds: bool) -> list[Launch]:
        name = f"{branch}_dkv{suffix}"
        parts: Binds = (("parts", parts_of(source)),)
        if source.listed is None and source.axis.is_tokens:
            plain, *copied = self._forms(Launch(name, (*loads, *outs), adds), source)
            sums = f"{branch}_sum{suffix}"
            shares = _shared if keys_are_wide(self.heads) else _alone_or_shared
            return [plain, *(y for x in copied for y in shares(x, sums, loads, parts, outs))]
        if source.listed:
            parts = (("items", source.listed.blocks), *parts)
        sums = Launch(f"{branch}_sum{suffix}", (*parts, *outs), adds)
        return [*self._forms(Launch(name, (*loads, *parts)), source), sums]

    def _forms(self, launch: Launch, source: Source) -> list[Launch]:
        """The launch, or one of two."""
        if not keys_may_specialise(source, self.heads):
            return [launch]
        return _both_forms(launch, keys_name(launch.kernel))

    def _target(self, value: str, gradient: str) -> tuple[bool, str]:
        known = value in self.into
        return known, self.into.setdefault(value, gradient)


class Joint:
    """The launch of the joint kernel in the whole op's gradient, and what it changes about others."""

    def __init__(self, graph: Graph, grads: dict[str, AttendGrad]) -> None:
        self.nodes, self.over = joined(graph), gradients_takeover(graph)
        self.statistics = {branch: (grad.lse, grad.delta) for branch, grad in grads.items()}

    def launch(self, dq: str, accumulate: bool) -> Launch:
        return joint_launch(self.nodes, self.over, self.statistics, dq, accumulate)

    def taking(self, launch: Launch) -> Launch:
        """The launch, with the statistics of keys that its kernel takes over, or without the keys that one leaves."""
        if self.over is None:
            return launch
        giver, keys = self.over.giver.branch, keys_name(f"{self.over.taker.branch}_dkv")
        if launch.kernel == keys:
            return replace(launch, binds=(*launch.binds, *taken_binds(self.over, self.statistics)))
        leaves = launch.kernel in (f"{giver}_grads", f"{giver}_dq_sum", f"{giver}_sum") and SPECIALISED in launch.when
        return replace(launch, leaves=self.over.taken.count) if leaves else launch


def _both_forms(launch: Launch, specialised: str) -> list[Launch]:
    return [replace(launch, when=(PLAIN,)), replace(launch, kernel=specialised, when=(SPECIALISED,))]


def _alone_or_shared(launch: Launch, sums: str, loads: Binds, parts: Binds, outs: Binds) -> list[Launch]:
    """The launch whose programs have a key tile each, and the one of programs that share it, with the sum."""
    shared = (replace(x, when=(*x.when, SHARED)) for x in _shared(launch, sums, loads, parts, outs))
    return [replace(launch, when=(*launch.when, ALONE)), *shared]


def _shared(launch: Launch, sums: str, loads: Binds, parts: Binds, outs: Binds) -> list[Launch]:
    """Parts of each program, and their sum."""
    stores = replace(launch, binds=(*loads, *parts), accumulate=False)
    return [stores, Launch(sums, (*parts, *outs), launch.accumulate, when=launch.when)]


def _in_parts(branch: str, dq: Launch, keys: Launch, sums: Launch) -> list[Launch]:
    """The same by the kernel that leaves parts of all three, and their sums."""
    bound, dq_parts = dict(dq.binds), (("dq_parts", f"dq_parts_{branch}"),)
    grads = Launch(f"{branch}_grads", (*keys.binds, *dq_parts))
    dq_sum = Launch(f"{branch}_dq_sum", (*dq_parts, ("blocks", bound["blocks"]), ("dq", bound["dq"])), dq.accumulate)
    return [replace(x, over="chunks", when=(SPECIALISED,)) for x in (grads, dq_sum, sums)]

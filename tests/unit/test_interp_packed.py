"""Packed sequences, drawn specs and the ready ones in numpy; kernels that are broken show in what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from nsagen import api
from nsagen.compiler import lower
from nsagen.errors import IRError
from nsagen.interp.coverage import check_coverage
from nsagen.interp.domains import Array
from nsagen.interp.graph import run_graph
from nsagen.interp.plan import run_op
from nsagen.ir.graph import Attend, AttendGrad, CombineGrad, Graph
from nsagen.ir.plan import BT, Kernel, Op, Plan
from nsagen.sym import const, evaluate

Values = dict[str, Array]
COMPRESSED = {"block": 8, "stride": 4, "pool": "mean"}
WINDOW = {"size": 12, "sinks": 3}
LISTED = {"block": 12, "top_n": 3, "from": "caller"}
SELECTED = {"block": 16, "top_n": 3, "initial": 1, "local": 1}
CU = (0, 1, 14, 14, 19, 52)  # one token, ragged, none, fewer than l, several tiles
SEQUENCES = [(a, b) for a, b in pairwise(CU) if b > a]


def spec(kv: str, combine: str, **branches: Any) -> dict[str, Any]:
    heads = {"query": 6, "kv": 2, "qk_dim": 24, "v_dim": 16}  # groups of 3
    return {"name": "small", "heads": heads, "kv": kv, "branches": branches, "combine": combine}


SPECS = {
    "gated": spec("per_branch", "gated_sum", compressed=COMPRESSED, window=WINDOW),
    "whole": spec("shared", "gated_sum", compressed=COMPRESSED, selected=SELECTED, window={"size": 7}),
    "one_softmax": spec("shared", "one_softmax", window=WINDOW, compressed=COMPRESSED),
    "union_of_tokens": spec("shared", "one_softmax", window=WINDOW, selected=LISTED),
}


def levels(source: Any) -> tuple[Graph, Plan]:
    stages = lower(api.read(source))
    graph, plan = next(s.ir for s in stages if s.name == "derive_weights"), stages[-1].ir
    assert isinstance(graph, Graph)
    assert isinstance(plan, Plan)
    return graph, plan


@cache
def lowered(name: str) -> tuple[Graph, Plan]:
    return levels(SPECS.get(name, name))


def inputs(plan: Plan, batch: int, tokens: int) -> Values:
    """Every input of the plan, d_out among them; some gates are shut."""
    rng = np.random.default_rng(tokens)
    found: Values = {}
    for buffer in (b for b in plan.buffers if b.kind == "input"):
        shape = tuple(evaluate(x, {"B": batch, "T": tokens}) for x in buffer.shape)
        gate = buffer.dtype == "gate"
        found[buffer.name] = np.maximum(rng.uniform(-0.1, 1, shape), 0) if gate else rng.standard_normal(shape)
        if buffer.dtype == "int32":
            found[buffer.name] = block_lists(plan, shape, rng)
    return found


def block_lists(plan: Plan, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Some of the sequence's blocks, ascending, −1 last."""
    size = next(w.listed.size for k in plan.kernels for w in k.walks if w.listed)
    lists = np.full(shape, -1, np.int32)
    for i in np.ndindex(*shape[:3]):
        chosen = np.sort(rng.permutation(-(-shape[1] // size))[: rng.integers(0, shape[3] + 1)])
        lists[i][: len(chosen)] = chosen
    return lists


def same(a: Array, b: Array) -> bool:
    """Close to 1e-10, −inf at the same places, and no NaN: somebody wrote every row."""
    if a.shape != b.shape or not np.array_equal(np.isneginf(a), np.isneginf(b)):
        return False
    finite = ~np.isneginf(b)
    return bool(np.allclose(a[finite], b[finite], rtol=1e-10, atol=1e-10))


def part_of(graph: Graph, branch: str) -> Graph:
    """One attention alone, with the gradient of its own output: no gate."""
    node = next(n for n in graph.nodes if isinstance(n, Attend) and n.branch == branch)
    grad = next(n for n in graph.nodes if isinstance(n, AttendGrad) and n.branch == branch)
    deltas = CombineGrad((node.out,), (node.rest,), (node.lse,), None, grad.d_out, (grad.delta,), (), None)
    terms: dict[str, tuple[str, ...]] = {node.q: (grad.dq,)}
    for source, dk, dv in zip(node.sources, grad.dk, grad.dv, strict=True):
        terms[source.k] = (*terms.get(source.k, ()), dk)
        terms[source.v] = (*terms.get(source.v, ()), dv)
    return replace(graph, nodes=(node, deltas, replace(grad, lse=node.lse)), grads=tuple(terms.items()))


def wanted(graph: Graph, op: Op, values: Values) -> Values:
    """What the op's outputs should be; a gradient's buffer holds the sum of the value's terms."""
    if op.doc == "part_grad":
        graph = part_of(graph, op.name.removesuffix("_attention_grad"))
        values = run_graph(graph, values)
    sums = {term: values[f"grad:{name}"] for name, terms in graph.grads for term in terms if op.doc.endswith("_grad")}
    return {name: sums[name] if name in sums else values[name] for name in op.outputs}


# --- packed


def stride(plan: Plan, name: str) -> int:
    """Tokens between the rows of a buffer."""
    axis = plan.buffer(name).axes[1]
    return next((w.axis.stride for k in plan.kernels for w in k.walks if w.axis.name == axis), 1)


def rows_of(plan: Plan, name: str, start: int, like: Array) -> slice:
    """Where the sequence from `start` on lies: block i at row ⌊start/d⌋ + i."""
    first = start // stride(plan, name)
    return slice(first, first + like.shape[1])


def packed(plan: Plan, sequences: list[Values]) -> Values:
    found: Values = {}
    for name in {n for op in plan.ops for n in op.inputs}:
        last = sequences[-1][name]
        found[name] = np.zeros((1, CU[-1] // stride(plan, name), *last.shape[2:]), last.dtype)
        for (start, _), values in zip(SEQUENCES, sequences, strict=True):
            found[name][:, rows_of(plan, name, start, values[name])] = values[name]
    return found


def packed_differences(graph: Graph, plan: Plan) -> list[str]:
    sequences = [run_graph(graph, inputs(plan, 1, b - a)) for a, b in SEQUENCES]
    rows, found = packed(plan, sequences), []
    for op in plan.ops:
        got = run_op(plan, op.name, rows, (16, 8), cu_seqlens=CU, chunk=11)
        for (start, _), values in zip(SEQUENCES, sequences, strict=True):
            for name, want in wanted(graph, op, values).items():
                if not same(got[name][:, rows_of(plan, name, start, want)], want):
                    found.append(f"{op.name} %{name} of the sequence at {start}")
    return found


@pytest.mark.parametrize("name", SPECS)
def test_packed_sequences_are_strangers(name: str) -> None:
    assert packed_differences(*lowered(name)) == []


# --- drawn and ready specs

COMBINES = ("gated_sum", "single", "one_softmax")


@pytest.mark.fuzz
@settings(max_examples=10)
@given(strategies.specs(("window", "compressed", "selected"), combines=COMBINES), st.data())
def test_graph_and_plan_agree_on_drawn_specs(drawn: dict[str, Any], data: st.DataObject) -> None:
    graph, plan = levels(drawn)
    rows = [m for m in (4, 8, 16, 32) if m >= 1 << (plan.heads.group - 1).bit_length()]
    tile = data.draw(st.sampled_from(rows)), data.draw(st.sampled_from((4, 8, 16)))
    values = run_graph(graph, inputs(plan, 1, data.draw(st.integers(1, 33))))
    for op in plan.ops:
        want = wanted(graph, op, values)
        for name, got in run_op(plan, op.name, values, tile, chunk=data.draw(st.integers(1, 40))).items():
            assert same(got, want[name]), f"{op.name} %{name}"


@pytest.mark.fuzz
@settings(max_examples=10)
@given(strategies.specs(combines=COMBINES), st.data())
def test_every_pair_is_counted_once_in_drawn_specs(drawn: dict[str, Any], data: st.DataObject) -> None:
    tiles = st.tuples(st.sampled_from((8, 16, 32)), st.sampled_from((1, 4, 8, 16)))
    lengths = st.lists(st.integers(1, 60), min_size=1, max_size=2)
    check_coverage(levels(drawn)[1], data.draw(lengths), [data.draw(tiles)])


@pytest.mark.parametrize("name", sorted(api.ready_specs()))
def test_every_pair_is_counted_once_in_the_ready_specs(name: str) -> None:
    check_coverage(lowered(name)[1], (1, 33, 130), ((64, 32), (128, 128)))


@pytest.mark.parametrize("tokens", [511, 512, 600])
def test_every_pair_is_counted_once_where_a_window_ends(tokens: int) -> None:
    check_coverage(lowered("window_only")[1], (tokens,), ((128, 64),))


# --- broken kernels


def missing_end(k: Kernel) -> Kernel:
    """The loop over queries ends a tile early."""
    ends = [c for c in k.walks[0].cuts if c.name == "c3"]
    cuts = tuple(replace(c, at=c.at - BT) if c in ends else c for c in k.walks[0].cuts)
    return replace(k, walks=(replace(k.walks[0], cuts=cuts),))


def based_at_zero(k: Kernel) -> Kernel:
    return replace(k, accesses=tuple(replace(a, base=const(0)) if a.operand == "k" else a for a in k.accesses))


def without_guards(k: Kernel) -> Kernel:
    return replace(k, accesses=tuple(replace(a, guard="segment") for a in k.accesses))


BROKEN: dict[str, tuple[str, Callable[[Kernel], Kernel]]] = {
    "a part of q and k missing": ("window_fwd", lambda k: replace(k, qk_parts=(16,))),
    "a part of v missing": ("window_dkv", lambda k: replace(k, v_parts=(8,))),
    "rows foretold to see something": ("compressed_fwd", lambda k: replace(k, facts=())),
    "a run of a key tile's queries left out": ("compressed_dkv", missing_end),
    "keys that start at another row": ("window_fwd", based_at_zero),
    "pooled keys that start at another row": ("compressed_dq", based_at_zero),
    "keys tiled by queries": ("window_dkv", lambda k: replace(k, grid=replace(k.grid, step=BT))),
    "a walk left out": ("window_dq", lambda k: replace(k, walks=k.walks[:1])),
    "flat rows without a guard": ("combine_fwd", without_guards),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_shows_when_it_runs(name: str) -> None:
    of, change = BROKEN[name]
    graph, plan = lowered("gated")
    broken = replace(plan, kernels=tuple(change(k) if k.name == of else k for k in plan.kernels))
    assert broken != plan
    try:
        found = packed_differences(graph, broken)
    except IRError:
        return
    assert found

"""The graph and the plan in numpy: they agree, the walks count every pair once, and a broken plan is caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from harness import by_blocks

from nsagen import api
from nsagen.compiler import lower
from nsagen.errors import IRError, Refused
from nsagen.interp.coverage import check_coverage
from nsagen.interp.graph import run_graph
from nsagen.interp.plan import run_op
from nsagen.ir.graph import Attend, AttendGrad, CombineGrad, Graph
from nsagen.ir.plan import BN, BT, SPECIALISED, Kernel, Mask, Op, Plan, Walk
from nsagen.sym import Conjunct, Expr, Interval, conjunct_text, const, evaluate

Array = np.ndarray[Any, Any]
Values = dict[str, Array]

HEADS = {"query": 6, "kv": 2, "qk_dim": 24, "v_dim": 16}  # groups of 3, dims that no single power of two covers
COMPRESSED = {"block": 8, "stride": 4, "pool": "mean"}
WINDOW = {"size": 12, "sinks": 3}
LISTED = {"block": 16, "top_n": 4, "from": "caller"}
SELECTED = {"block": 16, "top_n": 4, "initial": 1, "local": 2}


def spec(branches: dict[str, Any], combine: str, heads: dict[str, int] = HEADS, kv: str = "shared") -> dict[str, Any]:
    return {"name": "x", "heads": heads, "kv": kv, "branches": branches, "combine": combine}


SPECS = {
    "gated": spec({"compressed": COMPRESSED, "window": WINDOW}, "gated_sum", kv="per_branch"),
    "group_1": spec({"window": {"size": 7}}, "single", HEADS | {"query": 2}),
    "group_5": spec({"window": WINDOW}, "single", {"query": 5, "kv": 1, "qk_dim": 40, "v_dim": 16}),
    "one_softmax": spec({"window": WINDOW, "compressed": COMPRESSED}, "one_softmax"),
    "listed": spec({"selected": LISTED}, "single"),
    "listed_group_1": spec({"selected": LISTED}, "single", {"query": 2, "kv": 2, "qk_dim": 16, "v_dim": 40}),
    "listed_union": spec({"window": WINDOW, "selected": LISTED}, "one_softmax"),
    "whole": spec({"compressed": COMPRESSED, "selected": SELECTED, "window": WINDOW}, "gated_sum"),
}
LENGTHS = (1, 5, 45)
TILES = ((8, 8), (16, 4), (10, 16), (64, 32))  # BM is no multiple of 3 or 5 but for 10; one tile holds all of T


@cache
def lowered(name: str) -> tuple[Graph, Plan]:
    stages = lower(api.read(SPECS[name]))
    graph, plan = next(s.ir for s in stages if s.name == "derive_weights"), stages[-1].ir
    assert isinstance(graph, Graph)
    assert isinstance(plan, Plan)
    return graph, plan


@cache
def drawn(name: str, tokens: int, batch: int = 1) -> Values:
    """Inputs of the spec and d_out, never written to."""
    graph, plan = lowered(name)
    rng = np.random.default_rng(tokens)
    found: Values = {}
    for value in (*graph.inputs, "d_out"):
        shape = tuple(evaluate(x, {"B": batch, "T": tokens}) for x in plan.buffer(value).shape)
        found[value] = rng.random(shape) if value == "gates" else rng.standard_normal(shape)
        if value == "blocks":
            found[value] = some_lists(rng, shape, -(-tokens // LISTED["block"]))
    return found


def some_lists(rng: np.random.Generator, shape: tuple[int, ...], blocks: int) -> Array:
    """Unique, ascending, −1 last; some empty, some with blocks after the query."""
    lists = np.full(shape, -1, np.int32)
    for place in np.ndindex(*shape[:3]):
        chosen = np.sort(rng.permutation(blocks)[: rng.integers(0, shape[3] + 1)])
        lists[place][: len(chosen)] = chosen
    return lists


@cache
def dense(name: str, tokens: int, batch: int = 1) -> Values:
    return run_graph(lowered(name)[0], drawn(name, tokens, batch))


def part_of(graph: Graph, branch: str) -> Graph:
    """The graph of one attention alone, without gates."""
    attend = next(n for n in graph.nodes if isinstance(n, Attend) and n.branch == branch)
    grad = next(n for n in graph.nodes if isinstance(n, AttendGrad) and n.branch == branch)
    deltas = CombineGrad((attend.out,), (attend.rest,), (attend.lse,), None, "d_out", (grad.delta,), (), None)
    own = {grad.dq, *grad.dk, *grad.dv}
    grads = tuple((name, tuple(x for x in terms if x in own)) for name, terms in graph.grads)
    nodes = (attend, deltas, replace(grad, lse=attend.lse))
    return replace(graph, nodes=nodes, grads=tuple((name, terms) for name, terms in grads if terms))


def wanted(op: Op, graph: Graph, values: Values) -> Values:
    """What the graph says of an op's outputs: a gradient's buffer holds the sum of the value's terms."""
    if op.doc == "part_grad":
        graph = part_of(graph, op.name.removesuffix("_attention_grad"))
        values = run_graph(graph, values)
    sums = {term: values[f"grad:{name}"] for name, terms in graph.grads for term in terms}
    return {name: sums[name] if op.doc.endswith("grad") else values[name] for name in op.outputs}


def same(a: Array, b: Array) -> bool:
    """Close to 1e-10, with −inf (of rows that see nothing) at the same places."""
    if a.shape != b.shape or not np.array_equal(np.isneginf(a), np.isneginf(b)):
        return False
    finite = ~np.isneginf(b)
    return bool(np.allclose(a[finite], b[finite], rtol=1e-10, atol=1e-10))  # NaN is close to nothing


def differing(name: str, plan: Plan, tokens: int, tile: tuple[int, int]) -> list[str]:
    """op/output for every output of a plan that is not the graph's."""
    graph, values = lowered(name)[0], dense(name, tokens)
    found: list[str] = []
    for op in plan.ops:
        due = wanted(op, graph, values)
        found += [f"{op.name}/{x}" for x, got in run_op(plan, op.name, values, tile).items() if not same(got, due[x])]
    return found


# Agreement


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("name", SPECS)
def test_the_plan_computes_the_graph(name: str, tokens: int, tile: tuple[int, int]) -> None:
    assert differing(name, lowered(name)[1], tokens, tile) == []


def test_tiles_by_kernel_and_by_body_and_batches() -> None:
    graph, plan = lowered("gated")
    values = dense("gated", 21, batch=2)
    tiles = {"window_fwd": (8, 4), "attend_fwd": (16, 8), "attend_dq": (6, 8), "attend_dkv": (3, 16)}
    tiles |= {"combine_fwd": (5, 1), "combine_bwd": (7, 1), "sum_splits": (11, 1)}
    tiles |= {"split_attend": (9, 8), "split_merge": (1, 1)}
    for op in plan.ops:
        due = wanted(op, graph, values)
        for output, got in run_op(plan, op.name, values, tiles).items():
            assert same(got, due[output]), f"{op.name}/{output}"


def test_a_chunked_selection_is_the_whole_one() -> None:
    _, plan = lowered("whole")
    values = dense("whole", 45)
    got = run_op(plan, "select_blocks", values, (16, 8), chunk=20)
    assert np.array_equal(got["blocks"], values["blocks"])


@pytest.mark.parametrize("chunk", [None, 20])
@pytest.mark.parametrize("name", ["listed", "whole", "listed_group_1"])
def test_key_block_by_key_block_is_the_same(name: str, chunk: int | None) -> None:
    with by_blocks():
        plan = lower(api.read(SPECS[name]))[-1].ir
    assert isinstance(plan, Plan)
    check_coverage(plan, (21,), ((8, 8),))
    values = dense(name, 45)
    for op in (x for x in plan.ops if x.doc not in ("serve", "decode")):
        assert {"attend_list_fwd", "sum_lists"} & {plan.kernel(x.kernel).body for x in op.launches} or name == "whole"
        due = wanted(op, lowered(name)[0], values)
        for output, got in run_op(plan, op.name, values, (10, 8), chunk=chunk).items():
            assert same(got, due[output]), f"{op.name}/{output}"


@pytest.mark.parametrize("chunk", [None, 50])
def test_gradients_by_blocks_are_the_same(chunk: int | None) -> None:
    """The kernels that a GPU of sm_90 takes."""
    heads = {"query": 16, "kv": 1, "qk_dim": 64, "v_dim": 64}
    branches = {"selected": {"block": 64, "top_n": 3, "from": "caller"}}
    given = {"name": "by_blocks", "heads": heads, "kv": "shared", "branches": branches, "combine": "single"}
    plan = lower(api.read(given))[-1].ir
    assert isinstance(plan, Plan)
    rng = np.random.default_rng(0)
    values = {x: rng.standard_normal((1, 130, 16 if x in ("q", "d_out") else 1, 64)) for x in ("q", "k", "v", "d_out")}
    own = np.arange(130) // 64
    listed = np.stack([0 * own, np.where(own > 0, own, -1), np.full(130, -1)], -1)
    values["blocks"] = listed.astype(np.int32)[None, :, None]
    out = run_op(plan, "selected_attention", values, (64, 64))
    values |= {"out_selected": out["out_selected"], "lse_selected": out["lse_selected"]}
    taken = {x.kernel for op in plan.ops for x in op.launches if SPECIALISED in x.when}
    assert taken == {"selected_grads", "selected_dq_sum", "selected_sum"}
    plain, other = (
        run_op(plan, "selected_attention_grad", values, (64, 64), chunk=chunk, form=form)
        for form in ("plain", "specialised")
    )
    for name, got in other.items():
        assert same(got, plain[name]), name


def test_a_pool_with_parameters_is_refused_unless_its_result_is_given() -> None:
    branches = {"compressed": COMPRESSED | {"pool": "mlp"}}
    graph = next(s.ir for s in lower(api.read(spec(branches, "single"))) if s.name == "derive_weights")
    assert isinstance(graph, Graph)
    values = dense("gated", 21)
    inputs = {"q": values["q"], "k": values["k_compressed"], "v": values["v_compressed"], "d_out": values["d_out"]}
    with pytest.raises(Refused, match="mlp"):
        run_graph(graph, inputs)
    found = run_graph(graph, inputs | {"k_cmp": values["k_cmp"], "v_cmp": values["v_cmp"]})
    assert same(found["lse_compressed"], values["lse_compressed"])


# Against the oracle, which shares no code


def torched(values: Values, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {x: torch.from_numpy(values[x]).requires_grad_() for x in names}


def test_the_whole_graph_is_the_oracle() -> None:
    values = dense("whole", 45)
    leaves = torched(values, ("q", "k", "v", "gates"))
    out = oracle.attention(SPECS["whole"], leaves["q"], leaves["k"], leaves["v"], leaves["gates"])
    grads = oracle.gradients(out, list(leaves.values()), torch.from_numpy(values["d_out"]))
    assert same(values["out"], out.detach().numpy())
    assert same(values["grad:q"], grads[0].numpy())
    assert same(values["grad:gates"], grads[3].numpy())
    for x, got in (("k", grads[1]), ("v", grads[2])):  # φ's own gradient is torch's: here that of the mean
        pooled = torch.from_numpy(values[x]).requires_grad_()
        rows = oracle.mean_pool(pooled, COMPRESSED["block"], COMPRESSED["stride"])
        (through,) = oracle.gradients(rows, [pooled], torch.from_numpy(values[f"grad:{x}_cmp"]))
        assert same(values[f"grad:{x}"] + through.numpy(), got.numpy())


def test_lists_are_the_oracles() -> None:
    values = dense("whole", 45)
    q, k_cmp = (torch.from_numpy(values[x]) for x in ("q", "k_cmp"))
    assert np.array_equal(values["blocks"], oracle.choose(SPECS["whole"], q, k_cmp).numpy())


def test_a_packed_plan_is_the_oracle() -> None:
    values, ends = drawn("gated", 45), [0, 17, 17, 20, 44]  # one is empty, one has no block, a row is of no sequence
    q, gates = (torch.from_numpy(values[x]) for x in ("q", "gates"))
    k, v = ({b: torch.from_numpy(values[f"{x}_{b}"]) for b in ("compressed", "window")} for x in ("k", "v"))
    k_cmp, v_cmp = oracle.compress(k["compressed"], v["compressed"], 8, 4, cu_seqlens=ends)
    inputs = values | {"k_cmp": k_cmp.numpy(), "v_cmp": v_cmp.numpy()}
    got = run_op(lowered("gated")[1], "attention", inputs, (10, 8), cu_seqlens=ends)
    want = oracle.attention(SPECS["gated"], q, k, v, gates, cu_seqlens=ends).numpy()
    assert same(got["out"][:, : ends[-1]], want[:, : ends[-1]])


# Coverage


@pytest.mark.parametrize("name", SPECS)
def test_every_pair_is_counted_once(name: str) -> None:
    check_coverage(lowered(name)[1], LENGTHS, TILES)


# Mutations: what a wrong pass would leave behind


def changed(plan: Plan, kernel: Kernel, walk: Walk, new: Walk) -> Plan:
    walks = tuple(new if w is walk else w for w in kernel.walks)
    return replace(plan, kernels=tuple(replace(k, walks=walks) if k is kernel else k for k in plan.kernels))


def with_masks(walk: Walk, change: Callable[[Mask], Mask | None]) -> Walk:
    """The walk with every mask changed, or dropped where there is None."""
    segments = tuple(replace(s, masks=tuple(m for x in s.masks if (m := change(x)))) for s in walk.segments)
    return replace(walk, segments=segments)


def with_cut(walk: Walk, name: str, by: Expr) -> Walk:
    return replace(walk, cuts=tuple(replace(c, at=c.at + by) if c.name == name else c for c in walk.cuts))


def conjuncts(walk: Walk) -> list[Conjunct]:
    return list(dict.fromkeys(m.conjunct for s in walk.segments for m in s.masks))


def walks_of(name: str) -> Iterator[tuple[Kernel, Walk]]:
    for kernel in lowered(name)[1].kernels:
        if kernel.body in ("attend_fwd", "attend_dq", "attend_dkv"):
            yield from ((kernel, w) for w in kernel.walks)


def survivors(name: str, mutants: Callable[[Walk], Iterator[tuple[str, Walk]]]) -> list[str]:
    """Mutants of the spec's walks that the coverage check lets pass."""
    plan, found = lowered(name)[1], []
    for kernel, walk in walks_of(name):
        for what, new in mutants(walk):
            bad = changed(plan, kernel, walk, new).kernel(kernel.name)
            try:
                check_coverage(replace(plan, kernels=(bad,)), MUTANT_LENGTHS, MUTANT_TILES)
            except IRError:
                continue
            found.append(f"{kernel.name} {walk.piece.name}: {what}")
    return found


MUTATED = ("gated", "one_softmax")
MUTANT_LENGTHS = (13, 45)  # 13: one query sees a sink beyond its window, and 16 keys pass the end
MUTANT_TILES = ((8, 8), (16, 2), (8, 16))  # 2 keys: a tile inside the 3 sinks, whose walk then has a maskless middle


@pytest.mark.parametrize("name", MUTATED)
def test_a_dropped_mask_is_caught(name: str) -> None:
    def mutants(walk: Walk) -> Iterator[tuple[str, Walk]]:
        for c in conjuncts(walk):
            yield conjunct_text(c), with_masks(walk, lambda m, c=c: None if m.conjunct == c else m)

    assert survivors(name, mutants) == []


@pytest.mark.parametrize("name", MUTATED)
def test_a_false_proof_is_caught(name: str) -> None:
    """`unless` of 0 says that the mask is proved at all tile sizes."""

    def mutants(walk: Walk) -> Iterator[tuple[str, Walk]]:
        for c in conjuncts(walk):
            yield (
                conjunct_text(c),
                with_masks(walk, lambda m, c=c: replace(m, unless=(const(0),)) if m.conjunct == c else m),
            )

    assert survivors(name, mutants) == []


@pytest.mark.parametrize("name", MUTATED)
def test_a_shifted_cut_is_caught(name: str) -> None:
    """Towards the wrong side: the ends inwards, the maskless middle outwards."""

    def mutants(walk: Walk) -> Iterator[tuple[str, Walk]]:
        step = BN if walk.direction == "forward" else BT
        towards = {"c0": step, "c1": -step, "c2": step, "c3": -step}
        for cut in walk.cuts:
            yield cut.name, with_cut(walk, cut.name, towards[cut.name])

    assert survivors(name, mutants) == []


@pytest.mark.parametrize("name", MUTATED)
def test_wrong_ranges_are_caught(name: str) -> None:
    def mutants(walk: Walk) -> Iterator[tuple[str, Walk]]:
        assert walk.some is not None
        yield "some swapped", replace(walk, some=Interval(walk.some.hi, walk.some.lo))
        yield "some one short", replace(walk, some=Interval(walk.some.lo, walk.some.hi - 1))
        if walk.all:
            yield "all one long", replace(walk, all=Interval(walk.all.lo, walk.all.hi + 1))

    assert survivors(name, mutants) == []


def test_an_empty_unless_is_safe() -> None:
    """The mask is then tested at every tile size: slower, and still right."""
    plan = lowered("gated")[1]
    for kernel, walk in walks_of("gated"):
        check_coverage(changed(plan, kernel, walk, with_masks(walk, lambda m: replace(m, unless=()))), (45,), ((8, 8),))


@pytest.mark.parametrize("kernel", ["window_fwd", "window_dq", "window_dkv"])
def test_a_dropped_mask_shows_in_the_numbers_too(kernel: str) -> None:
    plan = lowered("gated")[1]
    broken = plan.kernel(kernel)
    window = next(w for w in broken.walks if w.piece.name == "window")
    newest = window.piece.where[0]  # s <= t
    bad = changed(plan, broken, window, with_masks(window, lambda m: None if m.conjunct == newest else m))
    assert {x.split("/")[0] for x in differing("gated", bad, 45, (8, 8))} >= {op_of(plan, kernel)}


def op_of(plan: Plan, kernel: str) -> str:
    return next(op.name for op in plan.ops for launch in op.launches if launch.kernel == kernel)


def test_a_load_without_a_guard_is_caught() -> None:
    plan = lowered("gated")[1]
    kernel = plan.kernel("window_fwd")
    window = next(w for w in kernel.walks if w.piece.name == "window")
    bad = changed(plan, kernel, window, with_masks(window, lambda m: None if m.extent else m))
    with pytest.raises(IRError, match="without a guard"):
        run_op(bad, "window_attention", dense("gated", 45), (8, 8))


def test_a_row_that_sees_nothing_needs_its_fact() -> None:
    plan = lowered("gated")[1]
    kernels = tuple(replace(k, facts=()) if k.name == "compressed_fwd" else k for k in plan.kernels)
    with pytest.raises(IRError, match="sees nothing"):
        run_op(replace(plan, kernels=kernels), "compressed_attention", dense("gated", 45), (8, 8))


@pytest.mark.parametrize("flag", [True, False])
def test_a_wrong_accumulate_is_caught(flag: bool) -> None:
    """To add to what nobody has written gives NaN; to overwrite what is there is refused."""
    plan = lowered("gated")[1]
    ops = [op for op in plan.ops if op.name != "attention_grad"]
    whole = next(op for op in plan.ops if op.name == "attention_grad")
    launches = tuple(replace(x, accumulate=flag) if x.kernel.endswith("_dq") else x for x in whole.launches)
    bad = replace(plan, ops=(*ops, replace(whole, launches=launches)))
    if flag:
        assert np.isnan(run_op(bad, "attention_grad", dense("gated", 21), (8, 8))["dq_compressed"]).all()
    else:
        with pytest.raises(IRError, match="written twice"):
            run_op(bad, "attention_grad", dense("gated", 21), (8, 8))

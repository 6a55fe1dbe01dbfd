"""Each pass by itself, on small plans whose answer is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from nsagen import api
from nsagen.compiler import lower
from nsagen.errors import IRError, Refused
from nsagen.ir.graph import Attend, AttendGrad, CombineGrad, Graph, Heads, KeyAxis, Piece, Select
from nsagen.ir.plan import (
    BN,
    BT,
    HEADS_IN_TURN,
    ONLY_SPECIALISED,
    Access,
    Choice,
    Grid,
    Kernel,
    Launch,
    Op,
    Plan,
    TileConfig,
    Walk,
)
from nsagen.passes.choose_strategy import ChooseStrategy
from nsagen.passes.choose_tiles import split_dim
from nsagen.passes.derive_bounds import DeriveBounds
from nsagen.passes.derive_weights import DeriveWeights
from nsagen.passes.differentiate import Differentiate
from nsagen.passes.machine import ARCHES
from nsagen.passes.place_accesses import PlaceAccesses
from nsagen.passes.split_loops import SplitLoops
from nsagen.spec.lower import Lowering, _one_softmax, _without, lower_spec
from nsagen.sym import KEY, QUERY, Interval, conjunct_text, le, lt, multiple, to_text

TOKENS = KeyAxis("T")
SMALL = {"heads": {"query": 4, "kv": 2, "qk_dim": 16, "v_dim": 16}, "kv": "shared"}
UNION = SMALL | {
    "name": "union_of_two",
    "branches": {"compressed": {"block": 8, "stride": 4, "pool": "mean"}, "window": {"size": 12}},
    "combine": "one_softmax",
}


@cache
def stage(spec: str, name: str) -> Any:
    return next(s.ir for s in lower(api.read(spec)) if s.name == name)


def kernel_of(spec: str, kernel: str, after: str = "place_accesses") -> Kernel:
    return stage(spec, after).kernel(kernel)


def only(kernel: Kernel) -> Walk:
    (walk,) = kernel.walks
    return walk


def walked(piece: Piece, direction: Any = "forward", axis: KeyAxis = TOKENS) -> Walk:
    """The piece's walk after derive_bounds and split_loops."""
    grid = Grid(axis, BN, "ascending") if direction == "reverse" else Grid(TOKENS, BT, "ascending")
    walk = Walk(0, piece, axis, direction)
    kernel = Kernel("k", "b", "attend_fwd", grid, (), (walk,), (Choice("what", "because"),))
    plan = Plan("p", Heads(2, 1, 16, 16), (), (), (kernel,))
    return only(SplitLoops().run(DeriveBounds().run(plan)).kernels[0])


def interval(x: Interval | None) -> tuple[str, str]:
    assert x
    return to_text(x.lo), to_text(x.hi)


def cuts(walk: Walk) -> dict[str, str]:
    return {c.name: to_text(c.at) for c in walk.cuts}


def segments(walk: Walk) -> list[tuple[str, str, str]]:
    return [(s.name, to_text(s.lo), to_text(s.hi)) for s in walk.segments]


def masks(walk: Walk, segment: str) -> dict[str, list[str]]:
    """Text of each conjunct tested on the segment, and what spares it."""
    found = next(s for s in walk.segments if s.name == segment)
    return {conjunct_text(m.conjunct): [to_text(u) for u in m.unless] for m in found.masks}


# --- derive_bounds and split_loops

SPARED = ["514 - BN - BT"]


def test_the_ranges_of_a_window_of_512() -> None:
    forward, reverse = (only(kernel_of("window_only", k)) for k in ("window_fwd", "window_dkv"))
    assert interval(forward.some) == ("max(0, t0 - 511)", "min(BT + t0, T)")
    assert interval(forward.all) == ("max(0, BT + t0 - 512)", "min(T, t0 + 1)")
    assert interval(reverse.some) == ("s0", "min(BN + s0 + 511, T)")
    assert interval(reverse.all) == ("max(0, BN + s0 - 1)", "min(T, s0 + 512)")


def test_the_cuts_of_a_window_of_512() -> None:
    assert cuts(only(kernel_of("window_only", "window_fwd"))) == {
        "c0": "some_lo // BN * BN",
        "c3": "(BN + some_hi - 1) // BN * BN",
        "c1": "max(c0, min((BN + all_lo - 1) // BN * BN, c3))",
        "c2": "max(all_hi // BN * BN, c1)",
    }


def test_the_segments_of_a_window_of_512() -> None:
    walk = only(kernel_of("window_only", "window_fwd"))
    assert segments(walk) == [("lo", "c0", "c1"), ("mid", "c1", "c2"), ("hi", "c2", "c3")]
    assert masks(walk, "lo") == {"s > t - 512": [], "s <= t": SPARED, "s < T": SPARED}
    assert masks(walk, "mid") == {}
    assert masks(walk, "hi") == {"s <= t": [], "s < T": [], "s > t - 512": SPARED}


def test_the_queries_of_a_key_tile_are_cut_by_query_tiles() -> None:
    walk = only(kernel_of("window_only", "window_dkv"))
    assert cuts(walk)["c0"] == "some_lo // BT * BT"
    assert segments(walk) == [("edge", "c0", "c3")]
    assert masks(walk, "edge") == {"s <= t": [], "s > t - 512": [], "t < T": []}


def test_only_the_axis_end_is_an_extent() -> None:
    found = [m for s in only(kernel_of("window_only", "window_fwd")).segments for m in s.masks if m.extent]
    assert {conjunct_text(m.conjunct) for m in found} == {"s < T"}


@pytest.mark.parametrize("kernel", ["compressed_fwd", "compressed_dq"])
def test_a_pooled_axis_starts_without_a_mask(kernel: str) -> None:
    walk = only(kernel_of("nsa_compressed_window", kernel))
    assert segments(walk) == [("mid", "0", "c2"), ("hi", "c2", "c3")]
    assert set(masks(walk, "hi")) == {"16 * s <= t - 31", "s < N"}


def test_a_pooled_axis_in_reverse_is_one_loop_shared_by_programs() -> None:
    kernel = kernel_of("nsa_compressed_window", "compressed_dkv")
    walk = only(kernel)
    assert kernel.grid.split
    assert segments(walk) == [("edge", "c0", "c3")]
    assert interval(walk.some) == ("16 * s0 + 31", "T")
    assert interval(walk.all) == ("16 * BN + 16 * s0 + 15", "T")


def dilated(step: int) -> Piece:
    return Piece("dilated", (le(KEY, QUERY), lt(QUERY - 15, KEY), multiple(QUERY - KEY, step)))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_congruence_refuses_the_middle(direction: str) -> None:
    walk = walked(dilated(3), direction)
    assert walk.all is None
    assert walk.refused == "no key tile is free of a congruence modulo 3"
    assert segments(walk) == [("edge", "c0", "c3")]
    extent = "s < T" if direction == "forward" else "t < T"
    assert masks(walk, "edge") == {"s <= t": [], "s > t - 15": [], "(t - s) % 3 == 0": [], extent: []}


def test_a_congruence_only_thins_the_range() -> None:
    assert walked(dilated(3)).some == walked(Piece("window", dilated(3).where[:2])).some


def test_a_list_is_one_segment_with_every_mask() -> None:
    walk = only(kernel_of("nsa_128", "selected_fwd"))
    assert (walk.refused, [s.name for s in walk.segments]) == ("the list says which blocks, tile by tile", ["edge"])
    assert masks(walk, "edge") == {"s <= t": [], "s < T": []}


def test_a_window_of_one_key_proves_nothing() -> None:
    walk = walked(Piece("window", (le(KEY, QUERY), lt(QUERY - 1, KEY))))
    assert all("3 - BN - BT" in spared for s in ("lo", "hi") for spared in masks(walk, s).values() if spared)


def test_split_loops_needs_bounds() -> None:
    with pytest.raises(IRError, match="split_loops needs the bounds of derive_bounds"):
        SplitLoops().run(stage("window_only", "choose_strategy"))


@pytest.mark.parametrize(
    ("spec", "kernel", "empty"),
    [
        ("nsa_128", "window_fwd", False),
        ("nsa_128", "compressed_fwd", True),
        ("nsa_128", "selected_fwd", True),
        ("tiny", "window_dq", False),
    ],
)
def test_a_row_surely_sees_its_own_key_only_in_a_window(spec: str, kernel: str, empty: bool) -> None:
    assert ("rows_may_be_empty" in kernel_of(spec, kernel).facts) == empty


# --- one_softmax


def counted(pieces: list[Piece], tokens: int = 20) -> dict[tuple[int, int], int]:
    """How many of the pieces hold each (t, s)."""
    texts = [" and ".join(f"({conjunct_text(c)})" for c in p.where) for p in pieces]
    tests = [eval(f"lambda t, s: {text}") for text in texts]
    return {(t, s): sum(f(t, s) for f in tests) for t in range(tokens) for s in range(tokens)}


def union_of(*branches: tuple[str, tuple[Piece, ...]]) -> list[Piece]:
    """The pieces of one softmax over branches on the same tokens."""
    low = Lowering(api.read(UNION))
    for name, pieces in branches:
        low.attend_tokens(name, *pieces)
    _one_softmax(low)
    (node,) = low.nodes
    assert isinstance(node, Attend)
    return [p for s in node.sources for p in s.pieces]


WINDOW = Piece("window", (le(KEY, QUERY), lt(QUERY - 6, KEY)))
SINKS = Piece("sinks", (lt(KEY, 3), le(KEY, QUERY)))
CAUSAL = Piece("causal", (le(KEY, QUERY),))
FAR = Piece("far", (le(KEY, QUERY - 4), lt(QUERY - 12, KEY)))


@pytest.mark.parametrize(
    "domains",
    [(WINDOW, SINKS), (SINKS, WINDOW), (WINDOW, CAUSAL), (WINDOW, FAR, SINKS)],
    ids=lambda d: "-".join(p.name for p in d),
)
def test_one_softmax_counts_every_key_of_the_union_once(domains: tuple[Piece, ...]) -> None:
    pieces = union_of(*((p.name, (p,)) for p in domains))
    wanted = {pair: min(1, n) for pair, n in counted(list(domains)).items()}
    assert counted(pieces) == wanted


def test_what_an_earlier_branch_holds_is_taken_out() -> None:
    rest = _without(CAUSAL, WINDOW)
    assert [p.name for p in rest] == ["causal_1"]  # causal_0 says s <= t and s > t: nothing
    assert [[conjunct_text(c) for c in p.where] for p in rest] == [["s <= t", "s <= t - 6"]]


def test_a_strided_domain_cannot_be_taken_out() -> None:
    with pytest.raises(Refused, match="a strided domain cannot be taken out"):
        union_of(("dilated", (dilated(3),)), ("window", (WINDOW,)))


def test_one_softmax_over_two_axes_leaves_both_domains_whole() -> None:
    graph = lower_spec(api.read(UNION))
    node = next(n for n in graph.nodes if isinstance(n, Attend))
    assert [(s.k, s.axis.name, [p.name for p in s.pieces]) for s in node.sources] == [
        ("k_cmp", "compressed", ["ended"]),
        ("k", "T", ["window"]),
    ]


def test_one_softmax_over_two_axes_is_one_kernel_and_a_gradient_an_axis() -> None:
    plan = lower(api.read(UNION))[-1].ir
    assert isinstance(plan, Plan)
    names = ["union_fwd", "union_dq", "union_dkv0", "union_sum0", "union_dkv1", "row_delta", "union_cached"]
    names += ["decode_attend", "decode_merge"]
    assert [k.name for k in plan.kernels] == names
    assert [w.source for w in plan.kernel("union_fwd").walks] == [0, 1]


# --- differentiate


def backward(spec: str) -> tuple[Graph, CombineGrad, list[AttendGrad]]:
    graph = stage(spec, "differentiate")
    (combine,) = (n for n in graph.nodes if isinstance(n, CombineGrad))
    return graph, combine, [n for n in graph.nodes if isinstance(n, AttendGrad)]


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_out_and_lse_of_every_branch_are_saved_and_chosen_blocks(spec: str) -> None:
    graph, _, _ = backward(spec)
    attends = [n for n in graph.nodes if isinstance(n, Attend)]
    rests = {n.rest for n in attends} - {None}
    chosen = {n.out for n in graph.nodes if isinstance(n, Select)}
    assert set(graph.saved) == {n.out for n in attends} | {n.lse for n in attends} | rests | chosen
    assert len(graph.saved) == len(set(graph.saved))


def test_the_callers_blocks_are_not_saved() -> None:
    assert "blocks" in stage("selected_only", "differentiate").inputs
    assert "blocks" not in stage("selected_only", "differentiate").saved
    assert "blocks" in stage("nsa_128", "differentiate").saved


def test_scores_are_never_saved() -> None:
    graph, _, _ = backward("nsa_128")
    axes = {graph.value(x).axes for x in graph.saved}
    assert axes == {("B", "T", "Hq", "Dv"), ("B", "T", "Hq"), ("B", "T", "Hkv", "n")}


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_every_attention_has_its_gradient_over_the_same_sources(spec: str) -> None:
    graph, _, grads = backward(spec)
    forward = {n.branch: n.sources for n in graph.nodes if isinstance(n, Attend)}
    assert {g.branch: g.sources for g in grads} == forward
    assert [len(g.dk) for g in grads] == [len(g.sources) for g in grads]


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_every_differentiable_input_has_a_gradient(spec: str) -> None:
    graph, _, grads = backward(spec)
    read = {x for g in grads for x in (g.q, *(y for s in g.sources for y in (s.k, s.v)))}
    assert {name for name, _ in graph.grads} - {"gates"} == read
    assert ("gates" in dict(graph.grads)) == ("gates" in graph.inputs)


def test_a_shared_key_has_a_gradient_term_a_branch() -> None:
    graph, _, _ = backward("nsa_128")
    assert dict(graph.grads)["k"] == ("dk_selected", "dk_window")
    assert dict(graph.grads)["q"] == ("dq_compressed", "dq_selected", "dq_window")
    assert dict(graph.grads)["k_cmp"] == ("dk_cmp",)


def launches(spec: str, op: str) -> Iterator[tuple[Launch, dict[str, str]]]:
    plan = stage(spec, "choose_strategy")
    found: Op = next(o for o in plan.ops if o.name == op)
    return ((x, dict(x.binds)) for x in found.launches)


def test_the_second_branch_adds_to_shared_gradients() -> None:
    found = {x.kernel: (x.accumulate, binds) for x, binds in launches("nsa_128", "attention_grad")}
    assert [found[f"{b}_dq"][0] for b in ("compressed", "selected", "window")] == [False, True, True]
    assert {found[f"{b}_dq"][1]["dq"] for b in ("compressed", "selected", "window")} == {"dq_compressed"}
    assert not found["selected_sum"][0]
    assert found["window_dkv"][0]
    for name in ("dk", "dv"):
        assert found["selected_sum"][1][name] == found["window_dkv"][1][name] == f"{name}_selected"
    assert not found["compressed_dkv"][0]


def test_a_part_alone_overwrites_its_gradients() -> None:
    for branch in ("compressed", "selected", "window"):
        assert not any(x.accumulate for x, _ in launches("nsa_128", f"{branch}_attention_grad"))


def test_branches_with_keys_of_their_own_share_dq_alone() -> None:
    adding = [(x.kernel, x.accumulate) for x, _ in launches("tiny", "attention_grad") if x.accumulate]
    assert adding == [("selected_dq", True), ("window_dq", True)]


def test_choose_strategy_needs_a_backward() -> None:
    with pytest.raises(Refused, match="needs a differentiated graph"):
        ChooseStrategy().run(stage("nsa_128", "lower"))


def test_differentiate_leaves_the_forward_nodes_in_place() -> None:
    before = stage("nsa_128", "lower")
    after = Differentiate().run(before)
    assert [type(n) for n in after.nodes[: len(before.nodes)]] == [type(n) for n in before.nodes]
    assert after.inputs == before.inputs
    assert after.output == before.output


# --- derive_weights


def select(block: int, stride: int, size: int) -> Select:
    return Select("blocks", "q", "k_cmp", "lse", KeyAxis("compressed", block, stride), size, 4, 0, 0)


def weighted(block: int, stride: int, size: int) -> Select:
    graph = replace(stage("nsa_128", "lower"), nodes=(select(block, stride, size),))
    (node,) = DeriveWeights().run(graph).nodes
    assert isinstance(node, Select)
    return node


def shared(i: int, j: int, block: int, stride: int, size: int) -> int:
    """Tokens of compressed block i in selection block j."""
    return len(set(range(i * stride, i * stride + block)) & set(range(j * size, (j + 1) * size)))


def test_the_papers_weights() -> None:
    node = weighted(32, 16, 64)
    assert (node.first, node.weights) == (-1, (1, 2, 2, 2, 1))


SHAPES = [(d * a, d, d * b) for d in (1, 2, 3, 4, 8) for a in (1, 2, 3, 4) for b in (1, 2, 3, 4, 6, 8) if a <= b]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_count_shared_tokens(shape: tuple[int, int, int]) -> None:
    _, stride, size = shape
    node = weighted(*shape)
    for j in range(5):
        at = {node.first + j * size // stride + n: w for n, w in enumerate(node.weights)}
        wanted = {i: shared(i, j, *shape) for i in range(-20, 60)}
        assert {i: w * stride for i, w in at.items()} == {i: n for i, n in wanted.items() if n}


@pytest.mark.parametrize("shape", [(32, 12, 64), (32, 16, 72)])
def test_weights_need_divisors(shape: tuple[int, int, int]) -> None:
    with pytest.raises(Refused, match=r"need d \| l and d \| l'"):
        weighted(*shape)


# --- choose_tiles

DIMS = range(16, 257, 8)
POWERS = (16, 32, 64, 128, 256)


@pytest.mark.parametrize("dim", DIMS)
def test_a_head_dim_is_split_with_the_least_padding(dim: int) -> None:
    parts = split_dim(dim)
    assert 1 <= len(parts) <= 2
    assert set(parts) <= set(POWERS)
    assert sum(parts) >= dim
    sums = [*POWERS, *(a + b for a in POWERS for b in POWERS)]
    assert sum(parts) == min(s for s in sums if s >= dim)


@pytest.mark.parametrize("dim", POWERS)
def test_a_power_of_two_is_not_split(dim: int) -> None:
    assert split_dim(dim) == (dim,)


def tables(spec: str) -> Iterator[tuple[Kernel, str, int, tuple[TileConfig, ...]]]:
    plan = stage(spec, "choose_tiles")
    return ((k, t.arch, t.bits, t.configs) for k in plan.kernels for t in k.tiles)


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_survivors_come_first_and_ranked_and_the_dropped_say_why(spec: str) -> None:
    for _, _, _, configs in tables(spec):
        kept = [c for c in configs if c.dropped is None]
        assert kept
        assert list(configs[: len(kept)]) == kept
        assert [c.cost for c in kept] == sorted(c.cost for c in kept)
        assert all(c.dropped for c in configs[len(kept) :])
        assert len(configs) == len({c.label for c in configs})


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_survivors_fit_their_chip(spec: str) -> None:
    smem = {a.name: a.smem for a in ARCHES}
    for _, arch, bits, configs in tables(spec):
        kept = [c for c in configs if c.dropped is None]
        assert all(c.smem <= smem[arch] and (bits == 32 or c.registers <= 255) for c in kept)


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_a_reason_is_true(spec: str) -> None:
    smem = {a.name: a.smem for a in ARCHES}
    for _, arch, bits, configs in tables(spec):
        for c in configs:
            if c.dropped and c.dropped.startswith("shared memory"):
                assert c.smem > smem[arch]
            elif c.dropped and c.dropped.startswith("registers"):
                assert c.registers > 255
            elif c.dropped and "do not divide" in c.dropped:
                assert c.specialised and 64 % c.bn
            elif c.dropped:
                assert (bits, "float32 scores" in c.dropped) == (32, True)


def test_every_architecture_and_width_has_a_table() -> None:
    wanted = [(a.name, bits) for a in ARCHES for bits in (16, 32)]
    for k in stage("nsa_128", "choose_tiles").kernels:
        places = [("sm_90", 16)] if k.body in ONLY_SPECIALISED else wanted
        assert [(t.arch, t.bits) for t in k.tiles] == places, k.name


@pytest.mark.parametrize("name", ["window_fwd", "window_dq", "window_dkv"])
def test_the_first_choice_for_64_heads_over_4_of_dim_128(name: str) -> None:
    """Groups of 16: a tile holds whole groups, keeps the tensor cores busy, and fits an H100."""
    kernel = kernel_of("window_only", name)
    best = next(t for t in kernel.tiles if (t.arch, t.bits) == ("sm_90", 16)).configs[0]
    assert best.dropped is None
    assert best.smem <= 227 << 10
    assert best.registers <= 255
    assert best.bm % 16 == 0
    assert best.bm * best.bn >= 64 * 32
    assert kernel.qk_parts == kernel.v_parts == (128,)


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_a_tile_holds_a_whole_group(spec: str) -> None:
    group = stage(spec, "choose_tiles").heads.group
    for kernel, _, _, configs in tables(spec):
        rows = 1 if kernel.body in HEADS_IN_TURN else group  # of a query
        assert not kernel.walks or all(c.bm >= rows for c in configs)
        assert ("group_fills_tile" in kernel.facts) == (bool(kernel.walks) and 128 % group == 0)


def test_a_tile_is_no_wider_than_a_listed_block() -> None:
    for kernel, _, _, configs in tables("tiny"):
        if any(w.listed for w in kernel.walks):
            assert {c.bn for c in configs} == {16}


# --- place_accesses


def accesses(spec: str, kernel: str) -> dict[str, Access]:
    return {a.operand: a for a in kernel_of(spec, kernel).accesses}


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_the_callers_strides_take_64_bits(spec: str) -> None:
    for kernel in stage(spec, "place_accesses").kernels:
        roles = {o.name: o.role for o in kernel.operands}
        assert all((a.bits == 64) == (roles[a.operand] in ("q", "k", "v")) for a in kernel.accesses)


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_every_store_is_guarded(spec: str) -> None:
    for kernel in stage(spec, "place_accesses").kernels:
        modes = {o.name: o.mode for o in kernel.operands}
        assert all(a.guard == "tile" for a in kernel.accesses if modes[a.operand] != "load")


def test_the_walked_side_is_guarded_by_segment() -> None:
    forward, reverse = accesses("nsa_128", "window_fwd"), accesses("nsa_128", "window_dkv")
    assert {n: a.guard for n, a in forward.items() if n in "qkv"} == {"q": "tile", "k": "segment", "v": "segment"}
    assert {n: a.guard for n, a in reverse.items() if n in "qkv"} == {"q": "segment", "k": "tile", "v": "tile"}
    assert {reverse[n].guard for n in ("d_out", "lse", "delta")} == {"segment"}


def test_a_group_that_leaves_rows_over_is_guarded_whole() -> None:
    """Groups of 3: a tile of 16 rows holds 5 queries and one row of nobody."""
    assert "group_fills_tile" not in kernel_of("tiny", "window_dkv").facts
    assert accesses("tiny", "window_dkv")["q"].guard == "segment"
    assert all(any(m.extent for m in s.masks) for w in kernel_of("tiny", "window_dkv").walks for s in w.segments)
    assert accesses("tiny", "window_fwd")["k"].guard == "segment"


def test_pooled_keys_start_at_their_own_row() -> None:
    found = accesses("nsa_128", "compressed_fwd")
    assert to_text(found["k"].base) == "start // 16"
    assert to_text(found["q"].base) == "start"
    assert to_text(accesses("nsa_128", "compressed_dkv")["parts"].base) == "start // 16"
    assert to_text(accesses("nsa_128", "window_fwd")["k"].base) == "start"


def test_an_access_names_every_buffer_that_a_launch_binds() -> None:
    assert accesses("nsa_128", "window_dq")["dq"].buffers == ("dq_window", "dq_compressed")
    assert accesses("nsa_128", "compressed_fwd")["k"].buffers == ("k_cmp",)


def test_tiles_past_31_bits_are_refused() -> None:
    plan = stage("window_only", "choose_tiles")
    huge = replace(plan, heads=replace(plan.heads, query=1 << 20))
    with pytest.raises(Refused, match="pass 2³¹ elements"):
        PlaceAccesses().run(huge)

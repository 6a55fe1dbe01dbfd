"""The reference on graphs built by hand, and on drawn specs, against the oracle: values and gradients in float64."""

from __future__ import annotations

from collections.abc import Sequence

import oracle
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsagen import reference
from nsagen.errors import InputError, Refused
from nsagen.ir.graph import Attend, BlockList, Combine, Graph, Heads, KeyAxis, Node, Piece, Pool, Select, Source
from nsagen.reference import Reference
from nsagen.spec import spec_from_dict
from nsagen.spec.lower import lower_spec
from nsagen.sym import KEY, QUERY, count, le, lt, multiple

HEADS = Heads(6, 2, 5, 3)
W, SINKS, L, D, SIZE, TOP, INITIAL, LOCAL = 6, 2, 6, 3, 9, 3, 1, 1
TOKENS, BLOCKS = KeyAxis("T"), KeyAxis("compressed", L, D)
WINDOW = Piece("window", (le(KEY, QUERY), lt(QUERY - W, KEY)))
FIRST = Piece("sinks", (lt(KEY, SINKS), le(KEY, QUERY - W)))
ENDED = Piece("ended", (le(KEY * D + L - 1, QUERY),))
CAUSAL = Piece("causal", (le(KEY, QUERY),))

ON_WINDOW = Source("k", "v", TOKENS, (FIRST, WINDOW))
ON_COMPRESSED = Source("k_cmp", "v_cmp", BLOCKS, (ENDED,))
ON_SELECTED = Source("k", "v", TOKENS, (CAUSAL,), BlockList("blocks", SIZE, TOP))
POOLS = (Pool("k_cmp", "k", BLOCKS, "mean", "none"), Pool("v_cmp", "v", BLOCKS, "mean", "none"))
SELECT = Select("blocks", "q", "k_cmp", "lse_compressed", BLOCKS, SIZE, TOP, INITIAL, LOCAL)

BRANCHES = {
    "window": {"size": W, "sinks": SINKS},
    "compressed": {"block": L, "stride": D, "pool": "mean"},
    "selected": {"block": SIZE, "top_n": TOP, "initial": INITIAL, "local": LOCAL},
}
CUS = [None, [0, 1, 1, 5, 16, 37], [0, 20, 31]]  # the last one leaves rows past its end


def attend(branch: str, *sources: Source) -> Attend:
    return Attend(branch, "q", sources, f"out_{branch}", f"lse_{branch}")


def graph(output: str, *nodes: Node) -> Graph:
    return Graph("by_hand", HEADS, (), nodes, ("q", "k", "v"), output)


ALONE = graph("out_window", attend("window", ON_WINDOW))
POOLED = graph("out_compressed", *POOLS, attend("compressed", ON_COMPRESSED))
UNION = graph("out_union", *POOLS, attend("union", ON_WINDOW, ON_COMPRESSED))
GATED = graph(
    "out",
    *POOLS,
    attend("compressed", ON_COMPRESSED),
    SELECT,
    attend("window", ON_WINDOW),
    attend("selected", ON_SELECTED),
    Combine(("out_window", "out_compressed", "out_selected"), "gates", "out"),
)


def spec(combine: str, *names: str) -> dict:
    return {"kv": "shared", "branches": {name: BRANCHES[name] for name in names}, "combine": combine}


CASES = {
    "window": (ALONE, spec("single", "window")),
    "compressed": (POOLED, spec("single", "compressed")),
    "one softmax": (UNION, spec("one_softmax", "window", "compressed")),
    "gated": (GATED, spec("gated_sum", "window", "compressed", "selected")),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(batch: int, tokens: int, gates: int = 0) -> list[Tensor]:
    shapes = ((6, 5), (2, 5), (2, 3), *([(6, gates)] if gates else []))
    return [normal(batch, tokens, *shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def cu_tensor(cu: list[int] | None) -> Tensor | None:
    return None if cu is None else torch.tensor(cu, dtype=torch.int32)


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def same_gradients(got: Tensor, wanted: Tensor, leaves: Sequence[Tensor]) -> None:
    close(got, wanted)
    d_out = normal(*wanted.shape, seed=9)
    for a, b in zip(oracle.gradients(got, leaves, d_out), oracle.gradients(wanted, leaves, d_out), strict=True):
        close(a, b)


@pytest.fixture(params=[1 << 25, 300], ids=["whole", "tiny chunks"], autouse=True)
def budget(request, monkeypatch):
    monkeypatch.setattr(reference, "_BUDGET", request.param)
    return request.param


@pytest.mark.parametrize("cu", CUS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_graphs_by_hand(name, cu):
    by_hand, its_spec = CASES[name]
    for tokens in (37,) if cu else (1, L - 1, 37):
        leaves = draw(1 if cu else 2, tokens, 3 if name == "gated" else 0)
        given_ = dict(zip(("q", "k", "v", "gates"), leaves, strict=False))
        got = Reference(by_hand).attention(given_, cu_seqlens=cu_tensor(cu))
        same_gradients(got, oracle.attention(its_spec, *leaves, cu_seqlens=cu), leaves)


@pytest.mark.parametrize("cu", CUS, ids=str)
def test_attend(cu):
    q, k, v = draw(1, 37)
    out, lse = Reference(ALONE).attend("window", q, (k,), (v,), scale=0.3, cu_seqlens=cu_tensor(cu))
    wanted, wanted_lse = oracle.window(q, k, v, W, SINKS, 0.3, cu)
    same_gradients(out, wanted, (q, k, v))
    close(lse, wanted_lse)
    assert not lse.requires_grad


def test_rows_that_see_nothing():
    q, k, v = draw(2, 12)
    before = graph("out_late", attend("late", Source("k", "v", TOKENS, (Piece("late", (le(KEY, QUERY - 4),)),))))
    out, lse = Reference(before).attend("late", q, (k,), (v,))
    t = torch.arange(12)
    wanted, wanted_lse = oracle.softmax_attention(q, k, v, t <= t[:, None] - 4)
    assert (lse[:, :4] == -torch.inf).all()
    assert (out[:, :4] == 0).all()
    same_gradients(out, wanted, (q, k, v))
    close(lse, wanted_lse)


def test_strides_and_slopes():
    """A congruence, and coefficients other than 1: every third key of the second half of the past."""
    where = (le(KEY, QUERY), le(QUERY, KEY * 2), multiple(QUERY - KEY, 3))
    q, k, v = draw(1, 23)
    out, _ = Reference(graph("out_x", attend("x", Source("k", "v", TOKENS, (Piece("x", where),))))).attend(
        "x", q, (k,), (v,)
    )
    t, s = torch.arange(23)[:, None], torch.arange(23)
    same_gradients(out, oracle.softmax_attention(q, k, v, (s <= t) & (t <= 2 * s) & ((t - s) % 3 == 0))[0], (q, k, v))


@pytest.mark.parametrize("lists", ["random", "none"])
def test_given_blocks(lists):
    q, k, v = draw(2, 37)
    blocks = torch.full((2, 37, 2, TOP), -1, dtype=torch.int32)
    if lists == "random":
        order = normal(2, 37, 2, 6).argsort(-1)[..., :TOP].sort(-1).values
        blocks[:, ::2] = order[:, ::2].int()
    by_hand = graph("out_selected", attend("selected", ON_SELECTED))
    out = Reference(by_hand).attention({"q": q, "k": k, "v": v, "blocks": blocks})
    same_gradients(out, oracle.selected(q, k, v, blocks, SIZE)[0], (q, k, v))


@pytest.mark.parametrize("cu", CUS, ids=str)
def test_select(cu):
    q, k, _ = (x.detach() for x in draw(1, 37))
    k_cmp = oracle.mean_pool(k, L, D, cu)
    scores = oracle.importance(q, k_cmp, L, D, SIZE, cu_seqlens=cu)
    rule = (SIZE, TOP, INITIAL, LOCAL, cu)
    ref = Reference(GATED)
    blocks = ref.select(q, k_cmp, cu_seqlens=cu_tensor(cu))
    assert blocks.tolist() == oracle.select(scores, *rule).tolist()
    assert ref.choice_gap(blocks, q, k_cmp, cu_seqlens=cu_tensor(cu)) == 0
    swapped = blocks.clone()
    swapped[0, 36 if cu != CUS[2] else 30, 1] = -1
    assert ref.choice_gap(swapped, q, k_cmp, cu_seqlens=cu_tensor(cu)) == torch.inf


def test_select_breaks_ties_like_the_oracle():
    """Equal keys, so that many blocks tie; and blocks with score 0 are candidates."""
    q, k_cmp = draw(1, 37)[0].detach(), torch.zeros(1, 11, 2, 5)
    scores = oracle.importance(q, k_cmp, L, D, SIZE).round(decimals=9)
    assert Reference(GATED).select(q, k_cmp).tolist() == oracle.select(scores, SIZE, TOP, INITIAL, LOCAL).tolist()


def test_choice_gap_is_the_oracles():
    q, k, _ = (x.detach() for x in draw(1, 37))
    k_cmp = oracle.mean_pool(k, L, D)
    scores = oracle.importance(q, k_cmp, L, D, SIZE)
    best = oracle.select(scores, SIZE, TOP, INITIAL, LOCAL)
    rows = (
        [0, 1, 4],
        [0, 2, 4],
        [0, 3, 4],
        [0, 4, 3],
        [1, 2, 4],
        [0, 1, 3],
        [0, 0, 4],
        [0, 4, -1],
        [0, 4, 5],
        [-1, 0, 4],
    )
    gaps = []
    for row in rows:
        blocks = best.clone()
        blocks[0, 36, 1] = torch.tensor(row)
        gaps.append(oracle.choice_gap(blocks, scores, SIZE, TOP, INITIAL, LOCAL))
        assert Reference(GATED).choice_gap(blocks, q, k_cmp) == pytest.approx(gaps[-1])
    assert [g < torch.inf for g in gaps] == [True] * 3 + [False] * 7
    assert 0 in gaps
    assert max(gaps[:3]) > 0


@pytest.mark.parametrize("cu", CUS, ids=str)
def test_pool(cu):
    x = normal(1 if cu else 2, 37, 2, 5).requires_grad_()
    same_gradients(Reference(POOLED).pool("compressed", x, cu_tensor(cu)), oracle.mean_pool(x, L, D, cu), (x,))


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (8, 2), (5, 1), (40, 8)])
def test_pool_sizes(size):
    axis = KeyAxis("compressed", *size)
    ref = Reference(graph("k_cmp", Pool("k_cmp", "k", axis, "mean", "none")))
    x = normal(2, 37, 2, 5).requires_grad_()
    same_gradients(ref.pool("compressed", x), oracle.mean_pool(x, *size), (x,))


def test_phi_and_raw_keys():
    q, k, v = draw(1, 37)
    raw, weight = normal(1, 37, 2, 5, seed=7).requires_grad_(), normal(2, L, seed=8).requires_grad_()
    phi = oracle.phi_of("weighted", {"weight": weight})

    def module(k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return oracle.compress(k, v, L, D, (phi, phi), cu_seqlens=cu_seqlens)

    out = Reference(POOLED).attention({"q": q, "k": k, "v": v}, phi=module, k_raw=raw)
    wanted = oracle.attention(spec("single", "compressed"), q, k, v, phi=(phi, phi), k_raw=raw)
    same_gradients(out, wanted, (q, raw, v, weight))


def test_values_that_are_given_are_not_computed():
    q, k, v, gates = draw(1, 37, 3)
    blocks = torch.zeros(1, 37, 2, TOP, dtype=torch.int32)
    blocks[..., 1:] = -1
    values = Reference(GATED).run({"q": q, "k": k, "v": v, "gates": gates, "blocks": blocks})
    assert values["blocks"] is blocks
    close(values["out_selected"], oracle.selected(q, k, v, blocks, SIZE)[0])
    close(values["lse_compressed"], oracle.compressed(q, values["k_cmp"], values["v_cmp"], L, D)[1])


def test_float32_and_bfloat16_inputs():
    leaves = [x.detach().bfloat16().requires_grad_() for x in draw(1, 37)]
    given_ = dict(zip("qkv", leaves, strict=True))
    exact = oracle.window(*leaves, W, SINKS)[0]
    close(Reference(ALONE).attention(given_), exact)
    out = Reference(ALONE).attention(given_, dtype=torch.float32)
    assert out.dtype == torch.float32
    close(out.double(), exact, 1e-5)
    assert all(g.dtype == torch.bfloat16 for g in oracle.gradients(out, leaves, torch.ones_like(out)))


def test_a_window_reads_only_its_keys():
    """Far keys are skipped by the bounds, not masked: NaN there reaches nothing."""
    q, k, v = (x.detach() for x in draw(1, 2100))
    k[:, SINKS : 512 - W], v[:, SINKS : 512 - W] = torch.nan, torch.nan
    out, _ = Reference(ALONE).attend("window", q, (k,), (v,))
    assert out[:, 512:].isfinite().all()


def test_memory_is_linear(monkeypatch):
    """No tensor of a long case has more entries than the budget."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = result if isinstance(result, (tuple, list)) else (result,)
            self.entries = max(
                [self.entries, *(x.untyped_storage().nbytes() // 8 for x in tensors if isinstance(x, Tensor))]
            )
            return result

    monkeypatch.setattr(reference, "_BUDGET", 1 << 19)
    q, k, v = (normal(1, 3000, 2, 4, seed=i).requires_grad_() for i in range(3))
    dense = Graph(
        "dense", Heads(2, 2, 4, 4), (), (attend("dense", Source("k", "v", TOKENS, (CAUSAL,))),), (), "out_dense"
    )
    with Largest() as largest:
        Reference(dense).attention({"q": q, "k": k, "v": v}).sum().backward()
    assert largest.entries <= 1 << 19 < 3000 * 3000


def test_refusals():
    q, k, v = draw(1, 9)
    with pytest.raises(InputError, match="no blocks were given"):
        Reference(graph("o", attend("selected", ON_SELECTED))).attend("selected", q, (k,), (v,))
    with pytest.raises(Refused, match="not linear"):
        Reference(graph("o", attend("x", Source("k", "v", TOKENS, (Piece("x", (le(KEY * QUERY, 4),)),)))))
    with pytest.raises(Refused, match="not linear"):
        Reference(graph("o", attend("x", Source("k", "v", TOKENS, (Piece("x", (lt(KEY, count("T")),)),)))))
    linear = graph(
        "out_compressed",
        *(Pool(f"{x}_cmp", x, BLOCKS, "linear", "per_token") for x in "kv"),
        attend("c", ON_COMPRESSED),
    )
    with pytest.raises(InputError, match="pool linear needs phi"):
        Reference(linear).attention({"q": q, "k": k, "v": v})


# Specs through the lowering


KINDS = ("window", "compressed", "selected")


@settings(max_examples=60)
@given(strategies.specs(KINDS, ("mean", "weighted", "linear", "mlp")))
def test_drawn_specs_are_legal(drawn):
    assert list(spec_from_dict(drawn).to_dict()["branches"]) == list(drawn["branches"])


@pytest.mark.parametrize("kinds", [("window", "compressed"), KINDS], ids="+".join)
@pytest.mark.parametrize("is_packed", [False, True], ids=["batch", "packed"])
def test_lowered_specs(kinds, is_packed):
    @settings(max_examples=25)
    @given(st.data())
    def check(data):
        drawn = data.draw(strategies.specs(kinds, combines=("gated_sum", "single", "one_softmax")))
        cu = data.draw(strategies.packed(drawn)) if is_packed else None
        shape = (1, cu[-1]) if cu else data.draw(strategies.shapes(drawn))
        compare(drawn, strategies.make_inputs(drawn, *shape, torch.float64, seed=data.draw(strategies.seeds)), cu)

    check()


def compare(drawn: dict, given_: strategies.Inputs, cu: list[int] | None) -> None:
    ref = Reference(lower_spec(spec_from_dict(drawn)))
    blocks = None
    if drawn["branches"].get("selected", {}).get("from") == "caller":
        heads, top_n = drawn["heads"]["kv"], drawn["branches"]["selected"]["top_n"]
        blocks = torch.full((*given_.q.shape[:2], heads, top_n), -1, dtype=torch.int32)
        blocks[..., 0] = 0
    values = ref.inputs(given_.q, given_.k, given_.v, gates=given_.gates, blocks=blocks)
    got = ref.attention(values, cu_seqlens=cu_tensor(cu))
    same_gradients(got, oracle.attention(drawn, *given_, blocks=blocks, cu_seqlens=cu), given_.leaves)

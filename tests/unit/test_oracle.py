"""The oracle against cases computed by hand, and the strategies against their promises."""

from __future__ import annotations

import math
from itertools import pairwise

import oracle
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

ALL = ("window", "compressed", "selected")
POOLS = ("mean", "weighted", "linear", "mlp")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def triple(
    tokens: int, batch: int = 1, heads: int = 6, kv: int = 2, qk: int = 4, v: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    return normal(batch, tokens, heads, qk), normal(batch, tokens, kv, qk, seed=1), normal(batch, tokens, kv, v, seed=2)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# By hand


def test_a_window_of_one_returns_v():
    q, k, v = triple(5)
    out, lse = oracle.window(q, k, v, 1)
    close(out, v.repeat_interleave(3, 2))
    close(lse, (q * k.repeat_interleave(3, 2)).sum(-1) / 2)


def test_equal_keys_average():
    q, k, v = triple(7)
    out, lse = oracle.window(q, torch.zeros_like(k), v, 3)
    close(out[0, 5, 0], v[0, 3:6, 0].mean(0))
    close(out[0, 0, 5], v[0, 0, 1])
    close(lse[0, :, 0].exp(), torch.tensor([1, 2, 3, 3, 3, 3, 3], dtype=torch.float64))


def test_two_keys_by_hand():
    q, k, v = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [0.5]]), torch.tensor([[10.0], [20.0]])
    out, lse = oracle.dense_causal(*(x.view(1, 2, 1, 1) for x in (q, k, v)), scale=0.5)
    a, b = math.exp(0.5 * 2 * 3), math.exp(0.5 * 2 * 0.5)
    assert out[0, :, 0, 0].tolist() == pytest.approx([10, (a * 10 + b * 20) / (a + b)])
    assert lse[0, :, 0].tolist() == pytest.approx([1.5, math.log(a + b)])


def test_heads_read_their_group():
    q, k, v = triple(4, heads=6, kv=2)
    alone = [
        oracle.dense_causal(q[:, :, h : h + 1], k[:, :, h // 3 :][:, :, :1], v[:, :, h // 3 :][:, :, :1])[0]
        for h in range(6)
    ]
    close(oracle.dense_causal(q, k, v)[0], torch.cat(alone, 2))


def test_sinks_by_hand():
    assert oracle.see_window(6, 2, 1).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]


def test_compressed_by_hand():
    """l = 4, d = 2: block 0 ends at token 3, block 1 at 5, block 2 at 7."""
    assert oracle.see_compressed(8, 4, 2).sum(1).tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    q, k, v = triple(8)
    k_cmp, v_cmp = oracle.compress(k, v, 4, 2)
    close(v_cmp[0, 1, 1], v[0, 2:6, 1].mean(0))
    out, lse = oracle.compressed(q, k_cmp, v_cmp, 4, 2)
    assert (out[:, :3] == 0).all()
    assert (lse[:, :3] == -torch.inf).all()
    close(out[:, 3], v_cmp[:, 0].repeat_interleave(3, 1))
    close(out[:, 4], v_cmp[:, 0].repeat_interleave(3, 1))


def test_rows_that_see_nothing_have_no_nan():
    q, k, v = (x.requires_grad_() for x in triple(5))
    visible = torch.zeros(5, 5, dtype=torch.bool)
    visible[3, 1] = True
    out, lse = oracle.softmax_attention(q, k, v, visible)
    grads = oracle.gradients(out, [q, k, v], torch.ones_like(out))
    assert out.isfinite().all()
    assert (lse[:, [0, 1, 2, 4]] == -torch.inf).all()
    assert all(g.isfinite().all() for g in grads)
    assert (grads[2][:, 1] == 3).all()


def test_keys_that_nobody_sees_may_be_nan():
    q, k, v = triple(6)
    q[:, 4:], k[:, 4:], v[:, 4:] = torch.nan, torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = oracle.dense_causal(*leaves, cu_seqlens=[0, 4])
    assert out.isfinite().all()
    assert (out[:, 4:] == 0).all()
    assert all(g.isfinite().all() for g in oracle.gradients(out, leaves, torch.ones_like(out)))


def test_weights_of_the_paper():
    """l, d, l' = 32, 16, 64: block j takes i = 4j − 1 … 4j + 3 with 1, 2, 2, 2, 1."""
    w = oracle.overlap_weights(32, 16, 64, 15, 4)
    assert w[3:8, 1].tolist() == [1, 2, 2, 2, 1]
    assert w[:, 1].sum() == 8
    assert w[:4, 0].tolist() == [2, 2, 2, 1]
    assert oracle.overlap_weights(4, 4, 4, 3, 3).tolist() == torch.eye(3).tolist()


def test_importance_by_hand():
    """Equal keys: p_cmp is uniform over the visible blocks; three heads of a group are summed."""
    q, k, _ = triple(16)
    k_cmp = torch.zeros_like(k[:, : oracle.block_count(16, 4, 2)])
    scores = oracle.importance(q, k_cmp, 4, 2, 4)
    assert scores.shape == (1, 16, 2, 4)
    # t = 9 sees blocks 0 … 3; selection block 0 shares 4, 2 tokens with blocks 0, 1, selection block 1 shares 2, 4, 2 …
    assert scores[0, 9, 0].tolist() == pytest.approx([3 / 4 * 3, 3 / 4 * 4, 3 / 4 * 1, 0])
    assert (scores[0, :3] == 0).all()


def test_select_by_hand():
    scores = torch.tensor([5.0, 1, 4, 4, 4, 9]).view(1, 1, 1, 6).expand(1, 12, 1, 6)
    rows = oracle.select(scores, 2, 4, 1, 1)[0, :, 0].tolist()
    assert rows[0] == rows[1] == [0, -1, -1, -1]
    assert rows[5] == [0, 1, 2, -1]
    assert rows[8] == [0, 2, 3, 4]  # own block 4 is local; block 3 ties with 2, and both fit
    assert rows[11] == [0, 2, 3, 5]  # 2, 3 and 4 tie: the lower ones
    assert oracle.select(scores, 2, 3, 0, 0)[0, 11, 0].tolist() == [0, 2, 5]
    assert oracle.select(scores, 2, 3, 1, 2)[0, 2, 0].tolist() == [0, 1, -1]  # block 0 is initial and local, once
    assert oracle.select(scores, 2, 2, 0, 0, [0, 4, 11])[0, :, 0].tolist()[3:6] == [[0, 1], [0, -1], [0, -1]]
    assert oracle.select(scores, 2, 2, 0, 0, [0, 4, 11])[0, 11, 0].tolist() == [-1, -1]


def test_choice_gap():
    scores = torch.tensor([5.0, 1, 4, 3, 2, 9]).view(1, 1, 1, 6)
    scores = scores.expand(1, 12, 1, 6)
    rule = (2, 3, 1, 1)
    blocks = oracle.select(scores, *rule)

    def gap(row: list[int]) -> float:
        other = blocks.clone()
        other[0, 11, 0] = torch.tensor(row)
        return oracle.choice_gap(other, scores, *rule)

    assert gap([0, 2, 5]) == 0
    assert gap([0, 3, 5]) == 1
    assert gap([0, 1, 5]) == 3
    for row in ([0, 5, 2], [2, 3, 5], [0, 2, 4], [0, 5, -1], [0, 2, 2], [-1, 0, 5], [0, 5, 6]):
        assert gap(row) == oracle.INF
    assert oracle.choice_gap(blocks[..., :2], scores, *rule) == oracle.INF


def test_selected_by_hand():
    q, k, v = triple(8)
    blocks = torch.tensor([0, 3, -1]).expand(1, 8, 2, 3)
    seen = oracle.see_selected(blocks, 2)[0, :, 0].int()
    assert seen[7].tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    assert seen[6].tolist() == [1, 1, 0, 0, 0, 0, 1, 0]
    assert seen[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    out, _ = oracle.selected(q, k, v, torch.full((1, 8, 2, 3), -1), 2)
    assert (out == 0).all()


def test_pools_by_hand():
    x = normal(1, 7, 1, 2)
    weight = normal(1, 3, seed=3)
    close(oracle.pool(x, 3, 1, oracle.phi_of("weighted", {"weight": weight}))[0, 4, 0], weight[0] @ x[0, 4:7, 0])
    matrix, places = normal(1, 6, 2, seed=4), normal(1, 3, 2, seed=5)
    linear = oracle.phi_of("linear", {"weight": matrix, "positions": places})
    close(oracle.pool(x, 3, 3, linear)[0, 1, 0], (x[0, 3:6, 0] + places[0]).reshape(-1) @ matrix[0])
    given = {
        "weight_in": normal(1, 6, 4),
        "bias_in": normal(1, 4),
        "weight_out": normal(1, 4, 2),
        "bias_out": normal(1, 2),
    }
    hidden = torch.nn.functional.gelu(x[0, :3, 0].reshape(-1) @ given["weight_in"][0] + given["bias_in"][0])
    wanted = hidden @ given["weight_out"][0] + given["bias_out"][0]
    close(oracle.pool(x, 3, 3, oracle.phi_of("mlp", given))[0, 0, 0], wanted)


def test_packed_rows_of_blocks():
    """l = 4, d = 2, sequences of 5, 3, 0 and 7 tokens: blocks at rows 0 of 2; none; none; 4, 5 of 7."""
    x = torch.arange(1.0, 17).view(1, 16, 1, 1)
    pooled = oracle.mean_pool(x, 4, 2, [0, 5, 8, 8, 15])[0, :, 0, 0].tolist()
    assert pooled == [2.5, 0, 0, 0, 10.5, 12.5, 0, 0]


def test_rope_turns_used_rows_at_their_starts():
    def rope(x: Tensor, positions: Tensor) -> Tensor:
        return x + 1 + positions.view(-1, 1, 1)

    k = torch.zeros(1, 9, 1, 1)
    k_cmp, v_cmp = oracle.compress(k, k, 4, 2, rope=rope, cu_seqlens=[0, 2, 9])
    assert k_cmp.flatten().tolist() == [0, 1, 3, 0]
    assert (v_cmp == 0).all()


def test_gated_sum():
    a, b = normal(1, 2, 3, 4), normal(1, 2, 3, 4, seed=1)
    close(oracle.gated_sum([a, b], torch.tensor([0.25, 1.0]).expand(1, 2, 3, 2)), a / 4 + b)


def test_error():
    a = normal(4)
    assert oracle.error(a, a) == 0
    assert oracle.error(a * 1.01, a) == pytest.approx(0.01)
    assert oracle.error(a * 0, a * 0) == 0
    assert oracle.error(a, a * 0) == oracle.INF
    assert oracle.error(a, a * 0, floor=1000 * float(a.norm())) == pytest.approx(1)
    assert oracle.error(a[:0], a[:0]) == 0
    lse = torch.tensor([0.0, -torch.inf])
    assert oracle.error(lse, lse) == 0
    for wrong in ([0.0, torch.nan], [0, torch.inf], [0, 0], [-torch.inf, -torch.inf], [torch.nan, -torch.inf]):
        assert oracle.error(torch.tensor(wrong), lse) == oracle.INF
        assert oracle.error(lse, torch.tensor(wrong)) == oracle.INF
    assert oracle.error(a, a, floor=torch.nan) == oracle.INF
    with pytest.raises(AssertionError, match="shapes"):
        oracle.error(a, a[:1])


# Identities


@pytest.mark.parametrize("cu", [None, [0, 4, 4, 5, 11]])
def test_identities_with_dense(cu):
    q, k, v = triple(11, batch=1 if cu else 2)
    out, lse = oracle.dense_causal(q, k, v, 0.7, cu)
    everything = torch.arange(4).expand(q.shape[0], 11, 2, 4)
    for one in (
        oracle.window(q, k, v, 11, 0, 0.7, cu),
        oracle.window(q, k, v, 3, 11, 0.7, cu),
        oracle.compressed(q, *oracle.compress(k, v, 1, 1, cu_seqlens=cu), 1, 1, 0.7, cu),
        oracle.selected(q, k, v, everything, 3, 0.7, cu),
    ):
        close(one[0], out)
        close(one[1], lse)


def test_dense_is_what_torch_computes():
    q, k, v = (x.transpose(1, 2) for x in triple(13, batch=2))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    close(oracle.dense_causal(*(x.transpose(1, 2) for x in (q, k, v)))[0], wanted.transpose(1, 2))


def test_one_softmax_counts_a_key_once():
    q, k, v = triple(9)
    blocks = torch.tensor([0, 2, 4]).expand(1, 9, 2, 3)
    spec = {"kv": "shared", "branches": {"window": {"size": 4}, "selected": {"block": 2}}, "combine": "one_softmax"}
    either = oracle.see_window(9, 4)[None, :, None] | oracle.see_selected(blocks, 2)
    close(oracle.attention(spec, q, k, v, blocks=blocks), oracle.softmax_attention(q, k, v, either)[0])
    own = {"window": k, "selected": k}, {"window": v, "selected": v}
    twice = oracle.attention({**spec, "kv": "per_branch"}, q, *own, blocks=blocks)
    assert oracle.error(twice, oracle.attention(spec, q, k, v, blocks=blocks)) > 1e-3


def test_one_softmax_of_a_branch_is_the_branch():
    q, k, v = triple(9)
    spec = {"branches": {"window": {"size": 4, "sinks": 1}}, "combine": "one_softmax"}
    close(oracle.attention(spec, q, k, v), oracle.window(q, k, v, 4, 1)[0])


def test_attention_is_the_gated_sum_of_its_parts():
    q, k, v = triple(20)
    gates = normal(1, 20, 6, 3).sigmoid()
    branches = {
        "selected": {"block": 4, "top_n": 3, "initial": 1, "local": 1},
        "window": {"size": 5},
        "compressed": {"block": 4, "stride": 2, "pool": "mean"},
    }
    k_cmp, v_cmp = oracle.compress(k, v, 4, 2)
    blocks = oracle.select(oracle.importance(q, k_cmp, 4, 2, 4), 4, 3, 1, 1)
    outs = [
        oracle.selected(q, k, v, blocks, 4)[0],
        oracle.window(q, k, v, 5)[0],
        oracle.compressed(q, k_cmp, v_cmp, 4, 2)[0],
    ]
    close(oracle.attention({"branches": branches}, q, k, v, gates), oracle.gated_sum(outs, gates))


def test_gradients_are_right():
    q, k, v = (x.requires_grad_() for x in triple(6, heads=2, kv=1, qk=3, v=2))
    gates = normal(1, 6, 2, 2).sigmoid().requires_grad_()
    branches = {"compressed": {"block": 4, "stride": 2, "pool": "mean"}, "window": {"size": 2, "sinks": 1}}
    spec = {"branches": branches, "combine": "gated_sum"}
    assert torch.autograd.gradcheck(lambda *x: oracle.attention(spec, *x), (q, k, v, gates))
    assert torch.autograd.gradcheck(lambda *x: oracle.attention(spec, *x, cu_seqlens=[0, 1, 6]), (q, k, v, gates))


@pytest.mark.parametrize("kind", POOLS)
def test_gradients_of_pools_are_right(kind):
    sizes = {
        "mean": {},
        "weighted": {"weight": (2, 4)},
        "linear": {"weight": (2, 12, 3), "positions": (2, 4, 3)},
        "mlp": {"weight_in": (2, 12, 2), "bias_in": (2, 2), "weight_out": (2, 2, 3), "bias_out": (2, 3)},
    }[kind]
    given = [normal(*size, seed=i).requires_grad_() for i, size in enumerate(sizes.values())]

    def pooled(x: Tensor, *parameters: Tensor) -> Tensor:
        return oracle.pool(x, 4, 2, oracle.phi_of(kind, dict(zip(sizes, parameters, strict=True))))

    assert torch.autograd.gradcheck(pooled, (normal(1, 7, 2, 3).requires_grad_(), *given))


# The strategies


def alone(spec, given: strategies.Inputs, start: int, end: int) -> Tensor:
    """The same operation on one of the packed sequences, cut out."""

    def cut(x):
        return {n: one[:, start:end] for n, one in x.items()} if isinstance(x, dict) else x[:, start:end]

    return oracle.attention(spec, *(None if x is None else cut(x) for x in given))


@settings(max_examples=15)
@given(st.data())
def test_packed_is_each_sequence_alone(data):
    scored = st.one_of(strategies.specs(ALL), strategies.specs(ALL, combines=("one_softmax",)))
    spec = data.draw(scored.filter(lambda s: s["branches"].get("selected", {}).get("from") != "caller"))
    cu = data.draw(strategies.packed(spec))
    given_ = strategies.make_inputs(spec, 1, cu[-1], torch.float64, seed=data.draw(strategies.seeds))
    out = oracle.attention(spec, *given_, cu_seqlens=torch.tensor(cu, dtype=torch.int32))
    for start, end in pairwise(cu):
        if start < end:
            close(out[:, start:end], alone(spec, given_, start, end))


@settings(max_examples=40)
@given(st.data())
def test_draws_are_small_and_cu_seqlens_grow(data):
    spec = data.draw(strategies.specs(ALL, POOLS))
    heads = spec["heads"]
    assert heads["query"] % heads["kv"] == 0
    assert all(heads[d] % 8 == 0 and 16 <= heads[d] <= 72 for d in ("qk_dim", "v_dim"))
    batch, tokens = data.draw(strategies.shapes(spec))
    assert batch * tokens * heads["query"] <= strategies.ROWS
    assert 1 <= tokens <= strategies.TOKENS
    for empty in (True, False):
        cu = data.draw(strategies.packed(spec, empty))
        assert cu[0] == 0
        assert 1 <= cu[-1] <= strategies.most_tokens(spec)
        assert all(b - a >= (not empty) for a, b in pairwise(cu))


@settings(max_examples=15)
@given(strategies.specs(ALL), strategies.seeds, st.sampled_from((torch.float64, torch.bfloat16)))
def test_inputs(spec, seed, dtype):
    plain, strided = (strategies.make_inputs(spec, 2, 5, dtype, "cpu", seed, strided) for strided in (False, True))
    for a, b in zip(plain.leaves, strided.leaves, strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous()
        assert not b.is_contiguous()
        assert b.stride(-1) == 1 or b.shape[-1] == 1
        assert a.is_leaf
        assert b.is_leaf
        assert a.requires_grad
        assert b.requires_grad
        assert a.dtype == dtype
    assert (plain.gates is None) == (spec["combine"] != "gated_sum")
    assert plain.gates is None or (plain.gates.min() > 0 and plain.gates.max() < 1)


@settings(max_examples=10)
@given(st.data())
def test_a_drawn_case_runs_and_has_finite_gradients(data):
    spec = data.draw(strategies.specs(("window", "compressed"), combines=("gated_sum", "single", "one_softmax")))
    given_ = strategies.make_inputs(
        spec, *data.draw(strategies.shapes(spec)), torch.float32, seed=data.draw(strategies.seeds)
    )
    twins = strategies.Inputs(*(oracle.twin(x) for x in given_))
    out = oracle.attention(spec, *twins)
    assert out.shape == (*given_.q.shape[:3], spec["heads"]["v_dim"])
    grads = oracle.gradients(out, twins.leaves, torch.ones_like(out))
    assert all(x.isfinite().all() for x in (out, *grads))

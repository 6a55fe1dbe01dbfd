"""The oracle against cases computed by hand, and the strategies against their promises."""

from __future__ import annotations

import math
from itertools import pairwise, product

import oracle
import pytest
import strategies
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

ALL = ("window", "compressed", "selected")
POOLS = ("mean", "weighted", "linear", "mlp")
COMBINES = ("gated_sum", "single", "one_softmax")
CHOSEN = ("compressed", "pooled")  # the oracle makes the lists itself


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


def keys_of(values: list[float]) -> Tensor:
    """Keys [1, T, 1, 1]."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def test_pooled_importance_by_hand():
    """l' = 4: blocks end at tokens 3, 7, 11. Equal means: p is uniform over the ended ones; three heads are summed."""
    q, k, _ = triple(14)
    scores = oracle.pooled_importance(q, torch.zeros_like(k), 4)
    assert scores.shape == (1, 14, 2, 4)
    assert scores[0, 11, 1].tolist() == pytest.approx([1, 1, 1, 0])
    assert scores[0, 10, 1].tolist() == pytest.approx([1.5, 1.5, 0, 0])
    assert scores[0, 3, 0].tolist() == pytest.approx([3, 0, 0, 0])
    assert (scores[0, :3] == 0).all()


def test_pooled_importance_is_of_mean_keys():
    """Means log 1, log 2, log 5; the single keys, whose exponentials would rank otherwise, do not matter."""
    means = [math.log(1), math.log(2), math.log(5)]
    k = keys_of([m + sign * spread for m, spread in zip(means, (9, 1, 0), strict=True) for sign in (1, -1)])
    q = torch.full((1, 6, 1, 1), 2.0)
    scores = oracle.pooled_importance(q, k, 2, scale=0.5)
    assert scores[0, 5, 0].tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    assert scores[0, 4, 0].tolist() == pytest.approx([1 / 3, 2 / 3, 0])


def test_pooled_importance_of_a_group_is_a_sum():
    """p = .5 .4 .1 and .1 .4 .5: the group takes block 1, which is the best of neither head."""
    p = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.4, 0.5]], dtype=torch.float64)
    q = torch.eye(2, dtype=torch.float64).expand(1, 3, 2, 2)
    scores = oracle.pooled_importance(q, p.T.log()[None, :, None], 1, scale=1)
    close(scores[0, 2, 0], p.sum(0))
    assert oracle.select(scores, 1, 1)[0, 2].tolist() == [[1]]


def test_pooled_importance_packed():
    """l' = 2, sequences of 3, 0, 4 and 1 tokens: blocks are cut from each sequence's start."""
    k = keys_of([7, 7, 7, 0, 0, 3, -1, 5, torch.nan])
    q = torch.ones(1, 9, 1, 1)
    scores = oracle.pooled_importance(q, k, 2, cu_seqlens=[0, 3, 3, 7, 8])[0, :, 0]
    assert scores[:6].tolist() == [[0, 0], [1, 0], [1, 0], [0, 0], [1, 0], [1, 0]]
    assert scores[6].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
    assert (scores[7:] == 0).all()


POOLED = {"branches": {"selected": {"block": 2, "top_n": 2, "initial": 0, "local": 0, "from": "pooled"}}}


def test_choose_pooled_by_hand():
    """The block under way scores 0: below any that ended, however good its keys are; forced, it is taken."""
    k = keys_of([1, 1, 3, 3, 2, 2, 9])
    q = torch.ones(1, 7, 1, 1)
    rows = oracle.choose(POOLED, q, k)[0, :, 0].tolist()
    assert rows == [[0, -1], [0, -1], [0, 1], [0, 1], [0, 1], [1, 2], [1, 2]]
    forced = {"selected": {**POOLED["branches"]["selected"], "local": 1}}
    assert oracle.choose({"branches": forced}, q, k)[0, 4:, 0].tolist() == [[1, 2], [1, 2], [1, 3]]


def test_choose_pooled_takes_the_lower_of_equals():
    spec = {"branches": {"selected": {**POOLED["branches"]["selected"], "top_n": 3}}}
    rows = oracle.choose(spec, torch.ones(1, 9, 1, 1), torch.zeros(1, 9, 1, 1))[0, :, 0].tolist()
    assert rows[8] == [0, 1, 2]
    assert rows[4] == [0, 1, 2]  # fewer ended than n: the own one fills up
    assert rows[1] == [0, -1, -1]


@pytest.mark.parametrize("cu", [None, [0, 5, 5, 8, 23]])
def test_choose_pooled_is_compressed_by_means_of_the_same_blocks(cu):
    q, k, _ = triple(23)
    selected = {"block": 3, "top_n": 3, "initial": 0, "local": 1}
    branches = {"compressed": {"block": 3, "stride": 3, "pool": "mean"}, "selected": selected}
    by_pooled = {"branches": {"selected": {**selected, "from": "pooled"}}}
    wanted = oracle.choose({"branches": branches}, q, oracle.mean_pool(k, 3, 3, cu), 0.9, cu)
    assert torch.equal(oracle.choose(by_pooled, q, k, 0.9, cu), wanted)
    assert (wanted[0, 22] >= 0).all()


def test_the_callers_blocks_have_no_scores():
    spec = {"branches": {"selected": {"block": 2, "top_n": 2, "from": "caller"}}}
    with pytest.raises(AssertionError, match="from: caller has no scores"):
        oracle.attention(spec, *triple(5))


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


def with_pooled(kv: str, combine: str, *names: str) -> strategies.Spec:
    branches = {
        "compressed": {"block": 4, "stride": 2, "pool": "mean"},
        "window": {"size": 3, "sinks": 1},
        "selected": {"block": 3, "top_n": 3, "initial": 0, "local": 1, "from": "pooled"},
    }
    return {"kv": kv, "branches": {name: branches[name] for name in names}, "combine": combine}


@pytest.mark.parametrize("cu", [None, [0, 2, 2, 13, 22]])
@pytest.mark.parametrize(
    ("combine", "names"),
    [
        ("single", ("selected",)),
        ("one_softmax", ("selected",)),
        ("one_softmax", ("window", "selected")),
        ("one_softmax", ("compressed", "window", "selected")),
        ("gated_sum", ("selected", "window")),
        ("gated_sum", ("selected", "compressed", "window")),
    ],
)
def test_pooled_blocks_come_from_the_selected_branchs_keys(combine, names, cu):
    """Of three pairs of keys, and whatever φ reads."""
    q, k, v = triple(22)
    ks, vs = {n: k * (i + 1) for i, n in enumerate(names)}, {n: v + i for i, n in enumerate(names)}
    ks["selected"] = normal(*k.shape, seed=7)
    spec = with_pooled("per_branch", combine, *names)
    gates = normal(1, 22, 6, len(names)).sigmoid() if combine == "gated_sum" else None
    own, raw = {"scale": 0.8, "cu_seqlens": cu}, normal(*k.shape, seed=8)
    blocks = oracle.choose(spec, q, ks["selected"], **own)
    assert not torch.equal(blocks, oracle.choose(spec, q, k, **own))
    assert not torch.equal(blocks, oracle.choose(spec, q, raw, **own))
    out = oracle.attention(spec, q, ks, vs, gates, k_raw=raw, **own)
    close(out, oracle.attention(spec, q, ks, vs, gates, k_raw=raw, blocks=blocks, **own))


def test_one_softmax_scores_by_the_compressed_axis_alone():
    """p_cmp = .9 .1 and .3 .7: block 0. In the union the window takes most of head 0's share: it would be block 1."""
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    of_window = torch.tensor([5.0, 0], dtype=torch.float64)
    in_union = p / (p.sum(1) + of_window.exp())[:, None]
    assert p.sum(0).argmax() == 0
    assert in_union.sum(0).argmax() == 1
    q = torch.eye(2, dtype=torch.float64).expand(1, 5, 2, 2)
    keys = torch.cat([p.T.log().repeat_interleave(2, 0), torch.zeros(1, 2)])[None, :, None]
    k = {"compressed": keys, "selected": keys, "window": of_window.expand(1, 5, 1, 2)}
    v = {name: normal(1, 5, 1, 3, seed=i) for i, name in enumerate(k)}
    branches = {
        "window": {"size": 1},
        "selected": {"block": 2, "top_n": 1, "initial": 0, "local": 0},
        "compressed": {"block": 2, "stride": 2, "pool": "mean"},
    }
    spec = {"kv": "per_branch", "branches": branches, "combine": "one_softmax"}
    right, wrong = (oracle.attention(spec, q, k, v, blocks=torch.full((1, 5, 1, 1), j), scale=1)[:, 4] for j in (0, 1))
    close(oracle.attention(spec, q, k, v, scale=1)[:, 4], right)
    assert oracle.error(wrong, right) > 1e-3


@pytest.mark.parametrize("combine", ["gated_sum", "one_softmax"])
def test_the_combine_does_not_change_the_choice(combine):
    q, k, v = triple(20)
    branches = {
        "compressed": {"block": 4, "stride": 2, "pool": "mean"},
        "selected": {"block": 4, "top_n": 3, "initial": 0, "local": 1},
    }
    spec = {"kv": "shared", "branches": branches, "combine": combine}
    gates = normal(1, 20, 6, 2).sigmoid() if combine == "gated_sum" else None
    blocks = oracle.select(oracle.importance(q, oracle.mean_pool(k, 4, 2), 4, 2, 4), 4, 3, 0, 1)
    close(oracle.attention(spec, q, k, v, gates), oracle.attention(spec, q, k, v, gates, blocks=blocks))


def test_gradients_are_right():
    q, k, v = (x.requires_grad_() for x in triple(6, heads=2, kv=1, qk=3, v=2))
    gates = normal(1, 6, 2, 2).sigmoid().requires_grad_()
    branches = {"compressed": {"block": 4, "stride": 2, "pool": "mean"}, "window": {"size": 2, "sinks": 1}}
    spec = {"branches": branches, "combine": "gated_sum"}
    assert torch.autograd.gradcheck(lambda *x: oracle.attention(spec, *x), (q, k, v, gates))
    assert torch.autograd.gradcheck(lambda *x: oracle.attention(spec, *x, cu_seqlens=[0, 1, 6]), (q, k, v, gates))


@pytest.mark.parametrize(
    ("combine", "names"), [("single", ("selected",)), ("one_softmax", ("compressed", "window", "selected"))]
)
def test_no_gradient_flows_through_the_choice_by_pooled_keys(combine, names):
    q, k, v = (x.requires_grad_() for x in triple(9, heads=2, kv=1, qk=3, v=2))
    spec = with_pooled("shared", combine, *names)
    assert not oracle.block_scores(spec, q, k).requires_grad
    assert torch.autograd.gradcheck(lambda *x: oracle.attention(spec, *x), (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: oracle.attention(spec, *x, cu_seqlens=[0, 1, 8]), (q, k, v))


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


@settings(max_examples=20)
@given(st.data())
def test_packed_is_each_sequence_alone(data):
    spec = data.draw(strategies.specs(ALL, combines=COMBINES, froms=CHOSEN))
    cu = data.draw(strategies.packed(spec))
    given_ = strategies.make_inputs(spec, 1, cu[-1], torch.float64, seed=data.draw(strategies.seeds))
    out = oracle.attention(spec, *given_, cu_seqlens=torch.tensor(cu, dtype=torch.int32))
    for start, end in pairwise(cu):
        if start < end:
            close(out[:, start:end], alone(spec, given_, start, end))


@settings(max_examples=20)
@given(st.data())
def test_the_future_does_not_matter(data):
    spec = data.draw(strategies.specs(ALL, combines=COMBINES, froms=CHOSEN))
    batch, tokens = data.draw(strategies.shapes(spec))
    given_ = strategies.make_inputs(spec, batch, tokens, torch.float64, seed=data.draw(strategies.seeds))
    now = data.draw(st.integers(1, tokens))
    close(oracle.attention(spec, *given_)[:, :now], alone(spec, given_, 0, now))


@settings(max_examples=100)
@given(strategies.specs(ALL, combines=COMBINES))
def test_drawn_blocks_have_a_source_that_fits(spec):
    selected, compressed = (spec["branches"].get(name) for name in ("selected", "compressed"))
    if selected is None:
        return
    assert selected["initial"] + selected["local"] <= selected["top_n"]
    if selected["from"] == "compressed":
        assert compressed is not None
        assert selected["block"] % compressed["stride"] == 0
        assert selected["block"] >= compressed["block"]
    names = list(spec["branches"])
    if "window" in names and (spec["kv"], spec["combine"]) == ("shared", "one_softmax"):
        assert names.index("window") < names.index("selected")


SOURCES = [(f, c) for f, c in product(strategies.FROMS, COMBINES) if (f, c) != ("compressed", "single")]


@pytest.mark.parametrize(("of", "combine"), SOURCES)
def test_every_source_is_drawn_under_every_combine(of, combine):
    def is_it(spec: strategies.Spec) -> bool:
        return (spec["branches"].get("selected", {}).get("from"), spec["combine"]) == (of, combine)

    find(strategies.specs(ALL, combines=COMBINES), is_it, settings=settings(max_examples=2000, phases=[Phase.generate]))


@settings(max_examples=30)
@given(st.data(), st.sampled_from([*CHOSEN, "caller"]))
def test_sources_can_be_kept_apart(data, of):
    branches = data.draw(strategies.specs(ALL, combines=COMBINES, froms=(of,)))["branches"]
    wanted = "caller" if of == "compressed" and of not in branches else of
    assert branches.get("selected", {"from": wanted})["from"] == wanted


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

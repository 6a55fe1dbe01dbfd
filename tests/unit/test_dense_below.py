"""`dense_below`: short sequences attend to all keys up to the query, as plain torch says, with every gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import nsagen
from nsagen.api import compiled_of, read
from nsagen.errors import InputError, SpecError
from nsagen.render.module import kernel_keys
from nsagen.spec import json_schema, parse_spec
from nsagen.tools.explain import summary
from nsagen.tools.new import TEXT

T, HQ, HKV = 21, 6, 2
BRANCHES = {
    "compressed": {"block": 8, "stride": 4, "pool": "mlp"},
    "selected": {"block": 8, "top_n": 2, "initial": 1, "local": 1},
    "window": {"size": 5},
}


def spec_of(combine: str, kv: str, v_dim: int = 16, **more: Any) -> dict[str, Any]:
    branches = {"window": BRANCHES["window"]} if combine == "single" else BRANCHES
    heads = {"query": HQ, "kv": HKV, "qk_dim": 24, "v_dim": v_dim}
    return {"name": "short", "heads": heads, "kv": kv, "branches": branches, "combine": combine, **more}


def inputs_of(spec: dict[str, Any], dtype: torch.dtype = torch.float64, length: int = T) -> dict[str, Any]:
    torch.manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(2, length, *shape, dtype=dtype).requires_grad_()

    qk, v = spec["heads"]["qk_dim"], spec["heads"]["v_dim"]
    names = spec["branches"] if spec["kv"] == "per_branch" else [""]
    found = {"q": new(HQ, qk), "k": {b: new(HKV, qk) for b in names}, "v": {b: new(HKV, v) for b in names}}
    if spec["kv"] == "shared":
        found |= {side: found[side][""] for side in ("k", "v")}
    gates = torch.rand(2, length, HQ, len(spec["branches"]), dtype=dtype).requires_grad_()
    return found | {"gates": gates if spec["combine"] == "gated_sum" else None}


def leaves_of(x: dict[str, Any]) -> list[Tensor]:
    pairs = [x[side].values() if isinstance(x[side], dict) else [x[side]] for side in ("k", "v")]
    return [y for y in (x["q"], *pairs[0], *pairs[1], x["gates"]) if y is not None]


def dense(q: Tensor, ks: list[Tensor], vs: list[Tensor]) -> Tensor:
    """One causal softmax over the keys of all pairs, written out."""
    group = q.shape[2] // ks[0].shape[2]
    k, v = (torch.cat([x.repeat_interleave(group, 2) for x in xs], 1) for xs in (ks, vs))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    late = torch.arange(q.shape[1])[None].repeat(1, len(ks)) > torch.arange(q.shape[1])[:, None]
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(late, -math.inf).softmax(-1), v)


def expected(spec: dict[str, Any], x: dict[str, Any]) -> Tensor:
    names = list(spec["branches"])
    ks, vs = ([x[side][b] if isinstance(x[side], dict) else x[side] for b in names] for side in ("k", "v"))
    if x["gates"] is None:
        count = len(names) if spec["kv"] == "per_branch" else 1
        return dense(x["q"], ks[:count], vs[:count])
    terms = [dense(x["q"], [k], [v]) * x["gates"][..., i : i + 1] for i, (k, v) in enumerate(zip(ks, vs, strict=True))]
    return torch.stack(terms).sum(0)


def call(spec: dict[str, Any], x: dict[str, Any], **options: Any) -> Tensor:
    nsa = nsagen.load(spec)
    phi = nsa.Compressor(dtype=x["q"].dtype) if hasattr(nsa, "Compressor") else None
    return nsa.attention(x["q"], x["k"], x["v"], x["gates"], phi, **options)


@pytest.mark.parametrize("v_dim", [16, 24])
@pytest.mark.parametrize("kv", ["shared", "per_branch"])
@pytest.mark.parametrize("combine", ["gated_sum", "one_softmax", "single"])
def test_forward_and_gradients_are_plain_torch_s(combine: str, kv: str, v_dim: int):
    spec = spec_of(combine, kv, v_dim)
    x = inputs_of(spec)
    out, want = call(spec, x, dense_below=T + 1), expected(spec, x)
    torch.testing.assert_close(out, want)
    d_out = torch.randn_like(want)
    ours, theirs = (torch.autograd.grad(o, leaves_of(x), d_out) for o in (out, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv", ["shared", "per_branch"])
@pytest.mark.parametrize("v_dim", [16, 24])
def test_other_dtypes(dtype: torch.dtype, kv: str, v_dim: int):
    spec = spec_of("gated_sum", kv, v_dim)
    x = inputs_of(spec, dtype)
    out = call(spec, x, dense_below=1000)
    assert out.dtype == dtype
    exact = {n: {b: y.double() for b, y in s.items()} if isinstance(s, dict) else s.double() for n, s in x.items()}
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected(spec, exact), rtol=close, atol=close)


def test_from_that_length_on_it_is_sparse():
    spec = spec_of("gated_sum", "shared")
    x = inputs_of(spec)
    sparse = call(spec, x)
    assert not torch.allclose(sparse, expected(spec, x))
    assert torch.equal(call(spec, inputs_of(spec), dense_below=T), call(spec, inputs_of(spec)))


def test_phi_is_not_called_and_gets_no_gradient():
    spec = spec_of("gated_sum", "per_branch")
    nsa, x = nsagen.load(spec), inputs_of(spec)

    def phi(*arguments: Any, **options: Any) -> None:
        raise AssertionError("called")

    nsa.attention(x["q"], x["k"], x["v"], x["gates"], phi, dense_below=1000).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves_of(x))


def test_a_caller_s_lists_are_checked_and_not_used():
    selected = {"selected": {"block": 8, "top_n": 3, "from": "caller"}}
    spec = spec_of("single", "shared") | {"branches": selected}
    x = inputs_of(spec)
    lists = torch.full((2, T, HKV, 3), -1, dtype=torch.int32)
    torch.testing.assert_close(call(spec, x, dense_below=1000, blocks=lists), expected(spec, x))
    with pytest.raises(InputError, match="blocks is required"):
        call(spec, x, dense_below=1000)


def test_the_spec_s_number_is_the_default_of_the_call():
    spec = spec_of("single", "shared", dense_below=T + 1)
    nsa, x = nsagen.load(spec), inputs_of(spec)
    assert nsa.SPEC["dense_below"] == T + 1
    torch.testing.assert_close(call(spec, x), expected(spec, x))
    torch.testing.assert_close(call(spec, x, dense_below=0), call(spec_of("single", "shared"), x))
    assert nsagen.load(spec_of("single", "shared")).SPEC["dense_below"] == 0


def test_packed_sequences_need_a_zero():
    spec = spec_of("single", "shared", dense_below=64)
    x = {name: y if y is None else y[:1] for name, y in inputs_of(spec).items()}
    cu = torch.tensor([0, 5, T], dtype=torch.int32)
    with pytest.raises(InputError, match=r"dense_below must be 0 with cu_seqlens .* got 64: pass dense_below=0"):
        call(spec, x, cu_seqlens=cu)
    assert call(spec, x, cu_seqlens=cu, dense_below=0).shape == (1, T, HQ, 16)


@pytest.mark.parametrize("wrong", [-1, True, 2.0, "8", None])
def test_a_call_with_no_number_of_tokens(wrong: Any):
    spec = spec_of("single", "shared")
    with pytest.raises(InputError, match="dense_below must be an integer of 0 or more"):
        call(spec, inputs_of(spec), dense_below=wrong)


@pytest.mark.parametrize(
    ("value", "text"),
    [("-1", "dense_below -1 is below 0"), ("true", "must be an integer, not true"), ("2.5", "must be an integer"),
     ('"64"', "must be an integer"), ("99999999", "is above 16777216")],
)  # fmt: skip
def test_a_spec_with_no_number_of_tokens(value: str, text: str):
    lines = "name: a\nheads: {query: 4, kv: 2, qk_dim: 16}\nbranches: {window: {size: 8}}\n"
    assert parse_spec(f"{lines}dense_below: 4096\n").dense_below == 4096
    with pytest.raises(SpecError) as caught:
        parse_spec(f"{lines}dense_below: {value}\n", "a.yaml")
    (diagnostic,) = caught.value.diagnostics
    assert text in diagnostic.message
    assert diagnostic.span is not None and diagnostic.span.line == 4


def test_where_it_is_said():
    short, none = (compiled_of(read(spec_of("gated_sum", "shared", dense_below=n))) for n in (4096, 0))
    assert "below 4096 tokens (dense_below)" in summary(short)
    assert "(dense_below)" not in summary(none)
    assert "dense    below 4096 tokens" in short.source
    assert json_schema()["properties"]["dense_below"]["minimum"] == 0
    assert parse_spec(TEXT.format(name="a").replace("# dense_below", "dense_below")).dense_below == 6144
    ours, others = (kernel_keys(c.plan) for c in (short, none))
    assert ours == others  # what was measured of one counts for the other

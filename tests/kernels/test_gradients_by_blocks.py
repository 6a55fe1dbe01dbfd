"""Gradients of a selected branch key block by key block, by kernels whose warp copies; on Hopper, beside the others."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from harness import caller_lists, needs_hopper
from strategies import make_inputs
from torch import Tensor

import nsagen
from nsagen import api
from nsagen.ir.plan import SPECIALISED
from nsagen.runtime import launch, lists

HEADS = {
    "group of 16": {"query": 32, "kv": 2, "qk_dim": 128, "v_dim": 128},
    "group of 32": {"query": 64, "kv": 2, "qk_dim": 64, "v_dim": 128},
    "wide keys": {"query": 16, "kv": 1, "qk_dim": 128, "v_dim": 64},
    "small heads": {"query": 48, "kv": 3, "qk_dim": 64, "v_dim": 64},
}
LENGTHS = (1, 5, 63, 64, 129, 700, 1500)


def spec_of(heads: str) -> dict[str, Any]:
    branches = {"selected": {"block": 64, "top_n": 6, "from": "caller"}}
    return {"name": "gradients", "heads": HEADS[heads], "kv": "shared", "branches": branches, "combine": "single"}


def module_of(heads: str) -> Any:
    return api.module_of(api.compiled_of(api.read(spec_of(heads))))


def case(heads: str, length: int, dtype: torch.dtype, device: str, batch: int = 2) -> tuple[Tensor, ...]:
    """q, k, v as rows of wider tensors, lists with gaps at their end, d_out."""
    spec = spec_of(heads)
    inputs = make_inputs(spec, batch, length, dtype, device, length, True)
    listed = caller_lists(spec, inputs, length, None)
    assert listed is not None and isinstance(inputs.k, Tensor) and isinstance(inputs.v, Tensor)
    g = torch.Generator().manual_seed(length)
    d_out = torch.randn(batch, length, spec["heads"]["query"], spec["heads"]["v_dim"], generator=g).to(device, dtype)
    return inputs.q.detach(), inputs.k.detach(), inputs.v.detach(), listed, d_out


def gradients(module: Any, given: tuple[Tensor, ...], by_blocks: bool, into: Any = None) -> list[Tensor]:
    """dq, dk, dv of the branch by its host function; the plain form where not by_blocks."""
    q, k, v, listed, d_out = given
    scale = q.shape[-1] ** -0.5
    with pytest.MonkeyPatch.context() as patch:
        if not by_blocks:
            patch.setattr(launch, "specialises", lambda *_: False)
        out, lse = module._selected_forward(q, k, v, listed, None, scale)[:2]
        delta = (out.float() * d_out.float()).sum(-1)
        into = into or (None, None, None)
        return list(module._selected_backward(q, k, v, listed, d_out, lse, delta, into, None, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
def test_the_same_as_without(heads: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_hopper()
    module = module_of(heads)
    launches = api.compiled_of(api.read(spec_of(heads))).plan.launches("selected_grads")
    assert launches and all(SPECIALISED in x.when for x in launches)
    monkeypatch.setattr(launch, "POISON", True)
    for length in LENGTHS:
        given = case(heads, length, dtype, device)
        want, got, again = (gradients(module, given, by_blocks) for by_blocks in (False, True, True))
        for name, a, b, c in zip(("dq", "dk", "dv"), got, want, again, strict=True):
            assert oracle.error(a.float(), b.float()) < 6e-3, (length, name)
            assert torch.equal(a, c), (length, name)


@pytest.mark.parametrize("heads", HEADS)
def test_near_the_oracle(heads: str, device: str) -> None:
    needs_hopper()
    module, (q, k, v, listed, d_out) = module_of(heads), case(heads, 300, torch.bfloat16, device, 1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    module_out = module.attention(*leaves, blocks=listed)
    got = torch.autograd.grad(module_out, leaves, d_out)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out = oracle.attention(spec_of(heads), *exact, None, blocks=listed)
    for a, b in zip(got, oracle.gradients(out, exact, d_out.double()), strict=True):
        assert oracle.error(a.double(), b) < 1e-2


def test_chunks_of_queries_and_pairs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 128 queries of one KV head at a time, of two, and of all."""
    needs_hopper()
    module, given = module_of("group of 16"), case("group of 16", 900, torch.bfloat16, device)
    monkeypatch.setattr(launch, "POISON", True)
    whole = gradients(module, given, True)
    row = 2 * 16 * 6 * 128
    for most in (1, 3 * 128 * row, 900 * row):
        monkeypatch.setattr(lists, "PART_BYTES", most)
        got = gradients(module, given, True)
        for a, b in zip(got, whole, strict=True):
            assert oracle.error(a.float(), b.float()) < 3e-3, most


def test_added_to_what_is_there(device: str) -> None:
    needs_hopper()
    module, given = module_of("small heads"), case("small heads", 200, torch.bfloat16, device)
    alone = gradients(module, given, True)
    into = tuple(torch.full_like(x, 3.0) for x in alone)
    for a, b in zip(gradients(module, given, True, into), alone, strict=True):
        torch.testing.assert_close(a.float(), b.float() + 3.0, rtol=2e-2, atol=2e-2)


def test_blocks_that_are_not_there(device: str) -> None:
    """A list may name blocks past the sequence, and a hot block has several items."""
    needs_hopper()
    module, (q, k, v, listed, d_out) = module_of("group of 32"), case("group of 32", 1500, torch.bfloat16, device, 1)
    listed = listed.clone()
    listed[..., 0] = 0
    listed[:, ::3, :, 3:] = 2**31 - 1
    want, got = (gradients(module, (q, k, v, listed, d_out), x) for x in (False, True))
    for a, b in zip(got, want, strict=True):
        assert oracle.error(a.float(), b.float()) < 6e-3


def test_rows_whose_gate_is_zero(device: str) -> None:
    """Their shift is +inf: no part of any gradient, and no NaN."""
    needs_hopper()
    module, (q, k, v, listed, d_out) = module_of("group of 16"), case("group of 16", 300, torch.bfloat16, device)
    scale = q.shape[-1] ** -0.5
    out, lse = module._selected_forward(q, k, v, listed, None, scale)[:2]
    lse[:, ::2] = float("inf")
    delta = (out.float() * d_out.float()).sum(-1)
    dq, dk, dv = module._selected_backward(q, k, v, listed, d_out, lse, delta, (None,) * 3, None, scale)
    assert not dq[:, ::2].any()
    assert all(x.isfinite().all() and x.any() for x in (dq, dk, dv))


def test_calls_that_cannot_have_it(device: str) -> None:
    x = torch.randn(1, 8, 16, 64, device=device, dtype=torch.bfloat16)
    hopper = torch.cuda.is_available() and launch.chip(0).arch == "sm_90"
    assert launch.specialises(None, x) == hopper
    assert not launch.specialises(torch.tensor([0, 8], device=device, dtype=torch.int32), x)
    assert not launch.specialises(None, x.float())
    assert not launch.specialises(None, x[..., 1:])


@pytest.mark.parametrize(("group", "dim", "leaves"), [(16, 128, 0), (32, 64, 0), (32, 64, 2)])
def test_sums_of_parts_as_threads_hold_them(group: int, dim: int, leaves: int, device: str) -> None:
    """The layout of hopper.put_part, written out, and the way back to rows; −1 and blocks past the end are left out.

    And the last blocks up to a query's own, where they are another branch's: here those of queries from 128 on.
    """
    spec = spec_of("group of 16") | {"heads": {"query": 2 * group, "kv": 2, "qk_dim": dim, "v_dim": 128}}
    module = nsagen.load(spec | {"name": f"gradients_{group}_{dim}"})
    tokens, count, slots, first = 5, 6, 3, 128 if leaves else 0
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(2, tokens, count, group, dim, generator=g)
    lists_ = torch.tensor([0, 1, 2, 7, -1, -1], dtype=torch.int32).expand(1, first + tokens, 2, count).contiguous()
    #  row = 16·w + 8·half + r, column = 32·i + 8·c + 2·j + e
    held = rows.reshape(2, tokens, count, group // 16, 2, 8, dim // 32, 4, 4, 2).permute(0, 1, 2, 3, 4, 6, 5, 8, 7, 9)
    before = torch.randn(1, first + tokens, 2 * group, dim, generator=g)
    dq = before.clone().to(device)
    c = launch.pick(module._CONFIGS["selected_dq_sum"], dq)
    parts = held.contiguous().to(device)
    module.selected_dq_sum[(tokens * 2,)](
        parts, lists_.to(device), dq, first + tokens, slots, 0, 2, first, tokens, leaves, True, **c.options
    )
    want = before.clone()
    want[:, first:] += rows[:, :, : 3 - leaves].sum(2).permute(1, 0, 2, 3).reshape(1, tokens, 2 * group, dim)
    torch.testing.assert_close(dq.cpu(), want, rtol=1e-5, atol=1e-5)

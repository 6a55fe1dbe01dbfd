"""A selected branch key block by key block: parts of the result in the queries' lists, and their merge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import by_blocks, caller_lists, check, cu_of
from strategies import make_inputs

import nsagen
from nsagen.runtime import lists

SELECTED = {"block": 8, "top_n": 3, "initial": 1, "local": 1}
HEADS = {"query": 6, "kv": 2, "qk_dim": 24, "v_dim": 16}  # groups of 3: rows of a tile are left over
GATED = {
    "name": "by_blocks_gated",
    "heads": HEADS,
    "kv": "shared",
    "branches": {"compressed": {"block": 8, "stride": 4, "pool": "mean"}, "selected": SELECTED, "window": {"size": 9}},
    "combine": "gated_sum",
}
ALONE = {
    "name": "by_blocks_alone",
    "heads": HEADS,
    "kv": "per_branch",
    "branches": {"selected": {"block": 24, "top_n": 3, "from": "caller"}},
    "combine": "single",
}
ONE_HEAD = {**ALONE, "name": "by_blocks_one_head", "heads": {"query": 2, "kv": 2, "qk_dim": 16, "v_dim": 40}}


@pytest.fixture(autouse=True)
def _by_blocks() -> Iterator[None]:
    with by_blocks():
        yield


def with_name(spec: dict[str, Any], name: str) -> dict[str, Any]:
    return {**spec, "name": f"{spec['name']}_{name}"}


@pytest.mark.parametrize("spec", [GATED, ALONE, ONE_HEAD], ids=lambda s: s["name"])
def test_whole(spec: dict[str, Any], device: str) -> None:
    module = nsagen.load(with_name(spec, "a"))
    assert hasattr(module, "_selected_by_blocks")
    assert "dq_parts" in module._selected_backward.__code__.co_varnames
    check(with_name(spec, "a"), 2, 29, 1, device, module=module)


@pytest.mark.parametrize("spec", [GATED, ALONE], ids=lambda s: s["name"])
def test_packed(spec: dict[str, Any], device: str) -> None:
    check(with_name(spec, "b"), 1, 44, 2, device, [0, 5, 5, 17, 18, 43], strided=True)


@pytest.mark.parametrize(("ends", "last"), [(None, False), ([0, 100, 101, 150], True)], ids=["first", "packed_adds"])
def test_chunks_of_queries(ends: list[int] | None, last: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 128 queries at a time; dk and dv add up over the chunks, before or after what the window adds."""
    monkeypatch.setattr(lists, "PART_BYTES", 1)
    check(two_branches("c", last), 1 if ends else 2, 150, 3, device, ends)


def two_branches(name: str, last: bool) -> dict[str, Any]:
    branches = {"selected": {**SELECTED, "from": "caller"}, "window": {"size": 5}}
    order = reversed(branches) if last else branches
    spec = {**with_name(GATED, f"{name}{int(last)}"), "heads": {"query": 2, "kv": 1, "qk_dim": 16, "v_dim": 16}}
    return {**spec, "branches": {key: branches[key] for key in order}}


@pytest.mark.parametrize("last", [False, True], ids=["first", "adds"])
def test_chunks_of_queries_in_half_precision(last: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over chunks are in float32; rows behind the last sequence get no gradient."""
    spec, ends = two_branches("h", last), [0, 100, 101, 140]
    module = nsagen.load(spec)
    inputs = make_inputs(spec, 1, 150, torch.float16, device, 8, False)
    listed = caller_lists(spec, inputs, 8, ends)
    found: list[tuple[torch.Tensor, ...]] = []
    for part_bytes in (1, 1 << 31):
        monkeypatch.setattr(lists, "PART_BYTES", part_bytes)
        q, k, v, gates = inputs
        out = module.attention(q, k, v, gates, blocks=listed, cu_seqlens=cu_of(ends, device))
        found.append(torch.autograd.grad(out, inputs.leaves, torch.ones_like(out)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-3, atol=5e-3)
        assert not one[:, 140:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_tile_past_its_block_under_a_low_lse(dtype: torch.dtype, device: str) -> None:
    """Blocks of 24 keys in tiles of 32: the 8 rows behind are 0, and must not count however low all scores are."""
    module = nsagen.load(with_name(ALONE, "g"))
    low = 3.0 if dtype == torch.float16 else 22.0
    q, k, v = (torch.rand(1, 48, heads, dim, device=device).to(dtype) for heads, dim in ((6, 24), (2, 24), (2, 16)))
    q, k = (q + low).requires_grad_(), (-k - low).requires_grad_()
    listed = torch.tensor([0, 1, -1], dtype=torch.int32, device=device).expand(1, 48, 2, 3).contiguous()
    out = module.attention(q, {"selected": k}, {"selected": v}, blocks=listed)
    dq, dk = torch.autograd.grad(out, (q, k), torch.ones_like(out))
    assert out.isfinite().all()
    assert dk.isfinite().all()
    assert dq.isfinite().all()


def test_the_first_tokens(device: str) -> None:
    check(with_name(ALONE, "d"), 1, 1, 4, device)


@pytest.mark.parametrize("past", [7, 2**31 - 1])
def test_a_block_past_the_sequence_gives_nothing(past: int, device: str) -> None:
    """A caller's list may name blocks that are not there: as query by query, they hold no key."""
    module = nsagen.load(with_name(ONE_HEAD, "e"))
    q, k = (torch.randn(1, 30, 2, 16, device=device) for _ in range(2))
    v = torch.randn(1, 30, 2, 40, device=device)
    some = torch.tensor([0, -1, -1], dtype=torch.int32, device=device).expand(1, 30, 2, 3).contiguous()
    more = some.clone()
    more[..., 1] = past
    q.requires_grad_()
    (out, lse), (out_more, lse_more) = (module.selected_attention(q, k, v, blocks) for blocks in (some, more))
    assert torch.equal(out, out_more)
    assert torch.equal(lse, lse_more)
    (dq,), (dq_more,) = (torch.autograd.grad(x.square().sum(), q) for x in (out, out_more))
    assert torch.equal(dq, dq_more)


def test_two_runs_give_the_same_bits(device: str) -> None:
    module = nsagen.load(with_name(ALONE, "f"))
    tensors = [torch.randn(1, 30, heads, dim, device=device) for heads, dim in ((6, 24), (2, 24), (2, 16))]
    listed = torch.arange(3, dtype=torch.int32, device=device).expand(1, 30, 2, 3).contiguous()

    def run() -> tuple[torch.Tensor, ...]:
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        out = module.attention(q, {"selected": k}, {"selected": v}, blocks=listed)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)

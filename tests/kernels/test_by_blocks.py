"""A selected branch key block by key block: parts of the result in the queries' lists, and their merge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import by_blocks, check

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
    check(with_name(spec, "a"), 2, 41, 1, device, module=module)


@pytest.mark.parametrize("spec", [GATED, ALONE], ids=lambda s: s["name"])
def test_packed(spec: dict[str, Any], device: str) -> None:
    check(with_name(spec, "b"), 1, 44, 2, device, [0, 5, 5, 17, 18, 43], strided=True)


@pytest.mark.parametrize("ends", [None, [0, 100, 101, 150]], ids=["one", "packed"])
def test_chunks_of_queries(ends: list[int] | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 128 queries at a time; dk and dv add up over the chunks, beside what the window adds."""
    monkeypatch.setattr(lists, "PART_BYTES", 1)
    spec = {**with_name(GATED, "c"), "heads": {"query": 2, "kv": 1, "qk_dim": 16, "v_dim": 16}}
    spec["branches"] = {"selected": {**SELECTED, "from": "caller"}, "window": {"size": 5}}
    check(spec, 1 if ends else 2, 150, 3, device, ends)


def test_the_first_tokens(device: str) -> None:
    check(with_name(ALONE, "d"), 1, 1, 4, device)


def test_a_block_past_the_sequence_gives_nothing(device: str) -> None:
    """A caller's list may name blocks that are not there: as query by query, they hold no key."""
    module = nsagen.load(with_name(ONE_HEAD, "e"))
    q, k = (torch.randn(1, 30, 2, 16, device=device) for _ in range(2))
    v = torch.randn(1, 30, 2, 40, device=device)
    some = torch.tensor([0, -1, -1], dtype=torch.int32, device=device).expand(1, 30, 2, 3).contiguous()
    more = some.clone()
    more[..., 1] = 7
    out, lse = module.selected_attention(q, k, v, some)
    out_more, lse_more = module.selected_attention(q, k, v, more)
    assert torch.equal(out, out_more)
    assert torch.equal(lse, lse_more)


def test_two_runs_give_the_same_bits(device: str) -> None:
    module = nsagen.load(with_name(ALONE, "f"))
    tensors = [torch.randn(1, 60, heads, dim, device=device) for heads, dim in ((6, 24), (2, 24), (2, 16))]
    listed = torch.arange(3, dtype=torch.int32, device=device).expand(1, 60, 2, 3).contiguous()

    def run() -> tuple[torch.Tensor, ...]:
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        out = module.attention(q, {"selected": k}, {"selected": v}, blocks=listed)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)

"""dq, dk and dv by kernels whose warp copies: beside those without, on Hopper; elsewhere there are none."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from harness import needs_hopper
from torch import Tensor

from nsagen import api
from nsagen.compiler import Compiled
from nsagen.ir.plan import PLAIN, SPECIALISED, Guard
from nsagen.runtime import launch

HEADS = {
    "group of 16": {"query": 32, "kv": 2, "qk_dim": 128, "v_dim": 128},
    "group of 1": {"query": 3, "kv": 3, "qk_dim": 64, "v_dim": 64},
    "group of 4": {"query": 8, "kv": 2, "qk_dim": 128, "v_dim": 64},
    "group of 64": {"query": 64, "kv": 1, "qk_dim": 64, "v_dim": 128},
    "the paper's": {"query": 32, "kv": 2, "qk_dim": 192, "v_dim": 128},
    "group of 12, parts": {"query": 12, "kv": 1, "qk_dim": 72, "v_dim": 40},
}
BRANCHES = {
    "compressed": {"block": 32, "stride": 16, "pool": "mean"},
    "window": {"size": 100},
}
LENGTHS = (1, 47, 48, 63, 129, 700, 2300)


def compiled(heads: str) -> Compiled:
    spec = {"name": "keys", "heads": HEADS[heads], "kv": "shared", "branches": BRANCHES, "combine": "gated_sum"}
    return api.compiled_of(api.read(spec))


def module_of(heads: str) -> Any:
    return api.module_of(compiled(heads))


def guards(heads: str, kernel: str) -> set[tuple[Guard, ...]]:
    """Of all launches of the kernel."""
    return {x.when for x in compiled(heads).plan.launches(kernel)}


def case(heads: str, branch: str, length: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...] | None:
    """q, k, v as rows of wider tensors and d_out; None before the first block."""
    h, keys = HEADS[heads], max(0, length - 16) // 16 if branch == "compressed" else length
    g = torch.Generator().manual_seed(length)
    shapes = ((length, h["query"], h["qk_dim"]), (keys, h["kv"], h["qk_dim"]), (keys, h["kv"], h["v_dim"]))
    wide = (torch.randn(2, *shape[:2], shape[2] + 8, generator=g).to(device, dtype) for shape in shapes)
    q, k, v = (x[..., : shape[2]] for x, shape in zip(wide, shapes, strict=True))
    d_out = torch.randn(2, length, h["query"], h["v_dim"], generator=g).to(device, dtype)
    return (q, k, v, d_out) if keys else None


def gradients(module: Any, branch: str, given: tuple[Tensor, ...], copied: bool, into: Any = None) -> list[Tensor]:
    """dq, dk, dv of the branch by its host function."""
    q, k, v, d_out = given
    scale = q.shape[-1] ** -0.5
    with pytest.MonkeyPatch.context() as patch:
        if not copied:
            patch.setattr(launch, "specialises", lambda *_: False)
        out, lse = getattr(module, f"_{branch}_forward")(q, k, v, None, scale)[:2]
        delta = (out.float() * d_out.float()).sum(-1)
        backward = getattr(module, f"_{branch}_backward")
        return list(backward(q, k, v, d_out, lse, delta, into or (None, None, None), None, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("heads", HEADS)
def test_the_same_as_without(
    heads: str, branch: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_hopper()
    module = module_of(heads)
    keys = HEADS[heads]["qk_dim"] % 64 == 0
    assert guards(heads, f"{branch}_queries") == {(SPECIALISED,)} and guards(heads, f"{branch}_dq") == {(PLAIN,)}
    assert (f"{branch}_keys" in module._CONFIGS) == keys
    assert guards(heads, f"{branch}_dkv") == {(PLAIN,) if keys else ()}
    monkeypatch.setattr(launch, "POISON", True)
    for length in LENGTHS:
        given = case(heads, branch, length, dtype, device)
        if given is None:
            continue
        want, got, again = (gradients(module, branch, given, copied) for copied in (False, True, True))
        largest = max(float(x.float().norm()) for x in want)  # where queries see one key, dk is rounding alone
        for name, a, b, c in zip(("dq", "dk", "dv"), got, want, again, strict=True):
            assert oracle.error(a.float(), b.float(), largest) < 4e-3, (length, name)
            assert torch.equal(a, c), (length, name)


@pytest.mark.parametrize("branch", BRANCHES)
def test_added_to_what_is_there(branch: str, device: str) -> None:
    needs_hopper()
    module, given = module_of("group of 4"), case("group of 4", branch, 300, torch.bfloat16, device)
    assert given is not None
    alone = gradients(module, branch, given, True)
    into = tuple(torch.full_like(x, 3.0) for x in alone)
    for a, b in zip(gradients(module, branch, given, True, into), alone, strict=True):
        torch.testing.assert_close(a.float(), b.float() + 3.0, rtol=2e-2, atol=2e-2)


def test_a_batch_entry_does_not_see_the_next(device: str) -> None:
    """Boxes end with the entry: what lies behind its last query, and behind its last key, counts for nothing."""
    needs_hopper()
    module, given = module_of("group of 16"), case("group of 16", "window", 70, torch.bfloat16, device)
    assert given is not None
    alone = gradients(module, "window", tuple(x[:1] for x in given), True)
    both = gradients(module, "window", given, True)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, both, strict=True))


def test_rows_whose_gate_is_zero(device: str) -> None:
    """Their shift is +inf: they leave nothing, and no NaN."""
    needs_hopper()
    module, given = module_of("group of 16"), case("group of 16", "window", 300, torch.bfloat16, device)
    assert given is not None
    q, k, v, d_out = given
    out, lse = module._window_forward(q, k, v, None, 0.1)[:2]
    lse[:, ::2] = float("inf")
    delta = (out.float() * d_out.float()).sum(-1)
    dq, dk, dv = module._window_backward(q, k, v, d_out, lse, delta, (None, None, None), None, 0.1)
    assert all(x.isfinite().all() and x.any() for x in (dq, dk, dv))
    assert not dq[:, ::2].any()

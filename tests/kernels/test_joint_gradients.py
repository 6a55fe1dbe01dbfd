"""Kernels whose warp copies and that serve several branches: the whole op's gradient, and its forward; on Hopper."""

from __future__ import annotations

import inspect
from typing import Any

import oracle
import pytest
import torch
from harness import needs_hopper
from torch import Tensor

from nsagen import api
from nsagen.runtime import hopper, launch

SPEC = {
    "heads": {"query": 32, "kv": 2, "qk_dim": 128, "v_dim": 128},
    "kv": "shared",
    "branches": {
        "compressed": {"block": 32, "stride": 16, "pool": "mean"},
        "selected": {"block": 64, "top_n": 6, "initial": 1, "local": 2, "from": "compressed"},
        "window": {"size": 220},
    },
    "combine": "gated_sum",
}
CASES: dict[str, dict[str, Any]] = {
    "takes": {},
    "takes, group of 32": {"heads": {"query": 32, "kv": 1, "qk_dim": 64, "v_dim": 128}},
    "takes, three local": {"selected": {"local": 3}, "window": {"size": 512}},
    "takes, one local": {"selected": {"local": 1}, "window": {"size": 150}},
    "own keys": {"kv": "per_branch"},
    "the paper's": {"kv": "per_branch", "heads": {"query": 32, "kv": 2, "qk_dim": 192, "v_dim": 128}},
    "group of 4": {"heads": {"query": 8, "kv": 2, "qk_dim": 128, "v_dim": 128}},
    "group of 12": {"heads": {"query": 12, "kv": 1, "qk_dim": 72, "v_dim": 40}},
    "none selected": {"selected": None},
}
LENGTHS = (20, 33, 63, 64, 65, 127, 129, 200, 257, 700, 1500)  # the first before any compressed key


def module_of(case: str) -> Any:
    change = CASES[case]
    branches = {b: {**o, **(change.get(b, {}))} for b, o in SPEC["branches"].items() if change.get(b, {}) is not None}
    spec = {"name": "joint", **SPEC, **{x: y for x, y in change.items() if x in ("kv", "heads")}, "branches": branches}
    return api.module_of(api.compiled_of(api.read(spec)))


def inputs(module: Any, length: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """q, k, v, gates, some of them 0, and d_out, of two batch entries; keys by branch where they are."""
    heads, branches = module.SPEC["heads"], module.SPEC["branches"]
    g = torch.Generator().manual_seed(length)

    def rows(count: int, dim: int) -> Tensor:
        return torch.randn(2, length, count, dim, generator=g).to(device, dtype).requires_grad_()

    def keys(dim: int) -> Any:
        shared = module.SPEC["kv"] == "shared"
        return rows(heads["kv"], dim) if shared else {b: rows(heads["kv"], dim) for b in branches}

    gates = torch.rand(2, length, heads["query"], len(branches), generator=g)
    gates[:, ::3, :, -1] = gates[:, ::5, :, -2] = 0.0
    found = {"q": rows(heads["query"], heads["qk_dim"]), "k": keys(heads["qk_dim"]), "v": keys(heads["v_dim"])}
    found |= {"gates": gates.to(device, dtype).requires_grad_()}
    return found | {"d_out": torch.randn(2, length, heads["query"], heads["v_dim"], generator=g).to(device, dtype)}


def leaves(given: dict[str, Any]) -> list[Tensor]:
    nested = [x if isinstance(x, Tensor) else list(x.values()) for n, x in given.items() if n != "d_out"]
    return [x for some in nested for x in (some if isinstance(some, list) else [some])]


def gradients(module: Any, given: dict[str, Any], recompute: bool = False) -> list[Tensor]:
    out = module.attention(given["q"], given["k"], given["v"], given["gates"], module.Compressor(), recompute=recompute)
    return list(torch.autograd.grad(out, leaves(given), given["d_out"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_the_same_as_without(case: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_hopper()
    module, joints = module_of(case), list[bool]()
    assert ("takes" in case) == ("taken" in inspect.signature(module._window_backward).parameters)
    joint = module._joint_queries
    monkeypatch.setattr(module, "_joint_queries", lambda *x: joints.append((y := joint(*x)) is not None) or y)
    monkeypatch.setattr(launch, "POISON", True)
    for length in LENGTHS:
        given = inputs(module, length, dtype, device)
        got, again, lean = (gradients(module, given, recompute) for recompute in (False, False, True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hopper, "shares", lambda *_: 1)  # as where there are many tiles
            alone = gradients(module, given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "PLAIN", True)
            want = gradients(module, given)
        largest = max(float(x.float().norm()) for x in want)
        for number, (a, b, c, *others) in enumerate(zip(got, want, again, lean, alone, strict=True)):
            assert torch.equal(a, c), (length, number)
            for x in (a, *others):
                assert oracle.error(x.float(), b.float(), largest) < 5e-3, (length, number)
    forms = [length >= 32 for length in LENGTHS]
    assert joints == [x for form in forms for x in (form, form, form, False)]


def test_keys_taken_over_are_the_local_blocks(device: str) -> None:
    """dk of a key that only the selected branch's gate lets through, beside float64."""
    needs_hopper()
    module, length = module_of("takes"), 300
    given = inputs(module, length, torch.bfloat16, device)
    gates = torch.zeros_like(given["gates"])
    gates[..., 1] = 1.0
    given["gates"] = gates.requires_grad_()
    got = gradients(module, given)
    doubles = {n: x.detach().double().requires_grad_(n != "d_out") for n, x in given.items()}
    want = gradients(module, doubles)
    for a, b in zip(got[:3], want[:3], strict=True):
        assert oracle.error(a.double(), b) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_the_forward_is_the_same_where_the_window_has_the_local_blocks(
    case: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_hopper()
    module = module_of(case)
    assert ("takes" in case) == hasattr(module, "_window_completes")
    if "takes" not in case:
        return
    monkeypatch.setattr(launch, "POISON", True)
    for length in LENGTHS:
        given = inputs(module, length, dtype, device)
        (got, leaves_), (again, _) = forward(module, given), forward(module, given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_window_completes", lambda *_: 0)
            want, none = forward(module, given)
        assert none == 0 and leaves_ == module.SPEC["branches"]["selected"]["local"]
        for name, a in got.items():
            assert torch.equal(a, again[name]), (length, name)
            finite = torch.isfinite(a)  # lse of a row without compressed keys is not
            assert torch.equal(finite, torch.isfinite(want[name])), (length, name)
            assert oracle.error(a.float()[finite], want[name].float()[finite]) < 4e-3, (length, name)


def forward(module: Any, given: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """What the whole op gives, by name, and how many blocks the selected branch left."""
    told = list[int]()
    completes = module._window_completes
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "_window_completes", lambda *x: told.append(completes(*x)) or told[-1])
        q, k, v, gates = (given[x] for x in ("q", "k", "v", "gates"))
        found = module._attention(q, *module.Compressor()(k, v), k, v, gates, None, q.shape[-1] ** -0.5)
    branches = ("compressed", "selected", "window")
    names = ["out", *(f"{x}_{b}" for b in branches for x in ("out", "lse", *(["rest"] if b == "compressed" else [])))]
    return dict(zip([*names, "blocks"], found, strict=True)), told[0]


def test_a_list_without_its_last_blocks(device: str) -> None:
    """What the forward leaves to the window, to the bit."""
    spec = SPEC | {"name": "left", "heads": {"query": 16, "kv": 1, "qk_dim": 64, "v_dim": 64}}
    module = api.module_of(api.compiled_of(api.read(spec)))
    given = inputs(module, 150, torch.float32 if device == "cpu" else torch.bfloat16, device)
    q, k, v = (given[x].detach()[:1] for x in "qkv")
    own = torch.arange(150, device=device)[:, None, None] // 64
    blocks = torch.arange(6, device=device).expand(1, 150, 1, 6)
    whole = torch.where(blocks <= own, blocks, -1).int()
    far = torch.where(blocks <= own - 2, blocks, -1).int()
    got = module._selected_forward(q, k, v, whole, None, 0.1, leaves=2)
    want = module._selected_forward(q, k, v, far, None, 0.1)
    assert got[1].isneginf().any() and not got[1].isneginf().all()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)

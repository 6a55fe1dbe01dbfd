"""Input validation: what passes comes back ready for kernels, what does not gives one clear error."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen.errors import InputError
from nsagen.runtime import checks
from nsagen.runtime.checks import Layout

torch.set_num_threads(1)

B, T, HQ, HKV, DQK, DV = 2, 20, 6, 2, 16, 24
BRANCHES = ("compressed", "window")
FULL = Layout("spec", HQ, HKV, DQK, DV, BRANCHES, True, True, ("compressed", 8, 4), False)
SHARED = replace(FULL, per_branch=False)
SINGLE = replace(FULL, branches=("window",), per_branch=False, gated=False, pooled=None)
CALLER = replace(FULL, branches=("selected",), per_branch=False, gated=False, pooled=None, caller_blocks=True)


def phi(k: Tensor, v: Tensor) -> None:
    """Stands for a Compressor, which is not called here."""


def arguments(layout: Layout, batch: int = B, length: int = T, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Good arguments of `attention`."""

    def tensors(dim: int) -> Any:
        x = {name: torch.zeros(batch, length, HKV, dim, dtype=dtype) for name in layout.branches}
        return x if layout.per_branch else x[layout.branches[0]]

    return {
        "q": torch.zeros(batch, length, HQ, DQK, dtype=dtype),
        "k": tensors(DQK),
        "v": tensors(DV),
        "gates": torch.zeros(batch, length, HQ, len(layout.branches)) if layout.gated else None,
        "phi": phi if layout.pooled else None,
        "blocks": torch.zeros(batch, length, HKV, 3, dtype=torch.int32) if layout.caller_blocks else None,
        "k_raw": None,
        "scale": None,
        "cu_seqlens": None,
    }


def cu(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("layout", [FULL, SHARED, SINGLE, CALLER])
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize(("batch", "length"), [(B, T), (1, 1)])
def test_good_arguments(layout: Layout, dtype: torch.dtype, batch: int, length: int) -> None:
    given = arguments(layout, batch, length, dtype)
    got = checks.attention(layout, **given)
    assert got.q is given["q"]
    assert tuple(got.k) == tuple(got.v) == layout.branches
    for name in layout.branches:
        assert got.k[name] is (given["k"][name] if layout.per_branch else given["k"])
        assert got.v[name] is (given["v"][name] if layout.per_branch else given["v"])
    assert got.gates is given["gates"]
    assert got.scale == DQK**-0.5
    assert got.cu_seqlens is None
    assert got.k_raw is None


def test_packed_scale_and_raw_keys() -> None:
    given = arguments(SHARED, 1) | {"cu_seqlens": cu(0, 5, T), "scale": 2, "k_raw": torch.zeros(1, T, HKV, DQK)}
    got = checks.attention(SHARED, **given)
    assert (got.scale, type(got.scale)) == (2.0, float)
    assert got.cu_seqlens is given["cu_seqlens"]
    assert got.k_raw is given["k_raw"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_gates_have_a_dtype_of_their_own(dtype: torch.dtype) -> None:
    given = arguments(FULL)
    got = checks.attention(FULL, **given | {"gates": given["gates"].to(dtype)})
    assert got.gates is not None
    assert got.gates.dtype == dtype


def test_strides() -> None:
    """A strided last dim is copied, other strides stay, gates and cu_seqlens become contiguous."""
    given = arguments(SHARED, 1)
    apart = {
        "q": torch.zeros(1, T, DQK, HQ).transpose(2, 3),
        "k": torch.zeros(1, HKV, T, DQK).transpose(1, 2),
        "gates": torch.zeros(1, T, len(BRANCHES), HQ).transpose(2, 3),
        "cu_seqlens": torch.zeros(3, 2, dtype=torch.int32)[:, 0],
    }
    got = checks.attention(SHARED, **given | apart)
    assert got.q.stride(-1) == 1
    assert got.k["window"] is apart["k"]
    assert got.gates is not None
    assert got.gates.is_contiguous()
    assert got.cu_seqlens is not None
    assert got.cu_seqlens.is_contiguous()


Z = torch.zeros
BAD: list[tuple[Layout, dict[str, Any], str]] = [
    (FULL, {"q": [1.0]}, "q must be a tensor, got list"),
    (FULL, {"q": Z(T, HQ, DQK)}, "q must be [B, T, 6, 16], got [20, 6, 16]"),
    (FULL, {"q": Z(B, T, 8, DQK)}, "q must be [B, T, 6, 16], got [2, 20, 8, 16]"),
    (FULL, {"q": Z(B, 0, HQ, DQK)}, "q must have B ≥ 1 and T ≥ 1, got [2, 0, 6, 16]"),
    (FULL, {"q": Z(0, T, HQ, DQK)}, "q must have B ≥ 1 and T ≥ 1, got [0, 20, 6, 16]"),
    (FULL, {"q": Z(B, T, HQ, DQK, dtype=torch.int64)}, "float16 or float64, got torch.int64"),
    (FULL, {"k": Z(B, T, HKV, DQK)}, "k must be a mapping from branch to tensor (kv: per_branch), got Tensor"),
    (FULL, {"v": {"compressed": Z(B, T, HKV, DV)}}, "v must have exactly the keys ['compressed', 'window']"),
    (
        FULL,
        {"v": {"compressed": 0, "window": 0, "win": 0}},
        "got ['compressed', 'window', 'win']: add [], drop ['win']",
    ),
    (FULL, {"v": {"compressed": 0, "window": 0}}, "v['compressed'] must be a tensor, got int"),
    (SHARED, {"k": {"window": Z(B, T, HKV, DQK)}}, "k must be one tensor (kv: shared), got a mapping ['window']"),
    (SHARED, {"k": None}, "k must be a tensor, got NoneType"),
    (SHARED, {"k": Z(B, T + 1, HKV, DQK)}, "k must be [2, 20, 2, 16], got [2, 21, 2, 16]"),
    (SHARED, {"v": Z(B, T, HKV, DQK)}, "v must be [2, 20, 2, 24], got [2, 20, 2, 16]"),
    (SHARED, {"v": Z(B, T, HKV, DV).half()}, "v must have q's dtype torch.float32, got torch.float16"),
    (SHARED, {"v": Z(B, T, HKV, DV, device="meta")}, "v must be on q's device cpu, got meta"),
    (FULL, {"gates": None}, "gates is required with combine: gated_sum, got None"),
    (SINGLE, {"gates": Z(B, T, HQ, 1)}, "gates must be None without combine: gated_sum, got Tensor"),
    (FULL, {"gates": Z(B, T, HQ, 3)}, "gates must be [2, 20, 6, 2], got [2, 20, 6, 3]"),
    (FULL, {"gates": Z(B, T, HQ, 2).bool()}, "gates must be floating-point, got torch.bool"),
    (FULL, {"gates": Z(B, T, HQ, 2, device="meta")}, "gates must be on q's device cpu, got meta"),
    (FULL, {"phi": None}, "phi is required with a compressed branch, got None"),
    (SINGLE, {"phi": phi}, "phi must be None without a compressed branch, got function"),
    (FULL, {"phi": (1, 2)}, "phi must be callable, got tuple"),
    (CALLER, {"blocks": None}, "blocks is required with from: caller, got None"),
    (FULL, {"blocks": Z(B, T, HKV, 3).int()}, "blocks must be None without from: caller, got Tensor"),
    (CALLER, {"blocks": Z(B, T, HQ, 3).int()}, "blocks must be [2, 20, 2, n], got [2, 20, 6, 3]"),
    (CALLER, {"blocks": Z(B, T, HKV, 3).long()}, "blocks must be int32, got torch.int64"),
    (
        FULL,
        {"k_raw": Z(B, T, HKV, DQK)},
        "k_raw must be None with kv: per_branch, got a value",
    ),
    (SINGLE, {"k_raw": Z(B, T, HKV, DQK)}, "k_raw must be None without a compressed branch"),
    (SHARED, {"k_raw": Z(B, T, HKV, DV)}, "k_raw must be [2, 20, 2, 16], got [2, 20, 2, 24]"),
    (FULL, {"scale": 0.0}, "scale must be finite and positive, got 0.0"),
    (FULL, {"scale": float("inf")}, "scale must be finite and positive, got inf"),
    (FULL, {"scale": float("nan")}, "scale must be finite and positive, got nan"),
    (FULL, {"scale": torch.tensor(1.0)}, "scale must be a Python number, got Tensor"),
    (FULL, {"scale": True}, "scale must be a Python number, got bool"),
    (FULL, {"cu_seqlens": cu(0, T)}, "B must be 1 with cu_seqlens, got q [2, 20, 6, 16]"),
    (FULL, {"cu_seqlens": cu(0, T).long()}, "cu_seqlens must be int32, got torch.int64"),
    (FULL, {"cu_seqlens": cu(0)}, "cu_seqlens must be [S + 1] with S ≥ 1, got [1]"),
    (FULL, {"cu_seqlens": cu(0, T)[None]}, "cu_seqlens must be [S + 1] with S ≥ 1, got [1, 2]"),
    (FULL, {"cu_seqlens": [0, T]}, "cu_seqlens must be a tensor, got list"),
]


@pytest.mark.parametrize(("layout", "change", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(layout: Layout, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        checks.attention(layout, **arguments(layout) | change)
    text = str(error.value)
    assert text.startswith("spec.attention: ")
    assert message in text
    assert re.search(r": \S.+$", text.split(message, 1)[1] or text), "no way out"
    assert "\n" not in text


def test_cu_seqlens_on_another_device() -> None:
    given = arguments(FULL, 1) | {"cu_seqlens": cu(0, T).to("meta")}
    with pytest.raises(InputError, match="cu_seqlens must be on q's device cpu, got meta"):
        checks.attention(FULL, **given)


def test_values_are_not_read() -> None:
    """Meta tensors have none: any read of a value, on a GPU a wait for the device, would raise."""
    given = {
        key: {n: t.to("meta") for n, t in x.items()}
        if isinstance(x, dict)
        else x.to("meta")
        if isinstance(x, Tensor)
        else x
        for key, x in (arguments(FULL, 1) | {"cu_seqlens": cu(0, 5, T)}).items()
    }
    assert checks.attention(FULL, **given).q is given["q"]


def rows(length: int, packed: bool = False) -> int:
    return length // 4 if packed else max(0, (length - 8) // 4 + 1)


@pytest.mark.parametrize("length", [1, 7, 8, 20])
@pytest.mark.parametrize("packed", [False, True])
def test_parts(length: int, packed: bool) -> None:
    n, q = rows(length, packed), Z(1, length, HQ, DQK)
    seqlens = cu(0, length) if packed else None
    for branch, count in (("compressed", n), ("window", length)):
        k, v = Z(1, count, HKV, DQK), Z(1, count, HKV, DV)
        got = checks.part(FULL, branch, q, k, v, 0.5, seqlens)
        assert all(a is b for a, b in zip(got[:3], (q, k, v), strict=True))
        assert got[3:] == (0.5, seqlens)


@pytest.mark.parametrize("packed", [False, True])
def test_part_with_other_rows(packed: bool) -> None:
    n, q = rows(T, packed), Z(1, T, HQ, DQK)
    seqlens = cu(0, T) if packed else None
    with pytest.raises(InputError) as error:
        checks.part(FULL, "compressed", q, Z(1, n + 1, HKV, DQK), Z(1, n, HKV, DV), None, seqlens)
    assert f"spec.compressed_attention: k_cmp must have {n} rows, " in str(error.value)
    assert f"T = 20, l = 8, d = 4, got {n + 1}: " in str(error.value)
    with pytest.raises(InputError, match=f"v_cmp must have {n} rows, .*, got {n - 1}: "):
        checks.part(FULL, "compressed", q, Z(1, n, HKV, DQK), Z(1, n - 1, HKV, DV), None, seqlens)


def test_part_errors_name_the_function() -> None:
    q = Z(B, T, HQ, DQK)
    with pytest.raises(InputError, match=r"^spec\.window_attention: v must be \[2, 20, 2, 24\], got \[2, 20, 2, 16\]"):
        checks.part(FULL, "window", q, Z(B, T, HKV, DQK), Z(B, T, HKV, DQK), None, None)
    with pytest.raises(
        InputError, match=r"^spec\.compressed_attention: k_cmp must be \[2, 4, 2, 16\], got \[2, 4, 2, 24\]"
    ):
        checks.part(FULL, "compressed", q, Z(B, 4, HKV, DV), Z(B, 4, HKV, DV), None, None)


@pytest.mark.parametrize("layout", [FULL, SHARED])
def test_compiles_in_one_graph(layout: Layout) -> None:
    def total(given: dict[str, Any]) -> Tensor:
        x = checks.attention(layout, **given)
        assert x.gates is not None
        return x.q.sum() * x.scale + x.gates.sum() + sum(t.sum() for t in (*x.k.values(), *x.v.values()))

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for length in (T, T + 1, T + 2):  # the later ones with a dynamic T
        given = arguments(layout, 1, length) | {"scale": 0.3}
        torch.testing.assert_close(compiled(given), total(given))
        given["cu_seqlens"] = cu(0, 5, length)
        torch.testing.assert_close(compiled(given), total(given))

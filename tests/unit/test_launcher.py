"""A launch like one before skips Triton's binding of arguments; one that Triton compiles anew for never does."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from nsagen.runtime import launcher


def copy_rows(x_ptr, boxes, table, length, scale, wide, ROWS: tl.constexpr, MORE: tl.constexpr = 7):  # pyright: ignore[reportArgumentType]
    pass


class Compiled:
    """What Triton returns of a launch, and remembers of later ones."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launches.append((grid, args))


class Kernel(JITFunction[Any]):
    """A kernel that is bound as Triton does, and not compiled."""

    def __init__(self) -> None:
        super().__init__(copy_rows)
        self.bind = create_function_from_signature(self.signature, self.params, make_backend(GPUTarget("cuda", 90, 32)))
        self.bound: list[tuple[Any, Any]] = []

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Compiled:
        _, found, others = self.bind(*args, **options)
        self.bound.append((found, others))
        return Compiled()


@pytest.fixture(autouse=True)
def none_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launcher, "_kept", {})


STORE = torch.zeros(64, dtype=torch.float32)
TENSORS = st.one_of(
    st.none(),
    st.builds(
        lambda dtype, i: STORE.view(dtype)[i:], st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 8)
    ),
)
ROWS = torch.zeros(4, 16, 64)
MAPS = st.builds(
    lambda dtype, rows: TensorDescriptor.from_tensor(ROWS.to(dtype), [1, rows, 16]),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.sampled_from([8, 16]),
)
NUMBERS = st.sampled_from([1, 2, 15, 16, 17, 32, 2**31 - 1, 2**31, 2**33])
LAUNCHES = st.tuples(
    TENSORS, st.one_of(MAPS, TENSORS), TENSORS, NUMBERS, st.floats(0.1, 0.3), st.booleans(), st.sampled_from([16, 32])
)
OPTIONS = st.sampled_from([{}, {"num_warps": 4}, {"num_warps": 8}, {"num_stages": 4}, {"num_warps": 4, "MORE": 8}])


@given(st.lists(st.tuples(LAUNCHES, OPTIONS), min_size=2, max_size=8))
def test_what_triton_compiles_anew_is_never_taken_for_known(
    launches: list[tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    """In any order of launches, and whatever is a tensor in one and none in another."""
    launcher._kept.clear()
    kernel, asked = Kernel(), Kernel()
    for args, options in launches:
        before = len(kernel.bound)
        launcher.start(kernel, (3,), *args, **options)
        asked[(3,)](*args, **options)
        if len(kernel.bound) == before:  # it was known, so Triton has seen the same before
            assert asked.bound[-1] in asked.bound[:-1]


def args(length: int = 48) -> tuple[Any, ...]:
    return torch.zeros(8), TensorDescriptor.from_tensor(ROWS, [1, 8, 16]), None, length, 0.5, False, 16


def test_a_second_launch_is_known_whatever_tensors_it_is_given() -> None:
    kernel = Kernel()
    for _ in range(3):
        launcher.start(kernel, (5, 2), *args(), num_warps=4)
    assert len(kernel.bound) == 1
    launcher.start(kernel, (5, 2), *args(49), num_warps=4)
    assert len(kernel.bound) == 2
    ((compiled, others),) = [kept for key, kept in launcher._kept.items() if 48 in key]
    assert others == (7,)  # MORE, by default
    assert [grid for grid, _ in compiled.launches] == [(5, 2, 1)] * 2
    assert all(len(given) == len(kernel.params) for _, given in compiled.launches)


def test_constexprs_by_name_are_handed_on() -> None:
    kernel = Kernel()
    for _ in range(2):
        launcher.start(kernel, (5,), *args(), MORE=9)
    ((_, others),) = launcher._kept.values()
    assert (others, len(kernel.bound)) == ((9,), 1)


def test_no_tensor_is_kept() -> None:
    kernel = Kernel()
    some = args()
    launcher.start(kernel, (5,), *some)
    launcher.start(kernel, (5,), STORE, *some[1:])
    for key in launcher._kept:
        assert not any(isinstance(x, torch.Tensor | TensorDescriptor) for x in key)


def test_so_many_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "MOST_KEPT", 4)
    kernel = Kernel()
    for length in range(100, 111):
        launcher.start(kernel, (5,), *args(length))
        assert 1 <= len(launcher._kept) <= 4
    assert len(kernel.bound) == 11


def test_another_device_is_another_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    for device in (0, 1, 0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        launcher.start(kernel, (5,), *args())
    assert len(kernel.bound) == 2

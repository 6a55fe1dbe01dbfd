"""How many programs share a key tile: enough to fill a GPU, none without work."""

from __future__ import annotations

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from nsagen.runtime import launch


class OnGpu(torch.Tensor):
    """A tensor that says it is there."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("programs", "length", "step", "expected"),
    [
        (128, 65536, 4, 16),  # few key tiles, long loops: as many as may be
        (512, 262144, 4, 4),  # 2048 programs fill the GPU
        (2048, 1 << 20, 4, 1),
        (16, 100, 4, 6),  # a few steps each
        (16, 3, 4, 1),
        (0, 8192, 4, 16),  # no key has ended: nothing is launched, and nothing divides by zero
    ],
)
def test_splits(programs: int, length: int, step: int, expected: int) -> None:
    assert launch.splits(programs, length, step) == expected


def test_a_configuration_may_hold_the_compiler_to_few_registers() -> None:
    free, held = launch.Config(64, 128, 4, 2, 65536), launch.Config(64, 128, 4, 2, 65536, 168)
    assert (free.label, held.label) == ("64x128w4s2", "64x128w4s2r168")
    assert (free.options, held.options) == (
        {"num_warps": 4, "num_stages": 2},
        {"num_warps": 4, "num_stages": 2, "maxnreg": 168},
    )


def test_boxes_of_a_block_s_keys() -> None:
    x = torch.zeros(2, 100, 4, 192, dtype=torch.bfloat16)
    first, second = launch.maps(x, (128, 64), 32, 64, None)
    assert first is not None and second is not None
    assert (first.shape, first.strides) == ([2, 100, 4, 192], [100 * 768, 768, 192, 1])
    assert (first.block_shape, second.block_shape) == ([1, 32, 1, 128], [1, 32, 1, 64])
    by_head = launch.maps(x.transpose(1, 2).contiguous().transpose(1, 2), (128, 64), 64, 64, None)
    assert by_head[0] is not None and by_head[0].strides == [76800, 192, 19200, 1]


def test_maps_of_equal_form_are_of_their_own_tensors() -> None:
    """Triton's checks are made once a form, with no tensor that would be kept."""
    a, b = (torch.zeros(1, 96, 2, 64) for _ in range(2))
    (of_a,), (of_b,) = (launch.maps(x, (64,), 16, 64, None) for x in (a, b))
    assert of_a is not None and of_b is not None and of_a is not of_b
    assert of_a.base is a and of_b.base is b
    made = TensorDescriptor(b, [1, 96, 2, 64], [64 * 4, 128, 64, 1], [1, 16, 1, 64])
    assert type(of_b) is TensorDescriptor and vars(of_b) | {"base": None} == vars(made) | {"base": None}


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 9, 3, 20, dtype=torch.bfloat16), torch.zeros(1, 9, 1, 64).expand(2, -1, -1, -1),
          torch.zeros(2 * 9 * 64 + 1)[1:].view(2, 9, 1, 64), torch.zeros(1, 0, 1, 64)],
    ids=["rows of 40 bytes", "one sequence for two", "address", "no tokens"],
)  # fmt: skip
def test_where_there_is_no_box_it_is_pointers(x: torch.Tensor) -> None:
    assert launch.maps(x, (64,), 16, 64, None) == [None]


def test_no_box_passes_the_end_of_what_is_the_program_s() -> None:
    x = torch.zeros(1, 96, 1, 64)
    assert launch.maps(x, (64,), 32, 48, None) == [None]  # blocks of 48
    assert launch.maps(x, (64,), 16, 48, torch.tensor([0, 96])) == [None]  # packed
    assert launch.maps(x, (64,), 16, 48, None) != [None]


def test_pointers_take_no_tile_that_would_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "chip", lambda index: launch.Chip("sm_90", 227 << 10, "some GPU"))
    narrow, wide = launch.Config(16, 16, 1, 3, 0), launch.Config(16, 32, 1, 3, 0, maps=True)
    tiles = launch.Tiles("a", "b", {("sm_90", 16): (wide, narrow)})

    q = torch.empty((1, 64, 16, 128), dtype=torch.bfloat16).as_subclass(OnGpu)
    assert launch.pick(tiles, q) == wide
    assert launch.pick(tiles, q, False) == narrow


def test_for_which_queries_keys_are_put_in_lane_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(1, launch.ORDERED_FROM, 4, 136, dtype=torch.bfloat16)
    q = rows[..., :128]
    assert launch.orders_keys(None, q)
    assert not launch.orders_keys(None, rows[..., 1:129])  # maps take whole 16 bytes
    assert not launch.orders_keys(torch.tensor([0, 10], dtype=torch.int32), q)
    assert not launch.orders_keys(None, q[:, 1:])
    monkeypatch.setattr(launch, "PLAIN", True)  # the tuner measures all candidates at any length
    assert launch.orders_keys(None, q[:, 1:])

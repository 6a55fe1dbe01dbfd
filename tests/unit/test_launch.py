"""How many programs share a key tile: enough to fill a GPU, none without work."""

from __future__ import annotations

import pytest

from nsagen.runtime import launch


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

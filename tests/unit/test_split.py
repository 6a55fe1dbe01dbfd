"""How the keys of a decoding step are shared out: every key in one run, few runs where the batch fills the GPU."""

from __future__ import annotations

import pytest
import torch

from nsagen.runtime import split


@pytest.mark.parametrize("programs", [1, 4, 128, 1024, 5000])
@pytest.mark.parametrize("longest", [1, 16, 63, 64, 65, 575, 4096, 8191])
@pytest.mark.parametrize("step", [1, 16, 64])
def test_runs_hold_every_key_and_none_is_idle(programs: int, longest: int, step: int) -> None:
    runs = split.runs(programs, longest, step)
    assert runs.length % step == 0
    assert runs.count * runs.length >= longest > (runs.count - 1) * runs.length
    assert runs.count <= split.MOST_RUNS
    assert runs.width >= runs.count > runs.width // 2


def test_a_large_batch_is_not_shared_out() -> None:
    assert split.runs(1024, 4096, 64) == (1, 4096)
    assert split.runs(4, 4096, 64) == (32, 128)
    assert split.runs(128, 4096, 64) == (2, 2048)


def test_no_cache_without_keys_is_without_runs() -> None:
    assert split.runs(4, 0, 64) == (1, 64)


def test_the_longest_walk_counts_from_its_first_step() -> None:
    assert split.longest([(0, 3), (89, 100)], 16) == 20


@pytest.mark.parametrize(
    ("queries", "group", "dtype", "rows"),
    [
        (1, 3, torch.float32, 16), (8, 3, torch.float32, 16), (8, 3, torch.bfloat16, 32), (2, 16, torch.bfloat16, 32),
        (1, 40, torch.bfloat16, 64), (8, 64, torch.float16, 64),
    ],
)  # fmt: skip
def test_rows_hold_a_group_at_least(queries: int, group: int, dtype: torch.dtype, rows: int) -> None:
    assert split.rows(torch.empty((1, queries, group, 16), dtype=dtype), group) == rows

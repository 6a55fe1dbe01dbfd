"""How the keys of a decoding step are shared out: every key in one run, few runs where the batch fills the GPU."""

from __future__ import annotations

import pytest
import torch
from test_launch import OnGpu

from nsagen.ir import plan
from nsagen.render import split_view
from nsagen.runtime import launch, split, stores


@pytest.mark.parametrize("programs", [1, 4, 128, 1024, 5000])
@pytest.mark.parametrize("longest", [1, 16, 63, 64, 65, 575, 4096, 8191])
@pytest.mark.parametrize("step", [1, 16, 64])
def test_runs_hold_every_key_and_none_is_idle(programs: int, longest: int, step: int) -> None:
    runs = split.runs(programs, longest, step)
    assert runs.length % step == 0
    assert runs.count * runs.length >= longest > (runs.count - 1) * runs.length
    assert runs.count <= split.MOST_RUNS
    width = launch.power_of_two(runs.count, 1)  # parts that a merge loads together
    assert width >= runs.count > width // 2


def test_a_large_batch_is_not_shared_out() -> None:
    assert split.runs(1024, 4096, 64) == (1, 4096)
    assert split.runs(4, 4096, 64) == (32, 128)
    assert split.runs(128, 4096, 64) == (2, 2048)


@pytest.mark.parametrize("group", [1, 3, 16, 64])
@pytest.mark.parametrize("candidates", [16, 256, 16384])
def test_a_selection_is_shared_out_in_whole_runs(group: int, candidates: int) -> None:
    four, eight = (split.together(candidates, group, warps * split.MOST_SUMS, 16) for warps in (4, 8))
    assert 16 <= four <= eight <= candidates and candidates % four == candidates % eight == 0
    assert eight * group <= split.MOST_SUMS * 8


@pytest.mark.parametrize(("widths", "rows"), [((1, 1, 1), 4), ((2, 2, 2), 4), ((8, 4, 2), 2), ((32, 16, 8), 1)])
def test_rows_of_a_merge(widths: tuple[int, ...], rows: int) -> None:
    assert split.merged_rows(*widths) == rows


@pytest.mark.parametrize(
    ("batch", "candidates", "group", "count", "shares"),
    [
        (1, 256, 16, 16, (False, 128, False)), (1, 512, 16, 16, (True, 32, True)), (1, 2048, 16, 16, (True, 128, True)),
        (1, 4096, 16, 16, (True, 256, True)), (1, 16384, 16, 16, (True, 512, True)),
        (1, 4096, 64, 16, (True, 128, True)), (1, 2048, 16, 40, (True, 512, True)),
        (1, 4096, 64, 100, (True, 128, False)),
        (16, 1024, 16, 16, (False, 128, False)), (16, 2048, 16, 16, (True, 512, False)),
        (16, 8192, 16, 16, (True, 512, True)),
    ],
)  # fmt: skip
def test_a_selection_is_launched_or_rides(
    batch: int, candidates: int, group: int, count: int, shares: tuple[bool, int, bool]
) -> None:
    """Heats where a run has twice as many candidates as it sends on, and where few are left for the final."""
    alone = split.few(torch.empty((batch, 1, 4 * group, 16)), 4)
    assert split.shares(alone, candidates, group, count, 4, 16) == shares


@pytest.mark.parametrize(
    ("batch", "dim", "widths", "shape"),
    [
        (1, 128, (8, 16, 8), (1, 1)), (1, 128, (32, 16, 8), (1, 1)), (1, 192, (32, 16), (1, 2)),
        (1, 256, (32, 32), (1, 2)), (15, 16, (1,), (1, 1)), (16, 128, (2, 4, 2), (4, 4)), (16, 128, (32, 16), (1, 4)),
    ],
)  # fmt: skip
def test_of_few_rows_a_warp_merges_one(batch: int, dim: int, widths: tuple[int, ...], shape: tuple[int, int]) -> None:
    assert split.merged(torch.empty((batch, 1, 64, 16)), 4, dim, *widths) == shape


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


@pytest.mark.parametrize(
    ("batch", "queries", "scattered", "label"),
    [
        (1, 1, False, "16x64w8s3"), (1, 1, True, "16x64w8s3"), (16, 1, False, "16x64w4s3"), (16, 1, True, "16x32w4s5"),
        (1, 8, False, "16x64w8s3"), (2, 8, False, "16x64w4s3"), (256, 4, False, "16x64w4s3"),
        (64, 1, False, "16x64w4s3"), (65, 1, False, "16x32w4s3r128"), (65, 1, True, "16x32w4s5"),
    ],
)  # fmt: skip
def test_many_programs_take_four_warps(
    monkeypatch: pytest.MonkeyPatch, batch: int, queries: int, scattered: bool, label: str
) -> None:
    monkeypatch.setattr(launch, "chip", lambda index: launch.Chip("sm_90", 227 << 10, "some GPU"))
    shapes = ((64, 8, 3, 100), (64, 4, 3, 100), (64, 4, 2, 55), (32, 4, 3, 55), (32, 4, split.DEEP, 85), (16, 4, 3, 30))
    sized = tuple(launch.Config(16, bn, warps, stages, kib << 10) for bn, warps, stages, kib in shapes)
    tiles = launch.Tiles("a", "b", {("sm_90", 16): sized})
    q = torch.empty((batch, queries, 64, 16), dtype=torch.bfloat16).as_subclass(OnGpu)
    for _ in range(2):
        assert split.pick(tiles, q, scattered, 4, False, 127 * (queries == 1)).label == label
    shared_out = label.replace("16x32w4s3r128", "16x64w4s3")
    assert split.pick(tiles, q, scattered, 4, False).label == shared_out
    assert split.pick(tiles, q, scattered, 4, True, 127 * (queries == 1)).label == shared_out


@pytest.mark.parametrize(
    ("batch", "queries", "blocks", "whole"),
    [(63, 1, 1, False), (64, 1, 1, True), (64, 2, 1, False), (64, 1, 4096, True), (64, 1, 4097, False)],
)
def test_a_program_has_all_of_a_query_where_there_are_many(batch: int, queries: int, blocks: int, whole: bool) -> None:
    assert split.whole(torch.empty((batch, queries, 64, 16)), 4, blocks) == whole
    if whole:  # each source is one run, then
        assert split.runs(4 * batch, 1 << 20, 16).count == 1


@pytest.mark.parametrize(
    ("batch", "queries", "stride", "joins"),
    [
        (1, 1, 16, True), (4, 1, 16, True), (5, 1, 16, False),
        (1, 4, 16, True), (1, 8, 16, False), (1, 4, 4, True), (1, 3, 2, False),
    ],
)  # fmt: skip
def test_a_short_step_appends_where_it_scores(batch: int, queries: int, stride: int, joins: bool) -> None:
    """Where at most one block of a sequence can end, and programs leave room beside them."""
    assert split.joins(torch.empty((batch, queries, 64, 16)), 4, stride) == joins


@pytest.mark.parametrize(("page", "stride", "scattered"), [(64, 1, False), (64, 16, True), (256, 16, False)])
def test_scattered_rows(page: int, stride: int, scattered: bool) -> None:
    lengths = torch.zeros(2, dtype=torch.int32)
    past = stores.Past(lengths, torch.zeros((2, 3), dtype=torch.int32), page, 6, 3 * page)
    assert split.scattered(past, stride) == scattered
    assert not split.scattered(past._replace(table=None, page=1), stride)


def test_finalists_are_compared_each_with_every_other() -> None:
    assert split.FINALISTS == 2 * split_view.RANKED


def test_a_deep_pipeline_is_what_the_tables_say() -> None:
    assert split.DEEP == plan.DEEP

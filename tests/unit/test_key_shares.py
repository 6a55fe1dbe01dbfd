"""Programs that share a key tile: their steps, by the generated kernels' own text, and how many there are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsagen import api
from nsagen.render.module import _source
from nsagen.runtime import hopper

CASES = [("nsa_128", "window_keys"), ("nsa_128", "compressed_keys"), ("nsa_paper", "window_keys"),
         ("nsa_paper", "compressed_keys"), ("gqa_llama", "window_keys"), ("mha_16", "compressed_keys")]  # fmt: skip


def functions(spec: str, kernel: str) -> tuple[Any, Any, int]:
    """The kernel's `range` and `share` as Python functions, the second of a program's number too; keys of a tile."""
    plan = api.compiled_of(api.read(api.ready_specs()[spec])).plan
    text = _source(plan.kernel(kernel), plan)
    found = {}
    for name in ("range", "share"):
        source = re.search(rf"def {kernel}_{name}\(.*?(?=\n\n\n)", text, re.DOTALL)
        assert source
        found[name] = source[0].replace(": gl.constexpr", "")
    gl = SimpleNamespace(program_id=lambda _: gl.number, number=0)
    space: dict[str, Any] = {"gl": gl}
    exec("\n".join(found.values()), space)

    def share(number: int, *rest: int) -> tuple[int, int]:
        gl.number = number
        return space[f"{kernel}_share"](*rest)

    wide = plan.kernel(kernel).body == "attend_wide_keys"
    return space[f"{kernel}_range"], share, 64 if wide else 128


@pytest.mark.parametrize(("spec", "kernel"), CASES)
def test_every_step_is_one_program_s(spec: str, kernel: str) -> None:
    steps_of, share, tile = functions(spec, kernel)
    seen = 0
    for tokens in (33, 64, 129, 700, 1500, 4097):
        for s0 in range(0, tokens, tile):
            first, last, _, _ = steps_of(s0, tokens, tile)
            for shares in (1, 2, 3, 7, 16):
                parts = [share(i, s0, tokens, shares, tile) for i in range(shares)]
                assert all(a <= b for a, b in parts)
                own = [step for a, b in parts for step in range(a, b)]
                assert own == list(range(first, last)), (tokens, s0, shares)
                seen += len(own)
    assert seen


@pytest.fixture
def of_132(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(hopper, "_multiprocessors", lambda _: 132)
    hopper.shares.cache_clear()
    yield torch.device("cuda", 0)
    hopper.shares.cache_clear()


def test_as_many_share_a_tile_as_fill_the_chip(of_132: torch.device) -> None:
    assert [hopper.shares(tiles, 160, of_132) for tiles in (132, 256, 2048)] == [1, 1, 1]  # whole rounds, or nearly
    assert hopper.shares(192, 160, of_132) == 2  # three rounds of halves, not two of all
    assert hopper.shares(8, 160, of_132) > 8
    assert hopper.shares(8, 3, of_132) == 1  # nothing to share


def test_many_tiles_are_not_shared_for_little(of_132: torch.device) -> None:
    """Parts of all of them would cost more than a last round that is not full."""
    assert [hopper.shares(tiles, 160, of_132) for tiles in (940, 1000, 1252, 2032)] == [1, 1, 1, 1]

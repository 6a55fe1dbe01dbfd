"""Drawn specs and shapes against the oracle. `make test` draws 24 in all, `make fuzz` 300."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import FUZZ_EXAMPLES
from harness import by_blocks, check
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import packed, seeds, shapes, specs

POOLS = ("mean", "weighted", "linear", "mlp")
dense = specs(kinds=("window", "compressed"))
whole = specs(kinds=("compressed", "selected", "window"), pools=POOLS)
union = specs(kinds=("compressed", "selected", "window"), pools=POOLS, combines=("one_softmax",))
pytestmark = pytest.mark.fuzz


def ordered(spec: dict[str, Any], blocks: bool) -> dict[str, Any]:
    """A name of its own: equal specs are compiled once."""
    return {**spec, "name": f"{spec['name']}_by_blocks"} if blocks else spec


def share(part: int) -> settings:
    return settings(max_examples=max(2, FUZZ_EXAMPLES // part))


@share(4)
@given(st.data(), seeds, st.booleans())
def test_dense_branches(device: str, data: Any, seed: int, strided: bool) -> None:
    spec = data.draw(dense)
    check(spec, *data.draw(shapes(spec)), seed, device, strided=strided)


@share(4)
@given(st.data(), seeds, st.booleans(), st.booleans())
def test_whole_operation(device: str, data: Any, seed: int, strided: bool, blocks: bool) -> None:
    spec = data.draw(whole)
    with by_blocks(blocks):
        check(ordered(spec, blocks), *data.draw(shapes(spec)), seed, device, strided=strided)


@share(4)
@given(st.data(), seeds)
def test_packed_dense_branches(device: str, data: Any, seed: int) -> None:
    spec = data.draw(dense)
    ends = data.draw(packed(spec))
    check(spec, 1, ends[-1], seed, device, ends)


@share(6)
@given(st.data(), seeds, st.booleans())
def test_packed_whole_operation(device: str, data: Any, seed: int, blocks: bool) -> None:
    spec = data.draw(whole)
    ends = data.draw(packed(spec))
    with by_blocks(blocks):
        check(ordered(spec, blocks), 1, ends[-1], seed, device, ends)


@share(12)
@given(st.data(), seeds)
def test_one_softmax(device: str, data: Any, seed: int) -> None:
    spec = data.draw(union)
    check(spec, *data.draw(shapes(spec)), seed, device)

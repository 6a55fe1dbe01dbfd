"""Golden dumps: the IR after every pass of four specs, and the committed modules of all ready ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from nsagen import api
from nsagen.compiler import Compiled, compile_spec

GENERATED = Path(__file__).parents[2] / "generated"
DUMPED = ("window_only", "nsa_compressed_window", "tiny", "nsa_128")
STAGES = (
    "lower", "fold_positions", "differentiate", "derive_weights", "choose_strategy", "derive_bounds", "split_loops",
    "choose_tiles", "place_accesses",
)  # fmt: skip


@cache
def compiled(name: str) -> Compiled:
    return compile_spec(api.read(name))


@pytest.mark.parametrize("spec", DUMPED)
@pytest.mark.parametrize("stage", STAGES)
def test_the_dump_after_every_stage(spec: str, stage: str, golden: Callable[[str, str], None]) -> None:
    text = next(s.text for s in compiled(spec).stages if s.name == stage)
    golden(f"{spec}.{stage}.txt", text)


@pytest.mark.parametrize("spec", DUMPED)
def test_no_stage_goes_unseen(spec: str) -> None:
    assert tuple(s.name for s in compiled(spec).stages) == STAGES


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_the_committed_module_is_what_the_spec_generates(spec: str) -> None:
    path = GENERATED / f"{spec}.py"
    assert path.exists(), f"{path} is missing: run `nsagen build {spec}`"
    assert path.read_text() == compiled(spec).source, f"{path} is out of date: run `nsagen build {spec}`"


def test_nothing_is_generated_without_a_ready_spec() -> None:
    found = {p.stem for p in GENERATED.glob("*.py")} - {"__init__"}
    assert found == set(api.ready_specs())


def test_compiling_twice_gives_the_same_text() -> None:
    again = compile_spec(api.read("tiny"))
    assert (again.source, again.digest) == (compiled("tiny").source, compiled("tiny").digest)

"""What the cost model predicts of the cases of `nsagen bench`."""

from __future__ import annotations

import pytest
import torch

from nsagen.api import compiled_of, module_of, read
from nsagen.runtime import launch
from nsagen.tools.bench_cases import own_cases
from nsagen.tools.bench_inputs import Setting
from nsagen.tools.costs import main_ops, taken
from nsagen.tools.forecast import Tile, seconds
from nsagen.tools.predict import Model


def model_of(name: str) -> tuple[Model, Setting]:
    compiled = compiled_of(read(name))
    setting = Setting(compiled.spec, torch.bfloat16, "cpu")
    return Model(compiled, module_of(compiled), setting), setting


@pytest.mark.parametrize("name", ["tiny", "window_only", "nsa_128", "selected_only"])
def test_every_case_but_phi_has_a_prediction(name: str):
    model, setting = model_of(name)
    compiled = compiled_of(read(name))
    for case in own_cases(compiled, module_of(compiled), setting, True):
        forward, backward = model(case.name, 256)
        assert (forward is None) == (case.name == "compressor")
        assert (backward is None) == (case.name in ("compressor", "select_blocks"))
        assert all(x is None or x > 0 for x in (forward, backward))
    assert model("dense FA2", 256) == (None, None)


def test_it_is_the_forecast_with_the_tiles_that_a_launch_takes():
    """The whole of one window: its launches alone."""
    model, _ = model_of("window_only")
    forward, backward = main_ops(model.plan)
    for op, found in zip((forward, backward), model("whole", 512), strict=True):
        want = 0.0
        for x in taken(op, 512, "plain"):
            picked = launch.pick(model.configs[x.kernel], torch.empty(1, 512, 0, dtype=torch.bfloat16))
            want += 1e3 * seconds(x, model.plan, 512, Tile(picked.bm, picked.bn))
        assert found == pytest.approx(want)


def test_the_parts_of_a_forward_add_up_to_the_whole():
    model, _ = model_of("nsa_128")
    parts = ("compressed_attention", "select_blocks", "selected_attention", "window_attention")
    whole = model("whole", 1024)[0]
    assert whole is not None
    assert sum(model(name, 1024)[0] or 0.0 for name in parts) < whole

"""The examples run as they are, in processes of their own: this one interprets kernels."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nsagen

FILE = Path(__file__).resolve().parents[2] / "examples" / "generate.py"


def generate(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(FILE), *options], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("options", [("--tokens", "40"), ("--samples", "2", "--temperature", "1", "--chunk", "24")])
def test_every_step_is_the_whole_forward_s(options: tuple[str, ...]):
    done = generate("--check", "--device", "cpu", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("In the beginning")
    assert "worst error of a step's logits" in done.stdout
    assert len(done.stdout.splitlines()) == (3 if "2" in options else 2)


def test_bad_options_are_refused():
    done = generate("--tokens", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "examples:" in generate("--help").stdout


@pytest.mark.parametrize("wrong", [1.0, 0.9])
def test_the_check_notices(wrong: float, monkeypatch: pytest.MonkeyPatch):
    """Gates that differ in the steps alone."""
    found = importlib.util.spec_from_file_location("generate_example_file", FILE)
    assert found is not None and found.loader is not None
    example = importlib.util.module_from_spec(found)
    found.loader.exec_module(example)
    nsa = nsagen.load(example.SPEC)
    real = nsa.decode
    monkeypatch.setattr(
        nsa, "decode", lambda q, k, v, gates, *rest: real(q, k, v, gates * wrong, *rest), raising=True
    )  # fmt: skip
    torch.manual_seed(0)
    model = example.Model(nsa).double()  # float64 takes the torch path everywhere
    prompt = torch.randint(256, (1, 50))
    tokens, steps = example.generate(nsa, model, prompt, argparse.Namespace(tokens=4, chunk=0, temperature=0.0))
    assert tokens.shape == (1, 54) and steps.shape == (1, 4, 256)
    error = example.worst_error(nsa, model, tokens, steps)
    assert error < 1e-5 if wrong == 1.0 else error > example.TOLERANCE[torch.float32]

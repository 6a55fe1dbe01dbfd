"""Standalone modules: torch and triton alone, the same bits as the module on the runtime."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_imports import imports

from nsagen import api, build

ROOT = Path(__file__).resolve().parents[2]
HEADS = {"query": 4, "kv": 2, "qk_dim": 24, "v_dim": 16}
COMPRESSED = {"block": 8, "stride": 4, "pool": "mlp"}
SELECTED = {"block": 8, "top_n": 3, "initial": 1, "local": 1}
SPECS = {
    "alone_gated": {
        "kv": "shared",
        "branches": {"compressed": COMPRESSED, "selected": SELECTED, "window": {"size": 10, "sinks": 2}},
        "combine": "gated_sum",
    },
    "alone_union": {
        "kv": "per_branch",
        "branches": {"compressed": {**COMPRESSED, "pool": "mean"}, "window": {"size": 7}},
        "combine": "one_softmax",
    },
    "alone_window": {"kv": "shared", "branches": {"window": {"size": 9}}, "combine": "single"},
}
PROBE = """
import importlib.util, sys
import torch

path, result, blocked = sys.argv[1:]
if blocked == "blocked":
    sys.modules["nsagen"] = None
found = importlib.util.spec_from_file_location("module", path)
nsa = sys.modules["module"] = importlib.util.module_from_spec(found)
found.loader.exec_module(nsa)
torch.set_num_threads(1)
spec, heads = nsa.SPEC, nsa.SPEC["heads"]
saved = []
for cu in (None, torch.tensor([0, 5, 5, 37], dtype=torch.int32)):
    torch.manual_seed(3)
    new = lambda *shape: torch.randn(1, 37, *shape, requires_grad=True)
    q, leaves = new(heads["query"], heads["qk_dim"]), []
    pair = lambda: (new(heads["kv"], heads["qk_dim"]), new(heads["kv"], heads["v_dim"]))
    if spec["kv"] == "per_branch":
        pairs = {b: pair() for b in spec["branches"]}
        k, v = {b: p[0] for b, p in pairs.items()}, {b: p[1] for b, p in pairs.items()}
        leaves = [x for p in pairs.values() for x in p]
    else:
        k, v = leaves = pair()
    gates = new(heads["query"], len(spec["branches"])) if spec["combine"] == "gated_sum" else None
    phi = nsa.Compressor() if "compressed" in spec["branches"] else None
    out = nsa.attention(q, k, v, None if gates is None else gates.sigmoid(), phi, cu_seqlens=cu)
    out.square().sum().backward()
    leaves = [q, *leaves, *([] if gates is None else [gates]), *(phi.parameters() if phi else ())]
    saved += [out.detach(), *(x.grad for x in leaves)]
assert blocked != "blocked" or not any(m.split(".")[0] == "nsagen" for m in sys.modules if sys.modules[m])
torch.save(saved, result)
"""


def spec_of(name: str) -> dict[str, object]:
    return {"name": name, "heads": HEADS, **SPECS[name]}


def probe(path: Path, result: Path, blocked: str, interpret: str) -> list[torch.Tensor]:
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROBE, str(path), str(result), blocked]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    return torch.load(result)


@pytest.mark.parametrize("interpret", ["0", "1"], ids=["torch", "interpreter"])
@pytest.mark.parametrize("name", SPECS)
def test_the_same_bits_without_nsagen(name, interpret, tmp_path):
    alone = build(spec_of(name), tmp_path / "alone", standalone=True)
    usual = build(spec_of(name), tmp_path / "usual")
    got = probe(alone, tmp_path / "alone.pt", "blocked", interpret)
    expected = probe(usual, tmp_path / "usual.pt", "free", interpret)
    assert len(got) == len(expected) > 2
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", [*SPECS, *api.ready_specs()])
def test_it_imports_torch_and_triton_alone(name, tmp_path):
    path = build(spec_of(name) if name in SPECS else name, tmp_path, standalone=True)
    optional = {"platformdirs", "filelock"}  # of the cache of measured tiles, each within try
    assert {n.split(".")[0] for n in imports(path)} - optional <= {"torch", "triton", *sys.stdlib_module_names}
    text = path.read_text()
    guarded = [n for t in ast.walk(ast.parse(text)) if isinstance(t, ast.Try) for n in ast.walk(t)]
    for module in optional & {n.split(".")[0] for n in imports(path)}:
        assert any(module in ast.unparse(n) for n in guarded if isinstance(n, (ast.Import, ast.ImportFrom)))
    assert "version.require" not in text
    ruff = shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))
    done = subprocess.run(
        # F841: a kernel may leave a bound unused, in the usual module, too
        [ruff, "check", "--isolated", "--quiet", "--select=F,E9", "--ignore=F841", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_what_is_used_is_there(tmp_path):
    text = build(spec_of("alone_window"), tmp_path, standalone=True).read_text()
    assert "nsagen.runtime.torch_path" in text
    assert "class _MLPPool" not in text
    assert "def _device_load" in text
    assert "def _lists_invert" not in text


def test_build_checks_the_standalone_text(tmp_path):
    path = build(spec_of("alone_window"), tmp_path, standalone=True)
    assert build(spec_of("alone_window"), tmp_path, standalone=True, check=True) == path
    with pytest.raises(api.OutOfDate):
        build(spec_of("alone_window"), tmp_path, check=True)


COMPILE = """
import importlib.util, json, sys
from nsagen import api
from nsagen.tools.aot import compile_job, jobs_of
compiled = api.compiled_of(api.read(json.loads(sys.argv[1])))
found = importlib.util.spec_from_file_location("alone", sys.argv[2])
alone = sys.modules["alone"] = importlib.util.module_from_spec(found)
found.loader.exec_module(alone)
for job in jobs_of(compiled.plan, "sm_90", "bf16"):
    got, usual = (compile_job(m, job, compiled.plan) for m in (alone, api.module_of(compiled)))
    assert got.error is None and got == usual, (got, usual)
"""


def test_its_kernels_compile_alike(tmp_path):
    """For a GPU that need not be here: the same registers, shared memory and instructions."""
    spec = spec_of("alone_window")
    path = build(spec, tmp_path, standalone=True)
    variables = {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "NSAGEN_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", COMPILE, json.dumps(spec), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr

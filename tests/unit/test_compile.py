"""`nsagen compile` and what it stands on: real compilers for chips that are not here, and the texts they leave."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from nsagen import api
from nsagen.cli import app
from nsagen.tools import aot, aot_chips, aot_listing
from nsagen.tools import compile as tool

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "name": "compiled_window",
    "heads": {"query": 2, "kv": 1, "qk_dim": 16, "v_dim": 16},
    "kv": "shared",
    "branches": {"window": {"size": 8}},
    "combine": "single",
}


def compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Real kernels: a process of its own, without the interpreter."""
    variables = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables)


@pytest.mark.parametrize("spec", ["window_only", "nsa_compressed_window"])
def test_first_choices_do_not_spill(spec, tmp_path):
    """In bf16 on sm_90."""
    done = compiling("-m", "nsagen", "compile", spec, "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "found.json").read_text())
    assert {(r["arch"], r["dtype"]) for r in records} == {("sm_90", "bf16")}
    plan = api.compiled_of(api.read(spec)).plan
    assert {r["kernel"] for r in records} == {k.name for k in plan.kernels} | {"cache_append", "decode_whole"}
    assert all(r["registers"] > 0 and r["spill_stores"] == r["spill_loads"] == 0 for r in records)


PLANTED = """
import dataclasses, sys
from nsagen import cli
from nsagen.ir.plan import TileConfig
from nsagen.tools import aot, compile
wide = TileConfig(64, 16, 1, 1, 0, 0, 0.0)  # the sums of 64 rows in one warp: 256 registers a thread
jobs = aot.jobs_of
compile.jobs_of = lambda *asked: [dataclasses.replace(jobs(*asked)[0], tile=wide)]
sys.argv = ["nsagen", "compile", "window_only", "--json", sys.argv[1]]
cli.main()
"""


def test_a_first_choice_that_spills_is_found(tmp_path):
    done = compiling("-c", PLANTED, str(tmp_path / "found.json"))
    assert done.returncode == 1, done.stdout + done.stderr
    (record,) = json.loads((tmp_path / "found.json").read_text())
    assert record["kernel"] == "window_fwd"
    assert record["spill_stores"] > 1000
    assert record["spill_loads"] > 1000
    assert "SPILLS" in done.stdout


WITH_SELECTION = SMALL | {
    "name": "compiled_selection",
    "branches": {
        "compressed": {"block": 8, "stride": 4, "pool": "mean"},
        "selected": {"block": 8, "top_n": 3, "initial": 1, "local": 1},
    },
    "combine": "gated_sum",
}
CHIPS = """
import json, sys
from nsagen import api
from nsagen.tools import aot, compile
from nsagen.tools.aot_chips import CHIPS
jobs = aot.jobs_of
compile.jobs_of = lambda *asked: [j for j in jobs(*asked) if j.kernel.name == sys.argv[3]]
reports = compile.compile_all(api.compiled_of(api.read(json.loads(sys.argv[1]))), list(CHIPS), "bf16")
compile.write_json(reports, sys.argv[2])
print(compile.text(reports))
"""


def test_every_chip(tmp_path):
    done = compiling("-c", CHIPS, json.dumps(SMALL), str(tmp_path / "found.json"), "window_fwd")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {r["arch"]: r for r in json.loads((tmp_path / "found.json").read_text())}
    assert list(found) == ["sm_80", "sm_90", "sm_100", "gfx942"]
    for r in found.values():
        assert r["error"] is None
        assert 16 < r["registers"] < 255
        assert 0 < r["smem"] < 65536
        assert r["spill_stores"] == r["spill_loads"] == r["stack"] == 0
    assert {arch: [name for name in ("wgmma", "mma", "mfma") if r[name]] for arch, r in found.items()} == {
        "sm_80": ["mma"],
        "sm_90": ["wgmma"],
        "sm_100": ["mma"],
        "gfx942": ["mfma"],
    }
    assert {arch: r["warnings"] for arch, r in found.items()} == {
        "sm_80": [],
        "sm_90": [],
        "sm_100": [],
        "gfx942": None,
    }
    assert "gfx942: compiled, never run." in done.stdout  # and what else is not known
    assert all(arch in done.stdout for arch in found)


def test_an_append_beside_the_scores_on_every_chip(tmp_path):
    """A kernel that no plan holds; where φ is a mean, and where it is an MLP."""
    done = compiling("-c", CHIPS, json.dumps(WITH_SELECTION), str(tmp_path / "found.json"), "decode_begin")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [r["arch"] for r in found] == [arch for arch in ("sm_80", "sm_90", "sm_100", "gfx942") for _ in range(2)]
    assert all(r["error"] is None and r["registers"] < 255 and r["spill_stores"] == 0 for r in found)


def test_a_whole_step_by_one_program_on_every_chip(tmp_path):
    """Another; also held to a quarter's registers, where it may spill a little."""
    branches = WITH_SELECTION["branches"] | {"selected": WITH_SELECTION["branches"]["selected"] | {"block": 32}}
    spec = json.dumps(WITH_SELECTION | {"branches": branches})  # of smaller blocks a crowd has no tile of its own
    done = compiling("-c", CHIPS, spec, str(tmp_path / "found.json"), "decode_whole")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [r["arch"] for r in found] == ["sm_80", "sm_80", "sm_90", "sm_90", "sm_100", "sm_100", "gfx942"]
    assert all(r["error"] is None for r in found)
    assert all(r["registers"] <= 128 for r in found[1:6:2])


# What the texts say.

LOG = """\
ptxas info    : 0 bytes gmem
ptxas warning : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'f'
ptxas info    : Compiling entry function 'f' for 'sm_90a'
    40 bytes stack frame, 52 bytes spill stores, 96 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 40 bytes cumulative stack size
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers
"""
PTX = "wgmma.mma_async.sync.aligned.m64\nmma.sync.aligned.m16n8k16\ntcgen05.mma.cta_group::1\nwgmma.mma_async.sync\n"
AMDGCN = """\
\tscratch_store_dwordx2 off, v[6:7], off offset:344 ; 8-byte Folded Spill
\tscratch_store_dword off, v46, off offset:64 ; 4-byte Folded Spill
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
\tscratch_load_dword v46, off, off offset:64 ; 4-byte Folded Reload
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 14
    .vgpr_count:     512
    .vgpr_spill_count: 3
"""


def test_what_ptxas_says():
    found = aot_listing.nvidia(PTX, LOG)
    warning = "(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'f'"
    assert found == aot_listing.Listing(255, 40, 52, 96, wgmma=2, mma=2, warnings=(warning,))
    assert found.spills
    assert not aot_listing.nvidia("", LOG.splitlines()[0]).spills


def test_what_amdgcn_says():
    assert aot_listing.amd(AMDGCN) == aot_listing.Listing(512, 12, 12, 4, mfma=1, scalar_spills=14)


def test_amd_s_tiles_fit_its_shared_memory():
    plan = api.compiled_of(api.read("nsa_128")).plan
    for kernel in plan.kernels:
        for bits in (16, 32):
            ours, theirs = (aot_chips.candidates(kernel, chip, bits) for chip in ("gfx942", "sm_80"))
            assert ours == [c for c in theirs if c.smem <= 65536] or ours == theirs[-1:]
    assert len(aot_chips.candidates(plan.kernel("window_fwd"), "gfx942", 16)) > 3


# What becomes of it.


@pytest.fixture
def job() -> aot.Job:
    return aot.jobs_of(api.compiled_of(api.read(SMALL)).plan, "sm_90", "bf16")[0]


GOOD = aot_listing.Listing(80, 0, 0, 0, wgmma=3, warnings=())
SPILLED = dataclasses.replace(GOOD, spill_stores=4, spill_loads=4)


def test_a_kernel_too_large_for_the_chip_is_an_error():
    def excess(shared: int, **more: Any) -> str | None:
        return aot._excess(SimpleNamespace(shared=shared, **more), aot_chips.CHIPS["sm_100"])

    assert excess(227 << 10) is None
    assert excess(232449) == "shared memory 232449 > 232448"
    assert excess(0, tmem_size=512) is None
    assert excess(0, tmem_size=1024) == "tensor memory 1024 > 512 columns"


@pytest.mark.parametrize(
    ("listing", "error", "code"),
    [(GOOD, None, 0), (SPILLED, None, 1), (GOOD, "shared memory 2 > 1", 1), (None, "MLIR refuses", 1)],
)
def test_the_exit_code_is_the_first_choice_s(job, listing, error, code, monkeypatch, tmp_path):
    first, second = aot.Report(job, listing, 1, error), aot.Report(job, SPILLED, 1)
    monkeypatch.setattr(tool, "compile_all", lambda *_: [first, second])
    done = CliRunner().invoke(app, ["compile", "tiny", "--json", str(tmp_path / "found.json")])
    assert done.exit_code == code
    assert (error or "") in done.stdout
    record = json.loads((tmp_path / "found.json").read_text())[0]
    assert record["error"] == error
    assert record["registers"] == (80 if listing else None)

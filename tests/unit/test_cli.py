"""The commands: what they print, where, and their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nsagen.cli import app

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
name: {name}
heads: {{query: 2, kv: 1, qk_dim: 16, v_dim: 16}}
kv: shared
branches:
  compressed: {{block: 8, stride: 4, pool: mean}}
  window: {{size: 6, sinks: 1}}
combine: gated_sum
"""
BAD = """\
name: bad
heads: {query: 8, kv: 4, qk_dim: 20}
branches:
  windw: {size: 3}
  window: {size: "4"}
"""
COMMANDS = ("check", "build", "explain", "verify", "compile", "tune", "bench", "list", "new", "schema")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty directory with a good and a bad spec, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "good.yaml").write_text(GOOD.format(name="good"))
    (tmp_path / "bad.yaml").write_text(BAD)
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), prog_name="nsagen")


def shell(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: for what must be set before triton is imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "nsagen", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("command", [(c,) for c in COMMANDS] + [("cache", "dir"), ("cache", "clear")], ids=" ".join)
def test_every_help_has_examples(command):
    done = run(*command, "--help")
    assert done.exit_code == 0
    assert "Examples" in done.stdout
    assert f"$ nsagen {' '.join(command)}" in done.stdout


def test_help_names_every_command():
    done = run("--help")
    assert done.exit_code == 0
    assert all(c in done.stdout for c in (*COMMANDS, "cache"))


def test_check():
    done = run("check", "good.yaml")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == "good.yaml: ok (good: compressed, window)\n"


def test_check_says_everything_about_every_file(here):
    (here / "worse.yaml").write_text("name: 5\n")
    done = run("check", "bad.yaml", "good.yaml", "worse.yaml", "absent.yaml")
    assert done.exit_code == 2
    assert done.stdout.startswith("good.yaml: ok")
    lines = done.stderr.splitlines()
    for place in (
        "bad.yaml:2:34: error: ",
        "bad.yaml:4:3: error: ",
        "bad.yaml:5:18: error: ",
        "worse.yaml:1:7: error: ",
    ):
        assert any(line.startswith(place) for line in lines), place
    assert any("absent.yaml" in line for line in lines)
    caret = lines[next(i for i, line in enumerate(lines) if line.startswith("bad.yaml:4:3")) + 2]
    assert caret == "    ^^^^^"


def test_a_diagnostic_is_never_wrapped(here):
    deep = here / ("d" * 120)
    deep.mkdir()
    (deep / "spec.yaml").write_text(BAD)
    done = shell("check", str(deep / "spec.yaml"), COLUMNS="40")
    assert done.returncode == 2
    assert sum(": error: " in line for line in done.stderr.splitlines()) == 3


def test_bad_usage_is_2():
    assert run("check").exit_code == 2
    assert run("compile", "good.yaml", "--arch", "sm_11").exit_code == 2
    assert run("nothing").exit_code == 2
    assert run("tune", "good.yaml").exit_code == 2  # a later issue's


def test_build_and_check(here):
    assert run("build", "good.yaml", "--check").exit_code == 1
    done = run("build", "good.yaml")
    assert (done.exit_code, done.stdout) == (0, "generated/good.py: built\n")
    assert run("build", "good.yaml", "--check").exit_code == 0
    path = here / "generated" / "good.py"
    path.write_text(path.read_text() + "# mine\n")
    done = run("build", "good.yaml", "--check")
    assert done.exit_code == 1
    assert "out of date" in done.stdout
    assert "-# mine" in done.stdout
    assert path.read_text().endswith("# mine\n")


def test_build_reads_every_spec_before_it_writes(here):
    done = run("build", "good.yaml", "bad.yaml", "--out", "o")
    assert done.exit_code == 2
    assert not (here / "o").exists()


def test_build_into_a_file_is_a_clean_line(here):
    done = run("build", "good.yaml", "--out", "good.yaml")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_what_cannot_be_compiled_is_a_clean_line(here):
    (here / "refused.yaml").write_text(
        "name: refused\nheads: {query: 4, kv: 4, qk_dim: 16}\nbranches: {selected: {from: caller}}\n"
    )
    done = run("explain", "refused.yaml")
    assert done.exit_code in (0, 2)  # 0 once the branch is there
    assert done.exit_code == 0 or done.stderr.startswith("refused.yaml: error: ")


def test_explain_summary():
    done = run("explain", "good.yaml")
    assert done.exit_code == 0
    for text in ("KERNEL window_fwd", "because", "mask none", "tile sm_90 16-bit", "dropped for", "128k", "dense ms"):
        assert text in done.stdout, text


def test_explain_after_and_diff():
    assert run("explain", "good.yaml", "--after", "lower").stdout.startswith("graph good")
    assert run("explain", "good.yaml", "--after", "choose_tiles").stdout.startswith("plan good")
    done = run("explain", "good.yaml", "--diff", "--after", "split_loops")
    assert "--- after derive_bounds" in done.stdout
    assert "\n+    seg" in done.stdout
    assert run("explain", "good.yaml", "--diff").stdout.count("+++ after ") >= 5
    wrong = run("explain", "good.yaml", "--after", "nothing")
    assert wrong.exit_code == 2
    assert "choose_strategy" in wrong.stderr


def test_explain_plot(here, monkeypatch):
    assert run("explain", "good.yaml", "--plot", "p.png").exit_code == 0
    assert (here / "p.png").read_bytes().startswith(b"\x89PNG")
    assert run("explain", "good.yaml", "--plot", "no/such/p.png").exit_code == 2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("explain", "good.yaml", "--plot", "p.png")
    assert done.exit_code == 2
    assert "--plot needs matplotlib: install it with `pip install 'nsagen[bench]'`" in done.stderr


def test_new(here):
    done = run("new", "mine")
    assert (done.exit_code, done.stdout) == (0, "wrote mine.yaml\n")
    text = (here / "mine.yaml").read_text()
    assert text.count("#") > 5
    assert run("check", "mine.yaml").exit_code == 0
    assert run("explain", "mine.yaml", "--after", "place_accesses").exit_code == 0
    again = run("new", "mine")
    assert again.exit_code == 2
    assert "exists" in again.stderr
    assert (here / "mine.yaml").read_text() == text


def test_new_from_a_ready_spec(here):
    from nsagen.api import ready_specs

    for ready in ready_specs():
        assert run("new", f"my_{ready}", "--from", ready).exit_code == 0
        assert run("check", f"my_{ready}.yaml").stdout.startswith(f"my_{ready}.yaml: ok (my_{ready}: ")
    assert run("new", "other", "--from", "nothing").exit_code == 2


def test_new_refuses_what_is_no_name(here):
    for name in ("torch", "1st", "../up", "Caps"):
        assert run("new", name).exit_code == 2
    assert not list(here.parent.glob("up.yaml"))
    assert not (here / "torch.yaml").exists()


def test_list_and_schema():
    from nsagen.api import ready_specs

    done = run("list")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in ready_specs())
    assert "properties" in json.loads(run("schema").stdout)


def test_cache(here):
    assert run("cache", "dir").stdout == f"{here / 'cache'}\n"
    assert run("cache", "clear").exit_code == 0


def test_python_m():
    done = shell("check", "good.yaml")
    assert (done.returncode, done.stdout) == (0, "good.yaml: ok (good: compressed, window)\n")
    assert shell("--version").stdout.startswith("nsagen ")


def test_compile(here):
    done = shell("compile", "good.yaml", "--json", "c.json", TRITON_INTERPRET="1")  # compiles all the same
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((here / "c.json").read_text())
    kernels = {r["kernel"] for r in records}
    assert {"window_fwd", "window_dq", "window_dkv", "compressed_fwd", "combine_fwd"} <= kernels
    assert all(r["arch"] == "sm_90" and 0 < r["registers"] <= 255 and not r["error"] for r in records)
    assert all(kernel in done.stdout for kernel in kernels)


def test_verify(here):
    done = shell("verify", "good.yaml", "--device", "cpu", "--length", "19", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("T=19", "out", "dq", "dgates", "window_attention lse", "interpreter"):
        assert text in done.stdout, text


MUTANT = """
import dataclasses, os
os.environ["TRITON_INTERPRET"] = "1"
from nsagen.api import compiled_of, read
from nsagen.tools.verify import Request, run
good = compiled_of(read("good.yaml"))
source = good.source.replace("s > t - 6", "s > t - 5")  # the window one token short
assert source != good.source
bad = dataclasses.replace(good, source=source.replace(good.digest, "0" * 12), digest="0" * 12)
raise SystemExit(0 if run(bad, Request("good.yaml", (9,), None, 5, "cpu", True)) else 1)
"""


def test_verify_finds_a_wrong_mask_and_says_how_to_see_it_again(here):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MUTANT], capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED fp32 packed 9, seed 5" in done.stdout
    assert "  out [1, 9, 2, 16]: error" in done.stdout
    assert "again: nsagen verify good.yaml --length 9 --dtype fp32 --packed --seed 5 --device cpu" in done.stdout


def test_verify_refuses_what_it_cannot_run():
    import torch

    done = shell("verify", "good.yaml", "--device", "cpu", "--dtype", "bf16")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    if not torch.cuda.is_available():
        done = run("verify", "good.yaml", "--device", "cuda")
        assert done.exit_code == 2
        assert "no CUDA device" in done.stderr


def test_a_case_passes_only_with_numbers():
    from nsagen.tools.compare import Result

    assert Result("out", 1e-5, 1e-4, ()).good
    assert not Result("out", 1e-3, 1e-4, ()).good
    assert not Result("out", float("nan"), 1e-4, ()).good


def test_pairs_are_the_keys_that_the_predicate_holds():
    from nsagen.ir.graph import BlockList, KeyAxis, Piece
    from nsagen.sym import KEY, QUERY, le, lt, multiple
    from nsagen.tools.costs import pairs

    tokens, blocks = KeyAxis("T"), KeyAxis("c", 8, 4)
    window = Piece("window", (le(KEY, QUERY), lt(QUERY - 7, KEY)))
    sinks = Piece("sinks", (lt(KEY, 3), le(KEY, QUERY - 7)))
    ended = Piece("ended", (le(KEY * 4 + 7, QUERY),))
    thinned = Piece("thinned", (le(KEY, QUERY), multiple(QUERY - KEY, 3)))
    for length in (1, 6, 29):
        for piece, axis in ((window, tokens), (sinks, tokens), (ended, blocks), (thinned, tokens)):
            keys = length if axis is tokens else max(0, (length - 8) // 4 + 1)
            held = [all(c.holds({"t": t, "s": s}) for c in piece.where) for t in range(length) for s in range(keys)]
            assert pairs(piece, axis, length) == sum(held), (piece.name, length)
    causal = Piece("causal", (le(KEY, QUERY),))
    listed = sum(min(t + 1, 4 + t % 4 + 1) for t in range(29))  # a full block and the query's own, up to itself
    assert pairs(causal, tokens, 29, BlockList("blocks", 4, 2)) == listed

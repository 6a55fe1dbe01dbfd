"""`nsagen bench`: the command on the CPU, what it says of rows, and rivals that fail without harm to the others."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nsagen.cli import app
from nsagen.errors import NsagenError
from nsagen.tools import bench_report as report
from nsagen.tools.bench import Request, lengths_of, run
from nsagen.tools.bench_clock import OUT_OF_MEMORY, Clock, Row
from nsagen.tools.bench_inputs import Case, Work

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    Row("whole", "whole", 4096, 2.0, 8.0, 1.5),
    Row("whole", "whole", 8192, 4.0, 16.0, 3.0),
    Row("select_blocks", "part", 4096, 0.25, None, 0.5, "a choice of blocks has no gradient"),
    Row("select_blocks", "part", 8192, 0.5, None, 0.5, "a choice of blocks has no gradient"),
    Row("dense A", "dense", 4096, 3.0, 9.0, 1.0),
    Row("dense A", "dense", 8192, None, None, None, OUT_OF_MEMORY),
    Row("dense B", "dense", 4096, 1.0, 4.0, 1.0, note="with a grain of salt"),
    Row("dense B", "dense", 8192, 8.0, 32.0, 1.0, note="with a grain of salt"),
]


def shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one interprets kernels."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NSAGEN_CACHE_DIR": str(folder / "cache")}
    environment["OMP_NUM_THREADS"] = "1"  # other tests run beside it
    command = [sys.executable, "-m", "nsagen", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def work(size: int = 4) -> Work:
    x = torch.randn(size, requires_grad=True)
    return Work(lambda: (x * 2,), [x], [torch.ones(size)])


def test_the_tables():
    lines = report.text(ROWS).splitlines()
    assert lines[0] == "forward, ms       4k     8k"
    assert lines[1] == "whole          2.000  4.000"
    assert lines[3] == "dense A        3.000      –"
    assert "select_blocks      –       –" in lines
    assert "forward + backward   0.50  2.00" in lines
    assert "– dense A at 8k: out of memory" in lines
    assert "– select_blocks at 4k, 8k: a choice of blocks has no gradient" in lines
    assert "dense B: with a grain of salt" in lines
    assert lines.count("dense B: with a grain of salt") == 1
    assert any(line.startswith("break-even forward + backward: about 5,793 tokens") for line in lines)


def test_predictions_stand_below_what_was_measured():
    rows = [dataclasses.replace(r, predicted_forward_ms=2.5 if r.name == "whole" else None) for r in ROWS]
    lines = report.text(rows).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["whole", "2.000", "4.000"], ["predicted", "2.500", "2.500"], ["ratio", "0.80", "1.60"],
    ]  # fmt: skip
    assert sum("predicted" in line for line in lines) == 2  # and the line that says what it is
    assert any("1 of 2 within 25 %" in line for line in lines)
    assert (rows[0].record()["forward_ratio"], rows[0].record()["backward_ratio"]) == (0.8, None)


def test_a_call_takes_no_less_than_the_host():
    of_whole = {"predicted_forward_ms": 0.5, "host_forward_ms": 1.9}
    rows = [dataclasses.replace(r, **of_whole) if r.name == "whole" else r for r in ROWS]
    lines = report.text(rows).splitlines()
    assert [line.split() for line in lines[2:5]] == [
        ["predicted", "0.500", "0.500"], ["host", "1.900", "1.900"], ["ratio", "1.05", "2.11"],
    ]  # fmt: skip
    assert any("1 of 2 within 25 %" in line for line in lines)
    more = dataclasses.replace(rows[0], predicted_forward_ms=4.0)
    assert more.forward_ratio == 0.5  # the host waits


def test_the_host_is_timed_where_a_call_of_ours_is_short(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Clock, "_ms", lambda self, call, leaves: float(leaves[0]))
    calls = [0]
    for ms, with_host, timed in ((1.0, True, True), (5.0, True, False), (1.0, False, False)):
        found: dict[str, float] = {}
        leaves = [torch.tensor(ms)]
        Clock("cuda", 1)._time("forward", [lambda: calls.append(1)], leaves, found, with_host)
        assert found["forward_ms"] == ms
        assert (found.get("host_forward_ms", -1.0) >= 0) == timed
    assert len(calls) == 22


def test_the_clock_asks_the_model():
    clock = Clock("cpu", 1, backward=False, predict=lambda case, tokens: (0.5 * tokens, 1.0))
    row = clock.row(Case("whole", "whole", lambda length, seed: work()), 8)
    assert (row.predicted_forward_ms, row.predicted_backward_ms) == (4.0, None)
    assert row.forward_ratio == row.forward_ms / 4.0


def test_without_backward_or_rivals_the_text_says_nothing_of_them():
    rows = [dataclasses.replace(r, backward_ms=None, reason=None) for r in ROWS]
    text = report.text(rows)
    assert "backward" not in text
    assert "break-even forward: " in text
    alone = report.text([r for r in rows if r.kind == "whole"])
    assert "break-even" not in alone
    assert "dense" not in alone


def test_a_reason_is_said_where_nothing_was_measured():
    text = report.text([Row("whole", "whole", 64, reason="RuntimeError: broken")])
    assert text == "– whole at 64: RuntimeError: broken"


def test_a_case_that_fails_leaves_the_others_alone():
    def broken(length: int, seed: int) -> Work:
        raise RuntimeError("no kernel\nsecond line")

    def hungry(length: int, seed: int) -> Work:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate everything")

    clock = Clock("cpu", 1)
    for length in (8, 16):
        for name, make in (("broken", broken), ("hungry", hungry), ("good", lambda length, seed: work())):
            clock.row(Case(name, "dense", make), length)
    reasons = {(r.name, r.length): r.reason for r in clock.rows}
    assert reasons["broken", 8] == reasons["broken", 16] == "RuntimeError: no kernel"
    assert reasons["hungry", 8] == reasons["hungry", 16] == OUT_OF_MEMORY
    assert reasons["good", 8] is reasons["good", 16] is None
    assert all((r.forward_ms is not None) == (r.backward_ms is not None) == (r.name == "good") for r in clock.rows)


def test_a_backward_that_fails_keeps_the_forward():
    x = torch.randn(4, requires_grad=True)
    calls: list[int] = []

    class Fails(Work):
        def backward(self, outs):
            calls.append(1)
            if len(calls) > 1:  # once to warm up
                raise RuntimeError("out of memory")

    row = Clock("cpu", 1).row(Case("c", "dense", lambda length, seed: Fails(lambda: (x * 2,), [x], [x])), 8)
    assert row.forward_ms is not None
    assert (row.backward_ms, row.reason) == (None, OUT_OF_MEMORY)


def test_too_slow_is_foreseen_for_rivals_alone():
    rows = [Row(kind, kind, 1024, 500.0, 600.0) for kind in ("whole", "part", "dense", "peer")]
    clock = Clock("cpu", 1, slowest=4.0, rows=rows)
    found = {kind: clock.row(Case(kind, kind, lambda length, seed: work()), 2048) for kind in ("whole", "dense")}
    assert found["whole"].reason is None
    assert "too slow: over 4 s" in (found["dense"].reason or "")
    again = clock.row(Case("dense", "dense", lambda length, seed: work()), 4096)
    assert again.reason == found["dense"].reason


def test_after_out_of_memory_a_greater_length_is_not_tried():
    clock = Clock("cpu", 1, rows=[Row("d", "dense", 1024, reason=OUT_OF_MEMORY)])
    row = clock.row(Case("d", "dense", lambda length, seed: pytest.fail("tried")), 2048)
    assert row.reason == OUT_OF_MEMORY


def test_sets_of_inputs_take_turns_and_gradients_are_not_added_up():
    seeds: list[int] = []

    def make(length: int, seed: int) -> Work:
        seeds.append(seed)
        return work()

    row = Clock("cpu", 1).row(Case("c", "part", make), 8)
    assert (seeds, row.reason) == ([0, 1, 2], None)


def test_forward_only_cases_say_why():
    case = Case("c", "part", lambda length, seed: Work(lambda: (torch.ones(1),)), "no gradient")
    assert Clock("cpu", 1).row(case, 8).reason == "no gradient"
    assert Clock("cpu", 1, backward=False).row(case, 8).reason is None


def test_lengths():
    assert lengths_of(Request("s", "8k,100, 4096")) == [100, 4096, 8192]
    assert lengths_of(Request("s")) == [4096 << i for i in range(6)]
    for wrong in ("", "x", "0", "-4", "4096,k", "1e3", "99999999k"):
        with pytest.raises(NsagenError, match="--lengths"):
            lengths_of(Request("s", wrong or ","))


def test_the_command_is_written_out():
    request = Request("my spec.yaml", "4k", forward_only=True, parts=False, against="fa2,fa3")
    assert request.command == (
        "nsagen bench 'my spec.yaml' --lengths 4096 --dtype bf16 --device cuda --rep 200 --slowest 4 "
        "--against fa2,fa3 --forward-only --no-parts"
    )


def test_the_default_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report.default_file("a", "bf16", {"gpu": "NVIDIA H200"}) == Path("h200_a_bench_bf16.json")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    found = report.default_file("a", "fp16", {"gpu": "NVIDIA H100 80GB HBM3"})
    assert found == Path("benchmarks/results/h100_80gb_hbm3_a_bench_fp16.json")


def test_the_commit_is_that_of_a_source_tree_alone(tmp_path):
    assert report.commit(tmp_path) is None
    (tmp_path / ".git").mkdir()
    assert report.commit(tmp_path) is None  # no repository after all


def test_the_command_on_the_cpu(tmp_path):
    done = shell(
        tmp_path, "tiny", "--device", "cpu", "--lengths", "20,33", "--rep", "1", "--json", "b.json", "--plot", "b.png",
        "--against", "sdpa,fa2,fla",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    parts = ("whole", "compressor", "compressed_attention", "select_blocks", "selected_attention", "window_attention")
    for text in (*parts, "dense SDPA", "forward, ms", "backward, ms", "break-even forward + backward", "torch path"):
        assert text in done.stdout, text
    assert "– dense FA2 at 20, 33: it needs a CUDA device" in done.stdout
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "b.json").read_text())
    assert {"gpu", "torch", "triton", "nsagen", "commit", "command", "spec", "dtype", "break_even", "rows"} <= set(
        found
    )
    assert found["command"].startswith("nsagen bench tiny --lengths 20,33 --dtype bf16 --device cpu")
    rows = {(r["name"], r["length"]): r for r in found["rows"]}
    assert set(rows) == {(n, t) for n in (*parts, "dense SDPA", "dense FA2", "fla NSA") for t in (20, 33)}
    for name in (*parts, "dense SDPA"):
        assert rows[name, 33]["forward_ms"] > 0
        assert (rows[name, 33]["backward_ms"] is None) == (name == "select_blocks")


def test_forward_only_without_parts(tmp_path):
    done = shell(tmp_path, "tiny", "--device", "cpu", "--lengths", "20", "--rep", "1", "--no-parts", "--forward-only",
                 "--against", "none")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "whole" in done.stdout
    assert not any(word in done.stdout for word in ("backward", "dense", "window_attention", "wrote"))
    assert not list(tmp_path.glob("*.json"))


def test_what_cannot_work_is_one_line_and_2():
    for options, text in (
        (["--lengths", "a"], "--lengths 'a'"),
        (["--json", "no/such/b.json"], "there is no folder no/such"),
        (["--plot", "b.nothing"], "ends in one of"),
    ):
        done = CliRunner().invoke(app, ["bench", "tiny", *options])
        assert (done.exit_code, done.stdout) == (2, ""), options
        assert done.stderr.startswith("error: "), done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert text in done.stderr
    assert CliRunner().invoke(app, ["bench", "tiny", "--dtype", "fp32"]).exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu(tmp_path):
    done = shell(tmp_path, "tiny")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no CUDA device" in done.stderr
    assert "--device cpu" in done.stderr


def test_an_interrupt_tells_what_is_there(monkeypatch, capsys):
    from nsagen.api import compiled_of, read
    from nsagen.tools import bench

    def cases(length: int, seed: int) -> Work:
        if length > 8:
            raise KeyboardInterrupt
        return work()

    monkeypatch.setattr(bench, "settle", lambda json, plot, device: None)
    monkeypatch.setattr(bench, "_prepared", lambda c, r: (Clock("cpu", 1), [Case("whole", "whole", cases)]))
    assert not run(compiled_of(read("tiny")), Request("tiny", "8,16", device="cpu"))
    told = capsys.readouterr()
    assert "interrupted" in told.err
    assert "whole" in told.out


def test_a_missing_matplotlib_is_named_before_anything_runs(monkeypatch):
    from nsagen.api import compiled_of, read

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(NsagenError, match=r"pip install 'nsagen\[bench\]'"):
        run(compiled_of(read("tiny")), Request("tiny", "8", device="cpu", plot=Path("b.png")))

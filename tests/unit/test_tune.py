"""`nsagen tune` without a GPU: the search, its store and its table, with a measurer that makes up times."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nsagen import api
from nsagen.cli import app
from nsagen.errors import NsagenError
from nsagen.runtime import cache, launch, tuned
from nsagen.runtime.launch import Chip, Config
from nsagen.runtime.tuned import Place
from nsagen.tools import measured, tune, tune_compile, tune_measure
from nsagen.tools.tune import Bench, Request
from nsagen.tools.tune_search import CandidateFailed, DeviceLost, Rounds, Subject, TooLarge, Tried, rounds, search

ROOT = Path(__file__).resolve().parents[2]
AT = Place("NVIDIA H200", "3.6.0", "16", 8192)
A, B, C = Config(64, 64, 4, 3, 1), Config(32, 64, 4, 2, 1), Config(128, 64, 8, 3, 1)
ONE = Subject("one_fwd", "0" * 12, (A, B, C))
TWO = Subject("two_fwd", "1" * 12, (A, B))


pytestmark = pytest.mark.usefixtures("folder")


class Fake:
    """A measurer: 1 + bm/100 ms for everything that does not `fail`; `stop` is raised in the call of that number."""

    def __init__(self, fail: tuple[tuple[str, Config], ...] = (), stop: dict[int, BaseException] | None = None) -> None:
        self.fail, self.stop = fail, stop or {}
        self.prepared, self.calls = 0, list[Tried]()

    def prepare(self) -> None:
        self.prepared += 1

    def __call__(self, tried: Tried) -> dict[str, float]:
        self.calls.append(dict(tried))
        if (error := self.stop.get(len(self.calls))) is not None:
            raise error
        if any(item in self.fail for item in tried.items()):
            raise CandidateFailed("out of resource")
        return {kernel: round(1 + config.bm / 100, 4) for kernel, config in tried.items()}


def bench(measurer: Fake, compiled: list[tuple[Rounds, int]] | None = None) -> Bench:
    def compile_(wanted: Rounds, length: int) -> None:
        if compiled is not None:
            compiled.append((wanted, length))

    return Bench(lambda n: AT._replace(length=n), compile_, lambda n: measurer)


def times(subject: Subject, length: int = 8192) -> tuned.Times:
    return tuned.measured(subject.kernel, subject.key).get(AT._replace(length=length), {})


# The search.


def test_a_round_is_the_next_candidate_of_every_kernel():
    assert rounds([ONE, TWO], AT) == [{"one_fwd": A, "two_fwd": A}, {"one_fwd": B, "two_fwd": B}, {"one_fwd": C}]
    tuned.record("one_fwd", ONE.key, AT, {A.label: 1.0, B.label: None})
    assert rounds([ONE, TWO], AT) == [{"one_fwd": C, "two_fwd": A}, {"two_fwd": B}]
    assert len(rounds([ONE, TWO], AT, force=True)) == 3
    assert len(rounds([ONE, TWO], AT._replace(length=1))) == 3
    assert rounds([], AT) == []


def test_everything_is_measured_once_and_kept():
    measurer, seen = Fake(), []
    search([ONE, TWO], AT, rounds([ONE, TWO], AT), measurer, lambda tried, ms: seen.append((tried, ms)))
    assert (measurer.prepared, len(measurer.calls), len(seen)) == (1, 3, 5)
    assert times(ONE) == {A.label: 1.64, B.label: 1.32, C.label: 2.28}
    assert times(TWO) == {A.label: 1.64, B.label: 1.32}
    again = Fake()
    search([ONE, TWO], AT, rounds([ONE, TWO], AT), again, lambda *_: None)
    assert (again.prepared, again.calls) == (0, [])


def test_adding_one_candidate_measures_one():
    tune.tune([TWO], Request("", (8192,)), bench(Fake()))
    more, measurer = Subject(TWO.kernel, TWO.key, (C, A, B)), Fake()
    tune.tune([more], Request("", (8192,)), bench(measurer))
    assert measurer.calls == [{"two_fwd": C}]


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_a_candidate_that_fails_is_found_among_the_others(count):
    subjects = [Subject(f"k{i}_fwd", f"{i:012}", (A, B)) for i in range(count)]
    bad = subjects[count // 2]
    measurer = Fake(fail=((bad.kernel, B),))
    search(subjects, AT, rounds(subjects, AT), measurer, lambda *_: None)
    assert times(bad) == {A.label: 1.64, B.label: None}
    assert all(times(s) == {A.label: 1.64, B.label: 1.32} for s in subjects if s is not bad)
    assert len(measurer.calls) <= 2 + 2 * count.bit_length()
    assert tuned.fastest(bad.kernel, bad.key, AT, bad.labels) == A.label


def test_a_candidate_that_breaks_the_gpu_alone_is_passed_by_next_time():
    with pytest.raises(DeviceLost):
        search([ONE], AT, rounds([ONE], AT), Fake(stop={2: DeviceLost("illegal access")}), lambda *_: None)
    assert times(ONE) == {A.label: 1.64, B.label: None}
    assert rounds([ONE], AT) == [{"one_fwd": C}]


def test_where_several_break_the_gpu_none_is_blamed():
    with pytest.raises(DeviceLost):
        search([ONE, TWO], AT, rounds([ONE, TWO], AT), Fake(stop={2: DeviceLost("illegal access")}), lambda *_: None)
    assert set(times(ONE)) == set(times(TWO)) == {A.label}


# The command.


def test_an_interruption_keeps_what_is_done_and_the_same_command_goes_on(capsys):
    request, first, second = Request("", (8192,)), Fake(stop={3: KeyboardInterrupt()}), Fake()
    assert not tune.tune([ONE, TWO], request, bench(first))
    assert "1 candidates are not measured yet, the same command goes on" in capsys.readouterr().err
    assert tune.tune([ONE, TWO], request, bench(second))
    assert second.calls == [{"one_fwd": C}]


def test_a_warm_cache_compiles_and_measures_nothing():
    compiled: list[tuple[Rounds, int]] = []
    request = Request("", (8192, 65536))
    assert tune.tune([ONE, TWO], request, bench(Fake(), compiled))
    assert [(len(wanted), n) for wanted, n in compiled] == [(3, 8192), (3, 65536)]
    warm = Fake()
    assert tune.tune([ONE, TWO], request, bench(warm, compiled))
    assert (warm.calls, len(compiled)) == ([], 2)
    assert tune.tune([ONE, TWO], Request("", (8192,), force=True), bench(warm, compiled))
    assert (len(warm.calls), len(compiled)) == (3, 3)


def test_a_length_that_does_not_fit_is_left_out(capsys):
    class Small(Fake):
        def prepare(self) -> None:
            raise TooLarge("CUDA out of memory")

    measurers = {65536: Small(), 8192: Fake()}
    machine = Bench(lambda n: AT._replace(length=n), lambda *_: None, lambda n: measurers[n])
    assert tune.tune([ONE], Request("", (65536, 8192)), machine)
    assert "65536 tokens are left out: CUDA out of memory" in capsys.readouterr().err
    assert (times(ONE, 65536), len(times(ONE))) == ({}, 3)


def test_first_choices_that_fail_are_an_error():
    class Broken(Fake):
        def prepare(self) -> None:
            raise CandidateFailed("ptxas said no")

    with pytest.raises(NsagenError, match=r"8192 tokens: the kernels do not run .*: ptxas said no"):
        tune.tune([ONE], Request("", (8192,)), bench(Broken()))


def test_the_table():
    tune.tune([ONE, TWO], Request("", (8192,)), bench(Fake(fail=(("two_fwd", A),))))
    lines = tune.text([ONE, TWO], [AT, AT._replace(length=1)]).splitlines()
    assert lines[0].startswith("NVIDIA H200, triton 3.6.0, 16: kept in ")
    assert lines[2].split() == ["one_fwd", "8192", "3/3", "64x64w4s3", "1.640", "32x64w4s2", "1.320", "24.2%"]
    assert lines[3].split() == ["two_fwd", "8192", "1/2", "64x64w4s3", "failed", "32x64w4s2", "1.320", "-"]
    assert len(lines) == 4


def test_progress_without_a_terminal_is_a_line_a_measurement(capsys):
    tune.tune([TWO], Request("", (8192,)), bench(Fake()))
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        "8192 two_fwd: 64x64w4s3 1.640 ms, best 64x64w4s3 1.640 ms",
        "8192 two_fwd: 32x64w4s2 1.320 ms, best 32x64w4s2 1.320 ms",
    ]


def test_the_bars_show_kernel_candidate_and_best():
    import io

    from rich.console import Console
    from rich.progress import Progress

    from nsagen.tools.tune_progress import Board, columns

    out = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(*columns(), console=out) as progress:
        board = Board(progress, [ONE], AT, rounds([ONE], AT))
        search([ONE], AT, rounds([ONE], AT), Fake(), board.measured)
    shown = out.file.getvalue()  # pyright: ignore
    assert all(x in shown for x in ("one_fwd", "128x64w8s3 2.280 ms", "best 32x64w4s2 1.320 ms", "3/3"))


def test_an_export_is_what_a_package_ships(tmp_path):
    tune.tune([ONE], Request("", (8192, 65536)), bench(Fake()))
    tuned.record(ONE.kernel, ONE.key, AT._replace(gpu="another"), {A.label: 0.1})
    file = tmp_path / "shipped" / "nvidia_h200.json"
    tune.export([ONE, TWO], AT, file)
    tune.tune([TWO], Request("", (8192,)), bench(Fake()))
    tune.export([TWO], AT, file)
    found = tuned.parse(file.read_text())
    assert {k: sorted(p.length for p in places) for k, places in found.items()} == {
        ("one_fwd", ONE.key): [8192, 65536],
        ("two_fwd", TWO.key): [8192],
    }
    cache.clear()
    tuned._shipped.cache_clear()
    assert tuned.fastest("one_fwd", ONE.key, AT, ONE.labels) == B.label


def test_without_a_gpu_it_says_so():
    done = CliRunner().invoke(app, ["tune", "tiny"], prog_name="nsagen", env={"TRITON_INTERPRET": ""})
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert done.exit_code == 2
    assert "error: " in done.stderr


def test_interrupted_is_130(monkeypatch):
    monkeypatch.setattr(tune, "run", lambda request: False)
    assert CliRunner().invoke(app, ["tune", "tiny"]).exit_code == 130
    monkeypatch.setattr(tune, "run", lambda request: True)
    assert CliRunner().invoke(app, ["tune", "tiny", "--length", "7", "--dtype", "fp16"]).exit_code == 0


# A module.

SPEC = {
    "name": "to_tune",
    "heads": {"query": 2, "kv": 1, "qk_dim": 16, "v_dim": 16},
    "kv": "shared",
    "branches": {"compressed": {"block": 8, "stride": 4, "pool": "linear"}, "window": {"size": 8}},
    "combine": "gated_sum",
}
CALLER = {
    **SPEC,
    "name": "to_tune_too",
    "kv": "per_branch",
    "branches": {
        "selected": {"block": 8, "top_n": 3, "initial": 0, "local": 1, "from": "caller"},
        "window": {"size": 8},
    },
}


def test_the_subjects_of_a_module(monkeypatch):
    monkeypatch.setattr(launch, "chip", lambda index: Chip("sm_90", 227 << 10, "NVIDIA H200"))
    module = api.load(SPEC)
    subjects = tune.subjects_of(module, Request("", candidates=5))
    assert {s.kernel for s in subjects} == {f"{b}_{k}" for b in ("compressed", "window") for k in ("fwd", "dq", "dkv")}
    assert all(len(s.configs) == 5 for s in subjects)
    assert all(s.key == module._CONFIGS[s.kernel].key for s in subjects)
    assert len(tune.subjects_of(module, Request("", candidates=99))[0].configs) >= 8


@pytest.mark.parametrize("spec", [SPEC, CALLER], ids=lambda s: s["name"])
def test_the_inputs_run_a_module_and_a_forced_tile_is_what_runs(spec):
    module = api.load(spec)
    x = tune_measure.inputs_of(module, 21, torch.float32, 0, device="cpu")
    config = Config(32, 16, 4, 1, 0)
    found = []
    for tried in ({}, {"window_fwd": config}):
        with tune_measure.forced(module._CONFIGS, tried):
            assert (module._CONFIGS["window_fwd"].forced == config) == bool(tried)
            out = module.attention(*x.arguments, **({} if x.blocks is None else {"blocks": x.blocks}))
            found.append([out, *torch.autograd.grad(out, x.leaves, x.d_out)])
    assert module._CONFIGS["window_fwd"].forced is None
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found, strict=True))
    assert all(bool(a.isfinite().all()) for a in found[0])


def test_a_candidate_with_other_results_fails():
    measurer = tune_measure.GpuMeasurer.__new__(tune_measure.GpuMeasurer)
    measurer.reference = [torch.ones(100)]
    measurer._check([torch.ones(100) * 1.01])
    for wrong in (torch.ones(100) * 1.2, torch.full((100,), float("nan"))):
        with pytest.raises(CandidateFailed):
            measurer._check([wrong])


def test_an_import_of_a_module_s_file(tmp_path):
    path = api.build(SPEC, tmp_path)
    assert tune_compile.import_file(str(path)).SPEC["name"] == "to_tune"
    for bad in (tmp_path / "__init__.py", tmp_path / "absent.py"):
        with pytest.raises(NsagenError, match="is no generated module"):
            tune_compile.import_file(str(bad))


def test_a_compilation_is_short_and_as_divisible():
    for length in (1, 700, 4096, 4097, 8192, 65536, 65535, 100_000):
        short = tune_compile.short(length)
        assert short <= max(length, 8192)
        assert (short - length) % 4096 == 0
    assert tune_compile.short(65536) == 4096


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_costs_only_its_share(monkeypatch):
    monkeypatch.setattr(tune_compile, "_cores", lambda: 2)
    monkeypatch.setattr(tune_compile, "_start", die)
    assert len(list(tune_compile.compile_all([{"one_fwd": A}, {"one_fwd": B}], "no.py", 8192, "bf16"))) <= 2


def test_a_compilation_serves_every_length_that_is_specialised_alike(monkeypatch):
    compiled: list[int] = []
    monkeypatch.setattr(tune_compile, "compile_all", lambda wanted, path, length, dtype: compiled.append(length) or [])
    compile_ = tune.bench_of(api.load(SPEC), Request("")).compile
    for length in (8192, 65536, 8200, 8192):
        compile_([{"window_fwd": A}], length)
    compile_([{"window_fwd": B}], 8192)
    assert compiled == [8192, 8200, 8192]


def test_one_round_needs_no_processes():
    assert list(tune_compile.compile_all([{"one_fwd": A}], "no.py", 8192, "bf16")) == []


def test_an_interruption_ends_the_compiling_processes():
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
    pool.submit(time.sleep, 600)
    with pytest.raises(KeyboardInterrupt), tune_compile._pool(pool):
        raise KeyboardInterrupt
    deadline = time.monotonic() + 10
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(multiprocessing.active_children()) - before


# Explain.


def test_explain_shows_measured_beside_predicted():
    plan = api.compiled_of(api.read("nsa_128")).plan
    assert measured.lines(plan) == []
    key = measured.kernel_keys(plan)["window_fwd"]
    first, other = list(measured._tiles(plan.kernel("window_fwd"), AT, {"128x64w4s3ws"}))[:2]
    assert first == "128x64w4s3ws"  # of the chip that has this form
    tuned.record("window_fwd", key, AT, {first: 0.5, other: 0.4})
    tuned.record("window_fwd", key, AT._replace(gpu="NVIDIA A100"), {other: 0.7})
    a100, h200 = (line.split() for line in measured.lines(plan)[-1].splitlines()[1:])
    assert (h200[0], h200[6], h200[8], h200[9], h200[11]) == ("window_fwd", first, "0.500", other, "0.400")
    assert all(0.05 < float(x) < 1.0 for x in (h200[7], h200[10]))  # the forecast
    assert (a100[7], a100[8], a100[10]) == ("-", "-", "-")


LIGHT = """
import sys
for absent in ("pydantic", "sympy", "platformdirs"):
    sys.modules[absent] = None
from nsagen.tools import tune
assert "triton" not in sys.modules
from nsagen.tools.tune_compile import import_file
assert import_file(sys.argv[1])._CONFIGS
"""


def test_a_module_s_file_is_tuned_without_the_compiler(tmp_path):
    path = api.build(SPEC, tmp_path)
    done = subprocess.run([sys.executable, "-c", LIGHT, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

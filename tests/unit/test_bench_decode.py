"""`nsagen bench --decode`: the grid and its bytes, the step over a filled cache, what is said of the rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_bench import shell
from typer.testing import CliRunner

from nsagen.api import compiled_of, module_of, read
from nsagen.cli import app
from nsagen.errors import NsagenError
from nsagen.tools import bench_clock, decode_cases, decode_clock
from nsagen.tools import decode_report as report
from nsagen.tools.bench_clock import OUT_OF_MEMORY
from nsagen.tools.bench_decode import Request
from nsagen.tools.bench_inputs import Setting
from nsagen.tools.decode_cases import Case, Step, dense, ours
from nsagen.tools.decode_clock import Clock, Row, over_round
from nsagen.tools.decode_grid import Point, Serving, dense_bytes, grid_of, nsa_bytes, round_of
from nsagen.tools.decode_plot import plot
from nsagen.tools.kernel_times import kernel_times

H200 = 4.3e12


def setting_of(name: str) -> Setting:
    return Setting(read(name), torch.float32, "cpu")


def test_the_default_grid_follows_the_size_of_the_cache():
    grid = grid_of(None, read("nsa_128"), "cuda")
    assert [p.label for p in grid] == ["8kx256", "16kx128", "32kx64", "64kx32", "128kx16", "8kx1", "64kx1", "128kx1"]
    assert {dense_bytes(read("nsa_128"), p) for p in grid[:5]} == {4 << 30}
    assert grid_of(None, read("nsa_paper"), "cuda")[0] == Point(8192, 204)  # dims 192/128
    assert all(p.context < 200 for p in grid_of(None, read("tiny"), "cpu"))


def test_a_grid_of_ones_own():
    assert grid_of("8kx256, 100X1,8k×256", read("tiny"), "cpu") == [Point(8192, 256), Point(100, 1)]
    for wrong in ("", "8k", "8kx", "x4", "1x1", "8kx0", "-8x1", "8kx1x1", "8k*2"):
        with pytest.raises(NsagenError, match="CONTEXTxBATCH"):
            grid_of(wrong, read("tiny"), "cpu")


@pytest.mark.parametrize(
    ("context", "batch", "ms"), [(8192, 256, 0.250), (32768, 64, 0.109), (65536, 32, 0.086), (131072, 16, 0.074)]
)
def test_the_limit_is_the_spec_s_bytes(context: int, batch: int, ms: float):
    """(blocks that have ended + n·l' + w) keys and values: the figures that the decode bars are stated with."""
    compiled = compiled_of(read("nsa_128"))
    point = Point(context, batch)
    keys = (context - 32) // 16 + 1 + 16 * 64 + 512
    assert nsa_bytes(compiled, point) == keys * batch * 4 * 256 * 2
    assert round(1e3 * nsa_bytes(compiled, point) / H200, 3) == ms


def test_the_limit_of_other_specs():
    window = compiled_of(read("window_only"))
    size = getattr(read("window_only").branches["window"], "size")  # noqa: B009
    assert nsa_bytes(window, Point(65536, 3)) == dense_bytes(window.spec, Point(size, 3))
    assert nsa_bytes(window, Point(8, 3)) == dense_bytes(window.spec, Point(8, 3))
    pooled = {
        "name": "p", "heads": {"query": 4, "kv": 2, "qk_dim": 16, "v_dim": 32},
        "branches": {"selected": {"block": 8, "top_n": 4, "from": "pooled"}},
    }  # fmt: skip
    assert nsa_bytes(compiled_of(read(pooled)), Point(800, 1)) == 2 * 2 * (4 * 8 * (16 + 32) + 100 * 16)


@pytest.mark.parametrize("name", ["tiny", "window_only", "selected_only", "nsa_paper"])
def test_a_step_over_a_filled_cache(name: str):
    """What the round's last step returns is attention's last row; where it begins again, its token alone is lost."""
    compiled, setting = compiled_of(read(name)), setting_of(name)
    step = ours(module_of(compiled), setting).make(Point(70, 2))
    first = step.call()
    h = setting.spec.heads
    assert first.shape == (2, 1, h.query, h.v_dim)
    step.at(step.round - 1)
    assert torch.equal(step.call(), first)
    assert first.abs().min() > 0 if first.isfinite().all() else False


@pytest.mark.parametrize("serving", [Serving(3), Serving(2, page_size=16), Serving(fp8=True)], ids=lambda s: s.label)
def test_other_steps(serving: Serving):
    compiled, setting = compiled_of(read("tiny")), setting_of("tiny")
    step = ours(module_of(compiled), setting, serving).make(Point(70, 2))
    first = step.call()
    assert first.shape[:2] == (2, serving.tokens)
    step.at(step.round - 1)
    assert torch.equal(step.call(), first)
    if serving != Serving(fp8=True):
        row = ours(module_of(compiled), setting, Serving(serving.tokens)).make(Point(70, 2)).call()
        torch.testing.assert_close(first, row)  # wherever the keys lie


@pytest.mark.parametrize(
    ("name", "tokens", "steps"),
    [("nsa_128", 1, 16), ("nsa_128", 4, 4), ("nsa_128", 3, 16), ("nsa_128", 8, 2), ("fla", 1, 64), ("tiny", 8, 1),
     ("window_only", 1, 1), ("selected_only", 3, 1)],
)  # fmt: skip
def test_after_a_round_blocks_end_as_before(name: str, tokens: int, steps: int):
    assert round_of(read(name), tokens) == steps
    stride: int = getattr(read(name).branches.get("compressed"), "stride", 1)
    ends = [tokens * i // stride for i in range(2 * steps + 1)]  # blocks that have ended
    assert ends[steps] * stride == tokens * steps
    assert [b - ends[steps] for b in ends[steps:]] == ends[: steps + 1]


@pytest.mark.parametrize(
    ("name", "tokens", "lengths"),
    [("tiny", 1, [66, 67, 68, 69]), ("tiny", 2, [66, 68]), ("tiny", 3, [58, 61, 64, 67]), ("tiny", 4, [66]),
     ("nsa_128", 1, list(range(54, 70))), ("nsa_128", 4, [54, 58, 62, 66]), ("selected_only", 3, [67])],
)  # fmt: skip
def test_where_each_step_of_the_round_begins(monkeypatch, name: str, tokens: int, lengths: list[int]):
    module, setting = module_of(compiled_of(read(name))), setting_of(name)
    seen: list[list[int]] = []
    monkeypatch.setattr(module, "decode", lambda *given, **more: seen.append(given[-1].lengths.tolist()))
    step = ours(module, setting, Serving(tokens)).make(Point(70, 2))
    step.call()  # as it was made
    for i in range(step.round):
        step.at(i)
        step.call()
    assert seen == [[n, n] for n in (70 - tokens, *lengths)]


def test_a_caller_s_lists_hold_for_every_step_of_the_round():
    spec = {
        "name": "c", "heads": {"query": 4, "kv": 2, "qk_dim": 16, "v_dim": 16},
        "branches": {"compressed": {"block": 16, "stride": 16, "pool": "mean"},
                     "selected": {"block": 32, "top_n": 4, "from": "caller"}},
    }  # fmt: skip
    compiled = compiled_of(read(spec))
    of = decode_cases._Served(module_of(compiled), Setting(compiled.spec, torch.float32, "cpu"), Point(72, 8))
    blocks = of.arguments()[1]["blocks"]
    assert (of.start(0), of.before) == (56, 71)  # own blocks 1 and 2
    assert blocks.shape == (8, 1, 2, 4) and set(blocks.unique().tolist()) == {-1, 0, 1}


def test_the_bytes_of_other_steps():
    """Each token selects for itself, a window slides on, compressed keys are shared; e4m3 is a byte and its scale."""
    compiled, point = compiled_of(read("nsa_128")), Point(65536, 1)
    ended = (65536 - 32) // 16 + 1
    assert nsa_bytes(compiled, point, Serving(4)) == 4 * 512 * (
        ended + 4 * 1024 - (3 + 2 + 1) + 512 + 3
    )  # own blocks are not whole
    assert nsa_bytes(compiled, point, Serving(fp8=True)) * 512 == nsa_bytes(compiled, point) * (256 + 8)
    short = compiled_of(read("selected_only"))
    assert nsa_bytes(short, Point(1024, 1), Serving(8)) <= dense_bytes(short.spec, Point(1024, 1))
    assert Serving(4, 64, True).words == ["--tokens", "4", "--page-size", "64", "--kv", "fp8"]
    assert Serving(4, 64, True).label == "4 tokens a sequence, pages of 64, in no order, e4m3 keys and values"


def test_what_no_point_can_be_is_refused_before_anything_is_measured(tmp_path):
    for options, text in (
        (["--tokens", "4", "--grid", "40x1,4x2"], "--grid 4x2: a context holds more than the 4 tokens of the step"),
        (["--grid", "4x1,40x1"], "--grid 4x1: a context holds more than the 4 tokens of the 4 steps of a round"),
        (["--page-size", "7"], "page_size must be a multiple of"),
    ):
        done = shell(tmp_path, "tiny", "--decode", "--device", "cpu", *options)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert text in done.stderr


@pytest.mark.parametrize("i", [0, 2, 3])
def test_the_filled_cache_is_what_prefill_makes(monkeypatch, i: int):
    """Of every step of the round: the tokens ahead of it are all there, and no more."""
    monkeypatch.setattr(decode_cases, "CHUNK", 1000)  # several chunks
    compiled, setting = compiled_of(read("tiny")), setting_of("tiny")
    module = module_of(compiled)
    of = decode_cases._Served(module, setting, Point(41, 2))
    appended: list[tuple] = []
    real = module.KVCache.append

    def spy(cache, k, v, phi, cu):
        appended.append((k, v))
        return real(cache, k, v, phi, cu)

    monkeypatch.setattr(module.KVCache, "append", spy)
    cache, (arguments, more) = of.filled(), of.arguments()
    assert cache.lengths.tolist() == [40, 40]
    assert len(appended) > 1
    start = of.start(i)
    cache.lengths.fill_(start)
    q, k, v, gates, phi = arguments
    out = module.decode(*arguments, cache, **more)
    whole = [
        {b: torch.cat([torch.cat([pair[side][b] for pair in appended], 1)[:, :start], new[b]], 1) for b in new}
        for side, new in enumerate((k, v))
    ]
    before, ahead = torch.nn.functional.pad, (0, 0, 0, 0, start, 0)
    want = module.attention(before(q, ahead), *whole, None if gates is None else before(gates, ahead), phi)
    torch.testing.assert_close(out, want[:, -1:], rtol=1e-4, atol=1e-5)


def test_the_dense_ones():
    setting = setting_of("tiny")
    fa3, sdpa = dense(setting, None)
    out = sdpa.make(Point(33, 2)).call()
    assert out.shape == (2, setting.spec.heads.query, 1, setting.spec.heads.v_dim)
    with pytest.raises(NsagenError, match="CUDA"):
        fa3.make(Point(33, 2))
    assert dense(setting, ["none"]) == []
    with pytest.raises(NsagenError, match="choose from fa3, sdpa, or none"):
        dense(setting, ["fa2"])


def test_a_case_that_fails_leaves_the_others_alone():
    def hungry(point: Point) -> Step:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    clock = Clock("cpu", 1)
    clock.of(Case("a", "ours", hungry), Point(8, 1))
    clock.of(Case("b", "ours", lambda point: Step(lambda: 1 / 0)), Point(8, 1))
    clock.of(Case("c", "dense", lambda point: Step(lambda: None)), Point(8, 1))
    reasons = {r.name: r.reason for r in clock.rows}
    assert reasons["a eager"] == reasons["a in a graph"] == OUT_OF_MEMORY
    assert (reasons["b eager"] or "").startswith("ZeroDivisionError")
    assert reasons["c eager"] is None
    assert reasons["c in a graph"] == "there are no CUDA graphs on the CPU"


@dataclass
class Device:
    """Steps of a given cost each, and a clock that they alone advance; `spoilt` steps, counted from 0, cost 1000."""

    costs: list[float]  # ms of each step of the round
    spoilt: tuple[int, ...] = ()
    now: float = 0.0
    next: int = 0  # of the round
    done: list[int] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    @property
    def step(self) -> Step:
        return Step(self.call, self.at, len(self.costs))

    def at(self, i: int) -> None:
        self.log.append(f"at {i}")
        self.next = i

    def call(self) -> None:
        self.now += 1000.0 if len(self.done) in self.spoilt else self.costs[self.next]
        self.done.append(self.next)
        self.log.append("step")
        self.next = (self.next + 1) % len(self.costs)  # as lengths that grow

    def events(self, count: int) -> list[tuple[Any, Any]]:
        return [(Event(self), Event(self)) for _ in range(count)]


@dataclass
class Event:
    of: Device
    at: float = 0.0

    def record(self) -> None:
        self.at = self.of.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture
def gpu(monkeypatch) -> Callable[[Device], Clock]:
    """A clock of the device's, for the code that measures on a GPU."""

    def of(device: Device, rep: int = 60) -> Clock:
        monkeypatch.setattr(decode_clock, "_events", device.events)
        monkeypatch.setattr(decode_clock, "captured", lambda step: step.call)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(Clock, "_overwrite", lambda self: device.log.append("write"))
        return Clock("cuda", rep)

    return of


def test_mean_and_slowest_of_a_round():
    """Of medians: one time that is off changes neither."""
    assert over_round([1.0, 2.0, 7.0, 1.0, 90.0, 7.0, 50.0, 2.0, 8.0], 3) == (pytest.approx(10 / 3), 7.0)
    assert over_round([3.0, 1.0, 2.0], 1) == (2.0, 2.0)


def test_the_graph_is_timed_at_every_step_of_the_round(gpu):
    device = Device([1.0, 2.0, 2.0, 5.0], spoilt=(21, 24))
    assert gpu(device)._graphed(device.step) == (2.5, 5.0)
    assert device.log[:12] == [x for i in range(4) for x in (f"at {i}", "write", "step")]
    guessed, rounds = 2, 60 // 2 // 4  # LEAST steps in whole rounds; then `rep` ms of steps, not of each step
    assert device.done == list(range(4)) * (guessed + rounds)
    seldom = Device([100.0, 200.0])
    assert gpu(seldom)._graphed(seldom.step) == (150.0, 200.0)
    assert seldom.done == [0, 1] * (3 + decode_clock.LEAST)
    dense = Device([1.0])
    assert gpu(dense)._graphed(dense.step) == (1.0, 1.0)
    assert len(dense.done) == decode_clock.LEAST + 60


@pytest.mark.parametrize(("steps", "run"), [(1, 8), (4, 8), (5, 10), (16, 16)])
def test_eager_runs_are_whole_rounds(gpu, steps: int, run: int):
    device = Device([1.0] * (steps - 1) + [1.0 + steps])
    clock = gpu(device, rep=3 * run)
    ms, slowest = clock._eager(device.step)
    assert (ms, slowest) == (pytest.approx(2.0), None)
    whole = ["at 0", *["step"] * run]
    assert device.log == ["at 0", "step", *whole * decode_clock.LEAST]


def test_the_profile_is_of_whole_rounds(gpu, monkeypatch):
    device = Device([1.0, 2.0, 2.0, 5.0])
    asked: list[tuple[int, int]] = []

    def times(step: Callable[[], Any], before: Callable[[int], Any], round: int, rounds: int) -> dict[str, float]:
        asked.append((round, rounds))
        before(2)
        step()
        return {"attend": 1.0}

    monkeypatch.setattr(decode_clock, "kernel_times", times)
    clock, row = gpu(device), Row("nsagen in a graph", "ours", 64, 1, 2.5)
    assert clock._with_kernels(row, device.step).kernels == {"attend": 1.0}
    assert (device.log, device.done) == (["at 2", "write", "step"], [2])
    for costs in ([1.0], [1.0] * 16):
        clock._with_kernels(row, Device(costs).step)
    assert asked == [(4, 5), (1, 20), (16, 3)]


def test_the_wall_clock_goes_round(monkeypatch):
    device = Device([1.0, 2.0, 2.0, 5.0], spoilt=(7, 12))
    monkeypatch.setattr(bench_clock.time, "perf_counter", lambda: 1e-3 * device.now)
    rows = Clock("cpu", 1).of(Case("a", "ours", lambda point: device.step), Point(64, 2))
    assert device.done == [0, *list(range(4)) * decode_clock.LEAST]
    assert (rows[0].ms, rows[0].slowest_ms, rows[0].round) == (pytest.approx(2.5), pytest.approx(5.0), 4)
    assert (rows[1].ms, rows[1].slowest_ms) == (None, None)
    assert {"ms", "slowest_ms", "round"} <= rows[0].record().keys()


ROWS = [
    Row(report.DENSE, "bytes", 8192, 256, 1.0),
    Row(report.LIMIT, "bytes", 8192, 256, 0.25),
    Row("dense FA3 in a graph", "dense", 8192, 256, None, "not installed"),
    Row("nsagen eager", "ours", 8192, 256, 0.75, slowest_ms=0.75),  # a round of one step: nothing is slower
    Row(
        "nsagen in a graph",
        "ours",
        8192,
        256,
        0.5,
        None,
        {"scores": 100.0, "attend": 380.5},
        slowest_ms=0.625,
        round=16,
    ),
    Row("nsagen in a graph", "ours", 65536, 1, 12.5),
]


def test_the_table(tmp_path):
    lines = report.text(ROWS, H200).splitlines()
    assert lines[0] == "a step, context x batch  8kx256, µs  64kx1, ms"
    assert lines[1].split() == ["dense", "at", "copy", "bandwidth", "1000.0", "–"]
    assert "nsagen in a graph             500.0      12.50" in lines
    assert lines[lines.index("nsagen in a graph             500.0      12.50") + 1].split() == [
        "its", "slowest", "step", "625.0", "–",
    ]  # fmt: skip
    assert sum("slowest" in line for line in lines) == 1
    assert any(line.split() == ["×", "the", "limit", "2.00", "–"] for line in lines)
    assert any(line.startswith("× faster than dense at copy bandwidth") and "2.00" in line for line in lines)
    assert "– dense FA3 in a graph at 8kx256: not installed" in lines
    at = lines.index("its kernels by the profiler, µs  8kx256  64kx1")
    told = [line.split() for line in lines[at + 1 : at + 4]]
    assert told == [["scores", "100.0", "–"], ["attend", "380.5", "–"], ["between", "kernels", "19.5", "–"]]
    assert not any(line.startswith("between kernels less") for line in lines)
    overlapping = Row("nsagen in a graph", "ours", 8192, 1, 0.02, kernels={"scores": 15.0, "attend": 9.0})
    lines = report.text([*ROWS, overlapping], H200).splitlines()
    assert any(line.split() == ["between", "kernels", "19.5", "–", "-4.0"] for line in lines)
    assert any(line.startswith("between kernels less than 0") for line in lines)
    assert plot(ROWS, "title", tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_the_kernels_of_a_step():
    """In the order of their launches, medians; what else the device did is not told. A round of one step."""
    device: list[tuple[str, float]] = []
    step_took, clears = iter([9.0, 1.0, 3.0, 2.0]), iter(range(9))

    def step() -> None:
        device.extend([("late", 4.0), ("early", next(step_took)), ("late", 6.0)])

    found = kernel_times(step, lambda i: device.append(("fill", float(next(clears)))), 1, 3, profiler(device))
    assert list(found.items()) == [("late", 10.0), ("early", 2.0)]


def profiler(device: list[tuple[str, float]]) -> Callable[[Callable[[], None]], list[tuple[str, float]]]:
    def profiled(run: Callable[[], None]) -> list[tuple[str, float]]:
        device.clear()
        run()
        return list(device)

    return profiled


def test_the_kernels_of_a_round():
    """Its mean, where one step in four takes longer; of the medians, so that one launch that is off says nothing."""
    device: list[tuple[str, float]] = []
    begun: list[int] = []

    def step() -> None:
        longer, off = begun[-1] == 3, len(begun) == 7  # step 1 of the second round
        us = 9.0 if longer else 1.0
        device.extend([("attend", 900.0 if off else us), ("pool", us + 1.0), ("attend", us)])

    found = kernel_times(step, begun.append, 4, 3, profiler(device))
    assert found == {"attend": 2 * statistics.fmean([1.0, 1.0, 1.0, 9.0]), "pool": 4.0}
    assert begun == [0, *[0, 1, 2, 3] * 3]


def test_the_command_on_the_cpu(tmp_path):
    done = shell(
        tmp_path, "tiny", "--decode", "--device", "cpu", "--grid", "40x2,64x1", "--rep", "1", "--json", "d.json",
        "--plot", "d.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "– dense FA3 in a graph at 40x2, 64x1: it needs a CUDA device" in done.stdout
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["command"] == "nsagen bench tiny --decode --grid 40x2,64x1 --dtype bf16 --device cpu --rep 1"
    assert {(r["context"], r["batch"]) for r in found["rows"]} == {(40, 2), (64, 1)}
    assert all((r["ms"] is None) == (r["reason"] is not None) for r in found["rows"])
    eager = [r for r in found["rows"] if r["name"] == "nsagen eager"]
    assert [r["round"] for r in eager] == [4, 4] and all(0 < r["ms"] <= r["slowest_ms"] for r in eager)
    assert all(r["round"] == 1 for r in found["rows"] if r["kind"] != "ours")
    assert "the mean of the 4 steps up to the context" in done.stdout and "\n  its slowest step " in done.stdout
    assert [p["dense_bytes"] for p in found["points"]] == [2 * 40 * 2 * 40 * 2, 64 * 2 * 40 * 2]
    assert found["copy_bandwidth"] > 0


def test_options_that_do_not_go_together():
    for options, text in (
        (["--grid", "8kx1"], "--grid goes with --decode"),
        (["--tokens", "2"], "--tokens goes with --decode"),
        (["--kv", "fp8"], "--kv goes with --decode"),
        (["--decode", "--lengths", "8k"], "--lengths does not go with --decode"),
        (["--decode", "--grid", "8"], "CONTEXTxBATCH"),
    ):
        done = CliRunner().invoke(app, ["bench", "tiny", *options])
        assert (done.exit_code, done.stdout) == (2, ""), options
        assert text in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_command_is_written_out():
    request = Request("my spec.yaml", against="fa3")
    assert request.command([Point(8192, 2), Point(100, 1)]) == (
        "nsagen bench 'my spec.yaml' --decode --grid 8kx2,100x1 --dtype bf16 --device cuda --rep 200 --against fa3"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA graphs")
def test_in_a_graph():
    compiled = compiled_of(read("nsa_128"))
    setting = Setting(compiled.spec, torch.bfloat16, "cuda")
    rows = Clock("cuda", 5).of(ours(module_of(compiled), setting), Point(2048, 4))
    assert [r.reason for r in rows] == [None, None]
    assert rows[1].ms is not None and rows[0].ms is not None and 0 < rows[1].ms < rows[0].ms
    assert rows[0].slowest_ms is None and rows[1].slowest_ms is not None and rows[1].slowest_ms >= rows[1].ms
    assert [r.round for r in rows] == [16, 16]
    assert rows[0].kernels is None and rows[1].kernels is not None
    assert list(rows[1].kernels)[-1] == "decode_merge"
    assert 0 < sum(rows[1].kernels.values()) < 1.5e3 * rows[1].ms

"""`nsagen bench --decode`: the grid and its bytes, the step over a filled cache, what is said of the rows."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from test_bench import shell
from typer.testing import CliRunner

from nsagen.api import compiled_of, module_of, read
from nsagen.cli import app
from nsagen.errors import NsagenError
from nsagen.tools import decode_report as report
from nsagen.tools.bench_clock import OUT_OF_MEMORY
from nsagen.tools.bench_decode import Request
from nsagen.tools.bench_inputs import Setting
from nsagen.tools.decode_cases import Case, Step, dense, ours
from nsagen.tools.decode_clock import Clock, Row
from nsagen.tools.decode_grid import Point, Serving, dense_bytes, grid_of, nsa_bytes
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
    """What the step returns is attention's last row; its reset takes back the token alone."""
    compiled, setting = compiled_of(read(name)), setting_of(name)
    step = ours(module_of(compiled), setting).make(Point(70, 2))
    first = step.call()
    h = setting.spec.heads
    assert first.shape == (2, 1, h.query, h.v_dim)
    step.reset()
    assert torch.equal(step.call(), first)
    assert first.abs().min() > 0 if first.isfinite().all() else False


@pytest.mark.parametrize("serving", [Serving(3), Serving(2, page_size=16), Serving(fp8=True)], ids=lambda s: s.label)
def test_other_steps(serving: Serving):
    compiled, setting = compiled_of(read("tiny")), setting_of("tiny")
    step = ours(module_of(compiled), setting, serving).make(Point(70, 2))
    first = step.call()
    assert first.shape[:2] == (2, serving.tokens)
    step.reset()
    assert torch.equal(step.call(), first)
    if serving != Serving(fp8=True):
        row = ours(module_of(compiled), setting, Serving(serving.tokens)).make(Point(70, 2)).call()
        torch.testing.assert_close(first, row)  # wherever the keys lie


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
        (["--page-size", "7"], "page_size must be a multiple of"),
    ):
        done = shell(tmp_path, "tiny", "--decode", "--device", "cpu", *options)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert text in done.stderr


def test_the_filled_cache_is_what_prefill_makes(monkeypatch):
    from nsagen.tools import decode_cases

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
    q, k, v, gates, phi = arguments
    out = module.decode(*arguments, cache, **more)
    whole = [
        {b: torch.cat([*(pair[side][b] for pair in appended), new[b]], 1) for b in new}
        if isinstance(new, dict) else torch.cat([*(next(iter(p[side].values())) for p in appended), new], 1)
        for side, new in enumerate((k, v))
    ]  # fmt: skip
    before = torch.nn.functional.pad
    want = module.attention(
        before(q, (0, 0, 0, 0, 40, 0)), *whole, None if gates is None else before(gates, (0, 0, 0, 0, 40, 0)), phi
    )
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


ROWS = [
    Row(report.DENSE, "bytes", 8192, 256, 1.0),
    Row(report.LIMIT, "bytes", 8192, 256, 0.25),
    Row("dense FA3 in a graph", "dense", 8192, 256, None, "not installed"),
    Row("nsagen eager", "ours", 8192, 256, 0.75),
    Row("nsagen in a graph", "ours", 8192, 256, 0.5, kernels={"scores": 100.0, "attend": 380.5}),
    Row("nsagen in a graph", "ours", 65536, 1, 12.5),
]


def test_the_table(tmp_path):
    lines = report.text(ROWS, H200).splitlines()
    assert lines[0] == "one step, context x batch  8kx256, µs  64kx1, ms"
    assert lines[1].split() == ["dense", "at", "copy", "bandwidth", "1000.0", "–"]
    assert "nsagen in a graph               500.0      12.50" in lines
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
    """In the order of their launches, medians; what else the device did is not told."""
    device: list[tuple[str, float]] = []
    step_took, clears = iter([9.0, 1.0, 3.0, 2.0]), iter(range(9))

    def step() -> None:
        device.extend([("late", 4.0), ("early", next(step_took)), ("late", 6.0)])

    def profiled(run: Callable[[], None]) -> list[tuple[str, float]]:
        device.clear()
        run()
        return list(device)

    found = kernel_times(step, lambda: device.append(("fill", float(next(clears)))), 3, profiled)
    assert list(found.items()) == [("late", 10.0), ("early", 2.0)]


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
    assert rows[0].kernels is None and rows[1].kernels is not None
    assert list(rows[1].kernels)[-1] in ("decode_attend", "decode_merge")
    assert 0 < sum(rows[1].kernels.values()) < 1.5e3 * rows[1].ms

"""The store of measurements, and what a launch makes of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nsagen import api, files
from nsagen.render.keys import kernel_key
from nsagen.render.module import kernel_keys
from nsagen.runtime import cache, launch, tuned
from nsagen.runtime.launch import Chip, Config, Tiles
from nsagen.runtime.tuned import Place

ROOT = Path(__file__).resolve().parents[2]
KERNEL, KEY = "window_fwd", "0123456789ab"
AT = Place("NVIDIA H200", "3.6.0", "16", 65536)
FILE = f"{KERNEL}_{KEY}.json"
FIRST, SECOND, BIG = Config(64, 64, 4, 3, 100), Config(32, 64, 4, 2, 50), Config(128, 128, 8, 3, 1 << 20)


pytestmark = pytest.mark.usefixtures("folder")


def test_what_is_recorded_is_measured():
    tuned.record(KERNEL, KEY, AT, {"64x64w4s3": 2.0})
    tuned.record(KERNEL, KEY, AT, {"32x64w4s2": 1.0, "128x64w8s3": None})
    other = AT._replace(gpu="NVIDIA A100")
    tuned.record(KERNEL, KEY, other, {"64x64w4s3": 7.0})
    known = tuned.measured(KERNEL, KEY)
    assert known == {AT: {"64x64w4s3": 2.0, "32x64w4s2": 1.0, "128x64w8s3": None}, other: {"64x64w4s3": 7.0}}
    assert tuned.measured(KERNEL, "ba9876543210") == {}
    assert tuned.fastest(KERNEL, KEY, AT, ["64x64w4s3", "32x64w4s2", "128x64w8s3"]) == "32x64w4s2"


def test_only_candidates_that_the_module_has_can_win():
    tuned.record(KERNEL, KEY, AT, {"gone": 0.1, "slow": 3.0, "failed": None})
    assert tuned.fastest(KERNEL, KEY, AT, ["failed", "slow"]) == "slow"
    assert tuned.fastest(KERNEL, KEY, AT, ["failed", "unmeasured"]) is None


def test_a_hundredth_is_no_gain():
    assert tuned.best({"a": 1.005, "b": 1.0}, ["a", "b"]) == "a"
    assert tuned.best({"a": 1.02, "b": 1.0}, ["a", "b"]) == "b"


@pytest.mark.parametrize(
    ("length", "winner"),
    [(n, "long") for n in (65536, 40000, 33000, 1 << 20)] + [(n, "short") for n in (8192, 1, 16384)],
)
def test_the_nearest_measured_length_counts(length, winner):
    tuned.record(KERNEL, KEY, AT, {"long": 1.0, "short": 2.0})
    tuned.record(KERNEL, KEY, AT._replace(length=8192), {"long": 2.0, "short": 1.0})
    assert tuned.fastest(KERNEL, KEY, AT._replace(length=length), ["long", "short"]) == winner


@pytest.mark.parametrize("field", ["gpu", "triton", "kind"])
def test_another_gpu_triton_or_dtype_knows_nothing(field):
    tuned.record(KERNEL, KEY, AT, {"a": 1.0})
    assert tuned.fastest(KERNEL, KEY, AT._replace(**{field: "other"}), ["a"]) is None


GOOD = tuned.dump({(KERNEL, KEY): {AT: {"a": 1.5, "b": None}}})
BROKEN = {
    "empty": "",
    "truncated": GOOD[:-9],
    "no json": "hello",
    "a list": "[]",
    "a number": "7",
    "another format": GOOD.replace("tiles 1", "tiles 99"),
    "no kernels": '{"format": "nsagen measured tiles 1"}',
    "text for a time": GOOD.replace("1.5", '"fast"'),
    "a negative time": GOOD.replace("1.5", "-1.5"),
    "no number": GOOD.replace("1.5", "NaN"),
    "a list of times": GOOD.replace('{"a": 1.5, "b": null}', "[1, 2]"),
    "rows of text": GOOD.replace('"measured": [', '"measured": ["row",'),
    "deep": "[" * 100_000,
    "another kernel's": GOOD.replace(KEY, "ba9876543210"),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_foreign_and_truncated_files_count_as_empty_and_are_replaced(text, folder):
    folder.mkdir()
    (folder / FILE).write_text(text)
    assert tuned.measured(KERNEL, KEY) == {}
    tuned.record(KERNEL, KEY, AT, {"a": 2.5})
    assert tuned.measured(KERNEL, KEY) == {AT: {"a": 2.5}}


def test_bytes_that_are_no_text(folder):
    folder.mkdir()
    (folder / FILE).write_bytes(b"\xff\xfe\x00")
    assert tuned.measured(KERNEL, KEY) == {}
    (folder / FILE).unlink()
    (folder / FILE).mkdir()  # not even a file
    assert tuned.measured(KERNEL, KEY) == {}


def test_dump_and_parse_are_inverse():
    assert tuned.parse(GOOD) == {(KERNEL, KEY): {AT: {"a": 1.5, "b": None}}}
    assert json.loads(GOOD)["kernels"][0]["measured"][0]["length"] == 65536
    assert tuned.dump(tuned.parse(GOOD)) == GOOD


def test_shipped_measurements_count_until_measured_here(tmp_path):
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "broken.json").write_bytes(b"\xff{")
    (tmp_path / "shipped" / "nvidia_h200.json").write_text(GOOD)
    assert tuned.fastest(KERNEL, KEY, AT, ["b", "a"]) == "a"
    tuned.record(KERNEL, KEY, AT, {"b": 1.0})
    assert tuned.fastest(KERNEL, KEY, AT, ["b", "a"]) == "b"
    assert tuned.measured(KERNEL, KEY) == {AT: {"a": 1.5, "b": 1.0}}


# A launch.


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True  # pyright: ignore
    device = torch.device("cuda", 0)  # pyright: ignore


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype).as_subclass(OnGpu)


@pytest.fixture
def tiles(monkeypatch) -> Tiles:
    monkeypatch.setattr(launch, "chip", lambda index: Chip("sm_90", 1000, "NVIDIA H200"))
    monkeypatch.setattr(launch.triton, "__version__", "3.6.0")
    return Tiles(KERNEL, KEY, {("sm_80", 16): (BIG, FIRST, SECOND), ("sm_80", 32): (SECOND,)})


def test_without_measurements_the_first_that_fits(tiles):
    assert launch.pick(tiles, on_gpu(1, 65536, 4, 16)) == FIRST
    assert launch.pick(tiles, on_gpu(1, 65536, 4, 16, dtype=torch.float32)) == SECOND
    assert launch.pick(tiles, torch.empty(1, 9, 4, 16, dtype=torch.bfloat16)) == SECOND  # the interpreter: the smallest


def test_a_launch_takes_the_fastest(tiles):
    tuned.record(KERNEL, KEY, AT, {FIRST.label: 2.0, SECOND.label: 1.0, BIG.label: 0.5})
    assert launch.pick(tiles, on_gpu(1, 65536, 4, 16)) == SECOND
    assert launch.pick(tiles, on_gpu(1, 65000, 4, 16, dtype=torch.float16)) == SECOND
    tiles.forced = BIG
    assert launch.pick(tiles, on_gpu(1, 65536, 4, 16)) == BIG


def test_the_store_is_read_once_a_length(tiles, monkeypatch):
    calls = []
    monkeypatch.setattr(tuned, "fastest", lambda *a: calls.append(a))
    for length in (65536, 65536, 40000, 70000, 0, 1):
        launch.pick(tiles, on_gpu(1, length, 4, 16))
    assert len(calls) == 4


def test_a_repeated_launch_costs_microseconds(tiles):
    x = torch.empty(1, 64, 4, 16, dtype=torch.bfloat16)
    launch.pick(tiles, x)
    best = min(_seconds(lambda: [launch.pick(tiles, x) for _ in range(1000)]) for _ in range(20))
    print(f"{best * 1e3:.2f} µs")
    assert best / 1000 < 20e-6


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_float32_dots_in_reduced_precision_are_measured_apart(monkeypatch):
    here = Chip("sm_90", 1000, "gpu")
    kinds = {launch.place(here, t, 1).kind for t in (torch.bfloat16, torch.float16)}
    assert kinds == {"16"}
    assert launch.place(here, torch.float32, 1).kind == "ieee"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert launch.place(here, torch.float32, 1).kind == "tf32"


def test_an_architecture_without_a_table_has_the_one_before():
    tiles = Tiles("k", "", {("sm_80", 16): (FIRST,), ("sm_90", 16): (SECOND,)})
    found = [launch.candidates(tiles, Chip(a, 1000, ""), 16) for a in launch.ARCHES]
    assert found == [(FIRST,), (SECOND,), (SECOND,)]
    assert launch.candidates(tiles, Chip("sm_80", 10, ""), 16) == (FIRST,)  # none fits: the launch will say so


# Keys.


def test_a_key_is_of_the_kernel_and_of_the_device_functions_it_calls(monkeypatch):
    from nsagen.render import keys

    text = "def f():\n    device.load(x)\n    device.find_sequence(x)"
    before = kernel_key(text)
    assert before == kernel_key(text) != kernel_key(text + " ")
    library = keys._library()
    monkeypatch.setattr(keys, "_library", lambda: {**library, "add_to": "changed"})
    assert kernel_key(text) == before
    monkeypatch.setattr(keys, "_library", lambda: {**library, "load": "changed"})
    assert kernel_key(text) != before


def test_equal_kernels_of_two_specs_share_what_was_measured():
    heads = {"query": 2, "kv": 1, "qk_dim": 16, "v_dim": 16}
    spec = {"name": "one", "heads": heads, "kv": "shared", "branches": {"window": {"size": 8}}, "combine": "single"}
    one, renamed, wider = (
        kernel_keys(api.compiled_of(api.read(s)).plan)["window_fwd"]
        for s in (spec, {**spec, "name": "two"}, {**spec, "branches": {"window": {"size": 9}}})
    )
    assert one == renamed != wider
    assert f'Tiles("window_fwd", "{one}", {{' in api.compiled_of(api.read(spec)).source


# Many processes, and what may befall them.


def fork(work: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the children only write files
        child = multiprocessing.get_context("fork").Process(target=work, args=arguments)
        child.start()
    return child


def build_and_tune(number: int) -> None:
    cache.store("window_only", KEY, "module = 1\n" * 1000)
    for i in range(20):
        tuned.record(KERNEL, KEY, AT, {f"{number}-{i}": 1.0 + i})


def test_ten_processes_at_once_lose_nothing(folder):
    children = [fork(build_and_tune, n) for n in range(10)]
    for child in children:
        child.join(120)
    assert [c.exitcode for c in children] == [0] * 10
    assert len(tuned.measured(KERNEL, KEY)[AT]) == 200
    assert (folder / f"window_only_{KEY}.py").read_text() == "module = 1\n" * 1000
    assert not list(folder.glob(".*.tmp"))


def write_for_ever() -> None:
    for i in range(1_000_000):
        tuned.record(KERNEL, KEY, AT, {f"{i % 50}": 1.0 + i})
        cache.store("window_only", f"{i % 3:012x}", f"value = {i}\n" * 2000)


def test_a_hundred_kills_leave_a_cache_that_loads(folder):
    draw = random.Random(0)
    tuned.record(KERNEL, KEY, AT, {"kept": 0.5})
    for _ in range(100):
        children = [fork(write_for_ever) for _ in range(2)]
        time.sleep(draw.uniform(0.0, 0.03))
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
            child.join(10)
        text = (folder / FILE).read_text()
        assert tuned.parse(text), text[-200:]
        assert tuned.measured(KERNEL, KEY)[AT]["kept"] == 0.5
    for path in folder.glob("window_only_*.py"):
        assert len(set(path.read_text().split("\n"))) == 2  # one whole text
    start = time.perf_counter()
    tuned.record(KERNEL, KEY, AT, {"after": 1.0})
    assert time.perf_counter() - start < 5  # no dead owner's lock is in the way
    assert tuned.measured(KERNEL, KEY)[AT]["after"] == 1.0
    cache.clear()
    assert not list(folder.iterdir())  # temporary files, too


OWNER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def owner(folder):
    """A process that holds the lock of FILE."""
    folder.mkdir()
    command = [sys.executable, "-c", OWNER, str(folder / f"{FILE}.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_dead_owner_s_lock_is_free(owner):
    owner.kill()
    owner.wait()
    seconds = _seconds(lambda: tuned.record(KERNEL, KEY, AT, {"a": 1.0}))
    assert seconds < 5
    assert tuned.measured(KERNEL, KEY) == {AT: {"a": 1.0}}


def test_a_stopped_owner_s_lock_is_waited_for_and_then_passed_by(owner, monkeypatch):
    monkeypatch.setattr(cache, "PATIENCE", 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.record(KERNEL, KEY, AT, {"a": 1.0})
    assert tuned.measured(KERNEL, KEY) == {AT: {"a": 1.0}}


@pytest.mark.parametrize("reason", ["Read-only file system", "No space left on device"])
def test_where_nothing_can_be_written_one_warning_and_this_process_still_knows(reason, folder, monkeypatch):
    def write_text(path: Path, text: str) -> bool:
        if path.is_relative_to(folder):
            raise OSError(28, reason)
        return files.write_text(path, text)

    monkeypatch.setattr(cache, "write_text", write_text)
    with pytest.warns(UserWarning, match=reason):
        tuned.record(KERNEL, KEY, AT, {"a": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.record(KERNEL, KEY, AT, {"b": 2.0})
        cache.store("window_only", KEY, "text")
    assert tuned.measured(KERNEL, KEY) == {AT: {"a": 1.0, "b": 2.0}}
    assert not list(folder.glob("*.json"))


def test_where_nothing_at_all_can_be_written_tuning_goes_on(folder, monkeypatch):
    def write_text(path: Path, text: str) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_text", write_text)
    with pytest.warns(UserWarning, match="No space left"):
        tuned.record(KERNEL, KEY, AT, {"a": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.record(KERNEL, KEY, AT, {"b": 1.0})
    assert tuned.measured(KERNEL, KEY) == {}


def test_a_read_only_cache_that_has_it_all_warns_of_nothing(folder, monkeypatch):
    tuned.record(KERNEL, KEY, AT, {"a": 1.0})
    monkeypatch.setattr(cache, "write_text", lambda *_: pytest.fail("written"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.record(KERNEL, KEY, AT, {"a": 1.0})


def test_clear_removes_measurements_and_nothing_else(folder):
    tuned.record(KERNEL, KEY, AT, {"a": 1.0})
    (folder / f".{FILE}.123.abcd.tmp").write_text("left by a killed process")
    foreign = folder / "package.json"
    foreign.write_text("{}")
    assert cache.clear() == 1
    assert list(folder.iterdir()) == [foreign]


def test_what_killed_writers_left_is_swept_once_it_is_old(folder):
    folder.mkdir()
    old, young, foreign = (folder / x for x in (f".{FILE}.1.ab.tmp", f".{FILE}.2.cd.tmp", ".their file.tmp"))
    for path in (old, young, foreign):
        path.write_text("half")
    for path in (old, foreign):
        os.utime(path, (time.time() - 2 * cache.STALE,) * 2)
    tuned.record(KERNEL, KEY, AT, {"a": 1.0})
    assert not old.exists()
    assert young.exists()  # its writer may live
    assert foreign.exists()


ALONE = """
import sys
for absent in ("platformdirs", "filelock", "pydantic", "sympy", "jinja2", "typer"):
    sys.modules[absent] = None
from nsagen.runtime import cache, tuned
at = tuned.Place("gpu", "3.6.0", "16", 8192)
tuned.record("window_fwd", "0123456789ab", at, {"a": 1.0})
assert tuned.fastest("window_fwd", "0123456789ab", at, ["a"]) == "a"
assert "torch" not in sys.modules
assert cache.clear() == 1
"""


def test_the_store_needs_the_standard_library_alone(folder):
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

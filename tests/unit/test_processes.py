"""Ten whole processes build and tune the same spec at once, and a hundred are killed: the cache still loads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import tuning_processes
from tuning_processes import AT_ONCE, CANDIDATES, KILLS, SHARED, own_length, place, spec_of

from nsagen import api
from nsagen.runtime import cache, launch, tuned
from nsagen.tools import tune
from nsagen.tools.tune_search import Subject, known

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture(autouse=True)
def h200(monkeypatch):
    """No module from another test."""
    monkeypatch.setattr(launch, "chip", tuning_processes.h200)
    monkeypatch.setattr(api, "_modules", {})


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def processes(mode: str, out: Path) -> dict[int, int]:
    """Number -> exit code."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}  # a cache has __pycache__, too
    command = [sys.executable, tuning_processes.__file__, mode, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return {int(number): code for number, code in json.loads(done.stdout).items()}


def said(out: Path, codes: dict[int, int]) -> str:
    """What those that failed said at last."""
    failed = [n for n, code in codes.items() if code not in (0, -signal.SIGKILL)]
    return "\n".join(f"{n}: {(out / f'{n}.log').read_text()[-2000:]}" for n in failed)


def loaded(generation: int) -> ModuleType:
    """The generation's module, which lies in the cache, whole, already."""
    compiled = api.compiled_of(api.read(spec_of(generation)))
    path = cache.directory() / f"{compiled.spec.name}_{compiled.digest}.py"
    assert path.read_text() == compiled.source
    module = api.load(spec_of(generation))
    assert callable(module.attention)
    return module


def subjects(generation: int) -> list[Subject]:
    return tune.subjects_of(loaded(generation), tune.Request("", candidates=CANDIDATES))


def require_measured(number: int) -> None:
    """A process that finished has left all its times."""
    for subject in subjects(number // AT_ONCE):
        for length in (SHARED, own_length(number)):
            assert set(known(subject, place(length))) == set(subject.labels), (number, subject.kernel, length)


def require_whole_files(folder: Path) -> None:
    for path in folder.glob("*.json"):
        assert tuned.parse(path.read_text()), path
    for path in folder.glob("*.py"):
        compile(path.read_text(), path, "exec")


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


def test_ten_at_once(folder, out):
    codes = processes("at_once", out)
    assert codes == dict.fromkeys(range(AT_ONCE), 0), said(out, codes)
    for number in codes:
        require_measured(number)
        assert "cannot be written" not in (out / f"{number}.log").read_text()
    assert api.build(spec_of(0), out / "built", check=True).exists()
    assert not leftovers(folder)
    assert not leftovers(out / "built")


def test_a_hundred_kills(folder, out):
    codes = processes("kills", out)
    assert set(codes.values()) == {0, -signal.SIGKILL}, said(out, codes)
    assert list(codes.values()).count(-signal.SIGKILL) == KILLS
    require_whole_files(folder)
    for number in (n for n, code in codes.items() if code == 0):
        require_measured(number)
    assert len(leftovers(folder)) < KILLS
    age(folder)
    start, number = time.perf_counter(), len(codes)
    tuning_processes.work(number, out)
    assert time.perf_counter() - start < 20  # no dead owner's lock is in the way
    require_measured(number)
    assert not leftovers(folder)


def age(folder: Path) -> None:
    """What was killed was so long ago; there is one at least."""
    (folder / ".window_fwd_0123456789ab.json.1.abcd.tmp").write_text("half")
    for path in leftovers(folder):
        os.utime(path, (time.time() - 2 * cache.STALE,) * 2)

"""build, load and the cache beneath them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from nsagen import api, build, files, load
from nsagen.errors import NsagenError, SpecError
from nsagen.runtime import cache

ROOT = Path(__file__).resolve().parents[2]
YAML = """\
name: {name}
heads: {{query: 2, kv: 1, qk_dim: 16, v_dim: 16}}
kv: shared
branches:
  window: {{size: {size}}}
combine: single
"""
SPEC = {
    "name": "from_a_dict",
    "heads": {"query": 2, "kv": 1, "qk_dim": 16, "v_dim": 16},
    "kv": "shared",
    "branches": {"window": {"size": 8}},
    "combine": "single",
}


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """A cache of the test's own, and no module from another test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(folder))
    monkeypatch.setattr(api, "_modules", {})
    monkeypatch.setattr(cache, "_fallback", None)
    return folder


@pytest.fixture
def yaml(tmp_path):
    path = tmp_path / "window_spec.yaml"
    path.write_text(YAML.format(name="window_spec", size=8))
    return path


def test_equal_content_is_one_module(yaml):
    module = load(yaml)
    assert load(str(yaml)) is module
    assert load(module.SPEC) is module
    assert module.SPEC["branches"] == {"window": {"size": 8, "sinks": 0}}
    assert load({**module.SPEC, "name": "another"}) is not module


def test_a_dict_and_a_ready_spec():
    assert load(SPEC).SPEC["name"] == "from_a_dict"
    ready = api.ready_specs()
    if ready:
        name = min(ready)
        assert api.read(name).name == name
        assert api.locate(name) == ready[name]


def test_the_file_may_vanish(yaml):
    module = load(yaml)
    yaml.unlink()
    assert callable(module.attention)
    assert load(module.SPEC) is module


def test_only_the_cache_is_written(yaml, cache_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = load(yaml)
    assert Path(module.__file__ or "").parent == cache_dir
    assert {p.name for p in tmp_path.iterdir()} == {"cache", yaml.name}


def test_a_second_load_compiles_nothing(yaml, monkeypatch):
    module = load(yaml)
    monkeypatch.setattr(api, "compile_spec", lambda spec: pytest.fail("compiled again"))
    assert load(yaml) is module


def test_threads_share_one_module(yaml, monkeypatch):
    monkeypatch.setattr(api, "_compiled", {})
    start, found = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        found.append(load(yaml))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({id(m) for m in found}) == 1


FORKS = """
import os, sys
import nsagen
import nsagen.runtime
import triton
children = []
for _ in range(10):
    child = os.fork()
    if not child:
        module = nsagen.load(sys.argv[1])
        os._exit(0 if callable(module.attention) else 1)
    children.append(child)
sys.exit(max(os.waitpid(child, 0)[1] for child in children) != 0)
"""


def test_ten_processes_share_the_cache(yaml, cache_dir):
    done = subprocess.run([sys.executable, "-c", FORKS, str(yaml)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(cache_dir.glob("*.py"))) == 1
    assert not list(cache_dir.glob("*.tmp"))


def test_an_unwritable_cache_warns_once(yaml, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path / "file" / "below"))  # for root, too, who may write anywhere
    with pytest.warns(UserWarning, match="NSAGEN_CACHE_DIR") as caught:
        module = load(yaml)
    assert len(caught) == 1
    assert callable(module.attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load({**module.SPEC, "name": "another"})


def test_a_broken_file_in_the_cache_is_replaced(yaml, cache_dir):
    path = Path(load(yaml).__file__ or "")
    path.write_text("half a mod")
    api._modules.clear()
    assert callable(load(yaml).attention)


def test_the_cache_is_cleared_and_nothing_else(yaml, cache_dir):
    load(yaml)
    mine = cache_dir / "notes.txt"
    mine.write_text("keep")
    assert cache.clear() == 1
    assert list(cache_dir.iterdir()) == [mine]


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path / "here"))
    assert cache.directory() == tmp_path / "here"
    monkeypatch.setenv("NSAGEN_CACHE_DIR", "")
    assert cache.directory().name == "nsagen"
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert cache.directory() == Path.home() / ".cache" / "nsagen"


def test_without_filelock(yaml, monkeypatch):
    monkeypatch.setitem(sys.modules, "filelock", None)
    assert callable(load(yaml).attention)


def test_build(yaml, tmp_path):
    out = tmp_path / "deep" / "out"
    path = build(yaml, out)
    assert path == out / "window_spec.py"
    assert (out / "__init__.py").exists()
    before = path.stat().st_mtime_ns
    assert build(yaml, out).stat().st_mtime_ns == before  # untouched
    assert {p.name for p in out.iterdir()} == {"__init__.py", "window_spec.py"}


def test_build_keeps_an_init_that_is_there(yaml, tmp_path):
    (tmp_path / "__init__.py").write_text("mine = 1\n")
    build(yaml, tmp_path)
    assert (tmp_path / "__init__.py").read_text() == "mine = 1\n"


def test_build_check(yaml, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(api.OutOfDate, match="is missing"):
        build(yaml, out, check=True)
    assert not out.exists()
    path = build(yaml, out)
    assert build(yaml, out, check=True) == path
    path.write_text(path.read_text().replace("query", "qurey", 1))
    with pytest.raises(api.OutOfDate, match="out of date") as caught:
        build(yaml, out, check=True)
    assert "-" in caught.value.diff
    assert "qurey" in caught.value.diff


def test_a_failed_write_leaves_the_old_file(yaml, tmp_path, monkeypatch):
    path = build(yaml, tmp_path)
    old = path.read_text()
    yaml.write_text(YAML.format(name="window_spec", size=9))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        build(yaml, tmp_path)
    assert path.read_text() == old
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_reader_never_sees_half(tmp_path):
    path, texts, seen = tmp_path / "file.py", ("a" * 300_000, "b" * 200_000), set()
    files.write_text(path, texts[0])
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(60):
        files.write_text(path, texts[i % 2])
    stop.set()
    reader.join()
    assert seen <= set(texts)


def test_unknown_names_and_files(tmp_path):
    with pytest.raises(SpecError, match="no ready spec"):
        load("no_such_spec")
    with pytest.raises(SpecError, match="does not exist"):
        load(tmp_path / "nothing.yaml")
    with pytest.raises(NsagenError):
        load({"name": "incomplete"})


def test_generated_files_can_be_read_by_others(yaml, tmp_path):
    old = os.umask(0o022)
    try:
        assert build(yaml, tmp_path / "out").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(old)

"""A module generated for another version of the runtime says so, with both versions and what to do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from nsagen import build, compiler
from nsagen.errors import VersionError
from nsagen.runtime import version

SPEC = {
    "name": "of_its_time",
    "heads": {"query": 2, "kv": 1, "qk_dim": 16, "v_dim": 16},
    "kv": "shared",
    "branches": {"window": {"size": 8}},
    "combine": "single",
}
OURS = version.RUNTIME_VERSION


@pytest.fixture
def run(monkeypatch):
    """Imports a module from its file."""

    def run(path: Path) -> None:
        found = importlib.util.spec_from_file_location("of_its_time", path)
        assert found and found.loader
        module = importlib.util.module_from_spec(found)
        monkeypatch.setitem(sys.modules, "of_its_time", module)  # where its dataclasses look themselves up
        found.loader.exec_module(module)

    return run


def of_version(folder: Path, number: int) -> Path:
    """A module as the nsagen of another runtime version would have built it."""
    path = build(SPEC, folder)
    text = path.read_text()
    changes = (f"runtime  {OURS}\n", f"runtime  {number}\n"), (f"require({OURS},", f"require({number},")
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)
    return path


def test_the_compiler_and_the_runtime_agree():
    assert compiler.RUNTIME_VERSION == version.RUNTIME_VERSION


def test_a_module_too_old(run, tmp_path):
    with pytest.raises(VersionError) as caught:
        run(of_version(tmp_path, OURS - 1))
    said = f"module 'of_its_time' was generated for version {OURS - 1} of nsagen.runtime, older than the installed"
    assert str(caught.value).startswith(f"{said} version {OURS}: ")
    assert "build it again from its spec with `nsagen build`" in str(caught.value)


def test_a_module_too_new(run, tmp_path):
    with pytest.raises(VersionError, match=f"version {OURS + 1} .*, newer than .* version {OURS}: upgrade nsagen, or"):
        run(of_version(tmp_path, OURS + 1))


@pytest.mark.parametrize("number", [OURS - 1, OURS + 1])
def test_before_an_import_that_this_runtime_lacks(run, tmp_path, number):
    path = of_version(tmp_path, number)
    path.write_text(path.read_text().replace("import autograd, checks,", "import autograd, gone, checks,"))
    with pytest.raises(VersionError, match=f"generated for version {number}"):
        run(path)


def test_others_get_the_usual_error():
    with pytest.raises(ImportError, match="cannot import name 'gone'"):
        exec("from nsagen.runtime import gone", {"__doc__": "Speaks of the\nruntime  in passing."})
    import nsagen.runtime

    assert not hasattr(nsagen.runtime, "gone")


def test_a_standalone_module_asks_for_no_version(run, tmp_path, monkeypatch):
    path = build(SPEC, tmp_path, standalone=True)
    monkeypatch.setattr(version, "RUNTIME_VERSION", OURS + 1)
    run(path)

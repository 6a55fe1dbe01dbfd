"""Packages that nsagen works without: what needs one says so and names the extra that brings it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
for name in {absent!r}:
    sys.modules[name] = None
sys.argv = ["nsagen", *{arguments!r}]
from nsagen.cli import main
main()
"""
OPTIONAL = ("matplotlib", "numpy", "platformdirs", "filelock")


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NSAGEN_CACHE_DIR": str(folder / "cache")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)


def nsagen(absent: tuple[str, ...], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(RUN.format(absent=absent, arguments=arguments), folder)


@pytest.mark.parametrize(
    ("package", "arguments", "said"),
    [
        ("matplotlib", ("explain", "tiny", "--plot", "p.png"), "--plot needs matplotlib"),
        ("numpy", ("verify", "tiny", "--device", "cpu"), "Triton's interpreter needs numpy"),
    ],
)
def test_a_command_names_the_extra(package, arguments, said, tmp_path):
    done = nsagen((package,), tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {said}: install it with `pip install 'nsagen[bench]'`"


def test_a_library_import_names_the_extra(tmp_path):
    done = python("import sys; sys.modules['numpy'] = None; import nsagen.interp.plan", tmp_path)
    assert "MissingPackage: nsagen.interp needs numpy: install it with `pip install 'nsagen[bench]'`" in done.stderr


@pytest.mark.parametrize("arguments", [("check", "tiny"), ("build", "tiny"), ("explain", "tiny"), ("cache", "dir")])
def test_the_rest_works_without_any_of_them(arguments, tmp_path):
    done = nsagen((*OPTIONAL, "torch", "triton"), tmp_path, *arguments)
    assert done.returncode == 0, done.stderr


def test_load_works_without_any_of_them(tmp_path):
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL[2:]})); import nsagen; nsagen.load('window_only')"
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_extras_exist():
    """Every extra that a message names."""
    project = (ROOT / "pyproject.toml").read_text()
    extras = project[project.index("[project.optional-dependencies]") : project.index("[project.scripts]")]
    found = {
        e for p in (ROOT / "nsagen").rglob("*.py") for e in re.findall(r'MissingPackage\(.*"(\w+)"\)', p.read_text())
    }
    assert found
    assert all(re.search(rf"(?m)^{extra} = ", extras) for extra in {*found, "docs", "dev"})

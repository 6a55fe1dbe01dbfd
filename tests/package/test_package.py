"""The package as its users get it: sdist and wheel into empty environments, away from the repository.

Needs a package index. `make package` runs it; torch is installed once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = ("sympy", "jinja2", "pydantic", "pyyaml", "typer", "rich")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
STEP = """
import sys, torch
sys.path.insert(0, "kernels")
import mine as nsa
heads, branches = nsa.SPEC["heads"], len(nsa.SPEC["branches"])
new = lambda n, d: torch.randn(1, 70, n, d, requires_grad=True)
q, k = (new(heads[n], heads["qk_dim"]) for n in ("query", "kv"))
v = new(heads["kv"], heads["v_dim"])
gates = torch.rand(1, 70, heads["query"], branches, requires_grad=True)
out = nsa.attention(q, k, v, gates, nsa.Compressor())
out.square().sum().backward()
assert all(x.grad.isfinite().all() and x.grad.norm() > 0 for x in (q, k, v, gates))
print("ran", out.shape, "nsagen" in sys.modules)
"""
pytestmark = [pytest.mark.package, pytest.mark.timeout(1800)]


def call(*command: object, cwd: Path, good: bool = True) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYENV_VERSION", "TRITON_INTERPRET")}
    environment["NSAGEN_CACHE_DIR"] = str(cwd / "cache")
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert not good or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def environment(folder: Path, *packages: object, python: str = sys.executable) -> Path:
    """A new environment with these packages; its folder of programs."""
    call(python, "-m", "venv", folder, cwd=folder.parent)
    call(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages, cwd=folder.parent)
    return folder / "bin"


@pytest.fixture(scope="session")
def dist(tmp_path_factory) -> Path:
    """The sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def wheel(dist) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel and its dependencies, at the versions of the lock."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    return environment(folder, "--constraint", ROOT / "requirements.lock", wheel)


def test_the_wheel_carries_its_data_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("templates", "specs"):
        assert {f"nsagen/{kind}/{p.name}" for p in (ROOT / kind).iterdir()} <= names
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"nsagen"}


def test_the_wheel_of_the_tree_is_that_of_the_sdist(wheel, tmp_path):
    call(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (direct,) = tmp_path.glob("*.whl")
    contents = [{i.filename: i.CRC for i in zipfile.ZipFile(w).infolist()} for w in (direct, wheel)]
    assert contents[0] == contents[1]


def test_the_sdist_carries_what_the_tests_need(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {n.split("/", 1)[1] for n in file.getnames() if "/" in n}
    assert {
        "pyproject.toml",
        "LICENSE",
        "Makefile",
        "requirements.lock",
        "tests/conftest.py",
        "specs/tiny.yaml",
    } <= names
    assert {f"generated/{p.name}" for p in (ROOT / "generated").glob("*.py")} <= names
    assert not any(".venv" in n or "__pycache__" in n for n in names)


def test_an_empty_environment(installed, tmp_path):
    """new, check, build, forward and backward; then the same without nsagen."""
    nsagen = installed / "nsagen"
    call(nsagen, "new", "mine", cwd=tmp_path)
    assert "mine.yaml: ok" in call(nsagen, "check", "mine.yaml", cwd=tmp_path)
    call(nsagen, "build", "mine.yaml", "--out", "kernels", cwd=tmp_path)
    assert "nsa_paper" in call(nsagen, "list", cwd=tmp_path)
    assert "True" in call(installed / "python", "-c", STEP, cwd=tmp_path)
    call(nsagen, "build", "mine.yaml", "--out", "kernels", "--standalone", cwd=tmp_path)
    try:
        call(installed / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "nsagen", cwd=tmp_path)
        assert "False" in call(installed / "python", "-c", STEP, cwd=tmp_path)
    finally:
        assert not call(installed / "python", "-c", "import nsagen", cwd=tmp_path, good=False)


def interpreter(version: str) -> str | None:
    """A Python of this version that runs: on the path, or below pyenv."""
    below = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    inside = [str(p) for p in sorted(below.glob(f"{version}.*/bin/python{version}"))]
    for candidate in (shutil.which(f"python{version}"), *inside):
        if candidate and not subprocess.run([candidate, "--version"], capture_output=True).returncode:
            return candidate
    return None


@pytest.mark.parametrize("version", PYTHONS)
def test_the_part_without_torch_on(version, wheel, tmp_path):
    """The same texts from every Python, standalone ones too."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    bin_ = environment(tmp_path / "venv", *WITHOUT_TORCH, python=python)
    call(bin_ / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    ready = sorted(p.stem for p in (ROOT / "specs").glob("*.yaml"))
    call(bin_ / "python", "-c", "import nsagen.compiler, sys; assert 'torch' not in sys.modules", cwd=tmp_path)
    call(bin_ / "nsagen", "check", *ready, cwd=tmp_path)
    call(bin_ / "nsagen", "build", "--check", "--out", ROOT / "generated", *ready, cwd=tmp_path)
    assert "window_fwd" in call(bin_ / "nsagen", "explain", "nsa_paper", cwd=tmp_path)
    call(sys.executable, "-m", "nsagen", "build", "--standalone", "--out", "here", *ready, cwd=tmp_path)
    call(bin_ / "nsagen", "build", "--standalone", "--check", "--out", "here", *ready, cwd=tmp_path)

"""Who may import whom: the layers of the design, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nsagen"
LAYERS = {
    "errors": 0, "files": 0,
    "sym": 1, "runtime": 1,
    "ir": 2,
    "spec": 3, "passes": 3, "interp": 3,
    "render": 4,
    "compiler": 5, "reference": 5,
    "api": 6,
    "nn": 7, "tools": 7,
    "cli": 8,
    "__main__": 9, "__init__": 9,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Absolute names of every module that the file imports, at any depth, `from a import b` as a and a.b."""
    inside = path.parent.relative_to(PACKAGE).parts if path.is_relative_to(PACKAGE) else ()
    folder = ["nsagen", *inside]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def unit(name: str) -> str:
    """The layered part of the package that a module belongs to: nsagen.spec.model -> spec."""
    return ([*name.split("."), ""])[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in LAYERS, f"{own} has no layer: give it one in design.md and here"
    used = {unit(name) for name in imports(path) if name.split(".")[0] == "nsagen"} & LAYERS.keys()
    wrong = [u for u in sorted(used - {own}) if LAYERS[u] >= LAYERS[own]]
    assert not wrong, f"layer {LAYERS[own]} ({own}) imports {wrong}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_sym_imports_sympy(path):
    used = {name.split(".")[0] for name in imports(path)}
    assert "sympy" not in used or path.parent.name == "sym"


def test_the_reference_imports_no_pass():
    path = PACKAGE / "reference.py"
    allowed = {"sym", "", "errors", "spec", "ir", "reference"}
    assert {unit(n) for n in imports(path) if n.startswith("nsagen")} & LAYERS.keys() <= allowed


def test_a_generated_module_imports_torch_triton_and_the_runtime_alone(tmp_path):
    from nsagen import build

    spec = {
        "name": "lean",
        "heads": {"query": 2, "kv": 1, "qk_dim": 16, "v_dim": 16},
        "kv": "shared",
        "branches": {"compressed": {"block": 8, "stride": 4, "pool": "mean"}, "window": {"size": 8}},
        "combine": "gated_sum",
    }
    roots = {".".join(name.split(".")[:2]) for name in imports(build(spec, tmp_path)) if name.startswith("nsagen")}
    assert roots == {"nsagen.runtime"}
    others = {name.split(".")[0] for name in imports(tmp_path / "lean.py")} - {"nsagen"}
    assert others <= {"torch", "triton", *sys.stdlib_module_names}


PROBE = """
import sys, time
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
heavy = sorted(m for m in {heavy} if m in sys.modules)
print(f"{module}: {{seconds:.2f}} s", heavy)
sys.exit(bool(heavy))
"""


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("nsagen", ("torch", "triton", "sympy", "numpy")),
        ("nsagen.compiler", ("torch", "triton", "numpy", "matplotlib")),
        ("nsagen.api", ("torch", "triton", "numpy", "matplotlib")),
        ("nsagen.cli", ("torch", "triton", "sympy", "numpy", "jinja2")),
    ],
)
def test_an_import_stays_light(module, heavy):
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module, heavy=heavy)], cwd=ROOT, capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lazy_names():
    import nsagen

    assert callable(nsagen.load)
    assert callable(nsagen.build)
    assert issubclass(nsagen.errors.NsagenError, Exception)
    assert isinstance(nsagen.__version__, str)
    assert {"load", "build", "errors"} <= set(dir(nsagen))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = nsagen.lod

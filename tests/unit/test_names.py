"""The linker's eyes: which names are global, and their renaming, in texts made to mislead it."""

from __future__ import annotations

import ast

import pytest

from nsagen.errors import CompileError
from nsagen.render import standalone
from nsagen.render.link import Module
from nsagen.render.names import references
from nsagen.render.rename import renamed

SHADOWS = """
import math

n, x, y, z = 2, 1, 2, 3  # ½ before: a byte is no column


class Holder:
    y: int = n
    z = [z for _ in range(n)]

    def x(self, z=z):
        return x + z[0] + self.y, y


def parameter(x, *y, **z):
    return x, y, z


def local():
    x = 0
    return [y for y in (x, z)], {z: z for z in [x]}, (lambda z=z: z + y)(z)


def walrus():
    return [z := 4 for _ in "ab"], z, y


def declares():
    global x, y
    x = y = 5


def nested():
    def inner(z):
        return x, z

    try:
        raise ValueError(y)
    except ValueError as x:  # binds x in `nested`, and so in `inner`
        return [str(i) for i in inner(z)]


def text(y):
    return f"ü{x}{y}{{x}} x {z:>{x}}" "z" f"{math.floor(z)!r}"
"""


def rename(text: str) -> str:
    module = Module("m", text)
    return "\n\n\n".join(renamed(module, [s], lambda symbol: f"_m_{symbol[1]}") for s in module.statements)


def test_renamed_text_does_the_same():
    new = rename(SHADOWS)
    before: dict[str, object] = {}
    after: dict[str, object] = {"math": __import__("math")}
    exec(SHADOWS, before)
    exec(new, after)

    def results(namespace, prefix):
        get = lambda name: namespace[prefix + name]  # noqa: E731
        holder = get("Holder")
        first = [
            holder.y,
            holder().x(),
            get("parameter")(7, 8, q=9),
            get("local")()[:2],
            get("walrus")(),
            get("nested")(),
        ]
        first += [get("text")(6)]
        get("declares")()
        return [*first, get("x"), get("y"), get("z")]

    assert results(after, "_m_") == results(before, "")
    assert not {"x", "y", "z", "text", "Holder"} & after.keys()


def test_comments_and_layout_stay():
    text = "a = 1  # why\n\n\n# above\n# twice\ndef f(a_b, *, c=a):\n    return a_b.a + a  # a here too\n"
    assert rename(text) == (
        "_m_a = 1  # why\n\n\n# above\n# twice\ndef _m_f(a_b, *, c=_m_a):\n    return a_b.a + _m_a  # a here too"
    )


def test_an_import_of_nsagen_inside_a_function():
    text = "def f():\n    from nsagen.runtime import device as d\n\n    return d.load, f'{d.load}'\n"
    assert rename(text) == "def _m_f():\n    pass\n\n    return _m_load, f'{_m_load}'"


def test_every_reference_has_its_place():
    text = "def f(a: t = b) -> r:\n    return g(a).h, i.j\n"
    found = {(r.name, r.attribute) for r in references(ast.parse(text).body[0])}
    assert found == {("f", None), ("t", None), ("b", None), ("r", None), ("g", None), ("i", "j")}


def test_what_cannot_be_linked_is_refused():
    with pytest.raises(CompileError, match="'device' is used as a value"):
        Module("m", "from nsagen.runtime import device\n\nx = [device]\n")
    with pytest.raises(CompileError, match="nothing defines"):
        standalone.link("import torch\n\nx = torch.ones(missing)\n")
    text = "import torch\nfrom nsagen.runtime import launch\n\n_launch_tiles = launch.tiles(1, 1, None)\n"
    with pytest.raises(CompileError, match="would both be called '_launch_tiles'"):
        standalone.link(text)


def test_a_private_name_beside_a_public_one_of_the_runtime(monkeypatch):
    module = Module("nsagen.runtime.launch", "_a = 1\na = 2\n\n\nb = _a + a\n")
    monkeypatch.setattr(standalone, "runtime_module", lambda name: module)
    with pytest.raises(CompileError, match="would both be called '_launch_a'"):
        standalone.link("import torch\nfrom nsagen.runtime import launch\n\nx = launch.b\n")

"""A module's text cut into its statements, each with what it defines and what it uses."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nsagen.errors import CompileError
from nsagen.files import PACKAGE
from nsagen.render.names import Reference, bound, is_own, references

Symbol = tuple[str, str]  # a module's full name, a global name in it; ("", alias) for what is imported from elsewhere
Import = tuple[str, str | None]  # module, name in it
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True, eq=False)
class Statement:
    """A statement of the module's top level, with the comments right above it and a docstring right below."""

    node: ast.stmt
    start: int  # bytes of the module's text
    end: int
    defines: frozenset[str]
    uses: tuple[tuple[Symbol, Reference], ...]

    @property
    def is_definition(self) -> bool:
        return isinstance(self.node, DEFINITIONS)


class Module:
    """The text of a module, its imports resolved."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text.encode()
        tree = ast.parse(text)
        self.doc = ast.get_docstring(tree) or ""
        self.own: dict[str, tuple[str, str | None]] = {}  # alias -> (nsagen module, name in it or None: the module)
        self.others: dict[str, Import] = {}  # alias -> an import from elsewhere, at the top level
        self._starts = [0, *(m.end() for m in re.finditer(rb"\n", self.text))]
        for node in ast.walk(tree):
            if is_own(node):
                self._import_own(node)  # pyright: ignore[reportArgumentType]
        self.imports = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        for node in self.imports:
            self._import_other(node)
        body = tree.body[1:] if self.doc else tree.body
        self.defined = bound(n for n in body if n not in self.imports)
        self.statements = tuple(self._statements([n for n in body if n not in self.imports]))
        self.classes = frozenset(s.node.name for s in self.statements if isinstance(s.node, ast.ClassDef))

    def _import_own(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            self.own[alias.asname or alias.name] = (inner, None) if path_of(inner).is_file() else (base, alias.name)

    def _import_other(self, node: ast.Import | ast.ImportFrom) -> None:
        if is_own(node) or (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
            return
        for alias in node.names:
            module, name = (node.module or "", alias.name) if isinstance(node, ast.ImportFrom) else (alias.name, None)
            self.others[alias.asname or alias.name.split(".")[0]] = (module, name)

    def _statements(self, body: list[ast.stmt]) -> Iterator[Statement]:
        for node, following in zip(body, [*body[1:], None], strict=True):
            if _is_text(node):
                continue
            end = self._line_end(following if following and _is_text(following) else node)
            uses = tuple(u for r in references(node) for u in self._resolve(r))
            yield Statement(node, self._line_start(node), end, frozenset(bound([node])), uses)

    def _resolve(self, r: Reference) -> Iterator[tuple[Symbol, Reference]]:
        """What a reference means: a name of this module, of another of nsagen, or of an import; a builtin nothing."""
        if r.name in self.own:
            module, name = self.own[r.name]
            if name is None and r.attribute is None:
                raise CompileError(f"{self.name}: module {r.name!r} is used as a value: a standalone file has none")
            yield (module, name or r.attribute or ""), r
        elif r.name in self.defined:
            yield (self.name, r.name), r
        elif r.name in self.others:
            yield ("", r.name), r

    def _line_start(self, node: ast.stmt) -> int:
        """The start of the statement's first line, decorators and the comments right above included."""
        line = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1
        while line and self.text[self._starts[line - 1] :].startswith(b"#"):
            line -= 1
        return self._starts[line]

    def _line_end(self, node: ast.stmt) -> int:
        """The end of the statement's last line, a comment there included."""
        end = self.span(node)[1]
        return end + len(self.text[end:].split(b"\n", 1)[0])

    def span(self, node: ast.AST) -> tuple[int, int]:
        """The node's place, in bytes of the text."""
        first, last = node.lineno, node.end_lineno  # pyright: ignore[reportAttributeAccessIssue]
        start, end = node.col_offset, node.end_col_offset  # pyright: ignore[reportAttributeAccessIssue]
        return self._starts[first - 1] + start, self._starts[last - 1] + end


@lru_cache(maxsize=64)
def runtime_module(name: str) -> Module:
    """A module of nsagen by its full name."""
    return Module(name, path_of(name).read_text(encoding="utf-8"))


def path_of(module: str) -> Path:
    return PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)

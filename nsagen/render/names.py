"""Which names of a Python text mean something of its module: the global references, with their places."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

Function = ast.FunctionDef | ast.AsyncFunctionDef
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
_SCOPES = (*Function.__args__, ast.ClassDef, ast.Lambda, *Comprehension.__args__)


@dataclass(frozen=True, eq=False)
class Reference:
    """`name` or `name.attribute`, where `name` is global. within: the f-string around it, if any.

    Before Python 3.12 the places inside an f-string are wrong, so that there the f-string's own place must do.
    """

    name: str
    attribute: str | None
    node: ast.AST
    within: ast.JoinedStr | None = None


@dataclass
class _Finder(ast.NodeVisitor):
    found: list[Reference] = field(default_factory=list)
    scopes: list[tuple[bool, set[str]]] = field(default_factory=list)  # innermost last: (is a class, names bound)
    within: ast.JoinedStr | None = None

    def visit_Name(self, node: ast.Name) -> None:
        self.refer(node.id, None, node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name):
            self.refer(node.value.id, node.attr, node)
        else:
            self.visit(node.value)

    def visit_Global(self, node: ast.Global) -> None:
        self.found += [Reference(name, None, node, self.within) for name in node.names]

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        outer, self.within = self.within, self.within or node
        self.generic_visit(node)
        self.within = outer

    def visit_FunctionDef(self, node: Function) -> None:
        arguments = _arguments(node.args)
        outside = [*node.decorator_list, *_outside(node.args), node.returns]
        self.refer(node.name, None, node)
        self.enter(outside, node.body, {a.arg for a in arguments} | bound(node.body))

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.enter(_outside(node.args), [node.body], {a.arg for a in _arguments(node.args)})

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.refer(node.name, None, node)
        self.enter([*node.decorator_list, *node.bases, *node.keywords], node.body, bound(node.body), is_class=True)

    def comprehension(self, node: Comprehension) -> None:
        first, *rest = node.generators
        inside = [first.target, *first.ifs, *rest]
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self.enter([first.iter], [*inside, *results], bound(g.target for g in node.generators))

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comprehension

    def enter(
        self, outside: Iterable[ast.AST | None], inside: Iterable[ast.AST], names: set[str], is_class: bool = False
    ) -> None:
        for node in outside:
            if node is not None:
                self.visit(node)
        self.scopes.append((is_class, names))
        for node in inside:
            self.visit(node)
        self.scopes.pop()

    def refer(self, name: str, attribute: str | None, node: ast.AST) -> None:
        """A class's names are seen in its own body (`x = x` there counts as its own), not in the functions inside."""
        seen = [names for is_class, names in self.scopes[:-1] if not is_class] + [n for _, n in self.scopes[-1:]]
        if not any(name in names for names in seen):
            self.found.append(Reference(name, attribute, node, self.within))


def references(node: ast.AST) -> list[Reference]:
    """Every global reference below a module-level statement, definitions of global names included."""
    finder = _Finder()
    finder.visit(node)
    return finder.found


def bound(body: Iterable[ast.AST]) -> set[str]:
    """Names that statements bind in their own scope, less those declared global; imports of nsagen bind none."""
    names: set[str] = set()
    declared: set[str] = set()
    for node in _own(body):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, _NAMED) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            names.add(node.rest)
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and not is_own(node):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Global):
            declared |= {*node.names}
    return names - declared


def is_own(node: ast.AST) -> bool:
    """`from nsagen… import …`."""
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nsagen"


def _own(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes of one scope; of a scope inside, its head, and the `:=` in a comprehension."""
    for node in body:
        yield node
        if not isinstance(node, _SCOPES):
            yield from _own(ast.iter_child_nodes(node))
        elif isinstance(node, Comprehension):
            yield from (n.target for n in ast.walk(node) if isinstance(n, ast.NamedExpr))


def _arguments(a: ast.arguments) -> list[ast.arg]:
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x)]


def _outside(a: ast.arguments) -> list[ast.AST | None]:
    """What a signature evaluates in the scope around it."""
    return [*a.defaults, *a.kw_defaults, *(x.annotation for x in _arguments(a))]

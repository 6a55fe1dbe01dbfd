"""A generated module in a file that needs torch and triton alone: what it uses of nsagen.runtime stands in it.

Each module that it imports, directly or not, becomes a section, imported ones first. Of a section only the statements
stay that the generated module reaches, as they are written in the runtime but for their names: `launch.pick` is
`_launch_pick` here, the class `Config` is `_Config`. It is one ordinary Python text: Triton, debuggers, pickle and
torch.compile find their sources and names in it as in any other.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterable, Iterator

from nsagen.errors import CompileError
from nsagen.render.link import Import, Module, Statement, Symbol, runtime_module
from nsagen.render.names import references
from nsagen.render.rename import renamed

WIDTH = 120
MAIN = "__main__"  # the generated module, whose names stay


def link(text: str) -> str:
    """The text of a generated module with the runtime in it."""
    main = Module(MAIN, text)
    reached = _reached(main)
    modules = [*_dependencies(main, {MAIN}), main]
    names = _Names(modules, reached)
    sections = [_section(m, reached[m.name], names) for m in modules if reached.get(m.name) and m is not main]
    body = renamed(main, main.statements, names)
    imports = _imports(modules, reached)
    head = main.text[: main.span(main.imports[0])[0]].decode().rstrip()
    linked = "\n\n\n".join([f"{head}\n\nfrom __future__ import annotations\n\n{imports}", *sections, _rule(), body])
    return _checked(linked + "\n")


class _Names:
    """The name of every symbol in the linked text."""

    def __init__(self, modules: list[Module], reached: dict[str, set[Statement]]) -> None:
        self.modules = {m.name: m for m in modules}
        self.taken: dict[str, Symbol] = {}
        for m in modules:
            for alias, target in m.others.items():
                self._take(alias, (str(target), ""))
        for m in modules:
            for name in sorted({name for s in reached.get(m.name, ()) for name in s.defines}):
                self._take(self((m.name, name)), (m.name, name))

    def __call__(self, symbol: Symbol) -> str:
        module, name = symbol
        if module == MAIN:
            return name
        if name in self.modules[module].classes:
            return f"_{name.lstrip('_')}"
        return f"_{module.rpartition('.')[2]}_{name.lstrip('_')}"

    def _take(self, name: str, symbol: Symbol) -> None:
        other = self.taken.setdefault(name, symbol)
        if other != symbol:
            raise CompileError(f"standalone: {other} and {symbol} would both be called {name!r}: rename one of them")


def _dependencies(module: Module, seen: set[str]) -> Iterator[Module]:
    """The modules of nsagen that a module imports, each after those that it imports itself."""
    for name in dict.fromkeys(target for target, _ in module.own.values()):
        if name not in seen:
            seen.add(name)
            imported = runtime_module(name)
            yield from _dependencies(imported, seen)
            yield imported


def _reached(main: Module) -> dict[str, set[Statement]]:
    """The statements that the main module needs, by module; those that define nothing go with their module."""
    reached: dict[str, set[Statement]] = {MAIN: set()}
    waiting = list(main.statements)
    homes = {s: main for s in waiting}
    while waiting:
        statement = waiting.pop()
        reached[homes[statement].name].add(statement)
        for (name, symbol), _ in statement.uses:
            if name in ("", MAIN):
                continue
            module = runtime_module(name)
            first = name not in reached
            reached.setdefault(name, set())
            needed = [s for s in module.statements if symbol in s.defines or (first and not s.defines)]
            new = [s for s in needed if s not in homes]
            homes.update((s, module) for s in new)
            waiting += new
    return reached


def _section(module: Module, kept: set[Statement], names: _Names) -> str:
    title = [f"# {line}".rstrip() for line in module.doc.splitlines()]
    statements = [s for s in module.statements if s in kept]
    return "\n".join([_rule(module.name), *title, "\n", _layout(module, statements, names)])


def _layout(module: Module, statements: Iterable[Statement], names: _Names) -> str:
    """Statements with the blank lines between them: as they were among simple ones, two around a definition."""
    text, before = "", None
    for s in statements:
        if before is not None:
            blank = not module.text[before.end : s.start].strip() and module.text[before.end : s.start].count(b"\n") > 1
            text += "\n\n\n" if s.is_definition or before.is_definition else "\n\n" if blank else "\n"
        text, before = text + renamed(module, [s], names), s
    return text


def _rule(name: str = "") -> str:
    return f"# {'-' * (WIDTH - 3 - len(name))} {name}".rstrip()


def _imports(modules: list[Module], reached: dict[str, set[Statement]]) -> str:
    """What the statements use from elsewhere: the standard library's, then the others."""
    used: dict[str, Import] = {}
    for m in modules:
        aliases = {symbol for s in reached.get(m.name, ()) for (home, symbol), _ in s.uses if not home}
        used.update((alias, m.others[alias]) for alias in aliases)
    standard = {a: i for a, i in used.items() if i[0].split(".")[0] in sys.stdlib_module_names}
    others = {a: i for a, i in used.items() if a not in standard}
    return "\n\n".join("\n".join(_import_lines(group)) for group in (standard, others) if group)


def _import_lines(imports: dict[str, Import]) -> Iterator[str]:
    plain = sorted((module, alias) for alias, (module, name) in imports.items() if name is None)
    yield from (f"import {m}" + ("" if alias == m.split(".")[0] else f" as {alias}") for m, alias in plain)
    for module in sorted({module for module, name in imports.values() if name is not None}):
        parts = sorted((name, alias) for alias, (m, name) in imports.items() if m == module and name is not None)
        yield f"from {module} import {', '.join(n if n == alias else f'{n} as {alias}' for n, alias in parts)}"


def _checked(text: str) -> str:
    """The text, if it defines or imports every name that it uses."""
    module = Module("", text)
    known = module.defined | module.others.keys() | set(dir(builtins)) | {"__name__", "__file__", "__doc__"}
    unknown = {r.name for s in module.statements for r in references(s.node)} - known
    if unknown or module.own:
        raise CompileError(
            f"standalone: nothing defines {sorted(unknown) or sorted(module.own)}: a fault of the linker"
        )
    return text

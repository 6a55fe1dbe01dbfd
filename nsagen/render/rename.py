"""A statement's text with other names in it. Comments and layout stay as they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence

from nsagen.render.link import DEFINITIONS, Module, Statement, Symbol
from nsagen.render.names import Reference, is_own

Edit = tuple[int, int, str]  # start and end in bytes of the module's text, what stands there instead


def renamed(module: Module, statements: Sequence[Statement], name_of: Callable[[Symbol], str]) -> str:
    """The text from the first statement to the last, which follow each other in the module, with every symbol of nsagen
    under its name in the new text and without imports of nsagen."""
    text, end = "", statements[-1].end
    edits = {e for s in statements for e in _edits(module, s, name_of)}
    for start, stop, new in sorted(edits, reverse=True):
        text, end = new + module.text[stop:end].decode() + text, start
    return module.text[statements[0].start : end].decode() + text


def _edits(module: Module, statement: Statement, name_of: Callable[[Symbol], str]) -> Iterator[Edit]:
    in_strings: dict[ast.JoinedStr, dict[str, str]] = {}
    for symbol, r in statement.uses:
        old = _old(module, r)
        new = name_of(symbol) if symbol[0] else old  # names from elsewhere stay
        if old == new:
            continue
        if r.within is not None:
            in_strings.setdefault(r.within, {})[old] = new
        elif isinstance(r.node, (*DEFINITIONS, ast.Global)):
            yield _word(module, statement, r.node, old, new)
        else:
            start, _ = module.span(r.node)
            yield start, start + len(old.encode()), new
    for node, names in in_strings.items():
        start, stop = module.span(node)
        yield start, stop, _in_fields(module.text[start:stop].decode(), names)
    yield from ((*module.span(n), "pass") for n in ast.walk(statement.node) if is_own(n))


def _old(module: Module, r: Reference) -> str:
    """What goes: the name, with its attribute where the name is a module's."""
    return f"{r.name}.{r.attribute}" if module.own.get(r.name, ("", ""))[1] is None else r.name


def _word(module: Module, statement: Statement, node: ast.AST, old: str, new: str) -> Edit:
    """The name in `def name`, `class name`, `global a, name`: the tree does not tell its place."""
    found = re.compile(rb"\b%b\b" % old.encode()).search(module.text, module.span(node)[0], statement.end)
    assert found is not None
    return (*found.span(), new)


def _in_fields(literal: str, names: dict[str, str]) -> str:
    """An f-string with names replaced in its {fields}, wherever they stand."""
    pattern = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, names))})(?!\w)")
    parts, depth = [], 0
    for part in re.findall(r"\{\{|[{}]|[^{}]+", literal):
        if part != "{{" or depth:  # outside a field two braces are one brace of the text; so are }}, which end none
            depth = max(0, depth + part.count("{") - part.count("}"))
        parts.append(pattern.sub(lambda m: names[m[0]], part) if depth else part)
    return "".join(parts)

"""Layer 0: what goes wrong, with the place and the way out."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

WIDTH, MESSAGE = 160, 240  # of a rendered source line and of a message, in characters


def short(text: str, limit: int = 60) -> str:
    """The text, or its beginning with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """The text on one line that no terminal obeys: what cannot be printed is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Span:
    """A place in a file: 1-based line and columns [column, end_column), and the text of that line."""

    file: str
    line: int
    column: int
    end_column: int
    source: str


@dataclass(frozen=True)
class Diagnostic:
    """One broken rule: its id, a message with the values at odds, the place (None for dicts), and the way out."""

    rule: str
    message: str
    span: Span | None = None
    hint: str | None = None

    def render(self, caret: bool = True) -> str:
        """`file:line:col: error: message [rule]` on one line, then the source with a caret, then the help."""
        at = self.span
        place = f"{printable(at.file)}:{at.line}:{at.column}: " if at else ""
        lines = [f"{place}error: {short(printable(self.message), MESSAGE)} [{self.rule}]"]
        if at and caret and at.source.strip():
            lines += _pointed(at)
        if self.hint:
            lines.append(f"  help: {short(printable(self.hint), MESSAGE)}")
        return "\n".join(lines)


def _pointed(at: Span) -> list[str]:
    """The source line, cut to what surrounds the place, and carets under the place."""
    start, end = at.column - 1, max(at.column, at.end_column - 1)
    cut = 0 if len(at.source) <= WIDTH else max(0, start - WIDTH // 2)
    shown = at.source[cut : cut + WIDTH]
    left, right = "…" * (cut > 0), "…" * (cut + WIDTH < len(at.source))
    before, under = _visible(shown[: start - cut]), _visible(shown[start - cut : end - cut])
    carets = "^" * max(1, _columns(under))
    return [f"  {left}{_visible(shown)}{right}", "  " + " " * _columns(left + before) + carets]


def _visible(source: str) -> str:
    """One sign for each character: a tab is a space, what cannot be printed a `·`."""
    if source.isprintable():
        return source
    return "".join(" " if c == "\t" else c if c.isprintable() else "·" for c in source)


def _columns(text: str) -> int:
    """The columns of a terminal that the text takes: wide letters and emoji take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(map(_width, text))


def _width(c: str) -> int:
    if unicodedata.category(c) in ("Mn", "Me"):
        return 0
    return 1 + (unicodedata.east_asian_width(c) in "WF")


class NsagenError(Exception):
    """Base of every error that nsagen raises on purpose."""


class SpecError(NsagenError):
    """A spec breaks rules: all of them, in the order of their places."""

    def __init__(self, diagnostics: list[Diagnostic] | tuple[Diagnostic, ...]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(d.render() for d in self.diagnostics))

    def __reduce__(self) -> tuple[type[SpecError], tuple[tuple[Diagnostic, ...]]]:
        return type(self), (self.diagnostics,)  # crosses processes with its diagnostics, not with their text


class InputError(NsagenError, ValueError):
    """Tensors that a call cannot take: wrong shape, dtype, device or option."""


class CompileError(NsagenError):
    """A module could not be made or a kernel could not be compiled."""


class Refused(NsagenError):
    """A pass or a lowering cannot do what is asked; the message is the reason."""


class IRError(NsagenError):
    """The IR is malformed after a pass; the message names its line."""


class MissingPackage(NsagenError, ImportError):
    """Something needs a package that nsagen works without: which one, and the extra that brings it."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}: install it with `pip install 'nsagen[{extra}]'`", name=package)


class VersionError(NsagenError):
    """A generated module and the runtime do not fit."""

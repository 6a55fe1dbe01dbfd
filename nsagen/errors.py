"""Layer 0: what goes wrong, with the place and the way out."""

from __future__ import annotations

from dataclasses import dataclass


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
        place = f"{at.file}:{at.line}:{at.column}: " if at else ""
        lines = [f"{place}error: {self.message} [{self.rule}]"]
        if at and caret and at.source.strip():
            lines += [f"  {at.source}", "  " + " " * (at.column - 1) + "^" * max(1, at.end_column - at.column)]
        if self.hint:
            lines.append(f"  help: {self.hint}")
        return "\n".join(lines)


class NsagenError(Exception):
    """Base of every error that nsagen raises on purpose."""


class SpecError(NsagenError):
    """A spec breaks rules: all of them, in the order of their places."""

    def __init__(self, diagnostics: list[Diagnostic] | tuple[Diagnostic, ...]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(d.render() for d in self.diagnostics))


class InputError(NsagenError, ValueError):
    """Tensors that a call cannot take: wrong shape, dtype, device or option."""


class CompileError(NsagenError):
    """A module could not be made or a kernel could not be compiled."""


class Refused(NsagenError):
    """A pass or a lowering cannot do what is asked; the message is the reason."""


class IRError(NsagenError):
    """The IR is malformed after a pass; the message names its line."""


class VersionError(NsagenError):
    """A generated module and the runtime do not fit."""

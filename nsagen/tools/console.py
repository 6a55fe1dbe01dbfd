"""Printing: aligned tables, unified diffs, a progress bar. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
COLORS = {"+": "32", "-": "31", "@": "36"}


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as they need: first one to the left, numbers to the right; never wrapped."""
    lines = [list(head), *([str(x) for x in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    right = [i > 0 and all(_numeric(line[i]) for line in lines[1:]) for i in range(len(head))]
    return "\n".join(
        "  ".join(x.rjust(w) if r else x.ljust(w) for x, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )


def _numeric(text: str) -> bool:
    return not text.strip("0123456789.,-–+e%×") or text in ("inf", "nan")


def unified(old: str, new: str, before: str, after: str) -> str:
    """A unified diff; in colour where stdout is a terminal."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), before, after, lineterm="")
    return "\n".join(map(_coloured, lines)) if sys.stdout.isatty() else "\n".join(lines)


def _coloured(line: str) -> str:
    code = COLORS.get(line[:1])
    return f"\x1b[{code}m{line}\x1b[0m" if code else line


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a progress bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(items, total=total, description=what)

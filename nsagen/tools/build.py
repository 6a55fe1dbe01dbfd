"""`nsagen build`: modules into a directory, or whether they are up to date there."""

from __future__ import annotations

from pathlib import Path

from nsagen.api import OutOfDate, build
from nsagen.spec import Spec

SHOWN = 40  # lines of a diff


def build_one(spec: Spec, out: Path, check: bool, standalone: bool = False) -> tuple[bool, str]:
    """Build (or check) a spec: whether all is well, and what to say."""
    try:
        path = build(spec.to_dict(), out, check=check, standalone=standalone)
    except OutOfDate as error:
        return False, f"{error}\n{_excerpt(error.diff)}"
    return True, f"{path}: {'up to date' if check else 'built'}"


def _excerpt(diff: str) -> str:
    lines = diff.splitlines()
    added = sum(line.startswith("+") for line in lines[2:])
    removed = sum(line.startswith("-") for line in lines[2:])
    more = [f"… {len(lines) - SHOWN} more lines"] if len(lines) > SHOWN else []
    return "\n".join([f"{added} lines added, {removed} removed", *lines[:SHOWN], *more])

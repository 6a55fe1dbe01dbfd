"""The kinds of branch. A new kind is an entry here: its options and how it lowers; no template, no pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nsagen.spec.rules import Checked


class Options(Checked):
    """Base of a kind's options."""


@dataclass(frozen=True)
class BranchKind:
    """lower(options, lowering) adds the branch to the graph (spec/lower.py: Lowering)."""

    name: str
    options: type[Options]
    lower: Callable[[Any, Any], None]
    doc: str


_kinds: dict[str, BranchKind] = {}


def register(kind: BranchKind) -> BranchKind:
    """Make the kind known to specs, their schema and their error messages."""
    if kind.name in _kinds:
        raise ValueError(f"branch kind {kind.name!r} is registered already")
    _kinds[kind.name] = kind
    return kind


def unregister(name: str) -> None:
    del _kinds[name]


def kind(name: str) -> BranchKind:
    return _kinds[name]


def kinds() -> dict[str, BranchKind]:
    """Name -> kind, in the order of registration."""
    return dict(_kinds)

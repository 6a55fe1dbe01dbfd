"""The version of the runtime's interface, which every generated module states that it was built for."""

from __future__ import annotations

import re

from nsagen.errors import VersionError

RUNTIME_VERSION = 22
"""Raised by one whenever a module generated before the change would no longer run, or would run wrongly."""


def require(version: int, module: str) -> None:
    """Refuses to run `module`, generated for runtime `version`, on a runtime of another version.

    Raises VersionError with both versions and the way out: rebuild an old module, upgrade for a newer one.
    """
    if version == RUNTIME_VERSION:
        return
    age, way_out = (
        ("older", "build it again from its spec with `nsagen build`, or install the nsagen that built it")
        if version < RUNTIME_VERSION
        else ("newer", "upgrade nsagen, or build the module again from its spec with the `nsagen build` installed here")
    )
    raise VersionError(
        f"module {module!r} was generated for version {version} of nsagen.runtime, "
        f"{age} than the installed version {RUNTIME_VERSION}: {way_out}"
    )


def require_stated(doc: object) -> None:
    """`require` for the generated module with this docstring, whose imports come before its own call; others pass."""
    stated = re.search(r"(?m)^runtime  (\d+)$", doc) if isinstance(doc, str) else None
    if stated:
        assert isinstance(doc, str)
        require(int(stated[1]), doc.split(":", 1)[0])

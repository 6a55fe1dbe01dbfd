"""The version of the runtime's interface, which every generated module states that it was built for."""

from __future__ import annotations

from nsagen.errors import VersionError

RUNTIME_VERSION = 2
"""Raised by one whenever a module generated before the change would no longer run, or would run wrongly."""


def require(version: int, module: str) -> None:
    """Refuses to run `module`, generated for runtime `version`, on a runtime of another version.

    Raises VersionError with both versions and the way out: rebuild an old module, upgrade for a newer one.
    """
    if version == RUNTIME_VERSION:
        return
    way_out = "rebuild it with `nsagen build`" if version < RUNTIME_VERSION else "upgrade nsagen, or rebuild it here"
    raise VersionError(
        f"module {module!r} was generated for version {version} of nsagen.runtime, "
        f"but the installed runtime has version {RUNTIME_VERSION}: {way_out}"
    )

"""Layer 1: all that a generated module imports. Knows nothing of the compiler. Submodules load when they are used."""

from __future__ import annotations

import sys
from typing import NoReturn


def __getattr__(name: str) -> NoReturn:
    """`from nsagen.runtime import NAME` for a NAME that this version lacks: says so if a generated module asks."""
    from nsagen.runtime.version import require_stated

    require_stated(sys._getframe(1).f_globals.get("__doc__"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

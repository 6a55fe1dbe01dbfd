"""Whether this process interprets Triton kernels or runs them: to be settled before triton is imported."""

from __future__ import annotations

import os
import sys

from nsagen.errors import MissingPackage, NsagenError

VARIABLE = "TRITON_INTERPRET"


def compiled_kernels() -> None:
    """Real kernels from here on, also in a shell that has TRITON_INTERPRET=1."""
    if _interprets() and "triton" in sys.modules:
        raise NsagenError(f"triton was imported with {VARIABLE}=1: kernels are compiled in a process of their own")
    os.environ.pop(VARIABLE, None)


def interpreted_kernels() -> None:
    """Kernels run on CPU tensors from here on."""
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise MissingPackage("Triton's interpreter", "numpy", "bench") from None
    if not _interprets() and "triton" in sys.modules:
        raise NsagenError(f"triton was imported without {VARIABLE}=1: set it before, or verify in a process of its own")
    os.environ[VARIABLE] = "1"


def _interprets() -> bool:
    return os.environ.get(VARIABLE, "").lower() in ("1", "true", "on", "yes", "y")

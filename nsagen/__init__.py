"""nsagen: a compiler from a YAML spec of a sparse attention to a Python module of Triton kernels.

Names are resolved on first use (PEP 562), so that `import nsagen.compiler` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsagen import errors as errors
    from nsagen.api import build as build
    from nsagen.api import load as load

    __version__: str

__all__ = ["__version__", "build", "errors", "load"]


def __getattr__(name: str) -> Any:
    if name in ("build", "load"):
        value = getattr(import_module("nsagen.api"), name)
    elif name == "errors":
        value = import_module("nsagen.errors")
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nsagen")
    except PackageNotFoundError:  # a source tree on the path
        return "0+unknown"

"""All that a generated module imports besides torch and triton. It knows nothing of the compiler."""

from __future__ import annotations

from nsagen.runtime import checks, compress, ops, torch_path, version

__all__ = ["checks", "compress", "ops", "torch_path", "version"]

"""Layer 0: where the package's data lie, and writing a file so that nobody ever reads half of it."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """templates/ or specs/: in the source tree, or under the package's own files where it is installed."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def write_text(path: Path, text: str) -> bool:
    """Write `text` to `path` by temp-and-rename; False, and nothing touched, where it is there already."""
    data = text.encode()
    with suppress(FileNotFoundError):
        if path.read_bytes() == data:
            return False
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return True

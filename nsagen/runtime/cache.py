"""The cache on disk: generated modules under content-keyed names, one file each.

NSAGEN_CACHE_DIR, else the user's cache directory. Files are written by temp-and-rename, so a reader sees a whole file
or none; a lock only keeps many processes from writing the same one. Nothing in it is needed again: it may be deleted
at any time.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
import threading
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from nsagen.files import write_text

VARIABLE = "NSAGEN_CACHE_DIR"
_OURS = re.compile(r"[a-z][a-z0-9_]{0,62}_[0-9a-f]{12}\.py(\.lock)?|\.[a-z][a-z0-9_]*\.py\..*\.tmp")
_lock = threading.Lock()
_fallback: Path | None = None


def directory() -> Path:
    """Where the cache lies; not created."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    try:
        import platformdirs
    except ImportError:
        return Path.home() / ".cache" / "nsagen"
    return Path(platformdirs.user_cache_dir("nsagen", appauthor=False))


def store(name: str, digest: str, text: str) -> Path:
    """The path of a file NAME_DIGEST.py with this text, in the cache or, where it cannot be written, elsewhere."""
    try:
        return _store(directory(), name, digest, text)
    except OSError as error:
        return _store(_temporary(error), name, digest, text)


def clear() -> int:
    """Remove what nsagen wrote to the cache, and nothing else; the number of modules removed."""
    folder, removed = directory(), 0
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
            removed += path.suffix == ".py"
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return removed


def _store(folder: Path, name: str, digest: str, text: str) -> Path:
    path = folder / f"{name}_{digest}.py"
    if path.is_file() and path.read_bytes() == text.encode():
        return path  # also where the cache is read-only
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        write_text(path, text)
    return path


def _locked(path: Path) -> AbstractContextManager[object]:
    try:
        from filelock import FileLock
    except ImportError:
        return nullcontext()  # the rename is atomic all the same
    return FileLock(f"{path}.lock", timeout=30)  # a Timeout is an OSError


def _temporary(error: OSError) -> Path:
    """A directory for this process alone; says once why."""
    global _fallback
    with _lock:
        if _fallback is None:
            _fallback = Path(tempfile.mkdtemp(prefix="nsagen-"))
            atexit.register(shutil.rmtree, _fallback, ignore_errors=True)
            reason = error.strerror or error
            warnings.warn(
                f"nsagen: the cache {directory()} cannot be written ({reason}); using {_fallback} for this process. "
                f"Set {VARIABLE} to a writable directory",
                stacklevel=4,
            )
        return _fallback

"""The cache on disk: generated modules and what was measured of their kernels, under content-keyed names.

NSAGEN_CACHE_DIR, else the user's cache directory. Files are written by temp-and-rename, so a reader sees a whole file
or none, whenever a writer dies. Locks only spare work and keep one writer's additions from another's: the system frees
them when their owner dies, and where none is to be had, writing goes on without. What a killed writer leaves is swept
up by a later one. Nothing in the cache is needed again: it may be deleted at any time.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from nsagen.files import write_text

VARIABLE = "NSAGEN_CACHE_DIR"
PATIENCE = 30  # seconds for a lock: an owner that is stopped, not dead, must not stop others
STALE = 3600  # seconds: a temporary file this old has lost its writer
_TEMPORARY = re.compile(r"\.[a-z][a-z0-9_]*\.(py|json)\..*\.tmp")
_OURS = re.compile(rf"[a-z][a-z0-9_]*_[0-9a-f]{{12}}\.(py|json)(\.lock)?|{_TEMPORARY.pattern}")
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
    return update(f"{name}_{digest}.py", lambda old: text)


def update(file: str, change: Callable[[str | None], str]) -> Path:
    """Write change(the file's text, or None) in its place, in the cache or, where it cannot be written, elsewhere."""
    try:
        return _update(directory() / file, change)
    except OSError as error:
        return _update(_temporary(error) / file, change)


def read(file: str) -> list[str]:
    """The file's text in the cache and in this process's stand-in for it, where they are there."""
    found: list[str] = []
    with suppress(OSError, RuntimeError):  # no home, either
        found += filter(None, [_text(directory() / file)])
    return found + ([text] if _fallback and (text := _text(_fallback / file)) else [])


def clear() -> int:
    """Remove what nsagen wrote to the cache, and nothing else; the number of modules and measurements removed."""
    folder, removed = directory(), 0
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
            removed += path.suffix in (".py", ".json")
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return removed


def _update(path: Path, change: Callable[[str | None], str]) -> Path:
    if _text(path) == change(_text(path)):
        return path  # also where the cache is read-only
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    with _locked(path):
        write_text(path, change(_text(path)))
    return path


@lru_cache(maxsize=8)
def _sweep(folder: Path) -> None:
    """Once a process: remove the temporary files of writers that were killed."""
    stale = time.time() - STALE
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # another process sweeps, too
            if _TEMPORARY.fullmatch(path.name) and path.stat().st_mtime < stale:
                path.unlink()


def _text(path: Path) -> str | None:
    """None where there is no such file, or none that can be read as text."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """With the file's lock; without, where there is none to be had: the rename is atomic all the same."""
    try:
        from filelock import FileLock

        lock = FileLock(f"{path}.lock", timeout=PATIENCE)
        lock.acquire()
    except (ImportError, OSError, NotImplementedError):  # a Timeout is an OSError
        lock = None
    try:
        yield
    finally:
        if lock:
            lock.release()


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
                stacklevel=5,
            )
        return _fallback

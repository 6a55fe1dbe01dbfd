"""Compiling candidates before they are measured: in parallel processes, into Triton's own cache on disk.

Each process runs the whole operation once with a round's candidates, on a shorter sequence whose arguments Triton
specialises alike. A candidate that fails here is left to the measurement, which says so; a process that dies costs
only its share.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from nsagen.errors import CompileError
from nsagen.tools.tune_search import Rounds, Tried

SHORT = 4096  # tokens that a compilation runs on at least

_measurer: Any = None  # of a worker process


def import_file(path: str) -> ModuleType:
    """A generated module from its file."""
    found = importlib.util.spec_from_file_location("_nsagen_tuned", path)
    if found is None or found.loader is None or not os.path.isfile(path):
        raise CompileError(f"{path} is no generated module")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    if not hasattr(module, "_CONFIGS"):
        raise CompileError(f"{path} is no generated module")
    return module


def short(length: int) -> int:
    """A length that is as divisible as the given one, for every stride that Triton may look at."""
    return length if length <= SHORT else SHORT + length % SHORT


def compile_all(wanted: Rounds, path: str, length: int, dtype: str) -> Iterator[None]:
    """Compile all rounds, on every core this process may use; yields after each. A lone one is not worth a process."""
    count = min(len(wanted), _cores())
    if count < 2:
        return
    context = multiprocessing.get_context("spawn")
    with _pool(ProcessPoolExecutor(count, context, _start, (path, short(length), dtype))) as pool:
        for done in as_completed(_submitted(pool, wanted)):
            with suppress(BrokenProcessPool):
                done.result()
            yield


def _submitted(pool: ProcessPoolExecutor, wanted: Rounds) -> list[Future[None]]:
    """All of them, unless a process dies before that."""
    futures: list[Future[None]] = []
    with suppress(BrokenProcessPool):
        for tried in wanted:
            futures.append(pool.submit(_work, tried))
    return futures


@contextmanager
def _pool(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """The pool; an interruption ends its processes at once."""
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(path: str, length: int, dtype: str) -> None:
    """A worker's life begins: Ctrl-C is the parent's to handle."""
    global _measurer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from nsagen.tools.tune_measure import GpuMeasurer

    _measurer = GpuMeasurer(import_file(path), length, dtype, sets=1)


def _work(tried: Tried) -> None:
    """Compile by running; where the round fails, each of its halves."""
    from nsagen.tools.tune_measure import forced
    from nsagen.tools.tune_search import attempts

    def run(part: Tried) -> dict[str, float]:
        with forced(_measurer.module._CONFIGS, part):
            _measurer.run(0)
        return {}

    with suppress(Exception):
        for _ in attempts(run, tried):
            pass

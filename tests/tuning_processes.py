"""Whole processes that build, load and tune specs over one cache, with made-up times: test_processes.py runs this.

    python tuning_processes.py at_once OUT      ten at once
    python tuning_processes.py kills OUT        ten at a time, until a hundred were killed

Prints the exit code of each number as JSON; what a process prints is in OUT/NUMBER.log. They are forked from one that
has imported everything, so that a life is a second of work, not of imports.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

AT_ONCE, KILLS = 10, 100
SHARED = 8192  # tokens that every process measures, beside a length of its own
CANDIDATES = 5


def spec_of(generation: int) -> dict[str, Any]:
    """The same for ten processes in a row; its kernels are another generation's in nothing but the window."""
    return {
        "name": "many_processes",
        "heads": {"query": 2, "kv": 1, "qk_dim": 16, "v_dim": 16},
        "kv": "shared",
        "branches": {"window": {"size": 8 + generation}},
        "combine": "single",
    }


def own_length(number: int) -> int:
    return 10_000 + number


def place(length: int) -> Any:
    from nsagen.runtime import tuned

    return tuned.Place("NVIDIA H200", "3.6.0", "16", length)


class MadeUp:
    """A measurer: random times after random waits."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def prepare(self) -> None:
        pass

    def __call__(self, tried: Any) -> dict[str, float]:
        time.sleep(self.draw.uniform(0.0, 0.002))
        return {kernel: self.draw.uniform(1.0, 2.0) for kernel in tried}


def h200(index: int) -> Any:
    """launch.chip, where there is none."""
    from nsagen.runtime import launch

    return launch.Chip("sm_90", 227 << 10, "NVIDIA H200")


def work(number: int, out: Path) -> None:
    """A life: build, load, tune."""
    from nsagen import api
    from nsagen.tools import tune

    spec = spec_of(number // AT_ONCE)
    api.build(spec, out / "built")
    module = api.load(spec)
    request = tune.Request("", (SHARED, own_length(number)), candidates=CANDIDATES, force=True)
    made_up = MadeUp(random.Random(number))
    bench = tune.Bench(place, lambda wanted, length: None, lambda length: made_up)
    assert tune.tune(tune.subjects_of(module, request), request, bench)


def start(number: int, out: Path) -> int:
    """The process of that number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(out / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work(number, out)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # pyright: ignore
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Its exit code, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_once(out: Path) -> dict[int, int]:
    children = {n: start(n, out) for n in range(AT_ONCE)}
    return {n: ended(child) for n, child in children.items()}


def kills(out: Path) -> dict[int, int]:
    """Whoever was hit, dead or at its end already, is followed by the next; after the last kill the rest may finish."""
    draw, codes = random.Random(0), dict[int, int]()
    alive = {n: start(n, out) for n in range(AT_ONCE)}
    while list(codes.values()).count(-signal.SIGKILL) < KILLS:
        time.sleep(draw.uniform(0.0, 0.06))
        number = draw.choice(list(alive))
        child = alive.pop(number)
        os.kill(child, signal.SIGKILL)  # there in any case: nobody has waited for it
        codes[number] = ended(child)
        following = len(codes) + len(alive)
        alive[following] = start(following, out)
    return codes | {n: ended(child) for n, child in alive.items()}


def warm_up() -> None:
    """Import and run once what every process will, on a spec of no generation."""
    from nsagen import api
    from nsagen.runtime import launch
    from nsagen.tools import tune

    launch.chip = h200
    tune.subjects_of(api.load(spec_of(1000)), tune.Request(""))


MODES: dict[str, Callable[[Path], dict[int, int]]] = {"at_once": at_once, "kills": kills}

if __name__ == "__main__":
    warm_up()
    print(json.dumps(MODES[sys.argv[1]](Path(sys.argv[2]))))

"""Which kernels a step launches, and how long each takes on the device: by the profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

BETWEEN = "between kernels"
Profiled = Callable[[Callable[[], Any]], list[tuple[str, float]]]


def on_device(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """(kernel, µs) of what `run` has the device do, in order."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    events = [e for e in trace.events() or () if e.device_type.name == "CUDA"]  # not the host's launches
    events.sort(key=lambda e: e.time_range.start)
    return [(e.name, float(e.device_time)) for e in events]  # pyright: ignore[reportArgumentType]


def kernel_times(
    step: Callable[[], Any], before: Callable[[], Any], count: int, profiled: Profiled = on_device
) -> dict[str, float]:
    """Median µs a step of each kernel of `step`, in the order of their first launch; `before` runs before each step.

    What `before` launches, too, is not told apart from it.
    """
    before()
    of_step = [name for name, _ in profiled(step)]
    spent: defaultdict[str, list[float]] = defaultdict(list)

    def repeated() -> None:
        for _ in range(count):
            before()
            step()

    for name, us in profiled(repeated):
        spent[name].append(us)
    return {name: of_step.count(name) * median(spent[name]) for name in dict.fromkeys(of_step) if spent[name]}


def shares(times: dict[str, float], us: float) -> Iterator[tuple[str, float]]:
    """The kernels, then what a step of `us` takes beside them: launches, and gaps between them."""
    yield from times.items()
    if times:
        yield BETWEEN, us - sum(times.values())

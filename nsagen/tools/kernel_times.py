"""Which kernels a step launches, and how long each takes on the device: by the profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, median
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
    step: Callable[[], Any], before: Callable[[int], Any], round: int, rounds: int, profiled: Profiled = on_device
) -> dict[str, float]:
    """µs a step of each kernel of `step`, in the order of their first launch: the mean over the steps of a round.

    Of each of those, the median of `rounds`. before(i) runs before step i of a round; what it launches, too, is not
    told apart from the step.
    """
    before(0)
    of_step = [name for name, _ in profiled(step)]
    spent: defaultdict[str, list[float]] = defaultdict(list)

    def repeated() -> None:
        for _ in range(rounds):
            for i in range(round):
                before(i)
                step()

    for name, us in profiled(repeated):
        spent[name].append(us)
    times = {name: spent[name] for name in dict.fromkeys(of_step) if spent[name]}
    return {name: of_step.count(name) * _mean(us, round, rounds) for name, us in times.items()}


def _mean(launches: Sequence[float], round: int, rounds: int) -> float:
    """Over the steps of a round, of each one's median; every step has as many of the launches."""
    of_step: list[list[float]] = [[] for _ in range(round)]
    for i, us in enumerate(launches):
        of_step[i * round * rounds // len(launches) % round].append(us)
    return fmean(median(times) for times in of_step if times)


def shares(times: dict[str, float], us: float) -> Iterator[tuple[str, float]]:
    """The kernels, then what a step of `us` takes beside them: launches, and gaps between them."""
    yield from times.items()
    if times:
        yield BETWEEN, us - sum(times.values())

"""The clock of `nsagen bench`: forward, backward and peak memory of a case at a length; a failure is a reason."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nsagen.tools.bench_inputs import Case, Work

WARMUP = 25  # ms
SETS, ROOM = 3, 256 << 20  # sets of inputs in turn, while the first tensor of one stays below so many bytes
LEAST, MOST = 3, 50  # calls that a wall clock times
SHORT, CALLS = 3.0, 21  # ms of a call of which the host's part is timed, too, as many times: fewer launches than wait
OUT_OF_MEMORY, TOO_SLOW = "out of memory", "too slow"


@dataclass(frozen=True)
class Row:
    """One case at one length; None where there is no number, and then a reason."""

    name: str
    kind: str
    length: int
    forward_ms: float | None = None
    backward_ms: float | None = None
    peak_gib: float | None = None
    reason: str | None = None
    note: str | None = None
    predicted_forward_ms: float | None = None
    predicted_backward_ms: float | None = None
    host_forward_ms: float | None = None  # that the host is busy with a short call: none takes less
    host_backward_ms: float | None = None

    @property
    def forward_ratio(self) -> float | None:
        """Measured over predicted, or over what the host takes where that is more."""
        return _ratio(self.forward_ms, self.predicted_forward_ms, self.host_forward_ms)

    @property
    def backward_ratio(self) -> float | None:
        return _ratio(self.backward_ms, self.predicted_backward_ms, self.host_backward_ms)

    @property
    def both_ms(self) -> float | None:
        return None if self.forward_ms is None or self.backward_ms is None else self.forward_ms + self.backward_ms

    def record(self) -> dict[str, Any]:
        ratios = {"forward_ratio": self.forward_ratio, "backward_ratio": self.backward_ratio}
        return {**asdict(self), **ratios}


def _ratio(measured: float | None, predicted: float | None, host: float | None) -> float | None:
    return measured / max(predicted, host or 0.0) if measured is not None and predicted else None


def _no_prediction(case: str, tokens: int) -> tuple[float | None, float | None]:
    return None, None


@dataclass(frozen=True)
class Clock:
    device: str
    rep: int  # ms of one measurement
    backward: bool = True
    slowest: float = 4.0  # seconds that a forward and backward may take
    rows: list[Row] = field(default_factory=list)
    predict: Callable[[str, int], tuple[float | None, float | None]] = _no_prediction  # forward, backward in ms

    def row(self, case: Case, length: int) -> Row:
        """Raises nothing but an interrupt. The row is kept, so that what cannot work at a greater length is left."""
        found: dict[str, float] = {}
        reason = self._hopeless(case, length) or self._measured(case, length, found)
        if reason is None and self.backward:
            reason = case.forward_only
        row = Row(case.name, case.kind, length, **found, reason=reason, note=case.note)
        forward, backward = self.predict(case.name, length) if found else (None, None)
        row = replace(row, predicted_forward_ms=forward, predicted_backward_ms=backward if self.backward else None)
        self.rows.append(row)
        return row

    def _hopeless(self, case: Case, length: int) -> str | None:
        """By the last shorter length: no memory there, or dense attention (its time grows with T²) too slow here."""
        before = max((r for r in self.rows if r.name == case.name and r.length < length), default=None, key=_length)
        if before is None:
            return None
        if before.forward_ms is None:
            return before.reason if (before.reason or "").startswith((OUT_OF_MEMORY, TOO_SLOW)) else None
        seconds = (before.forward_ms + (before.backward_ms or 0.0)) / 1e3 * (length / before.length) ** 2
        if case.kind in ("dense", "peer") and seconds > self.slowest:
            return f"{TOO_SLOW}: over {self.slowest:g} s a call (--slowest), by its time at {before.length} tokens"
        return None

    def _measured(self, case: Case, length: int, found: dict[str, float]) -> str | None:
        try:
            self._measure(case, length, found)
        except Exception as error:
            reason = reason_of(error)
        else:
            return None
        finally:
            clear(self.device)
        return reason

    def _measure(self, case: Case, length: int, found: dict[str, float]) -> None:
        backward = self.backward and case.forward_only is None
        base = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        works = [case.make(length, 0)]
        with torch.set_grad_enabled(backward):
            self._once(works[0], backward)  # compiles
            peak = self._peak(works[0], backward, base)
            works += [case.make(length, seed) for seed in range(1, _sets(works[0]))]
            ours = case.kind in ("whole", "part")
            self._time("forward", [work.call for work in works], [], found, ours)
            if backward:
                leaves = [leaf for work in works for leaf in work.leaves]
                self._time("backward", _backwards(works), leaves, found, ours)
            if peak is not None:
                found["peak_gib"] = peak

    def _once(self, work: Work, backward: bool) -> None:
        outs = work.call()
        if backward:
            work.backward(outs)
        _forget(work.leaves)

    def _peak(self, work: Work, backward: bool, base: int) -> float | None:
        """GiB of inputs, what is kept, outputs and gradients, at most at once."""
        if self.device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self._once(work, backward)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - base) / 2**30

    def _time(
        self,
        what: str,
        calls: list[Callable[[], Any]],
        leaves: Sequence[Tensor],
        found: dict[str, float],
        with_host: bool,
    ) -> None:
        call = _in_turn(calls)
        found[f"{what}_ms"] = self._ms(call, leaves)
        if with_host and self.device == "cuda" and found[f"{what}_ms"] < SHORT:
            torch.cuda.synchronize()
            found[f"host_{what}_ms"] = statistics.median(wall(call, lambda: _forget(leaves), 0, CALLS))
            torch.cuda.synchronize()

    def _ms(self, call: Callable[[], Any], leaves: Sequence[Tensor]) -> float:
        """The median. The gradients of the leaves are dropped between calls, so that none is added to another."""
        if self.device != "cuda":
            return statistics.median(wall(call, lambda: _forget(leaves), self.rep))
        from triton.testing import do_bench

        return do_bench(call, warmup=WARMUP, rep=self.rep, grad_to_none=leaves, return_mode="median")  # type: ignore[arg-type]


def reason_of(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower():
        return OUT_OF_MEMORY  # a compiler may have wrapped it
    text = next(iter(str(error).strip().splitlines()), "")
    if "No available kernel" in text:
        return "torch has no such kernel for these dims, dtype and GPU"
    return text[:160] if type(error).__name__ == "NsagenError" else f"{type(error).__name__}: {text[:160]}"


def _length(row: Row) -> int:
    return row.length


def _sets(work: Work) -> int:
    """Several where they are cheap; a case without leaves says nothing of its size and has one."""
    return SETS if work.leaves and work.leaves[0].nbytes <= ROOM else 1


def _backwards(works: Sequence[Work]) -> list[Callable[[], Any]]:
    ready = [(work, work.call()) for work in works]
    return [lambda work=work, outs=outs: work.backward(outs) for work, outs in ready]


def _in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    turn: Iterator[Callable[[], Any]] = itertools.cycle(calls)
    return lambda: next(turn)()


def wall(
    call: Callable[[], Any], before: Callable[[], Any], rep: int, least: int = LEAST, most: int = MOST
) -> list[float]:
    """Milliseconds of calls one after the other, `before` run ahead of each and not timed, for about rep ms."""
    times: list[float] = []
    while len(times) < least or (sum(times) < rep and len(times) < most):
        before()
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _forget(leaves: Sequence[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def clear(device: str) -> None:
    """What a case leaves behind; a device that an earlier kernel broke says so at the next case."""
    gc.collect()
    if device == "cuda":
        with suppress(Exception):
            torch.cuda.empty_cache()

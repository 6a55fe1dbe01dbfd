"""What was measured of tile candidates: read where a kernel is launched, written by `nsagen tune`.

A file of the cache for every kernel source, and read-only ones that come with nsagen. One that is truncated, foreign
or of another format counts as empty. Needs neither torch nor triton.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from nsagen.runtime import cache

FORMAT = "nsagen measured tiles 1"
SHIPPED = Path(__file__).parent / "shipped"
EQUAL = 1.01  # times this near to each other are one: the model's order decides


class Place(NamedTuple):
    """Where and at what size: a measurement holds there, and for the lengths around where none is nearer."""

    gpu: str
    triton: str
    kind: str  # 16, ieee or tf32: the kernel's dots
    length: int  # tokens


Times = dict[str, "float | None"]  # candidate -> milliseconds, None where it does not run
Kernel = tuple[str, str]  # name, key of its source
Entries = dict[Kernel, dict[Place, Times]]


def bucket(length: int) -> int:
    """log2 of the smallest power of two that is not below length."""
    return (length - 1).bit_length()


def fastest(kernel: str, key: str, place: Place, candidates: Sequence[str]) -> str | None:
    """The fastest of the candidates at the measured length nearest to place's; None where nothing was measured."""
    known = {p: t for p, t in measured(kernel, key).items() if p[:3] == place[:3]}
    return best(nearest(known, place.length), candidates)


def nearest(known: Mapping[Place, Times], length: int) -> Times:
    """Of the length in the nearest bucket, of those the nearest length."""
    if not known:
        return {}
    at = bucket(length)
    return known[min(known, key=lambda p: (abs(bucket(p.length) - at), abs(p.length - length)))]


def best(times: Mapping[str, float | None], candidates: Iterable[str]) -> str | None:
    """The first of the candidates that is as fast as any, within a hundredth."""
    ran = [(c, ms) for c in candidates if (ms := times.get(c)) is not None]
    least = min((ms for _, ms in ran), default=0.0)
    return next((c for c, ms in ran if ms <= EQUAL * least), None)


def measured(kernel: str, key: str) -> dict[Place, Times]:
    """All that is known of a kernel source; the cache's word counts more than the package's."""
    found = {place: dict(times) for place, times in _shipped().get((kernel, key), {}).items()}
    for text in cache.read(_file(kernel, key)):
        _merge(found, parse(text).get((kernel, key), {}))
    return found


def record(kernel: str, key: str, place: Place, times: Times) -> None:
    """Keep times beside what is known; where nothing can be written, the cache warns once and they are lost."""

    def merged(old: str | None) -> str:
        kept = parse(old or "").get((kernel, key), {})
        _merge(kept, {place: times})
        return dump({(kernel, key): kept})

    with suppress(OSError):
        cache.update(_file(kernel, key), merged)


def dump(entries: Entries) -> str:
    """A line a place, sorted: equal entries are equal text."""
    kernels = ",\n".join(_dump_kernel(kernel, entries[kernel]) for kernel in sorted(entries))
    return f'{{"format": "{FORMAT}", "kernels": [\n{kernels}\n]}}\n'


def _dump_kernel(kernel: Kernel, places: dict[Place, Times]) -> str:
    rows = ",\n  ".join(json.dumps({**p._asdict(), "ms": places[p]}) for p in sorted(places))
    return f'{{"kernel": {json.dumps(kernel[0])}, "key": {json.dumps(kernel[1])}, "measured": [\n  {rows}\n]}}'


def parse(text: str) -> Entries:
    """The entries of a file; none where any of it is not as `dump` writes it."""
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            return {}
        return {(str(k["kernel"]), str(k["key"])): _places(k["measured"]) for k in content["kernels"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def _places(rows: list[dict[str, Any]]) -> dict[Place, Times]:
    return {
        Place(str(r["gpu"]), str(r["triton"]), str(r["kind"]), int(r["length"])): {
            str(label): _milliseconds(ms) for label, ms in dict(r["ms"]).items()
        }
        for r in rows
    }


def _milliseconds(value: object) -> float | None:
    if value is None:
        return None
    ms = float(value)  # pyright: ignore[reportArgumentType]
    if not 0 < ms < float("inf"):
        raise ValueError(f"{ms} milliseconds")
    return ms


def _merge(into: dict[Place, Times], more: Mapping[Place, Times]) -> None:
    for place, times in more.items():
        into.setdefault(place, {}).update(times)


def _file(kernel: str, key: str) -> str:
    return f"{kernel}_{key}.json"


@lru_cache(maxsize=1)
def _shipped() -> Entries:
    found: Entries = {}
    for path in sorted(SHIPPED.glob("*.json")):
        with suppress(OSError, UnicodeDecodeError):
            for kernel, places in parse(path.read_text(encoding="utf-8")).items():
                _merge(found.setdefault(kernel, {}), places)
    return found

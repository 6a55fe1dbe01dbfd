"""The model's first choices beside tile candidates drawn from all that survive: what tuning can gain at most.

    python benchmarks/random_candidates.py nsa_128 --length 65536 --count 50 --json out.json

Every kernel's candidates are measured inside the whole operation, forward and backward, as `nsagen tune` does it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from nsagen import api
from nsagen.render import module as rendering
from nsagen.runtime import launch, tuned
from nsagen.tools import tune
from nsagen.tools.tune_compile import import_file
from nsagen.tools.tune_search import Subject, known


def module_with_all(spec: str, folder: Path) -> Any:
    """The spec's module with every surviving candidate, not only the best that it ships."""
    rendering.SHIPPED_CONFIGS = 1 << 20
    file = folder / f"{spec}.py"
    file.write_text(api.compiled_of(api.read(spec)).source, encoding="utf-8")
    return import_file(str(file))


def drawn(module: Any, count: int, seed: int) -> list[Subject]:
    """Of every kernel the first choice and `count` others, or all there are."""
    source = random.Random(seed)
    subjects: list[Subject] = []
    for name, tiles in module._CONFIGS.items():
        first, *others = launch.candidates(tiles, launch.chip(0), 16)
        if others:
            some = source.sample(others, min(count, len(others)))
            subjects.append(Subject(name, tiles.key, (first, *some), tiles.lengths))
    return subjects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec")
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NSAGEN_CACHE_DIR"] = folder  # what is measured here must not steer a launch later
        module = module_with_all(options.spec, Path(folder))
        subjects = drawn(module, options.count, options.seed)
        request = tune.Request(options.spec, (options.length,), force=True)
        bench = tune.bench_of(module, request)
        tune.tune(subjects, request, bench)
        rows = [_row(s, bench.place(options.length)) for s in subjects if s.runs_at(options.length)]
    total = {side: sum(r[side] for r in rows) for side in ("first_ms", "best_ms")}
    for r in rows:
        named = f"{r['kernel']:16} {r['measured']:3} {r['first']:12} {r['first_ms']:8.3f}"
        print(f"{named}  {r['best']:12} {r['best_ms']:8.3f}")
    print(f"sum {total['first_ms']:.3f} ms with first choices, {total['best_ms']:.3f} with the best: ", end="")
    print(f"{100 * (total['first_ms'] / total['best_ms'] - 1):.1f} % more")
    if options.json:
        record = {"spec": options.spec, "length": options.length, "seed": options.seed, "kernels": rows, **total}
        Path(options.json).write_text(json.dumps(record | {"gpu": launch.chip(0).gpu}, indent=1) + "\n")


def _row(subject: Subject, place: tuned.Place) -> dict[str, Any]:
    times = {label: ms for label, ms in known(subject, place).items() if ms is not None}
    first, best = subject.labels[0], min(times, key=lambda label: times[label])
    return {
        "kernel": subject.kernel, "measured": len(times), "first": first, "first_ms": times[first],
        "best": best, "best_ms": times[best], "ms": times,
    }  # fmt: skip


if __name__ == "__main__":
    main()

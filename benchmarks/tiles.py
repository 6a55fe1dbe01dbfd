"""Times tile candidates of every kernel of a module: the numbers that the cost model of choose_tiles is fitted to.

One forward and backward a candidate, all kernels at once; the profiler tells their times apart.

    python benchmarks/tiles.py --module generated/nsa_128.py --length 65536 --json tiles.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nsagen.runtime.launch import Config

CANDIDATES = {  # part of a kernel's name -> BM×BN w(arps) s(tages)
    "selected_fwd": "16x64w2s3 16x64w2s2 16x32w1s3 16x32w2s3 16x64w4s3 16x64w1s2 16x32w1s2",
    "selected_dq": "16x64w2s2 16x32w2s2 16x32w1s2 16x64w4s2 16x32w2s3 16x64w2s3 16x32w4s2",
    "selected_dkv": "64x64w8s2 32x64w4s3 64x64w4s2 64x64w8s3 32x64w4s2 128x64w8s2 16x64w4s2",
    "select_scores": "64x64w4s3 128x64w8s3 128x128w8s3 64x128w4s3 128x64w4s3 64x64w4s2 128x128w8s2",
    "_fwd": "64x64w4s3 64x64w4s2 128x32w4s3 64x32w4s3 128x64w8s3 128x128w8s2 128x64w4s2",
    "_dq": "64x64w4s2 64x32w4s3 128x64w8s3 64x64w4s3 128x32w8s3 128x64w8s2 64x32w4s2",
    "_dkv": "64x128w8s3 32x64w4s3 64x128w8s2 64x64w4s2 32x128w8s3 64x64w8s2 32x64w4s2",
}


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("measured", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(module: Any, length: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    h = module.SPEC["heads"]

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    return (
        new(1, length, h["query"], h["qk_dim"]),
        new(1, rows, h["kv"], h["qk_dim"]),
        new(1, rows, h["kv"], h["v_dim"]),
        new(1, length, h["query"], h["v_dim"]),
    )


def operation(
    module: Any, length: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Callable[[], torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """The whole op on seeded inputs, the named tensors that gradients are taken of, and its output's gradient."""
    q, k, v, d_out = inputs(module, length, length, dtype)
    branches = list(module.SPEC["branches"])
    named = {"q": q}
    if module.SPEC["kv"] == "per_branch":
        k, v = ({b: torch.randn_like(x) for b in branches} for x in (k, v))
        named |= {f"k.{b}": x for b, x in k.items()} | {f"v.{b}": x for b, x in v.items()}
    else:
        named |= {"k": k, "v": v}
    gates = None
    if module._LAYOUT.gated:
        gates = named["gates"] = torch.rand(1, length, q.shape[2], len(branches), device="cuda", dtype=dtype)
    phi = module.Compressor(device="cuda", dtype=dtype) if module._LAYOUT.pooled else None
    named |= dict(phi.named_parameters()) if phi is not None else {}
    for x in named.values():
        x.requires_grad_()
    return lambda: module.attention(q, k, v, gates, phi), named, d_out


def whole(module: Any, length: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], None]:
    """A function that runs the whole op forward and backward once."""
    forward, _, d_out = operation(module, length, dtype)
    return lambda: forward().backward(d_out)


def candidates(kernel: str) -> list[tuple[int, ...]]:
    shapes = next((shapes for part, shapes in CANDIDATES.items() if part in kernel), "")
    return [tuple(map(int, re.findall(r"[0-9]+", shape))) for shape in shapes.split()]


def kernel_times(run: Any, names: list[str], repeats: int) -> dict[str, float]:
    """Milliseconds of each kernel in one run (all its launches), median over repeats."""
    run()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            run()
            torch.cuda.synchronize()
        spent = dict.fromkeys(names, 0.0)
        rest = 0.0
        for event in trace.events():
            if event.name in spent:
                spent[event.name] += event.device_time / 1e3
            else:
                rest += event.device_time / 1e3
        for name in names:
            times[name].append(spent[name])
        times.setdefault("everything else", []).append(rest)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", required=True)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    module: Any = load(args.module)
    run, names = whole(module, args.length), list(module._CONFIGS)
    results: list[dict[str, Any]] = []
    for i in range(args.rounds):
        tried = {name: candidates(name)[i] for name in names if i < len(candidates(name))}
        for name, shape in tried.items():
            module._CONFIGS[name].forced = Config(*shape, 0)
        try:
            times = kernel_times(run, names, args.repeats)
        except Exception as error:  # a candidate that does not fit is a result, too
            print("round", i, type(error).__name__, str(error)[:300], flush=True)
            continue
        for name, ms in times.items():
            if name in tried or i == 0:
                results.append({"kernel": name, "tile": tried.get(name), "ms": round(ms, 4)})
    for row in sorted(results, key=lambda r: (r["kernel"], r["ms"])):
        print(f"{row['kernel']:20} {row['tile']!s:20} {row['ms']:9.3f} ms")
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"gpu": torch.cuda.get_device_name(), "length": args.length, "results": results}, f, indent=1)


if __name__ == "__main__":
    main()

"""Times tile candidates of one branch on the GPU at hand: the numbers that the cost model of choose_tiles is fitted to.

    python benchmarks/tiles.py --module generated/window_only.py --branch window --length 65536 --json tiles.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from types import ModuleType
from typing import Any

import torch
from triton.testing import do_bench

from nsagen.runtime.launch import Config

FORWARD = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 2),
           (128, 32, 4, 3), (64, 32, 4, 3), (128, 64, 8, 4)]  # fmt: skip
QUERY_GRAD = [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3), (64, 32, 4, 3), (128, 32, 8, 2),
              (64, 128, 8, 2)]  # fmt: skip
KEY_GRAD = [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 2),
            (128, 64, 8, 2), (128, 128, 8, 2), (32, 128, 8, 2), (16, 128, 8, 3)]  # fmt: skip


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("measured", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(module: Any, length: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    h = module.SPEC["heads"]
    new = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    return (
        new(1, length, h["query"], h["qk_dim"]),
        new(1, rows, h["kv"], h["qk_dim"]),
        new(1, rows, h["kv"], h["v_dim"]),
        new(1, length, h["query"], h["v_dim"]),
    )


def measure(module: Any, branch: str, length: int, dtype: torch.dtype, rep: int) -> list[dict[str, Any]]:
    pooled = module._LAYOUT.pooled
    rows = max(0, (length - pooled[1]) // pooled[2] + 1) if pooled and branch == "compressed" else length
    q, k, v, d_out = inputs(module, length, rows, dtype)
    scale = q.shape[-1] ** -0.5
    forward = lambda: getattr(module, f"_{branch}_forward")(q, k, v, None, scale)  # noqa: E731
    out, lse = forward()
    delta = module._delta(d_out, out)
    backward = lambda: getattr(module, f"_{branch}_backward")(q, k, v, d_out, lse, delta, None, None, None, None, scale)  # noqa: E731
    rows_out: list[dict[str, Any]] = []
    for part, candidates, fn in (("fwd", FORWARD, forward), ("dkv", KEY_GRAD, backward), ("dq", QUERY_GRAD, backward)):
        rows_out += sweep(module, f"{branch}_{part}", candidates, fn, rep)
    return rows_out


def sweep(module: Any, kernel: str, candidates: list[tuple[int, ...]], fn: Any, rep: int) -> list[dict[str, Any]]:
    """Time fn under each candidate for `kernel`; leaves the best one in place."""
    results: list[dict[str, Any]] = []
    tables = module._CONFIGS[kernel]
    for bm, bn, warps, stages in candidates:
        if bm < module._LAYOUT.query_heads // module._LAYOUT.kv_heads:
            continue
        for key in tables:
            tables[key] = (Config(bm, bn, warps, stages, 0),)
        try:
            ms = do_bench(fn, warmup=20, rep=rep, return_mode="median")
        except Exception as error:  # a candidate that does not fit is a result, too
            ms = None
            print(kernel, bm, bn, warps, stages, type(error).__name__, str(error)[:120], flush=True)
        results.append({"kernel": kernel, "bm": bm, "bn": bn, "warps": warps, "stages": stages, "ms": ms})
        if ms is not None:
            print(f"{kernel:20} {bm:4}x{bn:<4} w{warps} s{stages}  {ms:8.3f} ms (with its other kernels)", flush=True)
    best = min((r for r in results if r["ms"]), key=lambda r: r["ms"])
    for key in tables:
        tables[key] = (Config(best["bm"], best["bn"], best["warps"], best["stages"], 0),)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", required=True)
    parser.add_argument("--branch", required=True)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--rep", type=int, default=60)
    parser.add_argument("--json")
    args = parser.parse_args()
    module = load(args.module)
    results = measure(module, args.branch, args.length, torch.bfloat16, args.rep)
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"gpu": torch.cuda.get_device_name(), "length": args.length, "results": results}, f, indent=1)


if __name__ == "__main__":
    main()

"""The whole op, forward and backward, beside dense attention (SDPA with cuDNN): medians, peak memory.

    nsagen build nsa_128 && python benchmarks/whole.py --module generated/nsa_128.py --lengths 8192,65536

Says also whether a second backward gives the same bits. A million tokens on one GPU of 141 GB:

    python benchmarks/whole.py --module generated/nsa_128.py --lengths 1048576 --recompute
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import triton
from operation import inputs, load, operation
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

MOST_DENSE = 65536  # tokens; beyond, dense attention takes seconds
LONG = 262144  # tokens; beyond, two sets of gradients do not fit, and one call takes seconds
PART = 1 << 28  # numbers


def timed(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor], d_out: torch.Tensor) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    first = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
    again = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finite = all(bool(g.isfinite().all()) for g in first)
    del first, again
    peak = torch.cuda.max_memory_allocated() / 2**30
    fwd = do_bench(forward, warmup=50, rep=300, return_mode="median")
    bwd = do_bench(
        lambda: out.backward(d_out, retain_graph=True), warmup=50, rep=400, grad_to_none=leaves, return_mode="median"
    )
    return {
        "forward_ms": round(fwd, 3),
        "backward_ms": round(bwd, 3),
        "peak_gib": round(peak, 2),
        "repeatable": same,
        "finite": finite,
    }


def sum_of_bits(x: torch.Tensor) -> int:
    """A part at a time: a sum in 64 bits first makes such a tensor of what it is given."""
    bits = x.view(torch.int16 if x.element_size() == 2 else torch.int32).flatten()
    return sum(int(part.sum(dtype=torch.int64)) for part in bits.split(PART))


def timed_once(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor], d_out: torch.Tensor) -> dict[str, Any]:
    """The second of two calls each way; gradients compared by the sum of their bits."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    sums: list[list[int]] = []
    finite = True
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        marks[0].record()
        out = forward()
        marks[1].record()
        gradients = torch.autograd.grad(out, leaves, d_out)
        marks[2].record()
        torch.cuda.synchronize()
        del out
        sums.append([sum_of_bits(g) for g in gradients])
        finite = finite and all(bool(g.sum(dtype=torch.float32).isfinite()) for g in gradients)
        del gradients
    return {
        "forward_ms": round(marks[0].elapsed_time(marks[1]), 1),
        "backward_ms": round(marks[1].elapsed_time(marks[2]), 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "repeatable": sums[0] == sums[1],
        "finite": finite,
    }


def ours(module: Any, length: int, recompute: bool) -> dict[str, Any]:
    options = {"recompute": True} if recompute else {}
    forward, named, d_out = operation(module, length, **options)
    measure = timed_once if length > LONG else timed
    return measure(forward, list(named.values()), d_out) | options


def dense(module: Any, length: int, recompute: bool) -> dict[str, Any]:
    q, k, v, d_out = (x.transpose(1, 2) for x in inputs(module, length, length, torch.bfloat16))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return timed(forward, leaves, d_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", required=True)
    parser.add_argument("--lengths", default="8192,65536")
    parser.add_argument("--recompute", action="store_true", help="keep no branch's output for the backward")
    parser.add_argument("--json")
    args = parser.parse_args()
    module: Any = load(args.module)
    results: list[dict[str, Any]] = []
    for length in map(int, args.lengths.split(",")):
        for name, run in (("nsagen", ours), ("dense cuDNN", dense)):
            if run is dense and length > MOST_DENSE:
                continue
            torch.cuda.empty_cache()
            row = {"impl": name, "spec": module.SPEC["name"], "length": length, **run(module, length, args.recompute)}
            results.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if args.json:
        environment = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        with open(args.json, "w") as f:
            json.dump({**environment, "results": results}, f, indent=1)


if __name__ == "__main__":
    main()

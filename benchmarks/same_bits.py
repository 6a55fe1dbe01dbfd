"""Digests of a module's output and gradients, to compare compilers (ptxas), machines or commits bit by bit.

    python benchmarks/same_bits.py --module generated/nsa_128.py --json bundled.json
    TRITON_PTXAS_PATH=…/ptxas TRITON_CACHE_DIR=$(mktemp -d) \\
        python benchmarks/same_bits.py --module generated/nsa_128.py --against bundled.json  # exit 1: some bit differs
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from operation import load, operation
from triton import knobs


def digests(module: Any, length: int, dtype: torch.dtype) -> dict[str, str]:
    """SHA-256 of the output and of each gradient, of one seeded forward and backward."""
    forward, named, d_out = operation(module, length, dtype)
    out = forward()
    gradients = torch.autograd.grad(out, list(named.values()), d_out)
    results = {"out": out.detach(), **{f"d {n}": g for n, g in zip(named, gradients, strict=True)}}
    return {name: _digest(x) for name, x in results.items()}


def _digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", required=True, nargs="+")
    parser.add_argument("--lengths", default="700,8192")
    parser.add_argument("--json")
    parser.add_argument("--against", help="a file of --json to compare with")
    args = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    for path in args.module:
        module: Any = load(path)
        for length in map(int, args.lengths.split(",")):
            for dtype in (torch.bfloat16, torch.float16):
                found[f"{module.SPEC['name']} {dtype} T={length}"] = digests(module, length, dtype)
    told = subprocess.run([knobs.nvidia.ptxas.path, "--version"], capture_output=True, text=True, check=True).stdout
    ptxas = next(line for line in told.splitlines() if "release" in line)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"gpu": torch.cuda.get_device_name(), "ptxas": ptxas, "results": found}, indent=1)
        )
    print(f"{ptxas}: {sum(map(len, found.values()))} tensors")
    if not args.against:
        return 0
    other = json.loads(Path(args.against).read_text())
    unlike = [
        f"{case}: {n}" for case, result in found.items() for n, d in result.items() if other["results"][case][n] != d
    ]
    print(f"against {other['ptxas']}: " + ("\n".join(["differs in", *unlike]) if unlike else "the same bits"))
    return 1 if unlike else 0


if __name__ == "__main__":
    raise SystemExit(main())

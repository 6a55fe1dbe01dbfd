"""Import a generated module and run it forward and backward on real tensors, on the GPU if there is one.

nsagen build nsa_compressed_window && python examples/demo.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from generated import nsa_compressed_window as nsa


def main() -> None:
    device, dtype, length = (
        ("cuda", torch.bfloat16, 16384) if torch.cuda.is_available() else ("cpu", torch.float32, 1024)
    )
    heads = nsa.SPEC["heads"]
    torch.manual_seed(0)

    def new(count: int, dim: int) -> torch.Tensor:
        return torch.randn(1, length, count, dim, device=device, dtype=dtype, requires_grad=True)

    q, k, v = new(heads["query"], heads["qk_dim"]), new(heads["kv"], heads["qk_dim"]), new(heads["kv"], heads["v_dim"])
    gates = torch.rand(
        1, length, heads["query"], len(nsa.SPEC["branches"]), device=device, dtype=dtype, requires_grad=True
    )
    phi = nsa.Compressor(device=device, dtype=dtype)
    for run in ("first run (compiles)" if device == "cuda" else "first run", "second run"):
        start = time.perf_counter()
        out = nsa.attention(q, k, v, gates, phi)
        out.float().square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        print(
            f"{run:22} {1e3 * (time.perf_counter() - start):8.1f} ms",
            f"forward and backward, T = {length}, {device}, {dtype}",
        )
    norms = {name: x.grad.float().norm().item() for name, x in (("q", q), ("k", k), ("v", v), ("gates", gates))}
    print("out", tuple(out.shape), "gradient norms", {name: f"{norm:.3e}" for name, norm in norms.items()})
    assert torch.isfinite(out).all() and all(0 < norm < float("inf") for norm in norms.values())


if __name__ == "__main__":
    main()

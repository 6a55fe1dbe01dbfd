"""The window branch beside FlexAttention, in one run: forward and backward, medians.

nsagen build window_only && python benchmarks/window_vs_flex.py --module generated/window_only.py
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
import torch._functorch.config
import triton
from operation import inputs, load
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.testing import do_bench


def timed(forward: Any, leaves: list[torch.Tensor], d_out: torch.Tensor, rep: int) -> dict[str, float]:
    fwd = do_bench(forward, warmup=30, rep=rep, return_mode="median")
    out = forward()
    bwd = do_bench(
        lambda: out.backward(d_out, retain_graph=True), warmup=30, rep=rep, grad_to_none=leaves, return_mode="median"
    )
    return {"forward_ms": round(fwd, 3), "backward_ms": round(bwd, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", default="generated/window_only.py")
    parser.add_argument("--lengths", default="8192,65536")
    parser.add_argument("--rep", type=int, default=200)
    parser.add_argument("--json")
    args = parser.parse_args()
    module: Any = load(args.module)
    window = module.SPEC["branches"]["window"]["size"]
    torch._functorch.config.donated_buffer = False  # so that its backward can be repeated
    flex = torch.compile(flex_attention)
    results: list[dict[str, Any]] = []
    for length in map(int, args.lengths.split(",")):
        q, k, v, d_out = inputs(module, length, length, torch.bfloat16)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        ours = timed(lambda: module.attention(q, k, v), leaves, d_out, args.rep)  # noqa: B023
        heads_first = [x.transpose(1, 2) for x in leaves]
        mask = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < window), None, None, length, length)
        theirs = timed(
            lambda: flex(*heads_first, block_mask=mask, enable_gqa=True),  # noqa: B023
            leaves, d_out.transpose(1, 2), args.rep,
        )  # fmt: skip
        results += [{"impl": "nsagen", "length": length, **ours}, {"impl": "flex", "length": length, **theirs}]
    environment = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    for row in results:
        print("{impl:8} T={length:<7} forward {forward_ms:8.3f} ms  backward {backward_ms:8.3f} ms".format(**row))
    if args.json:
        with open(args.json, "w") as f:
            json.dump({**environment, "window": window, "results": results}, f, indent=1)


if __name__ == "__main__":
    main()

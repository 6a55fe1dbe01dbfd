"""The costs in `nsagen explain`: the least that an operation has to do, the forecast, what is kept for the backward."""

from __future__ import annotations

from collections.abc import Iterator

from nsagen.ir.plan import Plan
from nsagen.tools.console import table
from nsagen.tools.costs import (
    H200,
    Work,
    dense_flops,
    flops_of_pair,
    formula,
    main_ops,
    saved_bytes,
    taken,
    work_of,
    work_of_op,
)
from nsagen.tools.forecast import first_choices, in_op, of_op, on_another

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
SHARES_AT = 65536


def lines(plan: Plan) -> Iterator[str]:
    name = f"{H200.name}, bf16, {H200.flops / 1e12:.0f} TFLOP/s, {H200.bandwidth / 1e12} TB/s"
    yield f"AT LEAST ({name}; batch 1; φ not counted; useful pairs only), and forecast with first choices, ms"
    yield from (f"  {line}" for line in _formulas(plan))
    head = ["tokens"]
    for op in main_ops(plan):
        head += [f"{_side(op.doc)} TFLOP", "GB", "ms", "forecast", "dense ms"]
    yield ""
    yield table(head, [_row(plan, tokens) for tokens in LENGTHS])
    yield ""
    yield table(("launch", f"TFLOP at {SHARES_AT >> 10}k", "GB", "ms", "bound by", "forecast"), _shares(plan))
    yield ""
    yield from _saved(plan)


def _formulas(plan: Plan) -> Iterator[str]:
    for kernel in (k for k in plan.kernels if k.walks):
        seen = " + ".join(f"Σ_t ({formula(w.piece, w.axis, w.listed)})" for w in kernel.walks)
        yield f"{kernel.name}: {flops_of_pair(kernel, plan.heads)} FLOP × {plan.heads.query} heads × {seen}"


def _side(doc: str) -> str:
    return "bwd" if doc.endswith("_grad") else "fwd"


def _row(plan: Plan, tokens: int) -> list[str]:
    row = [f"{tokens >> 10}k"]
    for op in main_ops(plan):
        dense = dense_flops(plan.heads, tokens, op.doc.endswith("_grad")) / H200.flops
        forecast = of_op(op, plan, tokens, first_choices(plan))
        row += [*_numbers(work_of_op(op, plan, tokens)), f"{1e3 * forecast:.3f}", f"{1e3 * dense:.3f}"]
    return row


def _numbers(works: list[Work]) -> list[str]:
    flops, moved = sum(w.flops for w in works), sum(w.bytes for w in works)
    seconds = sum(w.seconds(H200) for w in works)
    return [f"{flops / 1e12:.3f}", f"{moved / 1e9:.3f}", f"{1e3 * seconds:.3f}"]


def _shares(plan: Plan) -> Iterator[list[str]]:
    for op in main_ops(plan):
        for launch in taken(op, SHARES_AT):
            work = work_of(launch, plan, SHARES_AT)
            tiles = first_choices(plan)
            ms = 1e3 * in_op(launch, plan, SHARES_AT, tiles)
            bound = "rides" if on_another(launch, tiles) else work.bound(H200)
            yield [work.kernel, *_numbers([work]), bound, f"{ms:.3f}"]


def _saved(plan: Plan) -> Iterator[str]:
    """What is kept between forward and backward, and what is made again."""
    ops = {op.name: op for op in plan.ops}
    forward, backward = main_ops(plan)
    kept = saved_bytes(forward, ops[backward.name], plan)
    what = "every branch's output and lse, never scores"
    yield f"KEPT FOR THE BACKWARD: {kept} bytes a token beside the arguments (bf16): {what}"
    if "attention_lean" in ops:
        lean = saved_bytes(ops["attention_lean"], ops["attention_lean_grad"], plan)
        yield f"  with recompute=True {lean}: each branch's forward runs again before its gradient"

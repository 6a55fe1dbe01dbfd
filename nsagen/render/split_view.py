"""What the templates of a decoding step's kernels ask beside the view that every kernel has."""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.ir.plan import Kernel, Plan
from nsagen.render.view import power_of_two

MOST_HEADS = 4  # whose log-sums a selection holds at once


@dataclass(frozen=True)
class LaneView:
    """Parts number i of a merge, and the term that they are parts of."""

    i: int
    term: int


@dataclass(frozen=True)
class SplitView:
    valued: bool  # whether there are values, or scores alone
    pointers: str  # of keys, values, lists and parts
    group_weights: tuple[tuple[tuple[int, int], ...], ...]  # (key of a group, weight): for its own block, for the next
    alone: int  # rows of a tile that holds one query
    heads: int  # of a step of the selection
    merged: tuple[LaneView, ...]


def split_view(kernel: Kernel, plan: Plan) -> SplitView | None:
    """None for kernels that are none of a decoding step."""
    if not kernel.body.startswith("split_"):
        return None
    group = power_of_two(plan.heads.group)
    weights = kernel.select.group_weights if kernel.select else ()
    parts = [o for o in kernel.operands if o.role == "parts"]
    return SplitView(
        valued=any(o.role == "v" for o in kernel.operands),
        pointers=", ".join(f"{o.name}_ptr" for o in kernel.operands if o.role not in ("q", "sums")),
        group_weights=tuple(tuple((i, w) for i, w in enumerate(row) if w) for row in weights),
        alone=max(16, group),
        heads=min(MOST_HEADS, group),
        merged=tuple(LaneView(i, o.source) for i, o in enumerate(parts)),
    )

"""What the templates of a decoding step's kernels ask beside the view that every kernel has."""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.ir.plan import Kernel, Plan
from nsagen.render.view import power_of_two

MOST_SUMS = 4096  # log-sums that a selection holds at once, of each kind
MOST_CANDIDATES = 512  # whose scores it adds up at once: with few heads more would spill
AT_ONCE = 8  # parts of a row whose loads are under way together


@dataclass(frozen=True)
class LaneView:
    """Parts of a merge, and the term that they are parts of."""

    name: str
    term: int


@dataclass(frozen=True)
class RiderView:
    """What the last program of a query tile goes on with, and what it is given: in the words of the kernel below it."""

    name: str
    pointers: tuple[str, ...]  # by the rider's operands
    more: tuple[str, ...]  # those of them that the kernel itself has no use for
    splits: tuple[str, ...]  # counts of runs, by the rider's parts

    @property
    def counts(self) -> tuple[str, ...]:
        """Counts of runs that the kernel itself has no use for."""
        return tuple("splits" + x.removeprefix("parts") for x in self.more if x.startswith("parts"))


@dataclass(frozen=True)
class SplitView:
    pointers: str  # of keys, values, lists and parts
    group_weights: tuple[tuple[tuple[int, int], ...], ...]  # (key of a group, weight): for its own block, for the next
    alone: int  # rows of a tile that holds one query
    together: int  # candidates whose scores a selection adds up at once
    merged: tuple[LaneView, ...]
    rider: RiderView | None
    at_once: int = AT_ONCE  # parts that a merge loads together


def split_view(kernel: Kernel, plan: Plan) -> SplitView | None:
    """None for kernels that are none of a decoding step."""
    if not kernel.body.startswith("split_"):
        return None
    group = power_of_two(plan.heads.group)
    weights = kernel.select.group_weights if kernel.select else ()
    parts = [o for o in kernel.operands if o.role == "parts"]
    return SplitView(
        pointers=", ".join(f"{o.name}_ptr" for o in kernel.operands if o.role not in ("q", "sums")),
        group_weights=tuple(tuple((i, w) for i, w in enumerate(row) if w) for row in weights),
        alone=max(16, group),
        together=min(MOST_CANDIDATES, MOST_SUMS // group),
        merged=tuple(LaneView(o.name.removeprefix("parts_"), o.source) for o in parts),
        rider=_rider(kernel, plan),
    )


def _rider(kernel: Kernel, plan: Plan) -> RiderView | None:
    launch = plan.rider(kernel.name)
    if launch is None:
        return None
    host = plan.launches(kernel.name)[0]
    known = {buffer: operand for operand, buffer in host.binds}
    pointers = tuple(known.get(buffer, operand) for operand, buffer in launch.binds)
    return RiderView(
        name=launch.kernel,
        pointers=pointers,
        more=tuple(operand for operand, _ in plan.brought(host)),
        splits=tuple("splits" + p.removeprefix("parts") for p in pointers if p.startswith("parts")),
    )

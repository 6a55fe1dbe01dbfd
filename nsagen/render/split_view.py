"""What the templates of a decoding step's kernels ask beside the view that every kernel has."""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.ir.plan import Kernel, Operand, Plan
from nsagen.render.walks import power_of_two

WIDEST = 1 << 10  # keys of a tile
RANKED = 128  # candidates that are each compared with every other; twice as many of a launched selection


@dataclass(frozen=True)
class LaneView:
    """Parts of a merge, and the term that they are parts of."""

    name: str
    term: int


@dataclass(frozen=True)
class RidingLane(LaneView):
    """What a rider merges: the kernel's own source of that suffix, or parts that came before (None)."""

    suffix: str | None

    @property
    def place(self) -> str:
        """What follows `parts` and `lses` in their names, of the kernel's arguments and of its launch's."""
        return f"_{self.name}" if self.suffix is None else self.suffix


@dataclass(frozen=True)
class RiderView:
    """The merge of all parts of a step, or what a program goes on with that takes every source itself."""

    name: str
    lanes: tuple[RidingLane, ...]
    gated: bool

    @property
    def earlier(self) -> tuple[RidingLane, ...]:
        """Lanes that the launch before attends to: of a term of their own each."""
        return tuple(x for x in self.lanes if x.suffix is None)

    @property
    def own(self) -> tuple[RidingLane, ...]:
        return tuple(x for x in self.lanes if x.suffix is not None)


@dataclass(frozen=True)
class SelectionView:
    """The selection that a list's program begins with. lses: the kernel's name for those of what it selects from."""

    name: str
    lses: str
    grouped: int  # keys of a sum

    @property
    def splits(self) -> str:
        """How many runs those are of."""
        return self.lses.replace("lses", "splits", 1)

    @property
    def sums(self) -> str:
        return "sums_ptr, tops_ptr, key_tiles" if self.grouped > 1 else "sums_ptr"


@dataclass(frozen=True)
class NewestView:
    """How the block that ends with a step's tokens is pooled by the kernel that scores it, in tokens."""

    block: int
    stride: int
    rows: int  # loaded at once


@dataclass(frozen=True)
class SplitView:
    pointers: str  # of keys, values, lists and parts
    group_weights: tuple[tuple[tuple[int, int], ...], ...]  # (key of a group, weight): for its own block, for the next
    alone: int  # rows of a tile that holds one query
    ranked: int  # candidates that are sorted by comparing each with every other
    near: int  # candidates whose scores a selecting program holds from the first sum to the best
    merged: tuple[LaneView, ...]
    selecting: tuple[str, ...]  # operands that come for the sake of the selection
    rider: RiderView | None
    selection: SelectionView | None
    newest: NewestView | None


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
        ranked=RANKED,
        near=max(32, min(128, 4096 // group)),
        merged=tuple(LaneView(o.name.removeprefix("parts_"), o.source) for o in parts),
        selecting=selecting(kernel, plan),
        rider=rider_view(kernel, plan),
        selection=selection_view(kernel, plan),
        newest=_newest_view(kernel, plan),
    )


def whole_tile(block: int) -> int:
    """Keys of a tile of decode_whole at most: of more, half of a listed block's would be masked. 0: without lists."""
    return max(16, 2 * block - 1) if block else WIDEST


def selecting(kernel: Kernel, plan: Plan) -> tuple[str, ...]:
    """Operands that come for the sake of the selection that rides on a kernel, or goes before it."""
    wanted = {buffer for x in plan.riders(kernel.name) if plan.kernel(x.kernel).select for _, buffer in x.binds}
    return tuple(operand for operand, buffer in plan.brought(plan.launches(kernel.name)[0]) if buffer in wanted)


def _newest_view(kernel: Kernel, plan: Plan) -> NewestView | None:
    """None for kernels that score no blocks."""
    if not kernel.walks or kernel.select is None:
        return None
    axis = kernel.walks[0].axis
    return NewestView(axis.block, axis.stride, min(16, power_of_two(axis.block)))


def rider_view(kernel: Kernel, plan: Plan) -> RiderView | None:
    """None for kernels on which no merge rides."""
    launch = next((x for x in plan.riders(kernel.name) if plan.kernel(x.kernel).body == "split_merge"), None)
    if launch is None:
        return None
    host = plan.launches(kernel.name)[0]
    known = {buffer: operand for operand, buffer in host.binds}
    lanes = [o for o in plan.kernel(launch.kernel).operands if o.role == "parts"]
    bound = dict(launch.binds)
    return RiderView(
        name=launch.kernel,
        lanes=tuple(_riding(o, known.get(bound[o.name])) for o in lanes),
        gated="gates" in bound,
    )


def selection_view(kernel: Kernel, plan: Plan) -> SelectionView | None:
    """None for kernels on which no selection rides."""
    for launch in plan.riders(kernel.name):
        if select := plan.kernel(launch.kernel).select:
            named = {buffer: operand for operand, buffer in plan.brought(plan.launches(kernel.name)[0])}
            return SelectionView(launch.kernel, named[dict(launch.binds)["lses_scores"]], select.grouped)
    return None


def _riding(parts: Operand, own: str | None) -> RidingLane:
    """own: the kernel's operand that holds these parts."""
    suffix = None if own is None else own.removeprefix("parts")
    return RidingLane(parts.name.removeprefix("parts_"), parts.source, suffix)

"""What the host template of a decoding step asks: what is appended, the kernels' sources in order, the merged parts."""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.ir.graph import Graph, Pool, phi
from nsagen.ir.plan import Kernel, Launch, Plan, Ring
from nsagen.passes.rings import rings
from nsagen.render.host import select_node
from nsagen.render.split_view import (
    RiderView,
    RidingLane,
    SelectionView,
    rider_view,
    selecting,
    selection_view,
    whole_tile,
)
from nsagen.render.walks import power_of_two


@dataclass(frozen=True)
class StoreView:
    """Tokens of one value: its name in the cache, and the argument of `decode` that adds to it."""

    name: str
    argument: str
    dim: int
    ring: Ring | None

    @property
    def width(self) -> int:
        return power_of_two(self.dim)

    @property
    def valued(self) -> bool:
        return self.name.startswith("v")


@dataclass(frozen=True)
class PoolView:
    """Blocks of one value. by_phi: φ pools them, unless it is a plain mean."""

    out: str
    src: str
    block: int
    stride: int
    dim: int
    by_phi: bool
    ring: Ring | None  # of src

    @property
    def rows(self) -> int:
        """Of a block, loaded at once: all, as far as the registers go."""
        return 32 if self.block > 16 and self.width <= 128 else 16

    @property
    def width(self) -> int:
        return power_of_two(self.dim)

    @property
    def valued(self) -> bool:
        return self.src.startswith("v")


@dataclass(frozen=True)
class RunView:
    """A source of a split kernel, its keys shared out in runs."""

    suffix: str
    k: str
    v: str
    blocks: str
    lse: str  # the buffer of its parts' log-sum-exp
    stride: int
    ranges: str  # of a walked source: the function that knows what a query may see
    count: int  # of a listed one: entries
    given: bool  # its list is the caller's

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Its arguments, and what a step gives for them; a list is the caller's where nothing selects."""
        found = [(side + self.suffix, f'cache.rows("{name}")') for side, name in (("k", self.k), ("v", self.v)) if name]
        return [*found, ("blocks" + self.suffix, "blocks")] if self.given else found


@dataclass(frozen=True)
class WholeRun(RunView):
    """A source of decode_whole. place: what follows `k` in its arguments' names."""

    place: str


@dataclass(frozen=True)
class WholeView:
    """decode_whole: the sources of the kernels that share a query out, what is selected from first."""

    sources: tuple[WholeRun, ...]
    tiles: str  # whose tiles it takes: of keys with values
    most: int  # keys of a tile: of more, half or more of a listed block's tile would be masked
    gated: bool

    @property
    def selected(self) -> tuple[WholeRun, ...]:
        """Those whose lists the kernel finds."""
        return tuple(s for s in self.sources if s.blocks and not s.given)

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Its arguments, and what a step gives for them."""
        found = [
            (name[:1] + s.place if name[:1] in "kv" else name, given) for s in self.sources for name, given in s.keys
        ]
        return [*found, ("gates", "gates")] if self.gated else found

    @property
    def arguments(self) -> str:
        return "".join(f"{name}, " for name, _ in self.keys)

    @property
    def given(self) -> str:
        return "".join(f"{given}, " for _, given in self.keys)

    @property
    def doc(self) -> str:
        what = ", ".join(s.lse.removeprefix("split_lse_") for s in self.sources)
        return f"{what} of a query by one program, merged -> out."


@dataclass(frozen=True)
class SplitKernelView:
    name: str
    sources: tuple[RunView, ...]
    sums: bool
    grouped: int  # keys of a sum
    more: tuple[str, ...]  # operands that come for the sake of what rides
    selecting: tuple[str, ...]  # of those what comes for the selection
    rider: RiderView | None
    selection: SelectionView | None

    @property
    def earlier(self) -> tuple[RidingLane, ...]:
        """Lanes whose parts come from the launch before."""
        return self.rider.earlier if self.rider else ()

    @property
    def brought(self) -> tuple[str, ...]:
        """What comes from outside for the sake of what rides."""
        return tuple(x for x in (*self.more, *(self.tops[1:] if self.selection else ())) if x not in ("out", "scores"))

    @property
    def found(self) -> tuple[str, ...]:
        """What a kernel that scores hands on."""
        parts = tuple(x for s in self.sources for x in (f"parts{s.suffix}" if s.v else "", f"lses{s.suffix}") if x)
        return (*parts, "sums", *self.tops)

    @property
    def tops(self) -> tuple[str, ...]:
        """What sums of groups are relative to, and how many of them a key tile has."""
        return ("tops", "tile") if self.grouped > 1 else ()

    @property
    def handed(self) -> tuple[str, ...]:
        """The same under the names that the kernel has for it to which it is handed."""
        assert self.selection is not None
        earlier = tuple(x for lane in self.earlier for x in (f"parts{lane.place}", f"lses{lane.place}"))
        return (*(earlier or (self.selection.lses,)), "sums", *self.tops)

    @property
    def doc(self) -> str:
        what = ", ".join(s.lse.removeprefix("split_lse_") for s in self.sources)
        if not self.sums:
            before = " with what was attended to before" if self.earlier else ""
            return f"{what}, in runs of keys, merged{before} -> out."
        parts = "the output and lse" if self.sources[0].v else "lse"
        tops = ", relative to the top of a tile of `tile` groups" if self.tops else ""
        return f"{what}, of each run of keys {parts} in log2 units; sums of the scores for a selection{tops}."

    @property
    def arguments(self) -> str:
        return "".join(f"{x}, " for x in (*(n for s in self.sources for n, _ in s.keys), *self.brought))

    @property
    def given(self) -> str:
        """What a step gives for them."""
        given = (given for s in self.sources for _, given in s.keys)
        return "".join(f"{x}, " for x in (*given, *self.brought))


@dataclass(frozen=True)
class DecodeView:
    stores: tuple[StoreView, ...]
    pools: tuple[PoolView, ...]
    splits: tuple[SplitKernelView, ...]
    launches: int
    group_rows: int  # sums of a group
    grouped: int
    block: int  # tokens of a listed one, 0 without lists

    @property
    def ringed(self) -> bool:
        return any(s.ring for s in self.stores)

    @property
    def phi_pools(self) -> tuple[PoolView, ...]:
        return tuple(p for p in self.pools if p.by_phi)

    @property
    def phi_tokens(self) -> tuple[str, ...]:
        """The arguments of `decode` whose tokens φ pools."""
        given = {s.name: s.argument for s in self.stores}
        return tuple(given[p.src] for p in self.phi_pools)

    @property
    def scores(self) -> SplitKernelView | None:
        return next((s for s in self.splits if s.sums), None)

    @property
    def scored(self) -> tuple[PoolView, ...]:
        """The pools of the keys, and values, that are scored."""
        names = (self.scores.sources[0].k, self.scores.sources[0].v) if self.scores else ()
        return tuple(p for p in self.pools if p.out in names)

    @property
    def attend(self) -> SplitKernelView:
        return next(s for s in self.splits if not s.sums)

    @property
    def whole(self) -> WholeView:
        before = self.scores.sources if self.scores else ()
        runs = [*((s, "_scored") for s in before), *((s, s.suffix) for s in self.attend.sources)]
        sources = tuple(WholeRun(**vars(s), place=place) for s, place in runs)
        tiles = self.scores if self.scores and sources[0].v else self.attend
        rider = self.attend.rider
        assert rider is not None
        alone = [lane.term for lane in rider.own]
        assert len(before) <= 1 and not any(lane.term in alone for lane in rider.earlier)
        return WholeView(sources, tiles.name, whole_tile(self.block), rider.gated)


def decode_view(graph: Graph, plan: Plan, branches: tuple[str, ...]) -> DecodeView:
    op = next(o for o in plan.ops if o.doc == "decode")
    of_phi = {p.out for p in phi(graph)}
    kept = rings(graph)
    pools = tuple(
        PoolView(n.out, n.src, n.axis.block, n.axis.stride, _dim(n.out, graph), n.out in of_phi, kept.get(n.src))
        for n in graph.nodes
        if isinstance(n, Pool)
    )
    splits = tuple(x for x in op.launches if plan.kernel(x.kernel).walks)
    select = select_node(graph)
    return DecodeView(
        stores=tuple(
            _store(x, graph, branches, kept.get(x)) for x in graph.inputs if x.partition("_")[0] in ("k", "v")
        ),
        pools=pools,
        splits=tuple(_split(x, plan) for x in splits),
        launches=1 + len(op.launches),
        group_rows=len(select.group_weights) if select else 0,
        grouped=select.grouped if select else 1,
        block=next((w.listed.size for x in splits for w in plan.kernel(x.kernel).walks if w.listed), 0),
    )


def _store(name: str, graph: Graph, branches: tuple[str, ...], ring: Ring | None) -> StoreView:
    side, _, branch = name.partition("_")
    return StoreView(name, f'{side}["{branch or branches[0]}"]', _dim(name, graph), ring)


def _dim(name: str, graph: Graph) -> int:
    return {"Dqk": graph.heads.qk_dim, "Dv": graph.heads.v_dim}[graph.value(name).axes[-1]]


def _split(launch: Launch, plan: Plan) -> SplitKernelView:
    kernel, bind = plan.kernel(launch.kernel), dict(launch.binds)
    selection = selection_view(kernel, plan)
    given = selection is None
    sources = tuple(_run(kernel, bind, i, given) for i in sorted({w.source for w in kernel.walks}))
    return SplitKernelView(
        name=kernel.name,
        sources=sources,
        sums=kernel.select is not None,
        grouped=kernel.select.grouped if kernel.select else selection.grouped if selection else 1,
        more=tuple(operand for operand, _ in plan.brought(launch)),
        selecting=selecting(kernel, plan),
        rider=rider_view(kernel, plan),
        selection=selection,
    )


def _run(kernel: Kernel, bind: dict[str, str], number: int, given: bool) -> RunView:
    walk = next(w for w in kernel.walks if w.source == number)
    names = {o.role: o.name for o in kernel.operands if o.source == number}
    suffix = names["k"].removeprefix("k")
    return RunView(
        suffix=suffix,
        k=bind[names["k"]],
        v=bind[names["v"]] if "v" in names else "",
        blocks=bind[names["blocks"]] if "blocks" in names else "",
        lse=bind[names["part_lse"]],
        stride=walk.axis.stride,
        ranges=f"_{bind[names['parts']].removeprefix('split_out_')}_ranges" if "parts" in names else "",
        count=walk.listed.count if walk.listed else 0,
        given=given and walk.listed is not None,
    )

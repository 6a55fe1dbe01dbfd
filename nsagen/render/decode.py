"""What the host template of a decoding step asks: what is appended, the kernels' sources in order, the merged parts."""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.ir.graph import Graph, Pool, phi
from nsagen.ir.plan import Kernel, Plan, Ring
from nsagen.passes.rings import rings
from nsagen.render.host import select_node
from nsagen.render.view import power_of_two


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
    out: str  # buffers of its parts
    lse: str
    stride: int
    ranges: str  # of a walked source: the function that knows what a query may see
    count: int  # of a listed one: entries


@dataclass(frozen=True)
class SplitKernelView:
    name: str
    sources: tuple[RunView, ...]
    sums: bool


@dataclass(frozen=True)
class MergedView:
    i: int
    out: str
    lse: str


@dataclass(frozen=True)
class DecodeView:
    stores: tuple[StoreView, ...]
    pools: tuple[PoolView, ...]
    splits: tuple[SplitKernelView, ...]
    merged: tuple[MergedView, ...]
    launches: int
    group_rows: int  # log-sums of a group
    grouped: int
    normaliser: str  # what the selection's parts of lse are called

    @property
    def ringed(self) -> bool:
        return any(s.ring for s in self.stores)

    @property
    def phi_pools(self) -> tuple[PoolView, ...]:
        return tuple(p for p in self.pools if p.by_phi)

    @property
    def scores(self) -> SplitKernelView | None:
        return next((s for s in self.splits if s.sums), None)

    @property
    def attend(self) -> SplitKernelView:
        return next(s for s in self.splits if not s.sums)


def decode_view(graph: Graph, plan: Plan, branches: tuple[str, ...]) -> DecodeView:
    op = next(o for o in plan.ops if o.doc == "decode")
    of_phi = {p.out for p in phi(graph)}
    kept = rings(graph)
    pools = tuple(
        PoolView(n.out, n.src, n.axis.block, n.axis.stride, _dim(n.out, graph), n.out in of_phi, kept.get(n.src))
        for n in graph.nodes
        if isinstance(n, Pool)
    )
    binds = {x.kernel: dict(x.binds) for x in op.launches}
    splits = tuple(_split(k, binds[k.name]) for k in plan.kernels if k.body == "split_attend")
    merge = binds["decode_merge"]
    count = sum(name.startswith("parts") for name in merge)
    select = select_node(graph)
    return DecodeView(
        stores=tuple(
            _store(x, graph, branches, kept.get(x)) for x in graph.inputs if x.partition("_")[0] in ("k", "v")
        ),
        pools=pools,
        splits=splits,
        merged=tuple(MergedView(i, merge[f"parts{i}"], merge[f"lses{i}"]) for i in range(count)),
        launches=1 + len(op.launches),
        group_rows=len(select.group_weights) if select else 0,
        grouped=select.grouped if select else 1,
        normaliser=binds["decode_select"]["lses"] if select else "",
    )


def _store(name: str, graph: Graph, branches: tuple[str, ...], ring: Ring | None) -> StoreView:
    side, _, branch = name.partition("_")
    return StoreView(name, f'{side}["{branch or branches[0]}"]', _dim(name, graph), ring)


def _dim(name: str, graph: Graph) -> int:
    return {"Dqk": graph.heads.qk_dim, "Dv": graph.heads.v_dim}[graph.value(name).axes[-1]]


def _split(kernel: Kernel, bind: dict[str, str]) -> SplitKernelView:
    numbers = sorted({w.source for w in kernel.walks})
    return SplitKernelView(kernel.name, tuple(_run(kernel, bind, i) for i in numbers), kernel.select is not None)


def _run(kernel: Kernel, bind: dict[str, str], number: int) -> RunView:
    walk = next(w for w in kernel.walks if w.source == number)
    names = {o.role: o.name for o in kernel.operands if o.source == number}
    suffix = names["k"].removeprefix("k")
    return RunView(
        suffix=suffix,
        k=bind[names["k"]],
        v=bind[names["v"]] if "v" in names else "",
        blocks=bind[names["blocks"]] if "blocks" in names else "",
        out=bind[names["parts"]] if "parts" in names else "",
        lse=bind[names["part_lse"]],
        stride=walk.axis.stride,
        ranges=f"_{bind[names['parts']].removeprefix('split_out_')}_ranges" if "parts" in names else "",
        count=walk.listed.count if walk.listed else 0,
    )

"""What a kernel template asks of the plan: parts of head dims, arguments, what rides, in Triton's syntax."""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.ir.graph import Heads, Select
from nsagen.ir.plan import HEADS_IN_TURN, Access, Kernel, Plan, Taken
from nsagen.passes.specialise import UNITED_QUERIES, ahead, scoring_warpgroups
from nsagen.render.kernel_doc import kernel_doc
from nsagen.render.walks import Named, SourceView, conjuncts_of, power_of_two, sources_of
from nsagen.sym import as_int


@dataclass(frozen=True)
class Part:
    """Columns [lo, hi) of a head dim; ragged where they pass its end."""

    i: int
    lo: int
    hi: int
    dim: int

    @property
    def width(self) -> int:
        return self.hi - self.lo

    @property
    def ragged(self) -> bool:
        return self.hi > self.dim

    @property
    def and_columns(self) -> str:
        return f" & (d < {self.dim})" if self.ragged else ""

    def load(self, pointer: str, rows: str, guard: str) -> str:
        """A load of this part: masked by `rows` only where `guard` holds, by columns wherever they are ragged."""
        return f"device.load({pointer}, {rows}{self.and_columns}, {'True' if self.ragged else guard})"


@dataclass(frozen=True)
class Combined:
    """What rides on a forward whose warp copies: its output times a gate, and the other terms times theirs."""

    own: int  # its own term, of all
    terms: tuple[int, ...]
    ahead: int  # keys of a tile up to which the other terms are loaded beside the products; 0: of none
    completed: int | None  # the term whose rows lack the keys that are taken over, if any may

    @property
    def columns(self) -> int:
        """Of the gates."""
        return len(self.terms)

    @property
    def others(self) -> list[int]:
        return [i for i in self.terms if i != self.own]

    @property
    def arguments(self) -> str:
        terms = "".join(f"term{i}_ptr, " for i in self.others)
        return terms + "gates_ptr, combined_ptr, " + ("lse_taken_ptr, " if self.completed is not None else "")


@dataclass(frozen=True)
class KernelView:
    name: str
    body: str
    doc: str
    hq: int
    hkv: int
    group: int
    qk_dim: int
    v_dim: int
    qk_parts: tuple[Part, ...]
    v_parts: tuple[Part, ...]
    conjuncts: tuple[Named, ...]
    sources: tuple[SourceView, ...]
    terms: tuple[Part, ...]  # only their numbers are asked
    rests: tuple[Part, ...]  # the terms that may come with a rest
    rest: bool  # whether a rest is stored
    columns: int  # of the gates
    gated: bool
    descending: bool
    split: bool  # programs share a tile's loop
    gradients: bool  # dk and dv themselves may leave it
    equal_shares: bool  # programs that share a key tile have as many steps each
    heads_in_turn: bool  # a tile's rows are queries of one head
    cached: bool  # keys lie in a cache
    valued: bool  # and values
    rows_may_be_empty: bool
    rows: str  # rows of a tile that belong to one query
    live: str  # which rows of a query tile are queries
    heads_live: str  # the part of it that speaks of heads
    listed: bool
    pointers: str  # of keys, values and lists
    select: Select | None
    size: int  # tokens of a listed block
    count: int  # blocks of a list
    parted: bool  # leaves parts of a result in the queries' lists
    specialised: bool  # has a second form, in which a warp only copies
    combined: Combined | None  # what may ride on that form
    leaves: bool  # the last blocks of a list may be left to another branch
    whole_scores: bool  # the scores that it reads may be whole already, where keys overlap the next block

    maps: dict[str, tuple[str, ...]]  # operand -> its tensor maps, one a part; nothing where it has none
    guards: dict[str, str]  # operand -> when its rows must be guarded, as a compile-time condition
    wides: dict[str, str]  # operand -> a cast of its row offsets, or nothing

    @property
    def united(self) -> int:
        """Queries of a tile that share the blocks of their lists' union, where such tiles are."""
        return UNITED_QUERIES

    @property
    def block_bits(self) -> int:
        """Of the number of a key within its selection block."""
        assert self.select is not None
        return self.select.grouped.bit_length() - 1

    def key_of_block(self, i: int) -> str:
        """The i-th keys of blocks, where splits by the lowest bit, the next and so on have named them."""
        return "p" + "".join(str(i >> bit & 1) for bit in range(self.block_bits))

    @property
    def scorers(self) -> tuple[int, int]:
        """Warpgroups of a tile whose rows of scores are queries × heads, where such tiles are, and their registers."""
        return scoring_warpgroups(self.qk_dim)

    @property
    def taken(self) -> Taken | None:
        """The keys that count for another branch, too, where a source has some."""
        return next((s.taken for s in self.sources if s.taken), None)

    @property
    def heads_width(self) -> int:
        """The smallest power of two that holds a group."""
        return power_of_two(self.group)

    @property
    def list_width(self) -> int:
        """The smallest power of two that holds a list."""
        return power_of_two(self.count)

    @property
    def select_width(self) -> int:
        """The smallest power of two that holds a list."""
        assert self.select is not None
        return power_of_two(self.select.count)

    @property
    def ringed(self) -> bool:
        return any(s.ring for s in self.sources)

    @property
    def cache_arguments(self) -> str:
        """What a kernel over a cache is told of it; keep: the tokens before a query that a ring holds for it."""
        keeps = "".join(f"keep{s.suffix}, " for s in self.sources if s.ring)
        scales = "".join(f"{side}{s.suffix}_scales_ptr, " for s in self.sources for side in self.sides)
        return f"past_ptr, table_ptr, table_sb, pages, {keeps}{scales}" if self.cached else ""

    @property
    def sides(self) -> tuple[str, ...]:
        """Keys, and values where the kernel has some."""
        return ("k", "v") if self.valued else ("k",)

    @property
    def step_arguments(self) -> str:
        rings = " oldest, SINKS: tl.constexpr," if self.ringed else ""
        scales = "".join(f" {side}_scales_ptr," for side in self.sides)
        return f"table_ptr, pages, PAGE: tl.constexpr,{rings}{scales}"

    @property
    def tile_start(self) -> int:
        """What a key tile starts at a multiple of, before whole tiles: a listed block's size, or 0."""
        return self.size if self.listed else 0

    @property
    def step_row(self) -> str:
        """The rows of a step's keys."""
        if self.ringed:
            return f"device.recent_rows(table_ptr, pages, s0, s, n, BN, PAGE, oldest, SINKS, {self.tile_start})"
        return f"device.tile_rows(table_ptr, pages, s0, s, n, BN, PAGE, 0, 0, {self.tile_start})"

    def ring_of(self, source: SourceView) -> str:
        """What a decoding step is told of a source's ring, in a kernel that has one."""
        ring = source.ring
        return f"{ring.sinks}, {ring.size}, " if ring else "0, 0, " if self.ringed else ""

    def cache_of(self, source: SourceView) -> str:
        """What a step is told of a source's cache: the table, and rows of a page; or a ring, which has neither."""
        if not self.cached:
            return ""
        scales = "".join(f"{side}{source.suffix}_scales_ptr, " for side in self.sides)
        if source.ring:
            return f"None, 0, 1, oldest, {source.ring.sinks}, {scales}"
        return f"table_ptr, pages, PAGE // {source.stride}, {'0, -1, ' if self.ringed else ''}{scales}"

    @property
    def map_arguments(self) -> list[str]:
        """Of the kernel; each may be None."""
        return [name for names in self.maps.values() for name in names]

    def maps_of(self, source: SourceView) -> str:
        """What a step is told of a source's maps, and where they find the program's keys."""
        if not self.map_arguments:
            return ""
        names = [self.maps.get(side + source.suffix, ()) for side in self.sides]
        none = [("None",) * len(parts) for parts in (self.qk_parts, self.v_parts)]
        given = [name for own, absent in zip(names, none, strict=True) for name in own or absent]
        return f"{', '.join(given)}, map_b, h, "

    @property
    def doc_of_specialised(self) -> str:
        of = f"2 · (64 // {self.group}) queries × the {self.group} heads of one KV head"
        return f"{self.doc.partition(';')[0]}; a program takes tiles of {of} in turn, until there are none."

    @property
    def box_arguments(self) -> list[str]:
        """Of the kernel whose warp copies: the tensor maps of keys and values, a part each."""
        return [name for source in self.sources for name in self.boxes_of(source)]

    def boxes_of(self, source: SourceView) -> list[str]:
        sides = (("k", self.qk_parts), ("v", self.v_parts))
        return [f"{side}{source.suffix}_map{p.i}" for side, parts in sides for p in parts]

    def half_live(self, time: str, row: str) -> str:
        """Which of a warpgroup's 64 rows are queries."""
        whole = "" if 64 % self.group == 0 else f" & ({row} < QUERIES * {self.group})"
        return f"({time} < T){whole}"

    @property
    def step_maps(self) -> str:
        """The same as the step's parameters: k_map0, v_map0, …"""
        names = [f"{side}_map{p.i}" for side, parts in (("k", self.qk_parts), ("v", self.v_parts)) for p in parts]
        return f"{', '.join(names)}, map_b, h, " if self.map_arguments else ""

    def guard(self, operand: str) -> str:
        return self.guards[operand]

    def wide(self, operand: str) -> str:
        return self.wides[operand]


def kernel_view(kernel: Kernel, plan: Plan) -> KernelView:
    h = plan.heads
    conjuncts, leaves = conjuncts_of(kernel), may_leave(kernel, plan)
    terms = tuple(Part(int(o.name[4:] or 0), 0, 0, 0) for o in kernel.operands if o.role == "term")
    return KernelView(
        name=kernel.name,
        body=kernel.body,
        doc=kernel_doc(kernel, h, _rows(kernel, h)),
        hq=h.query,
        hkv=h.kv,
        group=h.group,
        qk_dim=h.qk_dim,
        v_dim=h.v_dim,
        qk_parts=_parts(kernel.qk_parts, h.qk_dim),
        v_parts=_parts(kernel.v_parts, h.v_dim),
        conjuncts=tuple(conjuncts.values()),
        sources=sources_of(kernel, conjuncts, plan, leaves),
        terms=terms,
        rests=tuple(t for t in terms if _has_rest(kernel, plan, t.i)),
        rest=any(o.role == "rest" and o.mode == "store" for o in kernel.operands),
        columns=_columns(plan),
        gated=any(o.role == "gates" for o in kernel.operands),
        descending=kernel.grid.order == "descending",
        split=kernel.grid.split,
        gradients=any(o.role == "dk" for o in kernel.operands),
        equal_shares=any(w.axis.is_tokens for w in kernel.walks),
        heads_in_turn=kernel.body in HEADS_IN_TURN,
        cached=kernel.cached,
        valued=any(o.role == "v" for o in kernel.operands),
        rows_may_be_empty="rows_may_be_empty" in kernel.facts,
        rows=_rows(kernel, h),
        live="(t < T)" + _heads_live(kernel, h),
        heads_live=_heads_live(kernel, h),
        listed=any(w.listed for w in kernel.walks),
        pointers=", ".join(f"{o.name}_ptr" for o in kernel.operands if o.role in ("k", "v", "blocks")),
        select=kernel.select,
        size=_listed(plan)[0],
        count=_listed(plan)[1],
        parted=any(o.role in ("out_parts", "dq_parts") and o.mode == "store" for o in kernel.operands),
        specialised=kernel.specialised and not kernel.cached,
        combined=combined_view(kernel, plan),
        leaves=leaves,
        whole_scores=not kernel.cached and scores_are_whole(plan),
        maps={a.operand: _maps(kernel, a) for a in kernel.accesses if a.map},
        guards={a.operand: "EXTENT" if a.guard == "segment" else "True" for a in kernel.accesses},
        wides={a.operand: ".to(tl.int64)" if a.bits == 64 else "" for a in kernel.accesses},
    )


def combined_view(kernel: Kernel, plan: Plan) -> Combined | None:
    """None where no combination rides on the kernel."""
    rider = next((x for x in plan.riders(kernel.name) if plan.kernel(x.kernel).body == "combine_fwd"), None)
    if rider is None:
        return None
    outs = {buffer for x in plan.launches(kernel.name) for operand, buffer in x.binds if operand == "out"}
    terms = {int(operand[4:]): buffer for operand, buffer in rider.binds if operand.startswith("term")}
    own = next(i for i, buffer in terms.items() if buffer in outs)
    taken = {buffer for x in plan.launches(kernel.name) for operand, buffer in x.binds if operand == "out_taken"}
    completed = next((i for i, buffer in terms.items() if buffer in taken and kernel.specialised), None)
    return Combined(own, tuple(terms), ahead(plan.heads.v_dim, len(terms) - 1), completed)


def scores_are_whole(plan: Plan) -> bool:
    """Whether some tiles of scores leave one number a block, where others leave apart what is of the block before."""
    return any(k.scores_by_rows and k.select and k.select.first for k in plan.kernels)


def may_leave(kernel: Kernel, plan: Plan) -> bool:
    """Whether a forward may leave the last blocks of its lists to one that completes its rows."""
    left = kernel.body == "attend_fwd" and any(x.leaves for x in plan.launches(kernel.name))
    return left and any(may_complete(k, plan) for k in plan.kernels)


def may_complete(kernel: Kernel, plan: Plan) -> bool:
    """Whether some of its tiles may complete another branch's rows."""
    of = combined_view(kernel, plan)
    return of is not None and of.completed is not None


def _maps(kernel: Kernel, access: Access) -> tuple[str, ...]:
    parts = kernel.v_parts if access.operand.startswith("v") else kernel.qk_parts
    return tuple(f"{access.operand}_map{i}" for i in range(len(parts)))


def _rows(kernel: Kernel, heads: Heads) -> str:
    """The group's heads; the whole tile where it has one query; one where the heads come in turn."""
    if kernel.body in HEADS_IN_TURN:
        return "1"
    one_query = any(w.listed and w.direction == "forward" for w in kernel.walks)
    return "BM" if one_query else str(heads.group)


def _heads_live(kernel: Kernel, heads: Heads) -> str:
    rows = _rows(kernel, heads)
    if rows != str(heads.group):
        return f" & (head < {heads.group})"
    return "" if "group_fills_tile" in kernel.facts else f" & (row < BT * {heads.group})"


def _listed(plan: Plan) -> tuple[int, int]:
    """(tokens of a block, blocks of a list); a plan has lists of one kind at most."""
    return next(((w.listed.size, w.listed.count) for k in plan.kernels for w in k.walks if w.listed), (0, 0))


def _has_rest(kernel: Kernel, plan: Plan, term: int) -> bool:
    """Whether some launch binds a rest to the term."""
    names = {f"rest{term}", "rest"} if term == 0 else {f"rest{term}"}
    return any(
        o in names for op in plan.ops for launch in op.launches if launch.kernel == kernel.name for o, _ in launch.binds
    )


def _columns(plan: Plan) -> int:
    gates = next((b for b in plan.buffers if b.name == "gates"), None)
    return (as_int(gates.shape[-1]) or 1) if gates else 1


def _parts(widths: tuple[int, ...], dim: int) -> tuple[Part, ...]:
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return tuple(Part(i, lo, lo + w, dim) for i, (lo, w) in enumerate(zip(starts, widths, strict=True)))

"""What a kernel template asks of the plan: parts, sources, walks and masks as text in Triton's syntax."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from nsagen.ir.graph import BlockList, Heads, KeyAxis, Select
from nsagen.ir.plan import BN, BT, HEADS_IN_TURN, Access, Kernel, Mask, Plan, Ring, Segment, Taken, Walk
from nsagen.passes.specialise import ahead
from nsagen.render.kernel_doc import kernel_doc
from nsagen.sym import Conjunct, Expr, as_int, conjunct_text, const, expand, substitute, to_text


def power_of_two(count: int) -> int:
    """The smallest that is not below count: what a range in a kernel must be."""
    return 1 << (count - 1).bit_length()


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
class Named:
    """A conjunct under its flag's name."""

    name: str
    text: str


@dataclass(frozen=True)
class SegmentView:
    name: str
    lo: str
    hi: str
    comment: str
    flags: tuple[Named, ...]


@dataclass(frozen=True)
class ListView:
    """A block list walked by a query: `at` its first entry, `count` entries of `size` tokens."""

    pointer: str
    at: str
    size: int
    count: int

    @property
    def width(self) -> int:
        return power_of_two(self.count)


@dataclass(frozen=True)
class WalkView:
    cuts: str
    segments: tuple[SegmentView, ...]
    listed: ListView | None = None
    bounds: str = ""  # of those that see some of a tile's keys, and those that see all of them, if that is known
    all: bool = False

    @property
    def ends(self) -> list[str]:
        """Where the first segment begins, and each of them ends: the next one begins there."""
        assert all(a.hi == b.lo for a, b in pairwise(self.segments)), self.segments
        return [self.segments[0].lo, *(s.hi for s in self.segments)]

    @property
    def cut_names(self) -> list[str]:
        """Names for them, where an end may be a constant."""
        return [f"cut{i}" for i in range(len(self.ends))]

    @property
    def extent(self) -> str:
        """Where keys end: with the sequence, or with the listed block."""
        return f"min(n, block * {self.listed.size} + {self.listed.size})" if self.listed else "n"

    def query_loop(self, segment: SegmentView, split: bool) -> str:
        """The head of a segment's loop over query tiles; split, over those of the program's run."""
        lo, hi = segment.lo, segment.hi
        if split:
            lo, hi = f"max({lo}, run_lo)", f"min({hi}, run_hi)"
        return f"    for t0 in range({lo}, {hi}, BT):  # {segment.comment}"

    def key_loop(self, segment: SegmentView) -> str:
        """The head of a segment's loop over key tiles."""
        if self.listed is None:
            return f"    for s0 in range({segment.lo}, {segment.hi}, BN):  # {segment.comment}"
        of = self.listed
        return "\n".join(
            (
                f"    tiles_of_block: tl.constexpr = ({of.size} + BN - 1) // BN",
                f"    for step in range(0, blocks * tiles_of_block):  # {segment.comment}",
                f"        block = tl.load({of.pointer} + listed + step // tiles_of_block)",
                f"        s0 = block * {of.size} + step % tiles_of_block * BN",
            )
        )


@dataclass(frozen=True)
class SourceView:
    suffix: str
    length: str
    base: str
    stride: int
    tokens: bool
    walks: tuple[WalkView, ...]
    listed: BlockList | None
    ring: Ring | None  # how its keys lie in a cache
    taken: Taken | None  # those of its keys that count for another branch, too
    own: str  # the suffix of its row statistics, where it has some of its own

    @property
    def statistics(self) -> str:
        """Pointers to its rows' lse and delta, and to the other branch's."""
        return f"lse{self.own}_ptr, delta{self.own}_ptr, " + ("lse_taken_ptr, delta_taken_ptr, " if self.taken else "")

    def pieces(self, segment: SegmentView, lo: str, hi: str) -> list[tuple[str, str, bool]]:
        """The segment's keys [lo, hi), and whether they count for another branch, too: from the key `taken` on.

        That lies in the middle, or where there is none at its end: passes/joint.py asks for so many keys before it.
        """
        if self.taken is None or segment.name != "mid":
            return [(lo, hi, self.taken is not None and segment.name == "hi")]
        return [(lo, f"max({lo}, min(taken, {hi}))", False), (f"max({lo}, min(taken, {hi}))", hi, True)]


@dataclass(frozen=True)
class Combined:
    """What rides on a forward whose warp copies: its output times a gate, and the other terms times theirs."""

    own: int  # its own term, of all
    terms: tuple[int, ...]
    ahead: int  # keys of a tile up to which the other terms are loaded beside the products; 0: of none

    @property
    def columns(self) -> int:
        """Of the gates."""
        return len(self.terms)

    @property
    def others(self) -> list[int]:
        return [i for i in self.terms if i != self.own]

    @property
    def arguments(self) -> str:
        return "".join(f"term{i}_ptr, " for i in self.others) + "gates_ptr, combined_ptr, "


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
    taken: Taken | None  # keys that count for another branch, too

    maps: dict[str, tuple[str, ...]]  # operand -> its tensor maps, one a part; nothing where it has none
    guards: dict[str, str]  # operand -> when its rows must be guarded, as a compile-time condition
    wides: dict[str, str]  # operand -> a cast of its row offsets, or nothing

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
    conjuncts = _conjuncts(kernel)
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
        sources=_sources(kernel, conjuncts, plan),
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
        taken=kernel.takes,
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
    return Combined(own, tuple(terms), ahead(plan.heads.v_dim, len(terms) - 1))


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


def _conjuncts(kernel: Kernel) -> dict[Conjunct, Named]:
    """Every conjunct that some segment of the kernel may have to test, named C0, C1, …"""
    tested = dict.fromkeys(
        c for w in kernel.walks for s in w.segments for c in (m.conjunct for m in s.masks if not m.extent)
    )
    return {c: Named(f"C{i}", conjunct_text(c)) for i, c in enumerate(tested)}


def _sources(kernel: Kernel, conjuncts: dict[Conjunct, Named], plan: Plan) -> tuple[SourceView, ...]:
    numbers = sorted({w.source for w in kernel.walks})
    views: list[SourceView] = []
    for number in numbers:
        walks = [w for w in kernel.walks if w.source == number]
        axis: KeyAxis = walks[0].axis
        suffix = str(number) if len(numbers) > 1 else ""
        views.append(
            SourceView(
                suffix=suffix,
                length=to_text(axis.length()),
                base=to_text(axis.base()),
                stride=axis.stride,
                tokens=axis.is_tokens,
                walks=tuple(_walk(w, conjuncts, suffix, plan.heads) for w in walks),
                listed=walks[0].listed,
                ring=next(o.ring for o in kernel.operands if o.role == "k" and o.source == number),
                taken=kernel.takes if kernel.takes and kernel.takes.source == number else None,
                own=suffix if kernel.apart else "",
            )
        )
    return tuple(views)


def _walk(walk: Walk, conjuncts: dict[Conjunct, Named], suffix: str, heads: Heads) -> WalkView:
    segments = tuple(_segment(s, conjuncts) for s in walk.segments)
    if walk.listed and walk.direction == "forward":
        return _listed_walk(walk, segments, suffix, heads)
    needed = {s.name for c in walk.cuts for s in c.at.free_symbols}
    lines = [f"# {walk.piece.name}: {', '.join(map(conjunct_text, walk.piece.where))}"]
    for name, interval in (("some", walk.some), ("all", walk.all)):
        if interval:
            ends = ((f"{name}_lo", interval.lo), (f"{name}_hi", interval.hi))
            lines += [f"{end} = {_scalar(at)}" for end, at in ends if end in needed]
    lines += [f"{cut.name} = {_scalar(cut.at)}" for cut in walk.cuts]
    text = "\n".join("    " + line for line in lines)
    return WalkView(text, segments, None, _bounds(walk), walk.all is not None)


def _bounds(walk: Walk) -> str:
    ends = [
        (f"{name}_{end}", at)
        for name, interval in (("some", walk.some), ("all", walk.all))
        if interval
        for end, at in (("lo", interval.lo), ("hi", interval.hi))
    ]
    return "\n".join(f"    {name} = {_scalar(at)}" for name, at in ends)


def _listed_walk(walk: Walk, segments: tuple[SegmentView, ...], suffix: str, heads: Heads) -> WalkView:
    assert walk.listed is not None
    of = ListView(f"blocks{suffix}_ptr", "listed", walk.listed.size, walk.listed.count)
    lines = (
        f"# {walk.piece.name}: {', '.join(map(conjunct_text, walk.piece.where))}, in the listed blocks",
        f"listed = (first * {heads.kv} + h) * {of.count}",
        f"entry = tl.arange(0, {of.width})",
        f"named = tl.load({of.pointer} + listed + entry, mask=entry < {of.count}, other=-1)",
        "blocks = tl.sum((named >= 0).to(tl.int32))",
    )
    return WalkView("\n".join("    " + line for line in lines), segments, of)


def _scalar(x: Expr) -> str:
    """Kernel text of a bound: the number of keys is `n` there."""
    from nsagen.ir.plan import N
    from nsagen.sym import symbol

    return to_text(substitute(x, {N: symbol("n")}))


def _segment(segment: Segment, conjuncts: dict[Conjunct, Named]) -> SegmentView:
    masks = {m.conjunct: m for m in segment.masks if not m.extent}
    extent = next((m for m in segment.masks if m.extent), None)
    flags = tuple(Named(n.name, _flag(masks.get(c))) for c, n in conjuncts.items())
    text = ", ".join(conjunct_text(m.conjunct) for m in segment.masks) or "no mask"
    comment = f"{segment.name}: {text}"
    flags = (*flags, Named("EXTENT", _flag(extent)))
    return SegmentView(segment.name, to_text(segment.lo), to_text(segment.hi), comment, flags)


def _flag(mask: Mask | None) -> str:
    """When the mask has to be tested, as a compile-time condition on the tile sizes."""
    if mask is None:
        return "False"
    if not mask.unless:
        return "True"
    return " or ".join(_negative(u) for u in mask.unless)


def _negative(x: Expr) -> str:
    """x < 0 with the tile sizes on the left: `BN + BT > 514`."""
    constant = substitute(x, {BN: const(0), BT: const(0)})
    return f"{to_text(expand(constant - x))} > {to_text(constant)}"

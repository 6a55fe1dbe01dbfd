"""What a kernel template asks of a kernel's walks: sources, segments, cuts and masks as text in Triton's syntax."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from nsagen.ir.graph import BlockList, Heads, KeyAxis
from nsagen.ir.plan import BN, BT, Kernel, Mask, N, Plan, Ring, Segment, Taken, Walk
from nsagen.sym import Conjunct, Expr, conjunct_text, const, expand, substitute, symbol, to_text


def power_of_two(count: int) -> int:
    """The smallest that is not below count: what a range in a kernel must be."""
    return 1 << (count - 1).bit_length()


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


def conjuncts_of(kernel: Kernel) -> dict[Conjunct, Named]:
    """Every conjunct that some segment of the kernel may have to test, named C0, C1, …"""
    tested = dict.fromkeys(
        c for w in kernel.walks for s in w.segments for c in (m.conjunct for m in s.masks if not m.extent)
    )
    return {c: Named(f"C{i}", conjunct_text(c)) for i, c in enumerate(tested)}


def sources_of(kernel: Kernel, conjuncts: dict[Conjunct, Named], plan: Plan, leaves: bool) -> tuple[SourceView, ...]:
    """leaves: LEAVES of the last blocks of a list may be left to another kernel."""
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
                walks=tuple(_walk(w, conjuncts, suffix, plan.heads, leaves) for w in walks),
                listed=walks[0].listed,
                ring=next(o.ring for o in kernel.operands if o.role == "k" and o.source == number),
                taken=kernel.takes if kernel.takes and kernel.takes.source == number else None,
                own=suffix if kernel.apart else "",
            )
        )
    return tuple(views)


def _walk(walk: Walk, conjuncts: dict[Conjunct, Named], suffix: str, heads: Heads, leaves: bool) -> WalkView:
    segments = tuple(_segment(s, conjuncts) for s in walk.segments)
    if walk.listed and walk.direction == "forward":
        return _listed_walk(walk, segments, suffix, heads, leaves)
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


def _listed_walk(walk: Walk, segments: tuple[SegmentView, ...], suffix: str, heads: Heads, leaves: bool) -> WalkView:
    assert walk.listed is not None
    of = ListView(f"blocks{suffix}_ptr", "listed", walk.listed.size, walk.listed.count)
    left = f"named = tl.where(named <= t0 // {of.size} - LEAVES, named, -1) if LEAVES else named"
    lines = (
        f"# {walk.piece.name}: {', '.join(map(conjunct_text, walk.piece.where))}, in the listed blocks",
        f"listed = (first * {heads.kv} + h) * {of.count}",
        f"entry = tl.arange(0, {of.width})",
        f"named = tl.load({of.pointer} + listed + entry, mask=entry < {of.count}, other=-1)",
        *([left] if leaves else []),
        "blocks = tl.sum((named >= 0).to(tl.int32))",
    )
    return WalkView("\n".join("    " + line for line in lines), segments, of)


def _scalar(x: Expr) -> str:
    """Kernel text of a bound: the number of keys is `n` there."""
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

"""Plan: how it is computed. Buffers, ops (schedules of launches) and kernels, every choice with its `because`.

A kernel is a grid of tiles and a few walks; a walk runs over the keys of a query tile (`forward`) or the queries
of a key tile (`reverse`), in segments that carry only the masks not proved on them. Fields that a pass has not
reached yet are None or empty; verify.py says which pass owes what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nsagen.ir.graph import BlockList, Heads, KeyAxis, Piece, Select
from nsagen.sym import Conjunct, Expr, Interval, Symbol, count, moves_along

# Tile symbols: a query tile is BM rows = BT queries × the heads of one group, a key tile is BN keys.
BM, BT, BN = count("BM"), count("BT"), count("BN")
T0, S0 = count("t0"), count("s0")  # first query and first key of the tile
N = count("N")  # keys on the walk's axis

Body = Literal[
    "attend_fwd", "attend_dq", "attend_dkv", "attend_list_dkv", "combine_fwd", "combine_bwd",
    "score_lse", "select_scores", "select_blocks", "sum_items", "sum_splits",
    "attend_list_fwd", "merge_lists", "sum_lists", "attend_list_grads", "sum_list_parts",
    "attend_keys", "attend_wide_keys", "attend_queries",
    "split_attend", "split_select", "split_merge",
]  # fmt: skip
HEADS_IN_TURN = ("select_scores",)  # bodies whose rows are queries of one head, the group's heads one after another
BY_LISTS = ("attend_fwd", "attend_dq")  # bodies whose query tiles may find their keys by block lists
BY_KEYS = ("attend_keys", "attend_wide_keys")  # bodies of dk and dv with a warp that copies
# Bodies that hold keys and walk the queries; bodies of kernels that have no form without a warp that copies.
WALK_QUERIES = ("attend_dkv", "attend_list_dkv", "attend_list_fwd", "attend_list_grads", *BY_KEYS)
ONLY_SPECIALISED = ("attend_list_grads", *BY_KEYS, "attend_queries")
DEEP = 5  # stages of a decoding step over small pages, half of them before the keys; runtime/split.py asks for it
MOST_NEW = 8  # tokens of a sequence that one step of decoding appends
Direction = Literal["forward", "reverse"]


@dataclass(frozen=True)
class Choice:
    """A decision and its reason, in words."""

    what: str
    because: str


@dataclass(frozen=True)
class Buffer:
    name: str
    axes: tuple[str, ...]
    shape: tuple[Expr, ...]
    dtype: Literal["input", "gate", "float32", "int32"]
    kind: Literal["input", "output", "saved", "workspace"]


@dataclass(frozen=True)
class Mask:
    """A conjunct to test on a segment, except where every `unless` >= 0 (then it is proved)."""

    conjunct: Conjunct
    unless: tuple[Expr, ...]
    extent: bool  # the end of an axis: guards loads; keys past it also lose their score


@dataclass(frozen=True)
class Cut:
    """A named point of the loop axis, in terms of the ranges' ends and of earlier cuts."""

    name: str
    at: Expr


# The ends of a walk's ranges, as its cuts name them.
SOME_LO, SOME_HI, ALL_LO, ALL_HI = count("some_lo"), count("some_hi"), count("all_lo"), count("all_hi")


@dataclass(frozen=True)
class Segment:
    name: Literal["lo", "mid", "hi", "edge"]
    lo: Expr  # a cut, or a constant
    hi: Expr
    masks: tuple[Mask, ...]


@dataclass(frozen=True)
class Taken:
    """Listed keys that a kernel attends to for another branch, too, since the source that it walks has them all.

    They are the last `count` blocks of `size` tokens up to the query's own, which every list of that branch names. In
    the forward, the kernel completes the operands `out_taken` and `lse_taken`, the branch's rows without those keys; in
    the gradients, it adds theirs by the branch's row statistics, `lse_taken` and `delta_taken`.
    """

    source: int
    size: int
    count: int


@dataclass(frozen=True)
class Walk:
    """One piece of a source, walked by a tile. `all` is None where refused, with the reason beside it."""

    source: int  # which (k, v) pair of the kernel
    piece: Piece
    axis: KeyAxis
    direction: Direction
    listed: BlockList | None = None  # forward: walk the query's list; reverse: the queries that list the key block
    some: Interval | None = None
    all: Interval | None = None
    refused: str | None = None
    cuts: tuple[Cut, ...] = ()
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class Access:
    """How an operand is addressed: from the base row of its sequence, always in 64 bits, then rows within a tile."""

    operand: str
    buffers: tuple[str, ...]  # what the launches bind to it
    base: Expr
    guard: Literal["tile", "segment"]  # rows past the end: in any tile, or only on segments with the extent's mask
    bits: Literal[32, 64]  # of the offsets of a tile's rows
    map: bool = False  # tiles come by a tensor map (TMA) where the launch can make one, else by pointers


@dataclass(frozen=True)
class Ring:
    """A value of a cache of which only the first `sinks` tokens and the last ones stay: `keep` before a query.

    A step overwrites none that its own queries see, and as many tokens as a step adds can be taken back.
    """

    sinks: int
    keep: int

    @property
    def size(self) -> int:
        """The last tokens that stay."""
        return self.keep + MOST_NEW


@dataclass(frozen=True)
class Operand:
    """A kernel's parameter: what it holds (`role`) on which rows. `optional` ones may be absent in a launch.

    mode "accumulate": stored, or added to where the launch says so; "update": read and written again.
    """

    name: str
    role: Literal[
        "q", "k", "v", "out", "lse", "delta", "gates", "d_out", "dq", "dk", "dv", "d_gates", "term",
        "blocks", "scores", "items", "parts", "rest", "shift", "out_parts", "lse_parts", "dq_parts",
        "part_lse", "sums",
    ]  # fmt: skip
    rows: Literal["query", "key"]
    mode: Literal["load", "store", "accumulate", "update"]
    source: int = 0
    optional: bool = False
    ring: Ring | None = None  # how the keys and values of a cache lie


@dataclass(frozen=True)
class TileConfig:
    bm: int
    bn: int
    warps: int
    stages: int
    smem: int  # bytes
    registers: int  # estimated, a thread
    cost: float  # estimated, relative to the useful work at the peak rate
    dropped: str | None = None  # the reason, for a candidate that does not survive
    cap: int = 0  # registers a thread that the compiler is held to, 0 for its own choice
    maps: bool = False  # only by tensor maps: by pointers it would spill, or a warp copies by them
    specialised: bool = False  # a warp copies, warpgroups multiply (Gluon); `warps` are one warpgroup's
    spills: int = 0  # bytes stored and loaded that its compiler is known to spill, beside which it was measured

    @property
    def label(self) -> str:
        more = (f" r{self.cap}" if self.cap else "") + (" ws" if self.specialised else "")
        return f"{self.bm}x{self.bn} w{self.warps} s{self.stages}{more}"


@dataclass(frozen=True)
class TileTable:
    """Ranked candidates for one architecture and one operand width in bits."""

    arch: str
    bits: int
    configs: tuple[TileConfig, ...]


@dataclass(frozen=True)
class Grid:
    """One program a tile of `step` rows of `axis`, KV head and batch entry, tiles running fastest.

    axis None: tiles of `step` rows of the flat [B·T·Hq] rows, no heads and no sequences. split: programs share a
    tile's loop, each a run of its steps (of scores, one step); the launch says how many.
    """

    axis: KeyAxis | None
    step: Symbol
    order: Literal["ascending", "descending"]
    split: bool = False


@dataclass(frozen=True)
class Kernel:
    name: str
    branch: str
    body: Body
    grid: Grid
    operands: tuple[Operand, ...]
    walks: tuple[Walk, ...]
    choices: tuple[Choice, ...]
    qk_parts: tuple[int, ...] = ()  # powers of two that cover the head dim
    v_parts: tuple[int, ...] = ()
    tiles: tuple[TileTable, ...] = ()
    accesses: tuple[Access, ...] = ()
    facts: tuple[str, ...] = ()  # names from FACTS below
    select: Select | None = None  # what a selection kernel computes
    cached: bool = False  # queries continue sequences whose keys lie in a cache, perhaps in pages
    takes: Taken | None = None

    @property
    def apart(self) -> bool:
        """Whether each source has a softmax, and so row statistics, of its own."""
        return any(o.role == "lse" and o.source > 0 for o in self.operands)

    def follows_lists(self, source: int) -> bool:
        """Whether query tiles find the source's keys by block lists."""
        return self.body in BY_LISTS and any(w.listed for w in self.walks if w.source == source)

    def mapped(self, source: int, bn: int = 1) -> bool:
        """Whether the source's tiles of bn keys can come by tensor maps: boxes of listed blocks, in no pages."""
        sizes = [w.listed.size for w in self.walks if w.source == source and w.listed]
        return self.follows_lists(source) and not self.cached and all(size % bn == 0 for size in sizes)

    def may_specialise(self) -> bool:
        """Whether a warp of its own could copy its keys: those of one source, walked once, in a row in memory.

        And their masks speak of distances: a tile then compares constants with a bound a row.
        """
        if self.body != "attend_fwd" or self.cached or len(self.walks) != 1 or self.walks[0].listed:
            return False
        walk = self.walks[0]
        return all(moves_along(c, walk.axis.stride) for c in walk.piece.where)

    @property
    def specialised(self) -> bool:
        """Whether some of its tiles have a warp that only copies."""
        return any(c.specialised and c.dropped is None for t in self.tiles for c in t.configs)

    @property
    def unites(self) -> bool:
        """Whether adjacent queries of some of its tiles share the blocks of their lists' union."""
        return self.specialised and self.body == "attend_fwd" and any(w.listed for w in self.walks)

    @property
    def scores_by_rows(self) -> bool:
        """Whether some of its tiles have scores of rows that are queries × heads, of keys in lane order."""
        return self.specialised and self.body == "select_scores"


FACTS = {
    "rows_may_be_empty": "a query may see no key: output 0, lse −inf",
    "group_fills_tile": "BM is a multiple of the group: every row of a tile is a query",
}


@dataclass(frozen=True)
class Guard:
    """A host-side condition under which a launch (a variant of its node) is taken."""

    key: Literal["mode", "direction", "length", "arch", "form", "shares"]
    op: Literal["is", "is not", "from", "below"]
    value: str | int

    def holds(self, found: str | int) -> bool:
        if self.op.startswith("is"):
            return (found == self.value) == (self.op == "is")
        return (int(found) >= int(self.value)) == (self.op == "from")


# Where a warp can copy by tensor maps: rows in 16 bits, not packed, 16 bytes aligned, on sm_90 (launch.specialises). A
# forward has tiles of both forms: there, the picked one must be one whose warp copies, too.
SPECIALISED = Guard("form", "is", "specialised")
PLAIN = Guard("form", "is not", "specialised")
# Whether several programs share a key tile, since tiles alone would leave multiprocessors idle (hopper.shares).
ALONE, SHARED = Guard("shares", "below", 2), Guard("shares", "from", 2)


@dataclass(frozen=True)
class Launch:
    """A kernel with its operands bound to buffers; an optional operand left out is absent."""

    kernel: str
    binds: tuple[tuple[str, str], ...]
    accumulate: bool = False  # add to the outputs marked `accumulate` instead of overwriting them
    over: str | None = None  # "chunks": a host loop over chunks of queries, so that the scores of all never exist
    when: tuple[Guard, ...] = ()
    rides: str | None = None  # the kernel next to it whose program may do its work for a row, else it is launched
    leaves: int = 0  # of each list, the last blocks up to the query's own, which another kernel takes


@dataclass(frozen=True)
class Op:
    """A custom op: allocates its outputs, runs its launches in order."""

    name: str
    doc: Literal["part", "part_grad", "whole", "whole_grad", "lean", "lean_grad", "serve", "decode"]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Plan:
    name: str
    heads: Heads
    buffers: tuple[Buffer, ...]
    ops: tuple[Op, ...]
    kernels: tuple[Kernel, ...]

    def kernel(self, name: str) -> Kernel:
        return next(k for k in self.kernels if k.name == name)

    def buffer(self, name: str) -> Buffer:
        return next(b for b in self.buffers if b.name == name)

    def launches(self, kernel: str) -> list[Launch]:
        """Of the kernel, in any op."""
        return [x for op in self.ops for x in op.launches if x.kernel == kernel]

    def riders(self, kernel: str) -> tuple[Launch, ...]:
        """The launches that ride on the kernel's, in their order."""
        return tuple(x for op in self.ops for x in op.launches if x.rides == kernel)

    def brought(self, launch: Launch) -> tuple[tuple[str, str], ...]:
        """What is bound for the sake of the launch's riders alone: (operand, buffer), under the last rider's name."""
        found = dict[str, str]()
        own = {buffer for operand, buffer in launch.binds if not operand.endswith("_taken")}
        for rider in self.riders(launch.kernel):
            found |= {buffer: operand for operand, buffer in rider.binds if buffer not in own}
        return tuple((operand, buffer) for buffer, operand in found.items())

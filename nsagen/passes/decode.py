"""The forward's variant for mode=decode: few queries a sequence, their keys split over programs.

Up to four launches: the scores of a selection, with the attention over the same keys if there is one; the selection;
every other attention; the merge of all parts, gates and all. The selection rides on the attention up to some thousand
candidates. With so many sequences that every source is one run of keys, one launch does it all, a query a program
(decode_whole). What appends is outside of the plan: a launch before them, or programs beside the first one's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from nsagen.ir.graph import (
    TOKEN_AXIS,
    TOKENS,
    Attend,
    Combine,
    Graph,
    LogSumExp,
    Select,
    Source,
    ended_blocks,
)
from nsagen.ir.plan import BM, BT, Buffer, Choice, Grid, Kernel, Launch, Op, Operand, Walk
from nsagen.sym import const, count, floordiv

SPLIT_KEYS = Choice(
    "split_keys", "mode=decode: batch × KV heads programs leave the GPU idle, so programs share a query's keys, in runs"
)
ONE_LAUNCH = Choice("one_launch", "no source waits for another's result; a launch costs what a short step's bytes do")
ALL_MASKED = Choice("one_masked_loop", "bound by memory: a mask is cheaper than the drained pipelines of three loops")
SUMS = Choice(
    "scores_once", "a head's scores are kept as sums a block, so that the keys are not read again once lse is known"
)
FIXED_ORDER = Choice("fixed_order", "float32 parts are added in their order: the same bits on every run")
ROW = Choice(
    "row_a_program", "a row of scores fits the registers: few are ranked, of many the n-th best is found bit by bit"
)
SHARED = Choice(
    "shared_out", "one program's selection or merge would hold all others up: runs of candidates, rows by rows of parts"
)
RIDES = Choice(
    "rides", "with many sequences a program has all of a query (decode_whole): no part is written, no launch follows"
)
SELECTS = Choice(
    "selects", "up to some thousand blocks each program of a list selects for itself: cheaper than a launch, no wait"
)
PACKED = Choice("head_packing", "the group's heads, and the step's queries where they walk alike, fill the rows")

Mode = Literal["load", "store"]


@dataclass(frozen=True)
class Lane:
    """A source of a decoding kernel: where its parts go. term: which sum they are part of; None for scores alone."""

    name: str
    source: Source
    term: int | None

    @property
    def out(self) -> str:
        return f"split_out_{self.name}"

    @property
    def lse(self) -> str:
        return f"split_lse_{self.name}"


@dataclass(frozen=True)
class Lanes:
    """scores: what normalises the selection. attend: the rest."""

    scores: tuple[Lane, ...]
    attend: tuple[Lane, ...]
    select: Select | None

    @property
    def merged(self) -> tuple[Lane, ...]:
        return tuple(x for x in (*self.scores, *self.attend) if x.term is not None)


def lanes(graph: Graph) -> Lanes:
    attends = [n for n in graph.nodes if isinstance(n, Attend)]
    combine = next((n for n in graph.nodes if isinstance(n, Combine)), None)
    terms = combine.terms if combine else (graph.output,)
    select = next((n for n in graph.nodes if isinstance(n, Select)), None)
    scores: tuple[Lane, ...] = ()
    for node in graph.nodes:
        if isinstance(node, LogSumExp):
            scores = (Lane("scores", Source(node.k, "", node.axis, (ended_blocks(node.axis),)), None),)
    rest: list[Lane] = []
    for node in attends:
        of_node = _of(node, terms.index(node.out))
        if select and node.lse == select.lse:
            scores = of_node
        else:
            rest += of_node
    return Lanes(scores, tuple(rest), select)


def _of(node: Attend, term: int) -> tuple[Lane, ...]:
    names = [node.branch] if len(node.sources) == 1 else [f"{node.branch}{i}" for i in range(len(node.sources))]
    return tuple(Lane(name, s, term) for name, s in zip(names, node.sources, strict=True))


# --- kernels


def decode_kernels(graph: Graph) -> list[Kernel]:
    of = lanes(graph)
    kernels: list[Kernel] = []
    if of.select:
        kernels = [_split("decode_scores", of.scores, of.select), _selection(of.select)]
    return [*kernels, _split("decode_attend", of.attend, None), _merge(graph, of)]


def _suffixes(lanes: tuple[Lane, ...]) -> list[str]:
    return [""] if len(lanes) == 1 else [str(i) for i in range(len(lanes))]


def _operand(name: str, role: str, mode: Mode, rows: str = "query", source: int = 0) -> Operand:
    return Operand(name, role, rows, mode, source)  # type: ignore[arg-type]


def _split(name: str, lanes: tuple[Lane, ...], select: Select | None) -> Kernel:
    operands, walks = [_operand("q", "q", "load")], list[Walk]()
    for i, (lane, x) in enumerate(zip(lanes, _suffixes(lanes), strict=True)):
        source, valued = lane.source, lane.term is not None
        operands.append(_operand("k" + x, "k", "load", "key", i))
        operands += [_operand("v" + x, "v", "load", "key", i)] if valued else []
        operands += [_operand("blocks" + x, "blocks", "load", "query", i)] if source.listed else []
        operands += [_operand("parts" + x, "parts", "store", "query", i)] if valued else []
        operands.append(_operand("lses" + x, "part_lse", "store", "query", i))
        walks += [Walk(i, p, source.axis, "forward", source.listed) for p in source.pieces]
    if select:
        operands += [_operand(name, "sums", "store") for name in summed(select)]
    choices = (SPLIT_KEYS, PACKED, ALL_MASKED)
    if select or len(lanes) > 1:
        choices = (*choices, SUMS if select else ONE_LAUNCH)
    grid = Grid(TOKEN_AXIS, BT, "ascending", split=True)
    kernel = Kernel(name, "", "split_attend", grid, tuple(operands), tuple(walks), choices, cached=True)
    return replace(kernel, select=select)


def summed(select: Select) -> tuple[str, ...]:
    """What is kept of the scores: groups' sums, and the tops that they are relative to; or each key's score."""
    return ("sums", "tops") if select.grouped > 1 else ("sums",)


def _selection(select: Select) -> Kernel:
    operands = (
        *(_operand(name, "sums", "load") for name in summed(select)), _operand("lses_scores", "part_lse", "load"),
        _operand("scores", "scores", "store"), _operand("blocks", "blocks", "store"),
    )  # fmt: skip
    flat = Grid(None, BM, "ascending")
    kernel = Kernel(
        "decode_select", "", "split_select", flat, operands, (), (SELECTS, ROW, SHARED, FIXED_ORDER), cached=True
    )
    return replace(kernel, select=select)


def _merge(graph: Graph, of: Lanes) -> Kernel:
    operands: list[Operand] = []
    for lane in of.merged:
        assert lane.term is not None
        operands.append(_operand(f"parts_{lane.name}", "parts", "load", source=lane.term))
        operands.append(_operand(f"lses_{lane.name}", "part_lse", "load", source=lane.term))
    if any(isinstance(n, Combine) for n in graph.nodes):
        operands.append(_operand("gates", "gates", "load"))
    operands.append(_operand("out", "out", "store"))
    flat = Grid(None, BM, "ascending")
    return Kernel(
        "decode_merge", "", "split_merge", flat, tuple(operands), (), (SHARED, FIXED_ORDER, RIDES), cached=True
    )


# --- schedule


def decode_op(graph: Graph, inputs: tuple[str, ...]) -> Op:
    """The serving op of a step: the same inputs and output as the forward over a cache."""
    of = lanes(graph)
    launches: list[Launch] = []
    if of.select:
        launches.append(_split_launch("decode_scores", of.scores, of.select))
        binds = tuple((name, f"split_{name}") for name in summed(of.select))
        binds += (("lses_scores", of.scores[0].lse), ("scores", "split_scores"), ("blocks", of.select.out))
        launches.append(Launch("decode_select", binds, rides="decode_attend"))
    launches.append(_split_launch("decode_attend", of.attend, None))
    merged = [bind for x in of.merged for bind in ((f"parts_{x.name}", x.out), (f"lses_{x.name}", x.lse))]
    combine = next((n for n in graph.nodes if isinstance(n, Combine)), None)
    gates = [("gates", combine.gates)] if combine else []
    launches.append(Launch("decode_merge", (*merged, *gates, ("out", graph.output)), rides="decode_attend"))
    return Op("decode", "decode", inputs, (graph.output,), tuple(launches))


def _split_launch(kernel: str, lanes: tuple[Lane, ...], select: Select | None) -> Launch:
    binds: list[tuple[str, str]] = [("q", "q")]
    for lane, x in zip(lanes, _suffixes(lanes), strict=True):
        source, valued = lane.source, lane.term is not None
        binds.append(("k" + x, source.k))
        binds += [("v" + x, source.v)] if valued else []
        binds += [("blocks" + x, source.listed.blocks)] if source.listed else []
        binds += [("parts" + x, lane.out)] if valued else []
        binds.append(("lses" + x, lane.lse))
    binds += [(name, f"split_{name}") for name in summed(select)] if select else []
    return Launch(kernel, tuple(binds))


def decode_buffers(graph: Graph) -> list[Buffer]:
    """Parts of every lane; sums [B, T, Hq, 2, groups] for a group's own block and for the next, which it overlaps."""
    of, h = lanes(graph), graph.heads
    batch, heads, width = count("B"), const(h.query), const(h.v_dim)
    rows = ("splits", "B", "T", "Hq")
    sizes = (count("splits"), batch, TOKENS, heads)
    found: list[Buffer] = []
    for lane in (*of.scores, *of.attend):
        found.append(Buffer(lane.lse, rows, sizes, "float32", "workspace"))
        if lane.term is not None:
            found.append(Buffer(lane.out, (*rows, "Dv"), (*sizes, width), "float32", "workspace"))
    if of.select:
        per = of.select.grouped
        groups = floordiv(of.select.axis.length() + per - 1, per)
        shape = (batch, TOKENS, heads, const(len(of.select.group_weights)), groups)
        blocks = (batch, TOKENS, const(h.kv), floordiv(TOKENS + of.select.size - 1, of.select.size))
        found.append(Buffer("split_scores", ("B", "T", "Hkv", "blocks"), blocks, "float32", "workspace"))
        found.append(Buffer("split_sums", ("B", "T", "Hq", "blocks", "groups"), shape, "float32", "workspace"))
        if per > 1:
            tops = (batch, TOKENS, heads, groups)  # kept once a key tile, whose groups share it
            found.append(Buffer("split_tops", ("B", "T", "Hq", "groups"), tops, "float32", "workspace"))
    return found

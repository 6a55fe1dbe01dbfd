"""choose_strategy: graph -> plan. Which kernels; operators.py puts them in order over buffers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nsagen.errors import Refused
from nsagen.ir.graph import (
    TOKEN_AXIS,
    Attend,
    Combine,
    CombineGrad,
    Graph,
    Heads,
    LogSumExp,
    Select,
    Source,
    ended_blocks,
)
from nsagen.ir.plan import BM, BN, BT, Choice, Grid, Kernel, Operand, Plan, Walk
from nsagen.passes.binds import suffixes
from nsagen.passes.buffers import buffers
from nsagen.passes.decode import decode_kernels
from nsagen.passes.joint import joint_kernels
from nsagen.passes.loop_order import by_blocks, specialised_by_blocks
from nsagen.passes.operators import cached_name, operators, serving_sources
from nsagen.passes.rings import over_rings
from nsagen.passes.specialise import keys_are_wide, keys_may_specialise, keys_name, queries_may_specialise, queries_name
from nsagen.passes.takeover import completing

PACK = Choice(
    "head_packing", "the group shares its keys, so one K/V load serves BM rows and dk, dv need no copy per head"
)
QUERY_MAJOR = Choice(
    "query_major", "mode=train: every query tile has BM rows, enough for the tensor cores at any group"
)
ONE_QUERY = Choice(
    "one_query_a_tile", "every query lists blocks of its own; the group's heads share the list and fill the rows"
)
KEY_MAJOR = Choice("key_major", "dk and dv of a key tile stay in registers: no atomics, the same bits on every run")
INVERSE = Choice(
    "inverse_lists", "the queries of a key block come from a sort of the lists, on the device, in a fixed order"
)
ITEMS = Choice(
    "items", "a hot block (the first: every query lists it) is split; float32 partial sums are added in order"
)
SPLITS = Choice(
    "split_queries", "few key tiles, the first seen by every query: programs share a tile; float32 parts added in order"
)
SHARES = Choice(
    "shared_tiles",
    "programs share a key tile where that fills the multiprocessors: float32 parts added in order, none of one alone",
)
COPIED_KEYS = Choice(
    "warp_specialised",
    "a warp copies keys and values by tensor maps, two warpgroups have 64 rows each (16-bit on sm_90)",
)
COPIED_WIDE = Choice(
    "warp_specialised",
    "a warp copies the queries' rows by tensor maps, two warpgroups take turns, a third has dk (16-bit on sm_90)",
)
COPIED = Choice(
    "warp_specialised",
    "a warp copies the queries' rows by tensor maps, two warpgroups have 64 keys each (16-bit on sm_90)",
)
RECOMPUTE = Choice("recompute_scores", "p = exp(s − lse) costs one dot; keeping it would take T × keys values")
EXACT = Choice(
    "second_pass", "with lse known, the heads of a group add up in registers, exactly: no score per head is stored"
)
FIRST_PASS = Choice(
    "first_pass", "no attention is a softmax over these keys alone: their log-sum-exp comes from a pass without values"
)
HEADS = Choice(
    "heads_in_turn", "a key tile stays in place, so the heads' sum stays in a thread, and programs need no reduction"
)
POOLED = Choice(
    "pooled_store", "a block's keys divide a tile: their sums leave, not the keys' scores, and are read in a row"
)
CHUNKS = Choice("query_chunks", "scores of all queries would be T × T/d values; a chunk's are bounded")
ONE_BRANCH = Choice("one_branch", "recompute: one branch's output at a time is made again, read once and dropped")
CHUNKS_OF_PARTS = Choice("query_chunks", "parts of all queries would be T × n rows of the group; a chunk's are bounded")
ONE_PASS = Choice("one_pass", "bound by memory: every term is read once, sums in float32")
ROW = Choice(
    "row_a_program", "a row of scores fits the registers: the n-th best is found bit by bit, in as many steps for any n"
)


@dataclass(frozen=True)
class ChooseStrategy:
    """Give every Attend a query-major forward and dq and a key-major dk/dv, every Combine one pass over its terms.

    Needs a differentiated graph. The gate rides in a shift of lse, so that no branch's gradient is ever
    stored; what a second branch adds to dq, or to a shared dk and dv, is added in place.
    before  out_w, lse_w = attend q, k, v …
    after   kernel window_fwd query_major; op window_attention: launch window_fwd
    """

    name = "choose_strategy"

    def run(self, graph: Graph) -> Plan:
        if not graph.grads:
            raise Refused("choose_strategy needs a differentiated graph")
        kernels: list[Kernel] = []
        for node in graph.nodes:
            if isinstance(node, Attend):
                kernels += [_forward(node), *_forward_by_blocks(node, graph.heads), *_gradients(node, graph.heads)]
                kernels += _specialised_gradients(node, graph.heads)
            elif isinstance(node, LogSumExp):
                kernels.append(_normaliser(node))
            elif isinstance(node, Select):
                kernels += _selection(node)
            elif isinstance(node, (Combine, CombineGrad)):
                kernels += _combination(node)
        kernels = joint_kernels(graph, kernels)
        kernels += [_cached(k) for k in kernels if k.name in {x.kernel for x in serving_sources(graph)}]
        kernels = completing(graph, kernels) + decode_kernels(graph)
        ops = operators(graph)
        kernels = over_rings(graph, ops, _unique(kernels))
        return Plan(graph.name, graph.heads, buffers(graph), ops, tuple(kernels))


def _cached(kernel: Kernel) -> Kernel:
    """The kernel over keys in a cache: nothing is kept for a backward."""
    operands = tuple(o for o in kernel.operands if o.role != "rest")
    return replace(kernel, name=cached_name(kernel.name), operands=operands, cached=True)


def _unique(kernels: list[Kernel]) -> list[Kernel]:
    return list({k.name: k for k in kernels}.values())


def _load(name: str, role: str, rows: str = "query", source: int = 0, optional: bool = False) -> Operand:
    return Operand(name, role, rows, "load", source, optional)  # type: ignore[arg-type]


def _key_operands(sources: tuple[Source, ...]) -> tuple[Operand, ...]:
    operands: list[Operand] = []
    for i, (source, suffix) in enumerate(zip(sources, suffixes(sources), strict=True)):
        operands += [_load("k" + suffix, "k", "key", i), _load("v" + suffix, "v", "key", i)]
        if source.listed:
            operands.append(_load("blocks" + suffix, "blocks", "query", i))
    return tuple(operands)


ROW_STATISTICS = (_load("d_out", "d_out"), _load("lse", "lse"), _load("delta", "delta"))


def _walks(sources: tuple[Source, ...]) -> tuple[Walk, ...]:
    return tuple(Walk(i, p, s.axis, "forward", s.listed) for i, s in enumerate(sources) for p in s.pieces)


def _query_tiles(sources: tuple[Source, ...]) -> tuple[Grid, Choice]:
    """Late queries see most of a pooled axis: their tiles start first, so that none is left for the end."""
    grows = any(not s.axis.is_tokens for s in sources)
    listed = any(s.listed for s in sources)
    return Grid(TOKEN_AXIS, BT, "descending" if grows else "ascending"), ONE_QUERY if listed else QUERY_MAJOR


def _forward(node: Attend) -> Kernel:
    grid, choice = _query_tiles(node.sources)
    stores = (Operand("out", "out", "query", "store"), Operand("lse", "lse", "query", "store"))
    if node.rest:
        stores = (*stores, Operand("rest", "rest", "query", "store", optional=True))
    operands = (_load("q", "q"), *_key_operands(node.sources), *stores)
    return Kernel(f"{node.branch}_fwd", node.branch, "attend_fwd", grid, operands, _walks(node.sources), (choice, PACK))


def _query_grad(node: Attend) -> Kernel:
    grid, choice = _query_tiles(node.sources)
    operands = (
        _load("q", "q"),
        *_key_operands(node.sources),
        *ROW_STATISTICS,
        Operand("dq", "dq", "query", "accumulate"),
    )
    choices = (choice, PACK, RECOMPUTE)
    return Kernel(f"{node.branch}_dq", node.branch, "attend_dq", grid, operands, _walks(node.sources), choices)


def _query_grads(node: Attend, heads: Heads) -> list[Kernel]:
    """dq, and the same with a warp that copies, where it has a form for it."""
    kernel = _query_grad(node)
    if not queries_may_specialise(node, heads):
        return [kernel]
    choices = (*kernel.choices, COPIED_KEYS)
    return [kernel, replace(kernel, name=queries_name(kernel.name), body="attend_queries", choices=choices)]


def _forward_by_blocks(node: Attend, heads: Heads) -> list[Kernel]:
    """Parts of the output, one a listed block, and their merge."""
    choice = by_blocks(node, heads, backward=False)
    if choice is None:
        return []
    source = node.sources[0]
    out_parts, lse_parts = (Operand(f"{x}_parts", f"{x}_parts", "query", "store") for x in ("out", "lse"))  # type: ignore[arg-type]
    items = _load("items", "items", "key")
    loads = (_load("q", "q"), _load("k", "k", "key"), _load("v", "v", "key"), items)
    walk = Walk(0, source.pieces[0], source.axis, "reverse", source.listed)
    stores = (Operand("out", "out", "query", "store"), Operand("lse", "lse", "query", "store"))
    parts = (replace(out_parts, mode="load"), replace(lse_parts, mode="load"), _load("blocks", "blocks"))
    choices = (choice, INVERSE, ITEMS, CHUNKS_OF_PARTS, PACK)
    grid, flat = Grid(source.axis, BN, "ascending"), Grid(None, BM, "ascending")
    name = f"{node.branch}_list"
    return [
        Kernel(name, node.branch, "attend_list_fwd", grid, (*loads, out_parts, lse_parts), (walk,), choices),
        Kernel(f"{node.branch}_merge", node.branch, "merge_lists", flat, (*parts, *stores), (), (choice,)),
    ]


def _gradients(node: Attend, heads: Heads) -> list[Kernel]:
    """dq beside dk and dv; or parts of dq from the kernel of dk and dv, and their sum."""
    choice = by_blocks(node, heads, backward=True)
    if choice is None:
        return [*_query_grads(node, heads), *_key_grads(node, heads)]
    keys, sums = _key_grads(node, heads)
    parts = Operand("dq_parts", "dq_parts", "query", "store")
    choices = (choice, *keys.choices[:3], CHUNKS_OF_PARTS, *keys.choices[3:])
    keys = replace(keys, operands=(*keys.operands, parts), choices=choices)
    operands = (replace(parts, mode="load"), _load("blocks", "blocks"), Operand("dq", "dq", "query", "accumulate"))
    name, flat = f"{node.branch}_dq", Grid(None, BM, "ascending")
    return [keys, sums, Kernel(name, node.branch, "sum_lists", flat, operands, (), (choice,))]


def _specialised_gradients(node: Attend, heads: Heads) -> list[Kernel]:
    """The same key block by key block, where a warp can copy: parts of all three, and the sum of dq's."""
    choice = specialised_by_blocks(node, heads)
    if choice is None:
        return []
    source, flat = node.sources[0], Grid(None, BM, "ascending")
    loads = (
        _load("q", "q"),
        _load("k", "k", "key"),
        _load("v", "v", "key"),
        *ROW_STATISTICS,
        _load("items", "items", "key"),
    )
    parts, dq_parts = Operand("parts", "parts", "key", "store"), Operand("dq_parts", "dq_parts", "query", "store")
    walk = Walk(0, source.pieces[0], source.axis, "reverse", source.listed)
    choices = (choice, INVERSE, ITEMS, CHUNKS_OF_PARTS, PACK, RECOMPUTE)
    grid, name = Grid(source.axis, BN, "ascending"), f"{node.branch}_grads"
    operands = (replace(dq_parts, mode="load"), _load("blocks", "blocks"), Operand("dq", "dq", "query", "accumulate"))
    return [
        Kernel(name, node.branch, "attend_list_grads", grid, (*loads, parts, dq_parts), (walk,), choices),
        Kernel(f"{node.branch}_dq_sum", node.branch, "sum_list_parts", flat, operands, (), (choice,)),
    ]


def _key_grads(node: Attend, heads: Heads) -> list[Kernel]:
    kernels: list[Kernel] = []
    for source, suffix in zip(node.sources, suffixes(node.sources), strict=True):
        loads = (_load("q", "q"), _load("k", "k", "key"), _load("v", "v", "key"), *ROW_STATISTICS)
        walks = tuple(Walk(0, p, source.axis, "reverse", source.listed) for p in source.pieces)
        outs = (Operand("dk", "dk", "key", "accumulate"), Operand("dv", "dv", "key", "accumulate"))
        grid, name = Grid(source.axis, BN, "ascending"), f"{node.branch}_dkv{suffix}"
        parts, sum_name = Operand("parts", "parts", "key", "store"), f"{node.branch}_sum{suffix}"
        added, flat = (replace(parts, mode="load"), *outs), Grid(None, BM, "ascending")
        sums = Kernel(sum_name, node.branch, "sum_splits", flat, added, (), ())
        if source.listed:
            items = _load("items", "items", "key")
            choices = (KEY_MAJOR, INVERSE, ITEMS, PACK, RECOMPUTE)
            kernels.append(Kernel(name, node.branch, "attend_list_dkv", grid, (*loads, items, parts), walks, choices))
            kernels.append(Kernel(sum_name, node.branch, "sum_items", grid, (added[0], items, *outs), (), (ITEMS,)))
        elif not source.axis.is_tokens:
            choices = (KEY_MAJOR, SPLITS, PACK, RECOMPUTE)
            grid = replace(grid, split=True)
            kernels.append(Kernel(name, node.branch, "attend_dkv", grid, (*loads, parts), walks, choices))
            kernels += _specialised_keys(kernels[-1], source, heads)
            kernels.append(replace(sums, choices=(SPLITS,)))
        else:
            choices = (KEY_MAJOR, PACK, RECOMPUTE)
            kernels.append(Kernel(name, node.branch, "attend_dkv", grid, (*loads, *outs), walks, choices))
            for kernel in _specialised_keys(kernels[-1], source, heads):
                either = tuple(replace(o, optional=True) for o in (parts, *outs))
                stored = (parts,) if keys_are_wide(heads) else either
                found = replace(kernel, grid=replace(grid, split=True), operands=(*loads, *stored))
                kernels.append(replace(found, choices=(*choices, SHARES, kernel.choices[-1])))
                kernels.append(replace(sums, choices=(SHARES,)))
    return kernels


def _specialised_keys(kernel: Kernel, source: Source, heads: Heads) -> list[Kernel]:
    """The same with a warp that copies, where that has a form for it."""
    if not keys_may_specialise(source, heads):
        return []
    wide, name = keys_are_wide(heads), keys_name(kernel.name)
    body, copied = ("attend_wide_keys", COPIED_WIDE) if wide else ("attend_keys", COPIED)
    return [replace(kernel, name=name, body=body, choices=(*kernel.choices, copied))]


def _normaliser(node: LogSumExp) -> Kernel:
    operands = (_load("q", "q"), _load("k", "k", "key"), Operand("lse", "lse", "query", "store"))
    walk = Walk(0, ended_blocks(node.axis), node.axis, "forward")
    tiles = Grid(TOKEN_AXIS, BT, "descending")
    return Kernel("select_lse", "", "score_lse", tiles, operands, (walk,), (FIRST_PASS, PACK))


def _selection(node: Select) -> list[Kernel]:
    scores = Operand("scores", "scores", "query", "store")
    tiles = Grid(TOKEN_AXIS, BT, "descending", split=True)
    choices = (EXACT, HEADS, *((POOLED,) if node.grouped > 1 else ()), CHUNKS)
    loads = (_load("q", "q"), _load("k", "k", "key"), _load("lse", "lse"))
    walk = Walk(0, ended_blocks(node.axis), node.axis, "forward")
    blocks = Operand("blocks", "blocks", "query", "store")
    rows = Grid(None, BM, "ascending")
    return [
        Kernel("select_scores", "", "select_scores", tiles, (*loads, scores), (walk,), choices, select=node),
        Kernel(
            "select_best", "", "select_blocks", rows, (replace(scores, mode="load"), blocks), (), (ROW,), select=node
        ),
    ]


def _combination(node: Combine | CombineGrad) -> list[Kernel]:
    flat = Grid(None, BM, "ascending")
    terms = tuple(_load(f"term{i}", "term") for i in range(len(node.terms)))
    gates = _load("gates", "gates")
    if isinstance(node, Combine):
        out = Operand("out", "out", "query", "store")
        return [Kernel("combine_fwd", "", "combine_fwd", flat, (*terms, gates, out), (), (ONE_PASS,))]
    d_out, delta = _load("d_out", "d_out"), Operand("delta", "delta", "query", "store")
    rest = _load("rest", "rest", optional=True)
    kernels = [
        Kernel("row_delta", "", "combine_bwd", flat, (d_out, _load("term", "term"), rest, delta), (), (ONE_PASS,))
    ]
    if node.gates:
        deltas = tuple(replace(delta, name=f"delta{i}") for i in range(len(node.deltas)))
        d_gates = Operand("d_gates", "d_gates", "query", "store")
        rests = tuple(replace(rest, name=f"rest{i}") for i in range(len(node.rests)))
        lses = tuple(_load(f"lse{i}", "lse") for i in range(len(node.lses)))
        shifts = tuple(Operand(f"shift{i}", "shift", "query", "store") for i in range(len(node.shifts)))
        operands = (d_out, *terms, *rests, *lses, gates, *deltas, *shifts, d_gates)
        kernels.append(Kernel("combine_bwd", "", "combine_bwd", flat, operands, (), (ONE_PASS,)))
        kernels += [_branch_gate(i, delta.removeprefix("delta_"), d_gates) for i, delta in enumerate(node.deltas)]
    return kernels


def _branch_gate(i: int, branch: str, d_gates: Operand) -> Kernel:
    """What combine_bwd does, for one branch: the others' outputs need not be there."""
    loads = (_load("d_out", "d_out"), _load(f"term{i}", "term"), _load(f"rest{i}", "rest", optional=True))
    statistics = (_load(f"lse{i}", "lse"), _load("gates", "gates"))
    stores = (Operand(f"delta{i}", "delta", "query", "store"), Operand(f"shift{i}", "shift", "query", "store"))
    operands, flat = (*loads, *statistics, *stores, d_gates), Grid(None, BM, "ascending")
    return Kernel(f"{branch}_gate", branch, "combine_bwd", flat, operands, (), (ONE_BRANCH,))

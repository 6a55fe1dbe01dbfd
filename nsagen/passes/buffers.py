"""The buffers of choose_strategy: one a value, and the workspaces that only the plan knows of."""

from __future__ import annotations

from typing import Literal

from nsagen.ir.graph import TOKENS, Attend, AttendGrad, Combine, Graph, Heads, Pool, Select, Source, Value
from nsagen.ir.plan import Buffer
from nsagen.passes.decode import decode_buffers
from nsagen.passes.loop_order import by_blocks, specialised_by_blocks
from nsagen.passes.specialise import keys_may_specialise
from nsagen.sym import Expr, const, count, floordiv

BATCH = count("B")


def parts_of(source: Source) -> str:
    """The workspace of dk and dv in parts: of items, or of programs that share a key tile."""
    return "parts" if source.listed else f"parts_{source.axis.name}"


def buffers(graph: Graph) -> tuple[Buffer, ...]:
    """One buffer a value, and the workspaces that only the plan knows of."""
    gradients = {x for n in graph.nodes if isinstance(n, AttendGrad) for x in (n.dq, *n.dk, *n.dv)}
    outputs, inputs = {graph.output, "d_gates", *gradients}, {*graph.inputs, "d_out"}

    def kind(v: Value) -> Literal["input", "output", "saved", "workspace"]:
        if v.name in graph.saved:
            return "saved"
        return "output" if v.name in outputs else "input" if v.name in inputs else "workspace"

    sizes = _sizes(graph)
    values = [Buffer(v.name, v.axes, tuple(sizes[a] for a in v.axes), v.dtype, kind(v)) for v in graph.values]
    return (*values, *_workspaces(graph, sizes), *decode_buffers(graph))


def _sizes(graph: Graph) -> dict[str, Expr]:
    h = graph.heads
    columns = next((len(n.terms) for n in graph.nodes if isinstance(n, Combine)), 1)
    sizes: dict[str, Expr] = {"B": BATCH, "T": TOKENS, "Hq": const(h.query), "Hkv": const(h.kv)}
    sizes |= {"Dqk": const(h.qk_dim), "Dv": const(h.v_dim), "C": const(columns)}
    for node in graph.nodes:
        if isinstance(node, Pool):
            sizes[node.axis.name] = node.axis.length()
    for source in (s for n in graph.nodes if isinstance(n, Attend) for s in n.sources):
        if source.listed:
            sizes["n"], sizes["l'"] = const(source.listed.count), const(source.listed.size)
    return sizes


def _workspaces(graph: Graph, sizes: dict[str, Expr]) -> list[Buffer]:
    """Scores of a chunk of queries; parts of dk and dv, of items or of splits. All are counted when they run."""
    found: list[Buffer] = []
    width = const(graph.heads.qk_dim + graph.heads.v_dim)
    for node in graph.nodes:
        if isinstance(node, Select):
            found.append(_scores(node, sizes["Hkv"]))
        for source in node.sources if isinstance(node, Attend) else ():
            programs = "shares" if source.axis.is_tokens else "splits"
            axes: tuple[str, ...] = (programs, "B", source.axis.name, "Hkv")
            shape: tuple[Expr, ...] = (count(programs), BATCH, source.axis.length(), sizes["Hkv"])
            if source.listed:
                axes, shape = ("items", "l'"), (count("items"), sizes["l'"])
            elif source.axis.is_tokens and not keys_may_specialise(source, graph.heads):
                continue
            found.append(Buffer(parts_of(source), (*axes, "D"), (*shape, width), "float32", "workspace"))
        found += _list_parts(node, graph.heads) if isinstance(node, Attend) else []
    return found


def _scores(node: Select, heads: Expr) -> Buffer:
    """Of every key; or what a block has of its own keys, and of those of the block before where they overlap it."""
    name, columns = node.axis.name, node.axis.length()
    if node.grouped > 1:
        name, columns = "blocks", floordiv(TOKENS + node.size - 1, node.size)
    shape = (BATCH, count("chunk"), heads, const(len(node.group_weights)), columns)
    return Buffer("scores", ("B", "chunk", "Hkv", "parts", name), shape, "float32", "workspace")


def _list_parts(node: Attend, heads: Heads) -> list[Buffer]:
    """What a chunk's queries get from each tile of each block that they list."""
    listed = node.sources[0].listed
    if listed is None:
        return []
    axes = ("B", "chunk", "Hkv", "n", "tiles", "G")
    shape = (BATCH, count("chunk"), const(heads.kv), const(listed.count), count("tiles"), const(heads.group))
    found: list[Buffer] = []
    if by_blocks(node, heads, backward=False):
        out = Buffer(f"out_parts_{node.branch}", (*axes, "Dv"), (*shape, const(heads.v_dim)), "input", "workspace")
        found += [out, Buffer(f"lse_parts_{node.branch}", axes, shape, "float32", "workspace")]
    if by_blocks(node, heads, backward=True) or specialised_by_blocks(node, heads):
        dq = Buffer(f"dq_parts_{node.branch}", (*axes, "Dqk"), (*shape, const(heads.qk_dim)), "input", "workspace")
        found.append(dq)
    return found

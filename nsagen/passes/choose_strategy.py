"""choose_strategy: graph -> plan. Which kernels, in which order, over which buffers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nsagen.errors import Refused
from nsagen.ir.graph import TOKENS, Attend, AttendGrad, Combine, CombineGrad, Graph, Source, Value
from nsagen.ir.plan import BM, BN, BT, Buffer, Choice, Grid, Kernel, Launch, Op, Operand, Plan, Walk
from nsagen.sym import Expr, const, count

BATCH = count("B")
PACK = Choice("head_packing", "the group shares its keys, so one K/V load serves BM rows and dk, dv need no copy per head")
QUERY_MAJOR = Choice("query_major", "mode=train: every query tile has BM rows, enough for the tensor cores at any group")
KEY_MAJOR = Choice("key_major", "dk and dv of a key tile stay in registers: no atomics, the same bits on every run")
RECOMPUTE = Choice("recompute_scores", "p = exp(s − lse) costs one dot; keeping it would take T × keys values")


@dataclass(frozen=True)
class ChooseStrategy:
    """Give every Attend a query-major forward and dq and a key-major dk/dv, every Combine one pass over its terms.

    Needs a differentiated graph. The gate and its gradient ride in the row statistics (delta, g·p), so no branch
    gradient is stored; the branches after the first add to dq.
    before  out_w, lse_w = attend q, k, v …
    after   kernel window_fwd query_major; op window_attention: launch window_fwd
    """

    name = "choose_strategy"

    def run(self, graph: Graph) -> Plan:
        if not graph.grads:
            raise Refused("choose_strategy needs a differentiated graph")
        attends = [n for n in graph.nodes if isinstance(n, Attend)]
        grads = [n for n in graph.nodes if isinstance(n, AttendGrad)]
        combine = next((n for n in graph.nodes if isinstance(n, Combine)), None)
        combine_grad = next(n for n in graph.nodes if isinstance(n, CombineGrad))
        kernels = [k for n, g in zip(attends, grads, strict=True) for k in _attend_kernels(n, g)]
        kernels += _combine_kernels(combine, combine_grad)
        ops = [op for n, g in zip(attends, grads, strict=True) for op in _part_ops(n, g)]
        if combine:
            ops += _whole_ops(graph, attends, grads, combine, combine_grad)
        buffers = _buffers(graph)
        return Plan(graph.name, graph.heads, buffers, tuple(ops), tuple(kernels))


def _key_operands(sources: tuple[Source, ...]) -> tuple[Operand, ...]:
    return tuple(
        Operand(name + suffix, role, "key", "load", i)
        for i, suffix in enumerate(suffixes(sources))
        for name, role in (("k", "k"), ("v", "v"))
    )


def suffixes(sources: tuple[Source, ...]) -> tuple[str, ...]:
    """'' for the only source, else its number."""
    return ("",) if len(sources) == 1 else tuple(str(i) for i in range(len(sources)))


def _attend_kernels(node: Attend, grad: AttendGrad) -> list[Kernel]:
    sources = node.sources
    forward = tuple(Walk(i, p, s.axis, "forward") for i, s in enumerate(sources) for p in s.pieces)
    # Late query tiles see the most keys of a growing domain: start them first so that none is left for the end.
    grows = any(not s.axis.is_tokens for s in sources)
    queries = Grid(_token_axis(), BT, "descending" if grows else "ascending")
    q, keys = Operand("q", "q", "query", "load"), _key_operands(sources)
    stats = _row_statistics()
    fwd = Kernel(
        f"{node.branch}_fwd",
        node.branch,
        "attend_fwd",
        queries,
        (q, *keys, Operand("out", "out", "query", "store"), Operand("lse", "lse", "query", "store")),
        forward,
        (QUERY_MAJOR, PACK),
    )
    dq_out = Operand("dq", "dq", "query", "accumulate")
    dq = Kernel(
        f"{node.branch}_dq", node.branch, "attend_dq", queries, (q, *keys, *stats, dq_out), forward,
        (QUERY_MAJOR, PACK, RECOMPUTE),
    )  # fmt: skip
    return [fwd, dq, *(_dkv_kernel(node, i, s) for i, s in enumerate(sources))]


def _dkv_kernel(node: Attend, index: int, source: Source) -> Kernel:
    keys = (Operand("k", "k", "key", "load"), Operand("v", "v", "key", "load"))
    outs = (Operand("dk", "dk", "key", "accumulate"), Operand("dv", "dv", "key", "accumulate"))
    return Kernel(
        f"{node.branch}_dkv{suffixes(node.sources)[index]}",
        node.branch,
        "attend_dkv",
        Grid(source.axis, BN, "ascending"),
        (Operand("q", "q", "query", "load"), *keys, *_row_statistics(), *outs),
        tuple(Walk(0, p, source.axis, "reverse") for p in source.pieces),
        (KEY_MAJOR, PACK, RECOMPUTE),
    )


def _row_statistics() -> tuple[Operand, ...]:
    return (
        Operand("d_out", "d_out", "query", "load"),
        Operand("lse", "lse", "query", "load"),
        Operand("delta", "delta", "query", "load"),
        Operand("gates", "gates", "query", "load", optional=True),
    )


def _token_axis():
    from nsagen.ir.graph import KeyAxis

    return KeyAxis("T")


def _combine_kernels(combine: Combine | None, grad: CombineGrad) -> list[Kernel]:
    flat = Grid(None, BM, "ascending")
    one_pass = Choice("one_pass", "bound by memory: every term is read once, sums in float32")
    term, delta = Operand("term", "term", "query", "load"), Operand("delta", "delta", "query", "store")
    d_out, gates = Operand("d_out", "d_out", "query", "load"), Operand("gates", "gates", "query", "load")
    kernels = [Kernel("row_delta", "", "combine_bwd", flat, (d_out, term, delta), (), (one_pass,))]
    if combine is None:
        return kernels
    terms = tuple(replace(term, name=f"term{i}") for i in range(len(combine.terms)))
    deltas = tuple(replace(delta, name=f"delta{i}") for i in range(len(grad.deltas)))
    out, d_gates = Operand("out", "out", "query", "store"), Operand("d_gates", "d_gates", "query", "store")
    return [
        *kernels,
        Kernel("combine_fwd", "", "combine_fwd", flat, (*terms, gates, out), (), (one_pass,)),
        Kernel("combine_bwd", "", "combine_bwd", flat, (d_out, *terms, gates, *deltas, d_gates), (), (one_pass,)),
    ]


def _key_binds(sources: tuple[Source, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(
        bind for s, suffix in zip(sources, suffixes(sources), strict=True) for bind in (("k" + suffix, s.k), ("v" + suffix, s.v))
    )


def _fwd_launch(node: Attend) -> Launch:
    return Launch(f"{node.branch}_fwd", (("q", node.q), *_key_binds(node.sources), ("out", node.out), ("lse", node.lse)))


def _grad_launches(node: Attend, grad: AttendGrad, dq: str, gated: bool, add: bool) -> list[Launch]:
    rows = [("d_out", grad.d_out), ("lse", grad.lse), ("delta", grad.delta)]
    if gated and grad.gates:
        rows.append(("gates", grad.gates))
    column = grad.gate if gated else None
    launches = [
        Launch(f"{node.branch}_dq", (("q", node.q), *_key_binds(node.sources), *rows, ("dq", dq)), add, column)
    ]
    for s, suffix, dk, dv in zip(node.sources, suffixes(node.sources), grad.dk, grad.dv, strict=True):
        binds = (("q", node.q), ("k", s.k), ("v", s.v), *rows, ("dk", dk), ("dv", dv))
        launches.append(Launch(f"{node.branch}_dkv{suffix}", binds, False, column))
    return launches


def _part_ops(node: Attend, grad: AttendGrad) -> list[Op]:
    keys = tuple(x for s in node.sources for x in (s.k, s.v))
    inputs = (node.q, *keys)
    delta = Launch("row_delta", (("d_out", grad.d_out), ("term", node.out), ("delta", grad.delta)))
    gradients = tuple(x for pair in zip(grad.dk, grad.dv, strict=True) for x in pair)
    return [
        Op(f"{node.branch}_attention", "part", inputs, (node.out, node.lse), (_fwd_launch(node),)),
        Op(
            f"{node.branch}_attention_grad",
            "part_grad",
            (grad.d_out, *inputs, node.out, node.lse),
            (grad.dq, *gradients),
            (delta, *_grad_launches(node, grad, grad.dq, gated=False, add=False)),
        ),
    ]


def _whole_ops(
    graph: Graph, attends: list[Attend], grads: list[AttendGrad], combine: Combine, combine_grad: CombineGrad
) -> list[Op]:
    keys = tuple(dict.fromkeys(x for n in attends for s in n.sources for x in (s.k, s.v)))
    shared = [name for name, parts in graph.grads if name in keys and len(parts) > 1]
    if shared:
        raise Refused(f"two branches attend to the same tokens ({', '.join(shared)}): their gradients are not summed yet")
    inputs = ("q", *keys, combine.gates)
    saved = graph.saved
    terms = tuple((f"term{i}", t) for i, t in enumerate(combine.terms))
    joined = Launch("combine_fwd", (*terms, ("gates", combine.gates), ("out", combine.out)))
    deltas = tuple((f"delta{i}", d) for i, d in enumerate(combine_grad.deltas))
    d_gates = combine_grad.d_gates or ""
    split = Launch(
        "combine_bwd", (("d_out", "d_out"), *terms, ("gates", combine.gates), *deltas, ("d_gates", d_gates))
    )
    dq = grads[0].dq
    launches = [split]
    for i, (node, grad) in enumerate(zip(attends, grads, strict=True)):
        launches += _grad_launches(node, grad, dq, gated=True, add=i > 0)
    gradients = tuple(x for g in grads for pair in zip(g.dk, g.dv, strict=True) for x in pair)
    return [
        Op("attention", "whole", inputs, (combine.out, *saved), (*map(_fwd_launch, attends), joined)),
        Op("attention_grad", "whole_grad", ("d_out", *inputs, *saved), (dq, *gradients, d_gates), tuple(launches)),
    ]


def _buffers(graph: Graph) -> tuple[Buffer, ...]:
    outputs = {graph.output, *(x for n in graph.nodes if isinstance(n, AttendGrad) for x in (n.dq, *n.dk, *n.dv)), "d_gates"}
    inputs = {*graph.inputs, "d_out"}

    def kind(v: Value):
        if v.name in graph.saved:
            return "saved"
        return "output" if v.name in outputs else "input" if v.name in inputs else "workspace"

    return tuple(Buffer(v.name, v.axes, _shape(graph, v), v.dtype, kind(v)) for v in graph.values)


def _shape(graph: Graph, value: Value) -> tuple[Expr, ...]:
    h = graph.heads
    columns = next((len(n.terms) for n in graph.nodes if isinstance(n, Combine)), 1)
    sizes: dict[str, Expr] = {"B": BATCH, "T": TOKENS, "Hq": const(h.query), "Hkv": const(h.kv)}
    sizes |= {"Dqk": const(h.qk_dim), "Dv": const(h.v_dim), "C": const(columns)}
    for node in graph.nodes:
        if isinstance(node, Attend):
            sizes |= {s.axis.name: s.axis.length() for s in node.sources}
    return tuple(sizes[axis] for axis in value.axes)

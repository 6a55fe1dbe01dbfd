"""differentiate: graph -> graph with its backward."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from nsagen.ir.graph import (
    Attend,
    AttendGrad,
    Combine,
    CombineGrad,
    Graph,
    Node,
    Select,
    Value,
    chosen_ahead,
    writes,
)


@dataclass(frozen=True)
class Differentiate:
    """Append the gradient nodes of every Attend and Combine, in reverse, and say what forward must keep.

    Needs: each output of a node is read by at most one later node.
    before  out_w, lse_w = attend …; out = combine out_w …
    after   … ; deltas, shifts, d_gates = combine_grad d_out …; dq, dk, dv = attend_grad …; saved out_w, lse_w

    Scores are recomputed from lse, never kept (T × keys of them). φ's own gradient is torch's: it is a module.
    """

    name = "differentiate"

    def run(self, graph: Graph) -> Graph:
        values = {v.name: v for v in graph.values}
        values["d_out"] = replace(graph.value(graph.output), name="d_out")
        combine = next((n for n in graph.nodes if isinstance(n, Combine)), None)
        graph = replace(graph, nodes=tuple(_with_rest(n) if isinstance(n, Attend) else n for n in graph.nodes))
        attends = [n for n in graph.nodes if isinstance(n, Attend)]
        for node in attends:
            if node.rest:
                values[node.rest] = replace(values[node.out], name=node.rest)
        terms = combine.terms if combine else tuple(n.out for n in attends)
        by_out = {n.out: n for n in attends}
        deltas = tuple(f"delta_{by_out[term].branch}" for term in terms)
        for term, delta in zip(terms, deltas, strict=True):
            values[delta] = replace(values[by_out[term].lse], name=delta)
        rests = tuple(by_out[term].rest for term in terms)
        lses = tuple(by_out[term].lse for term in terms)
        shifts = tuple(f"shift_{by_out[term].branch}" for term in terms) if combine else ()
        for shift, lse in zip(shifts, lses, strict=False):
            values[shift] = replace(values[lse], name=shift)
        gates, d_gates = (combine.gates, "d_gates") if combine else (None, None)
        grad = CombineGrad(terms, rests, lses, gates, "d_out", deltas, shifts, d_gates)
        if combine:
            values["d_gates"] = replace(values[combine.gates], name="d_gates")
        users = Counter(x for n in attends for x in (n.q, *(x for s in n.sources for x in (s.k, s.v))))
        backward = [_attend_grad(n, f"shift_{n.branch}" if combine else n.lse, values, users) for n in attends]
        nodes: tuple[Node, ...] = (*graph.nodes, grad, *backward)
        ahead = chosen_ahead(graph)  # arguments of the attentions, which autograd keeps
        chosen = tuple(n.out for n in graph.nodes if isinstance(n, Select) and n not in ahead)
        saved = (*(x for n in attends for x in writes(n)), *chosen)
        grads = _grads(backward, combine)
        return replace(graph, values=tuple(values.values()), nodes=nodes, saved=saved, grads=grads)


def _with_rest(node: Attend) -> Attend:
    """A row of a pooled axis may average as many keys as the sequence has: there the rounding of out is kept."""
    pooled = any(not s.axis.is_tokens for s in node.sources)
    return replace(node, rest=f"rest_{node.branch}") if pooled else node


def _attend_grad(node: Attend, lse: str, values: dict[str, Value], users: Counter[str]) -> AttendGrad:
    def grad(name: str) -> str:
        out = f"d{name}" if users[name] == 1 else f"d{name}_{node.branch}"
        while out in values:  # two sources of one softmax over the same keys
            out += "_too"
        values[out] = replace(values[name], name=out)
        return out

    return AttendGrad(
        branch=node.branch,
        q=node.q,
        sources=node.sources,
        lse=lse,
        delta=f"delta_{node.branch}",
        d_out="d_out",
        dq=grad(node.q),
        dk=tuple(grad(s.k) for s in node.sources),
        dv=tuple(grad(s.v) for s in node.sources),
    )


def _grads(backward: list[AttendGrad], combine: Combine | None) -> tuple[tuple[str, tuple[str, ...]], ...]:
    terms: dict[str, list[str]] = {}
    for node in backward:
        terms.setdefault(node.q, []).append(node.dq)
        for source, dk, dv in zip(node.sources, node.dk, node.dv, strict=True):
            terms.setdefault(source.k, []).append(dk)
            terms.setdefault(source.v, []).append(dv)
    if combine:
        terms[combine.gates] = ["d_gates"]
    return tuple((name, tuple(parts)) for name, parts in terms.items())

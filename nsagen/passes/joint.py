"""dq of several branches in one kernel, and the listed keys that one of those branches takes over from another.

Where a warp copies keys, a tile of queries has its rows of q and d_out in shared memory and dq in registers: the keys
of the next branch can come by before they leave. And where a branch sees all the keys that every block list ends in,
of the same K and V, its products serve two softmaxes.
"""

from __future__ import annotations

from dataclasses import replace

from nsagen.ir.graph import Attend, Combine, Graph
from nsagen.ir.plan import BT, SPECIALISED, Choice, Grid, Kernel, Launch, Operand, Walk
from nsagen.passes.loop_order import specialised_by_blocks
from nsagen.passes.specialise import keys_are_wide, keys_may_specialise, keys_name, queries_may_specialise
from nsagen.passes.takeover import Takeover, takeover

JOINT = "joint_queries"
TOGETHER = Choice(
    "joint",
    "q and d_out are read once and dq is written once for all branches whose keys a warp can copy: four passes over "
    "all rows fewer for each branch but the first",
)


SHARED_PRODUCTS = "one product of q and k, and of d_out and v, serves the gradients of both"


def joined(graph: Graph) -> tuple[Attend, ...]:
    """The attentions whose dq one kernel computes, in their order; none where fewer than two have the form."""
    if not any(isinstance(n, Combine) for n in graph.nodes):
        return ()
    found = tuple(n for n in graph.nodes if isinstance(n, Attend) and queries_may_specialise(n, graph.heads))
    return found if len(found) > 1 else ()


def gradients_takeover(graph: Graph) -> Takeover | None:
    """Who takes listed keys over from whom in the gradients, if anyone does."""
    narrow = not keys_are_wide(graph.heads)
    takers = [n for n in joined(graph) if narrow and keys_may_specialise(n.sources[0], graph.heads)]
    givers = [n for n in graph.nodes if isinstance(n, Attend) and specialised_by_blocks(n, graph.heads)]
    return takeover(graph, givers, takers)


def joint_kernels(graph: Graph, kernels: list[Kernel]) -> list[Kernel]:
    """The kernels, of which one may take listed keys over, with the joint one."""
    nodes, over = joined(graph), gradients_takeover(graph)
    if over:
        keys, lists = keys_name(f"{over.taker.branch}_dkv"), f"{over.giver.branch}_grads"
        kernels = [_because(k, over) if k.name in (keys, lists) else k for k in kernels]
        kernels = [_taking(k, over, 0) if k.name == keys else k for k in kernels]
    if not nodes:
        return kernels
    single = {k.branch: k for k in kernels if k.body == "attend_queries"}
    own = [single[n.branch] for n in nodes]
    q, d_out, dq = (next(o for o in own[0].operands if o.name == name) for name in ("q", "d_out", "dq"))
    operands = [_numbered(o, i) for i, k in enumerate(own) for o in k.operands if o.role in ("k", "v", "lse", "delta")]
    walks: tuple[Walk, ...] = tuple(replace(w, source=i) for i, k in enumerate(own) for w in k.walks)
    order = "descending" if any(k.grid.order == "descending" for k in own) else "ascending"
    grid = Grid(own[0].grid.axis, BT, order)
    choices = (TOGETHER, *own[0].choices)
    kernel = Kernel(JOINT, "joint", "attend_queries", grid, (q, *operands, d_out, dq), walks, choices)
    return [*kernels, _taking(_because(kernel, over), over, nodes.index(over.taker)) if over else kernel]


def _numbered(operand: Operand, source: int) -> Operand:
    return replace(operand, name=f"{operand.name}{source}", source=source)


def _taking(kernel: Kernel, over: Takeover, source: int) -> Kernel:
    statistics = tuple(Operand(f"{x}_taken", x, "query", "load", optional=True) for x in ("lse", "delta"))
    return replace(kernel, operands=(*kernel.operands, *statistics), takes=replace(over.taken, source=source))


def _because(kernel: Kernel, over: Takeover) -> Kernel:
    return replace(kernel, choices=(*kernel.choices, over.choice(SHARED_PRODUCTS)))


def joint_launch(
    nodes: tuple[Attend, ...], over: Takeover | None, statistics: dict[str, tuple[str, str]], dq: str, accumulate: bool
) -> Launch:
    """statistics: a branch's shift of lse and its delta."""
    binds = [("q", nodes[0].q)]
    for i, node in enumerate(nodes):
        lse, delta = statistics[node.branch]
        binds += [(f"k{i}", node.sources[0].k), (f"v{i}", node.sources[0].v), (f"lse{i}", lse), (f"delta{i}", delta)]
    taken = taken_binds(over, statistics) if over else ()
    return Launch(JOINT, (*binds, *taken, ("d_out", "d_out"), ("dq", dq)), accumulate, when=(SPECIALISED,))


def taken_binds(over: Takeover, statistics: dict[str, tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    lse, delta = statistics[over.giver.branch]
    return (("lse_taken", lse), ("delta_taken", delta))

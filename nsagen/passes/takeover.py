"""The listed keys that one branch takes over from another, whose lists all end in them.

Every list of a selection ends in the query's own block and those before it. Where another branch sees these keys, too,
of the same K and V, one product of q and k serves both softmaxes. In the gradients, passes/joint.py says who does.

In the forward, the last branch walks those keys first: what it then has of a row is what the giver lacks. It completes
the giver's output and lse, which it reads anyway for the combination, and goes on to the rest of its own keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from nsagen.ir.graph import Attend, Combine, Graph, Select
from nsagen.ir.plan import PLAIN, SPECIALISED, Choice, Kernel, Launch, Operand, Taken
from nsagen.passes.loop_order import by_blocks
from nsagen.passes.specialise import GROUP_ROWS, QUERIES_KEYS, SHAPES, ahead, queries, walks_once
from nsagen.sym import KEY, QUERY, AtLeast


@dataclass(frozen=True)
class Takeover:
    """The branch `giver` leaves the last blocks of its lists to `taker`."""

    giver: Attend
    taker: Attend
    taken: Taken

    def choice(self, what: str) -> Choice:
        """what: the products and whom they serve."""
        size, count = self.taken.size, self.taken.count
        return Choice(
            "shared_products",
            f"{self.taker.branch} sees the last {count} blocks of {size} keys, which every list of {self.giver.branch} "
            f"names, of the same K and V: {what}",
        )


def takeover(graph: Graph, givers: Iterable[Attend], takers: Iterable[Attend]) -> Takeover | None:
    """The first giver that leaves keys to one of the takers."""
    of, to = tuple(givers), tuple(takers)
    for select in (n for n in graph.nodes if isinstance(n, Select) and n.local):
        for giver in of:
            listed = giver.sources[0].listed
            taker = next((n for n in to if _has_all(n, giver, select, graph.heads.group)), None)
            if taker is not None and listed is not None and listed.blocks == select.out and listed.size == select.size:
                return Takeover(giver, taker, Taken(0, select.size, select.local))
    return None


def _has_all(taker: Attend, giver: Attend, select: Select, group: int) -> bool:
    """Whether the taker sees the local blocks, of the same keys and values, in tiles without a mask but the last.

    Its conjuncts are convex in the distance of query and key, so the nearest and the farthest key speak for all.
    """
    own, other = taker.sources[0], giver.sources[0]
    if (own.k, own.v) != (other.k, other.v) or not own.axis.is_tokens:
        return False
    reach = select.size * select.local + QUERIES_KEYS + queries(group)
    ends = [{QUERY.name: reach, KEY.name: reach - distance} for distance in (0, reach)]
    return all(isinstance(c, AtLeast) and all(map(c.holds, ends)) for c in own.pieces[0].where)


def forward_takeover(graph: Graph) -> Takeover | None:
    """Of the whole op's forward: from a branch that goes query by query to the last one, on which it is combined.

    A tile's queries lie in one block, and whole tiles of keys fill it: the same are left and taken for all queries. The
    giver's rows are in registers by then.
    """
    combine = next((n for n in graph.nodes if isinstance(n, Combine)), None)
    attends = [n for n in graph.nodes if isinstance(n, Attend)]
    if combine is None or GROUP_ROWS % graph.heads.group:
        return None
    *others, last = attends
    givers = [n for n in others if n.out in combine.terms and not n.rest and len(n.sources) == 1]
    givers = [n for n in givers if n.sources[0].listed and by_blocks(n, graph.heads, backward=False) is None]
    over = takeover(graph, givers, [last] if walks_once(last) else [])
    steps = (queries(graph.heads.group), min(bn for bn, _ in SHAPES))
    fits = over is not None and over.taken.size <= ahead(graph.heads.v_dim, len(combine.terms) - 1)
    return over if over and fits and all(over.taken.size % step == 0 for step in steps) else None


def completing(graph: Graph, kernels: list[Kernel]) -> list[Kernel]:
    """The kernels, of which one may complete another branch's rows."""
    over = forward_takeover(graph)
    if over is None:
        return kernels
    giver, taker = (f"{n.branch}_fwd" for n in (over.giver, over.taker))
    because = over.choice("one product of q and k, and one of p and v, serves the outputs of both")
    kernels = [replace(k, choices=(*k.choices, because)) if k.name in (giver, taker) else k for k in kernels]
    rows = tuple(Operand(f"{x}_taken", x, "query", "update", optional=True) for x in ("out", "lse"))
    return [replace(k, operands=(*k.operands, *rows), takes=over.taken) if k.name == taker else k for k in kernels]


def in_both_forms(launches: list[Launch], over: Takeover | None) -> list[Launch]:
    """The forward's launches, those of giver and taker once as they are and once with keys left and taken."""
    if over is None:
        return launches
    return [form for launch in launches for form in _forms(launch, over)]


def _forms(launch: Launch, over: Takeover) -> tuple[Launch, ...]:
    giver, taker = (f"{n.branch}_fwd" for n in (over.giver, over.taker))
    if launch.kernel == giver:
        other = replace(launch, leaves=over.taken.count)
    elif launch.kernel == taker:
        rows = (("out_taken", over.giver.out), ("lse_taken", over.giver.lse))
        other = replace(launch, binds=(*launch.binds, *rows))
    else:
        return (launch,)
    return replace(launch, when=(PLAIN,)), replace(other, when=(SPECIALISED,))

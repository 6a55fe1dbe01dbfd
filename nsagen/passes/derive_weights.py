"""derive_weights: the overlap of compressed and selection blocks, as constants."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nsagen.errors import Refused
from nsagen.ir.graph import Graph, Select


@dataclass(frozen=True)
class DeriveWeights:
    """Set `weights` and `first` of every Select from l, d and l' (paper Eq. 9, both indices from one).

    Needs d | l and d | l'. Block j of l' tokens meets compressed blocks j·l'/d + first … with the same weights for
    every j: the tokens they share, over d.
    before  blocks = select q k_cmp (l 32, d 16, l' 64)
    after   … first −1 weights 1 2 2 2 1
    """

    name = "derive_weights"

    def run(self, graph: Graph) -> Graph:
        nodes = tuple(_weighted(n) if isinstance(n, Select) else n for n in graph.nodes)
        return replace(graph, nodes=nodes)


def _weighted(node: Select) -> Select:
    block, stride, size = node.axis.block, node.axis.stride, node.size
    if block % stride or size % stride:
        raise Refused(f"overlap weights need d | l and d | l': l {block}, d {stride}, l' {size}")
    first = 1 - block // stride
    starts = [i * stride for i in range(first, size // stride)]
    shared = [min(s + block, size) - max(s, 0) for s in starts]
    return replace(node, weights=tuple(x // stride for x in shared), first=first)

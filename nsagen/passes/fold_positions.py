"""fold_positions: what in-block positions add to a block, once instead of in every block."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nsagen.ir.graph import Graph, Pool

FIRST_STEP = {"weighted": "the weighted sum", "linear": "the linear map", "mlp": "its first layer"}


@dataclass(frozen=True)
class FoldPositions:
    """Turn positions that are added to every token of a block into one constant, wherever φ's first step is affine.

    A(x + e) = A(x) + A(e), and A(e) is the same for every block: per KV head one vector of D numbers (mlp: 2D, before
    the GELU). A block with its positions never exists in memory; gradients of e and of A's weights stay exact, since
    torch differentiates the constant, too.
    before  %k_cmp = pool mlp positions per token %k l 32 d 16
    after   %k_cmp = pool mlp positions constant %k l 32 d 16      because its first layer is affine
    """

    name = "fold_positions"

    def run(self, graph: Graph) -> Graph:
        return replace(graph, nodes=tuple(_folded(n) if isinstance(n, Pool) else n for n in graph.nodes))


def _folded(node: Pool) -> Pool:
    if node.positions != "per_token" or node.pool not in FIRST_STEP:
        return node
    reason = f"{FIRST_STEP[node.pool]} is affine in the tokens, so positions add the same constant to every block"
    return replace(node, positions="constant", because=reason)

"""The architecture in thirty lines: the passes, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nsagen.ir.graph import Graph
from nsagen.ir.plan import Plan
from nsagen.passes.choose_strategy import ChooseStrategy
from nsagen.passes.choose_tiles import ChooseTiles
from nsagen.passes.derive_bounds import DeriveBounds
from nsagen.passes.derive_weights import DeriveWeights
from nsagen.passes.differentiate import Differentiate
from nsagen.passes.fold_positions import FoldPositions
from nsagen.passes.place_accesses import PlaceAccesses
from nsagen.passes.split_loops import SplitLoops

Hook = Callable[[str, "Graph | Plan"], None]


@dataclass(frozen=True)
class Pipeline:
    fold_positions: FoldPositions = FoldPositions()  # in-block positions as one constant where φ is affine
    differentiate: Differentiate = Differentiate()  # the backward graph, and what forward keeps for it
    derive_weights: DeriveWeights = DeriveWeights()  # how compressed blocks score selection blocks
    choose_strategy: ChooseStrategy = ChooseStrategy()  # kernels, buffers and schedules
    derive_bounds: DeriveBounds = DeriveBounds()  # which keys (queries) a tile has to walk
    split_loops: SplitLoops = SplitLoops()  # where a mask is needed at all
    choose_tiles: ChooseTiles = ChooseTiles()  # what fits the chip, best first
    place_accesses: PlaceAccesses = PlaceAccesses()  # addresses, guards, index widths

    def run(self, graph: Graph, hook: Hook) -> Plan:
        """Lower a forward graph to a plan; `hook` sees every stage and verifies, prints or times it."""
        hook("lower", graph)
        for rewrite in (self.fold_positions, self.differentiate, self.derive_weights):
            graph = rewrite.run(graph)
            hook(rewrite.name, graph)
        plan = self.choose_strategy.run(graph)
        hook(self.choose_strategy.name, plan)
        for step in (self.derive_bounds, self.split_loops, self.choose_tiles, self.place_accesses):
            plan = step.run(plan)
            hook(step.name, plan)
        return plan

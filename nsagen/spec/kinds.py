"""The built-in kinds of branch: the options of compressed, selected and window, by the paper's names l, d, l', n, w."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from nsagen.spec.lower import lower_compressed, lower_selected, lower_window
from nsagen.spec.registry import BranchKind, Options, register
from nsagen.spec.rules import Problem, rule

Block = Annotated[int, Field(ge=1, le=4096)]


class Compressed(Options):
    """φ maps each block of l tokens, one every d tokens, to one key and one value."""

    block: Block = Field(32, description="l: tokens of a compression block")
    stride: Block = Field(16, description="d: tokens between block starts; divides l")
    pool: Literal["mean", "weighted", "linear", "mlp"] = Field("mlp", description="φ")
    positions: bool = Field(default=True, description="learned positions inside the block (mean has none)")

    @classmethod
    def filled(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**data, "positions": False} if data.get("pool") == "mean" and "positions" not in data else data

    @rule("stride", "block")
    def _stride_divides_block(self) -> Problem | None:
        if self.block % self.stride == 0:
            return None
        fitting = [d for d in range(1, self.block + 1) if self.block % d == 0][-6:]
        return Problem("divides", f"stride {self.stride} does not divide block {self.block} (d | l)",
                       f"use a stride of {_either(fitting)}, or another block")  # fmt: skip

    @rule("positions", "pool")
    def _mean_has_no_positions(self) -> Problem | None:
        if self.pool != "mean" or not self.positions:
            return None
        return Problem("positions", "positions true with pool mean: a mean of positions is a constant",
                       "remove positions, or use pool: mlp")  # fmt: skip


class Selected(Options):
    """The n best blocks of l' tokens, forced ones included."""

    block: Block = Field(64, description="l': tokens of a selection block")
    top_n: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="n: blocks a query attends to")
    initial: Annotated[int, Field(ge=0, le=1024)] = Field(1, description="first blocks that are always taken")
    local: Annotated[int, Field(ge=0, le=1024)] = Field(
        2, description="last blocks that are always taken, the query's own first"
    )
    scores: Literal["compressed", "pooled", "caller"] = Field(
        "compressed", alias="from", description="where the block scores come from"
    )

    @rule("top_n", "initial", "local")
    def _forced_blocks_fit(self) -> Problem | None:
        forced = self.initial + self.local
        if forced <= self.top_n:
            return None
        count = f"initial {self.initial} + local {self.local} = {forced} forced blocks"
        return Problem("forced", f"{count}, but top_n is {self.top_n} (initial + local <= n)",
                       f"forced blocks count in top_n: raise it to {forced} or more")  # fmt: skip


class Window(Options):
    """The last w tokens, the query's own included, and the first `sinks` tokens."""

    size: Annotated[int, Field(ge=1, le=2**20)] = Field(512, description="w: tokens of the window")
    sinks: Annotated[int, Field(ge=0, le=4096)] = Field(0, description="first tokens that every query sees")


def _either(values: list[int]) -> str:
    *head, last = map(str, values)
    return f"{', '.join(head)} or {last}" if head else last


register(BranchKind("compressed", Compressed, lower_compressed, "attention to compressed blocks (paper Eq. 7)"))
register(BranchKind("selected", Selected, lower_selected, "attention to the best blocks (paper Eq. 8–12)"))
register(BranchKind("window", Window, lower_window, "attention to the last tokens"))

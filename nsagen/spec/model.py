"""The schema of a spec: pydantic models, strict and frozen."""

from __future__ import annotations

import keyword
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny

from nsagen.errors import short
from nsagen.spec.registry import Options, kinds
from nsagen.spec.rules import Checked, Problem, rule

TAKEN = {"torch", "triton", "nsagen"}
NAME_HINT = "choose another; it becomes a module's name"
Dim = Annotated[int, Field(ge=16, le=256, multiple_of=8)]
Count = Annotated[int, Field(ge=1, le=1024)]
MAX_GROUP = 64
LONGEST = 1 << 24


class Heads(Checked):
    """Query heads share KV heads in groups: head h reads KV head h // group."""

    query: Count = Field(description="query heads")
    kv: Count = Field(description="KV heads; divides query")
    qk_dim: Dim = Field(description="dim of q and k, 16–256 in steps of 8")
    v_dim: Dim = Field(description="dim of v; qk_dim where it is not given")

    @classmethod
    def filled(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"v_dim": data.get("qk_dim", 16), **data}  # without either, only qk_dim is missing

    @rule("kv", "query")
    def _groups(self) -> Problem | None:
        if self.query % self.kv:
            return Problem("group", f"kv {self.kv} does not divide query {self.query} (kv | query)",
                           "every KV head serves the same number of query heads")  # fmt: skip
        if self.group > MAX_GROUP:
            group = f"a group of {self.group} query heads (query {self.query} / kv {self.kv})"
            fitting = next(n for n in range(-(-self.query // MAX_GROUP), self.query + 1) if self.query % n == 0)
            return Problem("group", f"{group} passes {MAX_GROUP}", f"use {fitting} KV heads or more")
        return None

    @property
    def group(self) -> int:
        return self.query // self.kv


class Spec(Checked):
    """A variant of sparse attention."""

    name: str = Field(description="becomes the module's name", pattern=r"^[a-z][a-z0-9_]{0,62}$")
    heads: Heads = Field(description="query heads, the KV heads that they share, and their dims")
    kv: Literal["per_branch", "shared"] = Field("shared", description="own K/V for each branch, or one pair")
    branches: dict[str, SerializeAsAny[Options]] = Field(
        min_length=1, description="one or more, in the order of the gates"
    )
    combine: Literal["gated_sum", "one_softmax", "single"] = Field(description="how the branches become one output")

    dense_below: Annotated[int, Field(ge=0, le=LONGEST)] = Field(
        0, description="shorter sequences attend densely; the default of the call"
    )

    @classmethod
    def filled(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"combine": "single" if _one(data.get("branches")) else "gated_sum", **data}

    @rule("name")
    def _name_is_free(self) -> Problem | None:
        if keyword.iskeyword(self.name) or keyword.issoftkeyword(self.name):
            return Problem("name", f"name {self.name!r} is a Python keyword", NAME_HINT)
        if self.name in sys.stdlib_module_names or self.name in TAKEN:
            return Problem("name", f"name {self.name!r} would hide the module {self.name}", NAME_HINT)
        return None

    @rule("combine", "branches")
    def _single_has_one_branch(self) -> Problem | None:
        if self.combine != "single" or len(self.branches) <= 1:
            return None
        names = short(", ".join(self.branches), 80)
        count = f"{len(self.branches)} branches ({names})"
        return Problem(
            "single", f"combine single with {count}", "single takes one branch: use gated_sum or one_softmax"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dict: the YAML's keys with the defaults filled in."""
        return self.model_dump(by_alias=True)


def branch_kinds() -> dict[str, type[Options]]:
    return {name: kind.options for name, kind in kinds().items()}


def _one(branches: Any) -> bool:
    return isinstance(branches, Mapping) and len(branches) == 1

"""The schema of a spec: pydantic models, strict and frozen."""

from __future__ import annotations

import keyword
import sys
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from nsagen.spec.registry import Options, kinds
from nsagen.spec.rules import Checked, Problem

TAKEN = {"torch", "triton", "nsagen"}
NAME_HINT = "choose another; it becomes a module's name"
Dim = Annotated[int, Field(ge=16, le=256, multiple_of=8)]
Count = Annotated[int, Field(ge=1, le=1024)]
MAX_GROUP = 64


class Heads(Checked):
    """Query heads share KV heads in groups: head h reads KV head h // group."""

    query: Count = Field(description="query heads")
    kv: Count = Field(description="KV heads; divides query")
    qk_dim: Dim = Field(description="dim of q and k, 16–256 in steps of 8")
    v_dim: Dim = Field(description="dim of v; qk_dim where it is not given")

    @model_validator(mode="before")
    @classmethod
    def _same_dims(cls, data: Any) -> Any:
        if isinstance(data, dict) and "v_dim" not in data and "qk_dim" in data:
            return {**data, "v_dim": data["qk_dim"]}
        return data

    def rules(self) -> Iterable[Problem]:
        if self.query % self.kv:
            yield Problem("kv", "group", f"kv {self.kv} does not divide query {self.query} (kv | query)",
                          "every KV head serves the same number of query heads", ("query",))  # fmt: skip
        elif self.group > MAX_GROUP:
            group = f"a group of {self.group} query heads (query {self.query} / kv {self.kv})"
            yield Problem("kv", "group", f"{group} passes {MAX_GROUP}",
                          f"use at least {-(-self.query // MAX_GROUP)} KV heads", ("query",))  # fmt: skip

    @property
    def group(self) -> int:
        return self.query // self.kv


class Spec(Checked):
    """A variant of sparse attention."""

    name: str = Field(description="becomes the module's name", pattern=r"^[a-z][a-z0-9_]{0,62}$")
    heads: Heads
    kv: Literal["per_branch", "shared"] = Field("shared", description="own K/V for each branch, or one pair")
    branches: dict[str, SerializeAsAny[Options]] = Field(min_length=1, description="one or more, in the order of the gates")
    combine: Literal["gated_sum", "one_softmax", "single"] = Field(description="how the branches become one output")

    @model_validator(mode="before")
    @classmethod
    def _default_combine(cls, data: Any) -> Any:
        if isinstance(data, dict) and "combine" not in data and isinstance(data.get("branches"), dict):
            return {**data, "combine": "single" if len(data["branches"]) == 1 else "gated_sum"}
        return data

    def rules(self) -> Iterable[Problem]:
        if keyword.iskeyword(self.name) or keyword.issoftkeyword(self.name):
            yield Problem("name", "name", f"name {self.name!r} is a Python keyword", NAME_HINT)
        elif self.name in sys.stdlib_module_names or self.name in TAKEN:
            yield Problem("name", "name", f"name {self.name!r} would hide the module {self.name}", NAME_HINT)
        if self.combine == "single" and len(self.branches) != 1:
            count = f"{len(self.branches)} branches ({', '.join(self.branches)})"
            yield Problem("combine", "single", f"combine single with {count}",
                          "single takes one branch: use gated_sum or one_softmax")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain dict: the YAML's keys with the defaults filled in."""
        return self.model_dump(by_alias=True)


def branch_kinds() -> dict[str, type[Options]]:
    return {name: kind.options for name, kind in kinds().items()}

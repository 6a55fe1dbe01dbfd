"""Models that list every rule they break, each with the fields it stands between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Problem:
    """A rule that does not hold: its id, a message with the values at odds, and the way out."""

    rule: str
    message: str
    hint: str


class Broken(NamedTuple):
    """A problem and the keys it speaks of; the caret goes to the first of them that the spec gives."""

    keys: tuple[str, ...]
    problem: Problem


FIELDS = "nsagen_fields"
Rule = Callable[[Any], "Problem | None"]


def rule(*fields: str) -> Callable[[Rule], Rule]:
    """Marks a method of a Checked model as a rule between these fields; it runs where each of them holds by itself."""

    def mark(method: Rule) -> Rule:
        setattr(method, FIELDS, fields)
        return method

    return mark


class Checked(BaseModel):
    """Base of every model of a spec: strict types, no unknown keys, immutable, rules between fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @classmethod
    def filled(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The keys with the defaults that depend on other keys."""
        return data

    def broken(self, failed: AbstractSet[str] = frozenset()) -> tuple[Broken, ...]:
        """Every rule that these values break, but for those that speak of a failed or absent field."""
        members = {name: member for base in reversed(type(self).__mro__) for name, member in vars(base).items()}
        rules = [m for m in members.values() if isinstance(m, FunctionType) and hasattr(m, FIELDS)]
        holding = vars(self).keys() - failed
        open_ = [m for m in rules if holding >= {*getattr(m, FIELDS)}]
        return tuple(Broken(self._keys(getattr(m, FIELDS)), problem) for m in open_ if (problem := m(self)))

    @classmethod
    def _keys(cls, fields: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(cls.model_fields[f].alias or f for f in fields)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        return cls.filled(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _hold(self):
        broken = self.broken()
        if broken:
            raise PydanticCustomError("nsagen_rules", "{text}", {"text": broken[0].problem.message, "broken": broken})
        return self

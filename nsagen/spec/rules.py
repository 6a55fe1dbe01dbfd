"""Models that list every rule they break, each with the field it stands at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Problem:
    """A rule between fields that does not hold; `field` is where the caret goes."""

    field: str
    rule: str
    message: str
    hint: str
    involves: tuple[str, ...] = ()  # the other fields whose values the message speaks of


class Checked(BaseModel):
    """Base of every model of a spec: strict types, no unknown keys, immutable, rules between fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)

    def rules(self) -> Iterable[Problem]:
        """Every rule between fields that these values break."""
        return ()

    @model_validator(mode="after")
    def _hold(self):
        problems = tuple(self.rules())
        if problems:
            raise PydanticCustomError("nsagen_rules", "{text}", {"text": problems[0].message, "problems": problems})
        return self

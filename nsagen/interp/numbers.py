"""Numbers for expressions, thousands of times: `sym.evaluate` with the text of an expression made only once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import CodeType

from nsagen.sym import Expr, to_text


def evaluate(x: Expr, env: Mapping[str, int]) -> int:
    """The value of x with its symbols bound by `env`."""
    return int(eval(_code(x), {"max": max, "min": min}, env))  # text of ours alone, never user input


@lru_cache(maxsize=4096)
def _code(x: Expr) -> CodeType:
    return compile(to_text(x), "<expr>", "eval")

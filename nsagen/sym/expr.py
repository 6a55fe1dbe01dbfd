"""Integer expressions of the IR: sympy trees, plus a floor division that stays integral.

Everything is an integer. `FloorDiv` rounds towards minus infinity, as Python does; Triton's `//` on scalars
truncates, so bounds are built with numerators clamped at zero (see bounds.py), where both agree.
"""

from __future__ import annotations

from functools import lru_cache
from types import CodeType

import sympy as sp

Expr = sp.Expr
Symbol = sp.Symbol


def symbol(name: str) -> Symbol:
    return sp.Symbol(name, integer=True)


def count(name: str) -> Symbol:
    """A symbol that is never negative: lengths, tile sizes, tile starts."""
    return sp.Symbol(name, integer=True, nonnegative=True)


def const(value: int) -> Expr:
    return sp.Integer(value)


class FloorDiv(sp.Function):
    """FloorDiv(a, b) = ⌊a / b⌋."""

    nargs = 2

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if as_int(a) == 0 or as_int(b) == 1:
            return a
        if a.is_Integer and b.is_Integer:
            return sp.Integer(int(a) // int(b))
        return None


class Given(sp.Function):
    """Given(c, x) = x where c >= 0, else 0: a bound that only holds for some tiles."""

    nargs = 2

    @classmethod
    def eval(cls, c: Expr, x: Expr) -> Expr | None:
        if c.is_Integer:
            return x if int(c) >= 0 else sp.Integer(0)
        return None


def floordiv(a: Expr, b: Expr | int) -> Expr:
    return FloorDiv(a, sp.sympify(b))


def down(x: Expr, step: Expr) -> Expr:
    """The largest multiple of `step` not above x."""
    return floordiv(x, step) * step


def up(x: Expr, step: Expr) -> Expr:
    """The smallest multiple of `step` not below x."""
    return floordiv(x + step - 1, step) * step


def maximum(*xs: Expr | int) -> Expr:
    return sp.Max(*xs)


def minimum(*xs: Expr | int) -> Expr:
    return sp.Min(*xs)


def terms_of_max(x: Expr) -> tuple[Expr, ...]:
    return tuple(_sorted(x.args)) if isinstance(x, sp.Max) else (x,)


def terms_of_min(x: Expr) -> tuple[Expr, ...]:
    return tuple(_sorted(x.args)) if isinstance(x, sp.Min) else (x,)


def substitute(x: Expr, values: dict[Symbol, Expr]) -> Expr:
    return x.xreplace(values)


def symbols_of(x: Expr) -> frozenset[str]:
    return frozenset(s.name for s in x.free_symbols)


def linear_coefficient(x: Expr, var: Symbol) -> int | None:
    """The integer a of x = a·var + rest, or None where x is not linear in var with a constant coefficient."""
    coefficient = sp.expand(x).coeff(var, 1)
    rest = sp.expand(x - coefficient * var)
    if not coefficient.is_Integer or var in rest.free_symbols:
        return None
    return int(coefficient)


def expand(x: Expr) -> Expr:
    return sp.expand(x)


def as_int(x: Expr) -> int | None:
    return int(x) if x.is_Integer else None


def _sorted(xs: tuple[Expr, ...] | frozenset[Expr]) -> list[Expr]:
    return sorted(xs, key=lambda e: (not e.is_Integer, to_text(e)))


def to_text(x: Expr) -> str:
    """Python text of x (also valid in Triton): `max(0, t0 + BT - 512)`. Positive terms first, products unbroken."""
    return _Printer().show(x, 0)


def evaluate(x: Expr, env: dict[str, int]) -> int:
    """The value of x with its symbols bound by `env`."""
    return int(eval(_code(x), {"max": max, "min": min}, env))  # text of ours alone, never user input


@lru_cache(maxsize=4096)
def _code(x: Expr) -> CodeType:
    return compile(to_text(x), "<expr>", "eval")


class _Printer:
    """Recursive printer; `level` is the binding strength around: 0 none, 1 sum, 2 product."""

    def show(self, x: Expr, level: int) -> str:
        if x.is_Integer:
            return f"({x})" if int(x) < 0 and level else str(x)
        if isinstance(x, sp.Symbol):
            return x.name
        if isinstance(x, (sp.Max, sp.Min)):
            inner = ", ".join(self.show(a, 0) for a in _sorted(x.args))
            return f"{'max' if isinstance(x, sp.Max) else 'min'}({inner})"
        if isinstance(x, FloorDiv):
            return self._wrap(f"{self.show(x.args[0], 2)} // {self.show(x.args[1], 2)}", level >= 2)
        if isinstance(x, Given):
            return f"({self.show(x.args[1], 1)} if {self.show(x.args[0], 0)} >= 0 else 0)"
        if isinstance(x, sp.Mul):
            return self._wrap(self._product(x), level >= 2)
        if isinstance(x, sp.Add):
            return self._wrap(self._sum(x), level >= 1)
        raise TypeError(f"no text for {type(x).__name__}: {x}")

    def _product(self, x: Expr) -> str:
        factors = sorted(x.args, key=lambda e: (not isinstance(e, FloorDiv), not e.is_Integer, str(e)))
        return " * ".join(self.show(f, 2 if i or not isinstance(f, FloorDiv) else 1) for i, f in enumerate(factors))

    def _sum(self, x: Expr) -> str:
        signed = sorted((_split_sign(a) for a in x.args), key=lambda p: (p[0] < 0, p[1].is_Integer, to_text(p[1])))
        first_sign, first = signed[0]
        text = ("-" if first_sign < 0 else "") + self.show(first, 1 if first_sign > 0 else 2)
        for sign, term in signed[1:]:
            text += (" + " if sign > 0 else " - ") + self.show(term, 1 if sign > 0 else 2)
        return text

    @staticmethod
    def _wrap(text: str, needed: bool) -> str:
        return f"({text})" if needed else text


def _split_sign(x: Expr) -> tuple[int, Expr]:
    coefficient, _ = x.as_coeff_Mul()
    return (-1, -x) if coefficient.is_negative else (1, x)

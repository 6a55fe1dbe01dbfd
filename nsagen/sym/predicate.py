"""What a query may see: conjunctions of linear inequalities and congruences over (query t, key s)."""

from __future__ import annotations

from dataclasses import dataclass

from nsagen.sym.expr import Expr, Symbol, as_int, const, evaluate, expand, symbol, to_text

QUERY: Symbol = symbol("t")  # position of the query in its sequence
KEY: Symbol = symbol("s")  # index of the key on its axis (a token, or a compressed block)


@dataclass(frozen=True)
class AtLeast:
    """expr >= 0, linear in t and s."""

    expr: Expr

    def holds(self, env: dict[str, int]) -> bool:
        return evaluate(self.expr, env) >= 0


@dataclass(frozen=True)
class Multiple:
    """expr ≡ 0 (mod modulus): a stride through the keys. No tile can be proved free of it unless modulus is 1."""

    expr: Expr
    modulus: int

    def holds(self, env: dict[str, int]) -> bool:
        return evaluate(self.expr, env) % self.modulus == 0


Conjunct = AtLeast | Multiple


def _e(x: Expr | int) -> Expr:
    return const(x) if isinstance(x, int) else x


def le(a: Expr | int, b: Expr | int) -> AtLeast:
    """a <= b"""
    return AtLeast(expand(_e(b) - _e(a)))


def lt(a: Expr | int, b: Expr | int) -> AtLeast:
    """a < b"""
    return AtLeast(expand(_e(b) - _e(a) - 1))


def multiple(a: Expr, modulus: int) -> Multiple:
    return Multiple(expand(a), modulus)


def moves_along(c: Conjunct, stride: int) -> bool:
    """Whether it says the same of a key one further and a query `stride` tokens later: of their distance alone."""
    return int(c.expr.coeff(KEY, 1)) + stride * int(c.expr.coeff(QUERY, 1)) == 0


def conjunct_text(c: Conjunct) -> str:
    """`s <= t`, `s > t - 512`: solved for s where its coefficient is ±1, so that it reads like the paper."""
    if isinstance(c, Multiple):
        return f"({to_text(c.expr)}) % {c.modulus} == 0"
    coefficient = int(c.expr.coeff(KEY, 1))
    if coefficient == 0 and int(c.expr.coeff(QUERY, 1)) == -1:
        return f"t < {to_text(expand(c.expr + QUERY + 1))}"
    if coefficient == -1:
        return _upper(expand(c.expr + KEY))
    if coefficient == 1:
        return f"s > {to_text(expand(KEY - c.expr - 1))}"
    if coefficient < 0:
        return f"{to_text(-coefficient * KEY)} <= {to_text(expand(c.expr - coefficient * KEY))}"
    return f"{to_text(c.expr)} >= 0"


def _upper(bound: Expr) -> str:
    """s <= bound; a bound that ends in −1 reads as a strict one."""
    constant, _ = bound.as_coeff_Add()
    return f"s < {to_text(bound + 1)}" if as_int(constant) == -1 else f"s <= {to_text(bound)}"

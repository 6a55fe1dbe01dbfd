"""Layer 1 by brute force: text of expressions, predicates, ranges of tiles, and what is proved on a segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nsagen.errors import Refused
from nsagen.ir.graph import Heads, KeyAxis, Piece
from nsagen.ir.plan import BM, BN, BT, S0, T0, Choice, Grid, Kernel, N, Plan, Segment, Walk
from nsagen.passes.derive_bounds import DeriveBounds, walk_tile
from nsagen.passes.split_loops import SplitLoops
from nsagen.sym import (
    KEY,
    QUERY,
    AtLeast,
    Conjunct,
    Expr,
    Facts,
    Interval,
    Multiple,
    Symbol,
    Tile,
    above,
    all_range,
    as_int,
    below,
    conjunct_text,
    const,
    count,
    down,
    evaluate,
    expand,
    floordiv,
    le,
    lt,
    maximum,
    minimum,
    multiple,
    some_range,
    substitute,
    symbol,
    symbols_of,
    terms_of_max,
    terms_of_min,
    to_text,
    up,
)

# --- expressions

X, Y, Z = symbol("x"), symbol("y"), count("z")  # z is never negative
STEP = count("m")  # a divisor: at least 1
ENVS = st.fixed_dictionaries(
    {"x": st.integers(-9, 9), "y": st.integers(-9, 9), "z": st.integers(0, 9), "m": st.integers(1, 5)}
)
Number = Callable[[dict[str, int]], int]
Both = tuple[Expr, Number]  # an expression, and what it means, in plain Python


def leaves() -> st.SearchStrategy[Both]:
    symbols = st.sampled_from([X, Y, Z, STEP]).map(lambda s: (s, lambda env: env[s.name]))
    return symbols | st.integers(-6, 6).map(lambda c: (const(c), lambda env: c))


def binary(a: Both, b: Both, how: str) -> Both:
    (x, f), (y, g) = a, b
    if how == "+":
        return x + y, lambda env: f(env) + g(env)
    if how == "-":
        return x - y, lambda env: f(env) - g(env)
    if how == "max":
        return maximum(x, y), lambda env: max(f(env), g(env))
    return minimum(x, y), lambda env: min(f(env), g(env))


def scaled(a: Both, by: int | Symbol, how: str) -> Both:
    """Division, rounding and multiplication by a positive constant or by m."""
    (x, f), y = a, const(by) if isinstance(by, int) else by

    def d(env: dict[str, int]) -> int:
        return by if isinstance(by, int) else env["m"]

    if how == "*":
        return x * y, lambda env: f(env) * d(env)
    if how == "//":
        return floordiv(x, y), lambda env: f(env) // d(env)
    if how == "down":
        return down(x, y), lambda env: f(env) - f(env) % d(env)
    return up(x, y), lambda env: f(env) + -f(env) % d(env)


def negated(a: Both) -> Both:
    return -a[0], lambda env: -a[1](env)


def grown(inner: st.SearchStrategy[Both]) -> st.SearchStrategy[Both]:
    sums = st.builds(binary, inner, inner, st.sampled_from(["+", "-", "max", "min"]))
    constants = st.builds(scaled, inner, st.integers(1, 5), st.sampled_from(["*", "//", "down", "up"]))
    symbolic = inner.filter(lambda a: "m" not in symbols_of(a[0]))  # no powers: the IR has none, nor has to_text
    steps = st.builds(scaled, symbolic, st.just(STEP), st.sampled_from(["*", "//", "down", "up"]))
    return sums | constants | steps | st.builds(negated, inner)


EXPRESSIONS = st.recursive(leaves(), grown, max_leaves=6)


@settings(max_examples=250)
@given(EXPRESSIONS, ENVS)
def test_text_substitution_and_meaning_agree(both: Both, env: dict[str, int]) -> None:
    x, meaning = both
    substituted = substitute(x, {s: const(env[s.name]) for s in (X, Y, Z, STEP)})
    assert as_int(substituted) == meaning(env)
    assert evaluate(x, env) == meaning(env), to_text(x)


@settings(max_examples=60)
@given(EXPRESSIONS, ENVS)
def test_expanding_changes_no_value(both: Both, env: dict[str, int]) -> None:
    assert evaluate(expand(both[0]), env) == both[1](env)


@settings(max_examples=60)
@given(EXPRESSIONS, EXPRESSIONS, ENVS)
def test_terms_make_the_maximum_and_the_minimum(a: Both, b: Both, env: dict[str, int]) -> None:
    high, low = maximum(0, a[0], b[0]), minimum(a[0], b[0], 3)
    assert max(evaluate(x, env) for x in terms_of_max(high)) == max(0, a[1](env), b[1](env))
    assert min(evaluate(x, env) for x in terms_of_min(low)) == min(a[1](env), b[1](env), 3)


@settings(max_examples=60)
@given(EXPRESSIONS)
def test_text_speaks_of_the_symbols_and_does_not_depend_on_order(both: Both) -> None:
    names = set(compile(to_text(both[0]), "", "eval").co_names)
    assert names - {"max", "min"} == set(symbols_of(both[0]))
    assert to_text(Y + both[0] + X) == to_text(X + both[0] + Y)


def test_text_reads_like_python() -> None:
    assert to_text(maximum(0, T0 + BT - 512)) == "max(0, BT + t0 - 512)"
    assert to_text(down(X - 1, STEP)) == "(x - 1) // m * m"
    assert to_text(floordiv(X, const(4)) - Y) == "x // 4 - y"


def test_what_has_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match="no text for Pow"):
        to_text(X * X)


def test_division_rounds_down_and_folds_constants() -> None:
    assert as_int(floordiv(const(-7), 2)) == -4
    assert as_int(down(const(7), const(4))) == 4
    assert as_int(up(const(7), const(4))) == 8
    assert as_int(up(const(8), const(4))) == 8
    assert floordiv(X, 1) == X


# --- predicates

COEFFICIENTS = st.integers(-5, 5)
Line = tuple[int, int, int]  # a·t + b·s + c >= 0


def linear(a: int, b: int, c: int) -> Expr:
    return expand(a * QUERY + b * KEY + const(c))


LINES = st.tuples(COEFFICIENTS, COEFFICIENTS, st.integers(-12, 12)).filter(lambda x: x[:2] != (0, 0))
POINTS = st.tuples(st.integers(0, 15), st.integers(0, 15))


@given(LINES, LINES, POINTS)
def test_le_and_lt_mean_what_they_say(p: Line, q: Line, at: tuple[int, int]) -> None:
    env = {"t": at[0], "s": at[1]}
    left, right = (x[0] * at[0] + x[1] * at[1] + x[2] for x in (p, q))
    assert le(linear(*p), linear(*q)).holds(env) == (left <= right)
    assert lt(linear(*p), linear(*q)).holds(env) == (left < right)


@given(LINES, st.integers(1, 6), POINTS)
def test_multiple_means_a_congruence(p: Line, modulus: int, at: tuple[int, int]) -> None:
    value = p[0] * at[0] + p[1] * at[1] + p[2]
    assert multiple(linear(*p), modulus).holds({"t": at[0], "s": at[1]}) == (value % modulus == 0)


def conjuncts() -> st.SearchStrategy[Conjunct]:
    lines = LINES.map(lambda p: AtLeast(linear(*p)))
    usual = st.sampled_from(
        [le(KEY, QUERY), lt(QUERY - 5, KEY), lt(KEY, 3), le(KEY, QUERY - 4), le(3 * KEY + 3, QUERY), le(2, KEY)]
    )
    return lines | usual


def congruences(least: int = 1) -> st.SearchStrategy[Conjunct]:
    return st.builds(lambda p, m: multiple(linear(*p), m), LINES, st.integers(least, 4))


@given(conjuncts() | congruences(), POINTS)
def test_the_text_of_a_conjunct_holds_where_it_does(c: Conjunct, at: tuple[int, int]) -> None:
    env = {"t": at[0], "s": at[1]}
    assert bool(eval(conjunct_text(c), {}, dict(env))) == c.holds(env), conjunct_text(c)


def test_the_text_of_a_conjunct_reads_like_the_paper() -> None:
    assert conjunct_text(le(KEY, QUERY)) == "s <= t"
    assert conjunct_text(lt(QUERY - 512, KEY)) == "s > t - 512"
    assert conjunct_text(lt(KEY, 3)) == "s <= 2"
    assert conjunct_text(le(16 * KEY + 31, QUERY)) == "16 * s <= t - 31"
    assert conjunct_text(multiple(QUERY - KEY, 3)) == "(t - s) % 3 == 0"


# --- ranges

Where = tuple[Conjunct, ...]
FIRST, SIZE = count("first"), count("size")  # the tile holds first … first + size − 1


@cache
def compiled_test(c: Conjunct) -> Callable[[dict[str, int]], bool]:
    """c as a function, compiled once."""
    code = compile(to_text(c.expr), "<conjunct>", "eval")
    if isinstance(c, Multiple):
        return lambda env: eval(code, {"max": max, "min": min}, env) % c.modulus == 0
    return lambda env: eval(code, {"max": max, "min": min}, env) >= 0


def seen(where: Where, env: dict[str, int]) -> bool:
    return all(compiled_test(c)(env) for c in where)


def tile_of(loop: Symbol) -> Tile:
    return Tile(KEY if loop == QUERY else QUERY, FIRST, FIRST + SIZE - 1)


def rows(where: Where, loop: Symbol, at: int, first: int, size: int) -> Iterator[bool]:
    """Whether each row of the tile satisfies every conjunct at loop index `at`."""
    tile = tile_of(loop).var
    return (seen(where, {loop.name: at, tile.name: x}) for x in range(first, first + size))


def ends(interval: Interval, first: int, size: int, length: int) -> range:
    env = {"first": first, "size": size, "N": length}
    return range(evaluate(interval.lo, env), evaluate(interval.hi, env))


DOMAINS = st.lists(conjuncts(), min_size=1, max_size=4).map(tuple)
THINNED = st.tuples(DOMAINS, congruences()).map(lambda x: (*x[0], x[1]))
LOOPS = st.sampled_from([KEY, QUERY])
TILES = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5), st.integers(0, 14)), min_size=1, max_size=6)


@settings(max_examples=120)
@given(DOMAINS | THINNED, LOOPS, TILES)
def test_some_holds_every_index_that_a_row_sees(where: Where, loop: Symbol, tiles: list[tuple[int, int, int]]) -> None:
    some = some_range(where, loop, tile_of(loop), N)
    for first, size, length in tiles:
        walked = ends(some, first, size, length)
        exact = {x for x in range(length) if any(rows(where, loop, x, first, size))}
        assert exact <= set(walked), (to_text(some.lo), to_text(some.hi))
        assert set(walked) <= set(range(length)), "within [0, length)"


@settings(max_examples=120)
@given(DOMAINS, LOOPS, TILES)
def test_all_holds_only_what_every_row_sees(where: Where, loop: Symbol, tiles: list[tuple[int, int, int]]) -> None:
    every = all_range(where, loop, tile_of(loop), N)
    for first, size, length in tiles:
        exact = {x for x in range(length) if all(rows(where, loop, x, first, size))}
        assert set(ends(every, first, size, length)) <= exact, (to_text(every.lo), to_text(every.hi))


@settings(max_examples=120)
@given(conjuncts(), LOOPS, TILES)
def test_one_conjunct_has_exact_ranges(c: Conjunct, loop: Symbol, tiles: list[tuple[int, int, int]]) -> None:
    some, every = (f((c,), loop, tile_of(loop), N) for f in (some_range, all_range))
    for first, size, length in tiles:
        holds = [list(rows((c,), loop, x, first, size)) for x in range(length)]
        assert set(ends(some, first, size, length)) == {x for x in range(length) if any(holds[x])}
        assert set(ends(every, first, size, length)) == {x for x in range(length) if all(holds[x])}


@settings(max_examples=60)
@given(DOMAINS, LOOPS, TILES)
def test_bounds_divide_no_negative_number(where: Where, loop: Symbol, tiles: list[tuple[int, int, int]]) -> None:
    """Triton's // truncates: it agrees with ours where the numerator is not negative."""
    for interval in (some_range(where, loop, tile_of(loop), N), all_range(where, loop, tile_of(loop), N)):
        numerators = [f.args[0] for x in (interval.lo, interval.hi) for f in divisions(x)]
        for first, size, length in tiles:
            env = {"first": first, "size": size, "N": length}
            assert all(evaluate(x, env) >= 0 for x in numerators)


def divisions(x: Expr) -> list[Any]:
    inner = [f for a in x.args for f in divisions(a)]
    return [x, *inner] if type(x).__name__ == "FloorDiv" else inner


@given(DOMAINS, congruences(least=2), LOOPS)
def test_no_tile_is_free_of_a_congruence(where: Where, c: Conjunct, loop: Symbol) -> None:
    with pytest.raises(Refused, match=f"congruence modulo {c.modulus}"):
        all_range((*where, c), loop, tile_of(loop), N)


@given(DOMAINS, LOOPS)
def test_a_congruence_modulo_one_says_nothing(where: Where, loop: Symbol) -> None:
    tile = tile_of(loop)
    assert all_range((*where, multiple(KEY - QUERY, 1)), loop, tile, N) == all_range(where, loop, tile, N)


def test_what_is_not_linear_is_refused() -> None:
    with pytest.raises(Refused, match="is not linear in"):
        some_range((AtLeast(floordiv(QUERY, 2) - KEY),), KEY, tile_of(KEY), N)


# --- proofs

AXES = st.sampled_from([KeyAxis("T"), KeyAxis("T"), KeyAxis("pooled", 4, 2), KeyAxis("pooled", 3, 3)])
SIZES = st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 3, 4, 8]))
HEADS = Heads(2, 1, 16, 16)
LONGEST = 13


def split(walk: Walk) -> Walk:
    """The walk with its bounds, cuts and segments."""
    reverse = walk.direction == "reverse"
    grid = Grid(walk.axis, BN, "ascending") if reverse else Grid(KeyAxis("T"), BT, "ascending")
    body = "attend_dkv" if reverse else "attend_fwd"
    kernel = Kernel("k", "b", body, grid, (), (walk,), (Choice("what", "because"),))
    plan = SplitLoops().run(DeriveBounds().run(Plan("p", HEADS, (), (), (kernel,))))
    return plan.kernels[0].walks[0]


def tiles_of(walk: Walk, bn: int, bt: int) -> Iterator[dict[str, int]]:
    """Every tile of every short sequence: a query tile holds a query, a key tile a key; starts need not be aligned."""
    for tokens in range(1, LONGEST + 1):
        length = evaluate(walk.axis.length(), {"T": tokens})
        for start in range(tokens if walk.direction == "forward" else length):
            name = T0.name if walk.direction == "forward" else S0.name
            yield {"T": tokens, "N": length, BN.name: bn, BT.name: bt, name: start}


def cut(walk: Walk, env: dict[str, int]) -> dict[str, int]:
    """env with the ranges' ends and the cuts, one after the other."""
    assert walk.some
    env = env | {"some_lo": evaluate(walk.some.lo, env), "some_hi": evaluate(walk.some.hi, env)}
    if walk.all:
        env = env | {"all_lo": evaluate(walk.all.lo, env), "all_hi": evaluate(walk.all.hi, env)}
    for c in walk.cuts:
        env = env | {c.name: evaluate(c.at, env)}
    return env


def elements(walk: Walk, segment: Segment, env: dict[str, int]) -> Iterator[dict[str, int]]:
    """(t, s) of the segment for every row of the tile, those past its end too."""
    loop, tile, _, step = walk_tile(walk)
    first, last = evaluate(tile.first, env), evaluate(tile.last, env)
    lo, hi = evaluate(segment.lo, env), evaluate(segment.hi, env)
    assert lo % env[step.name] == hi % env[step.name] == 0, "segments are whole steps"
    return (
        {loop.name: x, tile.var.name: row, "T": env["T"], "N": env["N"]}
        for x in range(lo, hi)
        for row in range(first, last + 1)
    )


def carried(segment: Segment, env: dict[str, int]) -> Where:
    """The conjuncts that the kernel tests on the segment for these tile sizes."""
    return tuple(m.conjunct for m in segment.masks if not m.unless or any(evaluate(u, env) < 0 for u in m.unless))


def all_conjuncts(walk: Walk) -> Where:
    loop, _, length, _ = walk_tile(walk)
    return (*walk.piece.where, lt(loop, length))


WALKS = st.builds(
    lambda where, axis, direction: Walk(0, Piece("p", where), axis, direction),
    st.lists(conjuncts(), min_size=1, max_size=3).map(tuple) | THINNED,
    AXES,
    st.sampled_from(["forward", "reverse"]),
)


@settings(max_examples=100)
@given(WALKS, SIZES)
def test_what_a_segment_does_not_test_holds_on_it(walk: Walk, sizes: tuple[int, int]) -> None:
    walk = split(walk)
    for env in tiles_of(walk, *sizes):
        env = cut(walk, env)
        for segment in walk.segments:
            proved = tuple(c for c in all_conjuncts(walk) if c not in carried(segment, env))
            for point in elements(walk, segment, env) if proved else ():
                assert seen(proved, point), (segment.name, point, env)


@settings(max_examples=100)
@given(WALKS, SIZES)
def test_segments_with_their_masks_see_each_pair_once(walk: Walk, sizes: tuple[int, int]) -> None:
    walk = split(walk)
    for env in tiles_of(walk, *sizes):
        assert sorted(visited(walk, cut(walk, env))) == sorted(wanted(walk, env)), env


def visited(walk: Walk, env: dict[str, int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for segment in walk.segments:
        tested = carried(segment, env)
        found += [(p["t"], p["s"]) for p in elements(walk, segment, env) if stored(walk, p) and seen(tested, p)]
    return found


def stored(walk: Walk, p: dict[str, int]) -> bool:
    """Rows of the tile past the end are computed, but nobody stores them."""
    return p["t"] < p["T"] if walk.direction == "forward" else p["s"] < p["N"]


def wanted(walk: Walk, env: dict[str, int]) -> list[tuple[int, int]]:
    _, tile, _, _ = walk_tile(walk)
    first, last = evaluate(tile.first, env), evaluate(tile.last, env)
    held = [(t, s) for t in range(env["T"]) for s in range(env["N"])]
    inside = [(t, s) for t, s in held if first <= (t if tile.var == QUERY else s) <= last]
    return [(t, s) for t, s in inside if seen(walk.piece.where, {"t": t, "s": s})]


FACTS = Facts(frozenset({"BN", "BT"}), ((count("T"), T0 + 1), (T0, const(0))))
QUERIES = Tile(QUERY, T0, T0 + BT - 1)


def test_causality_is_proved_before_the_diagonal_and_the_window_after_its_start() -> None:
    causal, window = le(KEY, QUERY), lt(QUERY - 512, KEY)
    start = (const(0), T0 + BT - 512)
    lower = below(causal, KEY, start, BN, QUERIES, FACTS)
    assert [to_text(c) for c in lower.conditions or ()] == ["514 - BN - BT"]
    upper = above(window, KEY, (T0 + 1,), BN, QUERIES, FACTS)
    assert [to_text(c) for c in upper.conditions or ()] == ["514 - BN - BT"]
    assert below(window, KEY, start, BN, QUERIES, FACTS).conditions is None, "the window fails below"
    assert above(causal, KEY, (T0 + 1,), BN, QUERIES, FACTS).conditions is None, "causality fails above"


def test_a_congruence_is_never_proved() -> None:
    assert below(multiple(KEY, 3), KEY, (T0,), BN, QUERIES, FACTS).conditions is None


@settings(max_examples=150)
@given(conjuncts(), st.lists(st.tuples(st.integers(0, 2), st.integers(-8, 8)), min_size=1, max_size=2), SIZES)
def test_a_proof_holds_for_any_ends(c: Conjunct, drawn: list[tuple[int, int]], sizes: tuple[int, int]) -> None:
    """below and above alone: ends a·t0 + b, the segment before or after them, T and t0 small."""
    stops = tuple(expand(a * T0 + const(b)) for a, b in drawn)
    lower = below(c, KEY, (const(0), *stops), BN, QUERIES, FACTS)
    upper = above(c, KEY, stops, BN, QUERIES, FACTS)
    assume(lower.conditions is not None or upper.conditions is not None)
    bn, bt = sizes
    for t0 in range(12):
        env = {"t0": t0, "BN": bn, "BT": bt, "T": t0 + 1}
        values = [evaluate(e, env) for e in stops]
        first, last = max(0, min(values) // bn * bn), -(-max(0, *values) // bn) * bn
        queries = range(t0, t0 + bt)
        if lower.conditions is not None and all(evaluate(x, env) >= 0 for x in lower.conditions):
            assert all(compiled_test(c)({"t": t, "s": s}) for t in queries for s in range(last))
        if upper.conditions is not None and all(evaluate(x, env) >= 0 for x in upper.conditions):
            assert all(compiled_test(c)({"t": t, "s": s}) for t in queries for s in range(first, first + 3 * bn))


def test_tile_symbols_are_what_these_tests_take_them_for() -> None:
    assert [s.name for s in (BM, BT, BN, T0, S0, N)] == ["BM", "BT", "BN", "t0", "s0", "N"]

"""The break-even length: exact for powers of the length, and clear at the ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsagen.tools.break_even import break_even, fastest

LENGTHS = [4096 << i for i in range(6)]


def power(factor: float, exponent: float) -> dict[int, float]:
    return {n: factor * n**exponent for n in LENGTHS}


@given(st.floats(4100, 130000), st.floats(0.7, 1.4), st.floats(1.6, 2.2))
def test_exact_where_times_are_powers(crossing, ours, theirs):
    found = break_even(power(crossing**-ours, ours), {"dense": power(crossing**-theirs, theirs)})
    assert found.where == "between"
    assert found.length == pytest.approx(crossing, rel=1e-3)
    assert found.against == "dense"


def test_the_fastest_rival_counts_at_each_length():
    times, names = fastest({"a": {1: 1.0, 2: 9.0}, "b": {1: 2.0, 2: 3.0, 4: 5.0}})
    assert times == {1: 1.0, 2: 3.0, 4: 5.0}
    assert names == {1: "a", 2: "b", 4: "b"}
    slow_then_fast = break_even({4096: 2.0, 8192: 2.0}, {"a": {4096: 1.0, 8192: 9.0}, "b": {4096: 3.0, 8192: 4.0}})
    assert slow_then_fast.length == round(4096 * 2**0.5)
    assert slow_then_fast.text.startswith("about 5,793 tokens")


def test_a_slower_rival_does_not_stand_in_for_the_fastest():
    rivals = {"fast": {4096: 1.0, 16384: 9.0}, "slow": {4096: 3.0, 8192: 30.0, 16384: 300.0}}
    assert fastest(rivals)[0] == {4096: 1.0, 16384: 9.0}
    assert break_even({4096: 2.0, 8192: 3.0}, rivals).text == "above the longest length, 4096 tokens (fast)"


def test_below_and_above():
    below = break_even(power(1.0, 1.0), {"dense": power(1.0, 2.0)})
    assert (below.where, below.length) == ("below", None)
    assert below.text == "below the shortest length, 4096 tokens (dense)"
    above = break_even(power(1.0, 2.0), {"dense": power(1.0, 1.0)})
    assert above.text == "above the longest length, 131072 tokens (dense)"


def test_a_lead_that_is_lost_again_does_not_count():
    ours = {1024: 1.0, 2048: 1.0, 4096: 1.0, 8192: 1.0}
    found = break_even(ours, {"dense": {1024: 2.0, 2048: 0.5, 4096: 0.5, 8192: 2.0}})
    assert found.length == round(4096 * 2**0.5)
    assert break_even(ours, {"dense": {1024: 2.0, 2048: 0.5}}).where == "above"


def test_equal_times_at_a_length_are_the_break_even():
    assert break_even({1024: 1.0, 2048: 1.0}, {"dense": {1024: 1.0, 2048: 4.0}}).length == 1024


def test_only_lengths_of_both_count():
    dense = {4096: 1.0, 8192: 4.0}
    assert break_even({8192: 2.0, 131072: 50.0}, {"dense": dense}).where == "below"
    for ours, rivals in (({}, {"dense": dense}), ({4096: 1.0}, {}), ({1: 1.0}, {"dense": dense})):
        found = break_even(ours, rivals)
        assert found.text == "unknown: no length at which both were measured"

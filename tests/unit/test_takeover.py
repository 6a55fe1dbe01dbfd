"""Listed keys that the last branch takes over in the forward: in which plans, and to the same end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from three_branches import HEADS, SELECTED, arrays, launches, plan_of

from nsagen.errors import IRError
from nsagen.interp.plan import run_op
from nsagen.ir.plan import PLAIN, SPECIALISED, Launch, Plan, Taken
from nsagen.ir.verify import verify
from nsagen.tools.costs import main_ops, taken, work_of


def takes(plan: Plan) -> bool:
    return any(x.leaves for x in launches(plan, "attention"))


@pytest.mark.parametrize("op", ["attention", "attention_lean"])
def test_the_window_completes_the_selected_rows(op: str) -> None:
    plan = plan_of()
    found = launches(plan, op)
    given = {x.when: x for x in found if x.kernel == "selected_fwd"}
    completed = {x.when: x for x in found if x.kernel == "window_fwd"}
    assert (given[(PLAIN,)].leaves, given[(SPECIALISED,)].leaves) == (0, 2)
    rows = {("out_taken", "out_selected"), ("lse_taken", "lse_selected")}
    assert set(completed[(SPECIALISED,)].binds) - set(completed[(PLAIN,)].binds) == rows
    assert plan.kernel("window_fwd").takes == Taken(0, 64, 2)
    assert any(c.what == "shared_products" for c in plan.kernel("selected_fwd").choices)


def test_parts_and_caches_keep_their_keys() -> None:
    plan = plan_of()
    assert plan.kernel("window_cached").takes is None
    assert not any(x.leaves for op in plan.ops if op.doc in ("part", "serve", "decode") for x in op.launches)


@pytest.mark.parametrize(
    "given",
    [
        {"kv": "per_branch"},
        {"selected": SELECTED | {"local": 0}},
        {"selected": SELECTED | {"block": 32}},
        {"window": {"size": 200}},
        {"window": {"size": 220, "sinks": 4}},
        {"window": None},
        {"heads": HEADS | {"query": 1}},
        {"heads": HEADS | {"query": 12}},
    ],
    ids=[
        "own keys",
        "no local block",
        "small blocks",
        "short window",
        "sinks",
        "no window",
        "group of 1",
        "ragged group",
    ],
)
def test_where_it_cannot_it_does_not(given: dict[str, Any]) -> None:
    plan = plan_of(**given)
    assert not takes(plan) and all(k.takes is None for k in plan.kernels if k.body == "attend_fwd")


def test_blocks_of_several_tiles_of_keys() -> None:
    assert takes(plan_of(heads=HEADS | {"query": 32}, selected=SELECTED | {"block": 128}, window={"size": 512}))


def test_the_gradients_need_not_take_what_the_forward_does() -> None:
    plan = plan_of(heads=HEADS | {"qk_dim": 192})
    assert takes(plan) and not any(x.leaves for x in launches(plan, "attention_grad"))


def test_the_same_rows() -> None:
    """By the kernels that a GPU of sm_90 takes, and by the others; from the first query on, whose list is all local."""
    plan, values = plan_of(), arrays()
    plain, other = (run_op(plan, "attention", values, (128, 64), form=form) for form in ("plain", "specialised"))
    for name, got in other.items():
        np.testing.assert_allclose(got, plain[name], rtol=1e-9, atol=1e-11, err_msg=name)


def test_costs_know_what_is_left() -> None:
    plan = plan_of()
    forward = main_ops(plan)[0]
    plain, other = (
        {x.kernel: work_of(x, plan, 1024) for x in taken(forward, 1024, form)} for form in ("plain", "specialised")
    )
    assert other["selected_fwd"].flops < plain["selected_fwd"].flops
    rows = 1024 * 16 * (2 * 64 + 4)  # out and lse of the branch, read and written
    assert other["window_fwd"].bytes - plain["window_fwd"].bytes == 2 * rows
    assert other["window_fwd"].flops == plain["window_fwd"].flops


Change = Callable[[Launch], Launch]
OTHER = {"out_taken": "out_compressed"}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda x: replace(x, leaves=0), "launches leave"),
        (lambda x: replace(x, leaves=1) if x.leaves else x, "launches leave"),
        (lambda x: replace(x, binds=tuple(b for b in x.binds if not b[0].endswith("_taken"))), "launches leave"),
        (lambda x: replace(x, binds=tuple((o, OTHER.get(o, b)) for o, b in x.binds)), "completes out_compressed"),
        (lambda x: replace(x, when=()) if x.kernel == "window_fwd" else x, "where a warp copies alone"),
    ],
    ids=["nothing left", "another count", "nothing taken", "other rows", "always"],
)
def test_the_verifier_wants_what_is_left_to_be_taken(change: Change, rule: str) -> None:
    plan = plan_of()
    verify(plan, "place_accesses")
    ops = tuple(replace(o, launches=tuple(map(change, o.launches))) if o.name == "attention" else o for o in plan.ops)
    with pytest.raises(IRError, match=f"op attention: .*{rule}"):
        verify(replace(plan, ops=ops), "place_accesses")


def test_the_verifier_wants_rows_written_before_they_are_completed() -> None:
    plan = plan_of()

    def late(found: tuple[Launch, ...]) -> tuple[Launch, ...]:
        left = [x for x in found if x.leaves]
        return (*(x for x in found if not x.leaves), *left)

    ops = tuple(replace(o, launches=late(o.launches)) if o.name == "attention" else o for o in plan.ops)
    with pytest.raises(IRError, match=r"op attention: .*before they are written|read before it is written"):
        verify(replace(plan, ops=ops), "place_accesses")

"""dq of several branches in one kernel, and listed keys that one takes over: in which plans, and to the same end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from three_branches import HEADS, SELECTED, arrays, launches, op_of, plan_of

from nsagen.errors import IRError
from nsagen.interp.plan import run_op
from nsagen.ir.plan import PLAIN, SPECIALISED, Plan, Taken
from nsagen.ir.verify import verify
from nsagen.passes.joint import JOINT
from nsagen.tools.costs import pairs


def has_joint(plan: Plan) -> bool:
    return any(k.name == JOINT for k in plan.kernels)


def taken(plan: Plan) -> set[tuple[str, Taken]]:
    """By kernels of the gradients."""
    return {(k.name, k.takes) for k in plan.kernels if k.takes and k.body != "attend_fwd"}


def test_one_kernel_has_dq_of_both_dense_branches() -> None:
    plan = plan_of()
    found = launches(plan, "attention_grad")
    joint = next(x for x in found if x.kernel == JOINT)
    assert joint.when == (SPECIALISED,) and not joint.accumulate
    assert {x.kernel for x in found if PLAIN in x.when} >= {"compressed_dq", "window_dq"}
    assert not {"compressed_queries", "window_queries"} & {x.kernel for x in found}
    assert {w.axis.name for w in plan.kernel(JOINT).walks} == {"compressed", "T"}
    alone = launches(plan, "window_attention_grad") + launches(plan, "attention_lean_grad")
    assert "window_queries" in {x.kernel for x in alone} and JOINT not in {x.kernel for x in alone}


def test_a_row_may_be_empty_in_one_branch_of_two() -> None:
    assert "rows_may_be_empty" in plan_of().kernel(JOINT).facts
    assert "rows_may_be_empty" not in plan_of().kernel("window_queries").facts


def test_the_window_takes_the_local_blocks() -> None:
    plan = plan_of()
    assert taken(plan) == {(JOINT, Taken(1, 64, 2)), ("window_keys", Taken(0, 64, 2))}
    left = {x.kernel: x.leaves for x in launches(plan, "attention_grad") if x.leaves}
    assert left == {"selected_grads": 2, "selected_dq_sum": 2, "selected_sum": 2}
    assert {op.doc for op in plan.ops if any(x.leaves for x in op.launches)} == {"whole", "lean", "whole_grad"}


@pytest.mark.parametrize(
    "given",
    [
        {"kv": "per_branch"},
        {"selected": SELECTED | {"local": 0}},
        {"selected": SELECTED | {"block": 32}},
        {"window": {"size": 200}},
        {"heads": HEADS | {"query": 8}},
        {"heads": HEADS | {"qk_dim": 192}},
    ],
    ids=["own keys", "no local block", "small blocks", "short window", "small group", "wide keys"],
)
def test_where_it_cannot_it_does_not(given: dict[str, Any]) -> None:
    plan = plan_of(**given)
    assert has_joint(plan) and not taken(plan)
    assert not any(x.leaves for op in plan.ops if op.doc.endswith("_grad") for x in op.launches)


def test_windows_just_long_enough() -> None:
    """128 local keys, a tile of 64 and one of 8 queries: no key of a masked tile counts twice."""
    assert taken(plan_of(window={"size": 201})) and not taken(plan_of(window={"size": 200}))


def test_one_dense_branch_has_nothing_to_join() -> None:
    assert not has_joint(plan_of(window=None))
    assert not has_joint(plan_of(window={"size": 220, "sinks": 4}))  # two pieces: without that form


def test_costs_know_what_is_left() -> None:
    plan = plan_of()
    walk = plan.kernel("selected_grads").walks[0]
    assert walk.listed is not None
    every, far = (pairs(walk.piece, walk.axis, 1000, walk.listed, leaves) for leaves in (0, 2))
    assert far == sum(64 * min(2, max(0, t // 64 - 1)) for t in range(1000))
    assert every - far == sum(t + 1 if t < 128 else 64 + t % 64 + 1 for t in range(1000))


def test_the_verifier_wants_what_is_left_to_be_taken() -> None:
    plan = plan_of()
    for change in (
        lambda x: replace(x, leaves=0),
        lambda x: replace(x, leaves=1) if x.kernel == "selected_sum" else x,
        lambda x: replace(x, binds=tuple(b for b in x.binds if not b[0].endswith("_taken"))),
        lambda x: replace(x, binds=x.binds[:-2]) if x.kernel == "window_keys" else x,
    ):
        ops = tuple(
            replace(o, launches=tuple(map(change, o.launches))) if o.doc == "whole_grad" else o for o in plan.ops
        )
        with pytest.raises(IRError, match="attention_grad"):
            verify(replace(plan, ops=ops), "place_accesses")
    verify(plan, "place_accesses")


@pytest.mark.parametrize(("chunk", "shares"), [(None, 1), (None, 3), (150, 1)])
def test_the_gradients_are_the_same(chunk: int | None, shares: int) -> None:
    """The kernels that a GPU of sm_90 takes, and the others; a gate of 0 shifts lse to infinity."""
    plan, values = plan_of(), arrays("d_out")
    values["gates"][:, ::7, :, 2] = values["gates"][:, ::5, :, 1] = 0.0
    values |= run_op(plan, "attention", {x: values[x] for x in op_of(plan, "attention").inputs}, (64, 64))
    inputs = {x: values[x] for x in op_of(plan, "attention_grad").inputs}
    plain, other = (
        run_op(plan, "attention_grad", inputs, (128, 64), chunk=chunk, form=form, shares=shares)
        for form in ("plain", "specialised")
    )
    for name, got in other.items():
        assert np.isfinite(got).all(), name
        np.testing.assert_allclose(got, plain[name], rtol=1e-9, atol=1e-11, err_msg=name)

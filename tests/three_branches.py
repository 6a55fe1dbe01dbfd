"""A small spec of three branches, its plan, and arrays for the plan's interpreter: of tests of what branches share."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsagen import api
from nsagen.compiler import lower
from nsagen.ir.plan import Launch, Op, Plan

HEADS = {"query": 16, "kv": 1, "qk_dim": 64, "v_dim": 64}
COMPRESSED = {"block": 32, "stride": 16, "pool": "mean"}
SELECTED = {"block": 64, "top_n": 4, "initial": 1, "local": 2, "from": "compressed"}
WINDOW = {"size": 220}
TOKENS = 300


def plan_of(heads: dict[str, int] | None = None, kv: str = "shared", **branches: dict[str, Any] | None) -> Plan:
    """branches: in place of those above; None: without it."""
    found = {"compressed": COMPRESSED, "selected": SELECTED, "window": WINDOW} | branches
    given = {x: y for x, y in found.items() if y is not None}
    spec = {"name": "three", "heads": heads or HEADS, "kv": kv, "branches": given, "combine": "gated_sum"}
    plan = lower(api.read(spec))[-1].ir
    assert isinstance(plan, Plan)
    return plan


def op_of(plan: Plan, name: str) -> Op:
    return next(o for o in plan.ops if o.name == name)


def launches(plan: Plan, op: str) -> list[Launch]:
    return list(op_of(plan, op).launches)


def arrays(*more: str) -> dict[str, Any]:
    """q, k, v, pooled keys and values, and gates of TOKENS tokens; `more` of q's shape, too."""
    rng = np.random.default_rng(0)
    heads = {"q": 16, "k": 1, "v": 1} | dict.fromkeys(more, 16)
    values: dict[str, Any] = {x: rng.standard_normal((1, TOKENS, count, 64)) for x, count in heads.items()}
    for x in ("k", "v"):
        values[f"{x}_cmp"] = np.stack([values[x][:, i * 16 : i * 16 + 32].mean(1) for i in range(17)], 1)
    return values | {"gates": rng.uniform(size=(1, TOKENS, 16, 3))}

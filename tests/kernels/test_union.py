"""One softmax over branches that read the same keys: a key counts once, and its gradients add up."""

from __future__ import annotations

from harness import check

SPEC = {
    "name": "infllm_like",
    "heads": {"query": 6, "kv": 2, "qk_dim": 24, "v_dim": 16},
    "kv": "shared",
    "branches": {"window": {"size": 12, "sinks": 2}, "selected": {"block": 12, "top_n": 3, "from": "caller"}},
    "combine": "one_softmax",
}


def test_window_and_listed_blocks(device: str) -> None:
    check(SPEC, 2, 41, 5, device)


def test_window_and_listed_blocks_packed(device: str) -> None:
    check(SPEC, 1, 60, 6, device, [0, 1, 20, 20, 60])


SCORED = {
    **SPEC,
    "name": "scored_union",
    "branches": {
        "selected": {"block": 12, "top_n": 3},
        "compressed": {"block": 6, "stride": 3, "pool": "mean"},
        "window": {"size": 9},
    },
}


def test_blocks_scored_by_a_branch_of_the_union(device: str) -> None:
    check(SCORED, 2, 41, 7, device)


def test_blocks_scored_by_a_branch_of_the_union_packed(device: str) -> None:
    check(SCORED | {"kv": "per_branch"}, 1, 60, 8, device, [0, 1, 20, 20, 60])

"""Kernels with a warp that only copies, without a GPU: who is offered the form, and what compilers make of it."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.jit import mangle_type

from nsagen import api
from nsagen.compiler import Compiled, lower
from nsagen.ir.graph import Heads, KeyAxis, Piece
from nsagen.ir.plan import BY_KEYS, ONLY_SPECIALISED, Kernel, Plan, TileConfig
from nsagen.passes import choose_tiles
from nsagen.passes.choose_tiles import ChooseTiles
from nsagen.passes.machine import Use
from nsagen.render import keys
from nsagen.render.keys import kernel_key
from nsagen.render.module import _source
from nsagen.runtime import hopper, launch
from nsagen.runtime.launch import Chip, Config
from nsagen.sym import KEY, QUERY, Conjunct, conjunct_text, le, lt, moves_along, multiple
from nsagen.tools import aot, aot_chips
from nsagen.tools.explain import summary
from nsagen.tools.signature import signature_of

ROOT = Path(__file__).resolve().parents[2]
WHAT = "warp_specialised"
NSA = {
    "kv": "shared",
    "branches": {"compressed": {"block": 32, "stride": 16, "pool": "mean"}, "window": {"size": 100}},
    "combine": "gated_sum",
}
AWKWARD = NSA | {"name": "awkward", "heads": {"query": 12, "kv": 1, "qk_dim": 72, "v_dim": 40}}  # parts, rows to spare
WIDE = NSA | {"name": "wide", "heads": {"query": 5, "kv": 1, "qk_dim": 256, "v_dim": 256}}
WITH_SINKS = NSA | {"name": "with_sinks", "heads": AWKWARD["heads"], "branches": {"window": {"size": 100, "sinks": 4}}}
WITH_SINKS |= {"combine": "single"}
FOUR_HEADS = {"query": 4, "kv": 1, "qk_dim": 128, "v_dim": 128}
SMALL_BLOCKS = {"block": 32, "top_n": 4, "initial": 1, "local": 1, "from": "compressed"}
SPILLING = {"name": "spilling", "heads": FOUR_HEADS, "kv": "shared", "combine": "gated_sum"}
SPILLING |= {"branches": {"compressed": NSA["branches"]["compressed"], "selected": SMALL_BLOCKS}}


Spec = str | dict[str, Any]  # a ready one's name, or what it says


def built(spec: Spec) -> Compiled:
    return _built(json.dumps(spec))


@functools.cache
def _built(text: str) -> Compiled:
    return api.compiled_of(api.read(json.loads(text)))


def plan_of(spec: Spec) -> Plan:
    return built(spec).plan


def with_the_form(plan: Plan) -> set[str]:
    """Kernels that have it beside another."""
    return {k.name for k in plan.kernels if k.specialised and k.body not in ONLY_SPECIALISED}


def of_the_form(plan: Plan) -> set[str]:
    """Kernels that have no other."""
    return {k.name for k in plan.kernels if k.body in ONLY_SPECIALISED}


def tables_with_it(kernel: Kernel) -> set[tuple[str, int]]:
    return {(t.arch, t.bits) for t in kernel.tiles if any(c.specialised for c in t.configs)}


# Masks that speak of distances.

CAUSAL, WINDOW, ENDED = le(KEY, QUERY), lt(QUERY - 512, KEY), le(16 * KEY, QUERY - 31)
ALONG = [
    (CAUSAL, 1), (WINDOW, 1), (ENDED, 16), (multiple(QUERY - KEY, 3), 1), (multiple(QUERY - 16 * KEY, 5), 16)
]  # fmt: skip
ACROSS = [
    (lt(KEY, 4), 1), (lt(KEY, 4), 16), (lt(QUERY, 4), 1), (CAUSAL, 16), (WINDOW, 16), (ENDED, 1), (multiple(KEY, 3), 1)
]  # fmt: skip
TIMES = (*range(64), *range(500, 564))  # on both sides of every bound above


def named(x: Conjunct | int) -> str:
    return str(x) if isinstance(x, int) else conjunct_text(x)


def same_moved(c: Conjunct, stride: int, steps: int = 1) -> bool:
    """Whether the test says the same of any key and query and of those `steps` keys further, by trying."""
    test = eval(f"lambda t, s: {conjunct_text(c)}")
    return all(test(t, s) == test(t + steps * stride, s + steps) for t in TIMES for s in range(64))


@pytest.mark.parametrize(("conjunct", "stride"), ALONG, ids=named)
def test_what_depends_on_the_distance_alone(conjunct: Conjunct, stride: int) -> None:
    assert moves_along(conjunct, stride)
    assert same_moved(conjunct, stride)


@pytest.mark.parametrize(("conjunct", "stride"), ACROSS, ids=named)
def test_what_depends_on_more(conjunct: Conjunct, stride: int) -> None:
    assert not moves_along(conjunct, stride)
    assert not same_moved(conjunct, stride)


@pytest.mark.parametrize("spec", [x for x in sorted(api.ready_specs()) if x != "selected_only"])
def test_a_tile_s_masks_can_be_counted_from_its_first_key(spec: str) -> None:
    """What the kernel does: s from the tile's first key on, t less what the stride makes of that key."""
    plan = plan_of(spec)
    assert with_the_form(plan)
    queries = {k.name for k in plan.kernels if k.body == "attend_queries"}
    in_a_row = {name for name in with_the_form(plan) if not plan.kernel(name).walks[0].listed}
    for kernel in map(plan.kernel, sorted(in_a_row | queries)):
        source, strides = _source(kernel, plan), [str(w.axis.stride) for w in kernel.walks]
        assert all(same_moved(c, w.axis.stride, -40) for w in kernel.walks for c in w.piece.where)
        moved = re.findall(r"t = t - (\w+) \* \(s0 \+ lane\)", source)
        if kernel.name in queries:  # of one source or more, each with its own
            assert moved == ["STRIDE"]
            moved = re.findall(r"time, s0, n, scale2, (\d+),", source)
        assert list(dict.fromkeys(moved)) == strides


# Who is offered the form.


def test_the_forwards_and_no_other() -> None:
    plan = plan_of("nsa_128")
    assert with_the_form(plan) == {"compressed_fwd", "window_fwd", "selected_fwd", "select_scores"}
    gradients = {f"{branch}_{what}" for branch in ("compressed", "window") for what in ("queries", "keys")}
    assert of_the_form(plan) == gradients | {"selected_grads", "joint_queries"}
    others = {k.name for k in plan.kernels} - with_the_form(plan) - of_the_form(plan)
    assert others > {
        "selected_cached",
        "compressed_cached",
        "window_cached",
        "window_dq",
        "window_dkv",
        "select_scores_cached",
    }
    assert not any(tables_with_it(plan.kernel(name)) for name in others)


@pytest.mark.parametrize(
    ("change", "offered"),
    [
        ({}, True),
        ({"query": 64}, True),
        ({"qk_dim": 192}, True),
        ({"query": 16}, False),
        ({"query": 24}, False),
        ({"qk_dim": 64}, False),
        ({"v_dim": 256, "qk_dim": 256}, False),
        ({"block": 32}, False),
        ({"top_n": 65}, False),
    ],
    ids=[
        "group of 16",
        "32",
        "the paper's dims",
        "8",
        "12",
        "a smaller qk dim",
        "wide values",
        "small blocks",
        "long lists",
    ],
)
def test_queries_share_blocks_where_their_heads_fill_a_product(change: dict[str, int], offered: bool) -> None:
    heads = {"query": 32, "kv": 2, "qk_dim": 128, "v_dim": 128} | change
    block, top_n = heads.pop("block", 64), heads.pop("top_n", 64)
    branches = {"selected": {"block": block, "top_n": top_n, "from": "caller"}}
    plan = plan_of({"name": "some", "heads": heads, "kv": "shared", "branches": branches, "combine": "single"})
    assert ("selected_fwd" in with_the_form(plan)) == offered
    assert "selected_cached" not in with_the_form(plan)
    assert tables_with_it(plan.kernel("selected_fwd")) == ({("sm_90", 16)} if offered else set())


def test_gradients_by_blocks_where_they_promise_enough() -> None:
    def offered(query: int, kv: int, qk: int, v: int, block: int = 64) -> bool:
        heads = {"query": query, "kv": kv, "qk_dim": qk, "v_dim": v}
        branches = {"selected": {"block": block, "top_n": 6, "from": "caller"}}
        spec = {"name": "some", "heads": heads, "kv": "shared", "branches": branches, "combine": "single"}
        return "selected_grads" in of_the_form(plan_of(spec))

    assert all(
        offered(*x) for x in ((32, 2, 128, 128), (64, 2, 64, 128), (16, 1, 128, 64), (48, 3, 64, 64), (16, 1, 192, 128))
    )
    assert not any(offered(*x) for x in ((64, 1, 64, 128), (64, 2, 128, 128), (8, 1, 128, 128), (16, 1, 256, 128)))
    assert not offered(16, 1, 128, 128, block=32)


def test_on_sm_90_in_16_bits() -> None:
    for name in ("compressed_fwd", "window_fwd"):
        kernel = plan_of("nsa_128").kernel(name)
        assert {(t.arch, t.bits) for t in kernel.tiles} > {("sm_80", 16), ("sm_90", 32), ("sm_100", 16)}
        assert tables_with_it(kernel) == {("sm_90", 16)}


@pytest.mark.parametrize("spec", ["tiny", WITH_SINKS], ids=["tiny", "alone"])
def test_a_window_with_sinks_walks_twice(spec: Spec) -> None:
    window = plan_of(spec).kernel("window_fwd")
    assert len(window.walks) == 2
    assert not window.may_specialise()
    assert not window.specialised


@functools.cache
def split_loops() -> Plan:
    """The window's forward of nsa_128 before choose_tiles, alone."""
    plan = next(s.ir for s in lower(api.read("nsa_128")) if s.name == "split_loops")
    assert isinstance(plan, Plan)
    return replace(plan, kernels=(plan.kernel("window_fwd"),))


@pytest.mark.parametrize(("query", "offered"), [(1, True), (48, True), (64, True), (65, False), (128, False)])
def test_a_group_fills_one_warpgroup_at_most(query: int, offered: bool) -> None:
    """Specs have no larger groups; the pass would."""
    (kernel,) = ChooseTiles().run(replace(split_loops(), heads=Heads(query, 1, 128, 128))).kernels
    assert kernel.specialised == bool(tables_with_it(kernel)) == offered
    assert [c.what for c in kernel.choices].count(WHAT) == offered


SCORES: list[tuple[dict[str, int], dict[str, int], bool]] = [  # of the heads, of the selection; whether offered
    ({}, {}, True),
    ({"query": 4}, {}, True),
    ({"query": 2}, {}, False),
    ({"query": 32}, {}, False),
    ({"qk_dim": 192}, {}, True),
    ({"qk_dim": 256}, {}, False),
    ({"qk_dim": 80}, {}, False),
    ({}, {"block": 32}, True),
    ({}, {"block": 256}, True),
    ({}, {"block": 512}, False),  # 32 keys are never kept as one sum
    ({}, {"block": 48}, False),
]


@pytest.mark.parametrize(("heads", "selection", "offered"), SCORES)
def test_whose_rows_of_scores_are_queries_and_heads(
    heads: dict[str, int], selection: dict[str, int], offered: bool
) -> None:
    of = {"query": 16, "kv": 1, "qk_dim": 128, "v_dim": 128} | heads
    blocks = {"block": 64, "top_n": 4, "initial": 1, "local": 1, "from": "compressed"} | selection
    branches = {"compressed": {"block": 32, "stride": 16, "pool": "mean"}, "selected": blocks}
    spec = {"name": "scored", "heads": of, "kv": "shared", "branches": branches, "combine": "gated_sum"}
    plan = plan_of(spec)
    kernel = plan.kernel("select_scores")
    assert tables_with_it(kernel) == ({("sm_90", 16)} if offered else set())
    assert ("lanes.in_order(k, c.bn)" in built(spec).source) == offered
    assert not plan.kernel("select_scores_cached").specialised
    for table in kernel.tiles:
        for c in table.configs:
            if c.specialised:
                warpgroups = 3 if of["qk_dim"] > 128 else 4
                assert (c.bm, c.bn, c.dropped) == (warpgroups * 64 // of["query"], 64, None)


def test_a_tile_that_does_not_fit_is_dropped_for_a_reason() -> None:
    kernel = plan_of(WIDE).kernel("window_fwd")
    (table,) = (t for t in kernel.tiles if (t.arch, t.bits) == ("sm_90", 16))
    assert {(c.bn, c.stages): c.dropped and c.dropped.split(" ")[0] for c in table.configs if c.specialised} == {
        (64, 2): None, (64, 3): "shared", (64, 4): "shared", (128, 2): "shared",
    }  # fmt: skip


@pytest.mark.parametrize("use", [Use(1 << 20, 0), Use(0, 256)], ids=["memory", "registers"])
def test_no_form_where_none_of_its_tiles_fits(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_tiles, "specialised_use", lambda *_: use)
    (kernel,) = ChooseTiles().run(split_loops()).kernels
    assert kernel.may_specialise()
    assert not kernel.specialised
    assert WHAT not in [c.what for c in kernel.choices]


def test_what_a_kernel_must_be_for_it() -> None:
    kernel, listed = (plan_of("nsa_128").kernel(name) for name in ("window_fwd", "selected_fwd"))
    (walk,) = kernel.walks

    def over(*where: Conjunct, axis: KeyAxis = walk.axis) -> Kernel:
        return replace(kernel, walks=(replace(walk, piece=Piece("p", where), axis=axis),))

    assert kernel.may_specialise()
    assert over(CAUSAL, multiple(QUERY - KEY, 3)).may_specialise()
    assert not over(CAUSAL, lt(KEY, 4)).may_specialise()
    assert not over(CAUSAL, multiple(KEY, 3)).may_specialise()
    assert not over(CAUSAL, axis=KeyAxis("compressed", 32, 16)).may_specialise()
    assert not replace(kernel, cached=True).may_specialise()
    assert not replace(kernel, body="attend_dq").may_specialise()
    assert not replace(kernel, walks=()).may_specialise()
    assert not replace(kernel, walks=(walk, walk)).may_specialise()
    assert not replace(kernel, walks=(replace(walk, listed=listed.walks[0].listed),)).may_specialise()


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_the_choice_stands_where_the_form_is_and_is_explained(spec: str) -> None:
    plan = plan_of(spec)
    some = of_the_form(plan) - {"selected_grads"}  # whose choice speaks of the loop order
    united = {name for name in with_the_form(plan) if plan.kernel(name).walks[0].listed}  # … and this of their queries
    scores = {name for name in with_the_form(plan) if plan.kernel(name).select}  # and this of their rows
    in_a_row = with_the_form(plan) - united - scores
    assert {k.name for k in plan.kernels if WHAT in [c.what for c in k.choices]} == in_a_row | some
    pages = summary(built(spec)).split("KERNEL ")[1:]
    assert {p.split()[0] for p in pages if f"  {WHAT} because a warp copies keys ahead" in p} == in_a_row
    assert {p.split()[0] for p in pages if f"  {WHAT} because a warp copies" in p} == in_a_row | some
    assert {p.split()[0] for p in pages if "  union_of_lists because adjacent queries" in p} == united
    assert {p.split()[0] for p in pages if "  scores_by_rows because a warp copies keys" in p} == scores
    first = {k.name for k in plan.kernels if aot_chips.candidates(k, "sm_90", 16)[0].specialised}
    shown = r"^  tile sm_90 16-bit: \d+x\d+ w4 s\d ws  "
    assert {p.split()[0] for p in pages if re.search(shown, p, re.MULTILINE)} == first


# Launches.


def test_a_configuration_says_which_form_it_is() -> None:
    plain, form = Config(128, 64, 4, 3, 0), Config(128, 64, 4, 3, 0, maps=True, specialised=True)
    assert (plain.label, form.label) == ("128x64w4s3", "128x64w4s3ws")
    assert form.options == plain.options == {"num_warps": 4, "num_stages": 3}


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_a_module_has_it_for_one_chip_and_another_tile_for_launches_without_maps(spec: str) -> None:
    module, plan = api.module_of(built(spec)), plan_of(spec)
    for name, tiles in module._CONFIGS.items():
        for arch in launch.ARCHES:
            for bits in (16, 32):
                found = launch.candidates(tiles, Chip(arch, 227 << 10, ""), bits)
                alone = name in of_the_form(plan)
                wanted = (alone or name in with_the_form(plan)) and (arch, bits) == ("sm_90", 16)
                if alone and arch == "sm_100" and bits == 16:
                    continue  # finds an older chip's; its launches are for sm_90
                assert any(c.specialised for c in found) == wanted, (name, arch, bits)
                assert all(c.maps for c in found if c.specialised)
                assert any(not c.maps for c in found) or alone, (name, arch, bits)


def test_the_interpreter_takes_the_other_form() -> None:
    tiles = api.module_of(built("nsa_128"))._CONFIGS["compressed_fwd"]
    assert not launch.pick(tiles, torch.empty(1, 70000, 4, 128, dtype=torch.bfloat16)).specialised


# Text.


def test_a_module_with_the_form_imports_gluon() -> None:
    source, names = built("nsa_128").source, with_the_form(plan_of("nsa_128")) | of_the_form(plan_of("nsa_128"))
    assert set(re.findall(r"@gluon\.jit\(.*\)\ndef (\w+)_specialised\(", source)) == names
    assert set(re.findall(r"launcher\.start\((\w+)_specialised,", source)) == names
    assert "from triton.experimental import gluon" in source


def test_a_module_without_does_not() -> None:
    small = {"query": 8, "kv": 2, "qk_dim": 64, "v_dim": 64}
    source = built({**api.read("selected_only").to_dict(), "name": "small", "heads": small}).source
    assert not re.search(r"gluon|hopper|lanes|_specialised|specialised=True", source)


# Keys.


def functions(module: str, before: str = "") -> set[str]:
    """Names of a runtime module's functions, of those with that line above."""
    text = (ROOT / "nsagen" / "runtime" / f"{module}.py").read_text(encoding="utf-8")
    return set(re.findall(rf"^{before}def (\w+)\(", text, re.MULTILINE))


MODULES = ("hopper", "lanes")
MARKED = r"@gluon\.(?:jit|constexpr_function)\n"
DEVICE = {name for module in MODULES for name in functions(module, MARKED)}
HOST = {name for module in MODULES for name in functions(module)} - DEVICE
CALLED = r"\b(?:hopper|lanes)\.(\w+)\("


@functools.cache
def text_of(kernel: str) -> str:
    return _source(plan_of("nsa_128").kernel(kernel), plan_of("nsa_128"))


@pytest.fixture
def changing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """changing(name=text, …): other texts for functions of the runtime."""
    library = keys._library()
    return lambda **texts: monkeypatch.setattr(keys, "_library", lambda: {**library, **texts})


def test_a_key_knows_the_functions_for_hopper() -> None:
    modules = [functions(name) for name in keys.DEVICE]
    assert {*MODULES, "device"} == set(keys.DEVICE)
    assert keys._library().keys() == set().union(*modules)
    assert sum(map(len, modules)) == len(keys._library()), "a key finds a function by its name alone"
    names = with_the_form(plan_of("nsa_128")) | of_the_form(plan_of("nsa_128"))
    called = set(re.findall(CALLED, "".join(map(text_of, sorted(names)))))
    assert called == DEVICE - {"lane_before"} | {"sync"}  # which one_later calls; which is Triton's
    assert {"boxes", "programs"} < HOST


@pytest.mark.parametrize("function", sorted(DEVICE - {"lane_before"}))
def test_a_key_is_of_the_functions_for_hopper_that_the_kernel_calls(function: str, changing: Any) -> None:
    plan = plan_of("nsa_128")
    names = [k.name for k in plan.kernels if not k.body.startswith("split")]
    before = {name: kernel_key(text_of(name)) for name in names}
    changing(**{function: "changed"})
    changed = {name for name in names if kernel_key(text_of(name)) != before[name]}
    assert changed == {name for name in names if function in re.findall(CALLED, text_of(name))}
    assert changed and changed <= with_the_form(plan) | of_the_form(plan)


@pytest.mark.parametrize("function", sorted(HOST))
def test_a_key_is_not_of_the_host_s(function: str, changing: Any) -> None:
    before = kernel_key(text_of("compressed_fwd"))
    changing(**{function: "changed"})
    assert kernel_key(text_of("compressed_fwd")) == before


def test_a_key_is_of_what_those_functions_call(changing: Any) -> None:
    changing(fetch="deeper(x)", deeper="one")
    before = kernel_key(text_of("compressed_fwd"))
    changing(fetch="deeper(x)", deeper="another")
    assert kernel_key(text_of("compressed_fwd")) != before


# Ahead of time.


def test_each_form_of_a_first_choice_is_a_job() -> None:
    plan = plan_of("nsa_128")
    jobs = aot.jobs_of(plan, "sm_90", "bf16")
    number = Counter(j.kernel.name for j in jobs)
    assert {name for name, n in number.items() if n == 2} == {
        *with_the_form(plan), "window_keys", "decode_begin", "decode_whole",
    }  # fmt: skip
    assert max(number.values()) == 2
    stored = [{o for o, _ in j.launch.binds} & {"parts", "dk"} for j in jobs if j.kernel.name == "window_keys"]
    assert stored == [{"dk"}, {"parts"}]  # one program a tile, and programs that share it
    for name in with_the_form(plan):
        kept = aot_chips.candidates(plan.kernel(name), "sm_90", 16)
        first, second = (j.tile for j in jobs if j.kernel.name == name)
        assert first == kept[0]
        assert first.specialised
        assert second == next(c for c in kept if not c.specialised)


@pytest.mark.parametrize(
    ("arch", "dtype"), [("sm_80", "bf16"), ("sm_100", "fp16"), ("gfx942", "bf16"), ("sm_90", "fp32")]
)
def test_elsewhere_there_is_one(arch: str, dtype: str) -> None:
    twice = ("decode_begin", "decode_whole")  # of a mean and of an MLP; of some sequences and of a crowd
    jobs = [j for j in aot.jobs_of(plan_of("nsa_128"), arch, dtype) if j.kernel.name not in twice]
    assert {j.kernel.name for j in jobs} > {"compressed_fwd", "window_fwd"}
    assert set(Counter(j.kernel.name for j in jobs).values()) == {1}
    assert not any(j.tile.specialised for j in jobs)


def test_one_job_where_the_other_form_is_first() -> None:
    plain = TileConfig(64, 64, 4, 3, 0, 0, 1.0)
    other, form = replace(plain, bn=32), replace(plain, bm=128, maps=True, specialised=True)
    assert aot._first([plain, form, other]) == [plain]
    assert aot._first([form, replace(form, bn=128), other, plain]) == [form, other]
    assert aot._first([form]) == [form]


def test_all_candidates_are_those_of_both_forms() -> None:
    jobs = aot.jobs_of(plan_of("nsa_128"), "sm_90", "bf16", all_candidates=True)
    kept = aot_chips.candidates(plan_of("nsa_128").kernel("window_fwd"), "sm_90", 16)
    assert [j.tile for j in jobs if j.kernel.name == "window_fwd"] == kept
    assert {c.specialised for c in kept} == {False, True}


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("spec", ["nsa_paper", AWKWARD], ids=["nsa_paper", "awkward"])
def test_tensor_maps_are_those_that_a_launch_makes(spec: Spec, dtype: str, kind: torch.dtype) -> None:
    plan = plan_of(spec)
    module, h = api.module_of(built(spec)), plan.heads
    for job in aot.jobs_of(plan, "sm_90", dtype, all_candidates=True):
        if not job.tile.specialised:
            continue
        types = signature_of(getattr(module, f"{job.kernel.name}_specialised"), job, plan).types
        several = [str(w.source) for w in job.kernel.walks] if len(job.kernel.walks) > 1 else [""]
        values = [("v", h.v_dim, job.kernel.v_parts)] if any(o.role == "v" for o in job.kernel.operands) else []
        for side, width, parts in (("k", h.qk_dim, job.kernel.qk_parts), *values):
            rows = 64 if job.kernel.body in BY_KEYS else job.tile.bn
            made = hopper.boxes(torch.zeros(2, 300, h.kv, width, dtype=kind), parts, rows)
            wanted = {f"{side}{n}_map{i}": mangle_type(x) for n in several for i, x in enumerate(made)}
            assert {name: x for name, x in types.items() if re.match(rf"{side}\d?_map", name)} == wanted
        rows_too = [x for x in (("q", h.qk_dim), ("do", h.v_dim)) if f"{x[0]}_map0" in types]
        for side, width in rows_too:
            tokens = 64 // h.group if job.kernel.body in (*BY_KEYS, "select_scores") else 1
            made = hopper.row_boxes(torch.zeros(2, 300, h.query, width, dtype=kind), h.group, tokens)
            assert types[f"{side}_map0"] == mangle_type(made)


COMPILED = """
import json, sys
from nsagen import api
from nsagen.tools import aot, compile
jobs = aot.jobs_of
compile.jobs_of = lambda *asked: [j for j in jobs(*asked) if j.tile.specialised]
spec, dtype, which, file = sys.argv[1:]
reports = compile.compile_all(api.compiled_of(api.read(json.loads(spec))), ["sm_90"], dtype, which == "all")
compile.write_json(reports, file)
"""
TRIED: dict[str, tuple[Spec, str, str]] = {  # spec, dtype, which candidates
    "nsa_128": ("nsa_128", "bf16", "first"),
    "nsa_paper": ("nsa_paper", "bf16", "first"),
    "tiny": ("tiny", "bf16", "first"),
    "awkward": (AWKWARD, "fp16", "all"),
    "mha_16": ("mha_16", "bf16", "first"),
    "gqa_llama": ("gqa_llama", "bf16", "first"),
    "four heads, two keys a block": (SPILLING, "bf16", "first"),  # whose scores spill most
}


# What ptxas is known to say of some (docs/performance.md, steps 40 and 41): C7517 is one wait more, C7512 serialises.
KNOWN: dict[tuple[str, str], set[str]] = {
    ("nsa_128", "compressed_keys"): {"C7517"},
    ("nsa_128", "window_keys"): {"C7517"},
    ("mha_16", "compressed_keys"): {"C7517"},
    ("mha_16", "window_keys"): {"C7517"},
    ("nsa_paper", "compressed_keys"): {"C7517"},
    ("nsa_paper", "window_keys"): {"C7517"},
    ("nsa_paper", "selected_grads"): {"C7512"},
    ("gqa_llama", "compressed_keys"): {"C7517"},
    ("gqa_llama", "window_keys"): {"C7517"},
    ("four heads, two keys a block", "compressed_keys"): {"C7517"},
}


@functools.cache
def compiled(tried: str) -> list[dict[str, Any]]:
    """Records of real kernels: from a process of its own, without the interpreter."""
    spec, dtype, which = TRIED[tried]
    variables = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="nsagen-tests-") as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-c", COMPILED, json.dumps(spec), dtype, which, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(file.read_text())


# Scope and equal order keep the tests of one spec together, so that few processes of a parallel run compile it again.
@pytest.mark.parametrize("tried", TRIED, scope="module")
def test_it_compiles_for_a_chip_that_is_not_here(tried: str) -> None:
    spec, dtype, which = TRIED[tried]
    jobs = [j for j in aot.jobs_of(plan_of(spec), "sm_90", dtype, which == "all") if j.tile.specialised]
    assert {j.kernel.name for j in jobs} == with_the_form(plan_of(spec)) | of_the_form(plan_of(spec))
    wanted = [(j.kernel.name, dtype, j.tile.bm, j.tile.bn, j.tile.stages) for j in jobs]
    found = compiled(tried)
    assert [(r["kernel"], r["dtype"], r["bm"], r["bn"], r["stages"]) for r in found] == wanted
    for r in found:
        assert r["error"] is None, r
        assert r["wgmma"] > 0, r
        assert r["mma"] == 0, r
        codes = {re.search(r"C75\d\d", w)[0] for w in r["warnings"]}  # type: ignore[index]  # of wgmma that ptxas serialises
        assert codes == KNOWN.get((tried, r["kernel"]), set()), r
        assert 0 < r["smem"] <= aot_chips.CHIPS["sm_90"].smem, r


@pytest.mark.parametrize("tried", TRIED, scope="module")
def test_first_choices_do_not_spill(tried: str) -> None:
    spilled: dict[str, int] = {}
    for r in compiled(tried):
        spilled[r["kernel"]] = max(spilled.get(r["kernel"], 0), r["spill_stores"] + r["spill_loads"])
    plan = plan_of(TRIED[tried][0])
    names = with_the_form(plan) | of_the_form(plan)
    assert spilled.keys() == names
    assert all(n <= aot_chips.candidates(plan.kernel(name), "sm_90", 16)[0].spills for name, n in spilled.items())


@pytest.mark.parametrize("tried", TRIED, scope="module")
def test_shared_memory_is_no_more_than_estimated(tried: str) -> None:
    for r in compiled(tried):
        assert r["smem"] <= r["estimated"]["smem"], r


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_group_too_large_for_four_warps_has_a_whole_step_too(dtype: str) -> None:
    spec = {
        "name": "one_kv_head",
        "heads": {"query": 64, "kv": 1, "qk_dim": 64, "v_dim": 64},
        "kv": "shared",
        "branches": {
            "compressed": {"block": 32, "stride": 16, "pool": "mean"},
            "selected": {"block": 64, "top_n": 16, "initial": 1, "local": 2},
        },
        "combine": "gated_sum",
    }
    jobs = aot.jobs_of(api.compiled_of(api.read(spec)).plan, "sm_90", dtype)
    assert [j.tile.warps for j in jobs if j.kernel.name == "decode_whole"] == [8]

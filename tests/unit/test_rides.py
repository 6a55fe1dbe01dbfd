"""The combination that rides on the last branch's specialised programs: plan, text, host, forecast and tuner.

No GPU is needed: where the form itself would run, a stand-in takes its place.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from strategies import make_inputs
from torch import Tensor

from nsagen import api
from nsagen.compiler import Compiled
from nsagen.ir.plan import Launch, Plan
from nsagen.render.view import combined_view
from nsagen.runtime import launch
from nsagen.runtime.launch import Config
from nsagen.tools import forecast, tune_measure
from nsagen.tools.explain import summary
from nsagen.tools.forecast import Tile

Spec = str | dict[str, Any]  # a ready one's name, or what it says

HEADS = {"query": 4, "kv": 2, "qk_dim": 16, "v_dim": 16}
COMPRESSED = {"block": 8, "stride": 4, "pool": "mean"}
SELECTED = {"block": 8, "top_n": 3, "initial": 1, "local": 1}
WINDOW = {"size": 5}
FORM = Config(128, 64, 4, 2, 0, maps=True, specialised=True)


def spec_of(*branches: str, **more: Any) -> dict[str, Any]:
    """A small spec with these branches, in this order."""
    options: dict[str, Any] = {"compressed": COMPRESSED, "selected": SELECTED, "window": WINDOW, **more}
    chosen = {name: options[name] for name in branches}
    if "selected" in chosen and "compressed" not in chosen:
        chosen["selected"] = {"block": 8, "top_n": 3, "from": "caller"}
    return {"name": "rides", "heads": HEADS, "kv": "shared", "branches": chosen, "combine": "gated_sum"}


NSA, SWAPPED = spec_of("compressed", "selected", "window"), spec_of("window", "compressed")
MIXED = spec_of("selected", "window", "compressed")
SINKS = spec_of("compressed", "window", window={"size": 5, "sinks": 2})


def built(spec: Spec) -> Compiled:
    return _built(json.dumps(spec))


@functools.cache
def _built(text: str) -> Compiled:
    return api.compiled_of(api.read(json.loads(text)))


def module_of(spec: Spec) -> Any:
    return api.module_of(built(spec))


def riding(plan: Plan) -> dict[str, tuple[str, str]]:
    """What rides on a forward, by op: not the parts of a decoding step."""
    found = [(op.name, x) for op in plan.ops if op.doc != "decode" for x in op.launches]
    return {op: (x.kernel, x.rides) for op, x in found if x.rides}


# The plan.


@pytest.mark.parametrize("spec", ["nsa_128", NSA, MIXED, SWAPPED], ids=["nsa_128", "three", "mixed", "swapped"])
def test_the_combination_rides_in_both_whole_forwards_and_nowhere_else(spec: Spec) -> None:
    plan = built(spec).plan
    assert riding(plan) == dict.fromkeys(("attention", "attention_lean"), ("combine_fwd", "window_fwd"))
    assert {op.name for op in plan.ops for x in op.launches if x.kernel == "combine_fwd"} == {*riding(plan), "serve"}


@pytest.mark.parametrize("order", ["compressed selected", "window selected", "window compressed selected"])
def test_none_where_the_last_branch_is_listed(order: str) -> None:
    """Its programs are of one query, and none of them has a warp that only copies."""
    compiled = built(spec_of(*order.split()))
    assert riding(compiled.plan) == {}
    assert not re.search(r"_combined\b|combined_ptr|carries=\"combine", compiled.source)
    assert "out = _combine(" in compiled.source


@pytest.mark.parametrize("combine", ["single", "gated_sum"])
@pytest.mark.parametrize("branch", ["compressed", "window"])
def test_none_where_there_is_one_branch(branch: str, combine: str) -> None:
    """There is no other term, and a combination of one is a pass over it."""
    compiled = built(spec_of(branch) | {"combine": combine})
    ast.parse(compiled.source)
    assert riding(compiled.plan) == {}
    assert not re.search(r"_combined\b|combined_ptr|carries=\"combine", compiled.source)


def test_none_does_where_the_last_branch_has_no_such_form() -> None:
    """A window with sinks walks twice: whatever the schedule would allow, the combination is a pass."""
    compiled = built(SINKS)
    assert not compiled.plan.kernel("window_fwd").specialised
    assert combined_view(compiled.plan.kernel("window_fwd"), compiled.plan) is None
    assert not re.search(r"_combined\b|combined_ptr|carries=\"combine", compiled.source)
    assert "out = _combine(out_compressed, out_window, gates)" in compiled.source


@pytest.mark.parametrize(
    ("spec", "own", "others"), [("nsa_128", 2, [0, 1]), (NSA, 2, [0, 1]), (MIXED, 1, [0, 2]), (SWAPPED, 0, [1])],
    ids=["nsa_128", "three", "mixed", "swapped"],
)  # fmt: skip
def test_terms_are_numbered_as_gates_are(spec: Spec, own: int, others: list[int]) -> None:
    plan = built(spec).plan
    found = combined_view(plan.kernel("window_fwd"), plan)
    assert found is not None
    assert (found.own, found.others, found.columns) == (own, others, len(others) + 1)
    taken = "lse_taken_ptr, " if spec == "nsa_128" else ""  # whose window completes the selected branch's rows
    assert found.arguments == "".join(f"term{i}_ptr, " for i in others) + "gates_ptr, combined_ptr, " + taken
    assert combined_view(plan.kernel("compressed_fwd"), plan) is None


# The module's text.


def function(source: str, name: str) -> str:
    found = re.search(rf"^def {name}\(.*?(?=^\S|\Z)", source, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[0]


def parameters(source: str, name: str) -> str:
    return function(source, name).partition("(")[2].partition("):")[0]


def test_what_a_module_is_told() -> None:
    source = built("nsa_128").source
    assert parameters(source, "_window_combined") == "q, k, v, term0, term1, gates, cu_seqlens, scale, lse_taken=None"
    given = "q, k, v, out_compressed, out_selected, gates, cu_seqlens, scale"
    call = f"_window_combined({given}, lse_taken=lse_selected if leaves else None)"
    for op in ("_attention", "_attention_lean"):
        text = function(source, op)
        assert text.count("leaves = _window_completes(q, k, v, cu_seqlens)") == 1
        assert text.count("_selected_forward(q, k, v, blocks, cu_seqlens, scale, leaves=leaves)") == 1
        assert text.count(f"out_window, lse_window, out = {call}") == 1
        assert not re.search(r"= _(window_forward|combine)\(", text)
    for op in ("_serve", "_alone"):
        text = function(source, op)
        assert "_combined(" not in text
        assert "out = _combine(out_compressed, out_selected, out_window, gates)" in text
    assert "_combined(" not in function(source, "_attention_lean_grad")


def test_other_orders_of_the_branches() -> None:
    source = built(MIXED).source
    assert parameters(source, "_window_combined") == "q, k, v, term0, term2, gates, cu_seqlens, scale"
    assert "= _window_combined(q, k, v, out_selected, out_compressed, gates, cu_seqlens, scale)" in source
    assert "_combine(term0, out, term2, gates)" in function(source, "_window_combined")
    source = built(SWAPPED).source
    assert parameters(source, "_window_combined") == "q, k, v, term1, gates, cu_seqlens, scale"
    assert "_combine(out, term1, gates)" in function(source, "_window_combined")


def test_keys_of_its_own_branch() -> None:
    source = built("nsa_paper").source
    call = r"= _window_combined\(q, k_window, v_window, out_compressed, out_selected, gates, cu_seqlens, scale\)"
    assert len(re.findall(call, source)) == 2


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_who_carries(spec: str) -> None:
    plan = built(spec).plan
    of_plan = {rides: kernel for kernel, rides in riding(plan).values() if plan.kernel(rides).specialised}
    united = {k.name for k in plan.kernels if k.specialised and k.body == "attend_fwd" and k.walks[0].listed}
    scores = {k.name for k in plan.kernels if k.specialised and k.body == "select_scores"}
    of_all = of_plan | dict.fromkeys(united, "unite_lists") | dict.fromkeys(scores, "order_keys")
    assert {k: t.carries for k, t in module_of(spec)._CONFIGS.items() if t.carries} == of_all
    assert built(spec).source.count('carries="combine_fwd"') == len(of_plan)


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_serving_takes_no_form_that_copies_by_maps(spec: str) -> None:
    """Nor tiles that were made for it: 12 queries are no power of two."""
    source, forms = built(spec).source, {k.name for k in built(spec).plan.kernels if k.specialised}
    found = {name: function(source, name) for name in re.findall(r"^def (_\w+_cached)\(", source, re.MULTILINE)}
    picks = [x for text in found.values() for x in re.findall(r'launch\.pick\(_CONFIGS\["(\w+)"\], (.*)\)', text)]
    if spec == "nsa_128":
        assert {kernel for kernel, _ in picks} & forms == {
            "compressed_fwd",
            "selected_fwd",
            "window_fwd",
            "select_scores",
        }
    assert all(arguments == "q, False" for kernel, arguments in picks if kernel in forms)


@pytest.mark.parametrize("spec", sorted(api.ready_specs()))
def test_the_choice_is_explained(spec: str) -> None:
    plan = built(spec).plan
    pages = {p.split()[0]: p for p in summary(built(spec)).split("KERNEL ")[1:]}
    said = "  rides because the last branch's programs, where warp-specialised,"
    carriers = [rides for _, rides in riding(plan).values() if plan.kernel(rides).specialised]
    assert {name for name, page in pages.items() if said in page} == ({"combine_fwd"} if carriers else set())


# The host.


def called(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Launches of the window's form from now on, which a launch takes wherever it has maps: a stand-in's arguments."""
    module, pick, calls = module_of(spec), launch.pick, list[tuple[Any, ...]]()

    def specialised(tiles: launch.Tiles, x: Tensor, by_maps: bool = True) -> Config:
        return FORM if by_maps and tiles.kernel == "window_fwd" else pick(tiles, x, by_maps)

    monkeypatch.setattr(launch, "_can_map", lambda x: x.data_ptr() % 16 == 0)  # a GPU has none of float32
    monkeypatch.setattr(launch, "pick", specialised)
    monkeypatch.setattr(module, "_window_specialised", lambda *given: calls.append(given))
    return calls


def given(spec: dict[str, Any], tokens: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """q, k, v, the other terms, gates: two sequences."""
    q, k, v, gates = make_inputs(spec, 2, tokens, dtype, device, seed=tokens)
    g = torch.Generator().manual_seed(tokens)
    heads, terms = spec["heads"], len(spec["branches"]) - 1
    others = [torch.randn(2, tokens, heads["query"], heads["v_dim"], generator=g).to(q) for _ in range(terms)]
    assert gates is not None
    return (*(x.detach() for x in (q, k, v)), *others, gates.detach())


@pytest.fixture(params=["kernels", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels, in the interpreter if there is no GPU, or torch."""
    if request.param == "torch":
        monkeypatch.setattr(launch, "use_kernels", lambda _: False)
    return request.param


@pytest.mark.parametrize("spec", [NSA, MIXED, SWAPPED], ids=["three", "mixed", "swapped"])
def test_without_the_form_it_is_the_forward_and_a_pass(spec: dict[str, Any], path: str, device: str) -> None:
    module, own = module_of(spec), list(spec["branches"]).index("window")
    for tokens in (1, 13):
        q, k, v, *others, gates = given(spec, tokens, device)
        out, lse, whole = module._window_combined(q, k, v, *others, gates, None, 0.3)
        alone, alone_lse = module._window_forward(q, k, v, None, 0.3)
        terms = [*others[:own], alone, *others[own:]]
        assert torch.equal(out, alone) and torch.equal(lse, alone_lse)
        assert torch.equal(whole, module._combine(*terms, gates))
        want = sum(gates[..., i, None].double() * x.double() for i, x in enumerate(terms))
        torch.testing.assert_close(whole.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, device: str) -> None:
    """float64 goes through torch, gates keep their own dtype."""
    module = module_of(NSA)
    *operands, gates = given(NSA, 9, device, dtype)
    out, lse, whole = module._window_combined(*operands, gates.float(), None, 0.3)
    assert (out.dtype, lse.dtype, whole.dtype) == (dtype, launch.statistics(out), dtype)
    assert torch.equal(whole, module._combine(*operands[3:], out, gates.float()))


def test_of_packed_sequences_too(path: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No launch of them brings tensor maps, so that none takes the form."""
    module, calls = module_of(NSA), called(NSA, monkeypatch)
    *operands, gates = (x[:1] for x in given(NSA, 13, device))
    cu = torch.tensor([0, 4, 13], dtype=torch.int32, device=device)
    out, lse, whole = module._window_combined(*operands, gates, cu, 0.3)
    alone, alone_lse = module._window_forward(*operands[:3], cu, 0.3)
    assert torch.equal(out, alone) and torch.equal(lse, alone_lse)
    assert torch.equal(whole, module._combine(*operands[3:], alone, gates))
    assert calls == []


@pytest.mark.parametrize("spec", [NSA, MIXED, SWAPPED], ids=["three", "mixed", "swapped"])
def test_with_the_form_it_is_one_launch(spec: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = module_of(spec), called(spec, monkeypatch)
    monkeypatch.setattr(module, "_combine", None)
    q, k, v, *others, gates = given(spec, 13, device)
    out, lse, whole = module._window_combined(q, k, v, *others, gates, None, 0.3)
    (((c, *operands), beside),) = [(call[:-1], call[-1]) for call in calls]
    assert c is FORM
    for a, b in zip((*operands[:-1], *beside), (q, k, v, out, lse, *others, gates, whole), strict=True):
        assert a is b
    assert operands[-1] == 0.3
    assert out.shape == whole.shape == (2, 13, 4, 16) and lse.shape == (2, 13, 4)
    assert out.dtype == whole.dtype == q.dtype and lse.dtype == torch.float32
    assert all(x.is_contiguous() for x in (out, lse, whole)) and out.data_ptr() != whole.data_ptr()


def test_alone_it_has_nothing_beside(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = module_of(NSA), called(NSA, monkeypatch)
    q, k, v, *_ = given(NSA, 13, device)
    module._window_forward(q, k, v, None, 0.3)
    assert [len(call) for call in calls] == [len((FORM, q, k, v, "out", "lse", "scale"))]
    beside = re.search(r"def _window_specialised\(.*, beside=\((.*)\)\):", built(NSA).source)
    assert beside and beside[1] == "None, None, None, None"


def unaligned(x: Tensor) -> Tensor:
    """The same in memory that 16 bytes do not divide."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def test_keys_without_maps_are_not_copied_by_a_warp(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = module_of(NSA), called(NSA, monkeypatch)
    q, k, v, *others, gates = given(NSA, 13, device)
    out, _, whole = module._window_combined(q, unaligned(k), v, *others, gates, None, 0.3)
    assert calls == []
    assert torch.equal(whole, module._combine(*others, out, gates))


@pytest.mark.parametrize("op", ["_attention", "_attention_lean"])
def test_the_ops_return_what_their_parts_do(op: str, path: str, device: str) -> None:
    module = module_of(NSA)
    q, k, v, *_, gates = given(NSA, 11, device)
    k_cmp, v_cmp = module.Compressor(device=device)(k, v)
    got = getattr(module, op)(q, k_cmp, v_cmp, k, v, gates, None, 0.3)
    first, lse, rest = module._compressed_forward(q, k_cmp, v_cmp, None, 0.3)
    blocks = module._select(q, k_cmp, lse, None, 0.3)
    second, last = module._selected_forward(q, k, v, blocks, None, 0.3), module._window_forward(q, k, v, None, 0.3)
    out = module._combine(first, second[0], last[0], gates)
    want = (out, blocks) if op == "_attention_lean" else (out, first, lse, rest, *second, *last, blocks)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# The forecast.


def combination(plan: Plan) -> tuple[Launch, Launch]:
    """The carrier's launch in the whole forward, and the combination's."""
    (op,) = (op for op in plan.ops if op.name == "attention")
    return op.launches[-2], op.launches[-1]


@pytest.mark.parametrize("tokens", [4096, 65536])
def test_a_share_of_its_time_where_it_rides(tokens: int) -> None:
    plan = built("nsa_128").plan
    carrier, combine = combination(plan)
    assert (carrier.kernel, combine.kernel) == ("window_fwd", "combine_fwd")
    first = forecast.first_choices(plan)
    assert first["window_fwd"].specialised
    plain = first | {"window_fwd": Tile(64, 64)}
    whole = forecast.seconds(combine, plan, tokens, first["combine_fwd"])
    assert whole > 0
    assert forecast.in_op(combine, plan, tokens, first) == pytest.approx(forecast.RIDING * whole)
    assert forecast.in_op(combine, plan, tokens, plain) == pytest.approx(whole)
    for tiles in (first, plain):
        alone = forecast.seconds(carrier, plan, tokens, tiles["window_fwd"])
        assert forecast.in_op(carrier, plan, tokens, tiles) == pytest.approx(alone)


def test_an_op_counts_the_share() -> None:
    plan = built("nsa_128").plan
    carrier, combine = combination(plan)
    ops, first = {op.name: op for op in plan.ops}, forecast.first_choices(plan)
    plain = first | {"window_fwd": Tile(64, 64)}
    gains = [forecast.of_op(ops["attention"], plan, 65536, t) for t in (plain, first)]
    pair = [sum(forecast.in_op(x, plan, 65536, t) for x in (carrier, combine)) for t in (plain, first)]
    assert gains[0] - gains[1] == pytest.approx(pair[0] - pair[1])
    assert gains[0] > gains[1]
    for name in ("window_attention", "attention_grad"):  # nothing rides there
        op = ops[name]
        parts = sum(forecast.seconds(x, plan, 1024, first[x.kernel]) for x in op.launches)
        assert sum(forecast.in_op(x, plan, 1024, first) for x in op.launches) == pytest.approx(parts)


# The tuner.


def profiled(spec: Spec, events: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], float]:
    """Milliseconds of a kernel by the tuner, where the profiler saw these events (kernel, µs)."""

    class Trace:
        def __init__(self, activities: list[Any]) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self) -> Trace:
            return self

        def __exit__(self, *_: object) -> None: ...

        def events(self) -> list[Any]:
            return [SimpleNamespace(name=name, device_time=us) for name, us in events]

    ran: list[int] = []
    measurer = tune_measure.GpuMeasurer.__new__(tune_measure.GpuMeasurer)
    measurer.module = module_of(spec)
    monkeypatch.setattr(torch.profiler, "profile", Trace)
    monkeypatch.setattr(measurer, "run", ran.append, raising=False)
    spent = measurer._profiled(2)
    assert ran == [2]
    return lambda kernel: spent[kernel]


def test_a_form_is_its_kernel_and_what_it_does_is_no_other_s(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [("compressed_fwd_specialised", 300.0), ("window_fwd_specialised", 420.0), ("window_dq", 90.0)]
    ms = profiled("nsa_128", events, monkeypatch)
    kernels = ("compressed_fwd", "window_fwd", "window_dq", "combine_fwd")
    assert [ms(k) for k in kernels] == pytest.approx([0.3, 0.42, 0.09, 0])


def test_a_form_that_does_not_combine_pays_for_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """In several launches, too; the other kernels are what they were."""
    events = [("compressed_fwd", 200.0), ("window_fwd", 500.0), ("combine_fwd", 100.0)]
    ms = profiled("nsa_128", [*events, ("combine_fwd", 20.0), ("window_fwd", 1.0)], monkeypatch)
    assert [ms(k) for k in ("compressed_fwd", "window_fwd", "combine_fwd")] == pytest.approx([0.2, 0.621, 0.12])


def test_a_kernel_that_was_not_seen_is_not_seen_with_what_it_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    assert profiled("nsa_128", [("compressed_fwd", 200.0)], monkeypatch)("window_fwd") == 0


def test_where_nothing_is_carried_nothing_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    ms = profiled(SINKS, [("window_fwd", 500.0), ("combine_fwd", 100.0)], monkeypatch)
    assert [ms("window_fwd"), ms("combine_fwd")] == pytest.approx([0.5, 0.1])


def test_what_is_carried_is_no_subject_of_its_own() -> None:
    """It has one configuration: a round would find no launch of it beside a form that does its work."""
    for spec in sorted(api.ready_specs()):
        tables = module_of(spec)._CONFIGS
        for carried in {t.carries for t in tables.values()} - {None, "unite_lists", "order_keys"}:  # of no module's
            assert all(len(configs) == 1 for configs in tables[carried].configs.values())

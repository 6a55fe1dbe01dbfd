"""The IR is real: no target text in it, every field read, every pass felt, and broken ones rejected by the verifier."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nsagen import api
from nsagen.compiler import Stage, compile_spec, lower
from nsagen.errors import IRError, NsagenError
from nsagen.ir import graph as graph_module
from nsagen.ir import plan as plan_module
from nsagen.ir.graph import Attend, AttendGrad, CombineGrad, Graph, KeyAxis, Piece, Pool, Select
from nsagen.ir.plan import BN, BT, FACTS, Choice, Cut, Guard, Kernel, Launch, Mask, Op, Plan, Segment, TileConfig, Walk
from nsagen.ir.text import dump
from nsagen.ir.verify import ORDER, verify
from nsagen.passes.pipeline import Pipeline
from nsagen.sym import KEY, AtLeast, Interval, const, count, le, symbol

PACKAGE = Path(graph_module.__file__).parents[1]
READY = sorted(api.ready_specs())
LEVELS = (graph_module, plan_module)


@cache
def stages(name: str) -> tuple[Stage, ...]:
    return lower(api.read(name))


def ir_after(name: str, stage: str) -> Any:
    return next(s.ir for s in stages(name) if s.name == stage)


def test_the_stages_of_every_ready_spec_pass_the_verifier() -> None:
    for stage in (s for name in READY for s in stages(name)):
        verify(stage.ir, stage.name)


# --- (a) no target text

IDENTIFIER = re.compile(r"[A-Za-z_0-9' ]*")
PROSE = {"Pool.because", "Choice.because", "Choice.what", "Walk.refused", "TileConfig.dropped"}
TARGET_TEXT = ("tl.", "torch", "triton", "[", "def ", "==", "import")


def strings(x: object, where: str = "") -> Iterator[tuple[str, str]]:
    """(Class.field, string) of everything under x."""
    if isinstance(x, str):
        yield where, x
    elif is_dataclass(x):
        for f in fields(x):
            yield from strings(getattr(x, f.name), f"{type(x).__name__}.{f.name}")
    elif isinstance(x, (tuple, list, dict, set, frozenset)):
        assert isinstance(x, tuple), f"{where} is not immutable"
        for item in x:
            yield from strings(item, where)


@pytest.mark.parametrize("spec", READY)
def test_no_field_holds_target_text(spec: str) -> None:
    found = {pair for s in stages(spec) for pair in strings(s.ir)}
    names = {(where, text) for where, text in found if where not in PROSE}
    assert not {(where, text) for where, text in names if not IDENTIFIER.fullmatch(text)}
    assert not {(where, text) for where, text in found if any(bad in text for bad in TARGET_TEXT)}


# --- (b) every field is read


def loads(paths: list[Path]) -> set[str]:
    """Names of the attributes that the files read."""
    nodes = (n for p in paths for n in ast.walk(ast.parse(p.read_text())))
    return {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def dataclasses_of(module: ModuleType) -> list[type]:
    return [c for c in vars(module).values() if is_dataclass(c) and c.__module__ == module.__name__]


@pytest.mark.parametrize("module", LEVELS, ids=("graph", "plan"))
def test_every_field_is_read_by_a_pass_or_the_verifier(module: ModuleType) -> None:
    read = loads([*PACKAGE.glob("passes/*.py"), PACKAGE / "ir" / "verify.py"])
    missing = [f"{c.__name__}.{f.name}" for c in dataclasses_of(module) for f in fields(c) if f.name not in read]
    assert not missing, missing


@pytest.mark.parametrize("module", LEVELS, ids=("graph", "plan"))
def test_every_dataclass_is_frozen(module: ModuleType) -> None:
    assert all(c.__dataclass_params__.frozen for c in dataclasses_of(module))  # type: ignore[attr-defined]


# --- (c) taking out any pass shows


@dataclass(frozen=True)
class Nothing:
    """In the place of a pass: returns what it got."""

    name: str

    def run(self, ir: Any) -> Any:
        return ir


def texts(pipeline: Pipeline | None, spec: str) -> dict[str, str]:
    return {s.name: s.text for s in lower(api.read(spec), pipeline)}


def test_without_fold_positions_a_dump_changes_and_nothing_is_rendered() -> None:
    without = replace(Pipeline(), fold_positions=Nothing("fold_positions"))  # type: ignore[arg-type]
    assert texts(without, "tiny")["fold_positions"] != ir_text("tiny", "fold_positions")
    with pytest.raises(NsagenError, match="not folded"):
        compile_spec(api.read("tiny"), without)


@pytest.mark.parametrize("spec", ["nsa_128", "tiny"])
@pytest.mark.parametrize("name", ["derive_weights", "derive_bounds", "split_loops", "choose_tiles", "place_accesses"])
def test_taking_out_a_pass_changes_a_dump_or_is_refused(name: str, spec: str) -> None:
    without = replace(Pipeline(), **{name: Nothing(name)})
    try:
        changed = texts(without, spec)
    except NsagenError:
        return
    assert changed[name] != ir_text(spec, name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("derive_bounds", "has no bounds"),
        ("split_loops", "has no segments"),
        ("choose_tiles", "head dims are not split in parts"),
        ("place_accesses", "every operand has one access"),
    ],
)
def test_the_verifier_says_what_a_pass_left_out_owes(name: str, says: str) -> None:
    with pytest.raises(IRError, match=says):
        lower(api.read("nsa_128"), replace(Pipeline(), **{name: Nothing(name)}))


def test_without_differentiate_there_is_no_plan() -> None:
    with pytest.raises(NsagenError, match="needs a differentiated graph"):
        lower(api.read("nsa_128"), replace(Pipeline(), differentiate=Nothing("differentiate")))  # type: ignore[arg-type]


def ir_text(spec: str, stage: str) -> str:
    return dump(ir_after(spec, stage))


@pytest.mark.parametrize("spec", READY)
@pytest.mark.parametrize(("before", "name"), [("lower", "differentiate"), ("derive_weights", "choose_strategy")])
def test_a_pass_that_changes_the_level_or_the_graph_shows(spec: str, before: str, name: str) -> None:
    assert ir_text(spec, name) != ir_text(spec, before)


@pytest.mark.parametrize("spec", READY)
@pytest.mark.parametrize("name", ["derive_bounds", "split_loops", "choose_tiles", "place_accesses"])
def test_every_pass_over_the_plan_shows(spec: str, name: str) -> None:
    earlier = [s.name for s in stages(spec)]
    assert ir_text(spec, name) != ir_text(spec, earlier[earlier.index(name) - 1])


# --- (d) broken graphs

Break = Callable[[Any], Any]


def node(kind: type, change: Callable[[Any], Any], branch: str | None = None) -> Break:
    """A break of the first node of the kind (and branch)."""

    def broken(graph: Graph) -> Graph:
        hit = next(n for n in graph.nodes if isinstance(n, kind) and branch in (None, getattr(n, "branch", None)))
        return replace(graph, nodes=tuple(change(n) if n is hit else n for n in graph.nodes))

    return broken


def changed(**changes: Any) -> Callable[[Any], Any]:
    return lambda x: replace(x, **changes)


def source(branch: str, change: Callable[[Any], Any]) -> Break:
    return node(Attend, lambda n: replace(n, sources=tuple(map(change, n.sources))), branch)


def value(name: str, **changes: Any) -> Break:
    return lambda g: replace(g, values=tuple(replace(v, **changes) if v.name == name else v for v in g.values))


def undeclared(name: str) -> Break:
    return lambda g: replace(g, values=tuple(v for v in g.values if v.name != name))


def axis(block: int, stride: int) -> KeyAxis:
    return KeyAxis("compressed", block, stride)


STRANGE = Piece("strange", (AtLeast(symbol("x") - KEY),))
BROKEN_GRAPHS: list[tuple[str, Break]] = [
    ("%k_cmp is read before it is defined", lambda g: replace(g, nodes=(*g.nodes[1:], g.nodes[0]))),
    ("%k_cmp is defined twice", lambda g: replace(g, nodes=(g.nodes[0], *g.nodes))),
    ("%k_cmp is not declared", undeclared("k_cmp")),
    ("%d_out is not declared", undeclared("d_out")),
    ("a value is declared twice", lambda g: replace(g, values=(*g.values, g.values[0]))),
    ("KV heads do not divide query heads", lambda g: replace(g, heads=replace(g.heads, kv=3))),
    ("return %nowhere: is not defined", changed(output="nowhere")),
    ("saved %nowhere: is not defined", changed(saved=("nowhere",))),
    ("a gradient's axes or dtype differ", value("dk_cmp", axes=("B", "T", "Hkv", "Dqk"))),
    ("a gradient's axes or dtype differ", value("d_gates", dtype="float32")),
    ("d = 5 must divide l = 32", node(Pool, changed(axis=axis(32, 5)))),
    ("mean pooling has no positions", node(Pool, changed(positions=True))),
    ("an attention has a branch name", node(Attend, changed(branch=""))),
    ("piece strange speaks of ['x']", source("window", changed(pieces=(STRANGE,)))),
    ("a source has at least one piece", source("window", changed(pieces=()))),
    ("keys and values lie on the source's axis", source("window", changed(axis=axis(32, 16)))),
    ("a list of nothing", source("selected", lambda s: replace(s, listed=replace(s.listed, count=0)))),
    ("a list names blocks of tokens", source("selected", lambda s: replace(s, listed=replace(s.listed, blocks="q")))),
    ("blocks are int32", value("blocks", dtype="float32")),
    ("too many forced blocks", node(Select, changed(initial=15))),
    ("needs d <= l <= l'", node(Select, changed(size=16))),
    ("weights miss tokens", node(Select, changed(weights=(1, 2, 2, 2, 2)))),
    ("one weight for each block that overlaps", node(Select, changed(weights=(1, 2, 2, 2)))),
    ("one delta and one rest, or none, a term", node(CombineGrad, lambda n: replace(n, deltas=n.deltas[:2]))),
    ("one shift a gated term", node(CombineGrad, lambda n: replace(n, shifts=n.shifts[:2]))),
    ("one lse a term", node(CombineGrad, lambda n: replace(n, lses=n.lses[:2]))),
    ("gates and their gradient come together", node(CombineGrad, changed(d_gates=None))),
    ("%nothing is not declared", node(AttendGrad, changed(delta="nothing"))),
    ("defines a value twice itself", node(AttendGrad, lambda n: replace(n, dv=n.dk))),
]


def named(cases: list[tuple[str, Break]]) -> list[Any]:
    return [pytest.param(says, broken, id=f"{i}-{says[:40]}") for i, (says, broken) in enumerate(cases)]


@pytest.mark.parametrize(("says", "broken"), named(BROKEN_GRAPHS))
def test_a_broken_graph_is_rejected(says: str, broken: Break) -> None:
    with pytest.raises(IRError, match=re.escape(says)):
        verify(broken(ir_after("nsa_128", "derive_weights")), "derive_weights")


# --- (d) broken plans


def kernel(name: str, change: Callable[[Kernel], Kernel]) -> Break:
    return lambda p: replace(p, kernels=tuple(change(k) if k.name == name else k for k in p.kernels))


def walk(name: str, change: Callable[[Walk], Walk]) -> Break:
    return kernel(name, lambda k: replace(k, walks=tuple(map(change, k.walks))))


def segments(change: Callable[[Segment], Segment], name: str) -> Break:
    return walk(
        "window_fwd",
        lambda w: replace(w, segments=tuple(change(s) if s.name == name else s for s in w.segments)),
    )


def grid(name: str, **changes: Any) -> Break:
    return kernel(name, lambda k: replace(k, grid=replace(k.grid, **changes)))


def operand(of: str, name: str, **changes: Any) -> Break:
    return kernel(
        of, lambda k: replace(k, operands=tuple(replace(o, **changes) if o.name == name else o for o in k.operands))
    )


def access(of: str, name: str, **changes: Any) -> Break:
    return kernel(
        of, lambda k: replace(k, accesses=tuple(replace(a, **changes) if a.operand == name else a for a in k.accesses))
    )


def tiles(change: Callable[[tuple[TileConfig, ...]], tuple[TileConfig, ...]]) -> Break:
    def broken(k: Kernel) -> Kernel:
        return replace(k, tiles=tuple(replace(t, configs=change(t.configs)) for t in k.tiles))

    return kernel("window_fwd", broken)


def best(**changes: Any) -> Break:
    return tiles(lambda configs: (replace(configs[0], **changes), *configs[1:]))


def op(name: str, change: Callable[[Op], Op]) -> Break:
    return lambda p: replace(p, ops=tuple(change(o) if o.name == name else o for o in p.ops))


def launch(of: str, change: Callable[[Launch], Launch]) -> Break:
    """A break of the op's last launch."""
    return op(of, lambda o: replace(o, launches=(*o.launches[:-1], change(o.launches[-1]))))


def bind(name: str, to: str) -> Callable[[Launch], Launch]:
    return lambda x: replace(x, binds=(*(b for b in x.binds if b[0] != name), (name, to)))


def buffer(name: str, **changes: Any) -> Break:
    return lambda p: replace(p, buffers=tuple(replace(b, **changes) if b.name == name else b for b in p.buffers))


CAUSAL = Mask(le(KEY, symbol("t")), (), extent=False)
LENGTHS = Mask(AtLeast(count("T") - KEY), (), extent=False)
UNKNOWN = Mask(AtLeast(symbol("x") - KEY), (), extent=True)
PART, GRAD = "window_attention", "window_attention_grad"
BROKEN_PLANS: list[tuple[str, Break]] = [
    ("two kernels share a name", lambda p: replace(p, kernels=(*p.kernels, p.kernels[0]))),
    ("buffer %q: one size an axis", buffer("q", axes=("B",))),
    ("buffer %d_gates: cannot be saved", buffer("d_gates", kind="saved")),
    ("buffer %q: speaks of ['x']", buffer("q", shape=(count("x"),) * 4)),
    ("gradients are named so", op(PART, changed(doc="part_grad"))),
    ("output %parts is never written", op(PART, changed(outputs=("parts",)))),
    ("launches nothing, which is not there", launch(PART, changed(kernel="nothing"))),
    ("operands ['q'] are not bound", launch(PART, lambda x: replace(x, binds=x.binds[1:]))),
    ("no operand ['mask']", launch(PART, bind("mask", "q"))),
    ("%nowhere is not declared", launch(PART, bind("q", "nowhere"))),
    ("%scores is read before it is written", launch(PART, bind("q", "scores"))),
    ("%delta_window is read before it is written", op(GRAD, lambda o: replace(o, launches=o.launches[1:]))),
    ("%dk_window is read before it is written", launch(GRAD, changed(accumulate=True))),
    ("decode_merge rides on decode_scores, which is not the launch", launch("decode", changed(rides="decode_scores"))),
    ("host loops run over chunks", launch(PART, changed(over="rows"))),
    ("guard on ['mode'] compares with nothing", launch(PART, changed(when=(Guard("mode", "is", ""),)))),
    (
        "nothing says that it is there",
        op(GRAD, lambda o: replace(o, launches=tuple(replace(x, when=()) for x in o.launches))),
    ),
    ("a choice has no reason", kernel("window_fwd", changed(choices=()))),
    ("a choice has no reason", kernel("window_fwd", changed(choices=(Choice("query_major", ""),)))),
    ("a kernel over flat rows walks nothing", grid("window_fwd", axis=None)),
    ("the grid steps by a tile size", grid("window_fwd", step=count("T"))),
    ("tiles run up or down", grid("window_fwd", order="sideways")),
    ("attention kernels belong to a branch", kernel("window_fwd", changed(branch=""))),
    ("selection kernels say what they select", kernel("select_best", changed(select=None))),
    ("unknown facts ('the moon is full',)", kernel("window_fwd", changed(facts=("the moon is full",)))),
    ("'out', 'v'] cannot lie on key rows", operand("window_fwd", "out", rows="key")),
    ("lists name blocks of tokens", walk("selected_fwd", changed(axis=axis(32, 16)))),
    ("source 7 has no keys among the operands", walk("window_fwd", changed(source=7))),
    ("only a key tile walks the queries", walk("window_fwd", changed(direction="reverse"))),
    ("has no bounds", walk("window_fwd", changed(some=None))),
    ("either an all-range or the reason for none", walk("window_fwd", changed(all=None))),
    ("either an all-range or the reason for none", walk("window_fwd", changed(refused="tired"))),
    ("speaks of ['x']", walk("window_fwd", changed(some=Interval(const(0), count("x"))))),
    ("has no segments", walk("window_fwd", changed(segments=()))),
    ("segments lo and hi leave a gap", walk("window_fwd", lambda w: replace(w, segments=w.segments[::2]))),
    ("cut c9: speaks of ['t0']", walk("window_fwd", lambda w: replace(w, cuts=(*w.cuts, Cut("c9", count("t0")))))),
    ("cut c1: speaks of", walk("window_fwd", lambda w: replace(w, cuts=w.cuts[2:]))),
    ("seg lo: speaks of ['x']", segments(changed(lo=count("x")), "lo")),
    ("the middle has no mask", segments(changed(masks=(CAUSAL,)), "mid")),
    ("a mask speaks of query and key", segments(changed(masks=(UNKNOWN,)), "hi")),
    ("only an extent speaks of lengths", segments(changed(masks=(LENGTHS,)), "hi")),
    ("seg hi: speaks of ['T']", segments(changed(masks=(replace(CAUSAL, unless=(count("T") - BN - BT,)),)), "hi")),
    ("head dims are not split in parts", kernel("window_fwd", changed(qk_parts=()))),
    ("head dims are not split in parts", kernel("window_fwd", changed(v_parts=()))),
    ("candidates are not ranked", tiles(lambda configs: configs[::-1])),
    ("candidates are not ranked", best(cost=1e9)),
    ("no candidate fits", tiles(lambda configs: ())),
    ("no candidate fits", tiles(lambda configs: tuple(replace(c, dropped="no") for c in configs))),
    ("impossible candidate", best(warps=3)),
    ("cannot run and was not dropped", best(registers=0)),
    ("another candidate that does not spill", best(spills=8)),
    ("every operand has one access", kernel("window_fwd", lambda k: replace(k, accesses=k.accesses[1:]))),
    ("the caller's strides need 64-bit offsets", access("window_fwd", "k", bits=32)),
    ("an unguarded store", access("window_fwd", "out", guard="segment")),
    ("no launch binds it", access("window_fwd", "q", buffers=())),
    ("access q: speaks of ['T']", access("window_fwd", "q", base=count("T"))),
]


@pytest.mark.parametrize(("says", "broken"), named(BROKEN_PLANS))
def test_a_broken_plan_is_rejected(says: str, broken: Break) -> None:
    with pytest.raises(IRError, match=re.escape(says)):
        verify(broken(ir_after("nsa_128", "place_accesses")), "place_accesses")


def test_an_error_names_the_kernel_and_the_walk() -> None:
    broken = walk("window_fwd", changed(some=None))
    with pytest.raises(IRError, match=r"^kernel window_fwd: walk window: has no bounds"):
        verify(broken(ir_after("nsa_128", "place_accesses")), "place_accesses")


def test_what_a_pass_owes_is_not_asked_for_before_it() -> None:
    plan: Plan = ir_after("nsa_128", "choose_strategy")
    assert all(w.some is None and not w.segments for k in plan.kernels for w in k.walks)
    verify(plan, "choose_strategy")
    for stage in ORDER[1:]:
        with pytest.raises(IRError):
            verify(plan, stage)


def test_every_fact_is_known_and_explained() -> None:
    used = {f for name in READY for k in ir_after(name, "place_accesses").kernels for f in k.facts}
    assert used <= FACTS.keys()
    assert all(FACTS.values())

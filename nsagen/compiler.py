"""spec -> graph -> passes -> text. Layer 5: no torch, no GPU."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from nsagen.ir.graph import Graph
from nsagen.ir.plan import Plan
from nsagen.ir.text import dump
from nsagen.ir.verify import verify
from nsagen.passes.pipeline import Pipeline
from nsagen.render.module import render_module
from nsagen.spec import Spec
from nsagen.spec.lower import lower_spec

RUNTIME_VERSION = 22  # of the nsagen.runtime that the templates call; runtime/version.py says which it is


@dataclass(frozen=True)
class Stage:
    """The IR after one pass."""

    name: str
    ir: Graph | Plan
    seconds: float

    @property
    def text(self) -> str:
        return dump(self.ir)


@dataclass(frozen=True)
class Compiled:
    """A spec with all that was made of it."""

    spec: Spec
    stages: tuple[Stage, ...]
    graph: Graph  # differentiated
    plan: Plan
    source: str  # the module's text
    digest: str


def lower(spec: Spec, pipeline: Pipeline | None = None) -> tuple[Stage, ...]:
    """The IR after every pass, each one verified."""
    stages: list[Stage] = []
    clock = [time.perf_counter()]

    def hook(name: str, ir: Graph | Plan) -> None:
        verify(ir, name)
        stages.append(Stage(name, ir, time.perf_counter() - clock[0]))
        clock[0] = time.perf_counter()

    (pipeline or Pipeline()).run(lower_spec(spec), hook)
    return tuple(stages)


def compile_spec(spec: Spec, pipeline: Pipeline | None = None) -> Compiled:
    """Compile a spec to the text of its module. Raises SpecError, Refused or IRError."""
    stages = lower(spec, pipeline)
    graph = next(s.ir for s in stages if s.name == "derive_weights")
    plan = stages[-1].ir
    assert isinstance(graph, Graph) and isinstance(plan, Plan)
    digest, source = _render(spec, graph, plan)
    return Compiled(spec, stages, graph, plan, source, digest)


def standalone_source(compiled: Compiled) -> str:
    """The module's text with what it uses of nsagen.runtime in it. Its digest, and so its ops' names, are its own."""
    return _render(compiled.spec, compiled.graph, compiled.plan, standalone=True)[1]


def _render(spec: Spec, graph: Graph, plan: Plan, standalone: bool = False) -> tuple[str, str]:
    """(digest, text): the digest is the hash of the text itself, with a blank in its own place."""
    blank = "0" * 12
    text = render_module(spec.to_dict(), graph, plan, blank, RUNTIME_VERSION, standalone)
    digest = hashlib.sha256(text.encode()).hexdigest()[: len(blank)]
    return digest, text.replace(blank, digest)

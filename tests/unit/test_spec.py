"""Specs: every rule with its place and its way out, all of them at once; defaults, new kinds, the schema.

In the tables below «…» marks where the caret of a diagnostic must stand: line, column and end column are read off it.
"""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from nsagen.errors import Diagnostic, Span, SpecError
from nsagen.spec import (
    BranchKind,
    Options,
    json_schema,
    kind,
    kinds,
    load_spec,
    parse_spec,
    register,
    spec_from_dict,
    unregister,
)  # fmt: skip
from nsagen.spec.rules import Checked, Problem, rule

ROOT = Path(__file__).resolve().parents[2]
HEADS = "heads: {query: 4, kv: 2, qk_dim: 16}\n"
WINDOW = "branches: {window: {}}\n"
INTEGER = 'integers are written plain: 64, not "64", 64.0 or true'
SCORES = "add a compressed branch, or from: pooled | caller"
GROUPS = "every KV head serves the same number of query heads"
MARK = re.compile("«(.*?)»")


def places(marked: str) -> tuple[str, list[tuple[int, int, int]]]:
    """The text without its marks, and (line, column, end column) of each."""
    found = []
    lines = marked.split("\n")
    for number, line in enumerate(lines, 1):
        while mark := MARK.search(line):
            found.append((number, mark.start() + 1, mark.start() + 1 + max(1, len(mark[1]))))
            line = line[: mark.start()] + mark[1] + line[mark.end() :]
        lines[number - 1] = line
    return "\n".join(lines), found


def diagnostics(text: str) -> tuple[Diagnostic, ...]:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "f.yaml")
    return caught.value.diagnostics


def at(diagnostic: Diagnostic) -> tuple[int, int, int]:
    assert diagnostic.span is not None
    assert diagnostic.span.file == "f.yaml"
    return diagnostic.span.line, diagnostic.span.column, diagnostic.span.end_column


def heads(options: str) -> str:
    return f"name: a\nheads: {{{options}}}\n{WINDOW}"


def branches(options: str, more: str = "") -> str:
    return f"name: a\n{HEADS}branches: {{{options}}}\n{more}"


def named(name: str) -> str:
    return f"name: «{name}»\n{HEADS}{WINDOW}"


TYPES = [
    (heads("query: «true», kv: 2, qk_dim: 16"), "query must be an integer, not true", INTEGER),
    (heads('query: 4, kv: «"64"», qk_dim: 16'), "kv must be an integer, not '64'", INTEGER),
    (heads("query: 4, kv: 2, qk_dim: «64.0»"), "qk_dim must be an integer, not 64.0", INTEGER),
    (heads("query: 4, kv: 2, qk_dim: 16, v_dim: «3.5»"), "v_dim must be an integer, not 3.5", INTEGER),
    (branches("window: {size: «1e3»}"), "size must be an integer, not 1000.0", INTEGER),
    (branches("window: {size: «null»}"), "size must be an integer, not null", INTEGER),
    (branches("window: {size: «~»}"), "size must be an integer, not null", INTEGER),
    (branches("window: {sinks: «yes»}"), "sinks must be an integer, not 'yes'", INTEGER),
    (branches("window: {size: «0x10»}"), "size must be an integer, not '0x10'", INTEGER),
    (branches("window: {size: «010»}"), "size must be an integer, not '010'", INTEGER),
    (branches("window: {size: «[64]»}"), "size must be an integer, not [64]", INTEGER),
    (branches("window: {size: «{}»}"), "size must be an integer, not {}", INTEGER),
    (branches("compressed: {positions: «yes»}"), "positions must be true or false, not 'yes'", "give true or false"),
    (branches("compressed: {positions: «1»}"), "positions must be true or false, not 1", "give true or false"),
    (named("64"), "name must be a string, not 64", "give a string"),
    (named("null"), "name must be a string, not null", "give a string"),
    (f"name: a\nheads: «64»\n{WINDOW}", "heads must be a mapping, not 64", "give a mapping"),
    (f"name: a\nheads: «[1, 2]»\n{WINDOW}", "heads must be a mapping, not [1, 2]", "give a mapping"),
    (f"name: a\n{HEADS}branches: «[window]»\n", "branches must be a mapping, not ['window']", "give a mapping"),
    (f"name: a\n{HEADS}branches: «null»\n", "branches must be a mapping, not null", "give a mapping"),
    (branches("window: «512»"), "branch window takes a mapping of options, not 512", "write it as {size: …, sinks: …}"),
    (branches("window: «null»"), "branch window takes a mapping of options, not null", "{size: …, sinks: …}"),
]
RANGES = [
    (heads("query: «0», kv: 1, qk_dim: 16"), "query 0 is below 1", "use 1 or more"),
    (heads("query: «1025», kv: 1, qk_dim: 16"), "query 1025 is above 1024", "use 1024 or less"),
    (heads("query: 4, kv: «-1», qk_dim: 16"), "kv -1 is below 1", "use 1 or more"),
    (heads("query: 4, kv: 2, qk_dim: «8»"), "qk_dim 8 is below 16", "use 16 or more"),
    (heads("query: 4, kv: 2, qk_dim: «264»"), "qk_dim 264 is above 256", "use 256 or less"),
    (heads("query: 4, kv: 2, qk_dim: 16, v_dim: «-8»"), "v_dim -8 is below 16", "use 16 or more"),
    (branches("compressed: {block: «0»}"), "block 0 is below 1", "use 1 or more"),
    (branches("compressed: {block: «4097»}"), "block 4097 is above 4096", "use 4096 or less"),
    (branches("compressed: {stride: «0»}"), "stride 0 is below 1", "use 1 or more"),
    (branches("selected: {from: caller, top_n: «0»}"), "top_n 0 is below 1", "use 1 or more"),
    (branches("selected: {from: caller, top_n: «1025»}"), "top_n 1025 is above 1024", "use 1024 or less"),
    (branches("selected: {from: caller, initial: «-1»}"), "initial -1 is below 0", "use 0 or more"),
    (branches("selected: {from: caller, local: «-2»}"), "local -2 is below 0", "use 0 or more"),
    (branches("window: {size: «0»}"), "size 0 is below 1", "use 1 or more"),
    (branches("window: {size: «1048577»}"), "size 1048577 is above 1048576", "use 1048576 or less"),
    (branches("window: {sinks: «-1»}"), "sinks -1 is below 0", "use 0 or more"),
    (branches("window: {sinks: «4097»}"), "sinks 4097 is above 4096", "use 4096 or less"),
]
MULTIPLES = [
    (heads("query: 4, kv: 2, qk_dim: «20»"), "qk_dim 20 is no multiple of 8", "use 16 or 24"),
    (heads("query: 4, kv: 2, qk_dim: «3»"), "qk_dim 3 is no multiple of 8", "use 16"),
    (heads("query: 4, kv: 2, qk_dim: 16, v_dim: «300»"), "v_dim 300 is no multiple of 8", "use 256"),
]
CHOICES = [
    (branches("compressed: {pool: «mena»}"), "pool 'mena' is none of 'mean', 'weighted'", "did you mean mean?"),
    (branches("selected: {from: «caler»}"), "from 'caler' is none of", "did you mean caller?"),
    (
        branches("window: {}", "combine: «gatedsum»\n"),
        "combine 'gatedsum' is none of 'gated_sum'",
        "did you mean gated_sum?",
    ),
    (branches("window: {}", "kv: «own»\n"), "kv 'own' is none of 'per_branch' or 'shared'", "use one of them"),
    (branches("window: {}", "kv: «true»\n"), "kv true is none of", "use one of them"),
    (branches("window: {}", "combine: «[a]»\n"), "combine ['a'] is none of", "use one of them"),
]
NAMES = [
    (named("class"), "name 'class' is a Python keyword", "choose another; it becomes a module's name"),
    (named("match"), "name 'match' is a Python keyword", "choose another"),
    (named("json"), "name 'json' would hide the module json", "choose another"),
    (named("torch"), "name 'torch' would hide the module torch", "choose another"),
    (named("triton"), "name 'triton' would hide the module triton", "choose another"),
    (named("nsagen"), "name 'nsagen' would hide the module nsagen", "choose another"),
    (named("Nsa"), "name 'Nsa' is no module name", "lower case letters, digits and _, a letter first, 63 at most"),
    (named("_a"), "is no module name", "lower case letters"),
    (named("2nd"), "is no module name", "lower case letters"),
    (named("a-b"), "is no module name", "lower case letters"),
    (named("../up"), "is no module name", "lower case letters"),
    (named("café"), "is no module name", "lower case letters"),
    (named('"a\\n"'), r"name 'a\n' is no module name", "lower case letters"),
    (named('""'), "name '' is no module name", "lower case letters"),
    (named("a" * 64), "is no module name", "63 at most"),
]
GROUP = [
    (heads("query: 5, kv: «2», qk_dim: 16"), "kv 2 does not divide query 5 (kv | query)", GROUPS),
    (heads("query: 2, kv: «4», qk_dim: 16"), "kv 4 does not divide query 2 (kv | query)", GROUPS),
    (
        heads("query: 65, kv: «1», qk_dim: 16"),
        "a group of 65 query heads (query 65 / kv 1) passes 64",
        "use 5 KV heads",
    ),
    (heads("query: 130, kv: «2», qk_dim: 16"), "group of 65 query heads", "use 5 KV heads or more"),
]
BETWEEN = [
    ("divides", branches("compressed: {block: 30, stride: «16»}"), "stride 16 does not divide block 30 (d | l)",
     "use a stride of 3, 5, 6, 10, 15 or 30, or another block"),
    ("divides", branches("compressed: {block: «30»}"), "stride 16 does not divide block 30 (d | l)", "use a stride"),
    ("divides", branches("compressed: {stride: 16}, selected: {block: «40»}"),
     "stride 16 does not divide selected block 40 (d | l')", "use a selected block that is a multiple of 16"),
    ("divides", branches("selected: {}, compressed: {block: 48, stride: «24»}"),
     "stride 24 does not divide selected block 64 (d | l')", "a multiple of 24"),
    ("order", branches("compressed: {block: 64}, selected: {block: «32»}"),
     "compressed block 64 is longer than selected block 32 (l <= l')", "use a selected block of 64 or more"),
    ("order", branches("selected: {}, compressed: {block: «128»}"),
     "compressed block 128 is longer than selected block 64 (l <= l')", "use a selected block of 128 or more"),
    ("forced", branches("selected: {from: caller, top_n: «4», initial: 2, local: 3}"),
     "initial 2 + local 3 = 5 forced blocks, but top_n is 4 (initial + local <= n)", "raise it to 5 or more"),
    ("forced", branches("selected: {from: caller, initial: «20»}"),
     "initial 20 + local 2 = 22 forced blocks, but top_n is 16", "raise it to 22 or more"),
    ("positions", branches("compressed: {pool: mean, positions: «true»}"),
     "positions true with pool mean: a mean of positions is a constant", "remove positions, or use pool: mlp"),
    ("single", branches("window: {}, compressed: {}", "combine: «single»\n"),
     "combine single with 2 branches (window, compressed)", "single takes one branch: use gated_sum or one_softmax"),
    ("from", branches("selected: «{}»"), "selected does not say where its scores come from", SCORES),
    ("from", branches("selected: {from: «compressed»}, window: {}"), "from: compressed without a compressed", SCORES),
]  # fmt: skip
KEYS = [
    ("missing", f"«{HEADS[:-1]}»\n{WINDOW}", "`name` is missing", "add `name: …`"),
    ("missing", "«name: a»\nbranches: {window: {}}\n", "`heads` is missing", "add `heads: …`"),
    ("missing", f"«name: a»\n{HEADS}", "`branches` is missing", "add `branches: …`"),
    ("missing", f"name: a\n«heads»: {{kv: 2, qk_dim: 16}}\n{WINDOW}", "`query` is missing", "add `query: …`"),
    ("missing", f"name: a\n«heads»: {{query: 2, qk_dim: 16}}\n{WINDOW}", "`kv` is missing", "add `kv: …`"),
    ("missing", f"name: a\n«heads»: {{query: 2, kv: 2}}\n{WINDOW}", "`qk_dim` is missing", "add `qk_dim: …`"),
    ("unknown", branches("window: {}", "«combin»: single\n"), "unknown key `combin`", "did you mean `combine`?"),
    ("unknown", branches("window: {}", "«zzz»: 1\n"), "unknown key `zzz`",
     "known: name, heads, kv, branches, combine"),
    ("unknown", heads("query: 2, kv: 2, «qkdim»: 3, qk_dim: 16"), "unknown key `qkdim`", "did you mean `qk_dim`?"),
    ("unknown", branches("window: {«sise»: 4}"), "unknown key `sise`", "did you mean `size`?"),
    ("unknown", branches("window: {«w»: 4}"), "unknown key `w`", "known: size, sinks"),
    ("unknown", branches("compressed: {}, selected: {«scores»: pooled}"), "unknown key `scores`",
     "known: block, top_n, initial, local, from"),
    ("unknown", branches("«windw»: {}, window: {}"), "unknown branch kind `windw`", "did you mean `window`?"),
    ("unknown", branches("«moba»: {}"), "unknown branch kind `moba`", "known: compressed, selected, window"),
    ("empty", branches("")[:-3] + "«{}»\n", "branches is empty", "one or more of compressed, selected, window"),
]  # fmt: skip
CASES = [
    *(("type", *case) for case in TYPES), *(("range", *case) for case in RANGES),
    *(("multiple", *case) for case in MULTIPLES), *(("choice", *case) for case in CHOICES),
    *(("name", *case) for case in NAMES), *(("group", *case) for case in GROUP), *BETWEEN, *KEYS,
]  # fmt: skip


@pytest.mark.parametrize(("rule_id", "marked", "message", "hint"), CASES, ids=[f"{c[0]}-{c[2][:40]}" for c in CASES])
def test_one_broken_rule(rule_id, marked, message, hint):
    text, (place,) = places(marked)
    (found,) = diagnostics(text)
    assert found.rule == rule_id
    assert message in found.message
    assert hint in (found.hint or "")
    assert at(found) == place
    assert found.span is not None
    assert found.span.source == text.splitlines()[place[0] - 1]


ALL_AT_ONCE = """\
name: «import»
heads: {query: 5, kv: «2», qk_dim: «20», «vdim»: 16}
kv: «own»
branches:
  compressed: {block: 32, stride: «24», pool: «mena», positions: «1»}
  selected: {block: «28», top_n: «4», initial: 3, local: 2, from: compressed, «topn»: 4}
  «windw»: {}
  window: {size: «"512"», sinks: «-1»}
combine: «single»
«extra»: 1
"""


def test_all_errors_at_once_in_the_order_of_their_places():
    text, marks = places(ALL_AT_ONCE)
    found = diagnostics(text)
    twice = marks.index((6, 21, 23))  # block 28: d | l' and l <= l'
    assert [at(d) for d in found] == [*marks[:twice], marks[twice], *marks[twice:]]
    assert [d.rule for d in found] == [
        "name", "group", "multiple", "unknown", "choice", "divides", "choice", "type", "divides", "order", "forced",
        "unknown", "unknown", "type", "range", "single", "unknown",
    ]  # fmt: skip


BROKEN_BESIDE = [
    ("heads: query, kv", heads("query: 5, kv: «2», qk_dim: «no»"), ("group", "type")),
    ("heads: a key is missing", f"name: a\n«heads»: {{query: 5, kv: «2»}}\n{WINDOW}", ("missing", "group")),
    ("compressed: block, stride", branches("compressed: {block: 30, stride: «16», pool: «x»}"), ("divides", "choice")),
    ("compressed: mean", branches("compressed: {block: «x», pool: mean, positions: «true»}"), ("type", "positions")),
    ("selected: forced", branches("selected: {block: «0», from: caller, top_n: «2»}"), ("range", "forced")),
    ("across: selected is broken",
     branches("selected: {block: «24», top_n: «x»}, compressed: {block: 16, stride: 16}"), ("divides", "type")),
    ("across: compressed is broken",
     branches("selected: {block: «24»}, compressed: {block: 16, stride: 16, pool: «x»}"), ("divides", "choice")),
    ("across: a rule of compressed is broken",
     branches("selected: {block: «24»}, compressed: {block: 24, stride: «16»}"), ("divides", "divides")),
    ("across: block is broken, stride not",
     branches("selected: {block: «24»}, compressed: {block: «0», stride: 16}"), ("divides", "range")),
    ("selected without from", branches("selected: «{top_n: «99999»}»".replace("«{", "{").replace("}»", "}")),
     ("from", "range")),
    ("spec: name", f"name: «class»\nheads: {{query: «x», kv: 2, qk_dim: 16}}\n{WINDOW}", ("name", "type")),
    ("spec: single, a branch is broken",
     branches("window: {size: «0»}, compressed: {}", "combine: «single»\n"), ("range", "single")),
    ("spec: single, a branch is unknown",
     branches("«windw»: {}, compressed: {}", "combine: «single»\n"), ("unknown", "single")),
    ("spec: single, the name is broken",
     f"name: «A»\n{HEADS}branches: {{window: {{}}, compressed: {{}}}}\ncombine: «single»\n", ("name", "single")),
    ("spec: name, no branches", f"name: «class»\n{HEADS}branches: «{{}}»\n", ("name", "empty")),
]  # fmt: skip


@pytest.mark.parametrize(("marked", "rules"), [c[1:] for c in BROKEN_BESIDE], ids=[c[0] for c in BROKEN_BESIDE])
def test_rules_between_fields_hold_beside_broken_fields(marked, rules):
    text, marks = places(marked)
    found = diagnostics(text)
    assert tuple(d.rule for d in found) == rules
    assert {*marks} <= {at(d) for d in found}


NO_SPURIOUS = [
    ("a mean has no positions, whatever else is broken", branches("compressed: {pool: mean, block: «x»}"), "type"),
    ("v_dim is qk_dim's value", heads("query: 4, kv: 2, qk_dim: «20»"), "multiple"),
    ("no default stands for a failed value", branches("selected: {from: caller, top_n: 2, initial: «x»}"), "type"),
    ("no rule on an unknown choice", branches("selected: {from: «x», block: 1}, compressed: {}"), "choice"),
    ("one branch that is broken is one branch", branches("window: {size: «0»}", "combine: single\n"), "range"),
]


@pytest.mark.parametrize(("marked", "rule_id"), [c[1:] for c in NO_SPURIOUS], ids=[c[0] for c in NO_SPURIOUS])
def test_nothing_but_the_mistake(marked, rule_id):
    text, marks = places(marked)
    found = diagnostics(text)
    assert [(d.rule, at(d)) for d in found] == [(rule_id, place) for place in marks]


def test_empty_heads_are_said_once():
    assert [d.message for d in diagnostics(f"name: a\nheads: {{}}\n{WINDOW}")] == [
        "`query` is missing", "`kv` is missing", "`qk_dim` is missing",
    ]  # fmt: skip


def test_rendering():
    (diagnostic,) = diagnostics(heads("query: 4, kv: 3, qk_dim: 16"))
    assert diagnostic.render() == (
        "f.yaml:2:23: error: kv 3 does not divide query 4 (kv | query) [group]\n"
        "  heads: {query: 4, kv: 3, qk_dim: 16}\n"
        "                        ^\n"
        "  help: every KV head serves the same number of query heads"
    )
    assert diagnostic.render(caret=False).count("\n") == 1


@pytest.mark.parametrize(
    ("source", "column", "end", "shown", "carets"),
    [
        ("ab: cd", 5, 7, "  ab: cd", "      ^^"),
        ("a:\tcd", 4, 6, "  a: cd", "     ^^"),  # a tab takes one column
        ("日本: cd", 5, 7, "  日本: cd", "        ^^"),  # wide letters take two
        ("e\u0301: cd", 5, 7, "  e\u0301: cd", "     ^^"),  # a combining mark takes none
        ("नु: cd", 5, 7, "  नु: cd", "     ^^"),
        ("は\u3099: cd", 5, 7, "  は\u3099: cd", "      ^^"),
        ("\x1b[1m: x", 7, 8, "  ·[1m: x", "        ^"),
        ("a:", 3, 4, "  a:", "    ^"),
        ("x" * 500, 301, 303, "  …" + "x" * 160 + "…", " " * 83 + "^^"),
        ("x" * 500, 2, 501, "  " + "x" * 160 + "…", "   " + "^" * 159),
    ],
)
def test_the_caret_stands_under_its_place(source, column, end, shown, carets):
    lines = Diagnostic("r", "m", Span("f", 1, column, end, source)).render().split("\n")
    assert lines[1:] == [shown, carets]


def test_messages_are_one_printable_line():
    text = Diagnostic("r", "a\nb\x1b[31m\ud800", None, "c\r\nd").render()
    assert text == "error: a\\nb\\x1b[31m\\ud800 [r]\n  help: c\\r\\nd"
    assert max(map(len, Diagnostic("r", "m" * 9999, None, "h" * 9999).render().split("\n"))) < 300


def test_a_file_name_cannot_break_the_line():
    text = Diagnostic("r", "m", Span("a\n\x1b[31m\u202e\udcff.yaml", 1, 1, 2, "x")).render()
    assert text.split("\n")[0] == r"a\n\x1b[31m\u202e\udcff.yaml:1:1: error: m [r]"
    text.encode()


def test_an_error_crosses_processes():
    with pytest.raises(SpecError) as caught:
        parse_spec("name: 1\n")
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.diagnostics == caught.value.diagnostics
    assert str(again) == str(caught.value)


# Dicts


GOOD: dict[str, Any] = {"name": "a", "heads": {"query": 4, "kv": 2, "qk_dim": 16}, "branches": {"window": {}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": {"query": True, "kv": 2, "qk_dim": 16}}, "heads.query: query must be an integer, not true"),
        ({"heads": {"kv": 2, "qk_dim": 16, "query": 4.0}}, "heads.query: query must be an integer, not 4.0"),
        ({"heads": {"kv": 2, "qk_dim": 16}}, "heads.query: `query` is missing"),
        ({"heads": {"query": 5, "kv": 2, "qk_dim": 16}}, "heads.kv: kv 2 does not divide query 5"),
        ({"branches": {"window": {"sise": 1}}}, "branches.window.sise: unknown key `sise`"),
        ({"branches": {"windw": {}}}, "branches.windw: unknown branch kind `windw`"),
        ({"branches": {"selected": {}}}, "branches.selected: selected does not say"),
        ({"branches": {"window": {"size": 10**5000}}}, "branches.window.size: size such int is above 1048576"),
        ({"branches": {1: {}}}, "branches.1: unknown branch kind `1`"),
        ({"heads": {"query": 4, "kv": 2, "qk_dim": 10**5000 + 1}}, "heads.qk_dim: qk_dim such int is no multiple"),
        ({"kv": 10**5000}, "kv: kv such int is none of"),
        ({"name": b"a"}, "name: name must be a string"),
        ({"name": "x" * 99999}, "name: name 'xxx"),
        ({"heads": None}, "heads: heads must be a mapping, not null"),
        ({"k" * 99999: 1}, "kkk"),
    ],
)
def test_dict_errors_name_the_path(change, message):
    with pytest.raises(SpecError) as caught:
        spec_from_dict({**GOOD, **change})
    (found,) = caught.value.diagnostics
    assert found.span is None
    assert found.message.startswith(message)
    assert max(map(len, str(caught.value).split("\n"))) < 300


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_a_value_that_cannot_be_shown():
    with pytest.raises(SpecError, match="name: name must be a string, not such Odd"):
        spec_from_dict({**GOOD, "name": Odd()})


def test_dicts_that_are_none():
    for data in ([], "name: a", None, 1):
        with pytest.raises(SpecError, match="a spec is a mapping"):
            spec_from_dict(data)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match="`1` is given twice"):
        spec_from_dict({1: 1, "1": 2})  # pyright: ignore[reportArgumentType]


def test_bottomless_dicts():
    loop: dict[str, Any] = {}
    loop["a"] = loop
    endless: list[Any] = []
    for _ in range(10**5):
        endless = [endless]
    with pytest.raises(SpecError, match="nesting is deeper than 16"):
        spec_from_dict({**GOOD, "heads": loop})
    with pytest.raises(SpecError, match="heads: heads must be a mapping, not such list"):
        spec_from_dict({**GOOD, "heads": endless})
    while endless:  # or its destructor recurses
        endless = endless[0]


# Legal specs


def optional(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=strategies)


@st.composite
def legal(draw: st.DrawFn) -> dict[str, Any]:
    """A legal spec as people write it: defaults left out here and there, branches in any order."""
    group, kv = draw(st.integers(1, 64)), draw(st.integers(1, 16))
    dims = st.integers(2, 32).map(lambda n: 8 * n)
    names = draw(st.permutations(["compressed", "selected", "window"]))[: draw(st.integers(1, 3))]
    stride, factor = draw(st.integers(1, 16)), draw(st.integers(1, 4))
    block = stride * factor
    pool = draw(st.sampled_from(["mean", "weighted", "linear", "mlp"]))
    initial, local = draw(st.integers(0, 8)), draw(st.integers(0, 8))
    scores = draw(st.sampled_from(["pooled", "caller", *(["compressed"] if "compressed" in names else [])]))
    options = {
        "compressed": {"block": block, "stride": stride, "pool": pool}
        | draw(optional(positions=st.just(False) if pool == "mean" else st.booleans())),
        "selected": {"block": block * draw(st.integers(1, 4)), "initial": initial, "local": local, "from": scores}
        | {"top_n": max(1, initial + local) + draw(st.integers(0, 16))},
        "window": draw(optional(size=st.integers(1, 2**20), sinks=st.integers(0, 4096))),
    }
    combine = ["gated_sum", "one_softmax", *(["single"] if len(names) == 1 else [])]
    return {
        "name": draw(st.from_regex(r"[a-z][a-z0-9_]{0,57}_nsa", fullmatch=True)),
        "heads": {"query": group * kv, "kv": kv, "qk_dim": draw(dims)} | draw(optional(v_dim=dims)),
        "branches": {name: options[name] for name in names},
    } | draw(optional(kv=st.sampled_from(["per_branch", "shared"]), combine=st.sampled_from(combine)))


@given(legal())
def test_round_trip(data):
    spec = spec_from_dict(data)
    full = spec.to_dict()
    assert spec_from_dict(full) == spec
    assert json.loads(json.dumps(full)) == full
    assert parse_spec(json.dumps(full)) == spec  # JSON is YAML
    assert list(full) == ["name", "heads", "kv", "branches", "combine", "dense_below"]
    assert list(full["branches"]) == list(spec.branches) == list(data["branches"])
    assert full["heads"] == {"v_dim": data["heads"]["qk_dim"], **data["heads"]}
    assert full["kv"] == data.get("kv", "shared")
    assert full["combine"] == data.get("combine", "single" if len(data["branches"]) == 1 else "gated_sum")
    for name, options in data["branches"].items():
        assert options.items() <= full["branches"][name].items()
        assert set(full["branches"][name]) == {f.alias or n for n, f in kind(name).options.model_fields.items()}


def test_defaults():
    spec = parse_spec(branches("window: {}, selected: {}, compressed: {}"))
    assert spec.to_dict() == {
        "name": "a",
        "heads": {"query": 4, "kv": 2, "qk_dim": 16, "v_dim": 16},
        "kv": "shared",
        "branches": {
            "window": {"size": 512, "sinks": 0},
            "selected": {"block": 64, "top_n": 16, "initial": 1, "local": 2, "from": "compressed"},
            "compressed": {"block": 32, "stride": 16, "pool": "mlp", "positions": True},
        },
        "combine": "gated_sum",
        "dense_below": 0,
    }
    assert parse_spec(branches("compressed: {pool: mean}")).to_dict()["branches"]["compressed"]["positions"] is False
    assert spec.heads.group == 2


def test_specs_are_immutable():
    spec = spec_from_dict(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "b"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("path", sorted((ROOT / "specs").glob("*.yaml")), ids=lambda p: p.stem)
def test_ready_specs_load(path):
    spec = load_spec(path)
    assert spec.name == path.stem
    assert load_spec(str(path)) == spec_from_dict(spec.to_dict()) == spec


# A new kind


class Strided(Options):
    """Every d-th token."""

    stride: Annotated[int, Field(ge=4, le=30, multiple_of=4)] = Field(8, description="d")
    offset: Annotated[int, Field(gt=-1)] = 0
    decay: Annotated[float, Field(lt=1)] = 0.5
    order: Literal["near", "far"] = Field("near", alias="from")
    label: str = Field("a", pattern="^[a-z]+$")

    @rule("offset", "stride")
    def _offset_is_inside(self) -> Problem | None:
        if self.offset < self.stride:
            return None
        return Problem("inside", f"offset {self.offset} is not below stride {self.stride}", "use a smaller offset")


@pytest.fixture
def strided():
    registered = register(BranchKind("strided", Strided, lambda options, low: None, "every d-th token"))
    yield registered
    unregister("strided")


def test_a_new_kind_in_specs(strided):
    assert kind("strided") is strided
    assert list(kinds()) == ["compressed", "selected", "window", "strided"]
    spec = parse_spec(branches("strided: {stride: 12, offset: 3, from: far}, window: {}"))
    assert spec.to_dict()["branches"]["strided"] == {
        "stride": 12, "offset": 3, "decay": 0.5, "from": "far", "label": "a",
    }  # fmt: skip
    assert spec_from_dict(spec.to_dict()) == spec
    with pytest.raises(ValueError, match="'strided' is registered already"):
        register(strided)


@pytest.mark.parametrize(
    ("rule_id", "marked", "message", "hint"),
    [
        ("unknown", "«stridd»: {}", "unknown branch kind `stridd`", "did you mean `strided`?"),
        ("unknown", "strided: {«ofset»: 1}", "unknown key `ofset`", "did you mean `offset`?"),
        ("unknown", "strided: {«order»: far}", "unknown key `order`", "known: stride, offset, decay, from, label"),
        ("multiple", "strided: {stride: «30»}", "stride 30 is no multiple of 4", "use 28"),
        ("range", "strided: {stride: «0»}", "stride 0 is below 4", "use 4 or more"),
        ("range", "strided: {offset: «-1»}", "offset -1 is not above -1", "use more than -1"),
        ("range", "strided: {decay: «1.0»}", "decay 1.0 is not below 1", "use less than 1"),
        ("type", "strided: {decay: «x»}", "decay must be a number, not 'x'", "give a number"),
        ("type", "strided: {decay: «[.NaN]»}", "decay must be a number, not [nan]", "give a number"),
        ("choice", "strided: {from: «fra»}", "from 'fra' is none of 'near' or 'far'", "did you mean far?"),
        ("string_pattern_mismatch", "strided: {label: «A»}", "label 'A': String should match pattern", "nsagen schema"),
        ("inside", "strided: {offset: «9»}", "offset 9 is not below stride 8", "use a smaller offset"),
        ("type", "strided: «[]»", "branch strided takes a mapping of options, not []", "{stride: …, offset: …,"),
    ],
)
def test_a_new_kind_in_diagnostics(strided, rule_id, marked, message, hint):
    text, (place,) = places(branches(marked))
    (found,) = diagnostics(text)
    assert (found.rule, at(found)) == (rule_id, place)
    assert message in found.message
    assert hint in (found.hint or "")


def test_a_new_kind_in_the_schema_until_it_goes(strided):
    schema = json_schema()["properties"]["branches"]["properties"]["strided"]
    assert schema["description"] == "every d-th token"
    assert list(schema["properties"]) == ["stride", "offset", "decay", "from", "label"]
    assert schema["properties"]["stride"]["multipleOf"] == 4
    assert schema["additionalProperties"] is False


def test_an_unregistered_kind_is_unknown():
    assert list(kinds()) == ["compressed", "selected", "window"]
    (found,) = diagnostics(branches("strided: {}"))
    assert found.hint == "known: compressed, selected, window"
    assert "strided" not in json_schema()["properties"]["branches"]["properties"]
    with pytest.raises(KeyError):
        unregister("strided")


class Ramp(Checked):
    start: Annotated[int, Field(ge=1, multiple_of=2)] = 2
    end: int = Field(alias="until")

    @rule("end", "start")
    def _rises(self) -> Problem | None:
        return None if self.start <= self.end else Problem("rises", f"{self.start} > {self.end}", "turn them round")


class Nested(Options):
    """Options that are more than plain values."""

    must: int
    offsets: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1)
    limit: int | Literal["all"] = "all"
    ramp: Ramp | None = None
    weights: dict[str, int] = Field(default_factory=dict)

    @rule("ramp", "must")
    def _ramp_ends_below(self) -> Problem | None:
        if self.ramp is None or self.ramp.end < 50:
            return None
        return Problem("ramp", f"until {self.ramp.end} is not below 50", "use less")


@pytest.fixture
def nested():
    yield register(BranchKind("nested", Nested, lambda options, low: None, "more than plain values"))
    unregister("nested")


def test_nested_options(nested):
    options = {"must": 1, "offsets": [0, 3], "limit": 7, "ramp": {"start": 4, "until": 9}, "weights": {"a": 1}}
    spec = parse_spec(branches(f"nested: {json.dumps(options)}"))
    assert spec.to_dict()["branches"]["nested"] == options
    assert spec_from_dict(spec.to_dict()) == spec
    assert json_schema()["properties"]["branches"]["properties"]["nested"]["required"] == ["must"]
    assert "Ramp" in json_schema()["$defs"]


@pytest.mark.parametrize(
    ("rule_id", "marked", "message", "hint"),
    [
        ("missing", "«nested»: {}", "`must` is missing", "add `must: …`"),
        ("type", "nested: {must: 1, offsets: [1, «a»]}", "offsets[1] must be an integer, not 'a'", INTEGER),
        ("range", "nested: {must: 1, offsets: [«-1»]}", "offsets[0] -1 is below 0", "use 0 or more"),
        ("empty", "nested: {must: 1, offsets: «[]»}", "offsets is empty", "one or more"),
        ("type", "nested: {must: 1, weights: {a: «b»}}", "a must be an integer, not 'b'", INTEGER),
        ("missing", "nested: {must: 1, «ramp»: {start: 2}}", "`until` is missing", "add `until: …`"),
        ("multiple", "nested: {must: 1, ramp: {start: «3», until: 9}}", "start 3 is no multiple of 2", "use 2 or 4"),
        ("unknown", "nested: {must: 1, ramp: {until: 2, «strt»: 2}}", "unknown key `strt`", "did you mean `start`?"),
        ("rises", "nested: {must: 1, ramp: {until: «1»}}", "2 > 1", "turn them round"),
        ("ramp", "nested: {must: 1, ramp: «{until: 50}»}", "until 50 is not below 50", "use less"),
    ],
)
def test_nested_options_in_diagnostics(nested, rule_id, marked, message, hint):
    text, (place,) = places(branches(marked))
    (found,) = diagnostics(text)
    assert (found.rule, at(found)) == (rule_id, place)
    assert message in found.message
    assert hint in (found.hint or "")


def test_every_error_in_nested_options(nested):
    marked = "nested: {must: 1, offsets: [«true», 1, «null»], limit: «al», ramp: «{until: 50}», weights: «3»}"
    text, marks = places(branches(marked))
    found = diagnostics(text)
    assert [at(d) for d in found] == [marks[0], marks[1], marks[2], *marks[2:]]  # limit is neither arm of the union
    assert [d.rule for d in found] == ["type", "type", "type", "choice", "ramp", "type"]
    with pytest.raises(SpecError) as caught:
        spec_from_dict({**GOOD, "branches": {"nested": {"must": 1, "offsets": [0, -1]}}})
    (only,) = caught.value.diagnostics
    assert only.message == "branches.nested.offsets.1: offsets[1] -1 is below 0"


# The schema


def test_schema_of_the_spec():
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["type"] == "object"
    assert schema["required"] == ["name", "heads", "branches"]
    assert schema["additionalProperties"] is False
    properties = schema["properties"]
    assert list(properties) == ["name", "heads", "kv", "branches", "combine", "dense_below"]
    assert properties["name"]["pattern"] == "^[a-z][a-z0-9_]{0,62}$"
    assert properties["kv"]["enum"] == ["per_branch", "shared"]
    assert properties["combine"]["enum"] == ["gated_sum", "one_softmax", "single"]
    assert all(p.get("description") for p in properties.values())


def test_schema_of_the_heads():
    schema = json_schema()
    heads = schema["$defs"]["Heads"]
    assert schema["properties"]["heads"]["$ref"] == "#/$defs/Heads"
    assert heads["additionalProperties"] is False
    assert heads["required"] == ["query", "kv", "qk_dim"]
    for count in ("query", "kv"):
        assert {k: heads["properties"][count][k] for k in ("type", "minimum", "maximum")} == {
            "type": "integer", "minimum": 1, "maximum": 1024,
        }  # fmt: skip
    for dim in ("qk_dim", "v_dim"):
        assert {k: heads["properties"][dim][k] for k in ("type", "minimum", "maximum", "multipleOf")} == {
            "type": "integer", "minimum": 16, "maximum": 256, "multipleOf": 8,
        }  # fmt: skip


def test_schema_of_the_branches():
    schema = json_schema()
    assert set(schema["$defs"]) == {"Heads"}  # nothing that no $ref names
    given = schema["properties"]["branches"]
    assert (given["type"], given["minProperties"], given["additionalProperties"]) == ("object", 1, False)
    assert list(given["properties"]) == ["compressed", "selected", "window"]
    for name, branch in given["properties"].items():
        assert branch["type"] == "object"
        assert branch["additionalProperties"] is False
        assert branch["description"] == kind(name).doc
        assert "required" not in branch  # every option has a default
    selected = given["properties"]["selected"]["properties"]
    assert selected["from"]["enum"] == ["compressed", "pooled", "caller"]
    assert (selected["top_n"]["minimum"], selected["top_n"]["maximum"], selected["top_n"]["default"]) == (1, 1024, 16)
    assert given["properties"]["compressed"]["properties"]["pool"]["enum"] == ["mean", "weighted", "linear", "mlp"]
    assert given["properties"]["window"]["properties"]["size"]["maximum"] == 2**20


def test_the_spec_layer_is_light():
    code = "import sys, nsagen.spec; print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"

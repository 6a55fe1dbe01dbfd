"""Files that are out to hurt: each ends in a SpecError with places inside the file, in well under two seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nsagen.errors import Diagnostic, SpecError
from nsagen.spec import Spec, load_spec, parse_spec, spec_from_dict

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = sorted((ROOT / "tests" / "hostile").glob("*.yaml"))
HEAD = "name: a\nheads: {query: 4, kv: 2, qk_dim: 16}\n"
SECONDS, WIDTH = 2, 300
MAX = 65_536  # bytes of a spec


def refused(path: Path) -> tuple[Diagnostic, ...]:
    """The diagnostics of a file: quick, one or more, with places inside it, on printable lines of bearable length."""
    start = time.process_time()
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    text = str(caught.value)
    assert time.process_time() - start < SECONDS
    found = caught.value.diagnostics
    assert found
    data = path.read_bytes() if path.is_file() else b""
    check_places(found, data.decode("utf-8-sig", "replace").removeprefix("\ufeff"))
    assert all(len(line) < WIDTH + len(str(path)) and line.isprintable() for line in text.split("\n"))
    return found


def check_places(found: tuple[Diagnostic, ...], text: str) -> None:
    lines = re.split("\r\n|[\r\n\x85\u2028\u2029]", text)
    for diagnostic in found:
        assert diagnostic.rule
        assert diagnostic.message
        assert diagnostic.hint
        if span := diagnostic.span:
            assert span.source == lines[span.line - 1]
            assert 1 <= span.column < span.end_column <= len(span.source) + 2


def rules(found: tuple[Diagnostic, ...]) -> list[str]:
    return [d.rule for d in found]


EXPECTED = {
    "anchor": ["alias", "alias", "alias"],
    "bidi": ["missing", "missing", "name", "unknown"],
    "billion_laughs": ["alias"] * (8 + 7 * 9 + 1),
    "block_scalars": ["name", "type", "type"],
    "block_scalar": ["mapping"],
    "bom": ["missing", "missing", "name"],
    "brace": ["syntax"],
    "bracket": ["syntax"],
    "bracket_mismatch": ["syntax"],
    "bracket_stray": ["syntax"],
    "branches_deep": ["type"],
    "colons": ["syntax"],
    "dates": ["name", "type", "type", "type", "type"],
    "dunder_keys": ["unknown"] * 7,
    "duplicate_keys": ["duplicate"] * 4,
    "empty": ["empty"],
    "empty_document": ["mapping"],
    "escape_beyond_unicode": ["syntax"],
    "escape_just_beyond_unicode": ["syntax"],
    "escape_unknown": ["syntax"],
    "indent": ["syntax"],
    "injection": ["name", "type", "type", "type"],
    "keys_of_every_kind": ["key"] * 3,
    "keys_that_are_no_words": ["unknown"] * 5,
    "list": ["mapping"],
    "merge_key": ["merge", "merge"],
    "minus_zero": ["range", "range", "type", "type"],
    "numbers_in_disguise": ["type"] * 12,
    "numbers_in_other_scripts": ["type"] * 5,
    "only_comments": ["empty"],
    "path_name": ["name"],
    "quote_double": ["syntax"],
    "quote_single": ["syntax"],
    "quoted_scalar": ["mapping"],
    "reserved_sign": ["syntax"],
    "scalar": ["mapping"],
    "self_alias": ["alias", "alias"],
    "tab_indent": ["syntax"],
    "tag_binary": ["tag"] * 5,
    "tag_python_object": ["tag"],
    "tag_unclosed": ["syntax"],
    "two_documents": ["document"],
    "unicode_names": ["name", "unknown", "unknown", "unknown"],
    "unknown_alias": ["alias"],
    "yaml_version": ["syntax"],
}


@pytest.mark.parametrize("path", HOSTILE, ids=lambda p: p.stem)
def test_hostile_file(path):
    found = rules(refused(path))
    assert found == EXPECTED.get(path.stem, found)


def test_the_files_are_there():
    assert len(HOSTILE) >= 24
    assert EXPECTED.keys() <= {p.stem for p in HOSTILE}
    assert not Path("/tmp/nsagen_was_here").exists()  # tag_python_object.yaml would have made it


LOTS = 10_000
MADE: dict[str, tuple[bytes, str]] = {
    "flow sequences in each other": (b"name: " + b"[" * LOTS, "depth"),
    "flow sequences, closed": (b"name: " + b"[" * LOTS + b"]" * LOTS, "depth"),
    "flow mappings in each other": (b"{a: " * LOTS, "depth"),
    "block sequences in a line": (b"- " * LOTS, "depth"),
    "block mappings in each other": (b"".join(b" " * i + b"a:\n" for i in range(300)), "depth"),
    "explicit keys in each other": (b"? " * LOTS, "depth"),
    "nested in a key": (b"? " + b"[" * LOTS, "depth"),
    "an integer of 60,000 digits": (HEAD.encode() + b"branches: {window: {size: " + b"9" * 60_000 + b"}}", "number"),
    "an integer of 10^5 digits": (HEAD.encode() + b"branches: {window: {size: " + b"9" * 100_000 + b"}}", "size"),
    "an integer of 19 digits": (HEAD.encode() + b"branches: {window: {size: -1234567890123456789}}", "number"),
    "an integer of 18 digits": (HEAD.encode() + b"branches: {window: {size: 123456789012345678}}", "range"),
    "a float of 60,000 digits": (HEAD.encode() + b"branches: {window: {size: " + b"9" * 60_000 + b".5}}", "type"),
    "60,000 leading zeros": (HEAD.encode() + b"branches: {window: {size: " + b"0" * 60_000 + b"1}}", "type"),
    "60,000 underscores": (HEAD.encode() + b"branches: {window: {size: 1" + b"_" * 60_000 + b"1}}", "type"),
    "an exponent of 60,000 digits": (HEAD.encode() + b"branches: {window: {size: 1e" + b"9" * 60_000 + b"}}", "type"),
    "a version of 9,999 digits": (b"%YAML 1." + b"9" * 9_999 + b"\n---\nname: a\n", "syntax"),
    "a NUL": (b"name: a\x00b\n", "syntax"),
    "a NUL in the last line": (b"name: a\n\x00", "syntax"),
    "an escape character": (b"name: a\nheads: \x1b[31m\n", "syntax"),
    "a form feed": (b"name: a\n\x0cheads: 1\n", "syntax"),
    "a vertical tab": (b"name: a\x0bheads: 1\n\x1c\n", "syntax"),
    "C1 controls": ("name: a\x9b31m\n".encode(), "syntax"),
    "a noncharacter": ("name: a\uffff\n".encode(), "syntax"),
    "not UTF-8": (b"name: a\xff\xfe\n", "encoding"),
    "Latin-1": (b"name: caf\xe9\n", "encoding"),
    "overlong UTF-8": (b"name: \xc0\xaf\n", "encoding"),
    "UTF-8 surrogates": (b"name: \xed\xa0\x80\n", "encoding"),
    "UTF-8 broken off": (b"name: \xe2\x82", "encoding"),
    "UTF-16 with a BOM": ("name: a\n".encode("utf-16"), "encoding"),
    "UTF-16 without": ("name: a\n".encode("utf-16-le"), "syntax"),
    "UTF-32": ("name: a\n".encode("utf-32"), "encoding"),
    "two BOMs": (b"\xef\xbb\xbf\xef\xbb\xbfname: a\n", ""),
    "a BOM and nothing else": (b"\xef\xbb\xbf", "empty"),
    "random bytes": (bytes(i * 197 % 256 for i in range(4096)), "encoding"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "encoding"),
    "an ELF file": (b"\x7fELF\x02\x01\x01" + b"\x00" * 64, "syntax"),
    "1 MiB": (b"# " + b"x" * 2**20, "size"),
    "one byte too much": (b"#" * (MAX + 1), "size"),
    "as much as may be": (b"#" * MAX, "empty"),
    "blank lines alone": (b"\n" * MAX, "empty"),
    "blanks alone": (b" " * MAX, "empty"),
    "a word of 64 KiB": (b"a" * MAX, "mapping"),
    "a key of 60,000 letters": (HEAD.encode() + b"? " + b"k" * 60_000 + b"\n: 1\nbranches: {window: {}}\n", "unknown"),
    "a name of 60,000 letters": (b"name: " + b"n" * 60_000 + HEAD[7:].encode() + b"branches: {window: {}}", "name"),
    "an anchor of 60,000 letters": (b"name: &" + b"a" * 60_000 + b" b", "alias"),
    "a tag of 60,000 letters": (b"name: !" + b"a" * 60_000 + b" b", "tag"),
    "a tag handle of 60,000 letters": (b"name: !" + b"a" * 60_000 + b"!x b", "syntax"),
    "a long line, broken at its end": (HEAD.encode() + b"branches: {window: {size: [" + b"x" * 60_000, "syntax"),
    "2,000 duplicate keys": (b"x: {" + b"a: 1, " * 2_000 + b"}", "duplicate"),
    "10,000 duplicate keys": (b"x: {" + b"a: 1, " * 10_000 + b"}", "size"),
    "10,000 anchors": (b"x: [" + b"&a 1, " * 10_000 + b"]", "alias"),
    "10,000 numbers": (b"x:\n" + b"- 1\n" * 10_000, "size"),
    "2,000 unknown keys": (b"x: 1\n" + b"".join(b"k%d: 1\n" % i for i in range(2_000)), "missing"),
    "2,000 unknown branches": (
        HEAD.encode() + b"branches: {" + b", ".join(b"windo%d: 1" % i for i in range(2_000)) + b"}", "unknown"),
    "quotes galore": (b"name: " + b"'" * 60_001, "syntax"),
    "escapes galore": (b'name: "' + rb"\x1b" * 15_000 + b'"\n', "missing"),
    "wide letters": (("名" * 20_000 + ": 1\n").encode(), "syntax"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "rule"), MADE.values(), ids=list(MADE))
def test_made_file(tmp_path, data, rule):
    path = tmp_path / "made.yaml"
    path.write_bytes(data)
    assert rules(refused(path))[0].startswith(rule)


def test_no_file(tmp_path):
    (found,) = refused(tmp_path / "none.yaml")
    assert (found.rule, found.span) == ("file", None)
    assert "does not exist" in found.message


def test_a_directory(tmp_path):
    (found,) = refused(tmp_path)
    assert found.rule == "file"
    assert "is a directory" in found.message


@pytest.mark.parametrize("name", [b"a\nb", b"\x1b[31m", b"\xff", "\u202eb".encode(), b"n" * 250])
def test_files_of_odd_names(tmp_path, name):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    refused(path)
    path.write_text("name: A\n")
    for line in "\n".join(d.render(caret=False) for d in refused(path)).split("\n"):
        assert "error: " in line or line.startswith("  help: ")


@pytest.mark.parametrize("name", ["a\0b.yaml", "x" * 5000, "a/" * 5000], ids=["NUL", "long name", "long path"])
def test_paths_that_cannot_be(name):
    with pytest.raises(SpecError) as caught:
        load_spec(name)
    assert rules(caught.value.diagnostics) == ["file"]
    assert len(str(caught.value)) < WIDTH


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "secret.yaml"
    path.write_text(HEAD)
    path.chmod(0)
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="POSIX")
def test_an_endless_device():
    with pytest.raises(SpecError, match="larger than"):
        load_spec("/dev/zero")


# Harmless oddities are no errors


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: "\ufeff" + text,
        lambda text: "---\n" + text + "...\n",
        lambda text: "%YAML 1.1\n---\n" + text,
        lambda text: text.replace("query: 4", "query: +4"),
        lambda text: text.replace("name", '"name"'),
        lambda text: text.replace(": {", ":   {\n  ").replace("}", "  # more\n }"),
        lambda text: "# 🙂 注意\n\n" + text + "\n\n",
        lambda text: text.rstrip("\n"),
    ],
    ids=["CRLF", "CR", "BOM", "document marks", "version", "plus", "quoted key", "lines in flow", "comments", "no end"],
)
def test_harmless_oddities(tmp_path, change):
    text = HEAD + "branches: {window: {}}\n"
    path = tmp_path / "odd.yaml"
    path.write_bytes(change(text).encode())
    assert load_spec(path) == parse_spec(text)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=repr)
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["", "BOM"])
def test_places_under_odd_line_ends(tmp_path, start, end):
    path = tmp_path / "odd.yaml"
    path.write_bytes((start + "name: A" + end + HEAD[8:-1] + end + "branches: {window: {size: x}}" + end).encode())
    found = refused(path)
    assert [(d.span.line, d.span.column, d.span.end_column) for d in found if d.span] == [(1, 7, 8), (3, 27, 28)]
    assert [d.span.source for d in found if d.span] == ["name: A", "branches: {window: {size: x}}"]


# From the command line


def children_seconds() -> float:
    """Of the processor: other work on the machine does not count."""
    used = os.times()
    return used.children_user + used.children_system


@pytest.mark.parametrize(
    "name", ["billion_laughs", "tag_python_object", "escape_control", "unicode_names", "NUL", "deep", "missing"]
)
def test_check_from_the_command_line(tmp_path, name):
    path = ROOT / "tests" / "hostile" / f"{name}.yaml"
    if not path.exists():
        path = tmp_path / f"{name}.yaml"
        if name != "missing":
            path.write_bytes({"NUL": b"name: \0\n", "deep": b"[" * LOTS}[name])
    start = children_seconds()
    done = subprocess.run([sys.executable, "-m", "nsagen", "check", str(path)], capture_output=True, cwd=ROOT)
    assert children_seconds() - start < SECONDS
    stderr = done.stderr.decode()
    assert (done.returncode, done.stdout) == (2, b"")
    assert "error: " in stderr.splitlines()[0]
    assert "Traceback" not in stderr
    assert all(line.isprintable() for line in stderr.split("\n"))


# Anything at all


def found_in(load: Callable[[Any], Spec], given: Any) -> tuple[Diagnostic, ...]:
    """What is wrong with the input: on printable lines, one or more; nothing where it is a spec."""
    try:
        load(given)
        return ()
    except SpecError as caught:
        error = caught
    assert error.diagnostics
    assert all(line.isprintable() and len(line) < WIDTH for line in str(error).split("\n"))
    return error.diagnostics


def only_spec_errors(text: str) -> None:
    check_places(found_in(parse_spec, text), text.removeprefix("\ufeff"))


WORDS = st.sampled_from(
    ["name", "heads", "query", "kv", "qk_dim", "v_dim", "branches", "window", "size", "selected", "from", "block", "a",
     "compressed", "combine", "single", "mean", "pool", "1",
     "16", "-1", "true", "null", "0x1", ".inf", "1e9", "é", "日"]
)  # fmt: skip
SIGNS = st.sampled_from(
    [": ", ":", "{", "}", "[", "]", ", ", "\n", "\n  ", "\n\t", "- ", "? ", "&a ", "*a", "!", "!!int ", "<<: ", "'",
     '"', "|\n", ">\n", "#", "%", "---\n", "...\n", "\\", "\\x", "\r", "\x85",
     "\u2028", "\ufeff", "\0", "\x1b", "\ud800", "@"]
)  # fmt: skip


@given(st.text(max_size=200))
@example("\ufeff")
@example("\ud800: \udfff")
@example("\ufeff\ufeffname: A")
def test_any_text(text):
    only_spec_errors(text)


@given(st.lists(WORDS | SIGNS, max_size=60).map("".join))
def test_any_tokens(text):
    only_spec_errors(text)


@given(st.lists(WORDS | SIGNS, max_size=5).map("".join), st.integers(0, 200), st.integers(0, 20))
def test_a_good_spec_with_a_dent(put, start, length):
    text = (ROOT / "specs" / "tiny.yaml").read_text()
    only_spec_errors(text[:start] + put + text[start + length :])


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4) | WORDS
KEYS = WORDS | st.text(max_size=4) | st.integers() | st.none()
TREES: st.SearchStrategy[Any] = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=30
)


@given(st.dictionaries(KEYS, TREES, max_size=6))
def test_any_dict(data):
    assert all(d.span is None for d in found_in(spec_from_dict, data))


FIELDS: dict[str, Any] = {
    "name": "a", "kv": "shared", "combine": "gated_sum", "heads": {"query": 4, "kv": 2, "qk_dim": 16, "v_dim": 16},
    "branches": {
        "compressed": {"block": 32, "stride": 16, "pool": "mlp", "positions": True},
        "selected": {"block": 64, "top_n": 16, "initial": 1, "local": 2, "from": "compressed"},
        "window": {"size": 512, "sinks": 0},
    },
}  # fmt: skip
PATHS: list[tuple[str, ...]] = [*((k,) for k in FIELDS), *(("heads", k) for k in FIELDS["heads"])]
PATHS += [("branches", b, *rest) for b, o in FIELDS["branches"].items() for rest in [(), *((k,) for k in o)]]
GONE = object()


def changed(data: Any, path: tuple[str, ...], value: Any) -> Any:
    """The dict with another value at the path, or without its key; as it was where the path is gone."""
    if not isinstance(data, dict):
        return data
    key, *rest = path
    if rest:
        return {k: changed(v, (*rest,), value) if k == key else v for k, v in data.items()}
    kept = {k: v for k, v in data.items() if k != key}
    return kept if value is GONE else {**kept, key: value}


@given(st.lists(st.tuples(st.sampled_from(PATHS), TREES | st.just(GONE)), min_size=1, max_size=6))
def test_a_good_dict_with_dents(dents):
    data: Any = FIELDS
    for path, value in dents:
        data = changed(data, path, value)
    messages = [(d.rule, d.message) for d in found_in(spec_from_dict, data)]
    assert len(messages) == len({*messages})  # nothing is said twice

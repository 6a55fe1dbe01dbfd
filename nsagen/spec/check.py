"""Text, file or dict -> Spec, or every broken rule at once, each with its place."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from nsagen.errors import Diagnostic, Span, SpecError
from nsagen.spec import kinds as _builtin  # noqa: F401  registers the built-in kinds
from nsagen.spec.model import Heads, Spec, branch_kinds
from nsagen.spec.registry import Options
from nsagen.spec.rules import Checked, Problem
from nsagen.spec.source import Document, Path_, parse, read_text

Place = Callable[[Path_, bool], "Span | None"]


def load_spec(path: str | Path) -> Spec:
    """The spec in a file. Raises SpecError with all diagnostics."""
    path = Path(path)
    return parse_spec(read_text(path), str(path))


def parse_spec(text: str, file: str = "<spec>") -> Spec:
    """The spec in YAML text; `file` is what its diagnostics say."""
    document: Document = parse(text, file)
    return _Check(document.value, document.span).spec()


def spec_from_dict(data: Mapping[str, Any]) -> Spec:
    """The spec in a dict with the YAML's keys; its diagnostics name the key's path."""
    if not isinstance(data, Mapping):
        raise SpecError([Diagnostic("mapping", f"a spec is a mapping, not {type(data).__name__}", None, "see `nsagen new NAME`")])
    return _Check(_plain(data), lambda path, key: None).spec()


def _plain(value: Any) -> Any:
    return {str(k): _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


class _Check:
    """Validates part by part, so that an error in one branch hides none in another."""

    def __init__(self, data: dict[str, Any], place: Place) -> None:
        self.data, self.place = data, place
        self.problems: list[Diagnostic] = []

    def spec(self) -> Spec:
        branches = self._branches()
        data = {**self.data, **({"branches": branches} if branches is not None else {})}
        if isinstance(self.data.get("heads"), dict):
            heads = self._model(Heads, self.data["heads"], ("heads",))
            if heads is not None:
                data["heads"] = heads
        if branches is not None:
            self._across(branches)
        spec = self._model(Spec, data, (), skip=("branches", "heads"))
        if self.problems:
            raise SpecError(sorted(self.problems, key=lambda d: (d.span.line, d.span.column) if d.span else (0, 0)))
        assert spec is not None
        return spec

    def _branches(self) -> dict[str, Options] | None:
        """The options of each branch, as far as they hold."""
        given = self.data.get("branches")
        if not isinstance(given, dict) or not given:
            return None
        known, checked = branch_kinds(), {}
        for name, options in given.items():
            path = ("branches", name)
            if name not in known:
                self._unknown(path, known, "branch kind")
            elif not isinstance(options, dict):
                self._add("type", path, f"branch {name} takes a mapping of options, not {_show(options)}", _example(known[name]))
            else:
                checked[name] = self._model(known[name], self._defaults(name, options), path)
        return {name: options for name, options in checked.items() if options is not None}

    def _defaults(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """A selection without a compressed branch has no default for its scores."""
        if name == "selected" and "from" not in options and "compressed" not in self.data["branches"]:
            self._add("from", ("branches", name), "selected does not say where its scores come from, and there is no compressed branch",
                      "add a compressed branch, or from: pooled | caller")  # fmt: skip
        return options

    def _across(self, branches: dict[str, Any]) -> None:
        """d | l' and l <= l' where compressed blocks score the selection."""
        selected, compressed = branches.get("selected"), branches.get("compressed")
        if selected is None or selected.scores != "compressed":
            return
        at = ("branches", "selected", "block")
        if compressed is None:
            if "compressed" not in self.data["branches"] and "from" in self.data["branches"]["selected"]:
                self._add("from", ("branches", "selected", "from"), "from: compressed without a compressed branch",
                          "add a compressed branch, or from: pooled | caller")  # fmt: skip
            return
        if selected.block % compressed.stride:
            self._add("divides", at, f"stride {compressed.stride} does not divide selected block {selected.block} (d | l')",
                      f"use a selected block that is a multiple of {compressed.stride}")  # fmt: skip
        if compressed.block > selected.block:
            self._add("order", at, f"compressed block {compressed.block} is longer than selected block {selected.block} (l <= l')",
                      f"use a selected block of {compressed.block} or more")  # fmt: skip

    def _model(self, model: type[Checked], data: Any, path: Path_, skip: tuple[str, ...] = ()) -> Any:
        try:
            return model.model_validate(data)
        except ValidationError as error:
            items = error.errors(include_url=False)
            failed = {str(item["loc"][0]) for item in items if item["loc"]}
            for item in items:
                where = tuple(str(x) for x in item["loc"])
                if where and where[0] in skip and isinstance(self.data.get(where[0]), dict) and self.data[where[0]]:
                    continue  # said already, part by part
                if where == ("v_dim",) and "v_dim" not in self.data["heads"]:
                    continue  # it is qk_dim's value
                self._say(item, model, (*path, *where))
            if failed:
                self._rules_between_the_rest(model, data, path, failed)
        return None

    def _rules_between_the_rest(self, model: type[Checked], data: Any, path: Path_, failed: set[str]) -> None:
        """The rules between fields run only where all types hold: ask again without the fields that failed."""
        names = {f.alias or n: n for n, f in model.model_fields.items()}
        values = {names[k]: v for k, v in data.items() if k in names and k not in failed}
        rest = model.model_construct(**values)
        try:
            problems = [p for p in rest.rules() if not failed & {p.field, *p.involves}]
        except (AttributeError, TypeError):  # a rule speaks of a field that is not there
            return
        for problem in problems:
            self._problem(problem, path)

    def _say(self, item: Any, model: type[BaseModel], path: Path_) -> None:
        kind, context = item["type"], item.get("ctx", {})
        if kind == "nsagen_rules":
            for problem in context["problems"]:
                self._problem(problem, path)
            return None
        if kind == "extra_forbidden":
            return self._unknown(path, _names(model), "key")
        field = path[-1] if path else "spec"
        if kind == "missing":
            return self._add("missing", path, f"`{field}` is missing", f"add `{field}: …`", key=True)
        rule, message, hint = _explain(kind, context, str(field), item["input"])
        self._add(rule, path, message, hint)

    def _problem(self, problem: Problem, path: Path_) -> None:
        self._add(problem.rule, (*path, problem.field), problem.message, problem.hint)

    def _unknown(self, path: Path_, known: Any, what: str) -> None:
        close = difflib.get_close_matches(str(path[-1]), list(known), n=1, cutoff=0.5)
        hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"
        self._add("unknown", path, f"unknown {what} `{str(path[-1])[:60]}`", hint, key=True)

    def _add(self, rule: str, path: Path_, message: str, hint: str, key: bool = False) -> None:
        span = self.place(path, key)
        prefix = "" if span or not path else ".".join(map(str, path)) + ": "
        self.problems.append(Diagnostic(rule, prefix + message, span, hint))


def _names(model: type[BaseModel]) -> list[str]:
    return [f.alias or name for name, f in model.model_fields.items()]


def _show(value: Any) -> str:
    text = {True: "true", False: "false", None: "null"}.get(value, repr(value)) if isinstance(value, (bool, type(None))) else repr(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _example(options: type[Options]) -> str:
    return "write it as {" + ", ".join(f"{n}: …" for n in _names(options)) + "}"


TYPES = {
    "int_type": "an integer", "string_type": "a string", "bool_type": "true or false", "dict_type": "a mapping",
    "model_type": "a mapping", "model_attributes_type": "a mapping",
}  # fmt: skip


def _explain(kind: str, context: dict[str, Any], field: str, value: Any) -> tuple[str, str, str]:
    """(rule, message, hint) of one of pydantic's own errors."""
    shown = _show(value)
    if kind in TYPES:
        hint = "integers are written plain: 64, not \"64\", 64.0 or true" if kind == "int_type" else f"give {TYPES[kind]}"
        return "type", f"{field} must be {TYPES[kind]}, not {shown}", hint
    if kind in ("greater_than_equal", "less_than_equal"):
        low = kind == "greater_than_equal"
        bound = context["ge" if low else "le"]
        return "range", f"{field} {shown} is {'below' if low else 'above'} {bound}", f"use {bound} or {'more' if low else 'less'}"
    if kind == "multiple_of":
        step = context["multiple_of"]
        near = [x for x in (value // step * step, -(-value // step) * step) if 16 <= x <= 256]
        return "multiple", f"{field} {shown} is no multiple of {step}", f"use {' or '.join(map(str, near)) or '16 to 256'}"
    if kind == "literal_error":
        close = difflib.get_close_matches(str(value), [e.strip("'") for e in context["expected"].replace(" or ", ", ").split(", ")], n=1)
        return "choice", f"{field} {shown} is none of {context['expected']}", f"did you mean {close[0]}?" if close else "use one of them"
    if kind == "string_pattern_mismatch":
        return "name", f"{field} {shown} is no module name", "lower case letters, digits and _, a letter first, 63 at most"
    if kind == "too_short":
        return "empty", f"{field} is empty", "one or more"
    return kind, f"{field}: {shown} is not allowed", "see `nsagen schema`"

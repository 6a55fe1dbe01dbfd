"""Text, file or dict -> Spec, or every broken rule at once, each with its place."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from nsagen.errors import Diagnostic, Span, SpecError, short
from nsagen.spec import kinds as _builtin  # noqa: F401  registers the built-in kinds
from nsagen.spec.model import Heads, Spec, branch_kinds
from nsagen.spec.registry import Options
from nsagen.spec.rules import Broken, Checked
from nsagen.spec.source import MAX_DEPTH, Document, Path_, parse, read_text

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
        raise _wrong("mapping", f"a spec is a mapping, not {type(data).__name__}", "see `nsagen new NAME`")
    return _Check(_plain(data), lambda path, key: None).spec()


def _plain(value: Any, depth: int = 0) -> Any:
    if not isinstance(value, Mapping):
        return value
    if depth == MAX_DEPTH:
        raise _wrong("depth", f"nesting is deeper than {MAX_DEPTH}", "a spec needs three levels")
    keys = [str(k) for k in value]
    if len({*keys}) < len(keys):
        twice = next(k for k in keys if keys.count(k) > 1)
        raise _wrong("duplicate", f"`{short(twice)}` is given twice", "remove one of them")
    return {str(k): _plain(v, depth + 1) for k, v in value.items()}


def _wrong(rule: str, message: str, hint: str) -> SpecError:
    return SpecError([Diagnostic(rule, message, None, hint)])


class _Part(NamedTuple):
    """A model of the fields that hold, the names of those that do not, and the keys as given."""

    value: Any
    failed: set[str]
    given: dict[str, Any]

    def holds(self, *fields: str) -> bool:
        return not self.failed & {*fields}


class _Check:
    """Validates part by part, so that an error in one hides none in another. A broken part stands in by what holds."""

    def __init__(self, data: dict[str, Any], place: Place) -> None:
        self.data, self.place = data, place
        self.problems: list[Diagnostic] = []

    def spec(self) -> Spec:
        data = {**self.data}
        if isinstance(data.get("heads"), dict):
            data["heads"] = self._model(Heads, data["heads"], ("heads",)).value
        if data.get("branches") and isinstance(data["branches"], dict):
            parts = self._branches(data["branches"])
            self._across(parts)
            data["branches"] = {name: parts[name].value if name in parts else Options() for name in data["branches"]}
        spec = self._model(Spec, data, ()).value
        if self.problems:
            raise SpecError(sorted(self.problems, key=lambda d: (d.span.line, d.span.column) if d.span else (0, 0)))
        return spec

    def _branches(self, given: dict[str, Any]) -> dict[str, _Part]:
        """The options of each branch, as far as they hold."""
        known, parts = branch_kinds(), {}
        for name, options in given.items():
            path = ("branches", name)
            if name not in known:
                self._unknown(path, known, "branch kind")
            elif not isinstance(options, dict):
                message = f"branch {name} takes a mapping of options, not {_show(options)}"
                self._add("type", path, message, _example(known[name]))
            else:
                parts[name] = self._model(known[name], options, path)
        return parts

    def _across(self, parts: dict[str, _Part]) -> None:
        """A selection by compressed scores needs the compressed branch, d | l' and l <= l'."""
        selected, compressed = parts.get("selected"), parts.get("compressed")
        if selected is None or not selected.holds("scores") or selected.value.scores != "compressed":
            return
        if "compressed" not in self.data["branches"]:
            self._no_scores("from" in selected.given)
        elif compressed and selected.holds("block"):
            self._block_fits(selected, compressed)

    def _no_scores(self, said: bool) -> None:
        message = ("from: compressed without a compressed branch" if said else
                   "selected does not say where its scores come from, and there is no compressed branch")  # fmt: skip
        path = ("branches", "selected", *(("from",) if said else ()))
        self._add("from", path, message, "add a compressed branch, or from: pooled | caller")

    def _block_fits(self, selected: _Part, compressed: _Part) -> None:
        (block, l, d), holds = (selected.value.block, compressed.value.block, compressed.value.stride), compressed.holds
        if holds("stride") and block % d:
            message = f"stride {d} does not divide selected block {block} (d | l')"
            hint = f"use a selected block that is a multiple of {d}"
            self._add("divides", _given(selected, compressed, "stride"), message, hint)
        if holds("block") and l > block:
            message = f"compressed block {l} is longer than selected block {block} (l <= l')"
            self._add("order", _given(selected, compressed, "block"), message, f"use a selected block of {l} or more")

    def _model(self, model: type[Checked], data: dict[str, Any], path: Path_) -> _Part:
        try:
            return _Part(model.model_validate(data), set(), data)
        except ValidationError as error:
            items = [item for item in error.errors(include_url=False) if not _said(item)]
        failed = {str(item["loc"][0]) for item in items if item["loc"]}
        names = {*_names(model)} - failed
        holding = {name: _built(model, name, value) for name, value in data.items() if name in names}
        part = _Part(model.model_construct(**model.filled(holding)), {_field(model, f) for f in failed}, data)
        for item in items:
            self._say(item, model, path, part)
        if not any(item["type"] == "nsagen_rules" for item in items):  # pydantic asks only where every field holds
            self._rules(part.value.broken(part.failed), path, data)
        return part

    def _say(self, item: Any, model: type[BaseModel], path: Path_, part: _Part) -> None:
        kind, inside = item["type"], _keys(item, part.given)
        model, path, field = _model_at(model, inside), (*path, *inside), _label(inside)
        if kind == "nsagen_rules":
            self._rules(item["ctx"]["broken"], path, item["input"])
        elif kind == "extra_forbidden":
            self._unknown(path, _names(model), "key")
        elif kind == "missing":
            self._add("missing", path, f"`{field}` is missing", f"add `{field}: …`", key=True)
        elif item["loc"][0] in part.given:  # not a default that stands for another key's value
            rule, message, hint = explain(item, field, model)
            self._add(rule, path, message, hint)

    def _rules(self, broken: tuple[Broken, ...], path: Path_, given: Mapping[str, Any]) -> None:
        for keys, problem in broken:
            at = next((k for k in keys if k in given), keys[0])
            self._add(problem.rule, (*path, at), problem.message, problem.hint)

    def _unknown(self, path: Path_, known: Any, what: str) -> None:
        close = difflib.get_close_matches(str(path[-1])[:60], list(known), n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"
        self._add("unknown", path, f"unknown {what} `{short(str(path[-1]))}`", hint, key=True)

    def _add(self, rule: str, path: Path_, message: str, hint: str, key: bool = False) -> None:
        span = self.place(path, key)
        prefix = "" if span or not path else short(".".join(map(str, path))) + ": "
        self.problems.append(Diagnostic(rule, prefix + message, span, hint))


def _said(item: Any) -> bool:
    """A rule inside a part, which was checked by itself."""
    return item["type"] == "nsagen_rules" and isinstance(item["input"], Checked)


def _built(model: type[BaseModel], key: str, value: Any) -> Any:
    """The value as its field has it: options may hold models of their own, and rules speak of those."""
    if not isinstance(value, (dict, list)):
        return value
    try:
        hint: Any = model.model_fields[_field(model, key)].annotation
        return TypeAdapter(hint).validate_python(value)
    except ValidationError:  # a part that breaks rules stands in it
        return value


def _keys(item: Any, data: Any) -> Path_:
    """The keys in pydantic's place of an error, which names the arms of unions too."""
    keys: Path_ = ()
    for key in item["loc"]:
        if key in data if isinstance(data, dict) else isinstance(data, list) and isinstance(key, int):
            keys, data = (*keys, key), data[key]
    return (*keys, item["loc"][-1]) if item["type"] == "missing" else keys


def _model_at(model: type[BaseModel], keys: Path_) -> type[BaseModel]:
    """The model whose field the last key is; the one around it for an element of a list or a mapping."""
    for key in keys[:-1]:
        field = model.model_fields.get(_field(model, str(key)))
        types = (field.annotation, *get_args(field.annotation)) if field else ()
        model = next((t for t in types if isinstance(t, type) and issubclass(t, BaseModel)), model)
    return model


def _label(keys: Path_) -> str:
    """What to call the value at the keys: its own key, or that of its list with indices."""
    names = [i for i, key in enumerate(keys) if isinstance(key, str)]
    start = names[-1] if names else 0
    return "".join(f"[{key}]" if i else str(key) for i, key in enumerate(keys[start:]))


def _given(selected: _Part, compressed: _Part, other: str) -> Path_:
    """Where the caret goes for a rule between selected.block and a key of compressed: to one that the spec gives."""
    if "block" not in selected.given and other in compressed.given:
        return "branches", "compressed", other
    return "branches", "selected", "block"


def _alias(model: type[BaseModel], field: str) -> str:
    return model.model_fields[field].alias or field


def _field(model: type[BaseModel], key: str) -> str:
    return next((name for name, f in model.model_fields.items() if f.alias == key), key)


def _names(model: type[BaseModel]) -> list[str]:
    return [_alias(model, name) for name in model.model_fields]


def _example(options: type[Options]) -> str:
    return "write it as {" + ", ".join(f"{n}: …" for n in _names(options)) + "}"


def _show(value: Any) -> str:
    """A value as YAML has it, in 40 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        return short(repr(value), 40)
    except Exception:  # an integer of thousands of digits, a bottomless list, a class of the caller's
        return f"such {type(value).__name__}"


TYPES = {
    "int_type": "an integer", "float_type": "a number", "string_type": "a string", "bool_type": "true or false",
    "dict_type": "a mapping", "model_type": "a mapping", "model_attributes_type": "a mapping", "list_type": "a list",
}  # fmt: skip
BOUNDS = {
    "greater_than_equal": ("ge", "is below {}", "use {} or more"),
    "less_than_equal": ("le", "is above {}", "use {} or less"),
    "greater_than": ("gt", "is not above {}", "use more than {}"),
    "less_than": ("lt", "is not below {}", "use less than {}"),
}


def explain(item: Any, field: str, model: type[BaseModel]) -> tuple[str, str, str]:
    """(rule, message, hint) of one of pydantic's own errors."""
    kind, context, value, shown = item["type"], item.get("ctx", {}), item["input"], _show(item["input"])
    if kind in TYPES:
        hint = 'integers are written plain: 64, not "64", 64.0 or true' if kind == "int_type" else f"give {TYPES[kind]}"
        return "type", f"{field} must be {TYPES[kind]}, not {shown}", hint
    if kind in BOUNDS:
        key, message, hint = BOUNDS[kind]
        return "range", f"{field} {shown} {message.format(context[key])}", hint.format(context[key])
    if kind == "multiple_of":
        step = context["multiple_of"]
        return "multiple", f"{field} {shown} is no multiple of {step}", f"use {_nearest(value, step, model, field)}"
    if kind == "literal_error":
        hint = _nearest_choice(value, context["expected"])
        return "choice", f"{field} {shown} is none of {context['expected']}", hint
    if kind == "string_pattern_mismatch" and model is Spec:
        hint = "lower case letters, digits and _, a letter first, 63 at most"
        return "name", f"{field} {shown} is no module name", hint
    if kind == "too_short":
        return "empty", f"{field} is empty", f"one or more of {_kinds()}" if model is Spec else "one or more"
    return kind, f"{field} {shown}: {short(item['msg'], 160)}", "see `nsagen schema`"


def _kinds() -> str:
    return ", ".join(branch_kinds())


def _nearest(value: Any, step: Any, model: type[BaseModel], field: str) -> str:
    """The multiples of `step` on both sides of a value, inside the field's bounds."""
    known = model.model_fields.get(_field(model, field))  # None for an element of a list
    bounds: list[Any] = known.metadata if known else []
    low = next((-(-b.ge // step) * step for b in bounds if hasattr(b, "ge")), None)
    high = next((b.le // step * step for b in bounds if hasattr(b, "le")), None)
    near = {value // step * step, -(-value // step) * step}
    near = {max(n, low) if low is not None else n for n in near}
    near = {min(n, high) if high is not None else n for n in near}
    return " or ".join(_show(n) for n in sorted(near))


def _nearest_choice(value: Any, expected: str) -> str:
    choices = [e.strip("'") for e in expected.replace(" or ", ", ").split(", ")]
    close = difflib.get_close_matches(_show(value).strip("'"), choices, n=1)
    return f"did you mean {close[0]}?" if close else "use one of them"

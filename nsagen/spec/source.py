"""YAML text -> a tree of plain values that remembers where each one stands.

Only what a spec needs: mappings, lists and plain scalars in one document. Everything that makes YAML dangerous or
surprising (tags, aliases, `yes` for true, duplicate keys, bottomless nesting) is refused before anything is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.reader import ReaderError
from yaml.resolver import Resolver

from nsagen.errors import Diagnostic, Span, SpecError, short

MAX_BYTES, MAX_EVENTS, MAX_DEPTH, MAX_DIGITS = 65_536, 4_096, 16, 18
PAGE = "a spec is a page of YAML at most"
BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")  # YAML's line ends, no more
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z")  # 010 is 8 to one YAML and 10 to the next: a string to us
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?\Z")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")
LITERALS: dict[str, Any] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
}

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """The plain values, and the place of every key and value by its path."""

    value: Any
    values: dict[Path_, Span]
    keys: dict[Path_, Span]

    def span(self, path: Path_, key: bool = False) -> Span:
        """The place of a value (or its key), or of the nearest thing around it that exists."""
        places = self.keys if key else self.values
        while path and path not in places:
            path, places = path[:-1], self.keys if path[:-1] in self.keys else self.values
        return places[path]


def read_text(path: Path) -> str:
    """The file's text; SpecError where it cannot be read, is too large, or is not text."""
    name = _tail(str(path))
    try:
        if path.is_dir():
            raise _plain("file", f"{name} is a directory, not a spec", "name a .yaml file in it")
        with path.open("rb") as f:
            data = f.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _plain("file", f"{name} does not exist", "check the path; `nsagen list` shows the ready specs") from None
    except OSError as error:
        raise _plain("file", f"{name} cannot be read: {error.strerror}", "check its permissions") from None
    except ValueError as error:  # a NUL in the path
        raise _plain("file", f"{name} cannot be read: {error}", "check the path") from None
    if len(data) > MAX_BYTES:
        raise _plain("size", f"{name} is larger than {MAX_BYTES} bytes", PAGE)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _plain("encoding", f"{name} is not UTF-8 (byte {error.start})", "save it as UTF-8") from None


def _tail(path: str, limit: int = 160) -> str:
    """The path, or its end with an ellipsis: a message has room for what is wrong with it too."""
    return path if len(path) <= limit else "…" + path[1 - limit :]


def _plain(rule: str, message: str, hint: str) -> SpecError:
    return SpecError([Diagnostic(rule, message, None, hint)])


def parse(text: str, file: str) -> Document:
    """The document in `text`; SpecError with every structural problem at once."""
    reader = _Reader(text, file)
    reader.check_events()
    return reader.document()


class _Replay(Composer, Resolver):
    """Makes nodes of events that were found harmless, without reading the text again."""

    def __init__(self, events: list[Any]) -> None:
        Composer.__init__(self)
        Resolver.__init__(self)
        self.events = events[::-1]

    def check_event(self, *choices: type) -> bool:
        return bool(self.events) and (not choices or isinstance(self.events[-1], choices))

    def peek_event(self) -> Any:
        return self.events[-1]

    def get_event(self) -> Any:
        return self.events.pop()


class _Reader:
    def __init__(self, text: str, file: str) -> None:
        if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
            raise _plain("size", f"{_tail(file)} is larger than {MAX_BYTES} bytes", PAGE)
        self.text, self.file = text.removeprefix("\ufeff"), file
        self.lines = BREAK.split(self.text)
        if len(self.lines) > 1 and not self.lines[-1]:  # after the last line's end
            self.lines.pop()
        self.problems: list[Diagnostic] = []
        self.events: list[Any] = []
        self.values: dict[Path_, Span] = {}
        self.keys: dict[Path_, Span] = {}

    def place(self, start: Any, end: Any) -> Span:
        if start.line >= len(self.lines):  # the end of the file: behind the last thing in it
            return self._at(len(self.lines) - 1, len(self.lines[-1]))
        last = end.column if end.line == start.line else len(self.lines[start.line].rstrip())
        return self._at(start.line, start.column, last)

    def _at(self, line: int, column: int, end: int = 0) -> Span:
        """The place at 0-based line and columns, one column wide or more."""
        return Span(self.file, line + 1, column + 1, max(end, column + 1) + 1, self.lines[line])

    def refuse(self, rule: str, message: str, at: Any, hint: str) -> None:
        self.problems.append(Diagnostic(rule, message, self.place(at.start_mark, at.end_mark), hint))

    def check_events(self) -> None:
        """Depth, tags, aliases and documents, on the flat event stream: no recursion has happened yet."""
        depth = documents = 0
        for event in self._events():
            self.events.append(event)
            if len(self.events) > MAX_EVENTS:
                self.refuse("size", f"more than {MAX_EVENTS} words and signs", event, PAGE)
                break
            if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                depth += 1
                if depth > MAX_DEPTH:
                    self.refuse("depth", f"nesting is deeper than {MAX_DEPTH}", event, "a spec needs three levels")
                    break
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                depth -= 1
            elif isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.refuse("document", "a second document starts here", event, "one spec a file")
                    break
            self._check_event(event)
        self._stop()

    def _events(self) -> Iterator[Any]:
        loader: Any = None
        try:
            loader = yaml.SafeLoader(self.text)
            while loader.check_event():
                yield loader.get_event()
        except ReaderError as error:
            self._unprintable(error)
        except yaml.MarkedYAMLError as error:
            self._syntax(error.problem or error.context or "it breaks off", error.problem_mark or error.context_mark)
        except (ValueError, OverflowError):  # PyYAML's own: "\UFFFFFFFF", %YAML with thousands of digits
            self._syntax("a number is too large here", loader.get_mark())
        except RecursionError:
            raise _plain("depth", f"{_tail(self.file)} is nested too deeply", "a spec needs three levels") from None

    def _syntax(self, what: str, mark: Any) -> None:
        hint = "indent with spaces" if "'\\t'" in what else "check indentation, colons and quotes"
        self.problems.append(Diagnostic("syntax", f"not YAML: {short(what, 160)}", self.place(mark, mark), hint))

    def _unprintable(self, error: ReaderError) -> None:
        before = BREAK.split(self.text[: error.position])
        span = self._at(min(len(before), len(self.lines)) - 1, len(before[-1]))
        message = f"not YAML: the character U+{ord(self.text[error.position]):04X} is not allowed"
        self.problems.append(Diagnostic("syntax", message, span, "save it as plain text"))

    def _check_event(self, event: Any) -> None:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            self.refuse(
                "alias", f"anchors and aliases are not allowed (`{short(event.anchor)}`)", event, "write the value out"
            )
        elif getattr(event, "tag", None):
            self.refuse("tag", f"tags are not allowed (`{short(event.tag)}`)", event, "remove the tag")

    def _stop(self) -> None:
        if self.problems:
            raise SpecError(self.problems)

    def document(self) -> Document:
        node = _Replay(self.events).get_single_node()
        if node is None:
            raise _plain("empty", f"{_tail(self.file)} is empty", "start with `nsagen new NAME`")
        if not isinstance(node, yaml.MappingNode):
            self.refuse(
                "mapping", "a spec is a mapping with the keys name, heads and branches", node, "see `nsagen new NAME`"
            )
            self._stop()
        value = self._value(node, ())
        self._stop()
        return Document(value, self.values, self.keys)

    def _value(self, node: Any, path: Path_) -> Any:
        self.values[path] = self.place(node.start_mark, node.end_mark)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*path, i)) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: Any, path: Path_) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                self.refuse("key", "a key must be a word", key_node, "write `name: value`")
                continue
            if key == "<<" and key_node.style is None:
                self.refuse("merge", "merge keys are not allowed (`<<`)", key_node, "write the keys out")
                continue
            if key in result:
                first = self.keys[(*path, key)]
                self.refuse(
                    "duplicate",
                    f"`{short(key)}` is given twice (first in line {first.line})",
                    key_node,
                    "remove one of them",
                )
                continue
            self.keys[(*path, key)] = self.place(key_node.start_mark, key_node.end_mark)
            result[key] = self._value(value_node, (*path, key))
        return result

    def _scalar(self, node: Any) -> Any:
        text: str = node.value
        if node.style is not None:  # quoted or block: a string, whatever it looks like
            return text
        if text in LITERALS:
            return LITERALS[text]
        if INTEGER.match(text):
            digits = len(text.lstrip("+-"))
            if digits > MAX_DIGITS:
                self.refuse(
                    "number", f"a number of {digits} digits, over {MAX_DIGITS}", node, "no field needs more than seven"
                )
                return None
            return int(text)
        if NOT_FINITE.match(text):
            return float(text.lower().replace(".", ""))
        return float(text) if FLOAT.match(text) else text

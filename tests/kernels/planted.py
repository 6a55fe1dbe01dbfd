"""Modules with a fault in their text, to show that a test would see it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nsagen import api
from nsagen.compiler import compile_spec


def planted(spec: Mapping[str, Any], *faults: tuple[str, str, str]) -> Any:
    """The spec's module with each fault (function, sound text, faulty text) planted in all places of that function.

    A fault that finds no place fails: else a change of a template would turn its test into one of the sound module.
    """
    compiled = compile_spec(api.read(dict(spec)))
    source = compiled.source
    for function, sound, faulty in faults:
        found = re.search(rf"^def {function}\(.*?(?=^(def|class|@|_[A-Z]+ =) ?|\Z)", source, re.M | re.S)
        assert found, f"no function {function}"
        assert sound in found[0], f"{function} does not contain {sound!r}"
        source = source[: found.start()] + found[0].replace(sound, faulty) + source[found.end() :]
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    source = source.replace(compiled.digest, digest)  # its custom ops are its own
    return api.module_of(replace(compiled, source=source, digest=digest))

"""The key of a kernel's source: what was measured holds for that text and for the device functions it calls."""

from __future__ import annotations

import ast
import hashlib
import re
from functools import lru_cache

from nsagen.files import PACKAGE

DIGITS = 12
DEVICE = ("device", "hopper", "lanes")  # modules of the runtime whose functions kernels call


def kernel_key(source: str) -> str:
    """The hash of a kernel's text, helpers and all, and of the device functions it calls, and those they call."""
    library = _library()
    wanted, found = library.keys() & set(re.findall(rf"\b(?:{'|'.join(DEVICE)})\.(\w+)", source)), set[str]()
    while wanted - found:
        name = min(wanted - found)
        found.add(name)
        wanted |= library.keys() & set(re.findall(r"\b(\w+)\(", library[name]))
    text = "\n".join([source, *(library[name] for name in sorted(found))])
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


@lru_cache(maxsize=1)
def _library() -> dict[str, str]:
    """Text of every function of the runtime's modules for the device, which are read and not imported."""
    found: dict[str, str] = {}
    for name in DEVICE:
        text = (PACKAGE / "runtime" / f"{name}.py").read_text(encoding="utf-8")
        functions = [x for x in ast.parse(text).body if isinstance(x, ast.FunctionDef)]
        found |= {x.name: ast.get_source_segment(text, x) or "" for x in functions}
    return found

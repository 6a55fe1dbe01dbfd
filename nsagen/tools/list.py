"""`nsagen list`: the ready specs."""

from __future__ import annotations

import json
from collections.abc import Iterator

from nsagen.api import ready_specs
from nsagen.spec import Spec, load_spec
from nsagen.tools.console import table


def lines() -> Iterator[str]:
    rows = [_row(load_spec(path)) for path in ready_specs().values()]
    if not rows:
        yield "no ready specs are installed"
        return
    yield table(("name", "heads", "dims", "K/V", "combine", "branches"), rows)


def _row(spec: Spec) -> tuple[str, ...]:
    h = spec.heads
    options = spec.to_dict()["branches"]
    branches = ", ".join(f"{name} {_brief(options[name])}" for name in options)
    return spec.name, f"{h.query}/{h.kv}", f"{h.qk_dim}/{h.v_dim}", spec.kv, spec.combine, branches


def _brief(options: dict[str, object]) -> str:
    return "(" + " ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in options.items()) + ")"

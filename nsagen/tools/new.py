"""`nsagen new`: a spec to start from, with comments."""

from __future__ import annotations

import re
from pathlib import Path

from nsagen.api import ready_specs
from nsagen.errors import NsagenError
from nsagen.spec import parse_spec

TEXT = """\
# A sparse attention for nsagen: `nsagen check {name}.yaml`, then `nsagen build {name}.yaml`.
name: {name}

# Query heads share KV heads in groups of query/kv (1 to 64). Dims of q and k, and of v: 16 to 256, in steps of 8.
heads: {{query: 64, kv: 4, qk_dim: 128, v_dim: 128}}

# shared: all branches read one k and v.  per_branch: each has its own.
kv: shared

# Each branch attends over its own keys; leave out those you do not want. Their order is the order of the gates.
branches:
  # One key for a block of `block` tokens, one block every `stride` tokens (stride divides block).
  # pool: mean | weighted | linear | mlp
  compressed: {{block: 32, stride: 16, pool: mean}}

  # The `top_n` best blocks of `block` tokens by the compressed scores, the first `initial` and last `local` among them.
  # selected: {{block: 64, top_n: 16, initial: 1, local: 2}}

  # The last `size` tokens, the query's own included, and the first `sinks` tokens.
  window: {{size: 512, sinks: 0}}

# gated_sum: the caller's gates weigh the branches.  one_softmax: over the union of their keys.  single: one branch.
combine: gated_sum

# Sequences of fewer tokens attend densely, through torch (a call may say otherwise). 0: none.
# dense_below: 6144
"""


def new(name: str, ready: str | None = None, folder: Path | None = None) -> Path:
    """Write NAME.yaml, a copy of a ready spec where one is named; never over a file that is there."""
    path = (folder or Path()) / f"{name}.yaml"
    text = _copy(ready, name) if ready else TEXT.format(name=name)
    parse_spec(text, str(path))  # a bad name is refused by the same rule as in a spec
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise NsagenError(f"{path} exists already: choose another name, or remove it") from None
    return path


def _copy(ready: str, name: str) -> str:
    specs = ready_specs()
    if ready not in specs:
        raise NsagenError(
            f"no ready spec is named {ready!r}: choose from {', '.join(specs) or 'none; none is installed'}"
        )
    text = specs[ready].read_text(encoding="utf-8")
    return re.sub(r"(?m)^name:[ \t]*\S+", f"name: {name}", text, count=1)

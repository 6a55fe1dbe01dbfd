"""Many sequences, each a program's alone (decode_whole) and shared out: the same outputs, lengths and caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from served import WINDOW, spec
from strategies import make_inputs

import nsagen
from nsagen.runtime import split

SPEC = spec(
    "serve_crowd", "gated_sum", "shared", {"query": 16, "kv": 4, "qk_dim": 32, "v_dim": 32},
    compressed={"block": 8, "stride": 4, "pool": "mean"},
    selected={"block": 16, "top_n": 2, "initial": 1, "local": 1}, window=WINDOW,
)  # fmt: skip
TOKENS = 41


@pytest.mark.parametrize(("sequences", "page"), [(64, 16), (65, None)])  # 256 programs, and a crowd of 260
def test_the_same_as_shared_out(sequences: int, page: int | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 on a GPU, whose tiles depend on how many there are; two steps, the second after a block has ended."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    module: Any = nsagen.load(SPEC)
    x: Any = make_inputs(SPEC, sequences, TOKENS, dtype, device, seed=7)
    q, k, v, gates = (one.detach() for one in x)
    phi = module.Compressor(device=device, dtype=dtype)
    found: list[list[torch.Tensor]] = []
    for programs in (split.PROGRAMS, 4 * sequences + 1):
        monkeypatch.setattr(split, "PROGRAMS", programs)
        assert split.whole(q[:, :1], 4) == (programs == 256)
        cache = module.KVCache(sequences, 48, device=device, dtype=dtype, page_size=page)
        cache.append({"compressed": k[:, :-2]}, {"compressed": v[:, :-2]}, phi, None)
        outs: list[torch.Tensor] = []
        for t in (TOKENS - 2, TOKENS - 1):
            at = slice(t, t + 1)
            outs.append(module.decode(q[:, at], k[:, at], v[:, at], gates[:, at], phi, cache))
        found.append([*outs, cache.lengths, cache["k"], cache["k_cmp"]])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert found[0][0].abs().max() > 0.1

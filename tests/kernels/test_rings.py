"""Rings of a cache: windows and φ's tokens keep the last ones alone, and the numbers stay those of the forward."""

from __future__ import annotations

import pytest
import torch
from served import SPECS, Served, cut

import nsagen
from nsagen.errors import InputError


@pytest.mark.parametrize(
    ("name", "page", "dtype"),
    [
        ("whole", 8, torch.float32), ("near", None, torch.float32), ("near_union", 8, torch.float32),
        ("whole", None, torch.float64), ("near_union", 24, torch.float64),
    ],
)  # fmt: skip
def test_rounds_of_a_ring_with_drafts(name: str, page: int | None, dtype: torch.dtype, device: str) -> None:
    """Several times around the ring; 8 tokens taken back where they end a block, and in two goes across its seam."""
    of = Served(name, 61, device, page, dtype)
    of.step(0, 3)
    of.step(3, 22)
    at = 22
    for back in (8, 1, 5):
        of.step(at, at + 8, decode=True)
        of.cache.truncate(torch.full_like(of.cache.lengths, at + 8 - back + back // 2))
        of.cache.truncate(torch.full_like(of.cache.lengths, at + 8 - back))
        at += 8 - back
        of.step(at, at + 1, decode=True)
        at += 1
    of.step(at, 61)


def test_more_than_a_ring_holds(device: str) -> None:
    """Refused where the host can know, before anything is lost; a new sequence may always begin."""
    of = Served("whole", 40, device, None)
    of.step(0, 40)
    with pytest.raises(InputError, match=r"a ring takes back 8 tokens .*, or all, got lengths \[31\] for sequences \[1\]"):
        of.cache.truncate(torch.tensor([32, 31], device=device, dtype=torch.int32))
    of.cache.truncate(torch.full_like(of.cache.lengths, 33))
    with pytest.raises(InputError, match="a ring takes back 8 tokens"):  # from the longest, in whatever steps
        of.cache.truncate(torch.full_like(of.cache.lengths, 31))
    of.step(33, 40, decode=True)
    of.cache.truncate(torch.zeros_like(of.cache.lengths))
    of.step(0, 12)
    of.cache.truncate(torch.full_like(of.cache.lengths, 2))  # nothing has been overwritten yet
    of.step(2, 10, decode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_capture_loses_is_nan(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host cannot ask, the sequence gives NaN, by decode and prefill, until it begins anew; others go on."""
    of = Served("whole", 40, device, 8, dtype)
    of.step(0, 32)
    monkeypatch.setattr(of.cache, "_capturing", lambda: True)
    of.cache.truncate(torch.tensor([23, 24], device=device, dtype=torch.int32))
    for first in range(24, 38, 2):
        out = of.outputs(first, first + 2, decode=first % 4 == 0)
        assert out[0].isnan().all()
        torch.testing.assert_close(out[1], of.want[1, first : first + 2], rtol=1e-4, atol=2e-5)
    of.cache.truncate(torch.zeros_like(of.cache.lengths))
    of.step(0, 32)


def test_bytes_of_a_long_cache() -> None:
    """Of nsa_paper only the selected branch keeps 65,536 tokens: 57 % of what three branches would."""
    module = nsagen.load("nsa_paper")
    cache = module.KVCache(2, 65536, device="meta", dtype=torch.bfloat16)
    rows = (65536) + (512 - 1 + 8) + (32 - 1 + 8) + 65536 // 16  # selected, window, φ's tokens, compressed
    spare = 8
    assert cache.nbytes == 2 * 4 * (2 * rows * (192 + 128) + spare // 2 * (192 + 128))
    assert cache["v_window"].shape == (2, 519, 4, 128)
    assert cache["k_selected"].shape == (2, 65536, 4, 192)


def test_a_short_cache_has_no_more_rows_than_tokens(device: str) -> None:
    cache = nsagen.load(SPECS["whole"]).KVCache(2, 16, device=device, dtype=torch.float32)
    assert cache["k_window"].shape[1] == 16
    of = Served("whole", 16, device, None, room=16)
    of.step(0, 9)
    of.step(9, 16, decode=True)
    of.cache.truncate(torch.full_like(of.cache.lengths, 1))
    of.step(1, 16)


@pytest.mark.parametrize("absent", [-1, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_of_no_page_are_zero(absent: int, dtype: torch.dtype, device: str) -> None:
    of, zeroed = (Served("shared", 33, device, 8, dtype) for _ in range(2))
    for one in (of, zeroed):
        one.step(0, 30)
    of.cache.table[1, 1:3] = absent
    for name in ("k", "v", "k_cmp", "v_cmp"):
        zeroed.cache[name][zeroed.cache.table[1, 1:3].long()] = 0
    x = [[cut(y, slice(*span)) for y in (of.q, of.k, of.v, of.gates)] for span in ((30, 32), (32, 33))]
    for call, y in zip(("prefill", "decode"), x, strict=True):
        got, want = (getattr(one.module, call)(*y, one.phi, one.cache) for one in (of, zeroed))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    of.cache.table[1, 4] = absent  # that of the next token: what is appended there is dropped
    before = {name: of.cache[name].clone() for name in ("k", "v", "k_cmp", "v_cmp")}
    of.outputs(32, 33, decode=True)
    for name, x in before.items():
        assert torch.equal(of.cache[name][5:], x[5:])

"""Rings of a cache: windows and φ's tokens keep the last ones alone, and the numbers stay those of the forward."""

from __future__ import annotations

import pytest
import torch
from served import Served

import nsagen
from nsagen.errors import InputError


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize(
    ("name", "page", "dtype"),
    [
        ("rings", None, torch.float32), ("near", 4, torch.float32), ("rings", 4, torch.float64),
        ("near", None, torch.float64),
    ],
)  # fmt: skip
def test_rounds_of_a_ring_with_drafts(name: str, page: int | None, dtype: torch.dtype, device: str) -> None:
    """More than once around it; 8 tokens taken back where they ended a block, and fewer in two goes across the seam."""
    of = Served(name, 31, device, page, dtype)
    of.step(0, 1)
    of.step(1, 14)
    of.step(14, 22, decode=True)
    of.cache.truncate(torch.full_like(of.cache.lengths, 17))
    of.cache.truncate(torch.full_like(of.cache.lengths, 14))
    of.step(14, 17)
    of.step(17, 20, decode=True)
    of.cache.truncate(torch.full_like(of.cache.lengths, 19))
    of.step(19, 31)
    of.cache.truncate(torch.full_like(of.cache.lengths, 23))
    of.step(23, 24, decode=True)


def test_more_than_a_ring_holds(device: str) -> None:
    """Refused where the host can know, before anything is lost; a new sequence may always begin."""
    of = Served("rings", 24, device, None, torch.float64)

    def cut_to(*lengths: int) -> None:
        of.cache.truncate(torch.tensor(lengths, device=device, dtype=torch.int32))

    of.step(0, 24)
    with pytest.raises(InputError, match=r"takes back 8 tokens .*, or all, got lengths \[15\] for sequences \[1\]"):
        cut_to(16, 15)
    cut_to(18, 18)
    with pytest.raises(InputError, match="a ring takes back 8 tokens from the longest that a sequence has been"):
        cut_to(18, 15)
    of.step(18, 19, decode=True)
    cut_to(0, 0)
    of.step(0, 11)
    cut_to(2, 2)  # nothing has been overwritten yet
    of.step(2, 10, decode=True)


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_capture_loses_is_nan(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host cannot ask, the sequence gives NaN, by decode and prefill, until it begins anew; others go on."""
    of = Served("rings", 24, device, 4, dtype)
    of.step(0, 24)
    monkeypatch.setattr(of.cache, "_capturing", lambda: True)
    of.cache.truncate(torch.tensor([15, 16], device=device, dtype=torch.int32))
    for first, end, decode in ((16, 17, True), (17, 20, False), (20, 22, True)):
        out = of.outputs(first, end, decode)
        assert out[0].isnan().all()
        torch.testing.assert_close(out[1], of.want[1, first:end], rtol=1e-4, atol=2e-5)
    of.cache.truncate(torch.zeros_like(of.cache.lengths))
    of.step(0, 20)


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
    of = Served("rings", 8, device, None, room=8)
    assert of.cache["k_window"].shape[1] == 8
    of.step(0, 3)
    of.step(3, 8, decode=True)
    of.cache.truncate(torch.full_like(of.cache.lengths, 1))
    of.step(1, 8)


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_of_no_page_are_zero(dtype: torch.dtype, device: str) -> None:
    of, zeroed = (Served("rings", 19, device, 4, dtype) for _ in range(2))
    for one in (of, zeroed):
        one.step(0, 16)
    of.cache.table[1, 1:3] = torch.tensor([-1, 10**6])
    names = ("k_selected", "v_selected", "k_cmp", "v_cmp")
    for name in names:
        zeroed.cache[name][zeroed.cache.table[1, 1:3].long()] = 0
    for first, decode in ((16, False), (17, True)):
        got, want = (one.outputs(first, first + 1, decode) for one in (of, zeroed))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    page = int(of.cache.table[1, 4])  # of the next token: what is appended there is dropped
    of.cache.table[1, 4] = -1
    before = {name: of.cache[name].clone() for name in names}
    of.outputs(18, 19, decode=True)
    for name, x in before.items():
        assert torch.equal(of.cache[name][page], x[page])


@pytest.mark.parametrize("page", [None, 4])
def test_prefill_in_slices(page: int | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence at a time, as where the branches' outputs of all would take too much."""
    of = Served("rings", 14, device, page)
    monkeypatch.setattr(of.module.launch, "SLICE_BYTES", 1)
    of.step(0, 5)
    of.step(5, 14)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_truncation() -> None:
    """It cannot ask, so the sequence that lost tokens gives NaN; the other one goes on."""
    of = Served("rings", 26, "cuda", None)
    of.step(0, 24)
    of.step(24, 25, decode=True)
    at = torch.full_like(of.cache.lengths, 25)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        of.cache.truncate(at)
    at.copy_(torch.tensor([10, 24]))
    graph.replay()
    assert of.cache.lengths.tolist() == [10, 24]
    out = of.outputs(24, 25, decode=True)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1], of.want[1, 24:25], rtol=1e-4, atol=2e-5)

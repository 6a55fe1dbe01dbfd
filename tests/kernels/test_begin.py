"""A short step appends in the launch that scores (decode_begin): the same as in two, over caches of every kind."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from harness import cu_of
from served import COMPRESSED, SELECTED, SPECS, WINDOW, Served, packed, spec

from nsagen.runtime import cache_shape, mlp_step, split
from nsagen.runtime import device as d

JOINED = split.JOINED  # as it is shipped
MEAN = {"compressed": COMPRESSED | {"pool": "mean"}, "selected": SELECTED}
BEGIN = {
    "begin_paged": spec("begin_paged", "gated_sum", **MEAN, window=WINDOW),
    "begin_ringed": spec("begin_ringed", "gated_sum", "per_branch", **MEAN, window=WINDOW),
    "begin_union": spec("begin_union", "one_softmax", **MEAN),  # scores keys alone, pools values, too
    "begin_pooled": spec("begin_pooled", "single", selected=SELECTED | {"from": "pooled"}),
}
MLP = {"compressed": COMPRESSED | {"pool": "mlp"}, "selected": SELECTED}
APART = {"compressed": COMPRESSED | {"pool": "mlp"}, "selected": SELECTED | {"from": "pooled"}}
BEGIN |= {  # φ by programs of the launch, for which those that score and those that keep its rows wait
    "begin_mlp": spec("begin_mlp", "gated_sum", **MLP, window=WINDOW),
    "begin_mlp_ringed": spec("begin_mlp_ringed", "gated_sum", "per_branch", **MLP, window=WINDOW),
    "begin_mlp_union": spec("begin_mlp_union", "one_softmax", **MLP),
    "begin_mlp_apart": spec("begin_mlp_apart", "gated_sum", **APART),  # what scores are of is a mean
}


class Twins:
    """A spec with two caches: of a step in one launch, and in two."""

    def __init__(self, name: str, page: int | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(SPECS, name, BEGIN[name])
        self.monkeypatch, self.device = monkeypatch, device
        self.closed = 0  # steps in which programs of the launch that scores were given φ's weights
        closing = mlp_step.closing

        def counted(*given: Any) -> Any:
            self.closed += 1
            return closing(*given)

        monkeypatch.setattr(mlp_step, "closing", counted)
        self.joined, self.apart = (Served(name, 33, device, page, room=40) for _ in range(2))
        kept = cache_shape.values(self.joined.cache.layout, self.joined.cache.mean_of)
        self.pooled = {value.name for value in kept if value.stride > 1}
        assert self.pooled

    def both(self, do: Any) -> None:
        for of in (self.joined, self.apart):
            do(of)

    def step(self, tokens: int, at: int = 0) -> torch.Tensor:
        """The same numbers to both: which of a sequence's tokens they are does not matter here. Returns the output."""
        outs: list[torch.Tensor] = []
        for of, most in ((self.joined, JOINED), (self.apart, 0)):
            self.monkeypatch.setattr(split, "JOINED", most)
            outs.append(of.outputs(at, at + tokens, decode=True))
        torch.testing.assert_close(*outs, rtol=1e-4, atol=2e-5, equal_nan=True)
        self.assert_same_caches()
        return outs[0]

    def assert_same_caches(self) -> None:
        assert torch.equal(self.joined.cache.lengths, self.apart.cache.lengths)
        assert not self.joined.cache.arrived.any()  # ready for the next step
        for name in self.joined.cache._stores:
            pooled = name in self.pooled  # a mean is a sum in the order of the launch's warps
            rtol, atol = (2e-6, 1e-6) if pooled else (0.0, 0.0)
            torch.testing.assert_close(
                self.joined.cache[name], self.apart.cache[name], rtol=rtol, atol=atol, equal_nan=True
            )

    def prefill(self, counts: list[int]) -> None:
        """Lengths of their own."""
        spans = [slice(0, n) for n in counts]

        def do(of: Served) -> None:
            x = [packed(one, spans) for one in (of.q, of.k, of.v, of.gates)]
            of.module.prefill(*x, of.phi, of.cache, cu_of([0, *accumulate(counts)], self.device))

        self.both(do)


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("begin_paged", 8), ("begin_ringed", None), ("begin_union", 16), ("begin_pooled", 8),
        ("begin_mlp", 8), ("begin_mlp", None), ("begin_mlp_ringed", None), ("begin_mlp_union", 16),
        ("begin_mlp_apart", 8),
    ],
)  # fmt: skip
def test_ragged_rolled_back_and_full(name: str, page: int | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence of 12 tokens beside one of 3; up to four tokens a step, so that at most one block ends."""
    of = Twins(name, page, device, monkeypatch)
    of.prefill([12, 3])
    for at, tokens in enumerate((1, 4, 3, 1)):
        of.step(tokens, at)
    of.both(lambda x: x.cache.truncate(x.cache.lengths - 5))
    for at, tokens in enumerate((1, 1, 2, 4, 4, 4, 4, 4)):  # the longer one is full: its last tokens are dropped
        of.both(lambda x: setattr(x.cache, "_most", 0))  # as in a captured step, where the host can't ask
        of.step(tokens, at)
    assert of.joined.cache.lengths.tolist()[0] > 30
    assert of.closed == (12 if "mlp" in name else 0)


@pytest.mark.parametrize("name", ["begin_paged", "begin_mlp"])
def test_pages_that_are_not_there(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their keys are zeros, a block that ends there, too."""
    of = Twins(name, 8, device, monkeypatch)
    of.prefill([14, 7])

    def tear(x: Served) -> None:
        x.cache.table[0, 1] = -1
        x.cache.table[1, 1] = 10**6

    of.both(tear)
    for at in range(6):
        assert bool(of.step(1, at).isfinite().all())


@pytest.mark.parametrize("name", ["begin_ringed", "begin_mlp_ringed"])
def test_a_sequence_that_lost_what_it_needs_is_nan(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = Twins(name, None, device, monkeypatch)
    of.prefill([14, 7])
    of.both(lambda x: x.cache._taken_back.lost.copy_(torch.tensor([True, False])))
    for at in range(4):
        out = of.step(1, at)
        assert bool(out[0].isnan().all()) and bool(out[1].isfinite().all())


def test_a_step_that_ends_early_can_be_taken_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After φ's parts are there, before decode_merge: the 16th token ends a block, whose parts are counted anew."""
    of = Twins("begin_mlp", 8, device, monkeypatch)
    of.prefill([15, 3])
    joined = of.joined
    monkeypatch.setattr(split, "JOINED", JOINED)
    with monkeypatch.context() as broken:
        broken.setattr(joined.module, "_decode_attend", None)
        with pytest.raises(TypeError):
            joined.outputs(0, 1, decode=True)
    assert not joined.cache.arrived.any()  # else those who wait would not, on a GPU
    of.step(1)


@triton.jit
def rows_both_ways(
    new_ptr, store_ptr, table_ptr, first_ptr, second_ptr, pages, start, past, end, DIM: tl.constexpr,
    PAGE: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = start + tl.arange(0, 16)
    end = tl.minimum(end, start + BLOCK)
    row = d.block_rows(table_ptr, pages, start, s, s < tl.minimum(past, end), BLOCK, PAGE, SINKS, RING)
    known = d.known_rows(new_ptr, DIM, store_ptr, DIM, None, 1, table_ptr, row, s, s < end, past, None, DIM, 32)
    plain = d.plain_rows(new_ptr, DIM, store_ptr, DIM, table_ptr, row, s, s < end, past, DIM, 32)
    at = tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(first_ptr + at, known)
    tl.store(second_ptr + at, plain)


@pytest.mark.parametrize("block", [8, 10])  # of pages of 8: two look-ups a block, or one a token
@pytest.mark.parametrize(
    ("ring", "table"), [((0, 0), None), ((2, 17), None), ((0, 0), [3, 0, -1, 9]), ((0, 0), [3, 1, 0, 2])]
)
def test_one_load_for_two(ring: tuple[int, int], table: list[int] | None, block: int, device: str) -> None:
    """A block from token 12 on, in two pages of the four that are there; from 18 on its tokens are new."""
    g = torch.Generator().manual_seed(1)
    new, store = (torch.randn(n, 24, generator=g).to(device) for n in (8, 40))
    pages = None if table is None else torch.tensor(table, dtype=torch.int32, device=device)
    known, plain = (torch.empty(16, 32, device=device) for _ in range(2))
    rows_both_ways[(1,)](new, store, pages, known, plain, 4, 12, 18, 26, 24, 8, *ring, block)
    torch.testing.assert_close(known, plain, rtol=0, atol=0)
    assert bool((plain[6:block, :24] == new[: block - 6]).all())
    assert bool((plain[block:] == 0).all()) and bool((plain[:, 24:] == 0).all())
    if table is not None:
        for i in range(6):
            page = table[(12 + i) // 8]
            want = store[page * 8 + (12 + i) % 8] if 0 <= page < 4 else torch.zeros(24, device=device)
            assert bool((plain[i, :24] == want).all())

"""Prefill and decode give the numbers of the forward over whole sequences: in chunks, in pages, ragged, rolled back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from harness import cu_of
from served import COMPRESSED, LISTED, SELECTED, SMALL, SPECS, WINDOW, Served, cut, packed, spec
from torch import Tensor

import nsagen
from nsagen.errors import InputError
from nsagen.render import split_view
from nsagen.runtime import launch, split


@pytest.mark.parametrize(
    ("name", "page"), [("window", None), ("whole", None), ("whole", 8), ("shared", 8), ("pooled", None), ("union", 8)]
)
def test_chunks_then_steps(name: str, page: int | None, device: str) -> None:
    of = Served(name, 33, device, page)
    of.step(0, 13)
    of.step(13, 24)
    for first, end in ((24, 25), (25, 33)):
        of.step(first, end, decode=True)


@pytest.mark.parametrize("name", SPECS)
def test_without_kernels(name: str, device: str) -> None:
    of = Served(name, 33, device, 24, torch.float64)
    of.step(0, 13)
    of.step(13, 25)
    of.step(25, 33, decode=True)


def test_tokens_taken_back(device: str) -> None:
    """Wrong drafts are appended and rolled back: what follows does not see them, nor blocks that they ended."""
    of = Served("whole", 29, device, None)
    of.step(0, 21)
    draft = [cut(x, slice(0, 7)) for x in (of.q, of.k, of.v, of.gates)]
    of.module.decode(*draft, of.phi, of.cache)
    of.cache.truncate(torch.full_like(of.cache.lengths, 22))
    assert of.cache.lengths.tolist() == [22, 22]
    of.cache.truncate(torch.full_like(of.cache.lengths, 21))
    of.step(21, 29, decode=True)


def test_ragged_prefill(device: str) -> None:
    """Packed new tokens, another number of each sequence, none of one, after a prefix of other lengths."""
    of = Served("whole", 33, device, 8)
    for ends in ([0, 9, 9], [0, 5, 22], [0, 0, 3], [0, 19, 27]):
        counts = [b - a for a, b in pairwise(ends)]
        at = of.cache.lengths.tolist()
        spans = [slice(a, a + n) for a, n in zip(at, counts, strict=True)]
        x = [packed(one, spans) for one in (of.q, of.k, of.v, of.gates)]
        out = of.module.prefill(*x, of.phi, of.cache, cu_of(ends, device))
        torch.testing.assert_close(out, packed(of.want, spans), rtol=1e-4, atol=2e-5)
        assert of.cache.lengths.tolist() == [a + n for a, n in zip(at, counts, strict=True)]


def test_pages_in_any_order(device: str) -> None:
    of = Served("shared", 17, device, 8)
    pages = of.cache.table.numel()
    shuffled = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).to(of.cache.table)
    of.cache.table.copy_(shuffled.view_as(of.cache.table))
    of.step(0, 15)
    of.step(15, 17, decode=True)


def test_misuse(device: str) -> None:
    of = Served("window", 60, device, None)
    first = [cut(x, slice(0, 9)) for x in (of.q, of.k, of.v, of.gates)]
    with pytest.raises(InputError, match=r"decode: a step takes up to 8 tokens a sequence, got 9: use prefill"):
        of.module.decode(*first, of.phi, of.cache)
    with pytest.raises(InputError, match=r"prefill: cache must be the module's KVCache, got NoneType"):
        of.module.prefill(*first, of.phi)
    with pytest.raises(InputError, match=r"a call has the cache's 2 sequences, got 1"):
        of.module.prefill(*(cut_batch(x) for x in first), of.phi, of.cache)
    of.step(0, 60)
    with pytest.raises(InputError, match=r"the cache holds 64 tokens a sequence, got 69: truncate it"):
        of.module.prefill(*first, of.phi, of.cache)
    assert of.cache.lengths.tolist() == [60, 60]
    with pytest.raises(InputError, match=r"page_size must be a multiple of 8, got 12"):
        nsagen.load(SPECS["shared"]).KVCache(2, 64, device=device, dtype=torch.float32, page_size=12)
    with pytest.raises(InputError, match=r"a storage has less than 2147483648 rows, got 2147483649: make caches of"):
        nsagen.load(SPECS["shared"]).KVCache(2, 1 << 30, device=device, dtype=torch.float32)


def cut_batch(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[:1]


@pytest.mark.parametrize(("name", "page"), [("whole", 64), ("thirds", None)])
def test_keys_shared_out_in_runs(name: str, page: int | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More keys than a tile, so that programs share them; tokens of a step that are no power of two. Few heads."""
    monkeypatch.setitem(SPECS, "few", SPECS[name] | {"name": f"serve_few_{name}", "heads": SMALL})
    of = Served("few", 78, device, page, room=100)
    of.step(0, 71)
    of.step(71, 72, decode=True)
    of.step(72, 78, decode=True)


@pytest.mark.parametrize(
    ("joined", "riding"),
    [(0, split.MOST_RIDING_FEW), (split.JOINED, split.MOST_RIDING_FEW), (split.JOINED, 0)],
    ids=["appended", "joined", "joined, in heats"],
)
@pytest.mark.parametrize(("name", "page"), [("shared", 8), ("pooled", None), ("pooled", 16), ("ringed", None)])
def test_blocks_that_end_with_a_step(
    name: str, page: int | None, joined: int, riding: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an empty cache on: who scores a block that ends pools it, too, where the append is in the same launch."""
    monkeypatch.setattr(split, "JOINED", joined)
    monkeypatch.setattr(split, "MOST_RIDING_FEW", riding)
    mean = COMPRESSED | {"pool": "mean"}
    ringed = spec("serve_ringed", "gated_sum", "per_branch", compressed=mean, selected=SELECTED, window=WINDOW)
    monkeypatch.setitem(SPECS, "ringed", ringed)
    of = Served(name, 22, device, page)
    for first, end in ((0, 3), (3, 5), *((i, i + 1) for i in range(5, 18)), (18, 20), (20, 22)):
        of.step(first, end, decode=True)


@pytest.mark.parametrize(("name", "page"), [(name, 24 if name == "whole" else None) for name in SPECS])
def test_one_run_a_source(name: str, page: int | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with many sequences: a program has all of a step of one token, and some share one of two."""
    monkeypatch.setattr(split, "PROGRAMS", 1)
    of = Served(name, 44, device, page)
    launched: list[int] = []
    whole = of.module._decode_whole
    monkeypatch.setattr(of.module, "_decode_whole", lambda q, *rest: (launched.append(q.shape[1]), whole(q, *rest))[1])
    of.step(0, 40)
    of.step(40, 41, decode=True)
    of.step(41, 43, decode=True)
    of.step(43, 44, decode=True)
    assert launched == [1, 1]


def test_more_blocks_than_a_program_searches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many sequences, too, some programs share a query then."""
    monkeypatch.setattr(split, "PROGRAMS", 1)
    monkeypatch.setattr(split, "MOST_SEARCHED", 1)
    of = Served("whole", 22, device, None)
    monkeypatch.setattr(of.module, "_decode_whole", None)
    of.step(0, 20)
    of.step(20, 21, decode=True)


@pytest.mark.parametrize(
    ("few", "riding", "searched", "ranked"),
    [
        (0, 0, split.MOST_SEARCHED, 128),
        (0, 0, 0, 128),
        (0, 0, 0, 16),
        (split.FEW, 0, 0, 128),
        (split.FEW, split.MOST_RIDING, 0, 128),
    ],
    ids=["launched", "in heats", "in heats, a final search", "few in heats", "riding"],
)
@pytest.mark.parametrize("block", [1, 2], ids=["keys", "groups"])
def test_candidates_some_at_a_time(
    block: int, few: int, riding: int, searched: int, ranked: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More candidates than a program holds from the first sum to the best, and it is let add up sixteen at once.

    Then a step beside a sequence that is full, as a replayed graph may run it: nothing is written behind the scores.
    """
    monkeypatch.setattr(split, "MOST_CANDIDATES", 16)
    monkeypatch.setattr(split, "FEW", few)
    monkeypatch.setattr(split, "MOST_RIDING", riding)
    monkeypatch.setattr(split, "MOST_RIDING_FEW", riding)
    monkeypatch.setattr(split, "MOST_SEARCHED", searched)
    compressed, selected = {"block": block, "stride": 1, "pool": "mean"}, SELECTED | {"block": block}
    monkeypatch.setattr(split_view, "RANKED", ranked)
    some = spec(f"serve_some_{block}_{ranked}", "gated_sum", compressed=compressed, selected=selected)
    monkeypatch.setitem(SPECS, "some", some | {"heads": SMALL})
    tokens, room = 140 * block, 160 * block
    of = Served("some", tokens, device, None, room=room)
    of.step(0, tokens - 3)
    of.step(tokens - 3, tokens - 1, decode=True)
    behind: list[torch.Tensor] = []
    empty = launch.empty

    def guarded(like: torch.Tensor, shape: tuple[int, ...], *more: Any, **named: Any) -> torch.Tensor:
        if shape[-1] != 256:
            return empty(like, shape, *more, **named)
        flat = torch.full((math.prod(shape) + 64,), float("nan"), device=device)
        behind.append(flat[-64:])
        return flat[:-64].view(shape)

    monkeypatch.setattr(launch, "empty", guarded)
    monkeypatch.setattr(type(of.cache), "_room", lambda *_: None)
    of.cache.lengths[1] = room
    rows = slice(tokens - 1, tokens)
    out = of.module.decode(*(cut(x, rows) for x in (of.q, of.k, of.v, of.gates)), of.phi, of.cache)
    torch.testing.assert_close(out[0], of.want[0, rows], rtol=1e-4, atol=2e-5)
    assert behind and all(x.isnan().all() for x in behind)
    assert of.cache.lengths.tolist() == [tokens, room]


def test_a_step_leaves_the_storage_where_it_is(device: str) -> None:
    """So a captured step may be replayed: nothing of the cache moves, and lengths advance in place."""
    of = Served("whole", 24, device, 8)
    held = [*(s.view.data for s in of.cache._stores.values()), of.cache.lengths, of.cache.table, of.cache.past.lengths]
    places = [x.data_ptr() for x in held]
    of.step(0, 20)
    for first in range(20, 24):
        of.step(first, first + 1, decode=True)
    now = [*(s.view.data for s in of.cache._stores.values()), of.cache.lengths, of.cache.table, of.cache.past.lengths]
    assert [x.data_ptr() for x in now] == places


def test_a_full_cache_drops_what_has_no_room(device: str) -> None:
    """A replay does not pass the host's check: lengths stop at the end, and other sequences' rows stay as they are."""
    of = Served("shared", 33, device, None)
    of.step(0, 20)
    of.cache._most = -100  # as the host's count is after replays
    of.cache.lengths.copy_(torch.tensor([62, 20]))
    before = {name: of.cache[name].clone() for name in ("k", "v", "k_cmp")}
    of.module.decode(*(cut(x, slice(20, 28)) for x in (of.q, of.k, of.v, of.gates)), of.phi, of.cache)
    assert of.cache.lengths.tolist() == [64, 28]
    for name, x in before.items():
        rows = slice(0, 3) if name == "k_cmp" else slice(0, 20)
        assert torch.equal(of.cache[name][1, rows], x[1, rows])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(
    ("name", "page"), [("window", None), ("whole", 8), ("shared", None), ("pooled", 8), ("union", 8)]
)
def test_a_captured_step_replays_at_other_lengths(name: str, page: int | None) -> None:
    """One graph, captured at one length and replayed at the next ones, gives what eager steps and attention give."""
    of = Served(name, 60, "cuda", page)
    of.step(0, 21)
    of.step(21, 22, decode=True)  # compiles
    x = [_still(cut(one, slice(22, 23))) for one in (of.q, of.k, of.v, of.gates)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = of.module.decode(*x, of.phi, of.cache)
    assert of.cache.lengths.tolist() == [22, 22]
    for t in range(22, 60):
        for still, one in zip(x, (of.q, of.k, of.v, of.gates), strict=True):
            _fill(still, cut(one, slice(t, t + 1)))
        graph.replay()
        torch.testing.assert_close(out, of.want[:, t : t + 1], rtol=1e-4, atol=2e-5)
        assert of.cache.lengths.tolist() == [t + 1, t + 1]


def _still(x: Any) -> Any:
    if x is None:
        return None
    return {b: one.clone() for b, one in x.items()} if isinstance(x, Mapping) else x.clone()


def _fill(still: Any, x: Any) -> None:
    if isinstance(x, Mapping):
        for b, one in x.items():
            still[b].copy_(one)
    elif x is not None:
        still.copy_(x)


@pytest.mark.parametrize("page", [8, 16])
def test_blocks_that_begin_within_a_page(page: int, device: str) -> None:
    """Listed by the caller, twenty tokens each: what a cache without pages gives."""
    module = nsagen.load(spec("serve_listed", "single", heads=SMALL, selected=LISTED))
    g = torch.Generator().manual_seed(page)
    q, k, v = (torch.randn(1, 60, heads, 16, generator=g).to(device) for heads in (2, 1, 1))
    blocks = torch.tensor([0, 1, 2], dtype=torch.int32, device=device).expand(1, 60, 1, 3).contiguous()
    table = torch.randperm(-(-80 // page), generator=g).to(device, torch.int32)
    found: list[Tensor] = []
    for size in (None, page):
        cache = module.KVCache(1, 80, device=device, dtype=torch.float32, page_size=size)
        if cache.table is not None:
            cache.table.copy_(table)
        whole, rest = slice(0, 58), slice(58, 60)
        before = module.prefill(q[:, whole], k[:, whole], v[:, whole], None, None, cache, blocks=blocks[:, whole])
        step = module.decode(q[:, rest], k[:, rest], v[:, rest], None, None, cache, blocks=blocks[:, rest])
        found.append(torch.cat((before, step), 1))
    torch.testing.assert_close(found[1], found[0])
    assert found[0].std() > 0.1

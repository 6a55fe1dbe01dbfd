"""What hypothesis draws: legal specs, shapes, packed sequences; and the inputs that belong to a drawn seed.

Sizes are small, since the kernels run in Triton's interpreter: B·T·Hq <= ROWS and T <= TOKENS. Lengths that matter are
drawn often: 1, around l and w, one more than a tile of queries or keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

ROWS, TOKENS, HEADS = 600, 100, 16
GROUPS = (3, 5, 7, 1, 2, 4, 6, 8)
FROMS = ("compressed", "pooled", "caller")
STRIDES = (3, 4, 5, 2, 7, 8, 1)
TILES = (16, 32, 64)  # rows of a query tile, all heads of a group counted; keys of a key tile

Spec = dict[str, Any]
seeds = st.integers(0, 2**31 - 1)


@st.composite
def specs(
    draw: st.DrawFn,
    kinds: Sequence[str] = ("window", "compressed"),
    pools: Sequence[str] = ("mean",),
    combines: Sequence[str] = ("gated_sum", "single"),
    froms: Sequence[str] = FROMS,
) -> Spec:
    """A legal spec over some of the kinds; `single` where it is allowed and one branch is drawn.

    The branches stand in any order. selected takes its blocks from one of `froms`, from the compressed
    branch only where there is one, and from the caller where no other is left.
    """
    names = draw(st.permutations(kinds))[: draw(st.integers(1, len(kinds)))]
    allowed = [c for c in combines if c != "single" or len(names) == 1]
    combine = draw(st.sampled_from(allowed or ["gated_sum"]))
    stride = draw(st.sampled_from(STRIDES))
    block = stride * draw(st.integers(1, max(1, 16 // stride)))
    drawn = {
        "window": draw(_windows()),
        "compressed": draw(_compressed(block, stride, pools)),
        "selected": draw(_selected(block, stride, _possible(froms, names))),
    }
    return {
        "name": "drawn",
        "heads": draw(_heads()),
        "kv": draw(st.sampled_from(("shared", "per_branch"))),
        "branches": {name: drawn[name] for name in names},
        "combine": combine,
    }


def _possible(froms: Sequence[str], names: Sequence[str]) -> list[str]:
    """The `froms` that the branches allow; compressed counts twice, since only there l and d shape the scores."""
    return [f for f in froms if f != "compressed"] + [f for f in froms if f == "compressed" and f in names] * 2


@st.composite
def _heads(draw: st.DrawFn) -> dict[str, int]:
    group = draw(st.sampled_from(GROUPS))
    kv = draw(st.integers(1, max(1, min(3, HEADS // group))))
    dims = st.integers(2, 9).map(lambda n: 8 * n)
    qk_dim, v_dim = draw(dims), draw(dims)
    return {"query": kv * group, "kv": kv, "qk_dim": qk_dim, "v_dim": v_dim}


def _windows() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"size": st.integers(1, 41), "sinks": st.sampled_from((0, 1, 3, 7, 18))})


@st.composite
def _compressed(draw: st.DrawFn, block: int, stride: int, pools: Sequence[str]) -> dict[str, Any]:
    pool = draw(st.sampled_from(tuple(pools)))
    positions = {} if pool == "mean" else {"positions": draw(st.booleans())}
    return {"block": block, "stride": stride, "pool": pool, **positions}


@st.composite
def _selected(draw: st.DrawFn, block: int, stride: int, froms: Sequence[str]) -> dict[str, Any]:
    """d | l' and l <= l' where the compressed branch scores, any l' else; initial and local differ as a rule."""
    scores = draw(st.sampled_from(tuple(froms) or ("caller",)))
    size = block + stride * draw(st.integers(0, 3)) if scores == "compressed" else draw(st.integers(1, 29))
    initial, local, more = draw(st.integers(0, 2)), draw(st.integers(0, 3)), draw(st.integers(0, 4))
    top_n = max(1, initial + local + more)
    return {"block": size, "top_n": top_n, "initial": initial, "local": local, "from": scores}


def lengths(spec: Mapping[str, Any], most: int = TOKENS) -> st.SearchStrategy[int]:
    """T in [1, most], the lengths that matter often among them."""
    group = spec["heads"]["query"] // spec["heads"]["kv"]
    edges = [1, *(tile // group + 1 for tile in TILES), *(tile + 1 for tile in TILES)]
    for options in spec["branches"].values():
        size = options.get("block", options.get("size", 1))
        edges += [size - 1, size, size + 1, 2 * size + 1]
    fitting = sorted({n for n in edges if 1 <= n <= most})
    odd = st.integers(0, (most - 1) // 2).map(lambda n: 2 * n + 1)
    return st.one_of(st.sampled_from(fitting), odd, st.integers(1, most))


def most_tokens(spec: Mapping[str, Any], batch: int = 1) -> int:
    return max(1, min(TOKENS, ROWS // (batch * spec["heads"]["query"])))


def shapes(spec: Mapping[str, Any]) -> st.SearchStrategy[tuple[int, int]]:
    """(B, T)."""
    return st.sampled_from((1, 2)).flatmap(lambda b: st.tuples(st.just(b), lengths(spec, most_tokens(spec, b))))


@st.composite
def packed(draw: st.DrawFn, spec: Mapping[str, Any], empty: bool = True) -> list[int]:
    """cu_seqlens [0, …, T]: up to 6 sequences, of one token, shorter than a block, empty ones if `empty`; T >= 1."""
    budget, ends = most_tokens(spec), [0]
    for _ in range(draw(st.integers(1, 6))):
        room = budget - ends[-1]
        small = st.integers(0 if empty else 1, 3)
        length = draw(st.one_of(small, lengths(spec, room))) if room else 0
        if min(length, room) or empty:
            ends.append(ends[-1] + min(length, room))
    return ends if ends[-1] else [*ends, 1]


class Inputs(NamedTuple):
    """k and v are mappings by branch for per_branch; gates None without gated_sum."""

    q: Tensor
    k: Any
    v: Any
    gates: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        """Every tensor, in the order q, k …, v …, gates."""
        keys = [one for x in (self.k, self.v) for one in (x.values() if isinstance(x, Mapping) else (x,))]
        return [self.q, *keys, *([] if self.gates is None else [self.gates])]


def make_inputs(
    spec: Mapping[str, Any],
    batch: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    strided: bool = False,
) -> Inputs:
    """Leaves that require a gradient: q, k, v standard normal, gates in (0, 1). The seed alone decides the values.

    strided: views of larger buffers with NaN around them: heads first, padded, unaligned; last dim contiguous.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = spec["heads"]
    count = 0

    def leaf(n_heads: int, dim: int, gate: bool = False) -> Tensor:
        nonlocal count
        x = torch.randn(batch, tokens, n_heads, dim, generator=generator, dtype=torch.float64)
        x = 0.01 + 0.98 * x.sigmoid() if gate else x
        x = x.to(device, dtype)
        count += 1
        return (_strided(x, count) if strided else x).detach().requires_grad_()

    def keys(dim: int) -> Any:
        if spec.get("kv", "shared") == "shared":
            return leaf(heads["kv"], dim)
        return {name: leaf(heads["kv"], dim) for name in spec["branches"]}

    q, k, v = leaf(heads["query"], heads["qk_dim"]), keys(heads["qk_dim"]), keys(heads["v_dim"])
    gated = spec["combine"] == "gated_sum"
    return Inputs(q, k, v, leaf(heads["query"], len(spec["branches"]), gate=True) if gated else None)


def _strided(x: Tensor, layout: int) -> Tensor:
    """The values of x [B, T, H, D] in a view of another layout, one of three."""
    if layout % 3 == 0:
        return _within(x.transpose(1, 2), (0, 1, 0, 8), 0).transpose(1, 2)  # heads first, rows of D + 8
    if layout % 3 == 1:
        return _within(x, (0, 0, 1, 8), 8)  # one head too many, aligned
    return _within(x, (1, 2, 0, 3), 1)  # starts and rows off any alignment


def _within(x: Tensor, more: tuple[int, ...], skip: int) -> Tensor:
    """x copied into a NaN-filled buffer larger by `more`, from entry `skip` of its last dim on."""
    sizes = [n + m for n, m in zip(x.shape, more, strict=True)]
    buffer = torch.full(sizes, torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[tuple(slice(0, n) for n in x.shape[:-1])][..., skip : skip + x.shape[-1]]
    view.copy_(x)
    return view

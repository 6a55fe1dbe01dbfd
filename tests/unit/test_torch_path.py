"""The path without kernels against the dense equations in float64, written out head by head."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsagen.runtime import torch_path
from nsagen.runtime.torch_path import KeySource, attend, attend_grad, combine, combine_grad

torch.set_num_threads(1)

Sees = Callable[[int, int], bool]


class Domain(NamedTuple):
    """A source for the code under test, and the same domain one (query, key) pair at a time for the oracle."""

    source: KeySource
    sees: Sees


def window(w: int) -> Domain:
    source = KeySource(
        1,
        1,
        lambda t, s: (s <= t) & (s > t - w),
        lambda t0, t1, n: [(max(0, t0 - w + 1), min(n, t1))],
    )
    return Domain(source, lambda t, s: t - w < s <= t)


def sinks_and_window(sinks: int, w: int) -> Domain:
    def ranges(t0: int, t1: int, n: int) -> list[tuple[int, int]]:
        lo = max(0, t0 - w + 1)
        return [(0, min(sinks, lo)), (lo, min(n, t1))]

    source = KeySource(1, 1, lambda t, s: (s <= t) & ((s > t - w) | (s < sinks)), ranges)
    return Domain(source, lambda t, s: s <= t and (s > t - w or s < sinks))


def compressed(l: int, d: int) -> Domain:
    source = KeySource(
        l, d, lambda t, i: t >= i * d + l - 1, lambda t0, t1, n: [(0, min(n, max(0, (t1 - l) // d + 1)))]
    )
    return Domain(source, lambda t, i: t >= i * d + l - 1)


def past() -> Domain:
    """Only keys before the query, and its ranges say no more than "all": row 0 sees nothing among rows that see."""
    return Domain(KeySource(1, 1, lambda t, s: s < t, lambda t0, t1, n: [(-3, n + 5)]), lambda t, s: s < t)


def dense(
    q: Tensor, ks: list[Tensor], vs: list[Tensor], domains: list[Domain], scale: float, cu: list[int] | None
) -> tuple[Tensor, Tensor]:
    """out, lse in float64; differentiable."""
    batch, length, heads, _ = q.shape
    group = heads // ks[0].shape[2]
    out = q.new_zeros(batch, length, heads, vs[0].shape[-1])
    lse = q.new_full((batch, length, heads), -torch.inf)
    ends = [0, length] if cu is None else cu
    for b in range(batch):
        for h in range(heads):
            for start, end in pairwise(ends):
                for t in range(end - start):
                    keys, values = [], []
                    for k, v, (source, sees) in zip(ks, vs, domains, strict=True):
                        for s in range(max(0, (end - start - source.block) // source.stride + 1)):
                            if sees(t, s):
                                keys.append(k[b, start // source.stride + s, h // group])
                                values.append(v[b, start // source.stride + s, h // group])
                    if keys:
                        logits = scale * (torch.stack(keys) @ q[b, start + t, h])
                        lse[b, start + t, h] = logits.logsumexp(0)
                        out[b, start + t, h] = logits.softmax(0) @ torch.stack(values)
    return out, lse


CASES = {
    "window": [window(7)],
    "wide window": [window(100)],
    "sinks and window": [sinks_and_window(3, 5)],
    "compressed": [compressed(6, 3)],
    "strict past": [past()],
    "window and compressed, one softmax": [window(5), compressed(8, 2)],
}


class Inputs(NamedTuple):
    q: Tensor
    ks: list[Tensor]
    vs: list[Tensor]
    gate: Tensor
    d_out: Tensor


def draw(domains: list[Domain], batch: int, length: int, kv_heads: int, group: int, packed: bool = False) -> Inputs:
    g = torch.Generator().manual_seed(length * 7 + group)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def rows(source: KeySource) -> int:
        return length // source.stride if packed else max(0, (length - source.block) // source.stride + 1)

    heads = kv_heads * group
    return Inputs(
        normal(batch, length, heads, 6),
        [normal(batch, rows(d.source), kv_heads, 6) for d in domains],
        [normal(batch, rows(d.source), kv_heads, 5) for d in domains],
        normal(batch, length, heads).sigmoid(),
        normal(batch, length, heads, 5),
    )


def check(domains: list[Domain], x: Inputs, cu: list[int] | None, gated: bool) -> None:
    """out, lse and all gradients, in float64."""
    scale = 0.37
    leaves = [t.clone().requires_grad_() for t in (x.q, *x.ks, *x.vs)]
    n = len(x.ks)
    out, lse = dense(leaves[0], leaves[1 : 1 + n], leaves[1 + n :], domains, scale, cu)
    factor = x.gate if gated else torch.ones_like(x.gate)
    unused = sum((0 * leaf).sum() for leaf in leaves)  # joins what no query sees to the graph
    wanted = torch.autograd.grad((out * factor[..., None] * x.d_out).sum() + unused, leaves)

    sources = tuple(d.source for d in domains)
    cu_seqlens = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    got_out, got_lse = attend(x.q, tuple(x.ks), tuple(x.vs), sources, scale, cu_seqlens)
    torch.testing.assert_close(got_out, out.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_lse, lse.detach(), rtol=1e-10, atol=1e-10)
    delta = (x.d_out * got_out).sum(-1)
    shift = got_lse - factor.log()  # folds the gate into p
    dq, dks, dvs = attend_grad(x.q, tuple(x.ks), tuple(x.vs), sources, shift, delta, x.d_out, scale, cu_seqlens)
    for got, want in zip((dq, *dks, *dvs), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert got.is_contiguous()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_path, "_MOST_QUERIES", 5)
    monkeypatch.setattr(torch_path, "_BUDGET", 4000)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("batch", "length", "kv_heads", "group"), [(2, 23, 2, 1), (1, 17, 1, 3), (1, 1, 2, 3)])
def test_dense_equations(name: str, batch: int, length: int, kv_heads: int, group: int) -> None:
    check(CASES[name], draw(CASES[name], batch, length, kv_heads, group), None, gated=group == 3)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", CASES)
def test_packed(name: str) -> None:
    """Sequences shorter than l, empty ones, and tokens after the last one, which belong to none."""
    check(CASES[name], draw(CASES[name], 1, 31, 2, 3, packed=True), [0, 1, 12, 12, 17, 28], gated=True)


def test_one_chunk_is_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    domains = CASES["window and compressed, one softmax"]
    x = draw(domains, 1, 200, 1, 2)
    sources = tuple(d.source for d in domains)
    whole = attend(x.q, tuple(x.ks), tuple(x.vs), sources, 0.5, None)
    monkeypatch.setattr(torch_path, "_BUDGET", 1)  # one query at a time
    for a, b in zip(whole, attend(x.q, tuple(x.ks), tuple(x.vs), sources, 0.5, None), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_that_see_nothing_are_no_nan() -> None:
    domains = CASES["compressed"]
    x = draw(domains, 1, 9, 1, 2)
    sources = (domains[0].source,)
    out, lse = attend(x.q, tuple(x.ks), tuple(x.vs), sources, 1.0, None)
    assert (out[:, :5] == 0).all()
    assert (lse[:, :5] == -torch.inf).all()
    assert lse[:, 5:].isfinite().all()
    dq, _, _ = attend_grad(x.q, tuple(x.ks), tuple(x.vs), sources, lse, torch.zeros_like(lse), x.d_out, 1.0, None)
    assert (dq[:, :5] == 0).all()
    assert dq.isfinite().all()


def test_shorter_than_a_block() -> None:
    check(CASES["compressed"], draw(CASES["compressed"], 2, 5, 2, 1), None, gated=False)


def test_tokens_outside_of_sequences_do_not_leak() -> None:
    domains = CASES["window"]
    x = draw(domains, 1, 20, 1, 1)
    for t in (x.q, *x.ks, *x.vs, x.d_out):
        t[:, 13:] = torch.nan
    cu = torch.tensor([0, 4, 13], dtype=torch.int32)
    args = (x.q, tuple(x.ks), tuple(x.vs), (domains[0].source,))
    out, lse = attend(*args, 1.0, cu)
    assert out.isfinite().all()
    delta = (out * x.d_out).sum(-1)
    for grad in (g for part in attend_grad(*args, lse, delta, x.d_out, 1.0, cu) for g in part):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(dtype: torch.dtype) -> None:
    """Inputs of `dtype`, everything inside in float32: only the last rounding shows."""
    domains = CASES["window and compressed, one softmax"]
    x = draw(domains, 2, 19, 2, 2)
    q, d_out, gate = x.q.to(dtype), x.d_out.to(dtype), x.gate.to(dtype)
    ks, vs = tuple(k.to(dtype) for k in x.ks), tuple(v.to(dtype) for v in x.vs)
    leaves = [t.double().requires_grad_() for t in (q, *ks, *vs)]
    out, lse = dense(leaves[0], leaves[1:3], leaves[3:], domains, 0.4, None)
    wanted = torch.autograd.grad((out * gate.double()[..., None] * d_out).sum(), leaves)

    sources = tuple(d.source for d in domains)
    got, got_lse = attend(q, ks, vs, sources, 0.4, None)
    assert (got.dtype, got_lse.dtype) == (dtype, torch.float32)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), out.detach(), rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(got_lse.double(), lse.detach(), rtol=1e-5, atol=1e-5)
    delta = (d_out.double() * out.detach()).sum(-1).float()
    dq, dks, dvs = attend_grad(q, ks, vs, sources, got_lse - gate.float().log(), delta, d_out, 0.4, None)
    for grad, want in zip((dq, *dks, *dvs), wanted, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), want, rtol=2 * eps, atol=max(2 * eps, 1e-5))


def test_strided_inputs() -> None:
    domains = CASES["window"]
    x = draw(domains, 2, 13, 2, 3)
    apart = Inputs(*(_strided(t) if isinstance(t, Tensor) else [_strided(u) for u in t] for t in x))
    assert not apart.q.is_contiguous()
    check(domains, apart, None, gated=True)


def _strided(x: Tensor) -> Tensor:
    """The same values, laid out heads first."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_memory_is_linear_and_fast() -> None:
    """T = 20000, both kinds of domain: a dense score matrix of the window would be 3.2 GB."""
    length, w, l, d = 20_000, 128, 32, 16
    q, k, v = (torch.randn(1, length, 2, 16) for _ in range(3))
    k_cmp, v_cmp = k[:, 31::d].contiguous(), v[:, 31::d].contiguous()
    start = time.perf_counter()
    for key, value, domain in ((k, v, window(w)), (k_cmp, v_cmp, compressed(l, d))):
        args = (q, (key,), (value,), (domain.source,))
        with LargestTensor() as largest:
            out, lse = attend(*args, 0.25, None)
            attend_grad(*args, lse, (out * out).sum(-1), out, 0.25, None)
        assert largest.bytes <= torch_path._BUDGET // 2
    assert time.perf_counter() - start < 20


def test_long_key_ranges_make_short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each query sees all T keys, the chunk shrinks until its scores fit the budget."""
    monkeypatch.setattr(torch_path, "_BUDGET", 1 << 16)
    q, k, v = (torch.randn(1, 300, 2, 4) for _ in range(3))
    with LargestTensor() as largest:
        out, lse = attend(q, (k,), (v,), (past().source,), 0.5, None)
        attend_grad(q, (k,), (v,), (past().source,), lse, (out * out).sum(-1), out, 0.5, None)
    assert largest.bytes <= (1 << 16) // torch_path._COPIES


def test_combine() -> None:
    g = torch.Generator().manual_seed(0)
    terms = tuple(torch.randn(2, 7, 3, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    gates = torch.rand(2, 7, 3, 3, generator=g, dtype=torch.float64, requires_grad=True)
    d_out = torch.randn(2, 7, 3, 5, generator=g, dtype=torch.float64)
    out = (torch.stack(terms, -1) * gates.unsqueeze(-2)).sum(-1)
    torch.testing.assert_close(combine(terms, gates), out.detach())
    (wanted,) = torch.autograd.grad(out, gates, d_out)
    lses = tuple(torch.randn(2, 7, 3, generator=g, dtype=torch.float64) for _ in range(3))
    deltas, shifts, d_gates = combine_grad(terms, gates, d_out, lses)
    assert d_gates is not None
    torch.testing.assert_close(d_gates, wanted)
    for c, (delta, shift, term) in enumerate(zip(deltas, shifts, terms, strict=True)):
        torch.testing.assert_close(delta, (d_out * term).sum(-1).detach())
        torch.testing.assert_close(shift, (lses[c] - gates[..., c].log()).detach())
    (delta,), none, nothing = combine_grad(terms[:1], None, d_out, ())
    assert none == ()
    assert nothing is None
    torch.testing.assert_close(delta, (d_out * terms[0]).sum(-1).detach())


def test_combine_dtypes() -> None:
    """Sums in float32, results in the terms' dtype, the gates' gradient in theirs."""
    terms = tuple(torch.full((1, 1, 1, 1), x, dtype=torch.bfloat16) for x in (256.0, 1.0, 1.0))
    gates = torch.ones(1, 1, 1, 3, dtype=torch.float64)
    out = combine(terms, gates)  # bf16 steps would lose both ones
    assert (out.dtype, out.item()) == (torch.bfloat16, 258.0)
    lses = (torch.zeros(1, 1, 1), torch.full((1, 1, 1), -torch.inf), torch.zeros(1, 1, 1))
    deltas, shifts, d_gates = combine_grad(terms, gates, out, lses)
    assert [s.item() for s in shifts] == [0, torch.inf, 0]  # a row that sees nothing: p = 0
    assert d_gates is not None
    assert (d_gates.dtype, {d.dtype for d in deltas}) == (torch.float64, {torch.float32})

"""φ against its definition, one block at a time in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nsagen.errors import InputError
from nsagen.runtime import launch
from nsagen.runtime.compress import (
    Compressor,
    LinearCompressor,
    MeanCompressor,
    MLPCompressor,
    Pool,
    Shape,
    WeightedCompressor,
)

torch.set_num_threads(1)

HEADS, K_DIM, V_DIM = 2, 4, 3


def mean(x: Tensor, pool: Pool, head: int) -> Tensor:
    return x.mean(0)


def weighted(x: Tensor, pool: Pool, head: int) -> Tensor:
    x = _placed(x, pool, head)
    weight = pool.get_parameter("weight")[head]
    return torch.stack([weight[p] * x[p] for p in range(x.shape[0])]).sum(0)


def linear(x: Tensor, pool: Pool, head: int) -> Tensor:
    return _placed(x, pool, head).reshape(-1) @ pool.get_parameter("weight")[head]


def mlp(x: Tensor, pool: Pool, head: int) -> Tensor:
    hidden = _placed(x, pool, head).reshape(-1) @ pool.get_parameter("weight_in")[head]
    hidden = nn.functional.gelu(hidden + pool.get_parameter("bias_in")[head])
    return hidden @ pool.get_parameter("weight_out")[head] + pool.get_parameter("bias_out")[head]


def _placed(x: Tensor, pool: Pool, head: int) -> Tensor:
    return x if pool.positions is None else x + pool.positions[head]


Oracle = Callable[[Tensor, Pool, int], Tensor]
KINDS: dict[str, tuple[type[Compressor], Oracle]] = {
    "mean": (MeanCompressor, mean),
    "weighted": (WeightedCompressor, weighted),
    "linear": (LinearCompressor, linear),
    "mlp": (MLPCompressor, mlp),
}


def make(kind: str, block: int, stride: int, dtype: torch.dtype = torch.float64, **options: object) -> Compressor:
    torch.manual_seed(5)
    phi = KINDS[kind][0](
        block=block,
        stride=stride,
        kv_heads=HEADS,
        k_dim=K_DIM,
        v_dim=V_DIM,
        dtype=dtype,
        **options,  # type: ignore[arg-type]
    )
    with torch.no_grad():  # far from where training starts
        for p in phi.parameters():
            p.normal_()
    return phi


def draw(batch: int, length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(length)
    k = torch.randn(batch, length, HEADS, K_DIM, generator=g, dtype=torch.float64)
    v = torch.randn(batch, length, HEADS, V_DIM, generator=g, dtype=torch.float64)
    return k.to(dtype), v.to(dtype)


def oracle(phi: Compressor, pool: Pool, x: Tensor, of: Oracle, cu: list[int] | None) -> Tensor:
    """[B, rows, Hkv, D], block by block."""
    batch, length = x.shape[:2]
    l, d = phi.block, phi.stride
    rows = max(0, (length - l) // d + 1) if cu is None else length // d
    result = [[[x.new_zeros(x.shape[-1]) for _ in range(HEADS)] for _ in range(rows)] for _ in range(batch)]
    ends = [0, length] if cu is None else cu
    written = set()
    for start, end in pairwise(ends):
        for i in range(max(0, (end - start - l) // d + 1)):
            row = start // d + i
            assert row not in written
            written.add(row)
            for b in range(batch):
                for h in range(HEADS):
                    result[b][row][h] = of(x[b, start + i * d : start + i * d + l, h], pool, h)
    if not rows:
        return x.new_zeros(batch, 0, HEADS, x.shape[-1])
    return torch.stack([torch.stack([torch.stack(heads) for heads in one]) for one in result])


def check(kind: str, phi: Compressor, k: Tensor, v: Tensor, cu: list[int] | None) -> None:
    """Values and gradients of inputs and parameters."""
    of = KINDS[kind][1]
    leaves = [k.clone().requires_grad_(), v.clone().requires_grad_(), *phi.parameters()]
    wanted = oracle(phi, phi.k, leaves[0], of, cu), oracle(phi, phi.v, leaves[1], of, cu)
    cu_seqlens = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    got = phi(leaves[0], leaves[1], cu_seqlens)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(w.shape, generator=g, dtype=w.dtype) for w in wanted]

    def gradients(pair: tuple[Tensor, Tensor]) -> list[Tensor]:
        total = (pair[0] * weights[0]).sum() + (pair[1] * weights[1]).sum()
        unused = sum((0 * leaf).sum() for leaf in leaves)  # joins what is in no block to the graph
        return list(torch.autograd.grad(total + unused, leaves))

    for a, b in zip((*got, *gradients(got)), (*wanted, *gradients(wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


SIZES = [(4, 4), (6, 2), (5, 1), (1, 1), (8, 4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("block", "stride"), SIZES)
@pytest.mark.parametrize("length", [1, 4, 5, 17])
def test_definition(kind: str, block: int, stride: int, length: int) -> None:
    check(kind, make(kind, block, stride), *draw(2, length), None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("block", "stride"), SIZES)
def test_packed(kind: str, block: int, stride: int) -> None:
    """Empty sequences, one token, less than a block, unaligned starts, tokens after the last sequence."""
    check(kind, make(kind, block, stride), *draw(1, 37), [0, 0, 1, 12, 15, 15, 31])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_packed_rows_are_those_of_each_sequence(data: st.DataObject) -> None:
    """A packed result is every sequence's own result, at row ⌊cu[s]/d⌋, and zero elsewhere."""
    stride = data.draw(st.integers(1, 5))
    block = stride * data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(0, 25), min_size=1, max_size=6))
    total = max(1, sum(lengths) + data.draw(st.integers(0, 9)))
    phi, (k, v) = make("mean", block, stride), draw(1, total)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    packed = phi(k, v, cu.int())
    for x, got in zip((k, v), packed, strict=True):
        wanted = torch.zeros(1, total // stride, HEADS, x.shape[-1], dtype=x.dtype)
        for start, length in zip(cu.tolist(), lengths, strict=False):
            own = x[:, start : start + length]
            pooled = phi.k(
                own[:, : length // stride * stride].unflatten(1, (length // stride, stride)), phi._rows(own, None).size
            )
            wanted[:, start // stride : start // stride + pooled.shape[1]] = pooled
        torch.testing.assert_close(got, wanted)


def test_rope_turns_keys_at_the_blocks_start() -> None:
    def rope(x: Tensor, positions: Tensor) -> Tensor:
        assert positions.dtype == torch.int64
        seen.append(positions)
        return x + positions.to(x.dtype)[:, None, None]

    seen: list[Tensor] = []
    k, v = draw(1, 17)
    plain, phi = make("mean", 6, 3), make("mean", 6, 3, rope=rope)
    k_cmp, v_cmp = phi(k, v)
    assert seen[0].tolist() == [0, 3, 6, 9]
    torch.testing.assert_close(k_cmp, plain(k, v)[0] + torch.tensor([0, 3, 6, 9])[:, None, None])
    torch.testing.assert_close(v_cmp, plain(k, v)[1])

    cu = torch.tensor([0, 8, 17], dtype=torch.int32)  # blocks at rows 0 · 2, 3 of 5; row 1 and row 4 are unused
    k_cmp, _ = phi(k, v, cu)
    assert seen[1].tolist() == [0, 0, 0, 3, 0]
    torch.testing.assert_close(k_cmp, plain(k, v, cu)[0] + torch.tensor([0, 0, 0, 3, 0])[:, None, None])
    assert (k_cmp[:, [1, 4]] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_by_themselves_are_those_of_their_sequence(kind: str) -> None:
    phi = make(kind, 6, 3, rope=lambda x, positions: x + positions.to(x.dtype)[:, None, None])
    k, v = draw(1, 17)
    starts = torch.tensor([9, 0, 3])
    pair = (torch.stack([x[0, i : i + 6] for i in starts.tolist()]) for x in (k, v))
    for got, want in zip(phi.of_blocks(*pair, starts), phi(k, v), strict=True):
        torch.testing.assert_close(got, want[0, starts // 3])
    assert not phi.plain_mean
    assert make(kind, 6, 3).plain_mean == (kind == "mean")


def test_rope_of_unused_rows_is_not_kept() -> None:
    phi = make("mean", 4, 2, rope=lambda x, positions: x + 1)
    k_cmp, _ = phi(*draw(1, 9), torch.tensor([0, 3, 9], dtype=torch.int32))
    assert (k_cmp == 0).all(dim=(0, 2, 3)).tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32(dtype: torch.dtype) -> None:
    """512 ones and one large number: adding in 16 bits would lose the ones."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter cuts off what does not fit bfloat16")
    k = torch.ones(1, 512, HEADS, K_DIM, dtype=dtype)
    k[:, 0] = 1025 if dtype == torch.float16 else 257
    v = torch.ones(1, 512, HEADS, V_DIM, dtype=dtype)
    for stride in (512, 1):
        phi = make("mean", 512, stride, dtype=dtype)
        k_cmp, v_cmp = phi(k, v)
        assert (k_cmp.dtype, v_cmp.dtype) == (dtype, dtype)
        torch.testing.assert_close(k_cmp, k.double().mean(1, keepdim=True).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["weighted", "linear", "mlp"])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_results_have_the_keys_dtype(kind: str, parameters: torch.dtype) -> None:
    phi = make(kind, 4, 2, dtype=parameters)
    k, v = draw(2, 11, torch.bfloat16)
    k_cmp, v_cmp = phi(k, v)
    assert (k_cmp.dtype, v_cmp.dtype) == (torch.bfloat16, torch.bfloat16)
    exact = phi.double()(k.double(), v.double())
    torch.testing.assert_close(k_cmp.double(), exact[0], rtol=0.03, atol=0.03)
    torch.testing.assert_close(v_cmp.double(), exact[1], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("kind", ["weighted", "linear", "mlp"])
def test_positions_are_optional(kind: str) -> None:
    phi = make(kind, 4, 2, positions=False)
    assert "k.positions" not in dict(phi.named_parameters())
    check(kind, phi, *draw(1, 9), None)


def test_parameters() -> None:
    sizes = {name: list(p.shape) for name, p in make("mlp", 4, 2).named_parameters()}
    assert sizes == {
        "k.positions": [2, 4, 4],
        "k.weight_in": [2, 16, 8],
        "k.bias_in": [2, 8],
        "k.weight_out": [2, 8, 4],
        "k.bias_out": [2, 4],
        "v.positions": [2, 4, 3],
        "v.weight_in": [2, 12, 6],
        "v.bias_in": [2, 6],
        "v.weight_out": [2, 6, 3],
        "v.bias_out": [2, 3],
    }
    assert not list(make("mean", 4, 2).parameters())


def test_weighted_starts_as_the_mean() -> None:
    pool = WeightedCompressor.pool(Shape(6, 2, HEADS, K_DIM), False, None, torch.float64)
    chunks = draw(1, 12)[0].unflatten(1, (6, 2))
    mean_pool = MeanCompressor.pool(Shape(6, 2, HEADS, K_DIM), False, None, torch.float64)
    torch.testing.assert_close(pool(chunks, 4), mean_pool(chunks, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_no_sequence_reach_nothing(kind: str) -> None:
    phi = make(kind, 4, 2)
    k, v = draw(1, 30)
    k[:, 19:] = torch.nan
    k.requires_grad_()
    k_cmp, v_cmp = phi(k, v, torch.tensor([0, 3, 19], dtype=torch.int32))
    (k_cmp.sum() + v_cmp.sum()).backward()
    assert k_cmp.isfinite().all()
    assert k.grad is not None
    for p in (k, *phi.parameters()):
        assert p.grad is not None
        assert p.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["mean", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiles_in_one_graph(kind: str, dtype: torch.dtype) -> None:
    phi = make(kind, 4, 2, dtype)
    compiled = torch.compile(phi, fullgraph=True, backend="aot_eager")
    cu = torch.tensor([0, 3, 19], dtype=torch.int32)
    for args in ((*draw(1, 19, dtype), None), (*draw(1, 19, dtype), cu)):
        for a, b in zip(compiled(*args), phi(*args), strict=True):
            torch.testing.assert_close(a, b)


def test_strided_inputs() -> None:
    k, v = draw(2, 13)
    check("mean", make("mean", 6, 2), k.transpose(1, 2).contiguous().transpose(1, 2), v, None)
    check("linear", make("linear", 6, 2), k.flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2), v, None)


@pytest.mark.parametrize(
    ("k_shape", "v_shape", "packed", "part"),
    [
        ((1, 9, 3, K_DIM), (1, 9, HEADS, V_DIM), False, "k must be [B, T, 2, 4], got [1, 9, 3, 4]"),
        ((1, 9, HEADS, K_DIM), (1, 9, HEADS, K_DIM), False, "v must be [B, T, 2, 3], got [1, 9, 2, 4]"),
        ((1, 9, HEADS, K_DIM), (1, 8, HEADS, V_DIM), False, "equal B and T, got [1, 9] and [1, 8]"),
        ((2, 9, HEADS, K_DIM), (2, 9, HEADS, V_DIM), True, "B must be 1, got 2"),
    ],
)
def test_errors(k_shape: tuple[int, ...], v_shape: tuple[int, ...], packed: bool, part: str) -> None:
    cu = torch.tensor([0, 9], dtype=torch.int32) if packed else None
    with pytest.raises(InputError) as error:
        make("mean", 4, 2)(torch.zeros(k_shape), torch.zeros(v_shape), cu)
    assert part in str(error.value)


def test_stride_must_divide_block() -> None:
    with pytest.raises(InputError, match="d must divide l, got block=5, stride=2"):
        make("mean", 5, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_never_waits_for_the_device(kind: str) -> None:
    phi = make(kind, 4, 2, dtype=torch.float32).cuda()
    k, v = (x.cuda().requires_grad_() for x in draw(1, 37, torch.float32))
    cu = torch.tensor([0, 12, 15, 37], dtype=torch.int32).cuda()
    phi(k, v, cu)[0].sum().backward()  # the first call may load libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        k_cmp, v_cmp = phi(k, v, cu)
        (k_cmp.sum() + v_cmp.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_kernel_may_take_the_place_of_a_mean_that_is_only_named_anew() -> None:
    """Generated modules name their own class; one that computes something else must be asked."""

    class Named(MeanCompressor):
        pass

    class Doubled(MeanCompressor):
        def forward(self, *args: Tensor, **named: Tensor) -> tuple[Tensor, Tensor]:
            k_cmp, v_cmp = super().forward(*args, **named)
            return 2 * k_cmp, v_cmp

    sizes = {"block": 4, "stride": 2, "kv_heads": HEADS, "k_dim": K_DIM, "v_dim": V_DIM}
    assert Named(**sizes).plain_mean
    assert not Doubled(**sizes).plain_mean


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_launch_that_scores_may_pool(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean, an MLP by programs of its own; nothing that is a subclass's, in another dtype, or differentiated."""
    monkeypatch.setattr(launch, "use_kernels", lambda x: True)
    k, v = draw(1, 3)
    arrived = torch.zeros(1, HEADS, dtype=torch.int32)
    phi = make(kind, 6, 3)
    with torch.no_grad():
        found = phi.closing(k, v, arrived)
        assert (found is not None) == (kind in ("mean", "mlp"))
        assert make(kind, 6, 3, rope=lambda x, positions: x).closing(k, v, arrived) is None
    if kind != "mlp":
        assert found is None or (found.programs == 0 and found.parts is None)
        return
    assert found is not None and found.parts is not None
    assert (found.programs, found.k_hidden, found.v_hidden) == (found.parts.shape[2] * HEADS, 2 * K_DIM, 2 * V_DIM)

    class Own(MLPCompressor):
        def write_blocks(self, *args: Any) -> None:
            pass

    sizes = {"block": 6, "stride": 3, "kv_heads": HEADS, "k_dim": K_DIM, "v_dim": V_DIM}
    with torch.no_grad():
        assert Own(**sizes).closing(k, v, arrived) is None
        assert phi.to(torch.float32).closing(k, v, arrived) is None
    assert make(kind, 6, 3).closing(k, v, arrived) is None  # its weights ask for a gradient

"""A cache in e4m3: the attention to the numbers that it keeps, which are near those given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from served import Served

import nsagen
from nsagen.errors import InputError
from nsagen.runtime.stores import Flat

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float64]  # by kernels, and without


def kept(x: Any, dtype: torch.dtype) -> Any:
    """What the cache makes of keys or values [B, m, Hkv, D]; written again it stays as it is."""
    if isinstance(x, dict):
        return {name: kept(one, dtype) for name, one in x.items()}
    flat = Flat((x.shape[0] * x.shape[1], *x.shape[2:]), dtype, x.device, quantised=True)
    rows = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    flat.write(rows, x.flatten(0, 1))
    return flat.read(rows).view_as(x)


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize(("dtype", "page"), [(torch.float32, 4), (torch.float64, None)])
def test_it_attends_to_what_it_keeps(dtype: torch.dtype, page: int | None, device: str) -> None:
    """Once its cache has the same numbers, an unquantised one gives the same output; no block ends in these steps."""
    of, plain = (Served("rings", 15, device, page, dtype, kv_dtype=kv) for kv in (E4M3, None))
    for one in (of, plain):
        one.k, one.v = kept(one.k, dtype), kept(one.v, dtype)
        one.outputs(0, 12)
    for call in (12, 14):
        for name in of.cache._stores:
            plain.cache[name].copy_(of.cache.rows(name).numbers(dtype))
        got, want = (one.outputs(call, call + 1, decode=call == 12) for one in (of, plain))
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5)
        for one in (of, plain):
            one.cache.lengths.fill_(14)  # token 13 is whatever lies there


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_near_what_was_given(dtype: torch.dtype, device: str) -> None:
    of = Served("near", 24, device, None, dtype, kv_dtype=E4M3)
    outs = [of.outputs(0, 13), of.outputs(13, 16), of.outputs(16, 21, decode=True), of.outputs(21, 24, decode=True)]
    error = (torch.cat(outs, 1) - of.want).norm() / of.want.norm()
    assert 1e-3 < error < 4e-2


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize(("nats", "size"), [(0, 1.0), (0, 1e-3), (12, 1.0)])
def test_small_weights_and_small_values_count(nats: int, size: float, device: str) -> None:
    """Beside a sink of no value, e^12 above all others, and with scales far below 1: products are in float16."""
    name, tokens = "serve_sink", 40
    selected = {"block": 16, "top_n": 3, "initial": 1, "local": 1, "from": "pooled"}
    heads = {"query": 2, "kv": 1, "qk_dim": 16, "v_dim": 16}
    module = nsagen.load(
        {"name": name, "heads": heads, "kv": "shared", "branches": {"selected": selected}, "combine": "single"}
    )
    q, k = torch.zeros(1, tokens, 2, 16), torch.randn(1, tokens, 1, 16) * 0.1
    q[..., 0], k[:, :, :, 0], k[:, 0, :, 0] = 4, 0, nats
    v = (torch.randn(1, tokens, 1, 16) * 0.3 + 1) * size
    v[:, 0] = 0 if nats else v[:, 0]
    outs: dict[torch.dtype, list[torch.Tensor]] = {}
    for dtype in (torch.float16, torch.float32):
        cache = module.KVCache(1, 48, device=device, dtype=dtype, kv_dtype=E4M3)
        x = [x.bfloat16().to(device, dtype) for x in (q, k, v)]
        calls = (("prefill", 0, 20), ("prefill", 20, 39), ("decode", 39, 40))
        of = [getattr(module, call)(*(a[:, lo:hi] for a in x), None, None, cache) for call, lo, hi in calls]
        outs[dtype] = [out[:, -1].float() for out in of]
    for got, want in zip(outs[torch.float16], outs[torch.float32], strict=True):
        assert (got - want).norm() / want.norm() < 1e-2


def test_scales_of_tokens_and_blocks(device: str) -> None:
    """The largest number of a row is ±448; rows of zeros stay so, and what is not a number makes its row none."""
    flat = Flat((4, 2, 5), torch.float32, torch.device(device), quantised=True)
    x = torch.randn(3, 2, 5, device=device)
    x[1, 0], x[2, 1, 3] = 0, float("nan")
    flat.write(torch.tensor([2, 0, 3], device=device), x)
    data, scales = flat.all
    assert scales is not None
    assert data[2].float().abs().amax(-1).tolist() == [448, 448]
    torch.testing.assert_close(scales[2], x[0].abs().amax(-1) / 448)
    back = flat.read(torch.tensor([2, 0, 3], device=device))
    torch.testing.assert_close(back[0], x[0], rtol=2**-4, atol=1e-3)
    assert back[1, 0].tolist() == [0] * 5
    assert back[2, 1].isnan().all()
    assert back[2, 0].isfinite().all()


def test_bytes_and_misuse() -> None:
    cache = nsagen.load("nsa_128").KVCache(2, 4096, device="meta", dtype=torch.bfloat16, kv_dtype=E4M3)
    assert cache.nbytes == 2 * 4 * ((2 * 4096 + 1) + (2 * 256 + 1)) * (128 + 4)
    with pytest.raises(InputError, match=r"kv_dtype must be None or float8_e4m3fn, got torch.int8"):
        nsagen.load("nsa_128").KVCache(2, 4096, device="meta", dtype=torch.bfloat16, kv_dtype=torch.int8)

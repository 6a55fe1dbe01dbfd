"""One case: a generated module beside the oracle, output and every gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from strategies import Inputs, make_inputs
from torch import Tensor

import nsagen
from nsagen.passes import loop_order, operators
from nsagen.runtime import launch
from nsagen.tools.choice import scores_of

FORWARD, GRADIENT = 2e-5, 1e-4  # float32, of design.md's measure
ZERO = 1e-6  # an exactly zero gradient: what rounding leaves, against the largest gradient norm of the case


def needs_hopper() -> None:
    """Skips the test but on a GPU of sm_90: elsewhere no kernel has a warp that copies."""
    if not torch.cuda.is_available() or launch.chip(0).arch != "sm_90":
        pytest.skip("needs a GPU of sm_90")


def cu_of(ends: list[int] | None, device: str) -> Tensor | None:
    return None if ends is None else torch.tensor(ends, dtype=torch.int32, device=device)


@contextmanager
def by_blocks(always: bool = True) -> Iterator[None]:
    """What is compiled inside goes key block by key block wherever it can, however short the sequence."""
    before = loop_order.MARGIN, operators.BY_BLOCKS_FROM
    if always:
        loop_order.MARGIN, operators.BY_BLOCKS_FROM = 0.0, 0
    try:
        yield
    finally:
        loop_order.MARGIN, operators.BY_BLOCKS_FROM = before


def blocks_of(module: Any, q: Tensor, k: Any, v: Any, phi: Any, cu: Tensor | None) -> Tensor | None:
    """The lists that the module's own selection makes, through its public parts."""
    if not hasattr(module, "select_blocks"):
        return None
    own = k["selected"] if isinstance(k, Mapping) else k
    pair = (x["compressed"] if isinstance(x, Mapping) else x for x in (k, v)) if phi is not None else ()
    pooled = None if phi is None else phi(*pair, cu_seqlens=cu)
    return module.select_blocks(q, *scores_of(module, q, own, pooled, cu), cu_seqlens=cu)


def caller_lists(spec: Mapping[str, Any], inputs: Inputs, seed: int, ends: list[int] | None) -> Tensor | None:
    """Random legal lists where the spec leaves the choice to the caller: unique, ascending, −1 last, any count."""
    options = spec["branches"].get("selected")
    if options is None or options.get("from", "compressed") != "caller":
        return None
    generator = torch.Generator().manual_seed(seed)
    batch, length = inputs.q.shape[:2]
    heads, count = spec["heads"]["kv"], options["top_n"]
    lists = torch.full((batch, length, heads, count), -1, dtype=torch.int32)
    position = torch.arange(length)
    if ends is not None:
        starts = torch.tensor(ends)
        position = position - starts[torch.searchsorted(starts, position, right=True) - 1]
    for b, t, h in torch.cartesian_prod(torch.arange(batch), torch.arange(length), torch.arange(heads)).tolist():
        own = int(position[t]) // options["block"]
        some = torch.randperm(own + 1, generator=generator)[: int(torch.randint(0, count + 1, (), generator=generator))]
        lists[b, t, h, : len(some)] = some.sort().values.int()
    return lists.to(inputs.q.device)


def check(
    spec: Mapping[str, Any],
    batch: int,
    tokens: int,
    seed: int,
    device: str,
    ends: list[int] | None = None,
    strided: bool = False,
    module: Any = None,
) -> None:
    """Assert that the module agrees with the oracle under the same lists, and that its lists are best by its scores."""
    module = module or nsagen.load(spec)
    inputs = make_inputs(spec, batch, tokens, torch.float32, device, seed, strided)
    torch.manual_seed(seed)
    phi = module.Compressor(device=device) if hasattr(module, "Compressor") else None
    cu, lists = cu_of(ends, device), caller_lists(spec, inputs, seed, ends)
    q, k, v, gates = inputs
    out = module.attention(q, k, v, gates, phi, blocks=lists, cu_seqlens=cu)

    chosen = blocks_of(module, q, k, v, phi, cu)
    twins = Inputs(*map(oracle.twin, inputs))
    weights = {side: oracle.twin(dict(getattr(phi, side).named_parameters())) for side in "kv"} if phi else {}
    pools = None
    if phi is not None and spec["branches"]["compressed"]["pool"] != "mean":
        pools = tuple(oracle.phi_of(spec["branches"]["compressed"]["pool"], weights[side]) for side in "kv")
    want = oracle.attention(spec, *twins, pools, blocks=chosen if chosen is not None else lists, cu_seqlens=ends)
    # Forward and choice first: with a fault in them nobody waits for the gradients.
    assert oracle.error(out, want) < FORWARD
    if chosen is not None:
        assert_best(spec, twins, pools, chosen, ends)

    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    parameters = list(phi.parameters()) if phi is not None else []
    got = oracle.gradients(out, [*inputs.leaves, *parameters], d_out)
    twin_weights = [x for side in weights.values() for x in side.values()]
    right = oracle.gradients(want, [*twins.leaves, *twin_weights], d_out.double())
    largest = max(float(g.norm()) for g in right)
    for number, (a, b) in enumerate(zip(got, right, strict=True)):
        zero = float(b.norm()) < 1e-9 * largest
        bound = ZERO * largest if zero else None
        error = float(a.double().norm()) if zero else oracle.error(a, b, largest)
        assert error < (bound if zero else GRADIENT), f"gradient {number} of {spec['name']}: {error}"


def assert_best(spec: Mapping[str, Any], twins: Inputs, pools: Any, chosen: Tensor, ends: list[int] | None) -> None:
    s = spec["branches"]["selected"]
    if s.get("from", "compressed") == "pooled":
        keys = twins.k["selected"] if isinstance(twins.k, Mapping) else twins.k
    else:
        c = spec["branches"]["compressed"]
        ks, vs = (x["compressed"] if isinstance(x, Mapping) else x for x in (twins.k, twins.v))
        keys, _ = oracle.compress(ks, vs, c["block"], c["stride"], pools or (oracle.mean, oracle.mean), None, ends)
    scores = oracle.block_scores(spec, twins.q, keys, None, ends)
    gap = oracle.choice_gap(chosen, scores, s["block"], s["top_n"], s.get("initial", 1), s.get("local", 2), ends)
    assert gap < 1e-4 * max(1.0, float(scores.max()))

"""Custom operators: registered once, differentiable, seen through by torch.compile."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

from nsagen.runtime import ops

torch.set_num_threads(1)

NAMESPACE = "nsagen_test_ops"
_fresh = (f"toy{i}" for i in itertools.count())


def toy(x: Tensor, cu_seqlens: Optional[Tensor], scale: float) -> tuple[Tensor, Tensor]:  # noqa: UP045
    """Like an attention: one differentiable output and one that the backward needs."""
    return scale * x * x, x.sum(-1)


def toy_fake(x, cu_seqlens, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(x.shape[:-1])


def toy_grad(x: Tensor, d_out: Tensor, scale: float) -> Tensor:
    return 2 * scale * x * d_out


def toy_grad_fake(x, d_out, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.scale = inputs[2]


def make() -> Callable[..., tuple[Tensor, Tensor]]:
    """A differentiable operator of a name of its own."""
    name = next(_fresh)
    grad = ops.register(NAMESPACE, f"{name}_grad", toy_grad, toy_grad_fake)

    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return grad(*ctx.saved_tensors, d_out, ctx.scale), None, None

    op = ops.register(NAMESPACE, name, toy, toy_fake)
    ops.differentiate(op, setup, backward)
    return op


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(packed: bool, dtype: torch.dtype) -> None:
    cu = torch.tensor([0, 3], dtype=torch.int32) if packed else None
    torch.library.opcheck(make(), (torch.randn(3, 4, dtype=dtype, requires_grad=True), cu, 0.5))  # type: ignore[arg-type]


def test_gradcheck() -> None:
    op = make()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: op(x, None, 0.5)[0], (x,))


def test_compiles_in_one_graph() -> None:
    op = make()

    def loss(x: Tensor) -> Tensor:
        return op(x.sin(), None, 0.5)[0].sum()

    x, y = (torch.linspace(0, 1, 12).requires_grad_() for _ in range(2))
    eager = loss(x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(y)
    torch.testing.assert_close(compiled, eager)
    eager.backward()
    compiled.backward()
    torch.testing.assert_close(y.grad, x.grad)


def test_the_first_registration_wins() -> None:
    """A module imported twice: the operator that the first import holds keeps working."""
    name = next(_fresh)
    first = ops.register(NAMESPACE, name, toy, toy_fake)
    assert ops.register(NAMESPACE, name, toy, toy_fake) is first
    assert getattr(torch.ops, NAMESPACE).__getattr__(name) is not None
    torch.testing.assert_close(first(torch.ones(2), None, 3.0)[0], torch.full((2,), 3.0))
    assert ops.register(NAMESPACE + "_other", name, toy, toy_fake) is not first


def test_differentiate_twice_is_once() -> None:
    op = ops.register(NAMESPACE, next(_fresh), toy, toy_fake)
    ops.differentiate(op, setup, lambda ctx, d, _: (d * 10, None, None))
    ops.differentiate(op, setup, lambda ctx, d, _: (d * 20, None, None))
    x = torch.ones(2, requires_grad=True)
    op(x, None, 1.0)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [10, 10]


def test_threads_get_one_operator() -> None:
    name, count = next(_fresh), 8
    barrier = threading.Barrier(count)
    found: list[Any] = []

    def load() -> None:
        barrier.wait()
        op = ops.register(NAMESPACE, name, toy, toy_fake)
        ops.differentiate(op, setup, lambda ctx, d, _: (d, None, None))
        found.append(op)

    threads = [threading.Thread(target=load) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count
    assert len({id(op) for op in found}) == 1


def test_annotations_as_objects() -> None:
    """A generated module writes its annotations without `from __future__ import annotations`."""

    def fn(x, factors):  # type: ignore[no-untyped-def]
        return x * sum(factors)

    fn.__annotations__ = {"x": Tensor, "factors": list[float], "return": Tensor}
    op = ops.register(NAMESPACE, next(_fresh), fn, lambda x, factors: torch.empty_like(x))
    assert op(torch.ones(1), [1.0, 2.0]).item() == 3

"""Standalone modules in one process: copies of a file, other ones, and the usual module do not clash."""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType

import torch
from test_standalone import HEADS, spec_of

from nsagen import build, load


def load_file(path: Path, name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, path)
    assert found and found.loader
    sys.modules[name] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def run(nsa: ModuleType) -> list[torch.Tensor]:
    """Forward and backward of the gated spec."""
    torch.manual_seed(5)
    shapes = (HEADS["query"], HEADS["qk_dim"]), (HEADS["kv"], HEADS["qk_dim"]), (HEADS["kv"], HEADS["v_dim"])
    q, k, v = (torch.randn(1, 21, *s, requires_grad=True) for s in shapes)
    gates = torch.rand(1, 21, HEADS["query"], 3)
    out = nsa.attention(q, k, v, gates, nsa.Compressor())
    out.sum().backward()
    return [out.detach(), q.grad, k.grad, v.grad]  # pyright: ignore[reportReturnType]


def test_copies_and_the_usual_module_share_a_process(tmp_path):
    spec = spec_of("alone_gated")
    first = build(spec, tmp_path / "a", standalone=True)
    second = build(spec, tmp_path / "b", standalone=True)
    other = build({**spec, "heads": {**HEADS, "v_dim": 24}}, tmp_path / "c", standalone=True)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    usual = load(spec)
    modules = [load_file(p, f"copy_{i}") for i, p in enumerate((first, second, other))]
    expected = run(usual)
    for module in modules[:2]:
        assert all(torch.equal(a, b) for a, b in zip(run(module), expected, strict=True))
    assert modules[0]._Ops.attention is modules[1]._Ops.attention
    assert len({m._SPACE for m in (usual, *modules)}) == 3
    assert all(torch.equal(a, b) for a, b in zip(run(usual), expected, strict=True))  # still whole


def test_copies_imported_by_threads_at_once(tmp_path):
    paths = [build(spec_of("alone_window"), tmp_path / str(i), standalone=True) for i in range(4)]
    start, ops = threading.Barrier(4), []

    def work(i: int) -> None:
        start.wait()
        ops.append(load_file(paths[i], f"threaded_{i}")._Ops.window_attention)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ops) == 4
    assert len({id(op) for op in ops}) == 1

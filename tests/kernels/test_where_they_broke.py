"""Where public implementations broke: each line of that list is a test, and each test sees the fault once planted."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from harness import FORWARD, check
from planted import planted
from strategies import make_inputs
from torch import Tensor
from triton.runtime.jit import KernelInterface

import nsagen
from nsagen import api
from nsagen.compiler import compile_spec
from nsagen.runtime import compress, launch, mean_pool

TESTS = Path(__file__).parents[1]
Fault = tuple[str, str, str]  # function, sound text, faulty text

# Uneven everywhere: group 3, d_qk ≠ d_v, head dims in two parts, initial ≠ local, more blocks than n at T = 90.
SPEC: dict[str, Any] = {
    "name": "broke",
    "heads": {"query": 6, "kv": 2, "qk_dim": 24, "v_dim": 40},
    "kv": "shared",
    "branches": {
        "compressed": {"block": 6, "stride": 3, "pool": "mean"},
        "selected": {"block": 9, "top_n": 5, "initial": 1, "local": 2},
        "window": {"size": 11},
    },
    "combine": "gated_sum",
}
WHOLE = {"batch": 1, "tokens": 90, "seed": 3}
SHORT = {"batch": 1, "tokens": 40, "seed": 3}  # for what shows without a choice among blocks
PACKED = {"batch": 1, "tokens": 71, "seed": 4, "ends": [0, 4, 33, 34, 71]}  # shorter than l, T = 1


def with_options(branch: str, **options: Any) -> dict[str, Any]:
    """SPEC with other options of a branch."""
    return SPEC | {"branches": SPEC["branches"] | {branch: SPEC["branches"][branch] | options}}


def sees(case: Mapping[str, Any], module: Any, device: str, spec: Mapping[str, Any] = SPEC) -> None:
    """The case fails with this module."""
    with pytest.raises(AssertionError):
        check(spec, **case, device=device, module=module)


@pytest.mark.parametrize("case", [WHOLE, PACKED])
def test_the_sound_module_passes(case: Mapping[str, Any], device: str) -> None:
    check(SPEC, **case, device=device)


# A fault of the kernels, seen against the oracle

OF_KERNELS: dict[str, tuple[Mapping[str, Any], Fault]] = {
    "scores of the first head of a group only": (
        WHOLE,
        ("select_scores_sum", "for head in range(heads)", "for head in range(1)"),
    ),
    "score to block offset wrong past one tile": (
        WHOLE,
        ("select_scores", "scores + s, total", "scores + s % BN, total"),
    ),
    "local off by one": (WHOLE, ("select_best", "j > own - 2", "j > own - 3")),
    "initial and local swapped": (WHOLE, ("select_best", "(j < 1) | (j > own - 2)", "(j < 2) | (j > own - 1)")),
    "a block both initial and local counted twice": (
        WHOLE,
        (
            "select_best",
            "    slot = tl.arange(0, 8)",
            "    tl.store(blocks_ptr + at + 1, own, mask=own < 1)\n    return",
        ),
    ),
    "no causal mask inside a selected block": (SHORT, ("selected_fwd_step", "s <= t", "s < n")),
    "no causal mask inside a selected block, backward": (SHORT, ("selected_dkv_step", "s <= t", "t < T")),
    "delta subtracted once a part of v": (SHORT, ("window_dq_step", "(dp - delta)", "(dp - 2 * delta)")),
    "dk with the stride of dv": (SHORT, ("window_dkv", "key_row * 24", "key_row * 16")),
    "dk and dv summed in 16 bits": (WHOLE, ("_selected_backward", "None, torch.float32)", "None, torch.bfloat16)")),
    "window of w + 1": (SHORT, ("window_fwd_step", "s > t - 11", "s > t - 12")),
    "sequence end ignored": (PACKED, ("compressed_dkv", "tl.load(cu_ptr + sequence + 1) - start", "T - start")),
}


@pytest.mark.parametrize("fault", OF_KERNELS)
def test_a_planted_fault_is_seen(fault: str, device: str) -> None:
    case, place = OF_KERNELS[fault]
    sees(case, planted(SPEC, place), device)


def test_nan_in_a_tile_that_is_masked_whole_for_a_row(device: str) -> None:
    """exp(−inf − −inf): the first block ends within a query tile (5 queries), so some of its rows see none."""
    spec = with_options("compressed", block=9)
    check(spec, **SHORT, device=device)
    sees(SHORT, planted(spec, ("compressed_fwd", "-1.0e30", 'float("-inf")')), device, spec)


def test_a_window_of_one_token_more_is_seen(device: str) -> None:
    """XL: w + 1 in training. With its bounds, so that no mask hides it."""
    sees(SHORT, nsagen.load(with_options("window", size=12)), device)


def test_compressed_lengths_of_packed_sequences_are_their_own(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fla #707: lengths from the total. Also where a sequence is shorter than l."""
    sound = mean_pool.pooled_pair

    def from_total(k: Tensor, v: Tensor, cu_seqlens: Tensor, *sizes: int) -> tuple[Tensor, Tensor]:
        return sound(k, v, cu_seqlens[[0, -1]], *sizes)

    monkeypatch.setattr(mean_pool, "pooled_pair", from_total)
    sees(PACKED, None, device)


# Rows that see nothing, and lse


def parts(module: Any, device: str) -> None:
    """Each branch alone: out, natural float32 lse; a row without a key: 0, −inf, and no NaN in gradients."""
    q, k, v, _ = make_inputs(SPEC, 1, 40, torch.float32, device, 5)
    c, w = SPEC["branches"]["compressed"], SPEC["branches"]["window"]
    k_cmp, v_cmp = module.Compressor(device=device)(k, v)
    pairs = [
        (
            module.compressed_attention(q, k_cmp, v_cmp),
            oracle.compressed(q, *oracle.compress(k, v, c["block"], c["stride"]), c["block"], c["stride"]),
        ),
        (module.window_attention(q, k, v), oracle.window(q, k, v, w["size"])),
    ]
    for (out, lse), (right, right_lse) in pairs:
        assert lse.dtype == torch.float32
        assert oracle.error(out, right) < FORWARD
        assert oracle.error(lse, right_lse) < FORWARD  # infinities must stand in the same places
        d_out = torch.ones_like(out)
        assert all(bool(g.isfinite().all()) for g in oracle.gradients(out, [q, k, v], d_out))
    out, lse = pairs[0][0]
    assert bool((lse[:, : c["block"] - 1] == -torch.inf).all())
    assert not bool(out[:, : c["block"] - 1].any())


NOTHING_SEEN = 'lse = tl.where(some, (m + tl.log2(z)) * 0.6931471805599453, float("-inf"))'
OF_ROWS: dict[str, Fault] = {
    "lse 0 of a row that sees nothing": ("compressed_fwd", NOTHING_SEEN, NOTHING_SEEN.replace('float("-inf")', "0.0")),
    "NaN of a row that sees nothing": ("compressed_fwd", "tl.where(some, z, 1.0)", "z"),
    "lse in log2 units": ("window_fwd", " * 0.6931471805599453", ""),
}


def test_rows_that_see_nothing_and_natural_logarithms(device: str) -> None:
    parts(nsagen.load(SPEC), device)


@pytest.mark.parametrize("fault", OF_ROWS)
def test_a_fault_of_lse_is_seen(fault: str, device: str) -> None:
    module = planted(SPEC, OF_ROWS[fault])
    with pytest.raises(AssertionError):
        parts(module, device)


# The choice of blocks


def chosen_blocks(module: Any, k_cmp: Tensor, q: Tensor) -> Tensor:
    _, lse = module.compressed_attention(q, k_cmp, torch.zeros(*k_cmp.shape[:3], 40, device=q.device))
    return module.select_blocks(q, k_cmp, lse)


def ties(module: Any, device: str) -> None:
    """All keys alike: blocks inside tie exactly, so the lowest ones fill what the forced blocks leave."""
    q, k, *_ = make_inputs(SPEC, 1, 90, torch.float32, device, 6)
    k_cmp = k.detach()[:, :1].expand(1, 29, 2, 24).contiguous()
    last = chosen_blocks(module, k_cmp, q.detach())[0, 80]  # its own block is 8; forced 0, 7, 8
    assert last.tolist() == [[0, 1, 2, 7, 8]] * 2


def test_ties_go_to_the_lowest_block(device: str) -> None:
    ties(nsagen.load(SPEC), device)


def test_ties_to_the_highest_block_are_seen(device: str) -> None:
    last = planted(
        SPEC, ("select_best", "int32), 0) <= room)", "int32), 0) > tl.sum((bits == least).to(tl.int32)) - room)")
    )
    with pytest.raises(AssertionError):
        ties(last, device)


def near_ties(module: Any, device: str) -> None:
    """Keys that differ in the 4th digit: the sets must be the best by exact scores, to float32's last digits."""
    q, k, *_ = make_inputs(SPEC, 1, 90, torch.float32, device, 7)
    noise = torch.randn(1, 29, 2, 24, generator=torch.Generator().manual_seed(8)).to(device)
    k_cmp = k.detach()[:, :1] + 3e-4 * noise
    c, s = SPEC["branches"]["compressed"], SPEC["branches"]["selected"]
    scores = oracle.importance(q.detach(), k_cmp, c["block"], c["stride"], s["block"])
    gap = oracle.choice_gap(
        chosen_blocks(module, k_cmp, q.detach()), scores, s["block"], s["top_n"], s["initial"], s["local"]
    )
    assert gap < 2e-6


def test_scores_that_nearly_tie_are_told_apart(device: str) -> None:
    near_ties(nsagen.load(SPEC), device)


def test_scores_in_16_bits_are_seen(device: str) -> None:
    rounded = planted(SPEC, ("_select", "None, torch.float32)", "None, torch.float16)"))
    with pytest.raises(AssertionError):
        near_ties(rounded, device)


def test_lists_are_unique_in_short_sequences(device: str) -> None:
    """Where initial and local blocks meet: every candidate once, −1 last."""
    q, k, *_ = make_inputs(SPEC, 1, 27, torch.float32, device, 9)
    module = nsagen.load(SPEC)
    k_cmp, _ = module.Compressor(device=device)(k, torch.zeros(1, 27, 2, 40, device=device))
    lists = chosen_blocks(module, k_cmp.detach(), q.detach())[0]
    for t in range(27):
        assert lists[t].tolist() == [[*range(t // 9 + 1), *[-1] * (4 - t // 9)]] * 2


@pytest.mark.parametrize("size", [9, 12])  # 9: scores of keys are kept, 12: sums of blocks, and the next one's part
def test_chunks_of_packed_queries_choose_the_same(size: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk starts within a sequence, and tiles of the packed layout do not start where it does."""
    module = nsagen.load(with_options("selected", block=size))
    ends = torch.tensor(PACKED["ends"], dtype=torch.int32, device=device)
    q, k, v, _ = make_inputs(SPEC, 1, 71, torch.float32, device, 10)
    k_cmp, v_cmp = module.Compressor(device=device)(k, v, cu_seqlens=ends)
    _, lse = module.compressed_attention(q, k_cmp, v_cmp, cu_seqlens=ends)
    whole = module.select_blocks(q, k_cmp, lse, cu_seqlens=ends)
    monkeypatch.setattr(launch, "chunk", lambda length, row_bytes: 32)
    assert torch.equal(module.select_blocks(q, k_cmp, lse, cu_seqlens=ends), whole)
    assert torch.equal(module.select_blocks(q.double(), k_cmp.double(), lse.double(), cu_seqlens=ends), whole)


# Offsets and grids

FAR = textwrap.dedent("""
    import sys, torch
    sys.path[:0] = sys.argv[1:3]
    from planted import planted
    from test_where_they_broke import SPEC
    from strategies import make_inputs
    fault = ("window_fwd_step", "row = s.to(tl.int64)", "row = s")
    module = planted(SPEC, *([fault] if sys.argv[3] == "fault" else []))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, k, v, _ = make_inputs(SPEC, 1, 20, torch.float16, device, 1)
    q = make_inputs(SPEC, 1, 20, torch.float16, device, 2).q
    far = torch.empty(20 * 2**27, dtype=torch.float16, device=device).as_strided((1, 20, 2, 24), (0, 2**27, 24, 1))
    far.copy_(k)  # 20 rows, 2^27 elements apart: beyond 2^31 from the 17th on. Pages in between are never touched
    near, _ = module.window_attention(q, k, v)
    out, _ = module.window_attention(q, far, v)
    assert torch.equal(near, out)
""")


@pytest.mark.parametrize("fault", ["sound", "fault"])
def test_offsets_past_2_to_the_31(fault: str) -> None:
    """In a process of its own: a wrong address may end it."""
    command = [sys.executable, "-c", FAR, str(TESTS), str(TESTS / "kernels"), fault]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert (done.returncode == 0) == (fault == "sound"), done.stderr[-2000:]


def grids(module: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The grids of a forward and backward whose kernels are not run."""
    found: list[tuple[int, ...]] = []

    def launched(_: Any, grid: tuple[int, ...]) -> Any:
        found.append(grid)
        return lambda *args, **options: None

    with monkeypatch.context() as patch:
        patch.setattr(KernelInterface, "__getitem__", launched)
        patch.setattr(launch, "use_kernels", lambda x: True)
        patch.setattr(launch, "POISON", False)
        q, k, v, gates = make_inputs(SPEC, 1, tokens)
        module.attention(q, k, v, gates, module.Compressor()).sum().backward()
    return found


def only_the_first_axis_grows(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Axes y and z end at 65,535 on a GPU; x at 2^31 − 1. Programs that share a key tile are 16 at most."""
    few, many = (grids(module, tokens, monkeypatch) for tokens in (1000, 3000))
    assert few and len(few) == len(many)
    assert [g[1:] for g in few] == [g[1:] for g in many]


def test_grids_grow_along_their_first_axis_only(monkeypatch: pytest.MonkeyPatch) -> None:
    only_the_first_axis_grows(nsagen.load(SPEC), monkeypatch)


def test_a_grid_that_grows_along_its_second_axis_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = ("_selected_backward", "(inverse.items.shape[0], sub)", "(sub, inverse.items.shape[0])")
    with pytest.raises(AssertionError):
        only_the_first_axis_grows(planted(SPEC, fault), monkeypatch)


# Settings, positions, and the tests themselves


def two_at_once(other: Any, device: str) -> None:
    """Two modules of one name and different windows, called in turns."""
    wide = with_options("window", size=19)
    check(SPEC, **SHORT, device=device)
    check(wide, **SHORT, device=device, module=other)
    check(SPEC, **SHORT, device=device)


def test_two_specs_in_one_process_do_not_clash(device: str) -> None:
    two_at_once(nsagen.load(with_options("window", size=19)), device)


def test_settings_shared_by_two_modules_are_seen(device: str) -> None:
    """SF: process-global configuration. Here: the second one's ops under the first one's name."""
    first, second = (compile_spec(api.read(s)) for s in (SPEC, with_options("window", size=19)))
    nsagen.load(SPEC)
    clash = planted_space(second, first.digest)
    with pytest.raises(AssertionError):
        two_at_once(clash, device)


def planted_space(compiled: Any, digest: str) -> Any:
    """The module with its custom ops in another module's space."""
    sound, faulty = (f'_SPACE = "nsagen_broke_{d}"' for d in (compiled.digest, digest))
    assert sound in compiled.source
    return api.module_of(replace(compiled, source=compiled.source.replace(sound, faulty), digest="f" * 12))


@pytest.mark.parametrize("pool", ["weighted", "linear", "mlp"])
def test_positions_are_folded_and_none_is_lost(pool: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = with_options("compressed", pool=pool, positions=True)
    case = {"batch": 1, "tokens": 25, "seed": 5}
    check(spec, **case, device=device)
    for kind in (compress.Pool, compress.WeightedPool):
        monkeypatch.setattr(kind, "forward", without_positions(kind.forward))
    with pytest.raises(AssertionError):
        check(spec, **case, device=device)


def without_positions(sound: Any) -> Any:
    def forward(self: Any, *arguments: Any) -> Tensor:
        kept, self.positions = self.positions, None
        try:
            return sound(self, *arguments)
        finally:
            self.positions = kept

    return forward


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    named = [n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)]
    return {
        name.split(".")[0]
        for name in [*named, *(n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom))]
    }


def test_the_oracle_shares_no_code_with_the_generator() -> None:
    """FSA's tests share the helper that is wrong."""
    assert "nsagen" not in imports(TESTS / "oracle.py")
    assert "nsagen" not in imports(TESTS / "strategies.py")


def fails_on(function: ast.FunctionDef) -> bool:
    """Whether it can fail by itself: an assert, pytest.raises, or a call of something that asserts."""
    inside = list(ast.walk(function))
    called = {
        n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", "")
        for n in inside
        if isinstance(n, ast.Call)
    }
    return any(isinstance(n, ast.Assert) for n in inside) or bool(called - {"print", "len", "range"})


def test_no_test_only_prints() -> None:
    """XL, SF: tests that print instead of asserting."""
    assert not fails_on(ast.parse("def test_x():\n    print(1)").body[0])  # type: ignore[arg-type]
    for path in TESTS.rglob("test_*.py"):
        tests = [
            n
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")
        ]
        assert all(map(fails_on, tests)), path

"""The rivals of `nsagen bench`: dense attention, and flash-linear-attention's NSA where it computes the same."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from nsagen.errors import NsagenError
from nsagen.spec import Spec
from nsagen.tools.bench_inputs import Case, Setting, Work, dense_inputs
from nsagen.tools.dense import FA3_MODULES, Maker, fa3, first, flex, installed, sdpa

FLA_GROUP = 16  # the least group that its kernels take


@dataclass(frozen=True)
class Rival:
    """`refuse` says why it cannot run at all, or nothing; `note` what it leaves out."""

    name: str
    label: str
    make: Maker
    refuse: Callable[[Setting], str | None]
    kind: str = "dense"
    forward_only: str | None = None
    note: Callable[[Setting], str | None] = lambda setting: None


def rivals(setting: Setting, against: Sequence[str] | None) -> list[Case]:
    """Those asked for, also to say why one cannot run; by default torch's, and what is installed of the others."""
    chosen = _default(setting) if against is None else against
    for name in chosen:
        if name not in RIVALS:
            raise NsagenError(f"--against knows no {name!r}: choose from {', '.join(RIVALS)}, or none")
    return [_case(RIVALS[name], setting) for name in dict.fromkeys(chosen)]


def _default(setting: Setting) -> list[str]:
    if setting.device != "cuda":
        return ["sdpa"]
    return ["fa2", "cudnn", "flex", *(name for name in ("fa3", "fla") if RIVALS[name].refuse(setting) is None)]


def _case(rival: Rival, setting: Setting) -> Case:
    reason = rival.refuse(setting)

    def make(length: int, seed: int) -> Work:
        if reason:
            raise NsagenError(reason)
        return rival.make(setting, length, seed)

    return Case(rival.label, rival.kind, make, rival.forward_only, rival.note(setting))


def _needs_gpu(setting: Setting) -> str | None:
    return None if setting.device == "cuda" else "it needs a CUDA device"


def _no_fa3(setting: Setting) -> str | None:
    return _needs_gpu(setting) or (None if installed(FA3_MODULES) else "not installed: pip install fa3-fwd")


def _no_fla(setting: Setting) -> str | None:
    there = _needs_gpu(setting) or (None if find_spec("fla") else "not installed: pip install flash-linear-attention")
    return there or (
        None if fits_fla(setting.spec) else "it has only l = d = l', means, shared K/V, groups of 16, 32, 64"
    )


def fits_fla(spec: Spec) -> bool:
    """Whether its parallel_nsa computes what the spec says."""
    branches: dict[str, Any] = dict(spec.branches)
    compressed, selected, window = (branches.pop(name, None) for name in ("compressed", "selected", "window"))
    if compressed is None or selected is None or branches:
        return False
    group = spec.heads.query // spec.heads.kv
    return (
        (compressed.block, compressed.stride, compressed.pool) == (selected.block, selected.block, "mean")
        and (selected.initial, selected.local, selected.scores) == (1, 2, "compressed")
        and (window is None or window.sinks == 0)
        and (spec.kv, spec.combine) == ("shared", "gated_sum")
        and group >= FLA_GROUP
        and group & (group - 1) == 0
    )


def _fla(setting: Setting, length: int, seed: int) -> Work:
    """A gate for each branch, as in the spec."""
    parallel_nsa = importlib.import_module("fla.ops.nsa.parallel").parallel_nsa
    q, k, v, d_out = dense_inputs(setting, length, seed)
    source, branches = setting.source(length, seed + 1), setting.spec.branches
    selected: Any = branches["selected"]
    window = 0 if _fla_note(setting) else getattr(branches.get("window"), "size", 0)
    gates = {
        name: setting.rand(source, 1, length, q.shape[2]).requires_grad_()
        for name in ("g_cmp", "g_slc", *(["g_swa"] if window else []))
    }
    options = {"block_counts": selected.top_n, "block_size": selected.block, "window_size": window}
    return Work(lambda: first(parallel_nsa(q, k, v, **gates, **options)), [q, k, v, *gates.values()], [d_out])


def _fla_note(setting: Setting) -> str | None:
    if "window" not in setting.spec.branches or find_spec("flash_attn"):
        return None
    return "without the window branch, for which it needs flash_attn"


RIVALS = {
    r.name: r
    for r in (
        Rival("fa2", "dense FA2", sdpa("FLASH_ATTENTION"), _needs_gpu),
        Rival("cudnn", "dense cuDNN", sdpa("CUDNN_ATTENTION"), _needs_gpu),
        Rival("flex", "dense Flex", flex, _needs_gpu),
        Rival("fa3", "dense FA3", fa3, _no_fa3, forward_only="timed forward only"),
        Rival("fla", "fla NSA", _fla, _no_fla, kind="peer", note=_fla_note),
        Rival("sdpa", "dense SDPA", sdpa(None), lambda setting: None),
    )
}

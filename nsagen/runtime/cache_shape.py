"""What a cache holds and how long it is: from a module's layout, with one clear error where that cannot be."""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import torch

from nsagen.errors import InputError
from nsagen.runtime.checks import DTYPES, Layout


class CachedValue(NamedTuple):
    name: str
    dim: int
    stride: int  # tokens a row


def fail(layout: Layout, rule: str, got: object, way_out: str) -> NoReturn:
    raise InputError(f"{layout.name}.KVCache: {rule}, got {got}: {way_out}")


def token_value(layout: Layout, side: str, branch: str) -> str:
    """The value that a branch's keys ("k") or values ("v") are kept as."""
    return f"{side}_{branch}" if layout.per_branch else side


def values(layout: Layout, mean_of: str) -> list[CachedValue]:
    """Tokens of every branch, or of all; φ's blocks; the means of `mean_of` that score blocks."""
    branches = layout.branches if layout.per_branch else layout.branches[:1]
    dims = (("k", layout.qk_dim), ("v", layout.v_dim))
    found = [CachedValue(token_value(layout, side, branch), dim, 1) for branch in branches for side, dim in dims]
    if layout.pooled:
        found += [CachedValue(f"{side}_cmp", dim, layout.pooled[2]) for side, dim in dims]
    if mean_of:
        assert layout.scored is not None
        found.append(CachedValue("k_pooled", layout.qk_dim, layout.scored[1]))
    return found


def whole_length(layout: Layout, batch: int, max_len: int, page_size: int | None, num_pages: int | None) -> int:
    """max_len rounded up to whole blocks, or to whole pages."""
    unit = math.lcm(*(layout.scored or (1,)), *(layout.pooled[2:] if layout.pooled else (1,)))
    if batch < 1 or max_len < 1:
        fail(layout, "batch and max_len must be 1 or more", f"{batch} and {max_len}", "make room for one")
    if page_size is None:
        if num_pages is not None:
            fail(layout, "num_pages goes with a page_size", num_pages, "pass page_size too")
        page_size = unit
    elif page_size < 1 or page_size % unit:
        fail(layout, f"page_size must be a multiple of {unit}", page_size, "whole blocks lie in a page")
    return -(-max_len // page_size) * page_size


def check_dtypes(layout: Layout, dtype: torch.dtype, kv_dtype: torch.dtype | None, device: torch.device) -> None:
    if dtype not in DTYPES:
        fail(layout, "dtype must be float32, bfloat16, float16 or float64", dtype, "take that of q")
    if kv_dtype not in (None, torch.float8_e4m3fn):
        fail(layout, "kv_dtype must be None or float8_e4m3fn", kv_dtype, "leave it out to keep dtype")
    if kv_dtype is not None and device.type == "cuda" and torch.version.cuda:
        chip = torch.cuda.get_device_capability(device)
        if chip < (8, 9):
            fail(layout, "float8_e4m3fn needs compute capability 8.9 or more", chip, "leave kv_dtype out")

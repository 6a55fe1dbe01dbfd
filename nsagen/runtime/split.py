"""Host side of a decoding step: how a step's keys are shared out over programs. Reads no value of the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsagen.runtime import launch
from nsagen.runtime.launch import Config, Tiles, power_of_two
from nsagen.runtime.stores import Past

PROGRAMS = 256  # of a launch: about two a multiprocessor stream as fast as eight, with fewer parts to merge (H100)
MOST_RUNS = 32  # more parts of a row would cost as much as its keys
APPEND_WARPS = 2  # of a program that moves a token's row, or a block of them
MERGE_WARPS = 4
WARP_MERGES = 4096  # numbers of a term's parts that a warp adds up without a spill
MERGED = 32  # parts that a merging program holds at once, unless a single row has more
MOST_MERGED = 4  # rows: of twice or half as many a launch takes two to four µs more (H200)
SELECT_WARPS = 8  # of a selection that is launched by itself
MOST_RIDING = 1024  # candidates of a selection that rides: each run of a list repeats it
MOST_SUMS = 1024  # sums that a warp of a selection holds, of each kind
MOST_RIDING_SUMS = 512  # of one that rides: more would spill where programs are held to a quarter's registers
MOST_CANDIDATES = 1024  # whose scores it adds up at once
MOST_RIDING_FEW = 256  # of few programs: what the others do meanwhile hides nothing
MOST_SEARCHED = 4096  # candidates among which a program finds the best at once
FINALISTS = 256  # of a row: as many can be compared each with every other
MOST_ROWS = {2: 32, 4: 16}  # of a tile of several queries, by bytes of an operand: more would spill on four warps

FEW = 64  # queries × KV heads: below, programs leave the chip idle, and each should be short
JOINED = 16  # of them at most: two programs a multiprocessor, which are PROGRAMS, then score them in one round
SMALL = 16  # rows: of smaller pages a tile of 64 keys takes more than the four that are looked up one by one
QUARTER = 128  # registers a thread, of programs of which four share a multiprocessor
DEEP = 5  # stages of a pipeline that reads the table as it does the keys, of such pages

EARLY = (1, 2)  # how a step's launches overlap (device.begin_early) of few programs, and of many


class Runs(NamedTuple):
    """`count` runs of `length` keys (or entries of a list); the last one takes what is left."""

    count: int
    length: int


def pick(tiles: Tiles, q: Tensor, scattered: bool, heads: int, scaled: bool, most: int = 0) -> Config:
    """The first candidate for few queries; for more one of four warps, and of a deep pipeline if `scattered`.

    most: keys of a tile, for programs with all of a query each; 0 for others. For a crowd of those a tile that is held
    to a quarter of a multiprocessor's registers and fits a quarter of its shared memory: else 512 programs take two
    rounds, the second one nearly empty. Not if `scaled`: with scales a program needs more registers; nor in float32,
    which no tensor core multiplies.
    """
    first = launch.pick(tiles, q)
    if tiles.forced is not None or not q.is_cuda or few(q, heads):
        return first
    crowd = most > 0 and _programs(q, heads) > PROGRAMS and q.element_size() == 2
    crowd = crowd and not (scattered or scaled or torch.version.hip)
    at = (q.device, q.dtype, scattered, crowd, most)
    config = tiles.picked.get(at)
    if config is None:
        chip = launch.chip(q.device.index or 0)
        four = [c for c in launch.candidates(tiles, chip, 8 * q.element_size()) if c.warps == 4]
        four = [c for c in four if not most or c.bn <= most] or four
        config = min(four, key=lambda c: (c.stages == DEEP) != scattered, default=first)
        widest = max((c for c in four if quarter(c.bn, c.stages, c.smem, chip.smem)), key=lambda c: c.bn, default=None)
        if crowd and widest:
            config = widest._replace(cap=QUARTER)
        tiles.picked[at] = config
    return config


def quarter(bn: int, stages: int, smem: int, most: int) -> bool:
    """Whether four programs share a multiprocessor of `most` bytes well: of the model's three stages, which `smem` is
    of, a tile needs two. With tiles of 16 keys fewer programs are faster (H200)."""
    return stages == 3 and bn >= 32 and 4 * (2 * smem // 3) <= most


def whole(q: Tensor, heads: int, blocks: int = 1) -> bool:
    """Whether a program takes all keys of a sequence and KV head: of one query, with so many sequences that each source
    would be one run; and no more blocks to select among than it can search at once."""
    return q.shape[1] == 1 and _programs(q, heads) >= PROGRAMS and blocks <= MOST_SEARCHED


def few(q: Tensor, heads: int) -> bool:
    """Whether programs of a query and KV head each leave the chip idle, so that a step is as long as its launches."""
    return _programs(q, heads) < FEW


def _programs(q: Tensor, heads: int) -> int:
    return q.shape[0] * q.shape[1] * heads


def joins(q: Tensor, heads: int, stride: int) -> bool:
    """Whether a step's tokens are appended in the launch that scores, whose programs take more registers then. Its
    kernel pools one block that has just ended, at most, one every `stride` tokens."""
    return _programs(q, heads) <= JOINED and power_of_two(q.shape[1], 1) <= stride


def scattered(past: Past, stride: int) -> bool:
    """Whether keys, one every `stride` tokens, lie in pages of few."""
    return past.table is not None and past.page // stride < SMALL


def runs(programs: int, longest: int, step: int) -> Runs:
    """Share out up to `longest` keys, `step` at a time, of each of `programs` query tiles: from a cache's capacity,
    not from its lengths, so that a captured launch stays right when they change. Runs past the end are short work."""
    tiles = max(1, -(-longest // step))
    count = max(1, min(MOST_RUNS, tiles, -(-PROGRAMS // max(1, programs))))
    each = -(-tiles // count)
    return Runs(-(-tiles // each), each * step)


def groups(keys: int, per: int) -> int:
    """Places in a row of sums, of `per` keys each: one more than there are, for what reaches the next block, and a
    multiple of 16, so that they are loaded in vectors."""
    return -(-(-(-keys // per) + 1) // 16) * 16


def longest(ranges: list[tuple[int, int]], step: int) -> int:
    """Keys that a query tile walks at most, from its walks' ranges; they need not start at a step's start."""
    return max(hi - lo // step * step for lo, hi in ranges)


def rows(q: Tensor, group: int) -> int:
    """Rows of a tile: the step's queries (q [B, m, Hq, Dqk]) times the heads of a group, as far as they fit."""
    return min(power_of_two(q.shape[1] * group), max(MOST_ROWS[q.element_size()], power_of_two(group)))


def together(candidates: int, group: int, sums: int, tile: int = 1) -> int:
    """Candidates whose scores a program of a selection adds up at once, of `sums` each kind; `tile` at least, which
    share a top."""
    return max(tile, min(candidates, MOST_CANDIDATES, sums // power_of_two(group)))


class Shares(NamedTuple):
    """A selection: whether it is launched for what is to be searched, candidates that a program adds up at once, and
    whether a launched one sends on the best of those alone."""

    launched: bool
    together: int
    heats: bool


def shares(alone: bool, candidates: int, group: int, count: int, warps: int, tile: int = 1) -> Shares:
    """alone: whether programs are `few`; count: blocks of a list; warps: of the attention's programs, which begin with
    the rest of the selection."""
    if candidates <= (MOST_RIDING_FEW if alone else MOST_RIDING):
        return Shares(False, together(candidates, group, warps * MOST_RIDING_SUMS, tile), False)
    most, kept = together(candidates, group, SELECT_WARPS * MOST_SUMS, tile), power_of_two(count, 1)
    each = min(most, max(2 * kept, tile, candidates * kept // FINALISTS))
    heats = (alone or candidates > MOST_SEARCHED) and 2 * kept <= each
    return Shares(True, each if heats else most, heats)


def merged_rows(*widths: int) -> int:
    """Rows of a merging program, of so many parts each at most."""
    return max(1, min(MOST_MERGED, 1 << max(1, MERGED // sum(widths)).bit_length() - 1))


def merged(q: Tensor, heads: int, dim: int, *widths: int) -> tuple[int, int]:
    """Rows and warps of a merging program. Of few rows one each, and one warp where that holds a row's parts: what it
    adds up lies in a thread, and nothing waits at a barrier."""
    if not few(q, heads):
        return merged_rows(*widths), MERGE_WARPS
    return 1, max(1, min(MERGE_WARPS, max(widths) * power_of_two(dim) // WARP_MERGES))


def early(q: Tensor, heads: int) -> dict[str, int | bool]:
    """Arguments of a step's launch that begins before the one before it has ended: programmatic dependent launch."""
    how = EARLY[0 if few(q, heads) else 1]
    return {"EARLY": how, "launch_pdl": True} if how and launch.overlaps(q.device) else {"EARLY": 0}

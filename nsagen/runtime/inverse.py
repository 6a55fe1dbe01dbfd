"""The kernels behind lists.invert: a counting sort of the block lists by key block, and by query within one.

A program owns a tile, some queries of one (batch, KV head), and a row of counts, a column a key block slot. Its entries
come STEP queries at a time, WIDTH or fewer of them.
"""

# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def last_at_most(ptr, x, count):
    """The last i < count with ptr[i] <= x, for each of x; ptr int32 [count] ascending, ptr[0] <= x."""
    i = tl.zeros(x.shape, dtype=tl.int32)
    while count > 1:
        half = count // 2
        i = tl.where(tl.load(ptr + i + half) <= x, i + half, i)
        count -= half
    return i


@triton.jit
def sort(x, i, BITS: tl.constexpr):
    """x [2**BITS] ascending, i its numbers. A bitonic network as tl.sort, of gathers: the interpreter is fast at those.

    Runs of 2**run are merged by twos: each number meets its mirror image in the other run, then those 2**bit away.
    """
    for run in tl.static_range(BITS):
        for bit in tl.static_range(run, -1, -1):
            other = tl.gather(x, i ^ ((2 << run) - 1 if bit == run else 1 << bit), 0)
            x = tl.where(i & (1 << bit) == 0, tl.minimum(x, other), tl.maximum(x, other))
    return x


@triton.jit
def queries_of(pid, length, pairs, chunk, tiles, tile):
    """The chunk, the (batch, KV head) and the queries [first, end) of a program; a chunk has `tiles` tiles."""
    number = pid // pairs
    at = number // tiles
    first = at * chunk + number % tiles * tile
    return at, pid % pairs, first, tl.minimum(tl.minimum(first + tile, (at + 1) * chunk), length)


@triton.jit
def slots_of(blocks_ptr, cu_ptr, place, t, live, slots, sequences, SIZE: tl.constexpr, LEAVES: tl.constexpr):
    """The slots of the blocks listed at `place` by queries t; `slots` for none and where the sequence ends before.

    The last LEAVES blocks up to a query's own count as none; packed, there must be no such.
    """
    block = tl.load(blocks_ptr + place, mask=live, other=-1)
    if LEAVES:
        block = tl.where(block <= t // SIZE - LEAVES, block, -1)
    if cu_ptr is None:
        return tl.where((block >= 0) & (block < slots), block, slots)
    else:
        sequence = last_at_most(cu_ptr, t, sequences)
        start = tl.load(cu_ptr + sequence)
        blocks = (tl.load(cu_ptr + sequence + 1) - start + SIZE - 1) // SIZE
        return tl.where((block >= 0) & (block < blocks), start // SIZE + sequence + block, slots)


@triton.jit(do_not_specialize=["length", "heads", "pairs", "slots", "sequences", "chunk", "tiles", "tile"])
def count_entries(
    blocks_ptr, counts_ptr, cu_ptr, length, heads, pairs, slots, sequences, chunk, tiles, tile,
    COUNT: tl.constexpr, SIZE: tl.constexpr, LEAVES: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """counts int32 [programs, slots]: how often a tile's queries list each block. The order of adding does not show."""
    pid = tl.program_id(0)
    _, pair, first, end = queries_of(pid, length, pairs, chunk, tiles, tile)
    row = counts_ptr + pid.to(tl.int64) * slots
    WIDTH: tl.constexpr = 1 << BITS
    i = tl.arange(0, WIDTH)
    for column in range(0, slots, WIDTH):
        tl.store(row + column + i, tl.zeros([WIDTH], dtype=tl.int32), mask=column + i < slots)
    tl.debug_barrier()
    for t0 in range(first, end, STEP):
        t = t0 + i // COUNT
        live = (i < STEP * COUNT) & (t < end)
        place = ((pair // heads * length + t) * heads + pair % heads) * COUNT + i % COUNT
        slot = slots_of(blocks_ptr, cu_ptr, place, t, live, slots, sequences, SIZE, LEAVES)
        tl.atomic_add(row + slot, 1, mask=slot < slots, sem="relaxed")


@triton.jit(do_not_specialize=["tiles", "blocks"])
def sum_tiles(counts_ptr, totals_ptr, tiles, blocks, TILES: tl.constexpr, BLOCKS: tl.constexpr):
    """counts [chunks, tiles, blocks], in place: those of the chunk's tiles before. totals [chunks, blocks]: of all."""
    at = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    before = tl.zeros([BLOCKS], dtype=tl.int32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)[:, None]
        mask = (tile < tiles) & (block < blocks)[None, :]
        counts = counts_ptr + (at * tiles + tile) * blocks + block[None, :]
        count = tl.load(counts, mask=mask, other=0)
        tl.store(counts, before[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        before += tl.sum(count, 0)
    tl.store(totals_ptr + at * blocks + block, before, mask=block < blocks)


@triton.jit(do_not_specialize=["chunks", "blocks", "per_item"])
def sum_blocks(totals_ptr, starts_ptr, first_ptr, chunks, blocks, per_item, WIDTH: tl.constexpr):
    """starts, first int32 [chunks, blocks + 1]: each block's first entry of all, its first item of the chunk.

    One program: a few thousand numbers a step are faster than the launches of a scan over many.
    """
    entries = 0
    for _ in range(chunks):
        items = 0
        for first in range(0, blocks, WIDTH):
            block = first + tl.arange(0, WIDTH)
            count = tl.load(totals_ptr + block, mask=block < blocks, other=0)
            some = (count + per_item - 1) // per_item
            tl.store(starts_ptr + block, entries + tl.cumsum(count, 0) - count, mask=block < blocks)
            tl.store(first_ptr + block, items + tl.cumsum(some, 0) - some, mask=block < blocks)
            entries += tl.sum(count, 0)
            items += tl.sum(some, 0)
        tl.store(starts_ptr + blocks, entries)
        tl.store(first_ptr + blocks, items)
        totals_ptr += blocks
        starts_ptr += blocks + 1
        first_ptr += blocks + 1


@triton.jit(do_not_specialize=["most", "blocks", "per_item"])
def write_items(starts_ptr, first_ptr, items_ptr, most, blocks, per_item, WIDTH: tl.constexpr):
    """items int32 [chunks, most, 3]: (key block, first entry, end entry); unused ones name block `blocks`."""
    at = tl.program_id(1).to(tl.int64)
    item = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    first, starts = first_ptr + at * (blocks + 1), starts_ptr + at * (blocks + 1)
    block = last_at_most(first, item, blocks + 1)
    known = tl.minimum(block, blocks - 1)
    begin = tl.load(starts + known) + (item - tl.load(first + known)) * per_item
    out = items_ptr + (at * most + item) * 3
    tl.store(out, block, mask=item < most)
    tl.store(out + 1, begin, mask=item < most)
    tl.store(out + 2, tl.minimum(begin + per_item, tl.load(starts + known + 1)), mask=item < most)


@triton.jit(do_not_specialize=["length", "heads", "pairs", "slots", "sequences", "chunk", "tiles", "tile"])
def place_entries(
    blocks_ptr, counts_ptr, starts_ptr, entries_ptr, cu_ptr, length, heads, pairs, slots, sequences, chunk, tiles, tile,
    COUNT: tl.constexpr, SIZE: tl.constexpr, LEAVES: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr,
    KEY: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """entries: the tile's, each at its place in the inverse. The row of counts is used up.

    A step's entries are sorted by slot and place, in one number of type KEY. Of a run of equal slots the first takes
    its own number off the slot's count; then count plus number is the place of each, and the next count that of the
    last plus one.
    """
    pid = tl.program_id(0)
    at, pair, first, end = queries_of(pid, length, pairs, chunk, tiles, tile)
    row = counts_ptr + pid.to(tl.int64) * slots
    starts = starts_ptr + (at.to(tl.int64) * pairs + pair) * slots + at
    WIDTH: tl.constexpr = 1 << BITS
    i = tl.arange(0, WIDTH)
    for t0 in range(first, end, STEP):
        t = t0 + i // COUNT
        live = (i < STEP * COUNT) & (t < end)
        place = ((pair // heads * length + t) * heads + pair % heads) * COUNT + i % COUNT
        slot = slots_of(blocks_ptr, cu_ptr, place, t, live, slots, sequences, SIZE, LEAVES)
        key = sort(slot.to(KEY) * WIDTH + i, i, BITS)
        slot, listed = (key // WIDTH).to(tl.int32), (key % WIDTH).to(tl.int32)
        some = slot < slots
        head = some & ((i == 0) | (slot != tl.gather(slot, tl.maximum(i - 1, 0), 0)))
        tl.store(row + slot, tl.load(row + slot, mask=head, other=0) - i, mask=head)
        tl.debug_barrier()
        rank = tl.load(row + slot, mask=some, other=0) + i
        query = pair // heads * length + t0 + listed // COUNT
        entry = (query * heads + pair % heads) * COUNT + listed % COUNT if PLACES else query
        tl.store(entries_ptr + tl.load(starts + slot, mask=some, other=0) + rank, entry, mask=some)
        if t0 + STEP < end:
            last = some & ((i == WIDTH - 1) | (slot != tl.gather(slot, tl.minimum(i + 1, WIDTH - 1), 0)))
            tl.debug_barrier()
            tl.store(row + slot, rank + 1, mask=last)
            tl.debug_barrier()

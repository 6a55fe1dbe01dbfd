"""Device functions that generated kernels call. Plain @triton.jit, each tested on its own."""

import triton
import triton.language as tl


@triton.jit
def find_sequence(cu_ptr, tile, sequences, STRIDE: tl.constexpr, STEP: tl.constexpr):
    """The packed sequence that tile number `tile` belongs to; cu_ptr int32 [sequences + 1].

    Sequence i owns the tiles from ⌊⌊cu[i]/STRIDE⌋/STEP⌋ + i on. That leaves each room for all of its tiles, so
    the grid needs no table and the host no lengths; a tile past the sequence's end has nothing to do.
    """
    lo = 0
    hi = sequences
    while hi - lo > 1:
        mid = (lo + hi) // 2
        first = tl.load(cu_ptr + mid) // STRIDE // STEP + mid
        lo = tl.where(first <= tile, mid, lo)
        hi = tl.where(first <= tile, hi, mid)
    return lo


@triton.jit
def sequence_of(cu_ptr, row, sequences, STRIDE: tl.constexpr = 1):  # pyright: ignore[reportArgumentType]
    """The packed sequence of row `row`, one every STRIDE tokens: the last one that starts at or before it."""
    lo = 0
    hi = sequences
    while hi - lo > 1:
        mid = (lo + hi) // 2
        first = tl.load(cu_ptr + mid) // STRIDE
        lo = tl.where(first <= row, mid, lo)
        hi = tl.where(first <= row, hi, mid)
    return lo


@triton.jit
def first_tile(start, sequence, STRIDE: tl.constexpr, STEP: tl.constexpr):
    """Number of the first tile of a sequence that starts at token `start` (see find_sequence)."""
    return start // STRIDE // STEP + sequence


@triton.jit
def row_in_page(page, pages, s, PAGE: tl.constexpr):
    """Rows, 64-bit, of the keys s that lie in `page`; −1 where there is no such page.

    A storage has less than 2³¹ rows: a 32-bit number, widened last, makes its product with a stride one instruction.
    """
    return tl.where((page >= 0) & (page < pages), page * PAGE + s % PAGE, -1).to(tl.int64)


@triton.jit
def cached_row(table_ptr, pages, s, inside, PAGE: tl.constexpr):
    """Rows, 64-bit, of the keys s of a sequence in a cache: s itself, or through its row of the page table, or −1."""
    if table_ptr is None:
        return s.to(tl.int64)
    else:
        return row_in_page(tl.load(table_ptr + s // PAGE, mask=inside, other=-1), pages, s, PAGE)


@triton.jit
def ring_row(s, SINKS: tl.constexpr, RING: tl.constexpr):
    """Rows, 64-bit, of the tokens s of a sequence where the first SINKS and the last RING of the others stay."""
    return tl.where(s < SINKS, s, SINKS + (s - SINKS) % RING).to(tl.int64)


@triton.jit
def token_row(table_ptr, pages, s, inside, PAGE: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr):
    """cached_row, or ring_row where there is a ring."""
    if RING > 0:
        return ring_row(s, SINKS, RING)
    else:
        return cached_row(table_ptr, pages, s, inside, PAGE)


@triton.jit
def block_rows(
    table_ptr, pages, start, s, inside, BLOCK: tl.constexpr, PAGE: tl.constexpr, SINKS: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """token_row of tokens s of a whole block, start … start + BLOCK − 1: two look-ups where pages are no smaller."""
    if table_ptr is None or RING > 0 or PAGE < BLOCK:
        return token_row(table_ptr, pages, s, inside, PAGE, SINKS, RING)
    else:
        first = start // PAGE
        a = tl.load(table_ptr + first)
        b = tl.load(table_ptr + (start + BLOCK - 1) // PAGE)
        return row_in_page(tl.where(s // PAGE == first, a, b), pages, s, PAGE)


@triton.jit
def tile_rows(
    table_ptr, pages, s0, s, n, BN: tl.constexpr, PAGE: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """token_row of the keys s = s0 … s0 + BN − 1 below n.

    s0: whole tiles, from the start of a listed block of SIZE tokens on if there are any (else SIZE is 0). Few look-ups
    where the tiles fill pages, or pages them. For a key that a ring has lost, the row of a later one.
    """
    a, b, c, d = tile_pages(table_ptr, s0, n, BN, PAGE, RING, SIZE)  # pyright: ignore[reportGeneralTypeIssues]
    return known_tile_rows(table_ptr, pages, a, b, c, d, s0, s, n, BN, PAGE, SINKS, RING, SIZE)


@triton.constexpr_function
def look_ups(BN, PAGE, SIZE):
    """Pages of a tile (see tile_rows) that are looked up as scalars, four at most; 0 where every key is looked up."""
    if SIZE % BN != 0:  # a tile may begin anywhere in a page
        return 0
    if PAGE % BN == 0:
        return 1
    return BN // PAGE if BN % PAGE == 0 and BN <= 4 * PAGE else 0


@triton.jit
def tile_pages(table_ptr, s0, n, BN: tl.constexpr, PAGE: tl.constexpr, RING: tl.constexpr, SIZE: tl.constexpr):
    """The pages, four at most, of the keys s0 … s0 + BN − 1 below n, for known_tile_rows; −1 for what it does not ask.

    Scalars: a loop can look them up a turn ahead, so that its pipeline's stages are all between the keys and their use.
    """
    none = tl.full([], -1, dtype=tl.int32)
    count: tl.constexpr = look_ups(BN, PAGE, SIZE)
    if table_ptr is None or RING > 0 or count == 0:
        return none, none, none, none
    else:
        first = table_ptr + s0 // PAGE
        a = tl.load(first, mask=s0 < n, other=-1)
        if count == 1:
            return a, none, none, none
        else:
            b = tl.load(first + 1, mask=s0 + PAGE < n, other=-1)
            if count == 2:
                return a, b, none, none
            else:
                c = tl.load(first + 2, mask=s0 + 2 * PAGE < n, other=-1)
                return a, b, c, tl.load(first + 3, mask=s0 + 3 * PAGE < n, other=-1)


@triton.jit
def known_tile_rows(
    table_ptr, pages, a, b, c, d, s0, s, n, BN: tl.constexpr, PAGE: tl.constexpr, SINKS: tl.constexpr,
    RING: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """tile_rows, given tile_pages."""
    if RING >= BN and SINKS == 0:
        row = s0 % RING + (s - s0)  # one division a tile
        return tl.where(row < RING, row, row - RING).to(tl.int64)
    elif RING > 0:
        return ring_row(s, SINKS, RING)
    elif table_ptr is None:
        return s.to(tl.int64)
    elif look_ups(BN, PAGE, SIZE) == 0:
        return cached_row(table_ptr, pages, s, s < n, PAGE)
    elif look_ups(BN, PAGE, SIZE) == 1:
        return row_in_page(a, pages, s, PAGE)
    else:
        at = (s - s0) // PAGE
        page = tl.where(at == 0, a, tl.where(at == 1, b, tl.where(at == 2, c, d)))
        return row_in_page(page, pages, s, PAGE)


@triton.jit
def listed_tile(blocks_ptr, step, end, TILES: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr):
    """The first key of tile `step` of a list's blocks, TILES each of BN keys; of the last one from `end` on."""
    step = tl.maximum(tl.minimum(step, end - 1), 0)
    block = tl.load(blocks_ptr + step // TILES, mask=end > 0, other=0)
    return block * SIZE + step % TILES * BN


@triton.jit
def recent_rows(
    table_ptr, pages, s0, s, n, BN: tl.constexpr, PAGE: tl.constexpr, oldest, SINKS: tl.constexpr, SIZE: tl.constexpr
):
    """tile_rows; with SINKS ≥ 0 those of a prefill over a ring: the sinks, then the tokens from `oldest` on."""
    if SINKS >= 0:
        return tl.where(s < SINKS, s, SINKS + tl.maximum(s - oldest, 0)).to(tl.int64)
    else:
        return tile_rows(table_ptr, pages, s0, s, n, BN, PAGE, 0, 0, SIZE)


@triton.jit
def of_cache(table_ptr, row, inside):
    """Which of the keys `inside` have a row; all, where there are no pages."""
    if table_ptr is None:
        return inside
    else:
        return inside & (row >= 0)


@triton.jit
def begin_early(EARLY: tl.constexpr):
    """The begin of a kernel launched while the one before it may still run (programmatic dependent launch, if EARLY).

    Nothing that the one before writes is read before it has ended, and so all before it. EARLY = 1: the next kernel's
    programs may then take the places that this one leaves free; 2: they begin once all of this one's have ended.
    """
    if EARLY > 0:
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]
    if EARLY == 1:
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def past_of(past_ptr, EARLY: tl.constexpr, KEPT: tl.constexpr):
    """Tokens before a step's, after begin_early; if EARLY = 1 and KEPT before it, from lengths that neither the step's
    first kernel nor this one writes. The one before has begun by then, so all before that have ended."""
    if EARLY == 1 and KEPT:
        past = tl.load(past_ptr)
        begin_early(EARLY)
    else:
        begin_early(EARLY)
        past = tl.load(past_ptr)
    return past


@triton.jit
def nth_largest(bits, COUNT: tl.constexpr):
    """A number that just the COUNT largest of `bits` (int32, −1 for none) reach; where others equal the last of them,
    its own number. 0 where fewer than COUNT are not negative.

    Bit by bit from the 30th down: a sum of 32 bits in a warp is one instruction. Ends with the first that COUNT reach.
    """
    least = 0
    reached = -1
    shift = 30
    while (shift >= 0) & (reached != COUNT):
        above = tl.sum((bits >= least + (1 << shift)).to(tl.int32))
        least += tl.where(above >= COUNT, 1 << shift, 0)
        reached = tl.where(above >= COUNT, above, reached)
        shift -= 1
    return least


@triton.jit
def store_best(bits, number, blocks_ptr, bits_ptr, COUNT: tl.constexpr, WIDTH: tl.constexpr, RANKED: tl.constexpr):
    """Numbers of the COUNT largest of `bits` (int32, −1 for none), of equal ones the first; −1 for those missing, last.

    In the order of their size where bits are RANKED at most, else as they come. bits_ptr: where those bits go, too, if
    not None. WIDTH: a power of two, COUNT or more.
    """
    if bits.shape[0] <= RANKED:  # each is compared with every other: two steps across the program, two a bit else
        place = tl.arange(0, bits.shape[0])
        mine, other = bits[None, :], bits[:, None]
        ahead = (other > mine) | ((other == mine) & (place[:, None] < place[None, :]))
        slot = tl.sum(ahead.to(tl.int32), 0)
        chosen = slot < COUNT
        number = tl.where(bits >= 0, number, -1)
        found = bits.shape[0]
    else:
        chosen, slot, found = reached(bits, COUNT)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(blocks_ptr + slot, number, mask=chosen)
    if bits_ptr is not None:
        tl.store(bits_ptr + slot, bits, mask=chosen)
    if bits.shape[0] > RANKED or bits.shape[0] < COUNT:
        store_missing(blocks_ptr, found, COUNT, WIDTH)
        if bits_ptr is not None:
            store_missing(bits_ptr, found, COUNT, WIDTH)


@triton.jit
def store_missing(ptr, found, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """−1 in the slots from `found` on, of COUNT."""
    slot = tl.arange(0, WIDTH)
    tl.store(ptr + slot, tl.full([WIDTH], -1, dtype=tl.int32), mask=(slot >= found) & (slot < COUNT))


@triton.jit
def reached(bits, COUNT: tl.constexpr):
    """Which of `bits` (int32, −1 for none) reach the COUNT-th largest, COUNT at most; the place of each among them, in
    their order; how many there are. Of equal ones the first."""
    least = nth_largest(bits, COUNT)
    both = (bits > least).to(tl.int64) + ((bits == least).to(tl.int64) << 32)
    total = tl.sum(both)
    above = (total & 0xFFFFFFFF).to(tl.int32)
    room = COUNT - above  # for those that are equal to the last one chosen
    upto = tl.cumsum(both, 0)  # of both kinds, up to and with this one
    ahead = (upto & 0xFFFFFFFF).to(tl.int32)
    equal = (upto >> 32).to(tl.int32)
    chosen = (bits > least) | ((bits == least) & (equal <= room))
    return chosen, ahead + tl.minimum(equal, room) - 1, above + tl.minimum((total >> 32).to(tl.int32), room)


@triton.jit
def load(ptr, mask, GUARD: tl.constexpr):
    """tl.load, with the mask (else 0) only if GUARD: a tile proved to lie inside needs none."""
    if GUARD:
        return tl.load(ptr, mask=mask, other=0.0)
    else:
        return tl.load(ptr)


@triton.jit
def add_to(ptr, value, mask, ACCUMULATE: tl.constexpr):
    """Store value [rows, columns], added in float32 to what is there if ACCUMULATE."""
    if ACCUMULATE:
        value += tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def spoil(x, lost):
    """NaN in place of x where `lost` (a scalar, or None) says so."""
    if lost is None:
        return x
    else:
        return tl.where(lost, tl.full(x.shape, float("nan"), x.dtype), x)


@triton.jit
def scaled(x, scales_ptr, row, inside, HEADS: tl.constexpr):
    """x, [rows, keys] or a number, times the scale of each key; x itself where there are none."""
    if scales_ptr is None:
        return x
    else:
        return x * tl.load(scales_ptr + row * HEADS, mask=inside, other=0.0)[None, :]


@triton.jit
def weights(p, scales_ptr, row, inside, HEADS: tl.constexpr):
    """p [rows, keys] times the scale of each key's values, and the unit it is in: of the tile's greatest scale 2⁻¹⁵, so
    that in float16, too, a weight beside a far greater one, or a small scale, is not 0. p and 1 without scales."""
    if scales_ptr is None:
        return p, 1.0
    else:
        scale = tl.load(scales_ptr + row * HEADS, mask=inside, other=0.0)
        most = tl.max(scale, 0)
        unit = tl.where(most > 0, most, 1.0) / 32768.0
        return p * (scale / unit)[None, :], unit


@triton.jit
def weighted(acc, p, v, scales_ptr, unit, PRECISION: tl.constexpr):
    """acc + unit·p·v; scales_ptr None: the unit is 1."""
    if scales_ptr is None:
        return tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    else:
        return acc + unit * tl.dot(p.to(v.dtype), v, input_precision=PRECISION)


@triton.jit
def operand(x, scales_ptr):
    """x for a product with rows that may have scales: e4m3 becomes float16 in one instruction, bfloat16 in a dozen.

    So x in bfloat16 must lie within ±65504 there.
    """
    if scales_ptr is None or x.dtype != tl.bfloat16:
        return x
    else:
        return x.to(tl.float16)


@triton.jit
def put_rows(store, scales_ptr, row, there, x, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """x [rows, WIDTH] to store [rows, WIDTH] of pointers: as it is, or e4m3 with a scale a row."""
    mask = there[:, None] & (tl.arange(0, WIDTH)[None, :] < DIM)
    if scales_ptr is None:
        tl.store(store, x.to(store.dtype.element_ty), mask=mask)
    else:
        x = x.to(tl.float32)
        sums = tl.sum(x, 1)
        scale = tl.where(sums == sums, tl.max(tl.abs(x), 1) / 448.0, sums)  # a NaN is the whole row's
        tl.store(scales_ptr + row * HEADS, scale, mask=there)
        x = x / tl.where(scale == 0, 1.0, scale)[:, None]
        tl.store(store, x.to(store.dtype.element_ty), mask=mask)


@triton.jit
def append_rows(
    new, new_st, store, store_st, scales_ptr, HEADS: tl.constexpr, table_ptr, pages, past, total, lost,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, PAGE: tl.constexpr, SINKS: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """Tokens past … total − 1 of a sequence and KV head, row i of `new` the i-th, to their rows of the store."""
    i = tl.arange(0, TOKENS)
    d = tl.arange(0, WIDTH)[None, :]
    row = token_row(table_ptr, pages, past + i, past + i < total, PAGE, SINKS, RING)
    there = of_cache(table_ptr, row, past + i < total)
    x = tl.load(new + i[:, None] * new_st + d, mask=there[:, None] & (d < DIM), other=0.0)
    put_rows(store + row[:, None] * store_st + d, scales_ptr, row, there, spoil(x, lost), HEADS, DIM, WIDTH)


@triton.jit
def known_rows(
    new, new_st, store, store_st, scales_ptr, HEADS: tl.constexpr, table_ptr, row, s, inside, past, lost,
    DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Tokens s of a sequence and KV head, [rows, WIDTH]: old ones from their `row` of the store, from token `past` on
    from `new`."""
    d = tl.arange(0, WIDTH)[None, :]
    old = of_cache(table_ptr, row, inside & (s < past))
    x = tl.load(store + row[:, None] * store_st + d, mask=old[:, None] & (d < DIM), other=0.0)
    if scales_ptr is not None:
        scale = tl.load(scales_ptr + row * HEADS, mask=old, other=0.0)
        x = (x.to(tl.float32) * scale[:, None]).to(new.dtype.element_ty)
    late = (inside & (s >= past))[:, None] & (d < DIM)
    fresh = tl.load(new + (s - past)[:, None] * new_st + d, mask=late, other=0.0)
    return tl.where(late, spoil(fresh, lost), x)


@triton.jit
def plain_rows(
    new, new_st, store, store_st, table_ptr, row, s, inside, past, DIM: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """known_rows of a store without scales, none spoilt, in one load: for a kernel that has no registers for two."""
    d = tl.arange(0, WIDTH)[None, :]
    late = inside & (s >= past)
    there = late | of_cache(table_ptr, row, inside & (s < past))
    at = tl.where(late[:, None], new + (s - past)[:, None] * new_st, store + row[:, None] * store_st)
    return tl.load(at + d, mask=there[:, None] & (d < DIM), other=0.0)


@triton.jit
def open_block(past, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """The first block, one every STRIDE tokens, that had not ended with the token before `past`."""
    return tl.maximum(past - (BLOCK - STRIDE), 0) // STRIDE


@triton.jit
def mean_of_block(
    new, new_st, store, store_st, scales_ptr, HEADS: tl.constexpr, out, out_scales_ptr, table_ptr, pages, start, past,
    lost, BLOCK: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    SINKS: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """The mean of tokens start … start + BLOCK − 1, in float32, to out [DIM]; ROWS are loaded at once."""
    sums = tl.zeros([WIDTH], dtype=tl.float32)
    for first in range(0, BLOCK, ROWS):
        s = start + first + tl.arange(0, ROWS)
        inside = s < start + BLOCK
        row = block_rows(table_ptr, pages, start, s, inside & (s < past), BLOCK, PAGE, SINKS, RING)
        x = known_rows(
            new, new_st, store, store_st, scales_ptr, HEADS, table_ptr, row, s, inside, past, lost, DIM, WIDTH
        )
        sums += tl.sum(x.to(tl.float32), 0)
    d = tl.arange(0, WIDTH)[None, :]
    one = tl.zeros([1], dtype=tl.int32)
    put_rows(out + d, out_scales_ptr, one, one == 0, (sums / BLOCK)[None, :], HEADS, DIM, WIDTH)


@triton.jit
def copy_block(
    new, new_st, store, store_st, scales_ptr, HEADS: tl.constexpr, out, out_st, table_ptr, pages, start, past, total,
    lost, BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, SINKS: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """Tokens start … start + BLOCK − 1 to out [BLOCK, DIM]; zeros for those past the end."""
    d = tl.arange(0, WIDTH)[None, :]
    for first in range(0, BLOCK, 16):
        i = first + tl.arange(0, 16)
        inside = (i < BLOCK) & (start + i < total)
        s = start + i
        row = token_row(table_ptr, pages, s, inside & (s < past), PAGE, SINKS, RING)
        x = known_rows(
            new, new_st, store, store_st, scales_ptr, HEADS, table_ptr, row, s, inside, past, lost, DIM, WIDTH
        )
        tl.store(out + i[:, None] * out_st + d, x, mask=(i < BLOCK)[:, None] & (d < DIM))

"""topk_mask in Triton: exactly k of a list of tensors, as if concatenated, by radix selection on ordered integer keys.

Keys: |score| or score as an ordered integer (-0 equals +0), negated for `largest`: the k smallest keys are taken.

    range   smallest and largest key, number alive                                                one read
    count   histogram of the next 8 bits of key - floor, among keys that share the bits so far    one read per digit
    pick    the digit in which the k-th key lies; floor rises, what lies below it is taken
    select  keys below the floor, and of those equal to it the first by position                  one read

The first digit starts at the top bit of (largest - smallest), not at a fixed one: scores at 1 +- 1e-5 need one digit.
Tensors are cut into chunks; each has its own histogram row, summed over chunks in order, so the last counted row also
says how many equal keys each chunk holds, and a prefix sum over chunks breaks ties by position. The state stays on the
device; digits that are not needed return at once, so the number of launches depends on the dtype and on the list's
length alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from acefast.ops.triton import on_device

# Elements read at once by a program, 16 per thread: with less than a full layout tl.histogram would count some twice.
BLOCK = 2048
MAX_CHUNKS = 2048  # a chunk has as many blocks as keep their number below this (one more per tensor)
DIGIT = tl.constexpr(8)
BINS = tl.constexpr(256)
NAN_SCORE = tl.constexpr(1)  # bits of the status, as in reference.py
BAD_K = tl.constexpr(2)
FIELDS = tl.constexpr(5)  # of a tensor's table entry: addresses of scores, alive, keep; number of elements; first chunk
STATE = tl.constexpr(4)  # floor, bits below the digits found so far, how many to take from the floor on, unused
LAUNCH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}

# The integers that scores are read as, and the bits of infinity.
WORDS = {
    torch.float16: (torch.int16, tl.int16, 0x7C00),
    torch.bfloat16: (torch.int16, tl.int16, 0x7F80),
    torch.float32: (torch.int32, tl.int32, 0x7F800000),
    torch.float64: (torch.int64, tl.int64, 0x7FF0000000000000),
}


@triton.jit(do_not_specialize=["index", "size", "first_chunk", "num_chunks"])
def topk_table_kernel(table, tensor_of, scores, alive, keep, index, size, first_chunk, num_chunks, BLOCK: tl.constexpr):
    """The table entry of one tensor, and its index for each of its chunks."""
    entry = table + index * FIELDS
    if tl.program_id(0) == 0:
        tl.store(entry, scores.to(tl.int64))
        if alive is not None:
            tl.store(entry + 1, alive.to(tl.int64))
        tl.store(entry + 2, keep.to(tl.int64))
        tl.store(entry + 3, size)
        tl.store(entry + 4, first_chunk)
    chunk = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(tensor_of + first_chunk + chunk, index, mask=chunk < num_chunks)


@triton.jit
def open_chunk(table, tensor_of, blocks, BLOCK: tl.constexpr):
    """(chunk, table entry of its tensor, first element, number of elements)"""
    chunk = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(tensor_of + chunk).to(tl.int64) * FIELDS
    start = (chunk - tl.load(entry + 4)) * blocks * BLOCK
    size = tl.minimum(tl.load(entry + 3) - start, blocks * BLOCK)
    return chunk, entry, start, size


@triton.jit
def field(entry, i: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in field i as a pointer to TYPE."""
    pointer = tl.load(entry + i).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_keys(scores, alive, at, m_at, LARGEST: tl.constexpr, MAGNITUDE: tl.constexpr):
    """(key, alive) of the elements `at`; m_at None where all exist. Keys of 16 and 32 bits are int32. NaN has the keys
    above INF and below -INF."""
    b_bits = tl.load(scores + at, mask=m_at, other=None if m_at is None else 0)
    WORD: tl.constexpr = b_bits.dtype.primitive_bitwidth
    if WORD == 16:
        b_bits = b_bits.to(tl.int32)
    b_key = b_bits & ((1 << (WORD - 1)) - 1)
    if not MAGNITUDE:
        b_key = tl.where(b_bits < 0, -b_key, b_key)
    if LARGEST:
        b_key = -b_key
    b_live = b_bits == b_bits
    if m_at is not None:
        b_live = m_at
    if alive is not None:
        b_live = b_live & (tl.load(alive + at, mask=m_at, other=None if m_at is None else 0) != 0)
    return b_key, b_live


@triton.jit
def load_block(scores, alive, at, end, BLOCK: tl.constexpr, LARGEST: tl.constexpr, MAGNITUDE: tl.constexpr):
    """load_keys of elements at..at+BLOCK-1 below `end`; only the last block of a tensor pays for a mask."""
    b_at = at + tl.arange(0, BLOCK)
    if at + BLOCK <= end:
        b_key, b_live = load_keys(scores, alive, b_at, None, LARGEST, MAGNITUDE)
    else:
        b_key, b_live = load_keys(scores, alive, b_at, b_at < end, LARGEST, MAGNITUDE)
    return b_key, b_live


@triton.jit(do_not_specialize=["blocks"])
def topk_range_kernel(
    table, tensor_of, chunk_range, chunk_count, blocks,
    WORD: tl.constexpr, LARGEST: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_ALIVE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one chunk: smallest and largest alive key, number alive."""
    chunk, entry, start, size = open_chunk(table, tensor_of, blocks, BLOCK)
    scores = field(entry, 0, WORD, ALIGNED)
    alive = field(entry, 1, tl.int8, ALIGNED) if HAS_ALIVE else None
    KEY: tl.constexpr = tl.int64 if WORD == tl.int64 else tl.int32
    LIMIT: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WORD == tl.int64 else 0x7FFFFFFF
    b_low = tl.full((BLOCK,), LIMIT, KEY)
    b_high = tl.full((BLOCK,), -LIMIT, KEY)
    b_count = tl.zeros((BLOCK,), tl.int32)
    for at in range(start, start + size, BLOCK):
        b_key, b_live = load_block(scores, alive, at, start + size, BLOCK, LARGEST, MAGNITUDE)
        b_low = tl.minimum(b_low, tl.where(b_live, b_key, LIMIT))
        b_high = tl.maximum(b_high, tl.where(b_live, b_key, -LIMIT))
        b_count += b_live.to(tl.int32)
    tl.store(chunk_range + 2 * chunk, tl.min(b_low, axis=0).to(tl.int64))
    tl.store(chunk_range + 2 * chunk + 1, tl.max(b_high, axis=0).to(tl.int64))
    tl.store(chunk_count + chunk, tl.sum(b_count, axis=0))


@triton.jit(do_not_specialize=["num_chunks", "k"])
def topk_start_kernel(
    chunk_range, chunk_count, ties, state, status, num_chunks, k, INF: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: the status, the first state, and ties [chunks]: keys equal to the floor up to and with each chunk,
    which is the number alive for as long as no digit was needed."""
    b_low = tl.full((BLOCK,), 0x7FFFFFFFFFFFFFFF, tl.int64)
    b_high = -b_low
    total = tl.full((), 0, tl.int64)
    for first in range(0, num_chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        m_chunk = chunk < num_chunks
        b_low = tl.minimum(b_low, tl.load(chunk_range + 2 * chunk, mask=m_chunk, other=0x7FFFFFFFFFFFFFFF))
        b_high = tl.maximum(b_high, tl.load(chunk_range + 2 * chunk + 1, mask=m_chunk, other=-0x7FFFFFFFFFFFFFFF))
        b_count = tl.load(chunk_count + chunk, mask=m_chunk, other=0).to(tl.int64)
        tl.store(ties + chunk, total + tl.cumsum(b_count, axis=0), mask=m_chunk)
        total += tl.sum(b_count, axis=0)
    low = tl.min(b_low, axis=0)
    high = tl.max(b_high, axis=0)
    span = (high - low).to(tl.uint64, bitcast=True)
    bits = tl.sum(((span >> tl.arange(0, 64).to(tl.uint64)) != 0).to(tl.int64), axis=0)
    bad = tl.where((low < -INF) | (high > INF), NAN_SCORE, 0) + tl.where((k < 0) | (k > total), BAD_K, 0)
    tl.store(status, bad)
    tl.store(state, low)
    tl.store(state + 1, tl.where((bad == 0) & (total > 0), bits, 0))
    tl.store(state + 2, k)


@triton.jit
def next_digit(state):
    """(floor, bits left before this digit, bits left after it)"""
    bits = tl.load(state + 1)
    return tl.load(state), bits, tl.maximum(bits - DIGIT, 0)


@triton.jit(do_not_specialize=["blocks"])
def topk_count_kernel(
    table, tensor_of, state, rows, blocks,
    WORD: tl.constexpr, LARGEST: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_ALIVE: tl.constexpr,
    ALIGNED: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rows[chunk] [256]: the next digit's histogram over the keys with floor <= key < floor + 2^bits."""
    floor, bits, after = next_digit(state)
    if bits > 0:
        chunk, entry, start, size = open_chunk(table, tensor_of, blocks, BLOCK)
        scores = field(entry, 0, WORD, ALIGNED)
        alive = field(entry, 1, tl.int8, ALIGNED) if HAS_ALIVE else None
        KEY: tl.constexpr = tl.int64 if WORD == tl.int64 else tl.int32
        OFFSET: tl.constexpr = tl.uint64 if WORD == tl.int64 else tl.uint32
        b_row = tl.zeros((BINS,), tl.int32)
        for at in range(start, start + size, BLOCK):
            b_key, b_live = load_block(scores, alive, at, start + size, BLOCK, LARGEST, MAGNITUDE)
            b_offset = (b_key - floor.to(KEY)).to(OFFSET, bitcast=True)  # wraps below the floor, above every candidate
            b_digit = (b_offset >> after.to(OFFSET)).to(tl.int32)
            if FIRST:
                b_row += tl.histogram(b_digit, BINS, mask=b_live)
            else:
                b_live = b_live & ((b_offset >> bits.to(OFFSET)) == 0)
                if tl.max(b_live.to(tl.int32), axis=0) > 0:
                    b_row += tl.histogram(b_digit, BINS, mask=b_live)
        tl.store(rows + chunk * BINS + tl.arange(0, BINS), b_row)


@triton.jit(do_not_specialize=["num_chunks"])
def topk_total_kernel(state, rows, totals, num_chunks, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr):
    """totals [256]: the rows summed over chunks."""
    if tl.load(state + 1) > 0:
        digit = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        b_total = tl.zeros((BLOCK_B,), tl.int64)
        for first in range(0, num_chunks, BLOCK_C):
            chunk = first + tl.arange(0, BLOCK_C).to(tl.int64)
            b_rows = tl.load(rows + chunk[:, None] * BINS + digit[None, :], mask=(chunk < num_chunks)[:, None], other=0)
            b_total += tl.sum(b_rows.to(tl.int64), axis=0)
        tl.store(totals + digit, b_total)


@triton.jit(do_not_specialize=["num_chunks"])
def topk_pick_kernel(state, rows, totals, ties, num_chunks, BLOCK: tl.constexpr):
    """One program: the next state, and ties of the digit that holds the k-th key."""
    floor, bits, after = next_digit(state)
    need = tl.load(state + 2)
    if bits > 0:
        b_upto = tl.cumsum(tl.load(totals + tl.arange(0, BINS)), axis=0)
        b_below = b_upto < need
        digit = tl.minimum(tl.sum(b_below.to(tl.int64), axis=0), BINS - 1)
        need -= tl.max(tl.where(b_below, b_upto, 0), axis=0)
        floor += digit << after
        total = tl.full((), 0, tl.int64)
        for first in range(0, num_chunks, BLOCK):
            chunk = first + tl.arange(0, BLOCK).to(tl.int64)
            m_chunk = chunk < num_chunks
            b_count = tl.load(rows + chunk * BINS + digit, mask=m_chunk, other=0).to(tl.int64)
            tl.store(ties + chunk, total + tl.cumsum(b_count, axis=0), mask=m_chunk)
            total += tl.sum(b_count, axis=0)
    tl.store(state + STATE, floor)
    tl.store(state + STATE + 1, after)
    tl.store(state + STATE + 2, need)


@triton.jit(do_not_specialize=["blocks"])
def topk_select_kernel(
    table, tensor_of, state, ties, status, blocks,
    WORD: tl.constexpr, LARGEST: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_ALIVE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """keep of one chunk: keys below the floor, and the first `room` of those equal to it."""
    chunk, entry, start, size = open_chunk(table, tensor_of, blocks, BLOCK)
    scores = field(entry, 0, WORD, ALIGNED)
    alive = field(entry, 1, tl.int8, ALIGNED) if HAS_ALIVE else None
    keep = field(entry, 2, tl.int8, ALIGNED)
    KEY: tl.constexpr = tl.int64 if WORD == tl.int64 else tl.int32
    floor = tl.load(state).to(KEY)
    before = tl.load(ties + chunk - 1, mask=chunk > 0, other=0)
    room = tl.load(state + 2) - before
    equal = tl.load(ties + chunk) - before
    ok = tl.load(status) == 0
    seen = tl.full((), 0, tl.int64)
    for at in range(start, start + size, BLOCK):
        b_key, b_live = load_block(scores, alive, at, start + size, BLOCK, LARGEST, MAGNITUDE)
        b_tie = b_live & (b_key == floor)
        b_keep = b_live & (b_key < floor)
        if (room > 0) & (room < equal):
            b_one = b_tie.to(tl.int32)
            b_keep = b_keep | (b_tie & (seen + tl.cumsum(b_one, axis=0) <= room))
            seen += tl.sum(b_one, axis=0)
        else:
            b_keep = b_keep | (b_tie & (room >= equal))
        b_keep = (b_keep & ok).to(tl.int8)
        b_at = at + tl.arange(0, BLOCK)
        if at + BLOCK <= start + size:
            tl.store(keep + b_at, b_keep)
        else:
            tl.store(keep + b_at, b_keep, mask=b_at < start + size)


def topk_mask(scores, k, alive, largest, magnitude) -> tuple[list[Tensor], Tensor]:
    """(keep: bool tensors like scores, status int32 [1]); the schema `acefast::topk_mask`.

    Exactly k True over all scores, the largest (or smallest) of |score| or score among those alive, lowest index first
    among equals. Status bit 0: NaN among the alive scores, bit 1: k out of [0, number alive]; then every keep is False.
    """
    keep = [torch.empty_like(s, dtype=torch.bool) for s in scores]
    return keep, topk_mask_out(scores, k, alive, largest, magnitude, keep)


def topk_mask_out(scores, k, alive, largest, magnitude, out) -> Tensor:
    """topk_mask written into the bool tensors `out`; returns the status. The schema `acefast::topk_mask_out`."""
    device = scores[0].device
    status = torch.zeros(1, dtype=torch.int32, device=device)
    full = [i for i, s in enumerate(scores) if s.numel()]
    if not full:
        return status.fill_(0 if k == 0 else BAD_K.value)
    integer, word, infinity = WORDS[scores[0].dtype]
    elements = sum(scores[i].numel() for i in full)
    blocks = triton.next_power_of_2(triton.cdiv(elements, BLOCK * MAX_CHUNKS))
    chunks = [triton.cdiv(scores[i].numel(), BLOCK * blocks) for i in full]
    num_chunks, digits = sum(chunks), integer.itemsize * 8 // DIGIT.value

    def scratch(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device=device)

    table, tensor_of = scratch(len(full), FIELDS.value), scratch(num_chunks, dtype=torch.int32)
    chunk_range, chunk_count, ties = scratch(num_chunks, 2), scratch(num_chunks, dtype=torch.int32), scratch(num_chunks)
    rows, totals = scratch(num_chunks, BINS.value, dtype=torch.int32), scratch(BINS.value)
    state = scratch(digits + 1, STATE.value)
    views = [
        (scores[i].view(integer), alive[i].view(torch.int8) if alive else None, out[i].view(torch.int8)) for i in full
    ]
    options = {
        "WORD": word, "LARGEST": largest, "MAGNITUDE": magnitude, "HAS_ALIVE": alive is not None,
        "ALIGNED": all(v is None or v.data_ptr() % 16 == 0 for entry in views for v in entry), "BLOCK": BLOCK, **LAUNCH,
    }  # fmt: skip
    with on_device(status):
        first = 0
        for index, ((score, living, keep), count) in enumerate(zip(views, chunks, strict=True)):
            topk_table_kernel[(triton.cdiv(count, BLOCK),)](
                table, tensor_of, score, living, keep, index, score.numel(), first, count, BLOCK=BLOCK, **LAUNCH
            )
            first += count
        topk_range_kernel[(num_chunks,)](table, tensor_of, chunk_range, chunk_count, blocks, **options)
        topk_start_kernel[(1,)](
            chunk_range, chunk_count, ties, state, status, num_chunks, k, INF=infinity, BLOCK=BLOCK, **LAUNCH
        )
        for digit in range(digits):
            topk_count_kernel[(num_chunks,)](table, tensor_of, state[digit], rows, blocks, FIRST=digit == 0, **options)
            topk_total_kernel[(BINS.value // 8,)](
                state[digit], rows, totals, num_chunks, BLOCK_C=256, BLOCK_B=8, **LAUNCH
            )
            topk_pick_kernel[(1,)](state[digit], rows, totals, ties, num_chunks, BLOCK=BLOCK, **LAUNCH)
        topk_select_kernel[(num_chunks,)](table, tensor_of, state[digits], ties, status, blocks, **options)
    return status

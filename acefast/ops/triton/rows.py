"""What the kernels over the rows of a CSR or CSC share: how rows are cut into pieces of work and how sums are joined.

A row of at most `piece` edges is one program. The edge array is also cut into windows of `piece` slots; a longer row
(a hub) is summed window by window into `partial`, and a second kernel adds its windows in order. At most two hubs meet
a window, one that began before it and one that begins in it, so window w owns the slots 2w and 2w+1 of `partial`: no
table is built, nothing is counted on the host and no atomic is used. Where the cuts lie depends on the number of slots,
on N and on rowptr alone, so results repeat bit for bit.

Features are [N, H, F] with H = 1 where there are no heads; a tile is [BLOCK_E, BLOCK_H, BLOCK_F].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_PIECE = 512  # edges; rows up to this length are never cut,
PIECE_MEANS = 4  # nor rows up to this many mean rows: `partial` has at most 2 N / PIECE_MEANS rows
MAX_ROWS = 2**30  # rows of one launch; CUDA's grid ends at 2^31 - 1
SEARCH_WAYS = 128  # offsets compared at once by the search for a slot's row
JOIN_PIECES = 32  # partial sums that a join adds per step
SIZES = ["num_rows", "num_edges", "first_row", "piece", "windows", "steps", "stride"]  # no recompilation for these
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LAUNCH = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit
def find_row(offsets, num_rows, slot, steps, stride, WAYS: tl.constexpr):
    """The row r with offsets[r] <= slot < offsets[r + 1]; stride = WAYS^(steps - 1), and WAYS^steps > num_rows."""
    way = tl.arange(0, WAYS).to(tl.int64)
    row = tl.full((), 0, tl.int64)
    for _ in range(steps):
        at = row + way * stride
        o_at = tl.load(offsets + at, mask=at <= num_rows, other=slot + 1)  # [WAYS]
        row += (tl.sum((o_at <= slot).to(tl.int64), axis=0) - 1) * stride
        stride = stride // WAYS
    return row


@triton.jit
def assign_work(offsets, owner, num_rows, num_edges, first_row, piece, windows, steps, stride,
                HUBS: tl.constexpr, WAYS: tl.constexpr):  # fmt: skip
    """(row, begin, end, slot, leads): this program sums edge slots begin..end-1 of `row`, into partial[slot] if
    slot >= 0 and else into the row itself; leads: the row begins here; row = -1 where there is nothing to do. The first
    2 * windows programs take the windows."""
    pid = tl.program_id(0).to(tl.int64)
    row = first_row + pid - 2 * windows
    slot = tl.full((), -1, tl.int64)
    leads = slot < 0
    if HUBS and pid < 2 * windows:
        low = (pid // 2) * piece
        high = tl.minimum(low + piece, num_edges)
        starts_inside = pid % 2
        row = find_row(offsets, num_rows, tl.where(starts_inside == 1, high - 1, low), steps, stride, WAYS)
        row_begin = tl.load(offsets + row)
        row_end = tl.load(offsets + row + 1)
        mine = (row_end - row_begin > piece) & ((row_begin > low) == (starts_inside == 1))
        leads = mine & (row_begin >= low)
        tl.store(owner + pid, tl.where(leads, row, -1))
        begin = tl.maximum(row_begin, low)
        end = tl.minimum(row_end, high)
        row = tl.where(mine, row, -1)
        slot = pid
    else:
        begin = tl.load(offsets + row)
        end = tl.load(offsets + row + 1)
        if HUBS:
            row = tl.where(end - begin > piece, -1, row)
    return row, begin, end, slot, leads


@triton.jit
def edge_block(ends, ids, keep, e, end, BLOCK_E: tl.constexpr):
    """(node at the other end, edge id, is below `end`, exists) of the slots e .. e + BLOCK_E - 1; [BLOCK_E]"""
    at = (e + tl.arange(0, BLOCK_E)).to(tl.int64)
    m_e = at < end
    other = tl.load(ends + at, mask=m_e, other=0).to(tl.int64)
    if ids is not None:
        at = tl.load(ids + at, mask=m_e, other=0).to(tl.int64)
    m_kept = m_e
    if keep is not None:
        m_kept = m_e & (tl.load(keep + at, mask=m_e, other=0) != 0)
    return other, at, m_e, m_kept


@triton.jit
def flat_columns(h, m_h, first_f, num_feats, BLOCK_F: tl.constexpr):
    """(columns of heads h and features first_f .. first_f + BLOCK_F - 1, which exist); [BLOCK_H, BLOCK_F]"""
    f = first_f + tl.arange(0, BLOCK_F)
    return h[:, None] * num_feats + f[None, :], m_h[:, None] & (f < num_feats)[None, :]


@triton.jit
def column_block(block, heads, num_feats, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr):
    """(first head, first feature within the heads, heads [BLOCK_H], which exist, flat columns [BLOCK_H, BLOCK_F], which
    exist)"""
    f_blocks = tl.cdiv(num_feats, BLOCK_F)
    first_h = block // f_blocks * BLOCK_H
    first_f = block % f_blocks * BLOCK_F
    h = first_h + tl.arange(0, BLOCK_H)
    m_h = h < heads
    c, m_c = flat_columns(h, m_h, first_f, num_feats, BLOCK_F)
    return first_h, first_f, h, m_h, c, m_c


@triton.jit
def load_features(x, node, columns, c, m_node, m_c):
    """x of nodes [BLOCK_E] in the flat columns c [BLOCK_H, BLOCK_F]; 0 where the masks are false"""
    at = node[:, None, None] * columns + c[None, :, :]
    return tl.load(x + at, mask=m_node[:, None, None] & m_c[None, :, :], other=0.0)


@triton.jit
def store_row(row, c, m_c, b_sum, row_scale, self_weight, own, out, columns, ACC: tl.constexpr):
    """out_row = row_scale_row * sum + self_weight_row * own_row, in the flat columns c"""
    if row_scale is not None:
        b_sum *= tl.load(row_scale + row)
    if self_weight is not None:
        b_own = tl.load(own + row * columns + c, mask=m_c, other=0.0)
        b_sum += tl.load(self_weight + row) * b_own.to(ACC)
    tl.store(out + row * columns + c, b_sum.to(out.dtype.element_ty), mask=m_c)


@triton.jit
def raise_top(b_top, b_new):
    """(maximum of both, that maximum or 0 for -inf, 2^-(its rise): the factor of sums taken under the old one)"""
    b_max = tl.maximum(b_top, b_new)
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    return b_max, b_shift, tl.exp2(b_top - b_shift)


@triton.jit
def hub_windows(offsets, row, piece):
    """(first window, last window, 1 where the row begins inside the first) of a hub"""
    begin = tl.load(offsets + row)
    first = begin // piece
    return first, (tl.load(offsets + row + 1) - 1) // piece, (begin > first * piece).to(tl.int64)


@triton.jit
def piece_slots(w, first, last, inside, BLOCK_P: tl.constexpr):
    """(slots of `partial` of a hub's windows w .. w + BLOCK_P - 1, which of them it has)"""
    window = w + tl.arange(0, BLOCK_P)
    return 2 * window + tl.where(window == first, inside, 0), window <= last


@triton.jit(do_not_specialize=["piece"])
def join_kernel(
    offsets, owner, partial, row_scale, self_weight, own, out, columns, piece,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of the hub that begins in this window, first window first."""
    row = tl.load(owner + tl.program_id(0))
    if row >= 0:
        first, last, inside = hub_windows(offsets, row, piece)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = c < columns
        b_sum = tl.zeros((BLOCK_C,), dtype=ACC)
        for w in range(first, last + 1, BLOCK_P):
            slot, m_p = piece_slots(w, first, last, inside, BLOCK_P)
            b_p = tl.load(partial + slot[:, None] * columns + c[None, :], mask=m_p[:, None] & m_c[None, :], other=0.0)
            b_sum += tl.sum(b_p, axis=0)
        store_row(row, c, m_c, b_sum, row_scale, self_weight, own, out, columns, ACC)


def accumulator(dtype: torch.dtype):
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def count_edges(num_slots: int, *per_edge: Tensor | None) -> int:
    """E: the length of the per-edge tensors, the number of slots where there is none."""
    return next((t.size(0) for t in per_edge if t is not None), num_slots)


def new_per_edge(edges: int, num_slots: int, *shape: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[edges, ...] for kernels that write every slot; edges that no slot names are 0 in it."""
    make = like.new_zeros if edges > num_slots else like.new_empty
    return make(edges, *shape, dtype=dtype)


def blocks(heads: int, num_feats: int, element_size: int, widest: int, elements: int = 1024) -> dict:
    """Tile [BLOCK_E, BLOCK_H, BLOCK_F] of one warp, as a rule 32 registers of float32 per thread."""
    f = min(triton.next_power_of_2(num_feats), widest)
    h = min(triton.next_power_of_2(heads), widest // f)
    tile = elements // 2 if element_size == 8 else elements
    return {"BLOCK_E": max(4, min(64, tile // (h * f))), "BLOCK_H": h, "BLOCK_F": f}


def column_blocks(heads: int, num_feats: int, tile: dict) -> tuple[int, int]:
    """(blocks of heads, blocks of features)"""
    return triton.cdiv(heads, tile["BLOCK_H"]), triton.cdiv(num_feats, tile["BLOCK_F"])


class Cut:
    """Where the long rows of a CSR or CSC with `num_rows` rows and `num_edges` edges are cut."""

    def __init__(self, num_rows: int, num_edges: int):
        mean = triton.cdiv(num_edges, max(num_rows, 1))
        self.piece = max(MIN_PIECE, triton.next_power_of_2(PIECE_MEANS * mean))
        self.hubs = num_edges > self.piece  # no row can be longer than all edges
        self.windows = triton.cdiv(num_edges, self.piece) if self.hubs else 0
        self.ways, self.steps = SEARCH_WAYS, 1
        while SEARCH_WAYS**self.steps <= num_rows:
            self.steps += 1
        self.stride = SEARCH_WAYS ** (self.steps - 1)

    def partial(self, columns: int, like: Tensor, acc: torch.dtype) -> Tensor:
        return torch.empty(2 * self.windows, columns, dtype=acc, device=like.device)

    def owner(self, like: Tensor) -> Tensor:
        """The hub that begins in each window, which the kernels fill in."""
        return torch.empty(2 * self.windows, dtype=torch.int64, device=like.device)

    def launches(self, num_rows: int):
        """(first_row, windows, programs) of each launch; the windows go with the first."""
        for first in range(0, num_rows, MAX_ROWS):
            windows = self.windows if first == 0 else 0
            yield first, windows, 2 * windows + min(MAX_ROWS, num_rows - first)


def join(cut, offsets, owner, partial, row_scale, self_weight, own, out, acc) -> None:
    """out = row_scale * sum of the partial sums + self_weight * own, in the rows that are hubs."""
    columns = partial.size(1)
    if cut.hubs:
        width = min(triton.next_power_of_2(columns), 64)
        join_kernel[(2 * cut.windows, triton.cdiv(columns, width))](
            offsets, owner, partial, row_scale, self_weight, own, out, columns, cut.piece,
            ACC=acc, BLOCK_P=JOIN_PIECES, BLOCK_C=width, **{**LAUNCH, "num_warps": 4},
        )  # fmt: skip

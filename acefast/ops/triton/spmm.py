"""spmm and its backward in Triton.

    y_i     = row_scale_i * sum over kept e: j->i of weight_e mask_e x_j + self_weight_i x_i    (by destination, CSR)
    dx_j    = sum over kept e: j->i of row_scale_i weight_e mask_e dy_i  + self_weight_j dy_j   (by source, CSC)
    dcoef_e = row_scale_i <dy_i, x_j>,   dself_j = <dy_j, x_j>                                  (in the same visit)

A row of at most `piece` edges is one program. The edge array is also cut into windows of `piece` slots; a longer row
(a hub) is summed window by window into `partial`, and a second kernel adds its windows in order. At most two hubs meet
a window, one that began before it and one that begins in it, so window w owns the slots 2w and 2w+1 of `partial`: no
table is built, nothing is counted on the host and no atomic is used. Where the cuts lie depends on E, N and rowptr
alone, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from acefast.ops.triton import on_device

MIN_PIECE = 512  # edges; rows up to this length are never cut,
PIECE_MEANS = 4  # nor rows up to this many mean rows: `partial` has at most 2 N / PIECE_MEANS rows
MAX_ROWS = 2**30  # rows of one launch; CUDA's grid ends at 2^31 - 1
SEARCH_WAYS = 128  # offsets compared at once by the search for a slot's row
JOIN_PIECES = 32  # partial sums that a join adds per step
SIZES = ["num_rows", "num_edges", "first_row", "piece", "windows", "steps", "stride"]  # no recompilation for these
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
def load_coefficient(at, m_at, weight, mask, row_scale, node, ACC: tl.constexpr):
    """weight * mask of edges `at`, times row_scale of `node`; [BLOCK_E]"""
    b_c = m_at.to(ACC)
    if weight is not None:
        b_c *= tl.load(weight + at, mask=m_at, other=0.0)
    if mask is not None:
        b_c *= tl.load(mask + at, mask=m_at, other=0.0)
    if row_scale is not None:
        b_c *= tl.load(row_scale + node, mask=m_at, other=0.0)
    return b_c


@triton.jit(do_not_specialize=SIZES)
def spmm_fwd_kernel(
    rowptr, col, eid, x, weight, mask, keep, self_weight, row_scale, y, partial, owner,
    num_rows, num_edges, num_feats, first_row, piece, windows, steps, stride,
    ACC: tl.constexpr, HUBS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """One row or one piece of a hub, BLOCK_F columns of it."""
    row, begin, end, slot, leads = assign_work(
        rowptr, owner, num_rows, num_edges, first_row, piece, windows, steps, stride, HUBS, WAYS
    )
    if row >= 0:
        f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        m_f = f < num_feats
        b_y = tl.zeros((BLOCK_F,), dtype=ACC)
        for e in range(begin, end, BLOCK_E):
            at = e + tl.arange(0, BLOCK_E)
            m_e = at < end
            j = tl.load(col + at, mask=m_e, other=0).to(tl.int64)  # [BLOCK_E]
            if eid is not None:
                at = tl.load(eid + at, mask=m_e, other=0).to(tl.int64)
            if keep is not None:
                m_e = m_e & (tl.load(keep + at, mask=m_e, other=0) != 0)
            b_c = load_coefficient(at, m_e, weight, mask, None, row, ACC)
            b_x = tl.load(x + j[:, None] * num_feats + f[None, :], mask=m_e[:, None] & m_f[None, :], other=0.0)
            b_y += tl.sum(b_c[:, None] * b_x.to(ACC), axis=0)  # [BLOCK_F]
        if slot >= 0:
            tl.store(partial + slot * num_feats + f, b_y, mask=m_f)
        else:
            store_row(row, f, m_f, b_y, row_scale, self_weight, x, y, num_feats, ACC)


@triton.jit
def store_row(row, f, m_f, b_sum, row_scale, self_weight, own, out, num_feats, ACC: tl.constexpr):
    """out_row = row_scale_row * sum + self_weight_row * own_row"""
    if row_scale is not None:
        b_sum *= tl.load(row_scale + row)
    if self_weight is not None:
        b_own = tl.load(own + row * num_feats + f, mask=m_f, other=0.0)
        b_sum += tl.load(self_weight + row) * b_own.to(ACC)
    tl.store(out + row * num_feats + f, b_sum.to(out.dtype.element_ty), mask=m_f)


@triton.jit(do_not_specialize=["piece"])
def spmm_join_kernel(
    offsets, owner, partial, row_scale, self_weight, own, out, num_feats, piece,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of the hub that begins in this window, first window first."""
    row = tl.load(owner + tl.program_id(0))
    if row >= 0:
        begin = tl.load(offsets + row)
        end = tl.load(offsets + row + 1)
        first = begin // piece
        last = (end - 1) // piece
        f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        m_f = f < num_feats
        b_sum = tl.zeros((BLOCK_F,), dtype=ACC)
        for w in range(first, last + 1, BLOCK_P):
            window = w + tl.arange(0, BLOCK_P)
            slot = 2 * window + ((window == first) & (begin > first * piece)).to(tl.int64)
            m_p = (window <= last)[:, None] & m_f[None, :]
            b_p = tl.load(partial + slot[:, None] * num_feats + f[None, :], mask=m_p, other=0.0)  # [BLOCK_P, BLOCK_F]
            b_sum += tl.sum(b_p, axis=0)
        store_row(row, f, m_f, b_sum, row_scale, self_weight, own, out, num_feats, ACC)


@triton.jit(do_not_specialize=[*SIZES, "blocks_per_program"])
def spmm_bwd_kernel(
    colptr, row, ceid, dy, x, weight, mask, keep, self_weight, row_scale, dx, dcoef, dself, partial, owner,
    num_rows, num_edges, num_feats, blocks_per_program, first_row, piece, windows, steps, stride,
    ACC: tl.constexpr, NEED_DX: tl.constexpr, NEED_DCOEF: tl.constexpr, ALL_EDGES: tl.constexpr,
    ONE_BLOCK: tl.constexpr, HUBS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """One source node j or one piece of a hub; blocks_per_program blocks of BLOCK_F columns of it.

    With dcoef one program sees all columns: each later block adds to what this program stored for its own edges.
    """
    j, begin, end, slot, leads = assign_work(
        colptr, owner, num_rows, num_edges, first_row, piece, windows, steps, stride, HUBS, WAYS
    )
    if j >= 0:
        b_self = tl.zeros((BLOCK_F,), dtype=ACC)
        for block in range(1 if ONE_BLOCK else blocks_per_program):
            f = (tl.program_id(1) * blocks_per_program + block) * BLOCK_F + tl.arange(0, BLOCK_F)
            m_f = f < num_feats
            b_dx = tl.zeros((BLOCK_F,), dtype=ACC)
            if NEED_DCOEF:
                b_x = tl.load(x + j * num_feats + f, mask=m_f, other=0.0).to(ACC)
            for e in range(begin, end, BLOCK_E):
                at = e + tl.arange(0, BLOCK_E)
                m_e = at < end
                i = tl.load(row + at, mask=m_e, other=0).to(tl.int64)  # [BLOCK_E]
                if ceid is not None:
                    at = tl.load(ceid + at, mask=m_e, other=0).to(tl.int64)
                m_kept = m_e
                if keep is not None:
                    m_kept = m_e & (tl.load(keep + at, mask=m_e, other=0) != 0)
                if ALL_EDGES:
                    m_read = m_e
                else:
                    m_read = m_kept
                b_dy = tl.load(dy + i[:, None] * num_feats + f[None, :], mask=m_read[:, None] & m_f[None, :], other=0.0)
                b_dy = b_dy.to(ACC)  # [BLOCK_E, BLOCK_F]
                if NEED_DCOEF:
                    b_dot = tl.sum(b_dy * b_x[None, :], axis=1)  # [BLOCK_E]
                    if row_scale is not None:
                        b_dot *= tl.load(row_scale + i, mask=m_read, other=0.0)
                    if not ONE_BLOCK:
                        b_dot += tl.load(dcoef + at, mask=m_e & (block > 0), other=0.0)
                    tl.store(dcoef + at, b_dot, mask=m_e)
                if NEED_DX:
                    b_c = load_coefficient(at, m_kept, weight, mask, row_scale, i, ACC)
                    b_message = b_c[:, None] * b_dy
                    if ALL_EDGES:
                        b_message = tl.where(m_kept[:, None], b_message, 0.0)
                    b_dx += tl.sum(b_message, axis=0)  # [BLOCK_F]
            if NEED_DX:
                if slot >= 0:
                    tl.store(partial + slot * num_feats + f, b_dx, mask=m_f)
                else:
                    store_row(j, f, m_f, b_dx, None, self_weight, dy, dx, num_feats, ACC)
            if NEED_DCOEF:
                if self_weight is not None:
                    b_own = tl.load(dy + j * num_feats + f, mask=m_f, other=0.0).to(ACC)
                    b_self += b_own * b_x
                if not ONE_BLOCK:
                    tl.debug_barrier()  # the next block reads what other threads of this program stored in dcoef
        if NEED_DCOEF:
            if self_weight is not None:
                tl.store(dself + j, tl.sum(b_self, axis=0), mask=leads)


def accumulator(dtype: torch.dtype):
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def blocks(num_feats: int, element_size: int, widest: int) -> dict:
    """Tile [BLOCK_E, BLOCK_F] of one warp: about 32 registers of float32 per thread."""
    width = min(triton.next_power_of_2(num_feats), widest)
    tile = 512 if element_size == 8 else 1024
    return {"BLOCK_E": max(4, min(64, tile // width)), "BLOCK_F": width}


class Cut:
    """Where the long rows of a CSR or CSC with `num_rows` rows and `num_edges` edges are cut."""

    def __init__(self, num_rows: int, num_edges: int):
        mean = triton.cdiv(num_edges, max(num_rows, 1))
        self.piece = max(MIN_PIECE, triton.next_power_of_2(PIECE_MEANS * mean))
        self.hubs = num_edges > self.piece  # no row can be longer than all edges
        self.windows = triton.cdiv(num_edges, self.piece) if self.hubs else 0
        self.steps = 1
        while SEARCH_WAYS**self.steps <= num_rows:
            self.steps += 1
        self.stride = SEARCH_WAYS ** (self.steps - 1)

    def buffers(self, num_feats: int, like: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
        partial = torch.empty(2 * self.windows, num_feats, dtype=acc, device=like.device)
        return partial, torch.empty(2 * self.windows, dtype=torch.int64, device=like.device)

    def launches(self, num_rows: int):
        """(first_row, windows, programs) of each launch; the windows go with the first."""
        for first in range(0, num_rows, MAX_ROWS):
            windows = self.windows if first == 0 else 0
            yield first, windows, 2 * windows + min(MAX_ROWS, num_rows - first)


def _join(cut, offsets, owner, partial, row_scale, self_weight, own, out, acc):
    if cut.hubs:
        width = min(triton.next_power_of_2(out.size(1)), 64)
        spmm_join_kernel[(2 * cut.windows, triton.cdiv(out.size(1), width))](
            offsets, owner, partial, row_scale, self_weight, own, out, out.size(1), cut.piece,
            ACC=acc, BLOCK_P=JOIN_PIECES, BLOCK_F=width, **{**LAUNCH, "num_warps": 4},
        )  # fmt: skip


def spmm(rowptr, col, eid, colptr, row, ceid, x, weight, mask, keep, self_weight, row_scale, all_edges) -> Tensor:
    """y [N_dst, F] of x [N_src, F], x's dtype; the arguments of the schema `acefast::spmm`.

    weight, mask [E], self_weight [N], row_scale [N_dst] in the accumulator's dtype, keep bool [E]; all_edges concerns
    the gradients alone.
    """
    num_rows, num_feats, num_edges = rowptr.numel() - 1, x.size(1), col.numel()
    x = x.contiguous()
    y = x.new_empty(num_rows, num_feats)
    if y.numel() == 0:
        return y
    dtype, acc = accumulator(x.dtype)
    cut = Cut(num_rows, num_edges)
    partial, owner = cut.buffers(num_feats, x, dtype)
    tile = blocks(num_feats, x.element_size(), widest=256 if x.element_size() == 2 else 128)
    with on_device(x):
        for first, windows, programs in cut.launches(num_rows):
            spmm_fwd_kernel[(programs, triton.cdiv(num_feats, tile["BLOCK_F"]))](
                rowptr, col, eid, x, weight, mask, keep, self_weight, row_scale, y, partial, owner,
                num_rows, num_edges, num_feats, first, cut.piece, windows, cut.steps, cut.stride,
                ACC=acc, HUBS=cut.hubs, WAYS=SEARCH_WAYS, **tile, **LAUNCH,
            )  # fmt: skip
        _join(cut, rowptr, owner, partial, row_scale, self_weight, x, y, acc)
    return y


def spmm_bwd(
    rowptr, col, eid, colptr, row, ceid, dy, x, weight, mask, keep, self_weight, row_scale,
    need_dx, need_dcoef, all_edges,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [N_src, F], dcoef [E], dself [N]) of dy [N_dst, F]; the arguments of the schema `acefast::spmm_bwd`.

    dx has x's dtype, the others the accumulator's. What is not needed comes back with no elements.
    """
    num_rows, num_feats, num_edges = colptr.numel() - 1, x.size(1), row.numel()
    dtype, acc = accumulator(x.dtype)
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dcoef = x.new_empty(num_edges if need_dcoef else 0, dtype=dtype)
    dself = x.new_empty(num_rows if need_dcoef and self_weight is not None else 0, dtype=dtype)
    if num_feats == 0:
        return dx, dcoef.zero_(), dself.zero_()
    if num_rows == 0 or not (need_dx or need_dcoef):
        return dx, dcoef, dself
    cut = Cut(num_rows, num_edges)
    partial, owner = cut.buffers(num_feats if need_dx else 0, x, dtype)
    tile = blocks(num_feats, x.element_size(), widest=256)
    f_blocks = triton.cdiv(num_feats, tile["BLOCK_F"])
    together = f_blocks if need_dcoef else 1  # dcoef sums over all columns in one program
    with on_device(x):
        for first, windows, programs in cut.launches(num_rows):
            spmm_bwd_kernel[(programs, f_blocks // together)](
                colptr, row, ceid, dy, x, weight, mask, keep, self_weight, row_scale, dx, dcoef, dself, partial, owner,
                num_rows, num_edges, num_feats, together, first, cut.piece, windows, cut.steps, cut.stride,
                ACC=acc, NEED_DX=need_dx, NEED_DCOEF=need_dcoef, ALL_EDGES=all_edges,
                ONE_BLOCK=together == 1, HUBS=cut.hubs, WAYS=SEARCH_WAYS, **tile, **LAUNCH,
            )  # fmt: skip
        if need_dx:
            _join(cut, colptr, owner, partial, None, self_weight, dy, dx, acc)
    return dx, dcoef, dself

"""The softmax aggregation of GENConv and its backward in Triton: msg_e = (relu(x_j) + eps) mask_e, softmax per column.

The forward runs by destination with an online softmax in base 2, the backward by source over the CSC from the saved
log-sum-exp, one visit of each edge. Edge features and the other aggregations are not served: `gen_declines`.
csrc/ops.h has the formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from acefast.ops import reference
from acefast.ops.triton import on_device
from acefast.ops.triton.rows import (
    LAUNCH,
    LN_2,
    LOG2_E,
    SIZES,
    Cut,
    accumulator,
    assign_work,
    blocks,
    edge_block,
    hub_windows,
    join,
    new_per_edge,
    piece_slots,
    raise_top,
)

PARAM_CHUNKS = 256  # partial sums of dparam between its two stages


@triton.jit
def load_rows(x, node, f, num_feats, m_node, m_f):
    """x of nodes [BLOCK_E] in columns f [BLOCK_F]; 0 where the masks are false"""
    return tl.load(x + node[:, None] * num_feats + f[None, :], mask=m_node[:, None] & m_f[None, :], other=0.0)


@triton.jit
def store_softmax(row, f, m_f, b_top, b_sum, b_y, removed, y, lse, num_feats):
    """The sums of a whole row, with the removed edges' messages 0 in the denominator."""
    if removed is not None:
        gone = tl.load(removed + row)
        b_top, b_shift, b_old = raise_top(b_top, tl.where(gone > 0, tl.zeros_like(b_top), float("-inf")))
        b_sum = b_sum * b_old + gone.to(b_sum.dtype) * tl.where(gone > 0, tl.exp2(-b_shift), 0.0)
        b_y *= b_old
    b_y *= tl.where(b_sum == 0, 0.0, 1.0 / b_sum)
    tl.store(y + row * num_feats + f, b_y.to(y.dtype.element_ty), mask=m_f)
    tl.store(lse + row * num_feats + f, (b_top + tl.log2(b_sum)) * LN_2, mask=m_f)


@triton.jit(do_not_specialize=SIZES)
def gen_fwd_kernel(
    rowptr, col, eid, x, mask, keep, param, removed, y, lse, partial, owner,
    num_rows, num_edges, num_feats, first_row, piece, windows, steps, stride, eps: tl.float64,
    ACC: tl.constexpr, HUBS: tl.constexpr, WAYS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One row or one piece of a hub, BLOCK_F columns of it. A piece's partial holds maxima, sums and weighted sums."""
    row, begin, end, slot, leads = assign_work(
        rowptr, owner, num_rows, num_edges, first_row, piece, windows, steps, stride, HUBS, WAYS
    )
    if row >= 0:
        f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        m_f = f < num_feats
        b_t = tl.load(param + f, mask=m_f, other=0.0) * LOG2_E
        b_top = tl.full((BLOCK_F,), float("-inf"), ACC)
        b_sum = tl.zeros((BLOCK_F,), dtype=ACC)
        b_y = tl.zeros((BLOCK_F,), dtype=ACC)
        for e in range(begin, end, BLOCK_E):
            j, at, m_e, m_kept = edge_block(col, eid, keep, e, end, BLOCK_E)
            b_x = load_rows(x, j, f, num_feats, m_kept, m_f).to(ACC)  # [BLOCK_E, BLOCK_F]
            b_msg = tl.where(b_x < 0, 0.0, b_x) + tl.full((), eps, ACC)
            if mask is not None:
                b_msg *= tl.load(mask + at, mask=m_kept, other=0.0)[:, None]
            b_logit = tl.where(m_kept[:, None], b_t[None, :] * b_msg, float("-inf"))
            b_top, b_shift, b_old = raise_top(b_top, tl.max(b_logit, axis=0))
            b_power = tl.exp2(b_logit - b_shift[None, :])
            b_sum = b_sum * b_old + tl.sum(b_power, axis=0)
            b_y = b_y * b_old + tl.sum(b_power * b_msg, axis=0)
        if slot >= 0:
            at_slot = partial + 3 * slot * num_feats + f
            tl.store(at_slot, b_top, mask=m_f)
            tl.store(at_slot + num_feats, b_sum, mask=m_f)
            tl.store(at_slot + 2 * num_feats, b_y, mask=m_f)
        else:
            store_softmax(row, f, m_f, b_top, b_sum, b_y, removed, y, lse, num_feats)


@triton.jit(do_not_specialize=["piece"])
def gen_join_kernel(
    rowptr, owner, partial, removed, y, lse, num_feats, piece,
    ACC: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The hub that begins in this window from its pieces, BLOCK_E of them at a time, first window first."""
    row = tl.load(owner + tl.program_id(0))
    if row >= 0:
        first, last, inside = hub_windows(rowptr, row, piece)
        f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        m_f = f < num_feats
        b_top = tl.full((BLOCK_F,), float("-inf"), ACC)
        b_sum = tl.zeros((BLOCK_F,), dtype=ACC)
        b_y = tl.zeros((BLOCK_F,), dtype=ACC)
        for w in range(first, last + 1, BLOCK_E):
            slot, m_p = piece_slots(w, first, last, inside, BLOCK_E)
            b_piece = load_rows(partial, 3 * slot, f, num_feats, m_p, m_f)  # [BLOCK_E, BLOCK_F]
            b_piece = tl.where(m_p[:, None], b_piece, float("-inf"))
            b_top, b_shift, b_old = raise_top(b_top, tl.max(b_piece, axis=0))
            b_power = tl.exp2(b_piece - b_shift[None, :])
            b_sums = load_rows(partial, 3 * slot + 1, f, num_feats, m_p, m_f)
            b_sum = b_sum * b_old + tl.sum(b_power * b_sums, axis=0)
            b_ys = load_rows(partial, 3 * slot + 2, f, num_feats, m_p, m_f)
            b_y = b_y * b_old + tl.sum(b_power * b_ys, axis=0)
        store_softmax(row, f, m_f, b_top, b_sum, b_y, removed, y, lse, num_feats)


@triton.jit(do_not_specialize=[*SIZES, "blocks_per_program"])
def gen_bwd_kernel(
    colptr, row, ceid, dy, y, lse, x, mask, keep, param, dx, dmask, share, partial, owner,
    num_rows, num_edges, num_feats, blocks_per_program, first_row, piece, windows, steps, stride, eps: tl.float64,
    ACC: tl.constexpr, CONSTANT_BETA: tl.constexpr, NEED_DX: tl.constexpr, NEED_DMASK: tl.constexpr,
    NEED_DPARAM: tl.constexpr, ALL_EDGES: tl.constexpr, ONE_BLOCK: tl.constexpr, HUBS: tl.constexpr, WAYS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One source node j or one piece of a hub; blocks_per_program blocks of BLOCK_F columns of it.

    With dmask one program sees all columns: each later block adds to what this program stored for its own edges. Each
    program leaves its part of dparam in a row of `share`.
    """
    j, begin, end, slot, leads = assign_work(
        colptr, owner, num_rows, num_edges, first_row, piece, windows, steps, stride, HUBS, WAYS
    )
    if j >= 0 or NEED_DPARAM:
        if j < 0:
            end = begin
        for block in range(1 if ONE_BLOCK else blocks_per_program):
            f = (tl.program_id(1) * blocks_per_program + block) * BLOCK_F + tl.arange(0, BLOCK_F)
            m_f = f < num_feats
            b_t = tl.load(param + f, mask=m_f, other=0.0)
            m_own = f < tl.where(j >= 0, num_feats, 0)
            b_x = tl.load(x + j * num_feats + f, mask=m_own, other=0.0).to(ACC)
            b_r = tl.where(b_x < 0, 0.0, b_x) + tl.full((), eps, ACC)
            b_dx = tl.zeros((BLOCK_F,), dtype=ACC)
            b_dparam = tl.zeros((BLOCK_F,), dtype=ACC)
            for e in range(begin, end, BLOCK_E):
                i, at, m_e, m_kept = edge_block(row, ceid, keep, e, end, BLOCK_E)
                if ALL_EDGES:
                    m_read = m_e
                else:
                    m_read = m_kept
                b_m = m_kept.to(ACC)
                if mask is not None:
                    b_m = tl.load(mask + at, mask=m_kept, other=0.0)
                b_msg = b_m[:, None] * b_r[None, :]  # [BLOCK_E, BLOCK_F]
                if keep is not None:
                    b_msg = tl.where(m_kept[:, None], b_msg, 0.0)
                b_g = load_rows(dy, i, f, num_feats, m_read, m_f).to(ACC)
                b_lse = load_rows(lse, i, f, num_feats, m_read, m_f)
                b_g *= tl.exp2((b_t[None, :] * b_msg - b_lse) * LOG2_E)
                if CONSTANT_BETA:
                    b_dmsg = b_g
                else:
                    b_ahead = b_msg - load_rows(y, i, f, num_feats, m_read, m_f).to(ACC)
                    b_dmsg = b_g * (1.0 + b_t[None, :] * b_ahead)
                    if NEED_DPARAM:
                        b_part = b_g * b_msg * b_ahead
                        if ALL_EDGES:
                            b_part = tl.where(m_kept[:, None], b_part, 0.0)
                        b_dparam += tl.sum(b_part, axis=0)
                if NEED_DMASK:
                    b_dm = tl.sum(tl.where(m_read[:, None], b_dmsg * b_r[None, :], 0.0), axis=1)
                    if not ONE_BLOCK:
                        if block > 0:
                            b_dm += tl.load(dmask + at, mask=m_e, other=0.0)
                    tl.store(dmask + at, b_dm, mask=m_e)
                if NEED_DX:
                    if ALL_EDGES:
                        b_dmsg = tl.where(m_kept[:, None], b_dmsg, 0.0)
                    b_dx += tl.sum(b_m[:, None] * b_dmsg, axis=0)
            if NEED_DX:
                b_dx = tl.where(b_x > 0, b_dx, 0.0)
                if slot >= 0:
                    tl.store(partial + slot * num_feats + f, b_dx, mask=m_f)
                else:
                    tl.store(dx + j * num_feats + f, b_dx.to(dx.dtype.element_ty), mask=m_own)
            if NEED_DPARAM:
                tl.store(share + tl.program_id(0).to(tl.int64) * num_feats + f, b_dparam, mask=m_f)
            if not ONE_BLOCK:
                tl.debug_barrier()  # the next block reads what other threads of this program stored in dmask


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def sum_rows_kernel(
    values, sums, num_rows, rows_per_program, num_feats,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Row p of sums is the sum of rows_per_program rows of values, first row first."""
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    end = tl.minimum(first + rows_per_program, num_rows)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = f < num_feats
    b_sum = tl.zeros((BLOCK_F,), dtype=ACC)
    for n in range(first, end, BLOCK_N):
        row = n + tl.arange(0, BLOCK_N)
        b_sum += tl.sum(load_rows(values, row, f, num_feats, row < end, m_f), axis=0)
    tl.store(sums + program * num_feats + f, b_sum, mask=m_f)


def _sum_rows(values: Tensor, acc) -> Tensor:
    """The sum [F] of the rows of values [P, F], in two stages."""
    width = min(triton.next_power_of_2(values.size(1)), 64)
    for chunks in (PARAM_CHUNKS, 1):
        sums = values.new_empty(chunks, values.size(1))
        sum_rows_kernel[(chunks, triton.cdiv(values.size(1), width))](
            values, sums, values.size(0), triton.cdiv(values.size(0), chunks), values.size(1),
            ACC=acc, BLOCK_N=32, BLOCK_F=width, **{**LAUNCH, "num_warps": 4},
        )  # fmt: skip
        values = sums
    return values[0]


def _tile(num_feats: int, element_size: int, widest: int, elements: int = 1024) -> dict:
    tile = blocks(1, num_feats, element_size, widest, elements)
    return {name: tile[name] for name in ("BLOCK_E", "BLOCK_F")}


def gen_declines(
    rowptr, col, eid, colptr, row, ceid, x, edge, weight, bias, mask, keep, param, row_scale, removed,
    aggr, eps, all_edges,
) -> str | None:  # fmt: skip
    """Why a call of `gen` is not served, or None."""
    if aggr not in (reference.SOFTMAX, reference.SOFTMAX_SG):
        return "the Triton kernel of gen aggregates by softmax only"
    if edge is not None or bias is not None:
        return "the Triton kernel of gen takes no edge features"
    return None


def gen_bwd_declines(rowptr, col, eid, colptr, row, ceid, dy, y, stat, *args) -> str | None:
    """Why a call of `gen_bwd` is not served, or None."""
    return gen_declines(rowptr, col, eid, colptr, row, ceid, *args[:11], args[-1])


def gen(
    rowptr, col, eid, colptr, row, ceid, x, edge, weight, bias, mask, keep, param, row_scale, removed,
    aggr, eps, all_edges,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [N_dst, F], lse [N_dst, F]) of x [N_src, F]; the arguments of the schema `acefast::gen`."""
    num_rows, num_slots, num_feats = rowptr.numel() - 1, col.numel(), x.size(1)
    dtype, acc = accumulator(x.dtype)
    y, lse = x.new_empty(num_rows, num_feats), x.new_empty(num_rows, num_feats, dtype=dtype)
    if y.numel() == 0:
        return y, lse
    cut = Cut(num_rows, num_slots)
    partial, owner = cut.partial(3 * num_feats, x, dtype), cut.owner(x)
    tile = _tile(num_feats, x.element_size(), widest=256 if x.element_size() == 2 else 128)
    f_blocks = triton.cdiv(num_feats, tile["BLOCK_F"])
    with on_device(x):
        for first, windows, programs in cut.launches(num_rows):
            gen_fwd_kernel[(programs, f_blocks)](
                rowptr, col, eid, x, mask, keep, param, removed, y, lse, partial, owner,
                num_rows, num_slots, num_feats, first, cut.piece, windows, cut.steps, cut.stride, eps,
                ACC=acc, HUBS=cut.hubs, WAYS=cut.ways, **tile, **LAUNCH,
            )  # fmt: skip
        if cut.hubs:
            gen_join_kernel[(2 * cut.windows, f_blocks)](
                rowptr, owner, partial, removed, y, lse, num_feats, cut.piece, ACC=acc, **tile, **LAUNCH
            )
    return y, lse


def gen_bwd(
    rowptr, col, eid, colptr, row, ceid, dy, y, stat, x, edge, weight, bias, mask, keep, param, row_scale, removed,
    aggr, eps, need_dx, need_dmask, need_dedge, need_dparam, all_edges,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx like x, dmask [E], nothing, nothing, dparam [F]) of dy [N_dst, F]; the arguments of the schema
    `acefast::gen_bwd`. What is not needed comes back with no elements."""
    num_rows, num_slots, num_feats = colptr.numel() - 1, row.numel(), x.size(1)
    dtype, acc = accumulator(x.dtype)
    none = x.new_empty(0)
    dx = torch.empty_like(x) if need_dx else none
    dmask, dparam = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    if need_dmask:
        dmask = new_per_edge(mask.size(0), num_slots, like=mask, dtype=dtype)
    if need_dparam:
        dparam = torch.zeros_like(param)
    sum_param = need_dparam and aggr == reference.SOFTMAX
    if x.numel() == 0:
        return dx, dmask.zero_(), none, x.new_empty(0, dtype=dtype), dparam
    if need_dx or need_dmask or sum_param:
        cut = Cut(num_rows, num_slots)
        partial, owner = cut.partial(num_feats if need_dx else 0, x, dtype), cut.owner(x)
        share = x.new_empty((num_rows + 2 * cut.windows) if sum_param else 0, num_feats, dtype=dtype)
        tile = _tile(num_feats, x.element_size(), widest=128, elements=512)  # each edge reads three rows
        f_blocks = triton.cdiv(num_feats, tile["BLOCK_F"])
        together = f_blocks if need_dmask else 1
        shared = 0
        with on_device(x):
            for first, windows, programs in cut.launches(num_rows):
                gen_bwd_kernel[(programs, f_blocks // together)](
                    colptr, row, ceid, dy, y, stat, x, mask, keep, param, dx, dmask, share[shared:], partial, owner,
                    num_rows, num_slots, num_feats, together, first, cut.piece, windows, cut.steps, cut.stride, eps,
                    ACC=acc, CONSTANT_BETA=aggr == reference.SOFTMAX_SG, NEED_DX=need_dx, NEED_DMASK=need_dmask,
                    NEED_DPARAM=sum_param, ALL_EDGES=all_edges and removed is not None and need_dmask,
                    ONE_BLOCK=together == 1, HUBS=cut.hubs, WAYS=cut.ways, **tile, **LAUNCH,
                )  # fmt: skip
                shared += programs
            if need_dx:
                join(cut, colptr, owner, partial, None, None, dy, dx, acc)
            if sum_param:
                dparam = _sum_rows(share, acc)
    return dx, dmask, none, x.new_empty(0, dtype=dtype), dparam

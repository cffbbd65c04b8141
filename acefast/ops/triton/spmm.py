"""spmm and its backward in Triton, for features [N, F] or, with weights and masks per head, [N, H, F].

    y_i     = row_scale_i * sum over kept e: j->i of weight_e mask_e x_j + self_weight_i x_i    (by destination, CSR)
    dx_j    = sum over kept e: j->i of row_scale_i weight_e mask_e dy_i  + self_weight_j dy_j   (by source, CSC)
    dcoef_e = row_scale_i <dy_i, x_j>,   dself_j = <dy_j, x_j>                                  (in the same visit)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from acefast.ops.triton import on_device
from acefast.ops.triton.rows import (
    LAUNCH,
    SIZES,
    Cut,
    accumulator,
    assign_work,
    blocks,
    column_block,
    column_blocks,
    count_edges,
    edge_block,
    join,
    load_features,
    new_per_edge,
    store_row,
)


@triton.jit
def load_coefficient(at, m_at, h, m_h, weight, mask, row_scale, node, heads, ACC: tl.constexpr):
    """weight * mask of edges `at` and heads h, times row_scale of `node`; [BLOCK_E, BLOCK_H]"""
    at_h = at[:, None] * heads + h[None, :]
    m_at_h = m_at[:, None] & m_h[None, :]
    b_c = m_at_h.to(ACC)
    if weight is not None:
        b_c *= tl.load(weight + at_h, mask=m_at_h, other=0.0)
    if mask is not None:
        b_c *= tl.load(mask + at_h, mask=m_at_h, other=0.0)
    if row_scale is not None:
        b_c *= tl.load(row_scale + node, mask=m_at, other=0.0)[:, None]
    return b_c


@triton.jit(do_not_specialize=SIZES)
def spmm_fwd_kernel(
    rowptr, col, eid, x, weight, mask, keep, self_weight, row_scale, y, partial, owner,
    num_rows, num_edges, heads, num_feats, first_row, piece, windows, steps, stride,
    ACC: tl.constexpr, HUBS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """One row or one piece of a hub, one block of its columns."""
    row, begin, end, slot, leads = assign_work(
        rowptr, owner, num_rows, num_edges, first_row, piece, windows, steps, stride, HUBS, WAYS
    )
    if row >= 0:
        columns = heads * num_feats
        _, _, h, m_h, c, m_c = column_block(tl.program_id(1), heads, num_feats, BLOCK_H, BLOCK_F)
        b_y = tl.zeros((BLOCK_H, BLOCK_F), dtype=ACC)
        for e in range(begin, end, BLOCK_E):
            j, at, m_e, m_kept = edge_block(col, eid, keep, e, end, BLOCK_E)
            b_c = load_coefficient(at, m_kept, h, m_h, weight, mask, None, row, heads, ACC)
            b_x = load_features(x, j, columns, c, m_kept, m_c)
            b_y += tl.sum(b_c[:, :, None] * b_x.to(ACC), axis=0)  # [BLOCK_H, BLOCK_F]
        if slot >= 0:
            tl.store(partial + slot * columns + c, b_y, mask=m_c)
        else:
            store_row(row, c, m_c, b_y, row_scale, self_weight, x, y, columns, ACC)


@triton.jit(do_not_specialize=[*SIZES, "blocks_per_program"])
def spmm_bwd_kernel(
    colptr, row, ceid, dy, x, weight, mask, keep, self_weight, row_scale, dx, dcoef, dself, partial, owner,
    num_rows, num_edges, heads, num_feats, blocks_per_program, first_row, piece, windows, steps, stride,
    ACC: tl.constexpr, NEED_DX: tl.constexpr, NEED_DCOEF: tl.constexpr, ALL_EDGES: tl.constexpr,
    ONE_BLOCK: tl.constexpr, HUBS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """One source node j or one piece of a hub; blocks_per_program blocks of its columns.

    With dcoef one program sees all columns of a head, with dself all heads too: each later block of a head adds to what
    this program stored for its own edges.
    """
    j, begin, end, slot, leads = assign_work(
        colptr, owner, num_rows, num_edges, first_row, piece, windows, steps, stride, HUBS, WAYS
    )
    if j >= 0:
        columns = heads * num_feats
        b_self = tl.zeros((BLOCK_H, BLOCK_F), dtype=ACC)
        for block in range(1 if ONE_BLOCK else blocks_per_program):
            _, first_f, h, m_h, c, m_c = column_block(
                tl.program_id(1) * blocks_per_program + block, heads, num_feats, BLOCK_H, BLOCK_F
            )
            b_dx = tl.zeros((BLOCK_H, BLOCK_F), dtype=ACC)
            if NEED_DCOEF:
                b_x = tl.load(x + j * columns + c, mask=m_c, other=0.0).to(ACC)
            for e in range(begin, end, BLOCK_E):
                i, at, m_e, m_kept = edge_block(row, ceid, keep, e, end, BLOCK_E)
                if ALL_EDGES:
                    m_read = m_e
                else:
                    m_read = m_kept
                b_dy = load_features(dy, i, columns, c, m_read, m_c).to(ACC)  # [BLOCK_E, BLOCK_H, BLOCK_F]
                if NEED_DCOEF:
                    b_dot = tl.sum(b_dy * b_x[None, :, :], axis=2)  # [BLOCK_E, BLOCK_H]
                    if row_scale is not None:
                        b_dot *= tl.load(row_scale + i, mask=m_read, other=0.0)[:, None]
                    at_h = at[:, None] * heads + h[None, :]
                    m_at_h = m_e[:, None] & m_h[None, :]
                    if not ONE_BLOCK:
                        if first_f > 0:
                            b_dot += tl.load(dcoef + at_h, mask=m_at_h, other=0.0)
                    tl.store(dcoef + at_h, b_dot, mask=m_at_h)
                if NEED_DX:
                    b_c = load_coefficient(at, m_kept, h, m_h, weight, mask, row_scale, i, heads, ACC)
                    b_message = b_c[:, :, None] * b_dy
                    if ALL_EDGES:
                        b_message = tl.where(m_kept[:, None, None], b_message, 0.0)
                    b_dx += tl.sum(b_message, axis=0)  # [BLOCK_H, BLOCK_F]
            if NEED_DX:
                if slot >= 0:
                    tl.store(partial + slot * columns + c, b_dx, mask=m_c)
                else:
                    store_row(j, c, m_c, b_dx, None, self_weight, dy, dx, columns, ACC)
            if NEED_DCOEF:
                if self_weight is not None:
                    b_own = tl.load(dy + j * columns + c, mask=m_c, other=0.0).to(ACC)
                    b_self += b_own * b_x
                if not ONE_BLOCK:
                    tl.debug_barrier()  # the next block reads what other threads of this program stored in dcoef
        if NEED_DCOEF:
            if self_weight is not None:
                tl.store(dself + j, tl.sum(b_self), mask=leads)


def _shape(x: Tensor) -> tuple[int, int]:
    """(H, F) of features [N, F] or [N, H, F]"""
    return (1, x.size(1)) if x.dim() == 2 else (x.size(1), x.size(2))


def spmm(rowptr, col, eid, colptr, row, ceid, x, weight, mask, keep, self_weight, row_scale, all_edges) -> Tensor:
    """y [N_dst, F] of x [N_src, F] or y [N_dst, H, F] of x [N_src, H, F], x's dtype; the arguments of the schema
    `acefast::spmm`.

    weight, mask [E] or [E, H], self_weight [N], row_scale [N_dst] in the accumulator's dtype, keep bool [E]; all_edges
    concerns the gradients alone.
    """
    num_rows, num_slots, (heads, num_feats) = rowptr.numel() - 1, col.numel(), _shape(x)
    x = x.contiguous()
    y = x.new_empty(num_rows, *x.shape[1:])
    if y.numel() == 0:
        return y
    dtype, acc = accumulator(x.dtype)
    cut = Cut(num_rows, num_slots)
    partial, owner = cut.partial(heads * num_feats, x, dtype), cut.owner(x)
    tile = blocks(heads, num_feats, x.element_size(), widest=256 if x.element_size() == 2 else 128)
    h_blocks, f_blocks = column_blocks(heads, num_feats, tile)
    with on_device(x):
        for first, windows, programs in cut.launches(num_rows):
            spmm_fwd_kernel[(programs, h_blocks * f_blocks)](
                rowptr, col, eid, x, weight, mask, keep, self_weight, row_scale, y, partial, owner,
                num_rows, num_slots, heads, num_feats, first, cut.piece, windows, cut.steps, cut.stride,
                ACC=acc, HUBS=cut.hubs, WAYS=cut.ways, **tile, **LAUNCH,
            )  # fmt: skip
        join(cut, rowptr, owner, partial, row_scale, self_weight, x, y, acc)
    return y


def spmm_bwd(
    rowptr, col, eid, colptr, row, ceid, dy, x, weight, mask, keep, self_weight, row_scale,
    need_dx, need_dcoef, all_edges,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx like x, dcoef [E] or [E, H], dself [N]) of dy like y; the arguments of the schema `acefast::spmm_bwd`.

    dx has x's dtype, the others the accumulator's. What is not needed comes back with no elements.
    """
    num_rows, num_slots, (heads, num_feats) = colptr.numel() - 1, row.numel(), _shape(x)
    dtype, acc = accumulator(x.dtype)
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dcoef = x.new_empty(0, dtype=dtype)
    if need_dcoef:
        edges = count_edges(num_slots, weight, mask, keep)
        dcoef = new_per_edge(edges, num_slots, *x.shape[1:-1], like=x, dtype=dtype)
    dself = x.new_empty(num_rows if need_dcoef and self_weight is not None else 0, dtype=dtype)
    if x.numel() == 0 and num_rows > 0:
        return dx, dcoef.zero_(), dself.zero_()
    if num_rows == 0 or not (need_dx or need_dcoef):
        return dx, dcoef, dself
    cut = Cut(num_rows, num_slots)
    partial, owner = cut.partial(heads * num_feats if need_dx else 0, x, dtype), cut.owner(x)
    tile = blocks(heads, num_feats, x.element_size(), widest=256)
    h_blocks, f_blocks = column_blocks(heads, num_feats, tile)
    together = 1
    if need_dcoef:
        together = f_blocks if self_weight is None else h_blocks * f_blocks
    with on_device(x):
        for first, windows, programs in cut.launches(num_rows):
            spmm_bwd_kernel[(programs, h_blocks * f_blocks // together)](
                colptr, row, ceid, dy, x, weight, mask, keep, self_weight, row_scale, dx, dcoef, dself, partial, owner,
                num_rows, num_slots, heads, num_feats, together, first, cut.piece, windows, cut.steps, cut.stride,
                ACC=acc, NEED_DX=need_dx, NEED_DCOEF=need_dcoef, ALL_EDGES=all_edges,
                ONE_BLOCK=together == 1, HUBS=cut.hubs, WAYS=cut.ways, **tile, **LAUNCH,
            )  # fmt: skip
        if need_dx:
            join(cut, colptr, owner, partial, None, self_weight, dy, dx, acc)
    return dx, dcoef, dself

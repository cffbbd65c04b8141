"""Graph attention and its backward in Triton: scores, softmax, masks, dropout and sums in one visit of each edge.

The forward runs by destination with an online softmax in base 2: a program keeps the maximum, the sum of the powers and
the weighted sums of one row or of one piece of a hub; pieces are joined in order by the same rescaling. The backward
runs by source over the CSC and recomputes alpha from the saved log-sum-exp. csrc/ops.h has the formulas.
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
    column_block,
    column_blocks,
    edge_block,
    flat_columns,
    hub_windows,
    join,
    load_features,
    new_per_edge,
    piece_slots,
    raise_top,
)

STATS = tl.constexpr(3)  # of a piece and head: maximum of the logits, sum of the powers, the same sum with slopes
RANDOM = ["threshold", "seed", "step"]  # no recompilation for these


@triton.jit
def load_drop(at, h, first_h, heads, threshold, scale, key, stream, QUADS: tl.constexpr,
              BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """scale where the random word of edge and head is at least threshold, else 0; [BLOCK_E, BLOCK_H]. QUADS: the four
    words of a counter belong to four heads of one edge, and each counter is taken once."""
    if QUADS:
        counter = at[:, None] * (heads // 4) + (first_h // 4 + tl.arange(0, BLOCK_H // 4))[None, :]
    else:
        n = at[:, None] * heads + h[None, :]
        counter = n // 4
    now = counter * 0 + stream
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, (now & 0xFFFFFFFF).to(tl.uint32), (now >> 32).to(tl.uint32))
    if QUADS:
        b_word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_E, BLOCK_H))
    else:
        b_word = tl.where(n % 4 < 2, tl.where(n % 4 == 0, w0, w1), tl.where(n % 4 == 2, w2, w3))
    return tl.where(b_word.to(tl.int64) >= threshold, scale, 0.0)


@triton.jit
def load_edge(at, m_at, h, m_h, first_h, b_reach, mask, heads, slope, threshold, scale, key, stream,
              ACC: tl.constexpr, MASK_OF_HEAD: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
              BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """(score, its slope, mask, drop) of edges `at` and heads h; [BLOCK_E, BLOCK_H]"""
    b_slope = tl.where(b_reach < 0, slope, 1.0)
    b_m = tl.full((BLOCK_E, BLOCK_H), 1.0, ACC)
    if mask is not None:
        if MASK_OF_HEAD:
            b_m = tl.load(mask + at[:, None] * heads + h[None, :], mask=m_at[:, None] & m_h[None, :], other=0.0)
        else:
            b_m *= tl.load(mask + at, mask=m_at, other=0.0)[:, None]
    b_drop = tl.full((BLOCK_E, BLOCK_H), 1.0, ACC)
    if DROPOUT:
        b_drop = load_drop(at, h, first_h, heads, threshold, scale, key, stream, QUADS, BLOCK_E, BLOCK_H)
    return b_reach * b_slope, b_slope, b_m, b_drop


@triton.jit
def store_attention(row, first_f, h, m_h, c, m_c, b_top, b_sum, b_slope_sum, b_y, b_slope_y,
                    y, lse, slope_y, slope_sum, heads, columns, SAVE: tl.constexpr):  # fmt: skip
    """The sums of a whole row over the sum of its powers."""
    b_share = tl.where(b_sum == 0, 0.0, 1.0 / b_sum)
    tl.store(y + row * columns + c, (b_y * b_share[:, None]).to(y.dtype.element_ty), mask=m_c)
    if SAVE:
        tl.store(slope_y + row * columns + c, (b_slope_y * b_share[:, None]).to(y.dtype.element_ty), mask=m_c)
    if first_f == 0:
        tl.store(lse + row * heads + h, (b_top + tl.log2(b_sum)) * LN_2, mask=m_h)
        if SAVE:
            tl.store(slope_sum + row * heads + h, b_slope_sum * b_share, mask=m_h)


@triton.jit(do_not_specialize=[*SIZES, *RANDOM])
def gat_fwd_kernel(
    rowptr, col, eid, z, a_src, a_dst, mask, keep, y, lse, slope_y, slope_sum, partial, partial_slope, stats, owner,
    num_rows, num_edges, heads, num_feats, first_row, piece, windows, steps, stride,
    negative_slope: tl.float64, threshold: tl.int64, drop_scale: tl.float64, seed: tl.int64, step: tl.int64,
    step_at,
    ACC: tl.constexpr, MASK_ON_LOGIT: tl.constexpr, MASK_OF_HEAD: tl.constexpr, DROPOUT: tl.constexpr,
    QUADS: tl.constexpr, SAVE: tl.constexpr, EXACT: tl.constexpr, HUBS: tl.constexpr, WAYS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One row or one piece of a hub, one block of its heads and features."""
    row, begin, end, slot, leads = assign_work(
        rowptr, owner, num_rows, num_edges, first_row, piece, windows, steps, stride, HUBS, WAYS
    )
    slope, scale = tl.full((), negative_slope, ACC), tl.full((), drop_scale, ACC)
    key, stream = tl.full((), seed, tl.int64), tl.full((), step, tl.int64)
    if step_at is not None:
        stream = tl.load(step_at)
    if row >= 0:
        feats = BLOCK_F if EXACT else num_feats  # known lengths give wide loads
        columns = heads * feats
        first_h, first_f, h, m_h, c, m_c = column_block(tl.program_id(1), heads, feats, BLOCK_H, BLOCK_F)
        b_dst = tl.load(a_dst + row * heads + h, mask=m_h, other=0.0)  # [BLOCK_H]
        b_top = tl.full((BLOCK_H,), float("-inf"), ACC)
        b_sum = tl.zeros((BLOCK_H,), dtype=ACC)
        b_slope_sum = tl.zeros((BLOCK_H,), dtype=ACC)
        b_y = tl.zeros((BLOCK_H, BLOCK_F), dtype=ACC)
        b_slope_y = tl.zeros((BLOCK_H, BLOCK_F), dtype=ACC)
        for e in range(begin, end, BLOCK_E):
            j, at, m_e, m_kept = edge_block(col, eid, keep, e, end, BLOCK_E)
            m_at = m_kept[:, None] & m_h[None, :]
            b_reach = b_dst[None, :] + tl.load(a_src + j[:, None] * heads + h[None, :], mask=m_at, other=0.0)
            b_s, b_slope, b_m, b_drop = load_edge(
                at, m_kept, h, m_h, first_h, b_reach, mask, heads, slope, threshold, scale, key, stream,
                ACC, MASK_OF_HEAD, DROPOUT, QUADS, BLOCK_E, BLOCK_H,
            )  # fmt: skip
            if MASK_ON_LOGIT:
                b_s *= b_m
            b_s = tl.where(m_at, b_s * LOG2_E, float("-inf"))
            b_top, b_shift, b_old = raise_top(b_top, tl.max(b_s, axis=0))
            b_power = tl.exp2(b_s - b_shift[None, :])  # [BLOCK_E, BLOCK_H]; 0 where the edge does not exist
            b_sum = b_sum * b_old + tl.sum(b_power, axis=0)
            b_z = load_features(z, j, columns, c, m_kept, m_c).to(ACC)  # [BLOCK_E, BLOCK_H, BLOCK_F]
            b_c = b_power * b_drop
            if SAVE:
                b_c_slope = b_c * b_m * b_slope
                b_slope_y = b_slope_y * b_old[:, None] + tl.sum(b_c_slope[:, :, None] * b_z, axis=0)
                b_power_slope = b_power * b_slope
                if MASK_ON_LOGIT:
                    b_power_slope *= b_m
                b_slope_sum = b_slope_sum * b_old + tl.sum(b_power_slope, axis=0)
            if not MASK_ON_LOGIT:
                b_c *= b_m
            b_y = b_y * b_old[:, None] + tl.sum(b_c[:, :, None] * b_z, axis=0)
        if slot >= 0:
            tl.store(partial + slot * columns + c, b_y, mask=m_c)
            if SAVE:
                tl.store(partial_slope + slot * columns + c, b_slope_y, mask=m_c)
            if first_f == 0:
                at_stats = stats + slot * STATS * heads + h
                tl.store(at_stats, b_top, mask=m_h)
                tl.store(at_stats + heads, b_sum, mask=m_h)
                tl.store(at_stats + 2 * heads, b_slope_sum, mask=m_h)
        else:
            store_attention(
                row, first_f, h, m_h, c, m_c, b_top, b_sum, b_slope_sum, b_y, b_slope_y,
                y, lse, slope_y, slope_sum, heads, columns, SAVE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["piece"])
def gat_join_kernel(
    rowptr, owner, partial, partial_slope, stats, y, lse, slope_y, slope_sum, heads, num_feats, piece,
    ACC: tl.constexpr, EXACT: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The hub that begins in this window from its pieces, BLOCK_E of them at a time, first window first."""
    row = tl.load(owner + tl.program_id(0))
    if row >= 0:
        feats = BLOCK_F if EXACT else num_feats  # known lengths give wide loads
        columns = heads * feats
        first_h, first_f, h, m_h, c, m_c = column_block(tl.program_id(1), heads, feats, BLOCK_H, BLOCK_F)
        first, last, inside = hub_windows(rowptr, row, piece)
        b_top = tl.full((BLOCK_H,), float("-inf"), ACC)
        b_sum = tl.zeros((BLOCK_H,), dtype=ACC)
        b_slope_sum = tl.zeros((BLOCK_H,), dtype=ACC)
        b_y = tl.zeros((BLOCK_H, BLOCK_F), dtype=ACC)
        b_slope_y = tl.zeros((BLOCK_H, BLOCK_F), dtype=ACC)
        for w in range(first, last + 1, BLOCK_E):
            slot, m_p = piece_slots(w, first, last, inside, BLOCK_E)
            at_stats = stats + slot[:, None] * STATS * heads + h[None, :]
            m_at = m_p[:, None] & m_h[None, :]
            b_piece = tl.load(at_stats, mask=m_at, other=float("-inf"))  # [BLOCK_E, BLOCK_H]
            b_top, b_shift, b_old = raise_top(b_top, tl.max(b_piece, axis=0))
            b_power = tl.exp2(b_piece - b_shift[None, :])
            b_sums = tl.load(at_stats + heads, mask=m_at, other=0.0)
            b_sum = b_sum * b_old + tl.sum(b_power * b_sums, axis=0)
            b_ys = load_features(partial, slot, columns, c, m_p, m_c)
            b_y = b_y * b_old[:, None] + tl.sum(b_power[:, :, None] * b_ys, axis=0)
            if SAVE:
                b_sums = tl.load(at_stats + 2 * heads, mask=m_at, other=0.0)
                b_slope_sum = b_slope_sum * b_old + tl.sum(b_power * b_sums, axis=0)
                b_ys = load_features(partial_slope, slot, columns, c, m_p, m_c)
                b_slope_y = b_slope_y * b_old[:, None] + tl.sum(b_power[:, :, None] * b_ys, axis=0)
        store_attention(
            row, first_f, h, m_h, c, m_c, b_top, b_sum, b_slope_sum, b_y, b_slope_y,
            y, lse, slope_y, slope_sum, heads, columns, SAVE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_items"])
def gat_mean_kernel(
    dy, y, slope_y, slope_sum, mean, da_dst, num_items, num_feats,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """D = <dy, y> and da_dst = <dy, slope_y> - D slope_sum of BLOCK_N pairs of destination and head."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = n < num_items
    b_mean = tl.zeros((BLOCK_N,), dtype=ACC)
    b_slope = tl.zeros((BLOCK_N,), dtype=ACC)
    for first_f in range(0, num_feats, BLOCK_F):
        f = first_f + tl.arange(0, BLOCK_F)
        at = n[:, None] * num_feats + f[None, :]
        m_at = m_n[:, None] & (f < num_feats)[None, :]
        b_dy = tl.load(dy + at, mask=m_at, other=0.0).to(ACC)
        b_mean += tl.sum(b_dy * tl.load(y + at, mask=m_at, other=0.0).to(ACC), axis=1)
        b_slope += tl.sum(b_dy * tl.load(slope_y + at, mask=m_at, other=0.0).to(ACC), axis=1)
    tl.store(mean + n, b_mean, mask=m_n)
    tl.store(da_dst + n, b_slope - b_mean * tl.load(slope_sum + n, mask=m_n, other=0.0), mask=m_n)


@triton.jit(do_not_specialize=[*SIZES, *RANDOM, "blocks_per_program"])
def gat_bwd_kernel(
    colptr, row, ceid, dy, lse, mean, z, a_src, a_dst, mask, keep, dz, da_src, dmask, partial, partial_a, owner,
    num_rows, num_edges, heads, num_feats, blocks_per_program, first_row, piece, windows, steps, stride,
    negative_slope: tl.float64, threshold: tl.int64, drop_scale: tl.float64, seed: tl.int64, step: tl.int64,
    step_at,
    ACC: tl.constexpr, MASK_ON_LOGIT: tl.constexpr, MASK_OF_HEAD: tl.constexpr, DROPOUT: tl.constexpr,
    QUADS: tl.constexpr, NEED_DMASK: tl.constexpr, ONE_BLOCK: tl.constexpr, WHOLE_HEADS: tl.constexpr,
    EXACT: tl.constexpr, HUBS: tl.constexpr, WAYS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One source node j or one piece of a hub; blocks_per_program blocks of its heads and features.

    A dmask that collects all heads has one program for all of them: each later block of heads adds to what this program
    stored for its own edges. WHOLE_HEADS: a block holds all features of its heads.
    """
    j, begin, end, slot, leads = assign_work(
        colptr, owner, num_rows, num_edges, first_row, piece, windows, steps, stride, HUBS, WAYS
    )
    slope, scale = tl.full((), negative_slope, ACC), tl.full((), drop_scale, ACC)
    key, stream = tl.full((), seed, tl.int64), tl.full((), step, tl.int64)
    if step_at is not None:
        stream = tl.load(step_at)
    if j >= 0:
        feats = BLOCK_F if EXACT else num_feats  # known lengths give wide loads
        columns = heads * feats
        for block in range(1 if ONE_BLOCK else blocks_per_program):
            first_h, first_f, h, m_h, c, m_c = column_block(
                tl.program_id(1) * blocks_per_program + block, heads, feats, BLOCK_H, BLOCK_F
            )
            b_src = tl.load(a_src + j * heads + h, mask=m_h, other=0.0)
            b_z = tl.load(z + j * columns + c, mask=m_c, other=0.0).to(ACC)
            b_dsrc = tl.zeros((BLOCK_H,), dtype=ACC)
            b_dz = tl.zeros((BLOCK_H, BLOCK_F), dtype=ACC)
            for e in range(begin, end, BLOCK_E):
                i, at, m_e, m_kept = edge_block(row, ceid, keep, e, end, BLOCK_E)
                at_i = i[:, None] * heads + h[None, :]
                m_at = m_kept[:, None] & m_h[None, :]
                b_reach = tl.where(m_at, tl.load(a_dst + at_i, mask=m_at, other=0.0) + b_src[None, :], 0.0)
                b_s, b_slope, b_m, b_drop = load_edge(
                    at, m_kept, h, m_h, first_h, b_reach, mask, heads, slope, threshold, scale, key, stream,
                    ACC, MASK_OF_HEAD, DROPOUT, QUADS, BLOCK_E, BLOCK_H,
                )  # fmt: skip
                b_logit = b_s
                if MASK_ON_LOGIT:
                    b_logit *= b_m
                b_logit -= tl.load(lse + at_i, mask=m_at, other=0.0)
                b_alpha = tl.where(m_at, tl.exp2(b_logit * LOG2_E), 0.0)  # [BLOCK_E, BLOCK_H]
                b_dy = load_features(dy, i, columns, c, m_kept, m_c).to(ACC)  # [BLOCK_E, BLOCK_H, BLOCK_F]
                if WHOLE_HEADS:
                    b_dot = tl.sum(b_dy * b_z[None, :, :], axis=2)  # [BLOCK_E, BLOCK_H]
                else:
                    b_dot = tl.zeros((BLOCK_E, BLOCK_H), dtype=ACC)
                    for f in range(0, feats, BLOCK_F):
                        c_f, m_f = flat_columns(h, m_h, f, feats, BLOCK_F)
                        b_z_f = tl.load(z + j * columns + c_f, mask=m_f, other=0.0).to(ACC)
                        b_dy_f = load_features(dy, i, columns, c_f, m_kept, m_f).to(ACC)
                        b_dot += tl.sum(b_dy_f * b_z_f[None, :, :], axis=2)
                b_mean = tl.load(mean + at_i, mask=m_at, other=0.0)
                b_c = b_alpha * b_drop
                b_p = tl.where(m_at, b_drop * b_dot, 0.0)
                if MASK_ON_LOGIT:
                    b_dlogit = b_alpha * (b_p - b_mean)
                    b_dm = b_dlogit * b_s
                    b_t = b_dlogit * b_slope * b_m
                else:
                    b_c *= b_m
                    b_dm = b_alpha * b_p
                    b_t = b_alpha * (b_m * b_p - b_mean) * b_slope
                b_dsrc += tl.sum(b_t, axis=0)
                b_dz += tl.sum(b_c[:, :, None] * b_dy, axis=0)
                if NEED_DMASK:
                    if first_f == 0:
                        if MASK_OF_HEAD:
                            tl.store(dmask + at[:, None] * heads + h[None, :], b_dm, mask=m_e[:, None] & m_h[None, :])
                        else:
                            b_dm_all = tl.sum(b_dm, axis=1)
                            if not ONE_BLOCK:
                                if first_h > 0:
                                    b_dm_all += tl.load(dmask + at, mask=m_e, other=0.0)
                            tl.store(dmask + at, b_dm_all, mask=m_e)
            if slot >= 0:
                tl.store(partial + slot * columns + c, b_dz, mask=m_c)
                if first_f == 0:
                    tl.store(partial_a + slot * heads + h, b_dsrc, mask=m_h)
            else:
                tl.store(dz + j * columns + c, b_dz.to(dz.dtype.element_ty), mask=m_c)
                if first_f == 0:
                    tl.store(da_src + j * heads + h, b_dsrc, mask=m_h)
            if not ONE_BLOCK:
                tl.debug_barrier()  # the next block reads what other threads of this program stored in dmask


def _options(heads, num_feats, tile, acc, mask, mask_on_logit, dropout) -> dict:
    quads = heads % 4 == 0 and tile["BLOCK_H"] >= 4
    return {
        "ACC": acc, "MASK_ON_LOGIT": mask_on_logit and mask is not None, "DROPOUT": dropout > 0, "QUADS": quads,
        "EXACT": num_feats == tile["BLOCK_F"],
        "MASK_OF_HEAD": mask is not None and mask.dim() == 2,
    }  # fmt: skip


def _scalars(negative_slope, dropout, *noise) -> tuple:
    """(negative_slope, threshold of a word, what it is scaled by, seed, step, step_at)"""
    return negative_slope, int(dropout * 2**32), 1.0 / (1.0 - dropout) if dropout < 1 else 0.0, *noise


def gat(
    rowptr, col, eid, colptr, row, ceid, z, a_src, a_dst, mask, keep, mask_on_logit, negative_slope, dropout, seed, step,
    step_at, save,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [N_dst, H, F], lse [N_dst, H], slope_y, slope_sum) of z [N_src, H, F]; the arguments of the schema
    `acefast::gat`. slope_y is like y and slope_sum like lse with `save`; else they have no elements."""
    num_rows, num_slots, heads, num_feats = rowptr.numel() - 1, col.numel(), z.size(1), z.size(2)
    if heads * num_feats == 0:
        return reference.gat(rowptr, col, eid, colptr, row, ceid, z, a_src, a_dst, mask, keep, mask_on_logit,
                             negative_slope, dropout, seed, step, step_at, save)  # fmt: skip
    dtype, acc = accumulator(z.dtype)
    y, lse = z.new_empty(num_rows, heads, num_feats), a_dst.new_empty(num_rows, heads)
    slope_y, slope_sum = (torch.empty_like(y), torch.empty_like(lse)) if save else (z.new_empty(0), lse.new_empty(0))
    cut = Cut(num_rows, num_slots)
    partial, partial_slope = (cut.partial(heads * num_feats * needed, z, dtype) for needed in (True, save))
    stats, owner = cut.partial(STATS.value * heads, z, dtype), cut.owner(z)
    tile = blocks(heads, num_feats, z.element_size(), widest=256 if z.element_size() == 2 else 128)
    h_blocks, f_blocks = column_blocks(heads, num_feats, tile)
    scalars = _scalars(negative_slope, dropout, seed, step, step_at)
    with on_device(z):
        for first, windows, programs in cut.launches(num_rows):
            gat_fwd_kernel[(programs, h_blocks * f_blocks)](
                rowptr, col, eid, z, a_src, a_dst, mask, keep, y, lse, slope_y, slope_sum,
                partial, partial_slope, stats, owner,
                num_rows, num_slots, heads, num_feats, first, cut.piece, windows, cut.steps, cut.stride, *scalars,
                SAVE=save, HUBS=cut.hubs, WAYS=cut.ways, **tile, **LAUNCH,
                **_options(heads, num_feats, tile, acc, mask, mask_on_logit, dropout),
            )  # fmt: skip
        if cut.hubs:
            gat_join_kernel[(2 * cut.windows, h_blocks * f_blocks)](
                rowptr, owner, partial, partial_slope, stats, y, lse, slope_y, slope_sum, heads, num_feats, cut.piece,
                ACC=acc, EXACT=num_feats == tile["BLOCK_F"], SAVE=save, **tile, **LAUNCH,
            )  # fmt: skip
    return y, lse, slope_y, slope_sum


def gat_bwd(
    rowptr, col, eid, colptr, row, ceid, dy, y, lse, slope_y, slope_sum, z, a_src, a_dst, mask, keep, mask_on_logit,
    negative_slope, dropout, seed, step, step_at, need_dmask,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dz like z, da_src [N_src, H], da_dst [N_dst, H], dmask like mask) of dy like y; the arguments of the schema
    `acefast::gat_bwd`. dmask has no elements unless needed."""
    num_rows, num_slots, heads, num_feats = colptr.numel() - 1, row.numel(), z.size(1), z.size(2)
    if heads * num_feats == 0:
        return reference.gat_bwd(rowptr, col, eid, colptr, row, ceid, dy, y, lse, slope_y, slope_sum, z, a_src, a_dst,
                                 mask, keep, mask_on_logit, negative_slope, dropout, seed, step, step_at,
                                 need_dmask)  # fmt: skip
    dtype, acc = accumulator(z.dtype)
    dz, da_src, da_dst, mean = (torch.empty_like(t) for t in (z, a_src, a_dst, a_dst))
    dmask = a_src.new_empty(0)
    if need_dmask:
        dmask = new_per_edge(mask.size(0), num_slots, *mask.shape[1:], like=mask, dtype=dtype)
    cut = Cut(num_rows, num_slots)
    partial, partial_a = (cut.partial(columns, z, dtype) for columns in (heads * num_feats, heads))
    owner = cut.owner(z)
    tile = blocks(heads, num_feats, z.element_size(), widest=256)
    h_blocks, f_blocks = column_blocks(heads, num_feats, tile)
    together = h_blocks * f_blocks if need_dmask and mask.dim() == 1 and h_blocks > 1 else 1
    rows_at_once = max(1, 2048 // dtype.itemsize // tile["BLOCK_F"])
    with on_device(z):
        gat_mean_kernel[(triton.cdiv(mean.numel(), rows_at_once),)](
            dy, y, slope_y, slope_sum, mean, da_dst, mean.numel(), num_feats,
            ACC=acc, BLOCK_N=rows_at_once, BLOCK_F=tile["BLOCK_F"], **LAUNCH,
        )  # fmt: skip
        for first, windows, programs in cut.launches(num_rows):
            gat_bwd_kernel[(programs, h_blocks * f_blocks // together)](
                colptr, row, ceid, dy, lse, mean, z, a_src, a_dst, mask, keep, dz, da_src, dmask,
                partial, partial_a, owner,
                num_rows, num_slots, heads, num_feats, together, first, cut.piece, windows, cut.steps, cut.stride,
                *_scalars(negative_slope, dropout, seed, step, step_at),
                NEED_DMASK=need_dmask, ONE_BLOCK=together == 1, WHOLE_HEADS=f_blocks == 1, HUBS=cut.hubs, WAYS=cut.ways,
                **tile, **LAUNCH, **_options(heads, num_feats, tile, acc, mask, mask_on_logit, dropout),
            )  # fmt: skip
        join(cut, colptr, owner, partial, None, None, dy, dz, acc)
        join(cut, colptr, owner, partial_a, None, None, dy, da_src, acc)
    return dz, da_src, da_dst, dmask

"""Graph attention and its backward in Triton: scores, softmax, masks, dropout and aggregation in one visit of each edge.

The forward runs by destination with an online softmax in base 2: a program keeps the maximum, the sum of the powers and
the weighted sums of one row or of one piece of a hub; the pieces are joined in order by the same rescaling. The backward
runs by source over the CSC and recomputes alpha from the saved log-sum-exp. See csrc/ops.h for the formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from acefast.ops.triton import on_device
from acefast.ops.triton.rows import (
    JOIN_WARPS,
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
    count_edges,
    edge_block,
    hub_windows,
    join,
    load_features,
    new_per_edge,
    piece_slots,
    rescale,
)

STATS = tl.constexpr(3)  # of a piece and head: maximum, sum of powers, sum of alpha * slope before division by the sum


@triton.jit
def dropout_scale(at, h, heads, threshold, scale, seed, QUADS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
                  ACC: tl.constexpr):  # fmt: skip
    """scale where the random word of edge and head is at least threshold, else 0; [BLOCK_E, BLOCK_H]. QUADS: heads come
    in whole blocks of Philox, four words each."""
    key = tl.full((), seed, tl.int64)
    if QUADS:
        quad = tl.program_id(1) * 0 + h  # placeholder
    n = at[:, None] * heads + h[None, :]
    block = n // 4
    zero = (block * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, block.to(tl.uint32), (block >> 32).to(tl.uint32), zero, zero)
    part = n % 4
    b_word = tl.where(part < 2, tl.where(part == 0, w0, w1), tl.where(part == 2, w2, w3))
    return tl.where(b_word.to(tl.int64) >= threshold, tl.full((), scale, ACC), 0.0)

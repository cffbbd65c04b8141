"""gat: attention over the edges into each destination, and the weighted sum of the source rows, in one op."""

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.graph import Graph, Selection
from acefast.ops import backend, checks


def gat(
    g: Graph,
    z: Tensor,
    a_src: Tensor,
    a_dst: Tensor,
    mask: Tensor | None = None,
    keep: Tensor | Selection | None = None,
    mask_on: str = "message",
    negative_slope: float = 0.2,
    dropout: float = 0.0,
    seed: int = 0,
    training: bool = True,
    mask_grad: str = "kept",
    step: int | Tensor = 0,
) -> Tensor:
    """Graph attention (Velickovic et al., ICLR 2018, eqs. 3-4), per head, over the kept edges e: j->i:

        s_e = LeakyReLU(a_dst_i + a_src_j)
        mask_on="message":  y_i = sum_e softmax(s)_e * mask_e * d_e * z_j
        mask_on="logit":    y_i = sum_e softmax(s * mask)_e * d_e * z_j       (UGS, Chen et al., ICML 2021)

    with the softmax over the kept edges into i and d_e the attention dropout: 0 with probability `dropout`, else
    1 / (1 - dropout). A mask of 0 on the logit leaves the edge in the softmax with logit 0; removing it is what `keep` is for.
    Nothing of size E x H or E x F is made; what is kept for backward is O(N H F).

    Args:
        g: graph with N_src sources, N_dst destinations, E edges.
        z: transformed features [N_src, H, F], float32, float64, float16 or bfloat16; the output has its dtype.
        a_src, a_dst: attention terms [N_src, H] and [N_dst, H], float32 (float64 with float64 z).
        mask: [E] or [E, H] like a_src, caller's edge order; multiplies.
        keep: [E] bool, or a prepared `Graph.select`; an edge with False does not exist in this call.
        dropout: probability in [0, 1], in effect where training. The noise is a function of (seed, step, edge,
            head) alone; 0 <= seed, step < 2^63.
        mask_grad: "kept" only: a softmax has no derivative at an edge that does not exist.
        step: or an int64 tensor [1] on z's device, which is read when the kernel runs, as in `relu_dropout`.
    z, a_src, a_dst and mask are differentiable. Rows without edges give 0.
    Returns: y [N_dst, H, F]. Raises InputError for a wrong shape, dtype, device or option. Bitwise deterministic.
    """
    checks.graph("gat", g)
    checks.features("gat", "z", z, g.num_src, g.device, dims=(3,))
    heads, acc = z.size(1), checks.accumulator(z.dtype)
    checks.vector("gat", "a_src", a_src, (g.num_src, heads), acc, g.device)
    checks.vector("gat", "a_dst", a_dst, (g.num_dst, heads), acc, g.device)
    per_head = isinstance(mask, Tensor) and mask.dim() == 2
    checks.vector("gat", "mask", mask, (g.num_edges, heads) if per_head else (g.num_edges,), acc, g.device)
    checks.choice("gat", "mask_on", mask_on, ("message", "logit"))
    checks.choice("gat", "mask_grad", mask_grad, ("kept", "all"))
    if mask_grad == "all":
        raise InputError('gat: mask_grad="all" is for ops that are linear in the mask; a softmax over existing edges is not')
    checks.probability("gat", "dropout", dropout)
    checks.integer("gat", "seed", seed, 0, 2**63 - 1)
    steps = checks.step("gat", step, g.device)
    arrays, flags = checks.kept_edges("gat", g, keep)
    tensors = z, a_src, a_dst, mask
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, *_ = backend.call(
        "gat", *arrays, *checks.contiguous(*tensors), flags, mask_on == "logit", negative_slope,
        dropout if training else 0.0, seed, *steps, save,
    )  # fmt: skip
    return y


@torch.library.register_fake("acefast::gat")
def _(rowptr, col, eid, colptr, row, ceid, z, a_src, a_dst, mask, keep, mask_on_logit, negative_slope, dropout, seed, step,
      step_at, save):  # fmt: skip
    y = z.new_empty(rowptr.size(0) - 1, *z.shape[1:])
    lse = torch.empty_like(a_dst)
    return y, lse, torch.empty_like(y) if save else z.new_empty(0), torch.empty_like(lse) if save else a_dst.new_empty(0)


@torch.library.register_fake("acefast::gat_bwd")
def _(rowptr, col, eid, colptr, row, ceid, dy, y, lse, slope_y, slope_sum, z, a_src, a_dst, mask, keep, mask_on_logit,
      negative_slope, dropout, seed, step, step_at, need_dmask):  # fmt: skip
    dmask = torch.empty_like(mask) if need_dmask else a_src.new_empty(0)
    return torch.empty_like(z), torch.empty_like(a_src), torch.empty_like(a_dst), dmask


def _save(ctx, inputs, output):
    *tensors, ctx.mask_on_logit, ctx.negative_slope, ctx.dropout, ctx.seed, ctx.step, step_at, ctx.save = inputs
    ctx.save_for_backward(*tensors, step_at, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dy, *_):
    *arrays, z, a_src, a_dst, mask, keep, step_at, y, lse, slope_y, slope_sum = ctx.saved_tensors
    if not ctx.save:
        raise RuntimeError("acefast::gat was called with save=False, so it has no gradient; call it with save=True")
    dz, da_src, da_dst, dmask = backend.call(
        "gat_bwd", *arrays, dy.contiguous(), y, lse, slope_y, slope_sum, z, a_src, a_dst, mask, keep,
        ctx.mask_on_logit, ctx.negative_slope, ctx.dropout, ctx.seed, ctx.step, step_at, ctx.needs_input_grad[9],
    )  # fmt: skip
    return *[None] * 6, dz, da_src, da_dst, dmask if ctx.needs_input_grad[9] else None, *[None] * 8


backend.register_autograd("gat", _backward, _save)

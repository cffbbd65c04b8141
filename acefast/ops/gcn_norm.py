"""gcn_norm: symmetric normalisation coefficients of a graph convolution."""

import torch
from torch import Tensor

from acefast.graph import Graph
from acefast.ops import backend, checks


def gcn_norm(
    g: Graph,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
    add_self_loops: bool | Tensor = True,
    degrees: str = "masked",
) -> tuple[Tensor, Tensor | None]:
    """Coefficients of D^-1/2 (A + I) D^-1/2 (Kipf & Welling, ICLR 2017, eq. 2) for every edge, removed ones too:

        c_e = d_i^-1/2 d_j^-1/2  for e: j->i,      c_self_i = l_i / d_i

    with d_i = sum of mask_e over the kept edges into i for degrees="masked" (the gradient of the mask goes through it),
    the number of all edges into i for degrees="static", plus l_i with add_self_loops, and c_self_i = l_i / d_i: l_i = 1, or
    the weights given. The mask itself is not in c_e: mask and keep go to `spmm`. d_i <= 0 gives weight 0 and gradient 0.

    Args:
        g: square graph (the in-degree is used on both sides, as in PyG).
        mask: [E] float32 or float64; without it edges count 1. keep: [E] bool or a selection; an edge counts only where
            True, in "masked".
        add_self_loops: True adds a loop of weight 1 to every node, whether it has one or not; a tensor [N] like the result
            gives the weights l (`Graph.missing_self_loops` tells which nodes have none); False adds none.
    Returns: (c [E], c_self [N] or None), in mask's dtype, float32 without mask. Differentiable in mask.
    Raises InputError for a bipartite graph and for a wrong shape, dtype, device or option. Bitwise deterministic.
    """
    checks.graph("gcn_norm", g)
    checks.square("gcn_norm", g, "the normalisation")
    checks.choice("gcn_norm", "degrees", degrees, ("masked", "static"))
    if mask is not None:
        expected = torch.float64 if mask.dtype == torch.float64 else torch.float32
        checks.vector("gcn_norm", "mask", mask, (g.num_edges,), expected, g.device)
    keep = checks.keep_flags("gcn_norm", g, keep)
    dtype = torch.float32 if mask is None else mask.dtype
    loops = add_self_loops if isinstance(add_self_loops, Tensor) else None
    if add_self_loops is True:
        loops = torch.ones(g.num_dst, dtype=dtype, device=g.device)
    checks.vector("gcn_norm", "add_self_loops", loops, (g.num_dst,), dtype, g.device)
    mask, loops = (None if t is None else t.contiguous() for t in (mask, loops))
    c, c_self, _ = backend.call("gcn_norm", *g.arrays, mask, keep, loops, degrees == "masked")
    return c, None if loops is None else c_self


@torch.library.register_fake("acefast::gcn_norm")
def _(rowptr, col, eid, colptr, row, ceid, mask, keep, loops, masked):
    dtype = torch.float32 if mask is None else mask.dtype
    nodes = rowptr.size(0) - 1
    return (
        col.new_empty(col.size(0), dtype=dtype),
        col.new_empty(0 if loops is None else nodes, dtype=dtype),
        col.new_empty(nodes, dtype=dtype),
    )


@torch.library.register_fake("acefast::gcn_norm_bwd")
def _(rowptr, col, eid, colptr, row, ceid, dinv, dc, dc_self, loops, keep):
    return torch.empty_like(dc)


def _save(ctx, inputs, output):
    *arrays, _, keep, loops, ctx.masked = inputs
    ctx.save_for_backward(*arrays, keep, loops, output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, dc, dc_self, _):
    *arrays, keep, loops, dinv = ctx.saved_tensors
    dmask = None
    if ctx.needs_input_grad[6]:
        dc_self = None if loops is None else dc_self.contiguous()
        if ctx.masked:
            dmask = backend.call("gcn_norm_bwd", *arrays, dinv, dc.contiguous(), dc_self, loops, keep)
        else:
            dmask = torch.zeros_like(dc)
    return *[None] * 6, dmask, None, None, None


backend.register_autograd("gcn_norm", _backward, _save)

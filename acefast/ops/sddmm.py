"""sddmm: one scalar product per edge, s_e = <p_dst(e), q_src(e)>."""

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.graph import Graph
from acefast.ops import backend, checks


def sddmm(g: Graph, p: Tensor, q: Tensor) -> Tensor:
    """Sampled dense-dense product: s_e = <p_i, q_j> for every edge e: j->i, per head.

    Args:
        g: graph with N_src sources, N_dst destinations, E edges.
        p: [N_dst, F] or [N_dst, H, F]; q: [N_src, F] or [N_src, H, F], same dtype. Both differentiable, twice.
    Returns: s [E] or [E, H] in the caller's edge order, float32 (float64 for float64 inputs).
    Raises InputError for a wrong shape, dtype or device. Bitwise deterministic.
    """
    checks.graph("sddmm", g)
    checks.features("sddmm", "p", p, g.num_dst, g.device, dims=(2, 3))
    checks.features("sddmm", "q", q, g.num_src, g.device, dims=(2, 3))
    if p.shape[1:] != q.shape[1:] or p.dtype != q.dtype:
        raise InputError(
            f"sddmm: p and q must agree but in their rows, got {list(p.shape)} {p.dtype} and {list(q.shape)} {q.dtype}"
        )
    return backend.call("sddmm", *g.arrays, p.contiguous(), q.contiguous())


@torch.library.register_fake("acefast::sddmm")
def _(rowptr, col, eid, colptr, row, ceid, p, q):
    return p.new_empty((col.size(0), *p.shape[1:-1]), dtype=checks.accumulator(p.dtype))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, ds):
    """dp_i = sum over e into i of ds_e q_j and dq_j = sum over e out of j of ds_e p_i: two sparse products per head."""
    *arrays, p, q = ctx.saved_tensors
    transposed = (*arrays[3:], *arrays[:3])

    def product(side, features, coefficient):
        if features.dim() == 2:
            return backend.call("spmm", *side, features, coefficient.contiguous(), None, None, None, None, False)
        return torch.stack([product(side, *pair) for pair in zip(features.unbind(1), coefficient.unbind(1))], 1)

    def contiguous_heads(t):
        return t if t.dim() == 2 else t.transpose(0, 1).contiguous().transpose(0, 1)

    dp = product(arrays, contiguous_heads(q), ds) if ctx.needs_input_grad[6] else None
    dq = product(transposed, contiguous_heads(p), ds) if ctx.needs_input_grad[7] else None
    return *[None] * 6, dp, dq


backend.register_autograd("sddmm", _backward, _save)

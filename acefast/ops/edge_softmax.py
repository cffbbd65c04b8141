"""edge_softmax: the softmax of edge scores over the edges into each destination."""

import torch
from torch import Tensor

from acefast.graph import Graph, Selection
from acefast.ops import backend, checks


def edge_softmax(g: Graph, s: Tensor, keep: Tensor | Selection | None = None) -> Tensor:
    """Normalise scores over the kept edges into each destination, per head:

        a_e = exp(s_e) / sum_{e' into dst(e), keep_e'} exp(s_e')

    Args:
        g: graph with E edges.
        s: scores [E] or [E, H] in the caller's edge order; any float dtype, computed in float32 (float64 for float64).
            Differentiable.
        keep: [E] bool, or a prepared `Graph.select`; an edge with False does not exist: its a and gradient are 0.
    Returns: a like s. Raises InputError for a wrong shape, dtype or device. Bitwise deterministic.
    """
    checks.graph("edge_softmax", g)
    checks.features("edge_softmax", "s", s, g.num_edges, g.device, dims=(1, 2))
    arrays, flags = checks.kept_edges("edge_softmax", g, keep)
    wide = s.to(checks.accumulator(s.dtype)).contiguous()
    return backend.call("edge_softmax", *arrays, wide, flags).to(s.dtype)


@torch.library.register_fake("acefast::edge_softmax")
def _(rowptr, col, eid, colptr, row, ceid, s, keep):
    return torch.empty_like(s)


@torch.library.register_fake("acefast::edge_softmax_bwd")
def _(rowptr, col, eid, colptr, row, ceid, a, da, keep):
    return torch.empty_like(a)


def _save(ctx, inputs, output):
    *arrays, _, keep = inputs
    ctx.save_for_backward(*arrays, output, keep)


def _backward(ctx, da):
    *arrays, a, keep = ctx.saved_tensors
    return *[None] * 6, backend.call("edge_softmax_bwd", *arrays, a, da.contiguous(), keep), None


backend.register_autograd("edge_softmax", _backward, _save)

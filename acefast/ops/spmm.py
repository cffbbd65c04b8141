"""spmm: the masked sparse product, y_i = reduce over e: j->i of weight_e mask_e x_j."""

from functools import partial

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.graph import Graph, Selection
from acefast.ops import backend, checks


def spmm(
    g: Graph,
    x: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    keep: Tensor | Selection | None = None,
    self_weight: Tensor | None = None,
    reduce: str = "sum",
    mask_grad: str = "kept",
    pruned: str = "absent",
) -> Tensor:
    """Aggregate source rows into destination rows along the kept edges:

        sum, mean:  y_i = s_i * sum_{e: j->i, keep_e} weight_e * mask_e * x_j  +  self_weight_i * x_i
        max, min:   y_i = max (min)_{e: j->i, keep_e} weight_e * mask_e * x_j,  per column

    with s_i = 1 for the sum and 1 / n_i for the mean, n_i the number of edges into i that exist (at least 1): the kept ones
    for pruned="absent", all of them for pruned="in_denominator". For sums the two meanings of a pruned edge coincide; for
    max and min a removed edge "in_denominator" would be a message 0 and is not offered. Rows without edges give 0.

    Args:
        g: graph with N_src sources, N_dst destinations, E edges.
        x: features [N_src, F] or, with heads, [N_src, H, F]; float32, float64, float16 or bfloat16; the output has its
            dtype, sums run in float32 (float64 for float64). Differentiable, for sum and mean twice.
        weight: [E] coefficients, float32 (float64 with float64 x), caller's edge order. Differentiable as x is.
        mask: [E] like weight; multiplies. Differentiable as x is. With heads weight and mask are both [E] or both [E, H];
            [E, H] is for sum and mean.
        keep: [E] bool, or a prepared `Graph.select`; an edge with False does not exist in this call.
        self_weight: [N], square graphs only; the coefficient of an added self-loop, outside of the mean. Differentiable.
            Not for max and min.
        mask_grad: "kept" gives removed edges gradient 0; "all" gives a removed edge's mask the derivative it would have
            if it were kept with its mask at the current coefficients (sum and mean).
    Of equal extremes the first in the caller's order takes the gradient.
    Returns: y [N_dst, F] or [N_dst, H, F]. Raises InputError for a wrong shape, dtype, device or option. Bitwise
    deterministic.
    """
    checks.graph("spmm", g)
    checks.features("spmm", "x", x, g.num_src, g.device, dims=(2, 3))
    checks.choice("spmm", "reduce", reduce, ("sum", "mean", "max", "min"))
    checks.choice("spmm", "mask_grad", mask_grad, ("kept", "all"))
    checks.choice("spmm", "pruned", pruned, ("absent", "in_denominator"))
    acc = checks.accumulator(x.dtype)
    per_head = x.dim() == 3 and any(isinstance(t, Tensor) and t.dim() == 2 for t in (weight, mask))
    edge_shape = (g.num_edges, x.size(1)) if per_head else (g.num_edges,)
    checks.vector("spmm", "weight", weight, edge_shape, acc, g.device)
    checks.vector("spmm", "mask", mask, edge_shape, acc, g.device)
    checks.vector("spmm", "self_weight", self_weight, (g.num_dst,), acc, g.device)
    if self_weight is not None:
        checks.square("spmm", g, "self_weight")
    arrays, flags = checks.kept_edges("spmm", g, keep, mask_grad == "all")
    weight, mask, self_weight = checks.contiguous(weight, mask, self_weight)
    features = x.contiguous() if per_head else x.contiguous().flatten(1)
    if reduce in ("max", "min"):
        for name, asked in (
            ("self_weight", self_weight is not None),
            ("a mask or weight per head", per_head),
            ('mask_grad="all"', mask_grad == "all"),
            ('pruned="in_denominator"', pruned == "in_denominator"),
        ):
            if asked:
                raise InputError(f"spmm: {name} is for reduce sum and mean, got reduce={reduce!r}")
        y, _ = backend.call("spmm_max", *arrays, features, weight, mask, flags, reduce == "max")
        return y.reshape(g.num_dst, *x.shape[1:])
    row_scale = None
    if reduce == "mean":
        count = checks.kept_in_degrees(g, keep if pruned == "absent" else None)
        row_scale = count.clamp(min=1).to(acc).reciprocal()
    y = backend.call("spmm", *arrays, features, weight, mask, flags, self_weight, row_scale, mask_grad == "all")
    return y.reshape(g.num_dst, *x.shape[1:])


@torch.library.register_fake("acefast::spmm")
def _(rowptr, col, eid, colptr, row, ceid, x, weight, mask, keep, self_weight, row_scale, all_edges):
    return x.new_empty(rowptr.size(0) - 1, *x.shape[1:])


@torch.library.register_fake("acefast::spmm_bwd")
def _(rowptr, col, eid, colptr, row, ceid, dy, x, weight, mask, keep, self_weight, row_scale, need_dx, need_dcoef,
      all_edges):  # fmt: skip
    acc = checks.accumulator(x.dtype)
    edges = checks.num_edges(col, weight, mask, keep)
    dcoef = (edges, x.size(1)) if x.dim() == 3 else (edges,)
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        x.new_empty(dcoef if need_dcoef else 0, dtype=acc),
        x.new_empty(x.size(0) if need_dcoef and self_weight is not None else 0, dtype=acc),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.all_edges = inputs
    ctx.save_for_backward(*tensors)


def _product_rule(dcoef, weight, mask, keep, all_edges, need_weight, need_mask):
    """(dweight, dmask) from the gradient of weight * mask; the weight of a removed edge never has one."""
    dmask = (dcoef if weight is None else dcoef * weight) if need_mask else None
    dweight = (dcoef if mask is None else dcoef * mask) if need_weight else None
    if dweight is not None and all_edges and keep is not None:
        dweight = torch.where(keep if dweight.dim() == 1 else keep.unsqueeze(1), dweight, 0.0)
    return dweight, dmask


def _backward(ctx, dy):
    *arrays, x, weight, mask, keep, self_weight, row_scale = ctx.saved_tensors
    need_x, need_weight, need_mask, _, need_self = ctx.needs_input_grad[6:11]
    dx, dcoef, dself = backend.call(
        "spmm_bwd", *arrays, dy.contiguous(), x, weight, mask, keep, self_weight, row_scale,
        need_x, need_weight or need_mask or need_self, ctx.all_edges,
    )  # fmt: skip
    dweight, dmask = _product_rule(dcoef, weight, mask, keep, ctx.all_edges, need_weight, need_mask)
    if dweight is dmask and dmask is not None:
        dweight = dmask.clone()
    return *[None] * 6, dx if need_x else None, dweight, dmask, None, dself if need_self else None, None, None


backend.register_autograd("spmm", _backward, _save)


def _bwd_save(ctx, inputs, output):
    *tensors, ctx.need_dx, ctx.need_dcoef, ctx.all_edges = inputs
    ctx.save_for_backward(*tensors)


def _bwd_backward(ctx, gdx, gdcoef, gdself):
    """Both outputs of spmm_bwd are bilinear: in (dy, weight * mask, self_weight) and in (dy, x)."""
    *arrays, dy, x, weight, mask, keep, self_weight, row_scale = ctx.saved_tensors
    spmm_op, bwd_op = partial(backend.call, "spmm"), partial(backend.call, "spmm_bwd")
    has_self = self_weight is not None
    ddy = ddx = dweight = dmask = dself_weight = None
    if ctx.need_dx:
        gdx = gdx.contiguous()
        ddy = spmm_op(*arrays, gdx, weight, mask, keep, self_weight, row_scale, False)
        _, dcoef, dself_weight = bwd_op(*arrays, dy, gdx, weight, mask, keep, self_weight, row_scale, False, True, False)
        need_weight, need_mask = weight is not None, mask is not None
        dweight, dmask = _product_rule(dcoef, weight, mask, keep, False, need_weight, need_mask)
    if ctx.need_dcoef:
        gdcoef, gdself = gdcoef.contiguous(), gdself.contiguous() if has_self else None
        existing = None if ctx.all_edges else keep
        from_coef = spmm_op(*arrays, x, gdcoef, None, existing, gdself, row_scale, False)
        ddy = from_coef if ddy is None else ddy + from_coef
        ddx, _, _ = bwd_op(*arrays, dy, x, gdcoef, None, existing, gdself, row_scale, True, False, False)
    return *[None] * 6, ddy, ddx, dweight, dmask, None, dself_weight if has_self else None, None, None, None, None


backend.register_autograd("spmm_bwd", _bwd_backward, _bwd_save)


@torch.library.register_fake("acefast::spmm_max")
def _(rowptr, col, eid, colptr, row, ceid, x, weight, mask, keep, largest):
    y = x.new_empty(rowptr.size(0) - 1, x.size(1))
    return y, torch.empty_like(y, dtype=col.dtype)


@torch.library.register_fake("acefast::spmm_max_bwd")
def _(rowptr, col, eid, colptr, row, ceid, dy, arg, x, weight, mask, keep, need_dx, need_dcoef):
    edges = checks.num_edges(col, weight, mask, keep)
    dcoef = x.new_empty(edges if need_dcoef else 0, dtype=checks.accumulator(x.dtype))
    return torch.empty_like(x) if need_dx else x.new_empty(0), dcoef


def _max_save(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _max_backward(ctx, dy, _):
    *arrays, x, weight, mask, keep, arg = ctx.saved_tensors
    need_x, need_weight, need_mask = ctx.needs_input_grad[6:9]
    dx, dcoef = backend.call(
        "spmm_max_bwd", *arrays, dy.contiguous(), arg, x, weight, mask, keep, need_x, need_weight or need_mask
    )
    dweight, dmask = _product_rule(dcoef, weight, mask, keep, False, need_weight, need_mask)
    if dweight is dmask and dmask is not None:
        dweight = dmask.clone()
    return *[None] * 6, dx if need_x else None, dweight, dmask, None, None


backend.register_autograd("spmm_max", _max_backward, _max_save)

"""gen: generalised message aggregation with learned softmax or power mean, and the edge encoder inside."""

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.graph import Graph, Selection
from acefast.ops import backend, checks, reference

_CODES = {
    "sum": reference.SUM,
    "mean": reference.SUM,
    "softmax": reference.SOFTMAX,
    "softmax_sg": reference.SOFTMAX_SG,
    "softmax_sum": reference.SOFTMAX,
    "power": reference.POWER,
    "max": reference.MAX,
}
AGGREGATIONS = tuple(_CODES)


def gen(
    g: Graph,
    x: Tensor,
    edge_attr: Tensor | None = None,
    encoder_weight: Tensor | None = None,
    encoder_bias: Tensor | None = None,
    mask: Tensor | None = None,
    keep: Tensor | Selection | None = None,
    aggr: str = "softmax",
    t: float | Tensor = 1.0,
    p: float | Tensor = 1.0,
    s: float | Tensor = 0.0,
    eps: float = 1e-7,
    mask_grad: str = "kept",
    pruned: str = "absent",
) -> Tensor:
    """Message aggregation of GENConv (Li et al., DeeperGCN, 2020, eqs. 3-7) with a mask on each message:

        r_e = relu(x_j + edge_e) + eps,    msg_e = r_e * mask_e          for the kept edges e: j->i, per column
        sum, mean     y_i = sum or mean of msg_e
        softmax       y_i = sum_e b_e msg_e,  b_e = softmax of t * msg_e over the edges into i
        softmax_sg    the same, where b_e carries no gradient
        softmax_sum   degree_i^sigmoid(s) times the softmax aggregation
        power         y_i = (mean of clamp(msg_e, 1e-7, 10)^p)^(1/p)
        max           y_i = max of msg_e; of equal ones the first in the caller's order takes the gradient

    A removed edge does not exist with pruned="absent". With "in_denominator", what the reference code of the paper does, it
    stays with message 0: in the softmax's denominator (as exp(0)), in the count of mean, power and degree, in the maximum
    (as 0); that costs no visit. A row without edges gives 0. Nothing of size E x F is made.

    Args:
        g: graph with N_src sources, N_dst destinations, E edges.
        x: features [N_src, F], float32, float64, float16 or bfloat16; the output has its dtype. Differentiable.
        edge_attr: edge_e itself, [E, F] in x's dtype (differentiable); or, with encoder_weight, raw features [E, D] (constant).
        encoder_weight, encoder_bias: [F, D] and [F], float32 (float64 with float64 x): edge_e = W f_e + b, computed inside the
            kernel. Differentiable. Two linear encoders with nothing between them are one, with the product of their weights.
        mask: [E], float32 (float64 with float64 x), caller's edge order. Differentiable.
        keep: [E] bool, or a prepared `Graph.select`.
        t, p: number or tensor with 1 or F elements; p not 0. s: number or tensor with 1 element. Differentiable.
        mask_grad: "all" also gives the mask of a removed edge its derivative: for sum and mean what it would be if the edge
            were kept; for the softmax family with pruned="in_denominator" the derivative at message 0,
            sum_c dy_ic r_ec exp(-lse_ic) (1 - t y_ic) with lse the log of the softmax's denominator.
    Returns: y [N_dst, F]. Raises InputError for a wrong shape, dtype, device or option. Bitwise deterministic.
    """
    checks.graph("gen", g)
    checks.features("gen", "x", x, g.num_src, g.device)
    checks.choice("gen", "aggr", aggr, AGGREGATIONS)
    checks.choice("gen", "mask_grad", mask_grad, ("kept", "all"))
    checks.choice("gen", "pruned", pruned, ("absent", "in_denominator"))
    acc, width = checks.accumulator(x.dtype), x.size(1)
    _check_edges(g, x, edge_attr, encoder_weight, encoder_bias, acc)
    checks.vector("gen", "mask", mask, (g.num_edges,), acc, g.device)
    code, absent = _CODES[aggr], pruned == "absent"
    if mask_grad == "all" and not (code == reference.SUM or (code in (reference.SOFTMAX, reference.SOFTMAX_SG) and not absent)):
        raise InputError(
            f'gen: mask_grad="all" is for sum and mean, and for the softmax aggregations with pruned="in_denominator", '
            f"got aggr={aggr!r} with pruned={pruned!r}"
        )
    arrays, flags = checks.kept_edges("gen", g, keep, mask_grad == "all")
    count = removed = row_scale = param = None
    if aggr in ("mean", "power", "softmax_sum") or not absent:
        kept = checks.kept_in_degrees(g, keep)
        count = kept if absent else g.in_degrees()
        removed = None if absent or keep is None else g.in_degrees() - kept
    if aggr in ("mean", "power"):
        row_scale = count.clamp(min=1).to(acc).reciprocal()
    if code in (reference.SOFTMAX, reference.SOFTMAX_SG):
        param = _per_column("t", t, width, acc, g.device)
    elif code == reference.POWER:
        param = _per_column("p", p, width, acc, g.device)
    y, _ = backend.call(
        "gen", *arrays, *checks.contiguous(x, edge_attr, encoder_weight, encoder_bias, mask), flags, param, row_scale, removed,
        code, eps, mask_grad == "all",
    )  # fmt: skip
    if aggr == "softmax_sum":
        power = torch.sigmoid(_per_column("s", s, 1, acc, g.device))
        y = (y * count.to(acc).unsqueeze(1).pow(power)).to(x.dtype)
    return y


def _check_edges(g, x, edge_attr, weight, bias, acc):
    if weight is None:
        if bias is not None:
            raise InputError("gen: encoder_bias needs encoder_weight")
        checks.vector("gen", "edge_attr", edge_attr, (g.num_edges, x.size(1)), x.dtype, g.device)
        return
    if edge_attr is None:
        raise InputError("gen: encoder_weight needs edge_attr, the raw edge features [E, D]")
    if not isinstance(edge_attr, Tensor) or edge_attr.dim() != 2:
        raise InputError(f"gen: edge_attr must have shape [{g.num_edges}, D]")
    checks.vector("gen", "edge_attr", edge_attr, (g.num_edges, edge_attr.size(1)), x.dtype, g.device)
    checks.vector("gen", "encoder_weight", weight, (x.size(1), edge_attr.size(1)), acc, g.device)
    checks.vector("gen", "encoder_bias", bias, (x.size(1),), acc, g.device)
    if edge_attr.requires_grad:
        raise InputError("gen: edge_attr is constant with encoder_weight; give edge_attr.detach(), or edge_e [E, F] itself")


def _per_column(name: str, value, width: int, dtype: torch.dtype, device) -> Tensor:
    """A number or a tensor with 1 or `width` elements as a contiguous tensor [width]; the gradient flows through it."""
    if not isinstance(value, Tensor):
        return torch.full((width,), value, dtype=dtype, device=device)
    if value.numel() not in (1, width):
        raise InputError(f"gen: {name} must be a number or a tensor with 1 or {width} elements, got {list(value.shape)}")
    checks.same_device("gen", name, value, device)
    return value.reshape(-1).to(dtype).expand(width).contiguous()


@torch.library.register_fake("acefast::gen")
def _(rowptr, col, eid, colptr, row, ceid, x, edge, weight, bias, mask, keep, param, row_scale, removed, aggr, eps, all_edges):
    y = x.new_empty(rowptr.size(0) - 1, x.size(1))
    if aggr == reference.MAX:
        return y, torch.empty_like(y, dtype=col.dtype)
    softmax = aggr in (reference.SOFTMAX, reference.SOFTMAX_SG)
    acc = checks.accumulator(x.dtype)
    return y, torch.empty_like(y, dtype=acc) if softmax else x.new_empty(0, dtype=acc)


@torch.library.register_fake("acefast::gen_bwd")
def _(rowptr, col, eid, colptr, row, ceid, dy, y, stat, x, edge, weight, bias, mask, keep, param, row_scale, removed, aggr,
      eps, need_dx, need_dmask, need_dedge, need_dparam, all_edges):  # fmt: skip
    acc = checks.accumulator(x.dtype)
    wide = x.new_empty(0, dtype=acc)
    dedge = edge if weight is None else weight
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        torch.empty_like(mask) if need_dmask else wide,
        torch.empty_like(dedge) if need_dedge else (x.new_empty(0) if weight is None else torch.empty_like(wide)),
        torch.empty_like(bias) if need_dedge and bias is not None else torch.empty_like(wide),
        torch.empty_like(param) if need_dparam else torch.empty_like(wide),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.aggr, ctx.eps, ctx.all_edges = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _):
    *arrays, x, edge, weight, bias, mask, keep, param, row_scale, removed, y, stat = ctx.saved_tensors
    need_x, need_edge, need_weight, need_bias, need_mask, _, need_param = ctx.needs_input_grad[6:13]
    need_encoder = need_weight or need_bias
    dx, dmask, dedge, dbias, dparam = backend.call(
        "gen_bwd", *arrays, dy.contiguous(), y, stat, x, edge, weight, bias, mask, keep, param, row_scale, removed,
        ctx.aggr, ctx.eps, need_x, need_mask, need_edge or need_encoder, need_param, ctx.all_edges,
    )  # fmt: skip
    return (
        *[None] * 6,
        dx if need_x else None,
        dedge if need_edge else None,
        dedge if need_weight else None,
        dbias if need_bias else None,
        dmask if need_mask else None,
        None,
        dparam if need_param else None,
        *[None] * 5,
    )


backend.register_autograd("gen", _backward, _save)

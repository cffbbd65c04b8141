"""masked_linear: y = x (W * m)^T + b with x dense or sparse and W sparse where a keep pattern is given."""

import torch
from torch import Tensor

from acefast.csr import CSR
from acefast.errors import InputError
from acefast.kept import KeptWeights
from acefast.ops import backend, checks


def masked_linear(
    x: Tensor | CSR,
    weight: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    keep: Tensor | KeptWeights | None = None,
    mask_grad: str = "kept",
) -> Tensor:
    """y_no = sum_k x_nk W_ok m_ok [keep_ok] + b_o.

    Args:
        x: dense [N, K], differentiable, or acefast.CSR [N, K], constant.
        weight: [O, K] of x's dtype, differentiable; with CSR x and no masks one that lies transposed in memory
            (weight.t() contiguous) is multiplied as it lies, by `spmm`. mask: [O, K] float32 (float64 with float64), differentiable.
        bias: [O] like mask, differentiable.
        keep: [O, K] bool, or the same as KeptWeights; a weight with False does not exist: its gradient is 0, and its mask's
            too unless mask_grad is "all", which gives the derivative that the mask would have if the weight were kept.
    Returns: y [N, O] of x's dtype. Raises InputError for a wrong shape, dtype, device or option. Native CPU kernels
    are bitwise deterministic for any number of threads; on the reference and on CUDA, dense x is as deterministic as
    torch's matrix product.
    """
    sparse = isinstance(x, CSR)
    if not sparse and (not isinstance(x, Tensor) or x.dim() != 2 or x.dtype not in checks.FEATURE_DTYPES):
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"masked_linear: x must be a floating-point tensor [N, K] or an acefast.CSR, got {got}")
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.size(1) != x.shape[1]:
        got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise InputError(f"masked_linear: weight must have shape [*, {x.shape[1]}], got {got}")
    acc, shape, device = checks.accumulator(x.dtype), weight.shape, x.device
    kept = keep if isinstance(keep, KeptWeights) else None
    keep = keep if kept is None else kept.keep
    checks.vector("masked_linear", "weight", weight, shape, x.dtype, device)
    checks.vector("masked_linear", "mask", mask, shape, acc, device)
    checks.vector("masked_linear", "bias", bias, shape[:1], acc, device)
    checks.vector("masked_linear", "keep", keep, shape, torch.bool, device)
    checks.choice("masked_linear", "mask_grad", mask_grad, ("kept", "all"))
    turned = weight.t().is_contiguous() and not weight.is_contiguous()
    if kept is not None and kept.values is not None:
        if not sparse or mask is not None:
            weight, turned = kept.spread(kept.values, torch.zeros_like(weight)), False
        else:
            turned = None
    if sparse and mask is None and kept is not None:
        flat = kept.values if turned is None else weight.t().reshape(-1) if turned else weight.reshape(-1)
        lists = (kept.ptr, kept.out, kept.places(turned))
        return backend.call(
            "masked_linear_kept", x.rowptr, x.col, x.value, *x.transpose_arrays(), flat, *lists, bias, shape[0], kept.tiled(x)
        )
    if sparse and mask is None and keep is None and x.dtype == acc and turned:
        y = backend.call("spmm", *x.graph().arrays, weight.t(), x.value, None, None, None, None, False)
        return y if bias is None else y + bias
    rest = [None if t is None else t.contiguous() for t in (weight, mask, bias, keep)]
    if sparse:
        return backend.call(
            "masked_linear_csr", x.rowptr, x.col, x.value, *x.transpose_arrays(), *rest, mask_grad == "all"
        )
    return backend.call("masked_linear", x.contiguous(), *rest, mask_grad == "all")


@torch.library.register_fake("acefast::masked_linear")
def _(x, weight, mask, bias, keep, all_weights):
    return x.new_empty(x.size(0), weight.size(0))


@torch.library.register_fake("acefast::masked_linear_bwd")
def _(dy, x, weight, mask, keep, need_dx, need_dw, all_weights):
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        torch.empty_like(weight) if need_dw else weight.new_empty(0),
    )


@torch.library.register_fake("acefast::masked_linear_csr")
def _(rowptr, col, value, colptr, row, cvalue, weight, mask, bias, keep, all_weights):
    return value.new_empty(rowptr.size(0) - 1, weight.size(0))


@torch.library.register_fake("acefast::masked_linear_csr_bwd")
def _(rowptr, col, value, colptr, row, cvalue, dy, weight, mask, keep, all_weights):
    return torch.empty_like(weight)


def _save(ctx, inputs, output):
    *tensors, ctx.all_weights = inputs
    ctx.save_for_backward(*tensors)


def _product_rule(dw, weight, mask, keep, all_weights, need_weight, need_mask):
    """(dweight, dmask) from the gradient of weight * mask; a removed weight itself never has one."""
    dmask = (dw * weight).to(mask.dtype) if need_mask else None
    dweight = None
    if need_weight:
        dweight = dw if mask is None else (dw * mask).to(weight.dtype)
        if all_weights and keep is not None:
            dweight = torch.where(keep, dweight, 0.0)
    return dweight, dmask


def _bias_gradient(dy, bias, need):
    return _column_sums(dy, bias.dtype) if need else None


def _column_sums(dy, dtype):
    """dy.sum(0), on a GPU in two steps: torch sums the rows of a tall matrix with few threads."""
    rows = dy.size(0) // 64
    if not dy.is_cuda or rows < 64:
        return dy.sum(0, dtype=dtype)
    tall = dy[: 64 * rows].reshape(64, -1).sum(0, dtype=dtype).view(rows, -1)
    return tall.sum(0) + dy[64 * rows :].sum(0, dtype=dtype)


def _backward(ctx, dy):
    x, weight, mask, bias, keep = ctx.saved_tensors
    need_x, need_weight, need_mask, need_bias = ctx.needs_input_grad[:4]
    dx, dw = backend.call(
        "masked_linear_bwd", dy.contiguous(), x, weight, mask, keep, need_x, need_weight or need_mask, ctx.all_weights
    )
    dweight, dmask = _product_rule(dw, weight, mask, keep, ctx.all_weights, need_weight, need_mask)
    return dx if need_x else None, dweight, dmask, _bias_gradient(dy, bias, need_bias), None, None


def _csr_backward(ctx, dy):
    *arrays, weight, mask, bias, keep = ctx.saved_tensors
    need_weight, need_mask, need_bias = ctx.needs_input_grad[6:9]
    dweight = dmask = None
    if need_weight or need_mask:
        dw = backend.call("masked_linear_csr_bwd", *arrays, dy.contiguous(), weight, mask, keep, ctx.all_weights)
        dweight, dmask = _product_rule(dw, weight, mask, keep, ctx.all_weights, need_weight, need_mask)
    return *[None] * 6, dweight, dmask, _bias_gradient(dy, bias, need_bias), None, None


@torch.library.register_fake("acefast::masked_linear_kept")
def _(rowptr, col, value, colptr, row, cvalue, weight, ptr, out, place, bias, outputs, tiled):
    return value.new_empty(rowptr.size(0) - 1, outputs)


@torch.library.register_fake("acefast::masked_linear_kept_bwd")
def _(rowptr, col, value, colptr, row, cvalue, dy, weight, ptr, out, place):
    return torch.empty_like(weight)


def _kept_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-2])


def _kept_backward(ctx, dy):
    *arrays, weight, ptr, out, place, bias = ctx.saved_tensors
    dw = None
    if ctx.needs_input_grad[6]:
        dw = backend.call("masked_linear_kept_bwd", *arrays, dy.contiguous(), weight, ptr, out, place)
    return *[None] * 6, dw, None, None, None, _bias_gradient(dy, bias, ctx.needs_input_grad[10]), None, None


backend.register_autograd("masked_linear_kept", _kept_backward, _kept_save)
backend.register_autograd("masked_linear", _backward, _save)
backend.register_autograd("masked_linear_csr", _csr_backward, _save)

"""relu_dropout and elu_dropout: activation then dropout in one pass, with counter-based noise."""

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.ops import backend, checks


def relu_dropout(x: Tensor, p: float, seed: int, step: int | Tensor, rows: Tensor | None = None) -> Tensor:
    """y_n = max(x_n, 0) / (1 - p) where element n is kept, else 0; n is the flat (row-major) element number.

    n is kept iff r_n >= floor(p 2^32), r_n = word n mod 4 of Philox4x32-10 (Salmon et al., SC 2011) with the counter
    (n div 4, step) and the key `seed`: the same noise on every backend and thread count. p = 1 gives 0.

    Args: x any shape, float32, float64, float16 or bfloat16, differentiable; 0 <= p <= 1; 0 <= seed, step < 2^63.
        step: or an int64 tensor [1] on x's device, which is read when the kernel runs (and not checked to be >= 0): a captured
            CUDA graph then has other noise at each replay.
        rows: int64 [N], not negative, where x [N, ...] is those rows of a larger tensor (the nodes of a `Block`): its
            elements then have the numbers, and so the noise, that they have there.
    Returns: y like x. Raises InputError for a wrong shape, dtype or value.
    """
    return _call("relu_dropout", x, p, seed, step, rows)


def elu_dropout(x: Tensor, p: float, seed: int, step: int | Tensor, rows: Tensor | None = None) -> Tensor:
    """y_n = elu(x_n) / (1 - p) where element n is kept, else 0; elu(x) = x above 0, exp(x) - 1 elsewhere (Clevert et al.,
    ICLR 2016).

    Noise, arguments, result and errors as of :func:`relu_dropout`.
    """
    return _call("elu_dropout", x, p, seed, step, rows)


def _call(op, x, p, seed, step, rows):
    if not isinstance(x, Tensor) or x.dtype not in checks.FEATURE_DTYPES:
        raise InputError(f"{op}: x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    checks.probability(op, "p", p)
    checks.integer(op, "seed", seed, 0, 2**63 - 1)
    steps = checks.step(op, step, x.device)
    if rows is not None:
        checks.vector(op, "rows", rows, tuple(x.shape[:1]), torch.int64, x.device)
        rows = rows.contiguous()
    return backend.call(op, x.contiguous(), rows, float(p), seed, *steps)


def _save(ctx, inputs, output):
    ctx.p = inputs[2]
    ctx.save_for_backward(output)


def _register(op):
    @torch.library.register_fake(f"acefast::{op}")
    def _(x, rows, p, seed, step, step_at):
        return torch.empty_like(x)

    @torch.library.register_fake(f"acefast::{op}_bwd")
    def _(dy, y, p):
        return torch.empty_like(dy)

    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return backend.call(f"{op}_bwd", dy.contiguous(), y, ctx.p), *[None] * 5

    backend.register_autograd(op, backward, _save)


_register("relu_dropout")
_register("elu_dropout")

"""Dropout whose noise is a function of seed, step and element, on dense rows and sparse matrices."""

import torch
from torch import Tensor

from acefast import ops
from acefast.csr import CSR


def dropout(x: Tensor | CSR, p: float, seed: int, step: int | Tensor, rows: Tensor | None = None) -> Tensor | CSR:
    """x / (1 - p) where the element is kept, else 0, with the noise of ``ops.relu_dropout``.

    x [N, F] dense, ``rows`` int64 [N] as there; or a CSR, whose entries are dropped (an entry's number, in the matrix that
    `CSR.take` took it from, addresses its noise). p = 0 gives x.
    """
    if p == 0:
        return x
    if isinstance(x, CSR):
        ones = torch.ones(x.nnz, 1, dtype=x.dtype, device=x.device)
        return x.with_values(x.value * ops.relu_dropout(ones, p, seed, step, x.entries).squeeze(1))
    return x * ops.relu_dropout(torch.ones_like(x, requires_grad=False), p, seed, step, rows)

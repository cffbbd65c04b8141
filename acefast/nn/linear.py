"""A linear layer whose weight carries a soft mask and a keep pattern."""

import math

import torch
from torch import Tensor, nn

from acefast import ops
from acefast.csr import CSR
from acefast.errors import InputError


class MaskedLinear(nn.Module):
    """y = x (W * m)^T + b over the kept weights.

    weight [out_features, in_features]; bias [out_features] or None. ``set_keep`` fixes a pattern for later calls, as
    ``Ticket.apply`` does; a pattern given to ``forward`` takes its place.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, generator=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer("keep", None, persistent=False)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Uniform in +-in_features^-1/2 for weight and bias, as torch.nn.Linear."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        for parameter in self.parameters(recurse=False):
            parameter.uniform_(-bound, bound, generator=generator)

    def set_keep(self, keep: Tensor | None) -> None:
        """Fix the pattern of existing weights, bool [out_features, in_features]; None keeps all."""
        if keep is not None and (keep.dtype != torch.bool or keep.shape != self.weight.shape):
            raise InputError(
                f"keep must be bool {list(self.weight.shape)}, got {keep.dtype} {list(keep.shape)}; give the "
                "pattern of this weight"
            )
        self.keep = keep

    def forward(self, x: Tensor | CSR, mask: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """x [N, in_features], dense or CSR; mask float, keep bool, both like weight -> [N, out_features], in the autocast
        region's dtype inside of one (dense x)."""
        weight = self.weight
        if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        return ops.masked_linear(x, weight, mask, self.bias, self.keep if keep is None else keep)

    def macs(self, x: CSR | int, keep: Tensor | None = None) -> int:
        """Multiply-accumulates of a call: of x dense with that many rows, rows · kept weights; of x sparse, the sum over kept
        weights (o, k) of the number of entries in column k of x."""
        kept = torch.ones_like(self.weight, dtype=torch.bool) if keep is None else keep
        if not isinstance(x, CSR):
            return x * int(kept.sum())
        return int((torch.bincount(x.col, minlength=x.shape[1]) * kept.sum(0)).sum())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

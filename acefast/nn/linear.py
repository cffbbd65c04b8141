"""A linear layer whose weight carries a soft mask and a keep pattern."""

import math

import torch
from torch import Tensor, nn

from acefast import ops
from acefast.csr import CSR
from acefast.errors import InputError


def region_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast region that the call is in; None outside of one."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


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

    def forward(
        self, x: Tensor | CSR, mask: Tensor | None = None, keep: Tensor | None = None, with_bias: bool = True
    ) -> Tensor:
        """x [N, in_features], dense or CSR; mask float, keep bool, both like weight -> [N, out_features]; without b where
        `with_bias` is False. Inside an autocast region y has the region's dtype: a dense x and the weight are narrowed before
        the product, of a CSR x the product is."""
        dtype, weight = region_dtype(x.device), self.weight
        if dtype is not None and isinstance(x, Tensor):
            x, weight = x.to(dtype), weight.to(dtype)
        y = ops.masked_linear(x, weight, mask, self.bias if with_bias else None, self.keep if keep is None else keep)
        return y if dtype is None else y.to(dtype)

    def macs(self, x: CSR | int, keep: Tensor | None = None) -> int:
        """Multiply-accumulates of a call: of x dense with that many rows, rows · kept weights; of x sparse, the sum over kept
        weights (o, k) of the number of entries in column k of x."""
        kept = torch.ones_like(self.weight, dtype=torch.bool) if keep is None else keep
        if not isinstance(x, CSR):
            return x * int(kept.sum())
        return int((torch.bincount(x.col, minlength=x.shape[1]) * kept.sum(0)).sum())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

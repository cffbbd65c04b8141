"""The pattern of a pruned weight, prepared once for many products."""

import torch
from torch import Tensor

from acefast.errors import InputError


class KeptWeights:
    """A keep pattern of a weight [O, K] with the kept entries listed by column; ops take it where they take `keep`, and products
    with a sparse x then cost as many multiplications as entries of x meet kept weights.

    Attributes (treat as read-only): keep bool [O, K]; ptr int64 [K+1], the entries of column k being ptr[k] .. ptr[k+1]; out
    int32 [P], the row of each entry, ascending within a column. Raises InputError for another dtype or shape of `keep`.
    """

    def __init__(self, keep: Tensor):
        if keep.dtype != torch.bool or keep.dim() != 2:
            raise InputError(f"KeptWeights: keep must be bool [O, K], got {keep.dtype} {list(keep.shape)}")
        columns, rows = keep.t().nonzero(as_tuple=True)
        self.keep, self.out = keep, rows.int()
        self.ptr = torch.zeros(keep.size(1) + 1, dtype=torch.int64, device=keep.device)
        torch.cumsum(torch.bincount(columns, minlength=keep.size(1)), 0, out=self.ptr[1:])
        self._columns = columns
        self._places: dict[bool, Tensor] = {}

    @property
    def shape(self) -> torch.Size:
        return self.keep.shape

    def places(self, turned: bool) -> Tensor:
        """Position of each entry in the memory of a weight [O, K] that lies row by row, or column by column (`turned`); int64
        [P]."""
        if turned not in self._places:
            rows, (outputs, inputs) = self.out.long(), self.shape
            self._places[turned] = self._columns * outputs + rows if turned else rows * inputs + self._columns
        return self._places[turned]

    @staticmethod
    def pays(keep: Tensor) -> bool:
        """Whether products with a sparse x by lists of the kept weights of `keep` are faster than dense ones. On the CPU an
        entry of x costs about 8 ns and 1 ns for each kept weight of its column by lists, 0.05 ns for each output by vectors
        (measured with AVX-512 at 256 and 512 outputs); no other device has a kernel for the lists."""
        if keep.device.type != "cpu" or not keep.numel():
            return False
        return int(keep.sum()) / keep.numel() < 0.05 - 8 / keep.size(0)

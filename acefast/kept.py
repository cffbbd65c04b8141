"""The pattern of a pruned weight, prepared once for many products."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from acefast.csr import CSR
from acefast.errors import InputError


class KeptWeights:
    """A keep pattern of a weight [O, K] with the kept entries listed by column; ops take it where they take `keep`, and products
    with a sparse x then cost as many multiplications as entries of x meet kept weights.

    Attributes (treat as read-only): keep bool [O, K]; ptr int64 [K+1], the entries of column k being ptr[k] .. ptr[k+1]; out
    int32 [P], the row of each entry, ascending within a column; values float [P] or None: the weights themselves in the
    lists' order, which then stand for the weight given to an op and take its gradient. Raises InputError for another dtype or
    shape of `keep`.
    """

    def __init__(self, keep: Tensor, values: Tensor | None = None):
        if keep.dtype != torch.bool or keep.dim() != 2:
            raise InputError(f"KeptWeights: keep must be bool [O, K], got {keep.dtype} {list(keep.shape)}")
        columns, rows = keep.t().nonzero(as_tuple=True)
        self.keep, self.out, self.values = keep, rows.int(), values
        self.ptr = torch.zeros(keep.size(1) + 1, dtype=torch.int64, device=keep.device)
        torch.cumsum(torch.bincount(columns, minlength=keep.size(1)), 0, out=self.ptr[1:])
        self._columns = columns
        self._places: dict[bool | None, Tensor] = {}
        self._tiled: WeakKeyDictionary[CSR, bool] = WeakKeyDictionary()

    @property
    def shape(self) -> torch.Size:
        return self.keep.shape

    def listed(self, weight: Tensor) -> Tensor:
        """The kept entries of `weight` [O, K] in the lists' order, [P]."""
        return weight[self.out.long(), self._columns]

    def spread(self, values: Tensor, over: Tensor) -> Tensor:
        """A copy of `over` [O, K] with `values` [P] at the kept entries; differentiable in `values`."""
        return over.index_put((self.out.long(), self._columns), values)

    def places(self, turned: bool | None) -> Tensor:
        """Position of each entry in the memory of a weight [O, K] that lies row by row, or column by column (`turned`), or of
        `values` (None); int64 [P]."""
        if turned not in self._places:
            rows, (outputs, inputs) = self.out.long(), self.shape
            if turned is None:
                self._places[turned] = torch.arange(rows.numel(), device=rows.device)
            else:
                self._places[turned] = self._columns * outputs + rows if turned else rows * inputs + self._columns
        return self._places[turned]

    def tiled(self, x: CSR) -> bool:
        """Whether products with x are made for as many rows of it at once as a vector has lanes, going by kept weights."""
        if x not in self._tiled:
            costs = _costs(self.ptr.diff(), self.shape[0], x)
            self._tiled[x] = costs["tiled"] < costs["lists"]
        return self._tiled[x]

    @staticmethod
    def pays(keep: Tensor, x: CSR) -> bool:
        """Whether products with x by lists of the kept weights of `keep` are faster than dense ones, on the CPU; no other
        device has a kernel for the lists. What tiles save must also outweigh the gradient, which has none."""
        if keep.device.type != "cpu" or not keep.numel() or not x.nnz:
            return False
        costs = _costs(keep.sum(0), keep.size(0), x)
        return costs["lists"] < costs["dense"] or 1.25 * costs["tiled"] < costs["dense"]


def _costs(kept: Tensor, outputs: int, x: CSR) -> dict[str, float]:
    """Nanoseconds that a row of the product takes each way (measured with AVX-512 at 128 to 512 outputs); kept [K]: the kept
    weights of each column. Columns that many rows of x have keep more of them than others, where a search chose."""
    entries = x.nnz / max(1, x.shape[0])
    met = float((kept * x.graph().colptr.diff()).sum()) / max(1, x.shape[0])  # kept weights that a row's entries meet
    return {
        "dense": entries * 0.05 * outputs,
        "lists": entries * 8 + met,
        "tiled": entries + 0.05 * kept.numel() + 0.25 * outputs + 0.037 * float(kept.sum()),
    }

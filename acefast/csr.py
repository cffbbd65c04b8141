"""A constant sparse matrix as a small record of dense tensors (bag-of-words features are 1 % dense)."""

import copy

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.graph import Graph


class CSR:
    """Sparse matrix [rows, cols] in compressed row form: `rowptr` int64 [rows+1], `col` int32 or int64 [nnz], `value`
    float [nnz]. Constant: no gradient flows to it. Its transpose, which backward needs, is made once and kept.
    `entries` int64 [nnz], of a matrix made by `take`: the number of each entry in the one it was taken from; else None.

    Raises InputError where the arrays do not describe such a matrix.
    """

    def __init__(self, rowptr: Tensor, col: Tensor, value: Tensor, shape: tuple[int, int]):
        rows, cols = (int(n) for n in shape)
        if rowptr.dim() != 1 or rowptr.numel() != rows + 1 or rowptr.dtype != torch.int64:
            raise InputError(f"CSR: rowptr must be int64 [{rows + 1}], got {rowptr.dtype} {list(rowptr.shape)}")
        if col.dim() != 1 or col.dtype not in (torch.int32, torch.int64):
            raise InputError(f"CSR: col must be an int32 or int64 vector, got {col.dtype} {list(col.shape)}")
        if value.shape != col.shape or not value.is_floating_point():
            raise InputError(f"CSR: value must be float {list(col.shape)} like col, got {value.dtype} {list(value.shape)}")
        if not (rowptr.device == col.device == value.device):
            raise InputError(f"CSR: one device expected, got {rowptr.device}, {col.device}, {value.device}")
        if int(rowptr[0]) != 0 or int(rowptr[-1]) != col.numel() or bool((rowptr[1:] < rowptr[:-1]).any()):
            raise InputError(f"CSR: rowptr must rise from 0 to the {col.numel()} entries of col")
        if col.numel() and (int(col.min()) < 0 or int(col.max()) >= cols):
            raise InputError(f"CSR: col must lie in [0, {cols}), got [{int(col.min())}, {int(col.max())}]")
        self.rowptr, self.col, self.value, self.shape = rowptr, col, value, (rows, cols)
        self.entries: Tensor | None = None
        self._transposed_value: Tensor | None = None
        self._graph: Graph | None = None

    def __repr__(self):
        return f"CSR(shape={self.shape}, nnz={self.nnz}, dtype={self.value.dtype}, device={self.device})"

    @property
    def nnz(self) -> int:
        return self.col.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def rows(self) -> Tensor:
        """Row index of each entry, int64 [nnz]."""
        count = self.rowptr[1:] - self.rowptr[:-1]
        return torch.repeat_interleave(torch.arange(self.shape[0], device=self.device), count, output_size=self.nnz)

    def transpose_arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        """(colptr [cols+1], row [nnz], value [nnz]) of the transpose in compressed form; made once."""
        g = self.graph()
        if self._transposed_value is None:
            self._transposed_value = self.value[g.ceid.long()]
        return g.colptr, g.row, self._transposed_value

    def graph(self) -> Graph:
        """The pattern as a bipartite graph from the columns to the rows, entry e being edge e: x w is then the spmm of w
        [cols, F] with weight = value. Made once."""
        if self._graph is None:
            order = torch.sort(self.col, stable=True).indices
            colptr = torch.zeros(self.shape[1] + 1, dtype=torch.int64, device=self.device)
            torch.cumsum(torch.bincount(self.col, minlength=self.shape[1]), 0, out=colptr[1:])
            dtype = self.col.dtype
            self._graph = Graph(self.rowptr, self.col, None, colptr, self.rows()[order].to(dtype), order.to(dtype))
        return self._graph

    def take(self, rows: Tensor) -> "CSR":
        """The matrix of the rows numbered `rows` int64 [R], in their order."""
        count = self.rowptr[rows + 1] - self.rowptr[rows]
        rowptr = torch.zeros(rows.numel() + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(count, 0, out=rowptr[1:])
        entry = torch.arange(int(rowptr[-1]), device=self.device)
        entry += torch.repeat_interleave(self.rowptr[rows] - rowptr[:-1], count, output_size=entry.numel())
        taken = CSR(rowptr, self.col[entry], self.value[entry], (rows.numel(), self.shape[1]))
        taken.entries = entry if self.entries is None else self.entries[entry]
        return taken

    def columns(self, keep: Tensor) -> "CSR":
        """The matrix of the columns with keep True (bool [cols]), in their order."""
        kept = keep[self.col.long()]
        count = torch.zeros(self.nnz + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(kept, 0, out=count[1:])
        number = torch.cumsum(keep, 0) - 1
        shape = self.shape[0], int(keep.sum())
        return CSR(count[self.rowptr], number[self.col[kept].long()].to(self.col.dtype), self.value[kept], shape)

    def to(self, device) -> "CSR":
        if torch.device(device) == self.device:
            return self
        moved = copy.copy(self)
        moved.rowptr, moved.col, moved.value = (t.to(device) for t in (self.rowptr, self.col, self.value))
        moved.entries = None if self.entries is None else self.entries.to(device)
        moved._transposed_value = None
        moved._graph = None if self._graph is None else self._graph.to(device)
        return moved

    def with_values(self, value: Tensor) -> "CSR":
        """The same pattern with other values [nnz] of any float dtype. Raises InputError for another shape or device."""
        if value.shape != self.value.shape or not value.is_floating_point() or value.device != self.device:
            raise InputError(
                f"CSR: value must be float {list(self.value.shape)} on {self.device}, got {value.dtype}"
                f" {list(value.shape)} on {value.device}"
            )
        self.graph()  # which both then share
        other = copy.copy(self)
        other.value, other._transposed_value = value, None
        return other

    def to_dense(self) -> Tensor:
        """Dense [rows, cols]; repeated entries add up."""
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return dense.index_put_((self.rows(), self.col.long()), self.value, accumulate=True)

    @staticmethod
    def from_dense(x: Tensor) -> "CSR":
        """The nonzero entries of x [rows, cols]."""
        row, col = x.nonzero(as_tuple=True)
        rowptr = torch.zeros(x.size(0) + 1, dtype=torch.int64, device=x.device)
        torch.cumsum(torch.bincount(row, minlength=x.size(0)), 0, out=rowptr[1:])
        return CSR(rowptr, col.to(torch.int32), x[row, col], tuple(x.shape))

    @staticmethod
    def from_scipy(matrix) -> "CSR":
        """From any scipy sparse matrix; float64 values become float32."""
        matrix = matrix.tocsr()
        value = torch.from_numpy(matrix.data.copy())
        value = value if value.dtype in (torch.float16, torch.float32) else value.float()
        return CSR(
            torch.from_numpy(matrix.indptr.astype("int64")),
            torch.from_numpy(matrix.indices.astype("int32")),
            value,
            matrix.shape,
        )

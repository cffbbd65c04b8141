"""Graphs of raw edge lists in CSR order, made by counting sorts (scipy's conversions): linear in the edges, and no int64 key.

The result is a dictionary of numpy arrays, which can be stored and mapped again; `to_graph` makes a Graph of it:
    rowptr int64 [N+1], col [E], ceid [E], loops int64 [2, L]   as in `Graph` with eid None
    colptr int64 [N+1], row [E]   of a directed graph; an undirected one has rowptr and col in their place
    raw [E]   where asked for: the raw edge that each edge comes from
"""

import numpy as np
import torch

from acefast.errors import InputError
from acefast.graph import Graph

INT32_MAX = 2**31 - 1


def _numbers(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32 if count <= INT32_MAX else np.int64)


def _grouped(row: np.ndarray, col: np.ndarray, n: int):
    """scipy csr_matrix [N, N] of the entries (row, col), none merged, in each row in the order given; data numbers them."""
    import scipy.sparse

    matrix = scipy.sparse.coo_matrix((_numbers(len(row)), (row, col)), shape=(n, n))
    matrix.has_canonical_format = True  # or tocsr would add repeated entries up
    return matrix.tocsr()


def _transposed(ptr: np.ndarray, col: np.ndarray, number: np.ndarray):
    """(ptr, row, number) of the columns of the square matrix (ptr, col, number), in each column by row."""
    import scipy.sparse

    n = len(ptr) - 1
    columns = scipy.sparse.csr_matrix((number, col, ptr), shape=(n, n)).tocsc()
    return columns.indptr.astype(np.int64), columns.indices, columns.data


def _offsets(index: np.ndarray, n: int) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(np.bincount(index, minlength=n))))


def _rows(ptr: np.ndarray) -> np.ndarray:
    """Row of each slot, int32."""
    return np.repeat(np.arange(len(ptr) - 1, dtype=np.int32), np.diff(ptr))


def sorted_pairs(a: np.ndarray, b: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(low, high, number): the pairs {a, b} (int32 [P]) by (low, high), low <= high, repeats in the order given."""
    by_low = _grouped(np.maximum(a, b), np.minimum(a, b), n).tocsc()
    return _rows(by_low.indptr), by_low.indices, by_low.data


def undirected(
    low: np.ndarray, high: np.ndarray, n: int, *, number: np.ndarray | None = None, double_loops: bool = False
) -> dict:
    """Arrays of the undirected graph of the pairs (int32 [P], sorted by (low, high), low <= high): both directions of each,
    repeats kept. A pair of one node is one self-loop, or two with `double_loops`. `number` [P] gives `raw`."""
    # The edges into node i are the pairs with high = i (`below`), by low, and after them those with low = i, by high.
    pairs, above_ptr = _numbers(len(low)), _offsets(low, n)
    twice = slice(None) if double_loops or not (low == high).any() else low != high
    below_ptr, below, pair = _transposed(_offsets(low[twice], n), high[twice], pairs[twice])
    num_edges = len(low) + len(below)
    dtype = _numbers(num_edges).dtype
    above_slot = pairs.astype(dtype, copy=False) + below_ptr.astype(dtype)[low + 1]
    below_slot = np.arange(len(below), dtype=dtype) + np.repeat(above_ptr[:-1].astype(dtype), np.diff(below_ptr))
    col, ceid = np.empty(num_edges, dtype=np.int32), np.empty(num_edges, dtype=dtype)
    col[above_slot], col[below_slot] = high, below
    reverse = above_slot[pair]
    ceid[below_slot], ceid[reverse] = reverse, below_slot
    loops = above_slot[low == high]
    if double_loops:
        loops = np.sort(np.concatenate((loops, below_slot[below == high[pair]])))
    ceid[loops] = loops
    arrays = {
        "rowptr": above_ptr + below_ptr,
        "col": col,
        "ceid": ceid,
        "loops": np.stack((loops, col[loops])).astype(np.int64),
    }
    if number is not None:
        arrays["raw"] = np.empty(num_edges, dtype=number.dtype)
        arrays["raw"][above_slot], arrays["raw"][below_slot] = number, number[pair]
    return arrays


def undirected_simple(a: np.ndarray, b: np.ndarray, n: int, *, add_self_loops: bool) -> dict:
    """Arrays of the undirected graph that joins a[i] and b[i] (int32 [P]), each edge once; self-loops of the pairs stay, and
    `add_self_loops` gives every node one."""
    if add_self_loops:
        nodes = np.arange(n, dtype=np.int32)
        a, b = np.concatenate((a, nodes)), np.concatenate((b, nodes))
    low, high, _ = sorted_pairs(a, b, n)
    new = np.ones(len(low), dtype=bool)
    new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    return undirected(low[new], high[new], n)


def directed(src: np.ndarray, dst: np.ndarray, n: int) -> dict:
    """Arrays, with `raw`, of the graph of the edges src -> dst (int32 [E]), sorted by (dst, src), repeats kept."""
    by_dst = _grouped(src, dst, n).tocsc()
    rowptr, col = by_dst.indptr.astype(np.int64), by_dst.indices
    colptr, row, ceid = _transposed(rowptr, col, _numbers(len(col)))
    loops = np.flatnonzero(col == _rows(rowptr))
    loops = np.stack((loops, col[loops])).astype(np.int64)
    return {
        "rowptr": rowptr,
        "col": col,
        "colptr": colptr,
        "row": row,
        "ceid": ceid,
        "loops": loops,
        "raw": by_dst.data,
    }


def of_raw(value: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """Rows [E, D] of the edges from those of the raw edges, value [R, D]."""
    return torch.from_numpy(value).index_select(0, torch.from_numpy(raw)).numpy()


def to_graph(arrays: dict) -> Graph:
    """The Graph of `arrays` (numpy arrays or tensors, others beside them), which it shares. Raises InputError where they
    describe none."""
    rowptr, col, ceid, loops = (torch.as_tensor(arrays[name]) for name in ("rowptr", "col", "ceid", "loops"))
    colptr, row = rowptr, col
    if "row" in arrays:
        colptr, row = torch.as_tensor(arrays["colptr"]), torch.as_tensor(arrays["row"])
    n, num_edges = rowptr.numel() - 1, col.numel()
    fit = row.numel() == ceid.numel() == num_edges
    for ptr in {id(ptr): ptr for ptr in (rowptr, colptr)}.values():
        fit = fit and ptr.dtype == torch.int64 and ptr.numel() == n + 1 and ptr[0] == 0 and ptr[-1] == num_edges
        fit = fit and bool((ptr[1:] >= ptr[:-1]).all())
    for index, high in ((col, n), (row, n), (ceid, num_edges), (loops[0], num_edges), (loops[1], n)):
        fit = fit and (not index.numel() or 0 <= int(index.min()) <= int(index.max()) < high)
    if not fit:
        raise InputError(f"the arrays are not those of a graph of {n} nodes and {num_edges} edges, build them anew")
    dtype = torch.int32 if max(n, num_edges) <= INT32_MAX else torch.int64
    g = Graph(rowptr, col.to(dtype), None, colptr, row.to(dtype), ceid.to(dtype))
    g._self_loops = loops
    if colptr is rowptr:
        g._reverse_edges = g.ceid
    return g

"""Cora, Citeseer and PubMed from the raw files of Planetoid (Yang et al., ICML 2016; kimiyoung/planetoid)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acefast.csr import CSR
from acefast.data.dataset import Dataset
from acefast.data.pickles import Matrix, read_pickle
from acefast.errors import InputError
from acefast.graph import Graph

PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
NUM_VAL = 500


@dataclass(frozen=True)
class Counts:
    """What the published files hold; `edges` are directed and without self-loops."""

    nodes: int
    edges: int
    self_loops: int
    features: int
    classes: int
    train: int
    test: int = 1000


PUBLISHED = {
    "cora": Counts(nodes=2708, edges=10556, self_loops=0, features=1433, classes=7, train=140),
    "citeseer": Counts(nodes=3327, edges=9104, self_loops=124, features=3703, classes=6, train=120),
    "pubmed": Counts(nodes=19717, edges=88648, self_loops=3, features=500, classes=3, train=60),
}


def load_planetoid(name: str, root: str | Path | None, keep_self_loops: bool = False) -> Dataset:
    """`name` (cora, citeseer or pubmed) from the files `ind.NAME.{x,tx,allx,y,ty,ally,graph,test.index}`, which lie in
    `root`, `root`/planetoid or `root`/NAME/raw (where PyG puts them).

    Edges are directed, each listed once, in both directions, sorted by (destination, source): the caller's order is
    CSR order. Self-loops of the files are dropped (as in PyG) unless `keep_self_loops`. Features are as in the files,
    not normalised, in a CSR. Split: the labelled nodes of `x` train, the next 500 validate, `test.index` tests.
    Citeseer's 15 test nodes that `tx` lacks have no features and label 0 and are in no part of the split.

    Nothing that the pickles name is run. Raises InputError, in one sentence, for a file that is missing, damaged,
    names a function, or does not hold what was published under `name`.
    """
    if name not in PUBLISHED:
        raise InputError(f"planetoid dataset {name!r} is not known, expected one of {', '.join(PUBLISHED)}")
    data, self_loops = _read(name, find_folder(name, root), keep_self_loops)
    expected = PUBLISHED[name]
    found = Counts(
        nodes=data.num_nodes,
        edges=data.graph.num_edges - (self_loops if keep_self_loops else 0),
        self_loops=self_loops,
        features=data.num_features,
        classes=data.num_classes,
        train=data.train.numel(),
        test=data.test.numel(),
    )
    for field, want in vars(expected).items():
        got = getattr(found, field)
        if got != want:
            what = field.replace("_", " ")
            raise InputError(f"{name}: the files hold {got} {what} where {want} were published, fetch them anew")
    return data


def folders(name: str, root: Path) -> list[Path]:
    """Where the files of `name` may lie under `root`."""
    raw = [entry / "raw" for entry in sorted(root.iterdir()) if entry.name.lower() == name]
    return [root, root / "planetoid", *raw]


def find_folder(name: str, root: str | Path | None) -> Path:
    """The folder under `root` with the files of `name`; raises InputError that says what was sought where."""
    sought = f"ind.{name}.{{{','.join(PARTS)}}}"
    if root is None:
        raise InputError(
            f"dataset {name} is read from disk, name the folder that holds {sought} (--data-root DIR, and --download to "
            f"have them fetched into it)"
        )
    root = Path(root)
    try:
        if not root.is_dir():
            raise InputError(f"{root} is not a folder, expected one that holds {sought} (--data-root DIR)")
        for folder in folders(name, root):
            missing = [part for part in PARTS if not (folder / f"ind.{name}.{part}").is_file()]
            if not missing:
                return folder
            if len(missing) < len(PARTS):
                raise InputError(f"{folder} lacks ind.{name}.{missing[0]}, expected {sought} in it")
    except OSError as error:
        raise InputError(f"{root} cannot be read: {error.strerror or type(error).__name__}") from None
    raise InputError(f"{root} has no file of {name}, expected {sought} in it or in its subfolder planetoid")


def _read(name: str, folder: Path, keep_self_loops: bool) -> tuple[Dataset, int]:
    """The dataset in `folder` and the number of self-loops in its files."""
    files = {part: folder / f"ind.{name}.{part}" for part in PARTS}
    x, tx, allx = (_features(files[part]) for part in ("x", "tx", "allx"))
    y, ty, ally = (_one_hot(files[part]) for part in ("y", "ty", "ally"))
    tested = _test_index(files["test.index"])

    for part, other, a, b in (("y", "x", y, x), ("ty", "tx", ty, tx), ("ally", "allx", ally, allx)):
        if len(a) != b.shape[0]:
            raise InputError(f"{files[part]} has {len(a)} rows, expected {b.shape[0]} as in {files[other].name}")
    for part, other, a, b in (("tx", "allx", tx, allx), ("ty", "ally", ty, ally), ("y", "ally", y, ally)):
        if a.shape[1] != b.shape[1]:
            expected = f"{b.shape[1]} as in {files[other].name}"
            raise InputError(f"{files[part]} has {a.shape[1]} columns, expected {expected}")
    known, labelled = allx.shape[0], len(y)
    if labelled > known or (y != ally[:labelled]).any() or (allx[:labelled] != x).nnz:
        raise InputError(f"{files['x']} and {files['y'].name} must hold the first rows of allx and ally, and do not")
    if labelled + NUM_VAL > known:
        expected = f"{labelled} to train and {NUM_VAL} to validate on"
        raise InputError(f"{files['allx']} has {known} rows, expected at least {expected}")
    if len(tested) != tx.shape[0]:
        expected = f"{tx.shape[0]}, one for each row of tx"
        raise InputError(f"{files['test.index']} lists {len(tested)} nodes, expected {expected}")

    # Test node test.index[i] has row i of tx. Nodes within that range which test.index leaves out are isolated.
    neighbours = read_graph(files["graph"])
    num_nodes = len(neighbours)
    if tested.min() != known or tested.max() != num_nodes - 1:
        raise InputError(
            f"{files['test.index']} lists nodes {tested.min()} to {tested.max()}, expected {known} to {num_nodes - 1}: "
            f"those of {files['graph'].name} that are not in allx"
        )
    labels = np.zeros(num_nodes, dtype=np.int64)
    labels[:known], labels[tested] = ally.argmax(1), ty.argmax(1)
    row_of = np.full(num_nodes, -1)
    row_of[:known], row_of[tested] = np.arange(known), known + np.arange(len(tested))

    edge_index, self_loops = _edges(neighbours, files["graph"], keep_self_loops)
    data = Dataset(
        name=name,
        graph=Graph.from_edge_index(edge_index, num_nodes=num_nodes),
        x=_stack(allx, tx, row_of),
        y=torch.from_numpy(labels),
        train=torch.arange(labelled),
        val=torch.arange(labelled, labelled + NUM_VAL),
        test=torch.from_numpy(np.sort(tested)),
        num_classes=ally.shape[1],
    )
    return data, self_loops


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or type(error).__name__}") from None


def _load(path: Path) -> Any:
    return read_pickle(_bytes(path), str(path))


def _features(path: Path):
    """scipy csr_matrix float32 [rows, num_features], in canonical form, made of components checked one by one."""
    import scipy.sparse

    matrix = _load(path)
    if not isinstance(matrix, Matrix):
        raise InputError(f"{path} must hold a scipy csr_matrix, got {type(matrix).__name__}")
    state = matrix.state
    shape, keys = state.get("_shape"), ("indptr", "indices", "data")
    arrays = [state.get(key) for key in keys]
    if not (isinstance(shape, tuple) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)):
        raise InputError(f"{path} holds a matrix without a valid shape")
    for key, array, kinds, what in zip(keys, arrays, ("iu", "iu", "f"), ("integers", "integers", "floats")):
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in kinds:
            raise InputError(f"{path} holds a matrix whose {key} is not a vector of {what}")
    indptr, indices, data = arrays
    rows, columns = shape
    indptr, indices = indptr.astype(np.int64), indices.astype(np.int64)
    if len(indptr) != rows + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any() or indptr[-1] != len(indices):
        raise InputError(f"{path} holds a matrix whose indptr does not rise from 0 to {len(indices)} in {rows} rows")
    if len(data) != len(indices):
        raise InputError(f"{path} holds a matrix with {len(data)} values for {len(indices)} indices")
    if len(indices) and not 0 <= indices.min() <= indices.max() < columns:
        found = f"[{indices.min()}, {indices.max()}]"
        raise InputError(f"{path} has a feature index out of range: {found} in {columns} columns")
    with np.errstate(over="ignore"):
        data = data.astype(np.float32)
    if not np.isfinite(data).all():
        raise InputError(f"{path} has {int((~np.isfinite(data)).sum())} features that are NaN or infinite")
    result = scipy.sparse.csr_matrix((data, indices, indptr), shape=shape)
    result.sum_duplicates()
    return result


def _one_hot(path: Path) -> np.ndarray:
    """Labels int64 [rows, num_classes], each row with a single 1."""
    array = _load(path)
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iuf":
        raise InputError(f"{path} must hold a two-dimensional numpy array of numbers, got {_describe(array)}")
    if not array.shape[0]:
        raise InputError(f"{path} holds no labels")
    valid = ((array == 0) | (array == 1)).all(1) & (array.sum(1) == 1)
    if not valid.all():
        raise InputError(f"{path}: row {int(valid.argmin())} is not a one-hot label")
    return array.astype(np.int64)


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def _test_index(path: Path) -> np.ndarray:
    """Node numbers int64, one a line, each once."""
    lines = _bytes(path).split()
    for number, line in enumerate(lines, 1):
        if not line.isdigit() or len(line) > 9:
            text = line[:20].decode("ascii", "replace")
            raise InputError(f"{path} must hold one node number a line, got {text!r} as number {number}")
    if not lines:
        raise InputError(f"{path} lists no node")
    index = np.array([int(line) for line in lines], dtype=np.int64)
    values, times = np.unique(index, return_counts=True)
    if times.max() > 1:
        raise InputError(f"{path} lists node {values[times.argmax()]} twice")
    return index


def read_graph(path: Path) -> list[list[int]]:
    """Neighbours of nodes 0 to N-1 from a pickled {node: [neighbours]}; indices are not checked against N."""
    data = _bytes(path)
    graph = read_pickle(data, str(path))
    if not isinstance(graph, dict) or not graph:
        raise InputError(f"{path} must hold a dictionary from node to its neighbours, got {_describe(graph)}")
    missing = next((node for node in range(len(graph)) if node not in graph), None)
    if missing is not None:
        raise InputError(f"{path} has {len(graph)} nodes but not node {missing}, expected 0 to {len(graph) - 1}")
    neighbours = [graph[node] for node in range(len(graph))]
    if not all(type(entry) is list for entry in neighbours):
        raise InputError(f"{path} must hold a list of neighbours for each node")
    if sum(map(len, neighbours)) > len(data):  # one list referred to many times would grow without bound
        raise InputError(f"{path} lists more neighbours than it has bytes")
    if not all(type(node) is int for entry in neighbours for node in entry):
        raise InputError(f"{path} has a neighbour that is not an integer")
    return neighbours


def _edges(neighbours: list[list[int]], path: Path, keep_self_loops: bool) -> tuple[torch.Tensor, int]:
    """edge_index int64 [2, E], symmetric, each edge once, by (destination, source); and the number of self-loops."""
    n = len(neighbours)
    for node, entry in enumerate(neighbours):
        if entry and not 0 <= min(entry) <= max(entry) < n:
            bad = min(entry) if min(entry) < 0 else max(entry)
            raise InputError(f"{path}: node {node} has neighbour {bad}, which is out of range for {n} nodes")
    a = np.repeat(np.arange(n), [len(entry) for entry in neighbours])
    b = np.fromiter((node for entry in neighbours for node in entry), dtype=np.int64, count=len(a))
    loops = np.unique(a[a == b])
    a, b = a[a != b], b[a != b]
    key = np.concatenate((a * n + b, b * n + a, loops * (n + 1) if keep_self_loops else loops[:0]))
    dst, src = np.divmod(np.unique(key), n)
    return torch.from_numpy(np.stack((src, dst))), len(loops)


def _stack(allx, tx, row_of: np.ndarray) -> CSR:
    """Features of all nodes: row row_of[i] of allx over tx for node i, and no entry where that is -1."""
    import scipy.sparse

    nothing = scipy.sparse.csr_matrix((1, allx.shape[1]), dtype=np.float32)
    stacked = scipy.sparse.vstack((allx, tx, nothing), format="csr")
    return CSR.from_scipy(stacked[row_of])

"""One record for every dataset: graph, features, labels, split, task and metric, checked when it is made."""

import copy
import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from acefast.csr import CSR
from acefast.errors import InputError
from acefast.graph import Graph

TASKS = {"node": ("accuracy",)}  # task -> its metrics


@dataclass(frozen=True, eq=False)
class Dataset:
    """A graph to learn on. Immutable; every field is checked by `check` when the record is made.

    name         what reports call it
    graph        Graph with N nodes
    x            features [N, num_features] float32, a CSR or a dense tensor
    y            labels [N] int64 in [0, num_classes)
    train, val, test   node numbers of the split, int64, no node in two of them
    num_classes  number of classes
    task         "node": classification of nodes
    metric       "accuracy"

    Raises InputError, in one sentence, for the first thing that does not fit.
    """

    name: str
    graph: Graph
    x: CSR | Tensor
    y: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    num_classes: int
    task: str = "node"
    metric: str = "accuracy"

    def __post_init__(self):
        check(self)

    def __repr__(self):
        split = "/".join(str(index.numel()) for index in (self.train, self.val, self.test))
        return (
            f"Dataset({self.name!r}, nodes={self.num_nodes}, edges={self.graph.num_edges}, "
            f"features={self.num_features}, classes={self.num_classes}, split={split}, device={self.device})"
        )

    @property
    def num_nodes(self) -> int:
        return self.y.numel()

    @property
    def num_features(self) -> int:
        return self.x.shape[1]

    @property
    def device(self) -> torch.device:
        return self.y.device

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the edges, features, labels, split and task, not of the name: what a run is bound to."""
        features = [self.x.rowptr, self.x.col.long(), self.x.value] if isinstance(self.x, CSR) else [self.x]
        digest = hashlib.sha256(f"{self.graph.fingerprint()} {self.num_classes} {self.task} {self.metric}".encode())
        for array in (*features, self.y, self.train, self.val, self.test):
            digest.update(f" {array.dtype} {list(array.shape)} ".encode())
            digest.update(array.detach().cpu().contiguous().numpy())
        return digest.hexdigest()

    @staticmethod
    def from_arrays(
        edge_index: Tensor,  # integers [2, E], row 0 source, row 1 destination
        x: CSR | Tensor,  # [N, num_features]
        y: Tensor,  # integers [N], 0 or more
        train: Tensor,  # node numbers, or bool [N]
        val: Tensor,
        test: Tensor,
        name: str = "own",
    ) -> "Dataset":
        """A record for classification of nodes from your own arrays, brought to the record's types.

        Edges are taken as they are: list both directions of an undirected one. Features become float32, and a CSR where
        fewer than one in eight is not 0. num_classes is the largest label + 1. Raises InputError for what does not fit.
        """

        def refuse(field: str, expected: str, got):
            got = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
            raise InputError(f"dataset {name}: {field} must be {expected}, got {got}")

        if not isinstance(y, Tensor) or y.dim() != 1 or not is_integer(y):
            refuse("y", "a vector of integers, one label a node", y)
        if isinstance(x, Tensor):
            if x.dim() != 2 or x.is_complex():
                refuse("x", f"a matrix of numbers, {y.numel()} rows", x)
            x = (x if x.layout == torch.strided else x.to_dense()).float()
            x = CSR.from_dense(x) if 8 * int(x.count_nonzero()) < x.numel() else x
        split = {"train": train, "val": val, "test": test}
        for field, part in split.items():
            if not isinstance(part, Tensor) or part.dim() != 1 or not (part.dtype == torch.bool or is_integer(part)):
                refuse(field, "a vector of node numbers or a bool mask over the nodes", part)
            if part.dtype == torch.bool and part.numel() != y.numel():
                refuse(field, f"a bool mask over the {y.numel()} nodes", part)
            split[field] = part.nonzero().squeeze(1) if part.dtype == torch.bool else part.long()
        try:
            graph = Graph.from_edge_index(edge_index, num_nodes=y.numel())
        except InputError as error:
            raise InputError(f"dataset {name}: {error}") from None
        num_classes = int(y.max()) + 1 if y.numel() else 0
        return Dataset(name, graph, x, y.long(), **split, num_classes=num_classes)

    @staticmethod
    def from_pyg(data, name: str = "own") -> "Dataset":
        """From a torch_geometric.data.Data with x, edge_index, y, train_mask, val_mask and test_mask, as `from_arrays`.

        y may be [N, 1]; a mask with a column for each of several splits is refused: choose one.
        """
        fields = ("edge_index", "x", "y", "train_mask", "val_mask", "test_mask")
        found = [getattr(data, field, None) for field in fields]
        missing = [field for field, value in zip(fields, found) if value is None]
        if missing:
            raise InputError(f"dataset {name}: the Data has no {missing[0]}, expected {', '.join(fields)}")
        edge_index, x, y, *masks = found
        y = y.squeeze(1) if isinstance(y, Tensor) and y.dim() == 2 and y.size(1) == 1 else y
        return Dataset.from_arrays(edge_index, x, y, *masks, name=name)

    def to(self, device) -> "Dataset":
        """The same data on `device`, without being checked again."""
        if torch.device(device) == self.device:
            return self
        moved = copy.copy(self)
        fields = ("graph", "x", "y", "train", "val", "test")
        vars(moved).update({field: getattr(self, field).to(device) for field in fields})
        return moved

    def with_row_normalized_features(self) -> "Dataset":
        """Features divided by their row's sum, x_ij / Σ_k x_ik; a row that sums to 0 becomes 0 (as GCN and UGS do)."""
        if isinstance(self.x, CSR):
            total = torch.zeros(self.x.shape[0], dtype=torch.float64, device=self.device)
            total.index_add_(0, self.x.rows(), self.x.value.double())
            x = self.x.with_values((self.x.value * _inverse(total)[self.x.rows()]).float())
        else:
            x = (self.x * _inverse(self.x.double().sum(1, keepdim=True))).float()
        return replace(self, x=x)


def is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _inverse(total: Tensor) -> Tensor:
    return torch.where(total != 0, 1 / total, 0)


def check(data: Dataset) -> None:
    """Raises InputError for the first field of `data` that is of the wrong type, length, range or device."""

    def refuse(problem: str):
        raise InputError(f"dataset {data.name}: {problem}")

    if not isinstance(data.graph, Graph):
        refuse(f"graph must be an acefast.Graph, got {type(data.graph).__name__}")
    if not isinstance(data.x, CSR | Tensor):
        refuse(f"x must be a tensor or an acefast.CSR, got {type(data.x).__name__}")
    for field in ("y", "train", "val", "test"):
        value = getattr(data, field)
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 1:
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            refuse(f"{field} must be an int64 vector, got {got}")
    for field in ("graph", "x", "train", "val", "test"):
        device = getattr(data, field).device
        if device != data.y.device:
            refuse(f"all arrays must be on one device, got {field} on {device} and y on {data.y.device}")
    if data.metric not in TASKS.get(data.task, ()):
        known = ", ".join(f"{task} with {metric}" for task, metrics in TASKS.items() for metric in metrics)
        refuse(f"task {data.task!r} with metric {data.metric!r} is not known, expected {known}")

    n, sources = data.graph.num_dst, data.graph.num_src
    if n != sources:
        refuse(f"the graph must have one set of nodes, got {sources} sources and {n} destinations")
    if len(data.x.shape) != 2 or data.x.shape[0] != n or data.x.shape[1] < 1:
        refuse(f"x must be [{n}, at least 1], one row a node, got {list(data.x.shape)}")
    if data.x.dtype != torch.float32:
        refuse(f"x must be float32, got {data.x.dtype}")
    finite = torch.isfinite(data.x.value if isinstance(data.x, CSR) else data.x)
    if not bool(finite.all()):
        refuse(f"features must be finite, got {int((~finite).sum())} that are NaN or infinite")

    if data.y.numel() != n:
        refuse(f"y must have one label for each of the {n} nodes, got {data.y.numel()}")
    if not isinstance(data.num_classes, int) or data.num_classes < 2:
        refuse(f"num_classes must be an integer of at least 2, got {data.num_classes!r}")
    if n and not 0 <= int(data.y.min()) <= int(data.y.max()) < data.num_classes:
        refuse(f"labels must lie in [0, {data.num_classes}), got [{int(data.y.min())}, {int(data.y.max())}]")

    owner = torch.zeros(n, dtype=torch.int8, device=data.device)
    for mark, field in enumerate(("train", "val", "test"), 1):
        index = getattr(data, field)
        if not index.numel():
            refuse(f"the {field} split is empty")
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= n:
            refuse(f"the {field} split names node {low if low < 0 else high}, nodes are 0 to {n - 1}")
        taken = owner[index]
        if bool(taken.any()):
            refuse(f"the {field} split shares node {int(index[taken != 0][0])} with another split")
        owner[index] = mark
        if int((owner == mark).sum()) != index.numel():
            refuse(f"the {field} split names a node twice")

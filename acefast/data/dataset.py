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

# task -> its metrics, computed by `acefast.data.metrics`
TASKS = {"node": ("accuracy",), "multilabel": ("rocauc",), "link": ("hits@20", "hits@50", "hits@100", "rocauc")}
SPLITS = ("train", "val", "test")
FEATURES = ("given", "fastrp", "learned")  # that a loader is asked for


@dataclass(frozen=True, eq=False)
class Dataset:
    """A graph to learn on. Immutable; every field is checked by `check` when the record is made.

    name         what reports call it
    graph        Graph with N nodes
    x            features [N, num_features] float32, a CSR or a dense tensor; None only where task is "link" or where
                 `features` is "learned": a model then learns an embedding of each node
    y            "node": labels [N] int64 in [0, num_classes), or -1 where a node of no split has none;
                 "multilabel": [N, num_classes] float32 of 0, 1 and, where unknown, NaN; "link": None
    train, val, test   the split: node numbers int64 [n], no node in two of them; of "link": edges int64 [n, 2], end points
                 in a row
    num_classes  number of classes; of "multilabel": of labels, each a task of its own; of "link": 0
    task         "node": classes of nodes; "multilabel": several yes-or-no labels for each node; "link": whether two nodes
                 are joined, `graph` holding the training edges alone
    metric       accuracy (node); rocauc (multilabel), the mean over the labels; hits@20, hits@50, hits@100 or
                 rocauc (link)
    edge_attr    edge features [E, D] float32 by edge number, or None
    val_neg, test_neg   "link": pairs int64 [n, 2] that val and test are ranked against; otherwise None
    features     what x is, for reports: "given", or how it was made

    Raises InputError, in one sentence, for the first thing that does not fit.
    """

    name: str
    graph: Graph
    x: CSR | Tensor | None
    y: Tensor | None
    train: Tensor
    val: Tensor
    test: Tensor
    num_classes: int
    task: str = "node"
    metric: str = "accuracy"
    edge_attr: Tensor | None = None
    val_neg: Tensor | None = None
    test_neg: Tensor | None = None
    features: str = "given"

    def __post_init__(self):
        check(self)

    def __repr__(self):
        split = "/".join(str(len(index)) for index in (self.train, self.val, self.test))
        return (
            f"Dataset({self.name!r}, nodes={self.num_nodes}, edges={self.graph.num_edges}, "
            f"features={self.num_features}, classes={self.num_classes}, split={split}, device={self.device})"
        )

    @property
    def num_nodes(self) -> int:
        return self.graph.num_dst

    @property
    def num_features(self) -> int:
        return 0 if self.x is None else self.x.shape[1]

    @property
    def device(self) -> torch.device:
        return self.graph.device

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the edges, features, labels, split and task, not of the name: what a run is bound to."""
        features = [self.x.rowptr, self.x.col.long(), self.x.value] if isinstance(self.x, CSR) else [self.x]
        more = (self.edge_attr, self.val_neg, self.test_neg)
        digest = hashlib.sha256(f"{self.graph.fingerprint()} {self.num_classes} {self.task} {self.metric}".encode())
        for array in (*features, self.y, self.train, self.val, self.test, *more):
            if array is None:
                continue
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
        for field, value in vars(self).items():
            if isinstance(value, Graph | CSR | Tensor):
                vars(moved)[field] = value.to(device)
        return moved

    def with_features_in(self, dtype: torch.dtype) -> "Dataset":
        """The same data with dense features of nodes and edges in `dtype`, without being checked again."""
        narrowed = copy.copy(self)
        for field in ("x", "edge_attr"):
            if isinstance(getattr(self, field), Tensor):
                vars(narrowed)[field] = getattr(self, field).to(dtype)
        return narrowed

    def with_row_normalized_features(self) -> "Dataset":
        """Features divided by their row's sum, x_ij / Σ_k x_ik; a row that sums to 0 becomes 0 (as GCN and UGS do). A dataset
        without features stays as it is."""
        if self.x is None:
            return self
        if isinstance(self.x, CSR):
            total = torch.zeros(self.x.shape[0], dtype=torch.float64, device=self.device)
            total.index_add_(0, self.x.rows(), self.x.value.double())
            x = self.x.with_values((self.x.value * _inverse(total)[self.x.rows()]).float())
        else:
            x = (self.x * _inverse(self.x.double().sum(1, keepdim=True))).float()
        return replace(self, x=x)


def check_features(features: str) -> None:
    """Raises InputError for a name of features that a loader does not know."""
    if features not in FEATURES:
        raise InputError(f"features {features!r} are not known, expected one of {', '.join(FEATURES)}")


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
    if not isinstance(data.x, CSR | Tensor) and (data.x is not None or data.task != "link" and data.features != "learned"):
        refuse(f"x must be a tensor or an acefast.CSR, got {type(data.x).__name__}")
    if data.metric not in TASKS.get(data.task, ()):
        known = ", ".join(f"{task} with {metric}" for task, metrics in TASKS.items() for metric in metrics)
        refuse(f"task {data.task!r} with metric {data.metric!r} is not known, expected {known}")
    link = data.task == "link"
    pairs = (*SPLITS, "val_neg", "test_neg") if link else SPLITS
    for field in (*pairs, "y") if data.task == "node" else pairs:
        value = getattr(data, field)
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 1 + (link and field != "y"):
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            refuse(f"{field} must be an int64 {'matrix [n, 2]' if link else 'vector'}, got {got}")
    for field, value in vars(data).items():
        if isinstance(value, CSR | Tensor) and value.device != data.graph.device:
            refuse(f"all arrays must be on one device, got {field} on {value.device} and graph on {data.graph.device}")

    n, sources = data.graph.num_dst, data.graph.num_src
    if n != sources:
        refuse(f"the graph must have one set of nodes, got {sources} sources and {n} destinations")
    if data.x is not None:
        if len(data.x.shape) != 2 or data.x.shape[0] != n or data.x.shape[1] < 1:
            refuse(f"x must be [{n}, at least 1], one row a node, got {list(data.x.shape)}")
        if data.x.dtype != torch.float32:
            refuse(f"x must be float32, got {data.x.dtype}")
        if infinite := _count_infinite(data.x.value if isinstance(data.x, CSR) else data.x):
            refuse(f"features must be finite, got {infinite} that are NaN or infinite")
    if data.edge_attr is not None:
        if not isinstance(data.edge_attr, Tensor):
            refuse(f"edge_attr must be a tensor or None, got {type(data.edge_attr).__name__}")
        edges, shape = data.graph.num_edges, list(data.edge_attr.shape)
        if len(shape) != 2 or shape[0] != edges or shape[1] < 1 or data.edge_attr.dtype != torch.float32:
            refuse(f"edge_attr must be float32 [{edges}, at least 1], one row an edge, got {data.edge_attr.dtype} {shape}")
        if infinite := _count_infinite(data.edge_attr):
            refuse(f"edge features must be finite, got {infinite} that are NaN or infinite")

    if link:
        if data.y is not None or data.num_classes != 0:
            refuse("a link task has no labels, expected y None and num_classes 0")
        for field in pairs:
            value = getattr(data, field)
            if not value.numel() or value.shape[1] != 2:
                refuse(f"{field} must be pairs of nodes [at least 1, 2], got {list(value.shape)}")
            low, high = int(value.min()), int(value.max())
            if low < 0 or high >= n:
                refuse(f"{field} names node {low if low < 0 else high}, nodes are 0 to {n - 1}")
        return

    least = 2 if data.task == "node" else 1
    if not isinstance(data.num_classes, int) or data.num_classes < least:
        refuse(f"num_classes must be an integer of at least {least}, got {data.num_classes!r}")
    if data.task == "node":
        if data.y.numel() != n:
            refuse(f"y must have one label for each of the {n} nodes, got {data.y.numel()}")
        if n and not -1 <= int(data.y.min()) <= int(data.y.max()) < data.num_classes:
            refuse(f"labels must lie in [0, {data.num_classes}), got [{int(data.y.min())}, {int(data.y.max())}]")
    else:
        got = f"{data.y.dtype} {list(data.y.shape)}" if isinstance(data.y, Tensor) else type(data.y).__name__
        if got != f"torch.float32 {[n, data.num_classes]}":
            refuse(f"y must be float32 [{n}, {data.num_classes}], got {got}")
        if not bool(((data.y == 0) | (data.y == 1) | data.y.isnan()).all()):
            refuse("labels must be 0, 1 or, where unknown, NaN")

    owner = torch.zeros(n, dtype=torch.int8, device=data.device)
    for mark, field in enumerate(SPLITS, 1):
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
        if data.task == "node" and int(data.y[index].min()) < 0:
            bad = int(index[data.y[index].argmin()])
            refuse(f"labels must lie in [0, {data.num_classes}), got -1 for node {bad} of the {field} split")


def _count_infinite(x: Tensor) -> int:
    """Number of elements that are NaN or infinite."""
    if x.numel() and all(map(torch.isfinite, x.aminmax())):  # NaN propagates; no temporary
        return 0
    return int((~torch.isfinite(x)).sum())

"""How large a data set is, from its name alone where that is known, so that a search can be planned before it is loaded."""

from dataclasses import dataclass

import torch

from acefast.csr import CSR
from acefast.data.dataset import Dataset
from acefast.data.fastrp import COLUMNS
from acefast.data.twin import PREFIX, SPECIES, TWINS, parsed


@dataclass(frozen=True)
class Sizes:
    """Counts of a data set: nodes, directed edges, columns of x (0: none) and its stored entries, columns of edge_attr and of
    the logits; the bytes of features, labels, splits; whether both directions of the graph share their arrays; and whether
    dense features are bfloat16 already."""

    nodes: int
    edges: int
    columns: int
    entries: int
    outputs: int
    edge_columns: int
    feature_bytes: int
    undirected: bool
    narrow: bool = False

    @classmethod
    def of(cls, data: Dataset) -> "Sizes":
        """Of data that are there."""
        x = (data.x.rowptr, data.x.col, data.x.value) if isinstance(data.x, CSR) else (data.x,)
        tensors = (*x, data.y, data.train, data.val, data.test, data.edge_attr, data.val_neg, data.test_neg)
        held = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        edge_columns = 0 if data.edge_attr is None else data.edge_attr.shape[1]
        shared = data.graph.row is data.graph.col
        entries = x[-1].numel() if data.x is not None else 0
        return cls(
            data.num_nodes, data.graph.num_edges, data.num_features, entries, max(1, data.num_classes), edge_columns, held,
            shared, any(isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 for t in (data.x, data.edge_attr)),
        )  # fmt: skip

    @classmethod
    def named(cls, name: str, features: str = "given") -> "Sizes | None":
        """Of a generated twin or of the data set that it is made after; None for other names, which have to be loaded."""
        if name not in TWINS and not name.startswith(PREFIX):
            return None
        twin, scale = parsed(name if name.startswith(PREFIX) else PREFIX + name)
        nodes = max(16, round(twin.nodes * scale))
        pairs = min(round(twin.pairs * scale), nodes * (nodes - 1) // 4)
        edges = 2 * pairs + (nodes if twin.self_loops else 0)
        given = twin.columns or (SPECIES + twin.edge_columns if twin.task == "multilabel" else 0)
        columns = {"fastrp": COLUMNS, "learned": 0}.get(features, given)
        per_node = 4 * columns + {"node": 16, "multilabel": 4 * twin.classes + 8, "link": 0}[twin.task]
        held = nodes * per_node + 4 * edges * twin.edge_columns
        held += 16 * (round(sum(twin.split) * scale) + round(sum(twin.negatives) * scale)) if twin.task == "link" else 0
        return cls(nodes, edges, columns, nodes * columns, max(1, twin.classes), twin.edge_columns, held, True)

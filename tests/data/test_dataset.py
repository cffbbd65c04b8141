from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from acefast.csr import CSR
from acefast.data import DATASETS, Dataset, load_dataset
from acefast.graph import Graph


def small(**changes) -> Dataset:
    fields = dict(
        name="small",
        graph=Graph.from_edge_index(torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]), num_nodes=5),
        x=torch.tensor([[1.0, 3.0], [0.0, 0.0], [2.0, 2.0], [0.0, 5.0], [1.0, 0.0]]),
        y=torch.tensor([0, 1, 0, 1, 1]),
        train=torch.tensor([0, 1]),
        val=torch.tensor([2]),
        test=torch.tensor([4]),
        num_classes=2,
    )
    return Dataset(**{**fields, **changes})


def test_record():
    data = small()
    assert (data.num_nodes, data.num_features, data.device.type) == (5, 2, "cpu")
    assert data.task == "node" and data.metric == "accuracy"
    assert data.to("cpu") is data
    assert "nodes=5" in repr(data) and "split=2/1/1" in repr(data)
    with pytest.raises(FrozenInstanceError):
        data.num_classes = 3
    moved = data.to("meta")
    assert moved.device.type == moved.graph.device.type == moved.x.device.type == moved.test.device.type == "meta"


def test_row_normalisation_of_dense_and_sparse_features_agrees():
    dense = small().with_row_normalized_features()
    expected = torch.tensor([[0.25, 0.75], [0.0, 0.0], [0.5, 0.5], [0.0, 1.0], [1.0, 0.0]])
    assert torch.equal(dense.x, expected)
    sparse = small(x=CSR.from_dense(small().x)).with_row_normalized_features()
    assert torch.equal(sparse.x.to_dense(), expected)


def test_fingerprint_depends_on_every_array():
    data = small()
    assert data.fingerprint == small(name="other").fingerprint
    changed = [
        replace(data, x=data.x + 1),
        replace(data, y=1 - data.y),
        replace(data, train=torch.tensor([1, 0])),
        replace(data, val=torch.tensor([3])),
        replace(data, test=torch.tensor([3])),
        replace(data, num_classes=3),
        replace(data, graph=Graph.from_edge_index(data.graph.edge_index().flip(1), num_nodes=5)),
        data.with_row_normalized_features(),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in changed)}) == len(changed) + 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(graph=None), "graph must be an acefast.Graph, got NoneType"),
        (dict(graph=Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.long), num_nodes=(5, 4))), "one set of nodes"),
        (dict(x=[[1.0]]), "x must be a tensor or an acefast.CSR, got list"),
        (dict(x=torch.ones(4, 2)), "one row a node, got [4, 2]"),
        (dict(x=torch.ones(5)), "got [5]"),
        (dict(x=torch.ones(5, 0)), "got [5, 0]"),
        (dict(x=torch.ones(5, 2, dtype=torch.float64)), "float32, got torch.float64"),
        (dict(x=torch.tensor([[1.0]] * 4 + [[float("nan")]])), "got 1 that are NaN or infinite"),
        (dict(x=CSR.from_dense(torch.full((5, 2), float("inf")))), "got 10 that are NaN or infinite"),
        (dict(y=torch.zeros(4, dtype=torch.long)), "each of the 5 nodes, got 4"),
        (dict(y=torch.zeros(5)), "y must be an int64 vector, got torch.float32 [5]"),
        (dict(y=torch.tensor([0, 1, 2, 0, 0])), "labels must lie in [0, 2), got [0, 2]"),
        (dict(y=torch.tensor([0, 1, -1, 0, 0])), "got -1 for node 2 of the val split"),
        (dict(y=torch.tensor([0, 1, -2, 0, 0])), "got [-2, 1]"),
        (dict(num_classes=1), "at least 2, got 1"),
        (dict(num_classes=2.0), "got 2.0"),
        (dict(train=torch.tensor([], dtype=torch.long)), "the train split is empty"),
        (dict(val=torch.tensor([], dtype=torch.long)), "the val split is empty"),
        (dict(test=torch.tensor([], dtype=torch.long)), "the test split is empty"),
        (dict(test=torch.tensor([5])), "names node 5, nodes are 0 to 4"),
        (dict(val=torch.tensor([-1])), "names node -1"),
        (dict(val=torch.tensor([1])), "the val split shares node 1"),
        (dict(test=torch.tensor([3, 2])), "the test split shares node 2"),
        (dict(train=torch.tensor([0, 1, 0])), "names a node twice"),
        (dict(train=torch.ones(5, dtype=torch.bool)), "train must be an int64 vector, got torch.bool"),
        (dict(train=[0, 1]), "got list"),
        (dict(y=torch.zeros(5, dtype=torch.long, device="meta")), "on one device"),
        (dict(task="graph"), "task 'graph' with metric 'accuracy' is not known"),
        (dict(metric="auc"), "metric 'auc'"),
    ],
)
def test_refused(changes, said, refusal):
    assert said in refusal(small, **changes)


def link(**changes) -> Dataset:
    pairs = {field: torch.tensor([[0, 1], [2, 4]]) for field in ("train", "val", "test", "val_neg", "test_neg")}
    return small(**{**pairs, "x": None, "y": None, "num_classes": 0, "task": "link", "metric": "hits@20", **changes})


def labelled(**changes) -> Dataset:
    y = torch.tensor([[0.0, 1], [1, 1], [float("nan"), 0], [0, 0], [1, 0]])
    return small(**{"y": y, "task": "multilabel", "metric": "rocauc", "edge_attr": torch.ones(4, 3), **changes})


def test_other_tasks():
    data = link()
    assert (data.num_nodes, data.num_features, data.device.type) == (5, 0, "cpu") and "split=2/2/2" in repr(data)
    assert data.with_row_normalized_features() is data
    assert data.fingerprint != link(val_neg=torch.tensor([[0, 2]])).fingerprint
    assert labelled().fingerprint != labelled(edge_attr=torch.zeros(4, 3)).fingerprint
    moved = labelled().to("meta")
    assert moved.y.device.type == moved.edge_attr.device.type == "meta"
    assert small(y=torch.tensor([0, 1, 0, -1, 1])).y[3] == -1  # in no split


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (link, dict(metric="accuracy"), "link with hits@50"),
        (link, dict(y=torch.zeros(5)), "a link task has no labels"),
        (link, dict(num_classes=2), "a link task has no labels"),
        (link, dict(train=torch.tensor([0, 1])), "train must be an int64 matrix [n, 2], got torch.int64 [2]"),
        (link, dict(val_neg=None), "val_neg must be an int64 matrix [n, 2], got NoneType"),
        (link, dict(test=torch.zeros(0, 2, dtype=torch.long)), "test must be pairs of nodes [at least 1, 2], got [0, 2]"),
        (link, dict(test_neg=torch.tensor([[0, 5]])), "test_neg names node 5, nodes are 0 to 4"),
        (small, dict(x=None), "x must be a tensor or an acefast.CSR, got NoneType"),
        (labelled, dict(y=torch.zeros(5, 3)), "y must be float32 [5, 2], got torch.float32 [5, 3]"),
        (labelled, dict(y=None), "y must be float32 [5, 2], got NoneType"),
        (labelled, dict(y=torch.full((5, 2), 0.5)), "labels must be 0, 1 or, where unknown, NaN"),
        (labelled, dict(edge_attr=torch.ones(5, 3)), "edge_attr must be float32 [4, at least 1], one row an edge"),
        (labelled, dict(edge_attr=torch.full((4, 3), float("inf"))), "edge features must be finite, got 12"),
        (labelled, dict(edge_attr=1), "edge_attr must be a tensor or None, got int"),
    ],
)
def test_other_tasks_refused(make, changes, said, refusal):
    assert said in refusal(make, **changes)


def test_registry(refusal):
    on_disk = ("cora", "citeseer", "pubmed", "ogbn-arxiv", "ogbn-proteins", "ogbn-products", "ogbn-papers100M", "ogbl-collab", "ogbl-ddi")
    twins = ("ogbn-arxiv", "ogbn-proteins", "ogbn-products", "reddit", "ogbl-collab", "ogbl-ddi")
    assert DATASETS == (*on_disk, "synthetic-cora", *(f"twin:{name}" for name in twins))
    assert load_dataset("synthetic-cora").name == "synthetic-cora"
    text = refusal(load_dataset, "Cora")
    assert "'Cora'" in text and all(name in text for name in DATASETS)
    for name in on_disk:
        assert "--data-root" in refusal(load_dataset, name)

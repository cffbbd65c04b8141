import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from acefast import ops
from acefast.data import load_dataset
from acefast.data.metrics import accuracy, hits, rocauc
from acefast.data.twin import TWINS, draw_pairs, load_twin

SCALES = {
    "ogbn-arxiv": 0.05,
    "ogbn-proteins": 0.01,
    "ogbn-products": 0.005,
    "reddit": 0.01,
    "ogbl-collab": 0.01,
    "ogbl-ddi": 0.4,
}


@pytest.fixture(scope="module")
def twins():
    return {name: load_dataset(f"twin:{name}:{scale}") for name, scale in SCALES.items()}


@pytest.mark.parametrize("name", TWINS)
def test_counts(twins, name):
    data, twin, scale = twins[name], TWINS[name], SCALES[name]
    assert (data.name, data.task, data.metric, data.num_classes) == (
        f"twin:{name}:{scale}",
        twin.task,
        twin.metric,
        twin.classes,
    )
    assert data.num_nodes == round(twin.nodes * scale)
    split = [len(part) for part in (data.train, data.val, data.test)]
    assert all(abs(found - count * scale) <= 1 for found, count in zip(split, twin.split))
    if twin.task == "link":
        assert data.graph.num_edges == 2 * split[0]
        assert [len(data.val_neg), len(data.test_neg)] == [round(count * scale) for count in twin.negatives]
    else:
        assert abs(data.graph.num_edges - 2 * twin.pairs * scale - twin.self_loops * data.num_nodes) <= 2
    columns = twin.edge_columns + 8 if twin.task == "multilabel" else twin.columns
    assert data.num_features == columns and data.features == ("generated" if columns else "none")
    assert (data.edge_attr is not None) == (twin.edge_columns > 0)


@pytest.mark.parametrize("name", TWINS)
def test_graph_is_simple_symmetric_and_in_csr_order(twins, name):
    data = twins[name]
    src, dst = data.graph.edge_index()
    key, other = dst * data.num_nodes + src, src * data.num_nodes + dst
    assert data.graph.eid is None and bool((key[1:] > key[:-1]).all()) and torch.equal(other.sort().values, key)
    assert torch.equal(other[data.graph.reverse_edges().long()], key)
    assert int((src == dst).sum()) == (data.num_nodes if TWINS[name].self_loops else 0)
    degree = data.graph.in_degrees().float()
    assert degree.max() > 1.4 * degree.mean()
    if data.task != "link":
        assert degree.min() >= 1
    if data.edge_attr is not None:  # the same in both directions
        assert torch.equal(data.edge_attr[data.graph.reverse_edges().long()], data.edge_attr)
        assert data.edge_attr.std() > 0.1 and data.edge_attr.min() >= 0


def test_link_splits_and_negatives_share_nothing(twins):
    for name in ("ogbl-collab", "ogbl-ddi"):
        data = twins[name]
        keys = [
            pairs.sort(1).values @ torch.tensor([data.num_nodes, 1])
            for pairs in (data.train, data.val, data.test, data.val_neg, data.test_neg)
        ]
        assert torch.cat(keys).unique().numel() == sum(key.numel() for key in keys)
        src, dst = data.graph.edge_index()
        assert torch.equal(keys[0].sort().values, (src * data.num_nodes + dst)[src < dst].sort().values)


def test_proteins_features_are_sums_and_species(twins):
    data = twins["ogbn-proteins"]
    sums = torch.zeros(data.num_nodes, 8).index_add_(0, data.graph.edge_index()[1], data.edge_attr)
    torch.testing.assert_close(data.x[:, :8], sums, rtol=1e-4, atol=1e-4)
    species = data.x[:, 8:]
    assert (
        bool((species.sum(1) == 1).all())
        and bool((species[data.val, 6] == 1).all())
        and bool((species[data.test, 7] == 1).all())
    )
    assert 0.1 < data.y.mean() < 0.6


@pytest.mark.parametrize("pieces", [2**8, 2**20])
def test_the_same_for_any_number_of_threads(monkeypatch, pieces):
    """Pieces are part of the stream, threads are not."""
    monkeypatch.setattr("acefast.data.twin.DRAWS", pieces)
    found, threads = [], torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(load_twin("twin:ogbn-proteins:0.003").fingerprint)
    torch.set_num_threads(threads)
    assert found[0] == found[1] != load_twin("twin:ogbn-proteins:0.003", seed=1).fingerprint


@pytest.mark.parametrize(
    "n, pairs, exponent",
    [(8, 13, 0.5), (16, 4500, 0.5), (50, 0, 0.3), (300, 5000, -1.5), (1000, 3000, 0.9), (3, 1, 0.0)],
)
@pytest.mark.parametrize("communities", [1, 2])
def test_pairs_are_as_many_as_asked_for(n, pairs, exponent, communities):
    low, high, community = draw_pairs(n, pairs, exponent, 0, communities=communities, homophily=0.5)
    assert len(low) == max(n - communities, min(pairs, n * (n - 1) // 4))
    assert bool((low < high).all()) and bool((np.diff(low.astype(np.int64) * n + high) > 0).all())
    assert np.array_equal(np.unique(community), np.arange(communities)) and low.dtype == high.dtype == np.int32


def test_degrees_and_homophily():
    n, pairs = 20_000, 200_000
    low, high, community = draw_pairs(n, pairs, 0.5, 0, communities=20, homophily=0.6)
    degree = np.sort(np.bincount(np.concatenate((low, high)), minlength=n))[::-1]
    law = 0.5 * 2 * pairs / n**0.5 / (np.arange(n) + 0.5) ** 0.5
    for rank in (100, 1_000, 10_000):  # the chains add up to two
        assert law[rank] * 0.85 < degree[rank] < law[rank] * 1.15 + 2
    same = (community[low] == community[high]).mean()
    assert 0.6 < same < 0.6 + 0.4 / 20 + 0.05


def fitted(data, x):
    """Outputs for all nodes of the ridge regression from x to the labels of the training nodes."""
    y = data.y if data.y.dim() == 2 else F.one_hot(data.y, data.num_classes).float()
    x = torch.cat(((x - x.mean(0)) / x.std(0).clamp(min=1e-6), torch.ones(len(x), 1)), 1)
    known = x[data.train]
    return x @ torch.linalg.solve(known.T @ known + torch.eye(x.shape[1]), known.T @ y[data.train])


def test_the_graph_helps_node_classification(twins):
    """The ceiling is 1 - 0.25 · 39/40 by the labels that are noise; the features alone say little."""
    data, found = twins["ogbn-arxiv"], []
    x = data.x
    for _ in range(3):
        found.append(accuracy(fitted(data, x)[data.test], data.y[data.test]))
        x = ops.spmm(data.graph, x, reduce="mean")
    assert found[0] < 0.3 and 0.55 < found[1] < found[2] < 0.78, found


def test_proteins_can_be_learned(twins):
    data = twins["ogbn-proteins"]
    mean = data.x[:, :8] / data.graph.in_degrees()[:, None]
    assert 0.6 < rocauc(fitted(data, mean)[data.val], data.y[data.val]) < 0.95


def test_links_can_be_told(twins):
    """Common neighbours, against chance."""
    data = twins["ogbl-collab"]
    a = torch.zeros(data.num_nodes, data.num_nodes)
    src, dst = data.graph.edge_index()
    a[dst, src] = 1
    positive, negative = ((a[pairs[:, 0]] * a[pairs[:, 1]]).sum(1) for pairs in (data.test, data.test_neg))
    assert hits(positive, negative, 50) > 0.05
    assert (positive > 0).float().mean() > 10 * (negative > 0).float().mean()


def test_quick():
    start = time.perf_counter()
    data = load_twin("twin:ogbn-products:0.02")
    assert (
        time.perf_counter() - start < 12 and data.graph.num_edges == 2_474_366
    )  # one to two seconds on two quiet cores


@pytest.mark.parametrize(
    "name",
    [
        "twin:",
        "twin:cora",
        "twin:reddit:0",
        "twin:reddit:x",
        "twin:reddit:1:2",
        "twin:reddit:-1",
        "twin:reddit:nan",
        "twin:reddit:17",
    ],
)
def test_refused(name, refusal):
    text = refusal(load_dataset, name)
    assert repr(name) in text and "twin:NAME:SCALE" in text and "ogbl-ddi" in text


def test_self_loops(refusal):
    assert load_twin("twin:ogbn-arxiv:0.01", add_self_loops=False).graph.self_loops().numel() == 0
    assert "alone, leave add_self_loops out" in refusal(load_dataset, "twin:reddit:0.01", add_self_loops=True)
    assert "alone, leave add_self_loops out" in refusal(load_dataset, "synthetic-cora", add_self_loops=True)

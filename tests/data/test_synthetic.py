import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from acefast import ops
from acefast.data import synthetic_citation


@pytest.fixture(scope="module")
def data():
    return synthetic_citation()


def same_class(data) -> float:
    src, dst = data.graph.edge_index()
    return float((data.y[src] == data.y[dst]).double().mean())


def test_counts_are_coras(data):
    assert (data.num_nodes, data.graph.num_edges, data.num_features, data.num_classes) == (2708, 2 * 5278, 1433, 7)
    assert [index.numel() for index in (data.train, data.val, data.test)] == [140, 500, 1000]
    assert torch.equal(torch.bincount(data.y[data.train]), torch.full((7,), 20))
    assert sorted(torch.bincount(data.y).tolist()) == [180, 217, 298, 351, 418, 426, 818]
    assert data.name == "synthetic-cora"


@pytest.mark.parametrize("seed", range(3))
def test_graph_is_simple_symmetric_and_in_csr_order(seed):
    data = synthetic_citation(seed=seed)
    src, dst = data.graph.edge_index()
    key = dst * data.num_nodes + src
    assert bool((key[1:] > key[:-1]).all()) and data.graph.eid is None
    assert torch.equal(torch.sort(src * data.num_nodes + dst).values, key)
    assert not bool((src == dst).any())
    assert abs(same_class(data) - 0.81) < 0.01


def test_degrees_follow_coras_law(data):
    degree = data.graph.in_degrees().numpy()
    assert degree.min() == 1 and 120 <= degree.max() <= 200
    # P(d >= k) of Cora, counted in its raw files.
    law = (2, 0.821), (3, 0.606), (4, 0.401), (6, 0.154), (10, 0.045), (20, 0.0089), (30, 0.0055), (60, 0.0015)
    for k, share in law:
        assert abs((degree >= k).mean() - share) < 0.065 and 0.5 < (degree >= k).mean() / share < 2, k


def test_features_are_sparse_bags_of_words(data):
    words = (data.x.rowptr[1:] - data.x.rowptr[:-1]).double()
    assert abs(float(words.mean()) - 18.17) < 0.5 and abs(float(words.std()) - 5.76) < 0.5
    assert 1 <= int(words.min()) and int(words.max()) <= 30
    assert bool((data.x.value == 1).all())
    dense = data.x.to_dense()
    assert float(dense.max()) == 1  # no word twice in a document
    used = torch.sort(dense.sum(0), descending=True).values
    assert 0.2 < used[0] / 2708 < 0.6 and 0.02 < used[100] / 2708 < 0.06  # Cora: 0.40 and 0.037


@pytest.mark.parametrize("with_graph", [True, False])
def test_difficulty_is_coras(data, with_graph):
    """A dense two-layer GCN gets 75 to 85 %, and the words alone far less, as on Cora (81 and 59 %)."""
    torch.manual_seed(0)
    x = data.with_row_normalized_features().x
    c, c_self = ops.gcn_norm(data.graph)

    def forward(dropout):
        h = x
        for w in weights:
            h = ops.masked_linear(h if h is x else F.dropout(F.relu(h), dropout), w)
            h = ops.spmm(data.graph, h, weight=c, self_weight=c_self) if with_graph else h
        return h

    weights = [torch.empty(64, data.num_features), torch.empty(data.num_classes, 64)]
    for w in weights:
        torch.nn.init.xavier_uniform_(w).requires_grad_()
    optimizer = torch.optim.Adam(weights, lr=0.01, weight_decay=5e-4)
    best = (0.0, 0.0)
    for epoch in range(1, 71):
        optimizer.zero_grad()
        F.cross_entropy(forward(0.5)[data.train], data.y[data.train]).backward()
        optimizer.step()
        if epoch % 10 == 0:
            with torch.no_grad():
                right = (forward(0.0).argmax(1) == data.y).float()
            best = max(best, (float(right[data.val].mean()), float(right[data.test].mean())))
    low, high = (0.75, 0.85) if with_graph else (0.45, 0.68)
    assert low <= best[1] <= high, best


def test_deterministic_and_quick():
    start = time.perf_counter()
    data = synthetic_citation(seed=3)
    assert time.perf_counter() - start < 2
    assert data.fingerprint == synthetic_citation(seed=3).fingerprint
    assert data.fingerprint != synthetic_citation(seed=4).fingerprint


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "sizes",
    [
        dict(num_nodes=50, num_features=12, num_classes=3, words=3),
        dict(num_nodes=120, num_features=40, num_classes=3),
        dict(num_nodes=200, num_features=64, num_classes=7, num_edges=900),
        dict(num_nodes=64, num_features=1, num_classes=2, words=1, strays=0, homophily=0.75),
        dict(num_nodes=5000, num_features=100, num_classes=20, num_edges=20000, homophily=0.6),
    ],
)
def test_other_sizes(sizes, seed):
    data = synthetic_citation(**sizes, seed=seed, train_per_class=2, num_val=20, num_test=20)
    expected = sizes.get("num_edges", round(sizes["num_nodes"] * 5278 / 2708))
    assert data.graph.num_edges == 2 * expected and data.num_nodes == sizes["num_nodes"]
    assert int(data.graph.in_degrees().min()) >= 1
    src, dst = data.graph.edge_index()
    assert not bool((src == dst).any()) and np.unique(dst * data.num_nodes + src).size == 2 * expected
    # Below it where a community is too small for its hubs.
    assert -0.25 < same_class(data) - sizes.get("homophily", 0.81) < 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(num_nodes=1), "num_nodes must be at least 2, got 1"),
        (dict(num_classes=1), "num_classes"),
        (dict(num_features=0), "num_features"),
        (dict(num_edges=10), "num_edges must lie in [1354, "),
        (dict(num_edges=3_000_000), "got 3000000"),
        (dict(homophily=1.5), "homophily must lie in [0, 1], got 1.5"),
        (dict(homophily=0.99), "homophily 0.99 is out of reach"),
        (dict(words=float("nan")), "words"),
        (dict(words=31), "words must lie in [1, 30]"),
        (dict(strays=-0.1), "strays"),
        (dict(train_per_class=200), "class 6 has 180 nodes, expected 200"),
        (dict(num_test=3000), "2568 nodes remain"),
        (dict(num_val=0), "the val split is empty"),
    ],
)
def test_refused(arguments, said, refusal):
    assert said in refusal(synthetic_citation, **arguments)

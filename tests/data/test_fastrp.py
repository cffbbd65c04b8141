import numpy as np
import torch

from acefast.data import fastrp, load_dataset
from acefast.data.fastrp import COLUMNS
from acefast.graph import Graph
from acefast.random import generator


def by_the_formula(dense, seed):
    """In float64, from the dense adjacency matrix without self-loops."""
    dense = dense - np.diag(np.diag(dense))
    walk = dense / np.maximum(dense.sum(1, keepdims=True), 1)
    r = torch.randn(len(dense), COLUMNS, generator=generator(seed, "fastrp")).double().numpy()
    x = sum(np.linalg.matrix_power(walk, power) @ r for power in (2, 3, 4, 5))
    return (x - x.mean(0)) / x.std(0)


def test_formula(each_backend):
    """A multigraph with self-loops and a node without neighbours."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 59, (2, 150))
    src, dst = np.concatenate((a, b)), np.concatenate((b, a))
    graph, dense = Graph.from_edge_index(torch.from_numpy(np.stack((src, dst))), 60), np.zeros((60, 60))
    assert graph.self_loops().numel()
    np.add.at(dense, (dst, src), 1)
    x = fastrp(graph, seed=3)
    assert x.shape == (60, COLUMNS) and x.dtype == torch.float32
    np.testing.assert_allclose(x.numpy(), by_the_formula(dense, 3), rtol=0, atol=2e-5)
    assert torch.equal(x, fastrp(graph, seed=3)) and not torch.equal(x, fastrp(graph, seed=4))
    assert torch.equal(x, fastrp(graph.with_self_loops(), seed=3))


def test_a_graph_without_edges_has_zeros():
    assert torch.equal(fastrp(Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), 3)), torch.zeros(3, COLUMNS))


def test_in_the_place_of_given_features(refusal):
    data = load_dataset("synthetic-cora", features="fastrp")
    assert data.features == "fastrp" and torch.equal(data.x, fastrp(data.graph)) and data.num_features == COLUMNS
    assert load_dataset("synthetic-cora").features == "given"
    assert "features 'none' are not known, expected one of given, fastrp, learned" in refusal(
        load_dataset, "synthetic-cora", features="none"
    )

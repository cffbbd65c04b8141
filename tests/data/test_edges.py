import numpy as np
import pytest
import torch

from acefast.data import edges
from acefast.graph import Graph


def same(arrays, edge_index, n):
    """The graph of `arrays` is Graph.from_edge_index of the same edges, array for array."""
    made, wanted = edges.to_graph(arrays), Graph.from_edge_index(torch.from_numpy(edge_index), n)
    if wanted.ceid is None:
        wanted.ceid = torch.arange(wanted.num_edges, dtype=torch.int32)
    for name in ("rowptr", "col", "colptr", "row", "ceid"):
        ours, theirs = getattr(made, name), getattr(wanted, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert torch.equal(made.self_loops(), wanted.self_loops()) and torch.equal(
        made.reverse_edges(), wanted.reverse_edges()
    )
    assert made.eid is None and wanted.eid is None and made.fingerprint() == wanted.fingerprint()


def raw(seed, n, count, loops=True):
    """Two int32 ends with repeats, both directions of a pair and, where asked for, self-loops."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, n, (2, count), dtype=np.int32)
    return (a, b) if loops else (a[a != b], b[a != b])


CASES = [(1, 3), (2, 5), (5, 0), (7, 40), (50, 60), (300, 4000)]


@pytest.mark.parametrize("n, count", CASES)
@pytest.mark.parametrize("loops", [True, False])
def test_both_directions_of_every_pair(n, count, loops):
    a, b = raw(n, n, count, loops)
    low, high, number = edges.sorted_pairs(a, b, n)
    arrays = edges.undirected(low, high, n, number=number, double_loops=True)
    src, dst, pair = np.concatenate((a, b)), np.concatenate((b, a)), np.tile(np.arange(len(a)), 2)
    order = np.lexsort((pair, src, dst))
    same(arrays, np.stack((src, dst))[:, order].astype(np.int64), n)
    ends = np.sort(np.stack((arrays["col"], np.repeat(np.arange(n), np.diff(arrays["rowptr"])))), 0)
    assert np.array_equal(ends, np.sort(np.stack((a, b)), 0)[:, arrays["raw"]])
    assert np.array_equal(np.bincount(arrays["raw"], minlength=len(a)), np.full(len(a), 2))


@pytest.mark.parametrize("n, count", CASES)
@pytest.mark.parametrize("add", [True, False])
def test_simple_undirected(n, count, add):
    a, b = raw(n, n, count)
    keys = np.concatenate(
        (a.astype(np.int64) * n + b, b.astype(np.int64) * n + a, np.arange(n if add else 0) * (n + 1))
    )
    dst, src = np.divmod(np.unique(keys), n)
    same(edges.undirected_simple(a, b, n, add_self_loops=add), np.stack((src, dst)), n)


@pytest.mark.parametrize("n, count", CASES)
def test_directed(n, count):
    src, dst = raw(n, n, count)
    order = np.lexsort((src, dst))
    arrays = edges.directed(src, dst, n)
    same(arrays, np.stack((src, dst))[:, order].astype(np.int64), n)
    assert np.array_equal(arrays["raw"], order)


def test_moving_keeps_what_is_shared():
    g = edges.to_graph(edges.undirected_simple(*raw(0, 9, 30), 9, add_self_loops=True)).to("meta")
    assert g.row is g.col and g.colptr is g.rowptr and g.reverse_edges() is g.ceid and g.device.type == "meta"


def test_refused(refusal):
    arrays = edges.undirected_simple(*raw(0, 9, 30), 9, add_self_loops=False)
    for name, change in [("col", 1), ("col", -9), ("ceid", 60), ("rowptr", 1), ("loops", 99)]:
        assert "not those of a graph of 9 nodes" in refusal(edges.to_graph, {**arrays, name: arrays[name] + 9 * change})
    assert "not those" in refusal(edges.to_graph, {**arrays, "ceid": arrays["ceid"][1:]})

import itertools

import pytest
import torch

from acefast import Graph, ops
from acefast.ops import backend
from acefast.ops.triton import rows, spmm as kernels
from tests.inputs import assert_close, graphs
from tests.triton.cases import FACTORS, check_spmm, check_spmm_bwd, edge_inputs, random_graph

GRAPHS = graphs()


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph(name):
    check_spmm(GRAPHS[name], 5, torch.float32)
    check_spmm_bwd(GRAPHS[name], 5, torch.float32)


@pytest.mark.parametrize("num_feats", [0, 1, 33, 130, 300])
def test_widths(num_feats):
    graph = random_graph()
    check_spmm(graph, num_feats, torch.float32)
    for need in ((True, True), (True, False), (False, True)) if num_feats > 128 else ((True, True),):
        check_spmm_bwd(graph, num_feats, torch.float32, need=need)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_feats", [6, 300])
def test_dtypes(dtype, num_feats):
    check_spmm(random_graph(), num_feats, dtype)
    check_spmm_bwd(random_graph(), num_feats, dtype)


@pytest.mark.parametrize("factors", [c for n in (0, 1, 4, 5) for c in itertools.combinations(FACTORS, n)], ids="+".join)
def test_options(factors):
    graph = random_graph(num_edges=23)
    check_spmm(graph, 3, torch.float32, factors)
    check_spmm_bwd(graph, 3, torch.float32, factors)


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("all_edges", [False, True])
def test_what_is_needed(need, all_edges):
    check_spmm_bwd(random_graph(), 3, torch.float32, need=need, all_edges=all_edges)


@pytest.mark.parametrize(("heads", "num_feats"), [(1, 6), (3, 5), (8, 40), (2, 300)])
def test_heads(heads, num_feats):
    check_spmm(random_graph(), num_feats, torch.float32, heads=heads)
    check_spmm_bwd(random_graph(), num_feats, torch.float32, heads=heads)
    check_spmm_bwd(random_graph(8, 5), num_feats, torch.float32, ("mask",), need=(True, heads != 3), heads=heads)


@pytest.mark.parametrize("heads", [None, 2])
def test_selections(heads):
    """Edges that no slot names have gradient 0, whatever all_edges says."""
    check_spmm(random_graph(), 3, torch.float32, heads=heads, selection=True)
    for all_edges in (False, True):
        check_spmm_bwd(random_graph(), 3, torch.float32, all_edges=all_edges, heads=heads, selection=True)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_index_types_and_caller_order(index):
    """A graph given in CSR order has no eid; the same graph with an explicit identity gives the same bits."""
    for graph in (random_graph(), GRAPHS["sorted"], random_graph(5, 12)):
        arrays = [t if t is None or i in (0, 3) else t.to(index) for i, t in enumerate(graph.arrays)]
        typed = Graph(*arrays)
        y = check_spmm(typed, 3, torch.float32)
        gradients = check_spmm_bwd(typed, 3, torch.float32)
        if arrays[2] is None:
            arrays[2] = torch.arange(graph.num_edges, dtype=index)
            assert torch.equal(y, check_spmm(Graph(*arrays), 3, torch.float32))
        if arrays[5] is None:
            arrays[5] = torch.arange(graph.num_edges, dtype=index)
            again = check_spmm_bwd(Graph(*arrays), 3, torch.float32)
            assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize(
    "degrees",
    [
        [6, 0, 0, 13, 5, 1, 40, 0, 7, 6],  # hubs that meet, that end and begin in one window, rows of just one piece
        [5, 5, 10, 0, 15, 30],  # every cut on a row's edge
        [0, 0, 60, 0],
        [1, 11, 1, 11, 1],
    ],
    ids=str,
)
@pytest.mark.parametrize("ways", [2, 128])
def test_hubs_are_cut_and_joined(degrees, ways, monkeypatch):
    monkeypatch.setattr(rows, "MIN_PIECE", 5)
    monkeypatch.setattr(rows, "PIECE_MEANS", 0)
    monkeypatch.setattr(rows, "SEARCH_WAYS", ways)
    monkeypatch.setattr(rows, "JOIN_PIECES", 4)
    ends = torch.repeat_interleave(torch.arange(len(degrees)), torch.tensor(degrees))
    generator = torch.Generator().manual_seed(sum(degrees))
    other = torch.randint(0, len(degrees), (len(ends),), generator=generator)
    order = torch.randperm(len(ends), generator=generator)
    by_row = Graph.from_edge_index(torch.stack((other, ends))[:, order], num_nodes=len(degrees))
    by_column = Graph.from_edge_index(torch.stack((ends, other))[:, order], num_nodes=len(degrees))
    check_spmm(by_row, 3, torch.float32)
    check_spmm_bwd(by_column, 3, torch.float32)
    check_spmm_bwd(by_column, 3, torch.float32, need=(False, True), all_edges=True)


def test_hub_wider_than_a_block(monkeypatch):
    monkeypatch.setattr(rows, "MIN_PIECE", 16)
    monkeypatch.setattr(rows, "PIECE_MEANS", 0)
    ring = torch.arange(6)
    edges = torch.cat((torch.stack((torch.full((50,), 2), torch.arange(50) % 6)), torch.stack((ring, ring.roll(1)))), 1)
    check_spmm(Graph.from_edge_index(edges.flip(0), num_nodes=6), 300, torch.float32)
    check_spmm_bwd(Graph.from_edge_index(edges, num_nodes=6), 300, torch.float32)


def test_more_rows_than_one_launch_takes(monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROWS", 4)
    monkeypatch.setattr(rows, "MIN_PIECE", 4)
    monkeypatch.setattr(rows, "PIECE_MEANS", 0)
    check_spmm(random_graph(), 3, torch.float32)
    check_spmm_bwd(random_graph(), 3, torch.float32)


def test_a_removed_edge_does_not_exist():
    """Neither a NaN nor an infinity at the other end of a removed edge is seen."""
    graph = random_graph()
    x, dy, values = edge_inputs(graph, 3, torch.float32)
    src, dst = graph.edge_index()
    values["keep"] = (src != 4) & (dst != 5)
    values["self_weight"] = None
    x[4], dy[5] = torch.nan, torch.inf
    assert kernels.spmm(*graph.arrays, x, *values.values(), False).isfinite().all()
    for all_edges in (False, True):
        dx, dcoef, _ = kernels.spmm_bwd(*graph.arrays, dy, x, *values.values(), True, True, all_edges)
        assert dx.isfinite().all()
        assert dcoef[values["keep"]].isfinite().all()
    assert (kernels.spmm_bwd(*graph.arrays, dy, x, *values.values(), False, True, False)[1][~values["keep"]] == 0).all()


def test_public_op_on_this_backend():
    graph = random_graph()
    generator = torch.Generator().manual_seed(3)
    x, mask = torch.randn(9, 4, generator=generator), torch.rand(graph.num_edges, generator=generator)
    results = []
    for name in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in (x, mask)]
        with backend.backend(name):
            y = ops.spmm(graph, leaves[0], mask=leaves[1], reduce="mean")
            y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, torch.float32)

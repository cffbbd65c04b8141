"""Graph: structure, checks, conversions."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from acefast import CSR, Graph, InputError, ops
from tests.inputs import REPOSITORY, edge_sets


@pytest.mark.parametrize("name", edge_sets())
def test_structure(name):
    edges, sizes = edge_sets()[name]
    g = Graph.from_edge_index(edges, sizes)
    assert torch.equal(g.edge_index(), edges)
    assert (g.num_src, g.num_dst, g.num_edges) == (*sizes, edges.size(1))
    slots = torch.arange(g.num_edges)
    for ptr, other, ids, key, value in (
        (g.rowptr, g.col, g.eid, edges[1], edges[0]),
        (g.colptr, g.row, g.ceid, edges[0], edges[1]),
    ):
        ids = slots if ids is None else ids.long()
        assert torch.equal(ids.sort().values, slots)
        assert torch.equal(other.long(), value[ids])
        for i in range(ptr.numel() - 1):
            inside = ids[ptr[i] : ptr[i + 1]]
            assert bool((key[inside] == i).all()) and torch.equal(inside, inside.sort().values)
    by_destination = bool((edges[1].diff() >= 0).all())
    assert (g.eid is None) == by_destination


def test_index_types_and_inferred_size():
    g = Graph.from_edge_index(torch.tensor([[0, 4], [2, 1]], dtype=torch.int32))
    assert g.num_nodes == 5 and g.col.dtype == torch.int32 and g.rowptr.dtype == torch.int64
    assert Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long)).num_nodes == 0


@pytest.mark.parametrize(
    ("edges", "nodes", "words"),
    [
        ([[0, 1], [1, 0]], 2, "must be an int32 or int64 tensor"),
        (torch.zeros(2, 3), 2, "must be an int32 or int64 tensor"),
        (torch.zeros(3, 2, dtype=torch.long), 2, r"must have shape \[2, E\], got \[3, 2\]"),
        (torch.tensor([[0, 2], [1, 0]]), 2, "source index 2 is out of range for 2 source nodes"),
        (torch.tensor([[0, 1], [1, -1]]), 2, "destination index -1 is out of range"),
        (torch.tensor([[0, 1], [1, 3]]), (2, 3), "destination index 3 is out of range for 3"),
        (torch.zeros(2, 0, dtype=torch.long), -1, "must not be negative"),
    ],
)
def test_refusals(edges, nodes, words):
    with pytest.raises(InputError, match=words):
        Graph.from_edge_index(edges, nodes)


@pytest.mark.parametrize("name", edge_sets())
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_compact(name, fraction):
    edges, sizes = edge_sets()[name]
    g = Graph.from_edge_index(edges, sizes)
    keep = torch.rand(g.num_edges) < fraction
    expected = Graph.from_edge_index(edges[:, keep], sizes)
    for h in (g.compact(keep), g.compact(keep, num_kept=int(keep.sum()))):
        assert torch.equal(h.edge_index(), edges[:, keep])
        assert torch.equal(h.edge_ids, keep.nonzero().squeeze(1))
        assert torch.equal(h.rowptr, expected.rowptr) and torch.equal(h.col, expected.col)
        assert torch.equal(h.colptr, expected.colptr) and torch.equal(h.row, expected.row)
    with pytest.raises(InputError, match="keep must be bool"):
        g.compact(keep.float())


def test_fingerprint_depends_on_edges_order_and_sizes():
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    g = Graph.from_edge_index(edges, 3)
    assert g.fingerprint() == Graph.from_edge_index(edges.int(), 3).fingerprint()
    others = (Graph.from_edge_index(edges.flip(1), 3), Graph.from_edge_index(edges, 4))
    assert len({g.fingerprint(), *(o.fingerprint() for o in others)}) == 3


def test_scipy_and_pyg_round_trips():
    from torch_geometric.data import Data

    edges, sizes = edge_sets()["power_law"]
    g = Graph.from_edge_index(edges, sizes)
    again = Graph.from_scipy(g.to_scipy(torch.arange(g.num_edges).float()))
    assert torch.equal(again.edge_index(), edges)
    data = Data(edge_index=edges, num_nodes=97)
    assert torch.equal(Graph.from_pyg(data).edge_index(), edges)
    back = g.to_pyg(y=torch.ones(97))
    assert torch.equal(back.edge_index, edges) and back.num_nodes == 97 and back.y.sum() == 97


def test_torch_sparse_round_trip():
    torch_sparse = pytest.importorskip("torch_sparse", reason="torch_sparse is not installed")
    edges, sizes = edge_sets()["bipartite"]
    edges = torch.unique(edges.flip(0), dim=1).flip(0)  # sorted by destination; SparseTensor.to_dense drops multi-edges
    adj_t = torch_sparse.SparseTensor(row=edges[1], col=edges[0], sparse_sizes=(sizes[1], sizes[0]))
    g = Graph.from_torch_sparse(adj_t)
    assert g.num_nodes == sizes
    value = torch.arange(g.num_edges).float()
    dense = g.to_torch_sparse(value).to_dense()
    assert torch.equal(dense, torch.from_numpy(g.to_scipy(value).toarray()).T)


def test_dgl_round_trip():
    python = Path(os.environ.get("ACEFAST_DGL_PYTHON", Path(sys.prefix) / "dgl" / "bin" / "python"))
    if not python.exists():
        pytest.skip("DGL is not installed (ACEFAST_DGL_PYTHON names an interpreter that has it)")
    script = """
import torch
from acefast import Graph
for sizes in ((20, 20), (5, 9)):
    edges = torch.stack([torch.randint(0, n, (60,)) for n in sizes])
    graph = Graph.from_edge_index(edges, sizes).to_dgl()
    back = Graph.from_dgl(graph)
    assert torch.equal(back.edge_index(), edges) and (back.num_src, back.num_dst) == sizes, sizes
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DGLBACKEND": "pytorch"}
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name, (_, sizes) in edge_sets().items() if sizes[0] == sizes[1] > 0])
@pytest.mark.parametrize("kept", ["all", "flags", "selection"])
def test_blocks_compute_the_rows_asked_for(name, kept):
    """Two layers of each kind on blocks give the whole graph's rows, and its gradients where those rows depend on them."""
    g = Graph.from_edge_index(*edge_sets()[name])
    generator = torch.Generator().manual_seed(4)
    nodes = torch.randperm(g.num_dst, generator=generator)[: max(1, g.num_dst // 4)]
    keep = None if kept == "all" else torch.rand(g.num_edges, generator=generator) < 0.6
    keep = g.select(keep) if kept == "selection" else keep
    blocks = g.blocks(nodes, 2, keep)
    assert torch.equal(blocks[1].dst_nodes, nodes) and torch.equal(blocks[0].dst_nodes, blocks[1].src_nodes)
    for block in blocks:
        assert (block.num_src, block.num_dst) == (block.src_nodes.numel(), block.dst_nodes.numel())
        assert torch.equal(block.src_nodes[: block.num_dst], block.dst_nodes) and block.num_edges == g.num_edges
        for ptr, ids in ((block.rowptr, block.eid), (block.colptr, block.ceid)):  # ids ascend within a row and a column
            ends = torch.zeros(ids.numel() + 1, dtype=torch.bool)
            ends[ptr] = True
            assert bool(((ids[1:] > ids[:-1]) | ends[1:-1]).all())
    layers = {
        "sum": lambda graph, h, m, k: ops.spmm(graph, h, mask=m, keep=k) + h[: graph.num_dst],
        "mean": lambda graph, h, m, k: ops.spmm(graph, h, mask=m, keep=k, reduce="mean"),
        "max": lambda graph, h, m, k: ops.spmm(graph, h, mask=m, keep=k, reduce="max"),
        "gat": lambda graph, h, m, k: ops.gat(
            graph, h.unsqueeze(1), h[:, :1], h[: graph.num_dst, 1:2], m, k, dropout=0.3, seed=5
        ).squeeze(1),
        "gen": lambda graph, h, m, k: ops.gen(graph, h, mask=m, keep=k, t=0.7),
    }
    for layer in layers.values():
        results = []
        for on_blocks in (False, True):
            x = torch.randn(g.num_src, 5, generator=torch.Generator().manual_seed(6)).double().requires_grad_()
            mask = torch.rand(g.num_edges, generator=torch.Generator().manual_seed(7)).double().add(0.5).requires_grad_()
            if on_blocks:
                y = layer(blocks[1], layer(blocks[0], x[blocks[0].src_nodes], mask, None), mask, None)
            else:
                y = layer(g, layer(g, x, mask, keep), mask, keep)[nodes]
            y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y))
            results.append((y.detach(), x.grad, mask.grad))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_block_is_not_an_edge_set():
    g = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
    (block,) = g.blocks(torch.tensor([1]), 1)
    for call in (block.edge_index, block.fingerprint, lambda: block.select(torch.ones(3, dtype=torch.bool))):
        with pytest.raises(InputError, match="block.graph"):
            call()
    with pytest.raises(InputError, match="square graph"):
        Graph.from_edge_index(torch.tensor([[0], [1]]), (1, 2)).blocks(torch.tensor([0]), 1)


def test_rows_of_a_sparse_matrix_and_its_graph():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(9, 7, generator=generator) * (torch.rand(9, 7, generator=generator) < 0.4)
    x = CSR.from_dense(dense)
    rows = torch.tensor([8, 0, 3, 3])
    keep = torch.arange(x.shape[1]) % 3 != 1
    assert torch.equal(x.columns(keep).to_dense(), x.to_dense()[:, keep])
    taken = x.take(rows)
    assert torch.equal(taken.to_dense(), dense[rows]) and torch.equal(taken.value, x.value[taken.entries])
    again = taken.take(torch.tensor([2]))
    assert torch.equal(again.value, x.value[again.entries])
    w = torch.randn(7, 5, generator=generator)
    assert torch.allclose(ops.spmm(taken.graph(), w, weight=taken.value), dense[rows] @ w, atol=1e-6)
    turned = w.t().contiguous().t().requires_grad_()  # [7, 5] in column order, so that its transpose is contiguous
    y = ops.masked_linear(taken.with_values(2 * taken.value), turned.t())
    y.sum().backward()
    assert torch.allclose(y, 2 * dense[rows] @ w, atol=1e-6)
    assert torch.allclose(turned.grad, 2 * dense[rows].sum(0).unsqueeze(1).expand(7, 5), atol=1e-6)
    with pytest.raises(InputError, match="value must be float"):
        x.with_values(torch.ones(2))


@pytest.mark.parametrize("size", [1, 3, 2**20])
def test_pieces_are_the_edges_in_order_of_their_destinations(zoo, size):
    for name, graph in zoo.items():
        found = [torch.cat(parts) for parts in zip(*graph.pieces(size), strict=True)] or [torch.zeros(0, dtype=torch.long)] * 3
        edges, src, dst = found
        assert torch.equal(torch.stack((src, dst)), graph.edge_index()[:, edges]), name
        assert torch.equal(edges.sort().values, torch.arange(graph.num_edges)) and bool((dst.diff() >= 0).all())
        digest = hashlib.sha256(f"{graph.num_src} {graph.num_dst} {graph.num_edges}".encode())
        digest.update(graph.edge_index().numpy())
        assert graph.fingerprint() == digest.hexdigest()

import pytest
import torch

from acefast import ops
from acefast.ops import backend, reference
from acefast.ops.triton import gat as kernels
from acefast.ops.triton import rows
from tests.inputs import assert_close, graphs
from tests.triton.cases import check_gat, gat_inputs, random_graph

GRAPHS = graphs()


@pytest.mark.parametrize("name", [name for name in GRAPHS if name not in ("hub", "power_law")])  # cut below
def test_every_graph(name):
    check_gat(GRAPHS[name], 3, 5, torch.float32, mask="edge", keep=True, dropout=0.3 * (name in ("one_edge", "multi_edges")))


@pytest.mark.parametrize("mask_on_logit", [False, True])
@pytest.mark.parametrize("mask", [None, "edge", "head"])
@pytest.mark.parametrize("keep", [False, True])
def test_options(mask, keep, mask_on_logit):
    check_gat(random_graph(11, 7), 2, 3, torch.float32, mask, keep, mask_on_logit, 0.5, save=False)


@pytest.mark.parametrize(
    ("heads", "num_feats", "selection"), [(1, 16, True), (8, 3, False), (8, 33, True), (2, 300, False)]
)
def test_heads_and_widths(heads, num_feats, selection):
    """Words of Philox shared by four heads or not; a block of all heads, blocks of heads, blocks of features."""
    check_gat(random_graph(), heads, num_feats, torch.float32, "edge", dropout=0.6, selection=selection)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    check_gat(random_graph(), 4, 6, dtype, mask="head", keep=True, mask_on_logit=True, dropout=0.25)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_no_dropout_and_nothing_else(dropout):
    check_gat(random_graph(), 2, 3, torch.float32, mask="edge", dropout=dropout)


@pytest.mark.parametrize("mask_on_logit", [False, True])
def test_hubs_are_cut_and_joined(mask_on_logit, monkeypatch):
    monkeypatch.setattr(rows, "MIN_PIECE", 5)
    monkeypatch.setattr(rows, "PIECE_MEANS", 0)
    monkeypatch.setattr(rows, "MAX_ROWS", 5)
    check_gat(random_graph(num_edges=40), 3, 70, torch.float32, "edge", True, mask_on_logit)


def test_logits_far_apart():
    """Maxima that rise from block to block, and scores whose exponential overflows."""
    graph = GRAPHS["multi_edges"]
    dy, inputs = gat_inputs(graph, 2, 3, torch.float32)
    for scale in (40.0, 400.0):
        far = [inputs[0], *(scale * t for t in inputs[1:3]), None, None]
        found = kernels.gat(*graph.arrays, *far, False, 0.2, 0.0, 0, 0, None, True)
        expected = reference.gat(*graph.arrays, *far, False, 0.2, 0.0, 0, 0, None, True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_removed_edge_does_not_exist():
    """Neither a NaN at its other end nor one in its mask is seen."""
    graph = random_graph()
    dy, inputs = gat_inputs(graph, 4, 3, torch.float32, "edge")
    src, dst = graph.edge_index()
    inputs[4] = keep = (src != 4) & (dst != 5)
    inputs[0][4], inputs[1][4], inputs[2][5], dy[5], inputs[3][~keep] = (torch.nan,) * 5
    for mask_on_logit in (False, True):
        how = (mask_on_logit, 0.2, 0.5, 3, 0, None)
        out = kernels.gat(*graph.arrays, *inputs, *how, True)
        assert all(t[torch.arange(9) != 5].isfinite().all() for t in (out[0], out[2], out[3]))
        assert (out[0][5] == 0).all() and (out[1][5] == -torch.inf).all()
        dz, da_src, _, dmask = kernels.gat_bwd(*graph.arrays, dy, *out, *inputs, *how, True)
        assert all(t[torch.arange(9) != 4].isfinite().all() for t in (dz, da_src))
        assert (dz[4] == 0).all() and (dmask[~keep] == 0).all() and dmask.isfinite().all()


def test_public_op_on_this_backend():
    graph = random_graph()
    _, inputs = gat_inputs(graph, 4, 3, torch.float32, "head", keep=True)
    kept = graph.select(inputs[4])
    results = []
    for name in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in inputs[:4]]
        with backend.backend(name):
            y = ops.gat(graph, *leaves, keep=kept, dropout=0.5, seed=2**63 - 1)
            y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, torch.float32)

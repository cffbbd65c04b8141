import pytest
import torch

from acefast import ops
from acefast.ops import backend, reference
from acefast.ops.triton import gen as kernels
from acefast.ops.triton import rows
from tests.inputs import assert_close, graphs
from tests.triton.cases import check_gen, gen_inputs, random_graph

GRAPHS = graphs()


@pytest.mark.parametrize("name", [name for name in GRAPHS if name not in ("hub", "power_law")])  # cut below
def test_every_graph(name):
    check_gen(GRAPHS[name], 5, torch.float32, removed=name == "bipartite")


@pytest.mark.parametrize("aggr", [reference.SOFTMAX, reference.SOFTMAX_SG])
@pytest.mark.parametrize(("mask", "keep"), [(False, False), (False, True), (True, False), (True, True)])
def test_options(mask, keep, aggr):
    check_gen(random_graph(11, 7), 3, torch.float32, aggr, mask, keep)
    if keep:
        check_gen(random_graph(11, 7), 3, torch.float32, aggr, mask, keep, removed=True, all_edges=mask)


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)])
def test_what_is_needed(need):
    check_gen(random_graph(), 3, torch.float32, need=need)
    check_gen(random_graph(), 3, torch.float32, reference.SOFTMAX_SG, need=need)


@pytest.mark.parametrize(
    ("num_feats", "removed", "selection"), [(0, False, False), (1, True, True), (33, False, True), (300, True, False)]
)
def test_widths_and_selections(num_feats, removed, selection):
    check_gen(random_graph(), num_feats, torch.float32, removed=removed, selection=selection)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    check_gen(random_graph(), 6, dtype, removed=True)


def test_hubs_are_cut_and_joined(monkeypatch):
    monkeypatch.setattr(rows, "MIN_PIECE", 5)
    monkeypatch.setattr(rows, "PIECE_MEANS", 0)
    monkeypatch.setattr(rows, "MAX_ROWS", 5)
    check_gen(random_graph(num_edges=40), 300, torch.float32, removed=True, all_edges=True)


def test_a_removed_edge_does_not_exist():
    """Neither a NaN at its other end nor one in its mask is seen."""
    graph = random_graph()
    dy, inputs = gen_inputs(graph, 3, torch.float32)
    src, dst = graph.edge_index()
    inputs[5] = keep = (src != 4) & (dst != 5)
    inputs[0][4], dy[5], inputs[4][~keep] = (torch.nan,) * 3
    y, lse = kernels.gen(*graph.arrays, *inputs, reference.SOFTMAX, 1e-7, False)
    assert y.isfinite().all() and (y[5] == 0).all() and (lse[5] == -torch.inf).all()
    need = (True, True, False, True, False)
    dx, dmask, _, _, dparam = kernels.gen_bwd(
        *graph.arrays, dy, y, lse, *inputs, reference.SOFTMAX, 1e-7, *need
    )
    assert dx.isfinite().all() and (dx[4] == 0).all() and dparam.isfinite().all()
    assert dmask.isfinite().all() and (dmask[~keep] == 0).all()


def test_public_op_on_this_backend():
    graph = random_graph()
    _, inputs = gen_inputs(graph, 3, torch.float32)
    results = []
    for name in ("triton", "torch"):
        x, mask, t = (t.clone().requires_grad_() for t in (inputs[0], inputs[4], inputs[6]))
        with backend.backend(name):
            y = ops.gen(graph, x, mask=mask, keep=inputs[5], t=t, pruned="in_denominator", mask_grad="all")
            y.square().sum().backward()
        results.append([y.detach(), x.grad, mask.grad, t.grad])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, torch.float32)
    with backend.backend("triton"), pytest.raises(RuntimeError, match="softmax only"):
        ops.gen(graph, inputs[0], aggr="max")

"""Softmax and extremes over rows, on the emulator (run by test_simt.py) or on a GPU (tests/gpu)."""

import itertools

import pytest
import torch

from acefast.ops import reference
from tests.inputs import TOLERANCE, graphs
from tests.simt.emulated import arrays, long_rows, run, unaligned

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ZOO = graphs(seed=3) | {"long_rows": long_rows()}


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def slots_of(graph_arrays, chosen):
    """The arrays of a prepared selection: the slots whose edge is chosen, each with its edge id."""
    rowptr, col, eid, colptr, row, ceid = graph_arrays

    def side(ptr, other, ids):
        ids = torch.arange(other.numel(), dtype=other.dtype) if ids is None else ids
        kept = chosen[ids.long()]
        count = torch.cat((torch.zeros(1, dtype=torch.long), kept.long().cumsum(0)))
        return count[ptr], other[kept], ids[kept]

    return *side(rowptr, col, eid), *side(colptr, row, ceid)


def inputs(graph, selected, keep, generator, wide_indices=False):
    """(graph arguments, keep, existing [E]): `selected` of the edges are slots, `keep` of the edges are kept; None is all."""
    call, existing, flags = arrays(graph, wide_indices), torch.ones(graph.num_edges, dtype=torch.bool), None
    if selected is not None:
        chosen = torch.rand(graph.num_edges, generator=generator) < selected
        call, existing = slots_of(call, chosen), chosen
    if keep is not None:
        flags = torch.rand(graph.num_edges, generator=generator) < keep
        existing = existing & flags
    return call, flags, existing


def nan_where_removed(t, existing):
    """What belongs to a removed edge must not be read into anything."""
    t[~existing] = torch.nan
    return t


def close(op, args, what, scale=0.0):
    """The results of the op, compared with the reference on float64 inputs by norm. `scale`: the norm of the terms whose
    differences the results are. Infinities (lse of a row without edges) must agree."""

    def reference_of(*arguments):
        result = getattr(reference, op)(*arguments)
        return [result] if isinstance(result, torch.Tensor) else result

    actual, narrow = run(op, *args), reference_of(*args)
    actual = [actual] if isinstance(actual, torch.Tensor) else actual
    wide = reference_of(*(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args))
    for place, (a, b, c) in enumerate(zip(actual, wide, narrow, strict=True)):
        name = f"{op}[{place}] {what}"
        assert a.dtype == c.dtype and a.shape == b.shape, f"{name}: {a.dtype} {list(a.shape)}"
        infinite = b.isinf()
        assert torch.equal(a[infinite].double(), b[infinite]), name
        difference = (a.double() - b)[~infinite].norm().item()
        allowed = TOLERANCE[args[6].dtype] * (b[~infinite].norm().item() + scale + 1e-2 * b.numel() ** 0.5)
        assert difference <= allowed, f"{name}: off by {difference:.3e} in norm, allowed {allowed:.3e}"
    return actual


def check_gat(name, heads, features, dtype=torch.float32, mask=None, on_logit=False, keep=None, selected=None, dropout=0.0,
              wide_indices=False, prepare=lambda t: t):  # fmt: skip
    graph, generator, acc = ZOO[name], torch.Generator().manual_seed(heads * 100 + features), accumulator(dtype)

    def randn(*shape, dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    call, flags, existing = inputs(graph, selected, keep, generator, wide_indices)
    z = prepare(randn(graph.num_src, heads, features, dtype=dtype))
    a_src, a_dst = 2 * randn(graph.num_src, heads, dtype=acc), 2 * randn(graph.num_dst, heads, dtype=acc)
    m = None if mask is None else nan_where_removed(randn(graph.num_edges, *([heads] if mask == "EH" else []), dtype=acc), existing)
    step = (0, torch.tensor([2**40 + 9])) if mask == "E" else (2**40 + 9, None)
    common = z, a_src, a_dst, m, flags, on_logit, 0.25, dropout, 7, *step
    what = f"{name} H={heads} F={features} {dtype} mask={mask} on_logit={on_logit} {keep=} {selected=} {dropout=}"
    y, _, _, _ = close("gat", (*call, *common, False), what)
    saved = close("gat", (*call, *common, True), what)
    assert torch.equal(y, saved[0])
    dy = prepare(randn(*y.shape, dtype=dtype))
    y, lse, slope_y, slope_sum = reference.gat(*call, *common, True)
    args = *call, dy, prepare(y), lse, prepare(slope_y), slope_sum, *common, mask is not None
    close("gat_bwd", args, what, scale=(dy.double() * slope_y).sum(2).norm().item())


@pytest.mark.parametrize("name", ZOO)
def test_gat_on_every_graph(name):
    check_gat(name, 8, 5, mask="E", keep=0.6, dropout=0.3)
    check_gat(name, 1, 33, selected=0.6)
    check_gat(name, 3, 16, mask="EH", on_logit=True)


def test_gat_with_every_choice_of_options():
    for mask, keep, selected, dropout in itertools.product((None, "E", "EH"), (None, 0.7), (None, 0.7), (0.0, 0.3, 1.0)):
        for on_logit in (False, True)[: 1 if mask is None else 2]:
            check_gat("multi_edges", 3, 4, torch.float32, mask, on_logit, keep, selected, dropout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gat_in_every_dtype(dtype):
    check_gat("power_law", 8, 16, dtype, mask="EH", keep=0.5, dropout=0.3, wide_indices=True)
    check_gat("power_law", 3, 5, dtype, mask="E", on_logit=True, prepare=unaligned)
    check_gat("long_rows", 4, 8, dtype, mask="E", on_logit=True, dropout=0.3)


def test_gat_of_many_heads_and_of_wide_ones():
    check_gat("power_law", 20, 1, mask="E", dropout=0.3)  # three blocks of heads share a mask's gradient
    check_gat("power_law", 6, 64, mask="E", keep=0.5)
    check_gat("sorted", 2, 300, mask="E", on_logit=True, dropout=0.3)  # three blocks of columns
    check_gat("long_rows", 1, 131, torch.float64, mask="EH")
    check_gat("power_law", 2, 0)


def test_gat_of_nothing_kept_and_of_logits_without_bound():
    graph = ZOO["hub"]
    z, a = torch.full((40, 2, 6), torch.inf), torch.zeros(40, 2)
    none = torch.zeros(graph.num_edges, dtype=torch.bool)
    y, lse, slope_y, slope_sum = run("gat", *graph.arrays, z, a, a, None, none, False, 0.2, 0.0, 0, 0, None, True)
    assert not y.any() and not slope_y.any() and not slope_sum.any() and (lse == -torch.inf).all()
    # Logits of +-500: only the differences within a row count.
    z, large = torch.randn(40, 2, 6), 1000 * (torch.arange(40) % 2 - 0.5).unsqueeze(1).expand(-1, 2).contiguous()
    close("gat", (*graph.arrays, z, a, large, None, None, False, 1.0, 0.0, 0, 0, None, True), "large logits")


def edge_values(graph, heads, existing, generator, dtype=torch.float32):
    """Random values [E] or, with heads, [E, heads]; NaN on the edges that do not exist."""
    shape = (graph.num_edges, heads) if heads else (graph.num_edges,)
    return nan_where_removed(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype), existing)


def check_edge_softmax(name, heads, dtype=torch.float32, keep=None, selected=None, wide_indices=False, infinite=0.0):
    """`infinite`: the share of logits that are -inf."""
    graph, generator = ZOO[name], torch.Generator().manual_seed(heads)
    call, flags, existing = inputs(graph, selected, keep, generator, wide_indices)
    s = 5 * edge_values(graph, heads, existing, generator, dtype)
    s[torch.rand(s.shape, generator=generator) < infinite] = -torch.inf
    what = f"{name} H={heads} {dtype} {keep=} {selected=}"
    (a,) = close("edge_softmax", (*call, s, flags), what)
    a[~existing] = torch.nan
    close("edge_softmax_bwd", (*call, a, edge_values(graph, heads, existing, generator, dtype), flags), what)


@pytest.mark.parametrize("name", ZOO)
def test_edge_softmax_on_every_graph(name):
    check_edge_softmax(name, 0)
    check_edge_softmax(name, 1, keep=0.6, wide_indices=True)
    check_edge_softmax(name, 3, torch.float64, selected=0.6)
    check_edge_softmax(name, 8, keep=0.6, selected=0.6)
    check_edge_softmax(name, 40)


def test_edge_softmax_of_nothing_kept_and_of_infinite_logits():
    for name in ("power_law", "long_rows"):
        check_edge_softmax(name, 2, keep=0.0)
        check_edge_softmax(name, 2, selected=0.0)
        check_edge_softmax(name, 2, infinite=0.7)
        check_edge_softmax(name, 0, infinite=1.0)


def check_spmm_max(name, features, dtype=torch.float32, chosen=("weight", "mask", "keep"), selected=None, wide_indices=False,
                   prepare=lambda t: t):  # fmt: skip
    """Small whole numbers: every product is exact and most columns have several equal extremes."""
    graph, generator, acc = ZOO[name], torch.Generator().manual_seed(features), accumulator(dtype)
    call, flags, existing = inputs(graph, selected, 0.6 if "keep" in chosen else None, generator, wide_indices)

    def whole(*shape, dtype):
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    x, dy = (prepare(whole(rows, features, dtype=dtype)) for rows in (graph.num_src, graph.num_dst))
    weight, mask = (
        nan_where_removed(whole(graph.num_edges, dtype=acc), existing) if factor in chosen else None for factor in ("weight", "mask")
    )
    for largest in (True, False):
        what = f"{name} F={features} {dtype} {chosen} {selected=} {largest=}"
        args = *call, x, weight, mask, flags
        y, arg = run("spmm_max", *args, largest)
        expected, first = reference.spmm_max(*args, largest)
        assert torch.equal(y, expected) and torch.equal(arg, first) and arg.dtype == first.dtype, what
        for need in ((True, True), (True, False), (False, True)):
            close("spmm_max_bwd", (*call, dy, prepare(arg), x, weight, mask, flags, *need), what)


@pytest.mark.parametrize("name", ZOO)
def test_spmm_max_on_every_graph(name):
    check_spmm_max(name, 7)
    check_spmm_max(name, 33, chosen=("mask",), selected=0.6)
    check_spmm_max(name, 132, chosen=())


@pytest.mark.parametrize("dtype", DTYPES)
def test_spmm_max_in_every_dtype(dtype):
    check_spmm_max("power_law", 64, dtype, wide_indices=True)
    check_spmm_max("long_rows", 16, dtype)
    check_spmm_max("hub", 3, dtype, prepare=unaligned, selected=0.7)


def test_spmm_max_without_columns_or_edges_and_of_nan():
    check_spmm_max("power_law", 0)
    check_spmm_max("power_law", 8, selected=0.0)
    graph, x = ZOO["hub"], torch.randn(40, 6)
    x[5] = torch.nan
    y, arg = run("spmm_max", *graph.arrays, x, None, None, None, True)
    source, destination = graph.edge_index()
    reached = torch.zeros(40, dtype=torch.bool)
    reached[destination[source == 5]] = True
    assert torch.equal(y.isnan().all(1), reached) and (source[arg[reached].long()] == 5).all() and not y[~reached].isnan().any()

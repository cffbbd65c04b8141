"""Generalised aggregation on the emulator (run by test_simt.py) or on a GPU (tests/gpu)."""

import itertools

import pytest
import torch

from acefast.ops import reference
from tests.inputs import TOLERANCE, graphs
from tests.simt.emulated import arrays, long_rows, run, unaligned

SUM, SOFTMAX, SOFTMAX_SG, POWER, MAX = range(5)
AGGREGATIONS = {"sum": SUM, "softmax": SOFTMAX, "softmax_sg": SOFTMAX_SG, "power": POWER, "max": MAX}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ZOO = graphs(seed=3) | {"long_rows": long_rows()}
EPS = 1e-3


def check(op, *args, what=""):
    """Runs the op and compares with the reference on float64 inputs by norm, within the tolerance of x's dtype and four
    times what the reference itself loses in that dtype: some gradients cancel. Infinities and edge ids must agree."""
    actual, narrow = run(op, *args), getattr(reference, op)(*args)
    wide = (a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    wide = getattr(reference, op)(*wide)
    for place, (a, b, c) in enumerate(zip(actual, wide, narrow, strict=True)):
        name = f"{op}[{place}] {what}"
        assert a.dtype == c.dtype and a.shape == b.shape, f"{name}: {a.dtype} {list(a.shape)}, not {c.dtype} {list(b.shape)}"
        infinite = b.isinf() | torch.tensor(not b.is_floating_point())
        assert torch.equal(a[infinite].double(), b[infinite].double()), name
        a, b, c = (t.double().masked_fill(infinite, 0) for t in (a, b, c))
        difference = (a - b).norm().item()
        allowed = TOLERANCE[args[6].dtype] * (b.norm().item() + 1e-2 * b.numel() ** 0.5) + 4 * (c - b).norm().item()
        assert difference <= allowed, f"{name}: off by {difference:.3e} in norm, allowed {allowed:.3e}"
    return actual


def check_gen(
    graph, features, aggr, *, dtype=torch.float32, depth=None, edge=False, bias=True, mask=True, keep=True, removed=False,
    selected=False, all_edges=False, wide_indices=False, prepare=lambda t: t, seed=0, scale=1.0,
):  # fmt: skip
    """Forward and backward of one call. `depth`: raw features of the encoder. What removed edges hold is NaN."""
    generator = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    edges, six = graph.num_edges, arrays(graph, wide_indices)
    exists = torch.rand(edges, generator=generator) < 0.6 if keep or selected else torch.ones(edges, dtype=torch.bool)
    x, dy = prepare(scale * normal(graph.num_src, features)), prepare(normal(graph.num_dst, features))
    raw = normal(edges, features if depth is None else depth) if edge or depth is not None else None
    weight = None if depth is None else normal(features, depth, dtype=acc)
    shift = normal(features, dtype=acc) if weight is not None and bias else None
    factor = normal(edges, dtype=acc) if mask else None
    if aggr == POWER and mask:
        factor = factor.abs() + 0.1  # messages below the clamp have no gradient; most should have one
    if factor is not None and not all_edges:
        factor[~exists] = torch.nan
    if raw is not None and not all_edges:
        raw[~exists] = torch.nan
    param = None if aggr in (SUM, MAX) else normal(features, dtype=acc).abs() + 0.5
    degree = torch.zeros(graph.num_dst, dtype=torch.int64)
    gone = degree.clone()
    dst = graph.edge_index()[1]
    degree.index_add_(0, dst, torch.ones_like(dst))
    gone.index_add_(0, dst, (~exists).long())
    row_scale = (1 / degree.clamp(min=1)).to(acc) if aggr in (SUM, POWER) else None
    gone = gone if removed else None
    kept = exists if keep else None
    if selected:
        *six, _ = reference.compact(*six, exists, int(exists.sum()), False)
        kept = None
    message = x, None if raw is None else prepare(raw), weight, shift, factor, kept, param, row_scale, gone, aggr, EPS
    what = f"F={features} {dtype} depth={depth} edge={edge} removed={removed} selected={selected} all={all_edges}"
    y, stat = check("gen", *six, *message, all_edges, what=what)
    needs = True, factor is not None, raw is not None, True
    check("gen_bwd", *six, dy, y, stat, *message, *needs, all_edges, what=what)
    return six, dy, y, stat, message


@pytest.mark.parametrize("aggr", AGGREGATIONS)
@pytest.mark.parametrize("name", ZOO)
def test_gen_on_every_graph(name, aggr):
    aggr = AGGREGATIONS[aggr]
    if ZOO[name].num_edges < 2000:
        check_gen(ZOO[name], 7, aggr, mask=False, keep=False)
        check_gen(ZOO[name], 8, aggr, edge=True, removed=True, wide_indices=True)
        check_gen(ZOO[name], 33, aggr, depth=5, selected=True, removed=True)
    elif name == "hub":
        check_gen(ZOO[name], 12, aggr, depth=8, removed=True)
    else:
        check_gen(ZOO[name], 16, aggr, edge=True, removed=aggr == MAX)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aggr", AGGREGATIONS)
def test_gen_in_every_dtype(aggr, dtype):
    aggr = AGGREGATIONS[aggr]
    check_gen(ZOO["power_law"], 40, aggr, dtype=dtype, edge=True)
    check_gen(ZOO["sorted"], 24, aggr, dtype=dtype, depth=8, bias=False)
    check_gen(ZOO["bipartite"], 5, aggr, dtype=dtype, depth=3, wide_indices=True, removed=True)


@pytest.mark.parametrize("aggr", AGGREGATIONS)
def test_gen_of_wide_rows_and_deep_encoders(aggr):
    """More columns than a warp holds, more raw features than one pass or the shared memory takes."""
    aggr = AGGREGATIONS[aggr]
    check_gen(ZOO["multi_edges"], 140, aggr, depth=11)
    check_gen(ZOO["multi_edges"], 35, aggr, depth=19)
    check_gen(ZOO["multi_edges"], 6, aggr, depth=0)
    check_gen(ZOO["sorted"], 260, aggr, edge=True)
    check_gen(ZOO["sorted"], 64, aggr, edge=True, prepare=unaligned)
    check_gen(ZOO["sorted"], 0, aggr, depth=4, selected=True)


@pytest.mark.parametrize("aggr", [SUM, SOFTMAX, SOFTMAX_SG])
def test_gen_gradient_of_the_mask_of_removed_edges(aggr):
    check_gen(ZOO["multi_edges"], 12, aggr, removed=True, all_edges=True)
    check_gen(ZOO["power_law"], 36, aggr, depth=4, removed=True, all_edges=True)
    check_gen(ZOO["hub"], 3, aggr, removed=True, all_edges=True)


def test_gen_softmax_of_far_exponents():
    """Exponents of some thousands, ascending and descending: the online sums are rescaled again and again."""
    check_gen(ZOO["long_rows"], 4, SOFTMAX, scale=300.0, mask=False, dtype=torch.float64)
    check_gen(ZOO["multi_edges"], 4, SOFTMAX, scale=3000.0, mask=False, keep=False, dtype=torch.float64)


def test_gen_gradients_alone():
    """Each combination of the wanted gradients gives what all together give."""
    six, dy, y, stat, message = check_gen(ZOO["power_law"], 12, SOFTMAX, depth=4)
    everything = check("gen_bwd", *six, dy, y, stat, *message, True, True, True, True, False)
    for needs in itertools.product((True, False), repeat=4):
        results = check("gen_bwd", *six, dy, y, stat, *message, *needs, False, what=str(needs))
        wanted = needs[0], needs[1], needs[2], needs[2], needs[3]
        for result, full, want in zip(results, everything, wanted, strict=True):
            assert torch.equal(result, full) if want else result.shape == (0,)

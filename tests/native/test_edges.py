"""Native CPU spmm with heads and on selections, spmm_max, edge_softmax and compact against the reference."""

import itertools

import pytest
import torch

from acefast import Graph
from acefast.ops import backend, reference
from tests.inputs import TOLERANCE, assert_close, graphs

DTYPES = list(TOLERANCE)
ZOO = graphs()

pytestmark = pytest.mark.skipif(
    not backend.native_library("cpu").exists(), reason="the CPU library was not built (ACEFAST_BUILD=none)"
)


def native(op, *args):
    return flat(backend.implementation(op, "cpu", "native")(*args))


def wide(value):
    """Arguments of the float64 reference: every floating-point tensor widened."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def compare(op, *args, dtype):
    """Native with 1 and 2 threads to the bit, and against the reference in float64."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = native(op, *args)
        torch.set_num_threads(2)
        two = native(op, *args)
    finally:
        torch.set_num_threads(before)
    expected = flat(getattr(reference, op)(*[wide(a) for a in args]))
    for k, (a, b, e) in enumerate(zip(one, two, expected, strict=True)):
        assert torch.equal(a, b), f"{op}: 1 and 2 threads differ"
        assert_close(a, e, dtype if a.is_floating_point() else torch.float64, f"{op}[{k}]")
    return one


def normal(*shape, dtype, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kept(num, share, seed=2):
    return torch.rand(num, generator=torch.Generator().manual_seed(seed)) < share


def selected(g, keep):
    """The arrays of the prepared selection, by the reference."""
    return reference.compact(*g.arrays, keep, int(keep.sum()), False)[:6]


def hub_graph(num_edges=17_000):
    """One destination and one source with more edges than a piece of work holds, in shuffled order."""
    generator = torch.Generator().manual_seed(3)
    other = torch.randint(0, 50, (num_edges,), generator=generator)
    here = torch.full((num_edges,), 20)
    edges = torch.cat((torch.stack((other, here)), torch.stack((here, other))), 1)
    return Graph.from_edge_index(edges[:, torch.randperm(edges.size(1), generator=generator)], num_nodes=50)


HUB = hub_graph()


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", [*ZOO, "large hub"])
def test_compact_is_the_reference(name, index):
    g = HUB if name == "large hub" else ZOO[name]
    arrays = [t if t is None or t.dtype == torch.int64 else t.to(index) for t in g.arrays]
    for share, renumber in itertools.product((0.0, 0.5, 1.1), (True, False)):
        keep = kept(g.num_edges, share)
        args = (*arrays, keep, int(keep.sum()), renumber)
        for a, e in zip(compare("compact", *args, dtype=torch.float64), reference.compact(*args), strict=True):
            assert a.dtype == e.dtype and torch.equal(a, e)


def test_compact_refuses_a_wrong_count():
    g = ZOO["power_law"]
    for count in (-1, 0, g.num_edges, g.num_edges + 1):
        for renumber in (True, False):
            with pytest.raises(RuntimeError, match="num_kept"):
                native("compact", *g.arrays, kept(g.num_edges, 0.5), count, renumber)


def spmm_case(g, shape, dtype, factors):
    """(x, dy, weight, mask, self_weight, row_scale) of features [n, *shape]."""
    acc, heads = reference.accumulator(dtype), shape[:-1]
    square = g.num_src == g.num_dst
    return (
        normal(g.num_src, *shape, dtype=dtype),
        normal(g.num_dst, *shape, dtype=dtype, seed=5),
        normal(g.num_edges, *heads, dtype=acc, seed=1) if factors & 1 else None,
        normal(g.num_edges, *heads, dtype=acc, seed=7) if factors & 2 else None,
        normal(g.num_dst, dtype=acc, seed=8) if square and factors > 1 else None,
        normal(g.num_dst, dtype=acc, seed=9) if factors == 3 else None,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*ZOO, "large hub"])
def test_spmm_with_heads(name, dtype):
    g = HUB if name == "large hub" else ZOO[name]
    shapes = [((1, 5), 1), ((3, 7), 0), ((3, 7), 3), ((8, 16), 2), ((2, 33), 3)]
    for shape, factors in shapes[2:3] if g is HUB else shapes:
        x, dy, weight, mask, self_weight, row_scale = spmm_case(g, shape, dtype, factors)
        keep = kept(g.num_edges, 0.6) if factors else None
        common = (weight, mask, keep, self_weight, row_scale)
        compare("spmm", *g.arrays, x, *common, False, dtype=dtype)
        for need_dx, need_dcoef in ((True, True), (True, False), (False, True)):
            compare("spmm_bwd", *g.arrays, dy, x, *common, need_dx, need_dcoef, factors == 3, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*ZOO, "large hub"])
def test_spmm_on_a_selection(name, dtype):
    g = HUB if name == "large hub" else ZOO[name]
    keep = kept(g.num_edges, 0.5)
    arrays = selected(g, keep)
    for shape, factors in (((9,), 2), ((9,), 3), ((3, 16), 2)):
        x, dy, weight, mask, self_weight, row_scale = spmm_case(g, shape, dtype, factors)
        mask[~keep] = float("nan")
        common = (weight, mask, None, self_weight, row_scale)
        compare("spmm", *arrays, x, *common, False, dtype=dtype)
        compare("spmm_bwd", *arrays, dy, x, *common, True, True, False, dtype=dtype)


def test_a_per_edge_tensor_of_the_wrong_length_is_refused():
    g = ZOO["sorted"]
    x = torch.randn(50, 4)
    for length in (g.num_edges - 1, g.num_edges + 1):  # this graph names no edges by destination: a slot is an edge
        with pytest.raises(RuntimeError, match="length"):
            native("spmm", *g.arrays, x, None, torch.ones(length), None, None, None, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*ZOO, "large hub"])
def test_edge_softmax(name, dtype):
    g = HUB if name == "large hub" else ZOO[name]
    keep = kept(g.num_edges, 0.6)
    for heads, chosen in (((), "all"), ((3,), "keep"), ((8,), "selection"), ((20,), "all")):
        s, da = normal(g.num_edges, *heads, dtype=dtype), normal(g.num_edges, *heads, dtype=dtype, seed=1)
        if chosen != "all":
            s[~keep] = da[~keep] = float("nan")
        arrays, flags = selected(g, keep) if chosen == "selection" else g.arrays, keep if chosen == "keep" else None
        (a,) = compare("edge_softmax", *arrays, s, flags, dtype=dtype)
        compare("edge_softmax_bwd", *arrays, a, da, flags, dtype=dtype)


def test_edge_softmax_of_large_scores():
    s = (normal(HUB.num_edges, dtype=torch.float32) * 8).round() * 1000
    (a,) = compare("edge_softmax", *HUB.arrays, s, None, dtype=torch.float32)
    assert a.max() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*ZOO, "large hub"])
def test_spmm_max(name, dtype):
    g = HUB if name == "large hub" else ZOO[name]
    keep = kept(g.num_edges, 0.6)
    cases = [(1, 0, "all", True), (7, 3, "keep", False), (37, 2, "selection", True), (80, 1, "all", False)]
    for F, factors, chosen, largest in cases[1:3] if g is HUB else cases:
        x, dy, weight, mask, *_ = spmm_case(g, (F,), dtype, factors)
        if chosen != "all":
            mask[~keep] = float("nan")
        arrays, flags = selected(g, keep) if chosen == "selection" else g.arrays, keep if chosen == "keep" else None
        if F == 7:  # few values, so that extremes are shared; 64-bit indices
            x, mask, weight = x.round(), mask.sign(), None
            arrays = [None if t is None else t.long() for t in arrays]
        y, arg = compare("spmm_max", *arrays, x, weight, mask, flags, largest, dtype=dtype)
        for needs in ((True, True), (True, False), (False, True)):
            compare("spmm_max_bwd", *arrays, dy, arg, x, weight, mask, flags, *needs, dtype=dtype)

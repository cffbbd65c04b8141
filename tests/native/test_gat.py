"""Native CPU gat and its backward against the reference in float64, 1 against 2 threads."""

import dataclasses
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


def hub_graph(num_edges=17_000):
    """One destination and one source with more edges than a piece of work holds, in shuffled order, and some with a few
    thousand."""
    generator = torch.Generator().manual_seed(3)
    other = torch.randint(0, 50, (num_edges,), generator=generator)
    here = torch.full((num_edges,), 20)
    few = torch.randint(0, 3, (6000,), generator=generator)
    ends = torch.stack((other, here)), torch.stack((here, other)), torch.stack((few, few.flip(0)))
    edges = torch.cat(ends, 1)
    return Graph.from_edge_index(edges[:, torch.randperm(edges.size(1), generator=generator)], num_nodes=50)


HUB = hub_graph()


@dataclasses.dataclass(frozen=True)
class Case:
    heads: int = 3
    columns: int = 5
    mask: str = "none"  # none, edge or head
    on_logit: bool = False
    edges: str = "all"  # all, keep or selection
    dropout: float = 0.0


def inputs(g, case, dtype):
    """The arguments of gat without `save`: (graph arrays, z, a_src, a_dst, mask, keep, ...). NaN is the mask of an edge
    that does not exist."""
    generator = torch.Generator().manual_seed(1)
    acc = reference.accumulator(dtype)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    z = normal(g.num_src, case.heads, case.columns).to(dtype)
    a_src, a_dst = normal(g.num_src, case.heads).to(acc), normal(g.num_dst, case.heads).to(acc)
    keep = torch.rand(g.num_edges, generator=generator) < 0.6
    mask = None
    if case.mask != "none":
        mask = normal(g.num_edges, *[case.heads] * (case.mask == "head")).to(acc)
        if case.edges != "all":
            mask[~keep] = float("nan")
    arrays = reference.compact(*g.arrays, keep, int(keep.sum()), False)[:6] if case.edges == "selection" else g.arrays
    keep = keep if case.edges == "keep" else None
    step = (0, torch.tensor([2**33 + 5])) if case.mask == "head" else (2**33 + 5, None)
    return (*arrays, z, a_src, a_dst, mask, keep, case.on_logit, 0.2, case.dropout, 2**40 + 77, *step)


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def native(op, *args):
    """With 1 and with 2 threads, which agree to the bit."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = backend.implementation(op, "cpu", "native")(*args)
        torch.set_num_threads(2)
        two = backend.implementation(op, "cpu", "native")(*args)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b), f"{op}: 1 and 2 threads differ"
    return one


def check(g, case, dtype):
    """Both passes. The reference's backward takes the native forward's outputs, which were checked: da_dst cancels, so
    their rounding to a narrow dtype shows in it whatever the implementation."""
    args = inputs(g, case, dtype)
    widened = [wide(a) for a in args]
    forward, expected = native("gat", *args, True), reference.gat(*widened, True)
    for name, a, e in zip(("y", "lse", "slope_y", "slope_sum"), forward, expected, strict=True):
        assert a.dtype == (dtype if name in ("y", "slope_y") else reference.accumulator(dtype))
        empty = e.isneginf()
        assert torch.equal(a.isneginf(), empty), f"{case} {name}"
        assert_close(a.masked_fill(empty, 0), e.masked_fill(empty, 0), dtype, f"{case} {name}")
    y, lse, *nothing = native("gat", *args, False)
    assert [t.numel() for t in nothing] == [0, 0]
    assert torch.equal(y, forward[0]) and torch.equal(lse, forward[1])

    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).to(dtype)
    graph, rest, need_dmask = args[:6], args[6:], case.mask != "none"
    grads = native("gat_bwd", *graph, dy, *forward, *rest, need_dmask)
    same = reference.gat_bwd(*graph, dy, *forward, *rest, need_dmask)
    expected = reference.gat_bwd(*graph, dy.double(), *map(wide, forward), *widened[6:], need_dmask)
    largest = max(e.norm() for e in expected)
    for name, a, s, e in zip(("dz", "da_src", "da_dst", "dmask"), grads, same, expected, strict=True):
        assert a.dtype == s.dtype and a.shape == s.shape
        # Gradients of attention terms cancel, in a row of one edge to 0: they may lose what the formula itself loses.
        allowed = TOLERANCE[dtype] * max(e.norm(), 1e-2 * largest) + 4 * (s.double() - e).norm()
        assert (a.double() - e).norm() <= allowed, f"{case} {name}: off by {(a.double() - e).norm()}, allowed {allowed}"


OPTIONS = [
    Case(),
    Case(mask="edge"),
    Case(mask="head", on_logit=True, dropout=0.3),
    Case(mask="edge", on_logit=True, edges="keep"),
    Case(mask="head", edges="keep", dropout=0.3),
    Case(mask="head", edges="selection"),
    Case(mask="edge", on_logit=True, edges="selection", dropout=0.3),
    Case(edges="selection", dropout=1.0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_gat(name, dtype):
    for case in OPTIONS:
        check(ZOO[name], case, dtype)


@pytest.mark.parametrize("heads", [1, 3, 8, 20])
@pytest.mark.parametrize("columns", [1, 2, 5, 8, 16, 33, 64])
def test_gat_widths(heads, columns):
    check(ZOO["power_law"], Case(heads, columns, "head", True, "keep", 0.3), torch.float32)
    check(ZOO["power_law"], Case(heads, columns, "edge", False, "all", 0.3), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [Case(3, 5, "head", True, "all", 0.3), Case(8, 4, "edge", False, "keep"), Case(1, 7)])
def test_gat_on_hubs(case, dtype):
    check(HUB, case, dtype)


def test_a_row_of_removed_edges_alone_is_empty():
    """A long row and short ones: y and the gradients 0, lse -inf."""
    arrays, rest = inputs(HUB, Case(), torch.float32)[:6], inputs(HUB, Case(), torch.float32)[6:]
    keep = torch.zeros(HUB.num_edges, dtype=torch.bool)
    rest = (*rest[:4], keep, *rest[5:])
    y, lse, slope_y, slope_sum = native("gat", *arrays, *rest, True)
    assert lse.isneginf().all() and not y.any() and not slope_y.any() and not slope_sum.any()
    for grad in native("gat_bwd", *arrays, torch.ones_like(y), y, lse, slope_y, slope_sum, *rest, False):
        assert not grad.any()


def test_large_logits_do_not_overflow():
    """Logits up to some thousands, without a rounding of their own; of lse, 1e-4 is lost at that size."""
    args = list(inputs(HUB, Case(), torch.float32))
    args[7], args[8], args[12] = args[7].round() * 1024, args[8].round() * 1024, 0.25
    y, lse, *_ = native("gat", *args, True)
    expected, expected_lse, *_ = reference.gat(*[wide(a) for a in args], True)
    assert_close(y, expected, torch.float16, "y")
    assert_close(lse, expected_lse, torch.float32, "lse")


def test_a_nan_reaches_the_result():
    args = list(inputs(ZOO["sorted"], Case(1, 4), torch.float32))
    args[7][3] = float("nan")
    y = backend.implementation("gat", "cpu", "native")(*args, False)[0]
    assert torch.equal(y.isnan(), reference.gat(*args, False)[0].isnan()) and y.isnan().any() and not y.isnan().all()


def test_dropout_is_a_function_of_seed_edge_and_head():
    """The same edge has the same noise in the whole graph, in a selection and in the reference's words."""
    g, heads = ZOO["power_law"], 3
    z = torch.eye(g.num_src).unsqueeze(1).repeat(1, heads, 1)  # y_i holds the coefficients of its sources
    zeros = torch.zeros(g.num_src, heads)
    word = reference.random_words(0, g.num_edges * heads, 9, 4, "cpu").reshape(-1, heads)
    src, dst = g.edge_index()
    scale = torch.where(word >= int(0.3 * 2**32), 1 / 0.7, 0.0)
    keep = torch.rand(g.num_edges, generator=torch.Generator().manual_seed(5)) < 0.5
    for arrays, chosen in ((g.arrays, torch.ones_like(keep)), (g.select(keep).arrays, keep)):
        y = native("gat", *arrays, z, zeros, zeros, None, None, False, 0.2, 0.3, 9, 4, None, False)[0]
        count = torch.zeros(g.num_dst).index_add_(0, dst[chosen], torch.ones(int(chosen.sum())))
        values = scale[chosen] / count[dst[chosen], None]
        expected = torch.zeros(g.num_dst, g.num_src, heads)
        expected.index_put_((dst[chosen], src[chosen]), values, accumulate=True)
        torch.testing.assert_close(y, expected.transpose(1, 2))


def test_wrong_shapes_are_refused():
    args = list(inputs(ZOO["sorted"], Case(mask="edge"), torch.float32))
    two = torch.zeros(2, dtype=torch.int64)
    others = [(9, args[9].unsqueeze(1).repeat(1, 2)), (13, 1.5), (13, -0.1), (16, two)]
    for place, wrong in itertools.chain(((k, args[k][1:]) for k in (6, 7, 8, 9)), others):
        with pytest.raises(RuntimeError):
            native("gat", *args[:place], wrong, *args[place + 1 :], False)

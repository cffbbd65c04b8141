"""Message passing on the emulator (run by test_simt.py) or on a GPU (tests/gpu)."""

import itertools

import pytest
import torch

from acefast.ops import reference
from tests.inputs import graphs
from tests.simt.emulated import arrays, check, long_rows, run, unaligned

FEATURES = (1, 3, 7, 33, 128, 130)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ZOO = graphs(seed=3) | {"long_rows": long_rows()}
FACTORS = ("weight", "mask", "keep", "self_weight", "row_scale")


def factors(graph, acc, chosen, generator, heads=()):
    """The five optional arguments; absent ones None. The mask is NaN where an edge is removed: it must not be read into sums."""
    edges, given = graph.num_edges, dict.fromkeys(FACTORS)
    for name in chosen:
        size = (edges, *heads) if name in ("weight", "mask") else (graph.num_dst,)
        if name == "keep":
            given[name] = torch.rand(edges, generator=generator) < 0.6
        elif name != "self_weight" or graph.num_src == graph.num_dst:
            given[name] = torch.randn(size, generator=generator, dtype=torch.float64).to(acc)
    if given["keep"] is not None and given["mask"] is not None:
        given["mask"][~given["keep"]] = torch.nan
    return list(given.values())


BACKWARD = ((True, True, False), (True, False, False), (False, True, True), (True, True, True))


def check_spmm(graph, features, dtype, chosen, seed, wide_indices=False, prepare=lambda t: t, backward=BACKWARD, heads=(),
               selected=False):  # fmt: skip
    """`selected`: the graph is a prepared selection of what keep keeps; keep itself is then not given."""
    generator = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x = prepare(torch.randn(graph.num_src, *heads, features, generator=generator).to(dtype))
    dy = prepare(torch.randn(graph.num_dst, *heads, features, generator=generator).to(dtype))
    given = factors(graph, acc, chosen, generator, heads)
    six = arrays(graph, wide_indices)
    if selected:
        *six, _ = reference.compact(*six, given[2], int(given[2].sum()), False)
        given[2] = None
    what = f"F={features} {dtype} {chosen} {heads} {selected}"
    check("spmm", *six, x, *given, False, what=what)
    for need_dx, need_dcoef, all_edges in backward:
        check("spmm_bwd", *six, dy, x, *given, need_dx, need_dcoef, all_edges, what=what)


@pytest.mark.parametrize("name", ZOO)
def test_spmm_on_every_graph(name):
    options = itertools.cycle((FACTORS, (), ("mask", "keep"), ("weight", "self_weight"), ("row_scale", "keep")))
    for seed, (features, chosen) in enumerate(zip(FEATURES if ZOO[name].num_edges < 2000 else (1, 33, 130), options)):
        check_spmm(ZOO[name], features, torch.float32, chosen, seed)


def test_spmm_with_every_choice_of_factors():
    for count in range(len(FACTORS) + 1):
        for chosen in itertools.combinations(FACTORS, count):
            check_spmm(ZOO["multi_edges"], 5, torch.float32, chosen, count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["power_law", "long_rows"])
def test_spmm_in_every_dtype(name, dtype):
    for features, wide_indices in ((8, True), (128, False), (130, True)):
        check_spmm(ZOO[name], features, dtype, FACTORS, features, wide_indices, backward=BACKWARD[:2])


def test_spmm_of_unaligned_and_empty_features():
    check_spmm(ZOO["power_law"], 64, torch.float32, FACTORS, 0, prepare=unaligned)
    check_spmm(ZOO["power_law"], 0, torch.float32, FACTORS, 0)
    check_spmm(ZOO["power_law"], 600, torch.float32, FACTORS, 0)


def test_spmm_of_nothing_kept():
    graph = ZOO["hub"]
    x, keep = torch.full((40, 6), torch.inf), torch.zeros(graph.num_edges, dtype=torch.bool)
    assert torch.equal(run("spmm", *graph.arrays, x, None, None, keep, None, None, False), torch.zeros(40, 6))


@pytest.mark.parametrize("name", ["no_edges", "multi_edges", "hub", "sorted", "bipartite", "long_rows"])
def test_spmm_of_selections_and_heads(name):
    check_spmm(ZOO[name], 7, torch.float32, FACTORS, 1, selected=True, backward=BACKWARD[::3])
    check_spmm(ZOO[name], 8, torch.float16, FACTORS, 2, wide_indices=True, heads=(4,), backward=BACKWARD[:3])
    check_spmm(ZOO[name], 33, torch.float32, FACTORS, 3, heads=(2,), selected=True, backward=BACKWARD[:2])


def test_spmm_of_wide_and_empty_heads():
    check_spmm(ZOO["power_law"], 300, torch.float32, FACTORS, 4, heads=(2,), backward=BACKWARD[:2])
    check_spmm(ZOO["power_law"], 0, torch.float32, FACTORS, 5, heads=(3,), selected=True)
    check_spmm(ZOO["power_law"], 4, torch.float32, ("mask", "row_scale"), 6, heads=(0,))


@pytest.mark.parametrize("name", ZOO)
def test_sddmm_on_every_graph(name):
    graph, generator = ZOO[name], torch.Generator().manual_seed(5)
    for shape in ((1,), (7,), (3, 4), (2, 33), (130,), (0,), (0, 4)):
        p = torch.randn(graph.num_dst, *shape, generator=generator)
        q = torch.randn(graph.num_src, *shape, generator=generator)
        check("sddmm", *graph.arrays, p, q, what=str(shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sddmm_in_every_dtype(dtype):
    generator = torch.Generator().manual_seed(6)
    for shape, prepare in (((64,), lambda t: t), ((2, 16), unaligned), ((2, 200), lambda t: t)):
        p, q = (prepare(torch.randn(97, *shape, generator=generator).to(dtype)) for _ in range(2))
        check("sddmm", *arrays(ZOO["power_law"], True), p, q, what=f"{shape} {dtype}")


@pytest.mark.parametrize("name", [name for name, graph in ZOO.items() if graph.num_src == graph.num_dst])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gcn_norm(name, dtype):
    graph, generator = ZOO[name], torch.Generator().manual_seed(7)
    signed = torch.randn(graph.num_edges, generator=generator, dtype=dtype)  # degrees at or below 0 as well
    near_one = 1 + 1e-3 * signed
    keep = torch.rand(graph.num_edges, generator=generator) < 0.7
    dc = torch.randn(graph.num_edges, generator=generator, dtype=dtype)
    added = torch.randint(0, 3, (graph.num_dst,), generator=generator).to(dtype)
    for mask, some, loops, masked in itertools.product((None, near_one, signed), (None, keep), (None, added), (True, False)):
        if mask is None and dtype == torch.float64:
            continue  # without a mask the result is float32
        args = *arrays(graph, dtype == torch.float64), mask, some, loops, masked
        c, c_self, dinv = run("gcn_norm", *args)
        if mask is not signed:  # near d = 0 the inverse root magnifies rounding without bound
            check("gcn_norm", *args)
        dc_self = None if loops is None else torch.randn(graph.num_dst, generator=generator, dtype=dtype)
        if masked and mask is not None:
            check("gcn_norm_bwd", *graph.arrays, dinv, dc, dc_self, loops, some)
    negative = run("gcn_norm", *graph.arrays, torch.full_like(dc, -1.0), None, None, True)
    assert all(not part.any() for part in negative)

"""The native CPU ops against the float64 reference, 1 against 2 threads, for every instruction set of this machine."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from acefast import CSR, Graph
from acefast.kept import KeptWeights
from acefast.ops import backend, reference
from tests.inputs import TOLERANCE, assert_close, edge_sets, graphs

LEVELS = {"DEFAULT": ["default"], "AVX2": ["default", "avx2"], "AVX512": ["default", "avx2", "avx512"]}
HERE = torch.backends.cpu.get_cpu_capability()
DTYPES = list(TOLERANCE)
ZOO = graphs()

pytestmark = pytest.mark.skipif(
    not backend.native_library("cpu").exists(), reason="the CPU library was not built (ACEFAST_BUILD=none)"
)


def native(op):
    return backend.implementation(op, "cpu", "native")


def wide(value):
    """Arguments of the float64 reference: every floating-point tensor widened."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return [wide(v) for v in value] if isinstance(value, list | tuple) else value


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


def compare(op, *args, dtype):
    """Native with 1 and 2 threads to the bit, and against the reference in float64."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = flat(native(op)(*args))
        torch.set_num_threads(2)
        two = flat(native(op)(*args))
    finally:
        torch.set_num_threads(before)
    expected = flat(getattr(reference, op)(*[wide(a) for a in args]))
    shapes = flat(getattr(reference, op)(*args))
    assert len(one) == len(expected)
    for a, b, e, s in zip(one, two, expected, shapes, strict=True):
        assert torch.equal(a, b), f"{op}: 1 and 2 threads differ"
        assert a.dtype == s.dtype and a.shape == s.shape
        assert_close(a, e, dtype, op)
    return one


def features(rows, columns, dtype, seed=0):
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def edge_values(num, dtype, seed=1):
    acc = reference.accumulator(dtype)
    return torch.randn(num, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(acc)


def kept(shape, share, seed=2):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def wide_graph(g):
    """The same graph with int64 indices."""
    return [None if t is None else t.long() for t in g.arrays]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_spmm(name, dtype):
    g = ZOO[name]
    square = g.num_dst == g.num_src
    for F, factors in itertools.product((1, 7, 37), range(4)):
        x, dy = features(g.num_src, F, dtype), features(g.num_dst, F, dtype, 5)
        weight = edge_values(g.num_edges, dtype) if factors & 1 else None
        mask = edge_values(g.num_edges, dtype, 7) if factors & 2 else None
        keep = kept(g.num_edges, 0.6) if factors else None
        self_weight = edge_values(g.num_dst, dtype, 8) if square and factors > 1 else None
        row_scale = edge_values(g.num_dst, dtype, 9) if factors == 3 else None
        arrays = wide_graph(g) if factors == 2 else g.arrays
        common = (weight, mask, keep, self_weight, row_scale)
        compare("spmm", *arrays, x, *common, False, dtype=dtype)
        for need_dx, need_dcoef in ((True, True), (True, False), (False, True)):
            compare("spmm_bwd", *arrays, dy, x, *common, need_dx, need_dcoef, factors == 1, dtype=dtype)


@pytest.mark.parametrize("F", [15, 16, 17, 64, 128, 129, 300])
def test_spmm_widths(F):
    g = ZOO["power_law"]
    x, dy, mask = (
        features(97, F, torch.float32),
        features(97, F, torch.float32, 3),
        edge_values(g.num_edges, torch.float32),
    )
    compare("spmm", *g.arrays, x, None, mask, None, None, None, False, dtype=torch.float32)
    compare("spmm_bwd", *g.arrays, dy, x, None, mask, None, None, None, True, True, False, dtype=torch.float32)


def hub_graph(num_edges=40_000):
    """One destination and one source with more edges than a piece of work holds, in shuffled order."""
    generator = torch.Generator().manual_seed(3)
    other = torch.randint(0, 50, (num_edges,), generator=generator)
    here = torch.full((num_edges,), 20)
    edges = torch.cat((torch.stack((other, here)), torch.stack((here, other))), 1)
    return Graph.from_edge_index(edges[:, torch.randperm(edges.size(1), generator=generator)], num_nodes=50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hub_rows_are_cut_and_joined(dtype):
    g = hub_graph()
    x, dy = features(50, 19, dtype), features(50, 19, dtype, 4)
    weight, self_weight, scale = edge_values(g.num_edges, dtype), edge_values(50, dtype, 5), edge_values(50, dtype, 6)
    for keep in (None, kept(g.num_edges, 0.3), torch.zeros(g.num_edges, dtype=torch.bool)):
        compare("spmm", *g.arrays, x, weight, None, keep, self_weight, scale, False, dtype=dtype)
        compare("spmm_bwd", *g.arrays, dy, x, weight, None, keep, self_weight, scale, True, True, True, dtype=dtype)


def test_removed_edges_do_not_reach_the_result():
    g = ZOO["power_law"]
    keep = kept(g.num_edges, 0.5)
    mask = torch.where(keep, 1.0, float("nan"))
    x = torch.randn(97, 8)
    y = native("spmm")(*g.arrays, x, None, mask, keep, None, None, False)
    assert torch.equal(y, native("spmm")(*g.arrays, x, None, None, keep, None, None, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_sddmm(name, dtype):
    g = ZOO[name]
    for shape in ((1,), (33,), (3, 5), (8, 16)):
        p = features(g.num_dst, torch.Size(shape).numel(), dtype).view(-1, *shape)
        q = features(g.num_src, torch.Size(shape).numel(), dtype, 3).view(-1, *shape)
        compare("sddmm", *g.arrays, p, q, dtype=dtype)


@pytest.mark.parametrize("name", [n for n, (_, (s, d)) in edge_sets().items() if s == d])
def test_gcn_norm(name):
    g = ZOO[name]
    for dtype, with_loops, masked, use_keep in itertools.product((torch.float32, torch.float64), *[(True, False)] * 3):
        mask = edge_values(g.num_edges, dtype) + 0.5
        loops = 1 + edge_values(g.num_dst, dtype, 5).abs() if with_loops else None
        keep = kept(g.num_edges, 0.5) if use_keep else None
        c, c_self, dinv = compare("gcn_norm", *g.arrays, mask, keep, loops, masked, dtype=dtype)
        dc, dc_self = edge_values(g.num_edges, dtype, 3), edge_values(g.num_dst, dtype, 4) if with_loops else None
        compare("gcn_norm_bwd", *g.arrays, dinv, dc, dc_self, loops, keep, dtype=dtype)
    compare("gcn_norm", *g.arrays, None, None, torch.ones(g.num_dst), False, dtype=torch.float32)
    compare("gcn_norm", *g.arrays, None, kept(g.num_edges, 0.5), None, True, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_dropout_equals_the_reference(dtype):
    cases = [((0,), 0.5, 1, 2), ((1,), 0.5, 3, 4), ((333, 7), 0.5, -9, 2**40 + 3), ((70_001,), 0.1, 5, 6)]
    for shape, p, seed, step in [*cases, ((50, 50), 0.0, 1, 1), ((50, 50), 1.0, 1, 1)]:
        x = features(1, max(torch.Size(shape).numel(), 1), dtype).flatten()[: torch.Size(shape).numel()].view(shape)
        y = native("relu_dropout")(x, None, p, seed, step, None)
        assert torch.equal(y, reference.relu_dropout(x, None, p, seed, step, None))
        assert torch.equal(y, native("relu_dropout")(x, None, p, seed, 0, torch.tensor([step])))
        dy = torch.ones_like(x)
        assert torch.equal(native("relu_dropout_bwd")(dy, y, p), reference.relu_dropout_bwd(dy, y, p))
    assert not native("relu_dropout")(torch.full((40,), float("nan"), dtype=dtype), None, 0.0, 0, 0, None).any()


@pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 301])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_dropout_of_some_rows_equals_the_reference(dtype, width):
    x = features(400, width, dtype)
    rows = torch.randint(0, 10**6, (400,), generator=torch.Generator().manual_seed(width))
    rows[::3] += 2**40  # numbers of elements above 2^32
    y = native("relu_dropout")(x, rows, 0.3, 5, 6, None)
    assert torch.equal(y, reference.relu_dropout(x, rows, 0.3, 5, 6, None))
    assert native("relu_dropout")(x[:, :0], rows, 0.3, 5, 6, None).shape == (400, 0)
    y = native("elu_dropout")(x, rows, 0.3, 5, 6, None)
    assert_close(y, reference.elu_dropout(x.double(), rows, 0.3, 5, 6, None), dtype)
    dropped = (y == 0) & ~torch.signbit(y)
    assert torch.equal(dropped, native("relu_dropout")(torch.ones_like(x), rows, 0.3, 5, 6, None) == 0)
    assert torch.equal(y[7:93], native("elu_dropout")(x[7:93].contiguous(), rows[7:93], 0.3, 5, 6, None))
    dy = features(400, 1, dtype).expand(400, width).contiguous()
    assert_close(native("elu_dropout_bwd")(dy, y, 0.3), reference.elu_dropout_bwd(dy.double(), y.double(), 0.3), dtype)


@pytest.mark.parametrize("shape", [(0, 5, 3), (1, 1, 1), (16, 30, 16), (37, 70, 7), (301, 500, 130), (40, 8, 257)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_linear_kept_by_tiles_and_by_lists(dtype, shape):
    N, K, O = shape
    x = CSR.from_dense(torch.where(kept((N, K), 0.2, 6), features(N, K, dtype), 0))
    for share, bias in itertools.product((-1.0, 0.03, 0.5), (None, torch.randn(O, dtype=reference.accumulator(dtype)))):
        lists = KeptWeights(kept((O, K), share))
        values = lists.listed(features(O, K, dtype))
        arguments = (x.rowptr, x.col, x.value, *x.transpose_arrays(), values, lists.ptr, lists.out, lists.places(None), bias, O)
        one, two = (native("masked_linear_kept")(*arguments, tiled) for tiled in (False, True))
        assert_close(one, reference.masked_linear_kept(*wide(arguments), False), dtype)
        assert torch.equal(one, two)


LINEAR_SIZES = [(0, 5, 3), (5, 3, 0), (1, 1, 1), (37, 70, 7), (130, 65, 70), (70, 300, 40), (600, 40, 200)]


def linear_case(N, K, O, dtype, case):
    """(weight, mask, bias, keep): every combination of the optional ones, dense and sparse keep patterns."""
    acc = reference.accumulator(dtype)
    mask = features(O, K, acc, 3) if case in ("mask", "all", "sparse") else None
    bias = edge_values(O, dtype, 4) if case in ("bias", "all", "sparse") else None
    keep = {"all": kept((O, K), 0.7), "sparse": kept((O, K), 0.012), "nothing": kept((O, K), -1.0)}.get(case)
    return features(O, K, dtype, 2), mask, bias, keep


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "mask", "bias", "all", "sparse", "nothing"])
def test_masked_linear(case, dtype):
    for N, K, O in LINEAR_SIZES:
        weight, mask, bias, keep = linear_case(N, K, O, dtype, case)
        x, dy = features(N, K, dtype), features(N, O, dtype, 8)
        compare("masked_linear", x, weight, mask, bias, keep, False, dtype=dtype)
        for need_dx, need_dw, all_weights in ((True, True, False), (False, True, True), (True, False, False)):
            compare("masked_linear_bwd", dy, x, weight, mask, keep, need_dx, need_dw, all_weights, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "mask", "bias", "all", "sparse", "nothing"])
def test_masked_linear_csr(case, dtype):
    for N, K, O in [*LINEAR_SIZES, (40, 90, 150)]:
        weight, mask, bias, keep = linear_case(N, K, O, dtype, case)
        x = CSR.from_dense(torch.where(kept((N, K), 0.2, 6), features(N, K, dtype), 0))
        arrays = (x.rowptr, x.col, x.value, *x.transpose_arrays())
        dy = features(N, O, dtype, 8)
        compare("masked_linear_csr", *arrays, weight, mask, bias, keep, False, dtype=dtype)
        for all_weights in (False, True):
            compare("masked_linear_csr_bwd", *arrays, dy, weight, mask, keep, all_weights, dtype=dtype)


def score_lists(dtype):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(5000, generator=generator, dtype=torch.float64)
    return {
        "random": [normal[:3000].view(30, 100).to(dtype), normal[3000:].to(dtype)],
        "mask": [(1 + 1e-5 * normal).to(dtype), torch.empty(0, dtype=dtype)],
        "few values": [normal.mul(2).round().to(dtype)],
        "one value": [torch.full((20_000,), -3.0, dtype=dtype)],
        "extremes": [
            torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, -1e-40, 1e-7, 6e4, -6e4, 0.0] * 3, dtype=dtype)
        ],
        "large": [  # outliers put all others into one bin of the first digit, which then takes a second one
            (1 + 1e-3 * torch.rand(70_000, generator=generator, dtype=torch.float64)).to(dtype),
            torch.tensor([3e4, -3e4, 1e30 if dtype != torch.float16 else 6e4], dtype=dtype),
        ],
        "empty": [torch.empty(0, dtype=dtype)],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", score_lists(torch.float32))
def test_topk_mask_picks_what_the_sort_picks(name, dtype):
    scores = score_lists(dtype)[name]
    total = sum(s.numel() for s in scores)
    for use_alive in (False, True):
        alive = [kept(s.shape, 0.7, 3) for s in scores] if use_alive else None
        living = sum(int(a.sum()) for a in alive) if use_alive else total
        for k in sorted({0, min(1, living), living // 3, max(living - 1, 0), living}):
            for largest, magnitude in itertools.product((True, False), (True, False)):
                torch.set_num_threads(2)
                keep, status = native("topk_mask")(scores, k, alive, largest, magnitude)
                expected, _ = reference.topk_mask(scores, k, alive, largest, magnitude)
                assert status.tolist() == [0] and sum(int(m.sum()) for m in keep) == k
                for a, b in zip(keep, expected, strict=True):
                    assert torch.equal(a, b), (name, use_alive, k, largest, magnitude)


def test_topk_mask_says_what_is_wrong():
    scores = [torch.tensor([1.0, float("nan"), 3.0])]
    numbers = [~scores[0].isnan()]
    for k, alive, expected in ((1, None, 1), (9, numbers, 2), (9, None, 3), (-1, numbers, 2), (2, numbers, 0)):
        keep, status = native("topk_mask")(scores, k, alive, True, False)
        assert status.item() == expected
        assert int(keep[0].sum()) == (0 if expected else k)


@pytest.mark.parametrize("level", [x for x in LEVELS.get(HERE, ["default"]) if x != LEVELS.get(HERE, ["default"])[-1]])
def test_narrower_instruction_sets(level):
    """This file again in a process that runs as on a machine with fewer instructions."""
    if not backend.native_library("cpu").with_name(f"libacefast_cpu_{level}.so").exists():
        pytest.skip("this level was not built")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    chosen = "not narrower and not float64 and not large"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-3000:]

"""gen and gen_bwd on the CPU against the float64 reference, and the error bounds of their exp and log."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from acefast import Graph
from acefast.ops import backend, reference
from tests.inputs import TOLERANCE, assert_close, graphs

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"default": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
LEVELS = {"DEFAULT": ["default"], "AVX2": ["default", "avx2"], "AVX512": ["default", "avx2", "avx512"]}
HERE = torch.backends.cpu.get_cpu_capability()
DTYPES = list(TOLERANCE)
ZOO = graphs()
SUM, SOFTMAX, SOFTMAX_SG, POWER, MAX = range(5)
AGGREGATIONS = {"sum": SUM, "softmax": SOFTMAX, "softmax_sg": SOFTMAX_SG, "power": POWER, "max": MAX}

pytestmark = pytest.mark.skipif(
    not backend.native_library("cpu").exists(), reason="the CPU library was not built (ACEFAST_BUILD=none)"
)

# Each function applied to whole arrays, whose length is a multiple of the lanes.
EXP_SOURCE = """
#include "cpu/exp.h"
using namespace acefast;
#define EACH(name, A, f) \\
  extern "C" __attribute__((visibility("default"))) void name(const A* x, A* y, long n) { \\
    for (long i = 0; i < n; i += kLanesOf<A>) store(y + i, f<A>(load(x + i))); \\
  }
EACH(exp_float, float, vexp)
EACH(exp_double, double, vexp)
EACH(log_float, float, vlog)
EACH(log_double, double, vlog)
"""


@pytest.fixture(scope="module")
def exp_libraries(tmp_path_factory):
    """Instruction set -> a shared library of exp.h's functions, for those that this machine runs."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or os.uname().machine != "x86_64":
        pytest.skip("needs g++ on x86-64")
    folder = tmp_path_factory.mktemp("exp")
    (folder / "exp.cpp").write_text(EXP_SOURCE)
    include = Path(torch.__file__).parent / "include"
    common = ["-std=c++20", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    running = {}
    for level in LEVELS.get(HERE, ["default"]):
        out = folder / f"{level}.so"
        command = [compiler, *common, *FLAGS[level], f"-I{ROOT / 'csrc'}", "-isystem", include, folder / "exp.cpp"]
        running[out] = subprocess.Popen([*command, "-o", out], stderr=subprocess.PIPE, text=True)
    for out, process in running.items():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return {out.stem: ctypes.CDLL(str(out)) for out in running}


def apply(library, name, x):
    y = np.empty_like(x)
    pointer = ctypes.c_float if x.dtype == np.float32 else ctypes.c_double
    function = getattr(library, f"{name}_{'float' if x.dtype == np.float32 else 'double'}")
    function(*(a.ctypes.data_as(ctypes.POINTER(pointer)) for a in (x, y)), ctypes.c_long(x.size))
    return y


def ulps(y, exact):
    """The largest error in units in the last place of the correctly rounded result."""
    rounded = exact.astype(y.dtype)
    return float(np.max(np.abs((y.astype(exact.dtype) - exact) / np.spacing(np.abs(rounded)).astype(exact.dtype))))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_error_of_exp_and_log(exp_libraries, dtype):
    wider = np.float64 if dtype == np.float32 else np.longdouble
    if np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps:
        pytest.skip("needs an 80-bit long double")
    info = np.finfo(dtype)
    rng = np.random.default_rng(0)
    low, high = np.log(info.tiny) + 1e-3, np.log(info.max) - 1e-3
    x = np.concatenate((rng.uniform(low, high, 1 << 18), rng.uniform(-1, 1, 1 << 18))).astype(dtype)
    positive = np.concatenate((np.exp(rng.uniform(low, high, 1 << 18)), rng.uniform(0.5, 2, 1 << 18))).astype(dtype)
    inf = np.inf
    edges = np.resize(np.array([-inf, inf, -1e30, 1e30, 0, -0.0, 1e-30, -800.0], dtype), 16)
    smallest = info.smallest_subnormal
    edges_log = np.resize(np.array([0.0, inf, -1.0, 1.0, info.tiny, smallest, -inf, info.max], dtype), 16)
    for level, library in exp_libraries.items():
        assert ulps(apply(library, "exp", x), np.exp(x.astype(wider))) < 1.5, level
        assert ulps(apply(library, "log", positive), np.log(positive.astype(wider))) < 1.5, level
        with np.errstate(all="ignore"):
            assert np.array_equal(apply(library, "exp", edges), np.exp(edges)), level
            np.testing.assert_allclose(apply(library, "log", edges_log), np.log(edges_log), rtol=2 * info.eps)
        subnormal = np.resize(np.log(info.tiny).astype(dtype) - np.arange(1, 9, dtype=dtype), 16)
        np.testing.assert_allclose(apply(library, "exp", subnormal), np.exp(subnormal), atol=2 * smallest)


def eighths(generator, dtype, *shape):
    """Multiples of 1/8 within 3: sums and products of them are exact, so that no sign depends on the arithmetic."""
    return (torch.randint(-24, 25, shape, generator=generator) / 8).to(dtype)


def case(
    g, aggr, dtype, F, features="none", D=8, use_mask=True, keep_share=None, removed=False, selected=False, seed=0
):
    """(graph arrays, the arguments of gen after them but all_edges): features none, rows or encoded."""
    generator = torch.Generator().manual_seed(seed)
    acc = reference.accumulator(dtype)

    def uniform(low, high, *shape):
        return (low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)).to(acc)

    x, edge, weight, bias = eighths(generator, dtype, g.num_src, F), None, None, None
    if features == "rows":
        edge = eighths(generator, dtype, g.num_edges, F)
    if features == "encoded":
        edge = eighths(generator, dtype, g.num_edges, D)
        weight, bias = eighths(generator, acc, F, D), eighths(generator, acc, F) if D != 1 else None
    mask = None
    if use_mask:  # max: powers of two, so that equal messages are equal in every arithmetic
        powers = (2.0 ** torch.randint(-1, 2, (g.num_edges,), generator=generator)).to(acc)
        mask = powers if aggr == MAX else uniform(-0.5, 2, g.num_edges)
    keep = None if keep_share is None else torch.rand(g.num_edges, generator=generator) < keep_share
    if keep is not None and mask is not None:
        mask = torch.where(keep, mask, torch.nan)
    param = {SOFTMAX: uniform(-1, 2, F), SOFTMAX_SG: uniform(-1, 2, F), POWER: uniform(0.5, 3, F)}.get(aggr)
    row_scale = uniform(0.1, 1, g.num_dst) if aggr == POWER or (aggr == SUM and seed % 2) else None
    count = None
    if removed:
        gone = torch.ones(g.num_edges, dtype=torch.bool) if keep is None else ~keep
        dst = torch.repeat_interleave(torch.arange(g.num_dst), g.in_degrees())
        ids = torch.arange(g.num_edges) if g.eid is None else g.eid.long()
        count = torch.zeros(g.num_dst, dtype=torch.long).index_add_(0, dst, gone[ids].long())
    arrays = g.arrays
    if selected:
        arrays, keep = g.select(keep).arrays, None
    eps = 2.0**-10
    return arrays, (x, edge, weight, bias, mask, keep, param, row_scale, count, aggr, eps)


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def compare(op, arrays, args, dtype, threads=(1,)):
    """Native, to the bit the same for each number of threads, and against the reference in float64: within the
    tolerance, or within three times what the reference itself loses in `dtype` (a gradient that cancels)."""
    native = backend.implementation(op, "cpu", "native")
    before = torch.get_num_threads()
    try:
        results = []
        for count in threads:
            torch.set_num_threads(count)
            results.append(native(*arrays, *args))
    finally:
        torch.set_num_threads(before)
    expected = getattr(reference, op)(*arrays, *map(wide, args))
    acc, encoded = reference.accumulator(dtype), op == "gen_bwd" and args[5] is not None
    dtypes = (dtype, acc, acc if encoded else dtype, acc, acc)
    for n, (one, two, e) in enumerate(zip(results[0], results[-1], expected, strict=True)):
        assert torch.equal(one, two), f"{op}[{n}]: {threads} threads differ"
        assert one.shape == e.shape and one.dtype == (dtypes[n] if e.is_floating_point() else e.dtype), f"{op}[{n}]"
        if e.is_floating_point():
            infinite = e == -torch.inf  # lse of rows without edges
            assert torch.equal(one == -torch.inf, infinite), f"{op}[{n}]"
            one, e = one.double().masked_fill(infinite, 0), e.masked_fill(infinite, 0)
            try:
                assert_close(one, e, dtype, f"{op}[{n}]")
            except AssertionError:
                narrow = getattr(reference, op)(*arrays, *args)[n].double().masked_fill(infinite, 0)
                if (one - e).norm() > 3 * (narrow - e).norm():
                    raise
        else:
            assert torch.equal(one, e), f"{op}[{n}]"
    return results[0]


def compare_both(arrays, args, dtype, needs=(True, True, True, True), all_edges=False, threads=(1,)):
    edge, mask = args[1], args[4]
    y, stat = compare("gen", arrays, (*args, all_edges), dtype, threads)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(dtype)
    need_dx, need_dmask, need_dedge, need_dparam = needs
    needs = (need_dx, need_dmask and mask is not None, need_dedge and edge is not None, need_dparam)
    return compare("gen_bwd", arrays, (dy, y, stat, *args, *needs, all_edges), dtype, threads)


@pytest.mark.parametrize("aggr", AGGREGATIONS.values(), ids=AGGREGATIONS)
@pytest.mark.parametrize("name", ZOO)
def test_graphs_and_options(name, aggr):
    g = ZOO[name]
    options = [
        {"F": 19},
        {"F": 12, "keep_share": 0.6, "features": "encoded", "dtype": torch.float64},
        {"F": 7, "keep_share": 0.5, "removed": True, "features": "rows", "seed": 1},
        {"F": 20, "keep_share": 0.4, "removed": True, "selected": True, "features": "rows"},
        {"F": 1, "use_mask": False, "features": "encoded", "D": 3},
    ]
    for option in options:
        dtype = option.pop("dtype", torch.float32)
        arrays, args = case(g, aggr, dtype, **option)
        compare_both(arrays, args, dtype)


@pytest.mark.parametrize("aggr", AGGREGATIONS.values(), ids=AGGREGATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, aggr):
    g = ZOO["power_law"]
    for features, F in (("none", 128), ("rows", 35), ("encoded", 21)):
        arrays, args = case(g, aggr, dtype, F, features, keep_share=0.7)
        arrays = [None if t is None else t.long() for t in arrays] if features == "rows" else arrays  # int64 indices
        compare_both(arrays, args, dtype, threads=(1, 2))


@pytest.mark.parametrize("F", [0, 1, 16, 17, 40, 80, 129])
def test_widths(F):
    for aggr, features in ((SOFTMAX, "encoded"), (SUM, "none"), (POWER, "none")):
        arrays, args = case(ZOO["bipartite"], aggr, torch.float32, F, features)
        compare_both(arrays, args, torch.float32)


@pytest.mark.parametrize("D", [0, 1, 2, 13, 40])
def test_numbers_of_raw_features(D):
    arrays, args = case(ZOO["sorted"], SOFTMAX, torch.float32, 33, "encoded", D)
    *_, dweight, dbias, _ = compare_both(arrays, args, torch.float32)
    assert dweight.shape == (33, D) and dbias.numel() == (0 if D == 1 else 33)


@pytest.mark.parametrize("aggr", [SUM, SOFTMAX, SOFTMAX_SG])
@pytest.mark.parametrize("features", ["none", "rows", "encoded"])
def test_mask_gradient_of_removed_edges(features, aggr):
    for name in ("power_law", "isolated"):
        arrays, args = case(ZOO[name], aggr, torch.float32, 24, features, keep_share=0.5, removed=True, seed=1)
        _, dmask, *_ = compare_both(arrays, args, torch.float32, all_edges=True)
        assert dmask[~args[5]].abs().sum() > 0


@pytest.mark.parametrize("needed", [{"dx"}, {"dmask", "dparam"}, {"dedge"}])
def test_only_what_is_needed(needed):
    needs = [name in needed for name in ("dx", "dmask", "dedge", "dparam")]
    for aggr, features in ((SOFTMAX, "rows"), (SUM, "encoded"), (POWER, "none"), (MAX, "rows")):
        arrays, args = case(ZOO["power_law"], aggr, torch.float32, 19, features, keep_share=0.8)
        compare_both(arrays, args, torch.float32, needs)


@pytest.mark.parametrize("aggr", AGGREGATIONS.values(), ids=AGGREGATIONS)
def test_hub_rows_are_cut_and_joined(aggr):
    generator = torch.Generator().manual_seed(3)
    other, here = torch.randint(0, 50, (20_000,), generator=generator), torch.full((20_000,), 20)
    edges = torch.cat((torch.stack((other, here)), torch.stack((here, other))), 1)
    g = Graph.from_edge_index(edges[:, torch.randperm(40_000, generator=generator)], num_nodes=50)
    for option in ({}, {"keep_share": 0.3, "removed": True, "features": "encoded"}):
        arrays, args = case(g, aggr, torch.float32, 19, **option)
        compare_both(arrays, args, torch.float32, threads=(1, 2))


def test_logits_of_any_size():
    """Rising logits move the softmax's reference value many times; beyond 40 the backward gathers the lse itself."""
    g = ZOO["hub"]
    for scale in (1, 30, 1000):
        arrays, args = case(g, SOFTMAX, torch.float64, 9)
        args = list(args)
        args[6] = args[6] * scale
        y, stat = compare("gen", arrays, (*args, False), torch.float64)
        assert (stat.max() > 40) == (scale > 1)
        compare_both(arrays, args, torch.float64)
    narrow = [t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    y, stat = backend.implementation("gen", "cpu", "native")(*arrays, *narrow, False)
    assert y.isfinite().all() and (stat[g.in_degrees() > 0]).isfinite().all()


def test_nan_of_kept_edges_shows():
    g = ZOO["sorted"]
    arrays, args = case(g, SOFTMAX, torch.float32, 20)
    args[0][3, 5] = torch.nan
    y, _ = backend.implementation("gen", "cpu", "native")(*arrays, *args, False)
    touched = g.edge_index()[1][g.edge_index()[0] == 3].unique()
    expected = torch.zeros(y.shape, dtype=torch.bool)
    expected[touched, 5] = True
    assert torch.equal(y.isnan(), expected)


MEMORY = """
import resource
import torch
from acefast import Graph
from acefast.ops import backend

torch.set_num_threads(2)
N, E, F, D = 64, 400_000, 128, 2
g = Graph.from_edge_index(torch.randint(0, N, (2, E)), N)
x, edge, weight, mask, t = torch.randn(N, F), torch.randn(E, D), torch.randn(F, D), torch.rand(E), torch.ones(F)
args = (x, edge, weight, None, mask, None, t, None, None, 1, 1e-7)
native = [backend.implementation(op, "cpu", "native") for op in ("gen", "gen_bwd")]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y, stat = native[0](*g.arrays, *args, False)
native[1](*g.arrays, y, y, stat, *args, True, True, True, True, False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_no_tensor_of_edges_times_features():
    """The messages of the case would take 195 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 40


@pytest.mark.parametrize("level", LEVELS.get(HERE, ["default"])[:-1])
def test_narrower_instruction_sets(level):
    """A part of this file again in a process that runs as on a machine with fewer instructions."""
    if not backend.native_library("cpu").with_name(f"libacefast_cpu_{level}.so").exists():
        pytest.skip("this level was not built")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    chosen = "test_widths or test_numbers_of_raw_features or (test_dtypes and bfloat16)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]

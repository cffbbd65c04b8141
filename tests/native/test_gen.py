"""gen and gen_bwd on the CPU against the float64 reference, and the error bounds of their exp and log."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"default": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
LEVELS = {"DEFAULT": ["default"], "AVX2": ["default", "avx2"], "AVX512": ["default", "avx2", "avx512"]}
HERE = torch.backends.cpu.get_cpu_capability()

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
    function(x.ctypes.data_as(ctypes.POINTER(pointer)), y.ctypes.data_as(ctypes.POINTER(pointer)), ctypes.c_long(x.size))
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
    edges_log = np.resize(np.array([0.0, inf, -1.0, 1.0, info.tiny, info.smallest_subnormal, -inf, info.max], dtype), 16)
    for level, library in exp_libraries.items():
        assert ulps(apply(library, "exp", x), np.exp(x.astype(wider))) < 1.5, level
        assert ulps(apply(library, "log", positive), np.log(positive.astype(wider))) < 1.5, level
        with np.errstate(all="ignore"):
            assert np.array_equal(apply(library, "exp", edges), np.exp(edges)), level
            np.testing.assert_allclose(apply(library, "log", edges_log), np.log(edges_log), rtol=2 * info.eps)
        subnormal = np.resize(np.log(info.tiny).astype(dtype) - np.arange(1, 9, dtype=dtype), 16)
        np.testing.assert_allclose(apply(library, "exp", subnormal), np.exp(subnormal), atol=info.smallest_subnormal * 2)

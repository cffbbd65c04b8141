"""The CUDA kernels without a GPU: their sources run on the host under the SIMT emulator with the address and the
undefined-behaviour sanitiser, and nvcc compiles them for sm_80 and sm_90."""

import os
import re
import subprocess
import sys

import pytest

from acefast.ops.backend import native_library
from tests.simt import build

CASES = {
    "cases_graph.py": ("spmm", "sddmm", "gcn_norm"),
    "cases_attention.py": ("gat", "edge_softmax", "spmm_max"),
    "cases_gen.py": ("gen",),
    "cases_dense.py": ("relu_dropout", "elu_dropout", "masked_linear", "masked_adam"),
    "cases_selection.py": ("topk_mask", "topk_mask_out", "gumbel_topk", "exchange"),
}


@pytest.fixture(scope="module")
def library():
    build.build(build.LIBRARY, build.FAULTY)


@pytest.fixture(scope="module")
def case_runs(library):
    """All case files started at once, each in its own sanitised process."""
    runs = {}
    for name in CASES:
        command = build.sanitized_command(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", f"tests/simt/{name}")
        environment = build.sanitized_environment() | {"ACEFAST_NO_SKIPS": "0"}
        runs[name] = subprocess.Popen(
            command, cwd=build.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    yield runs
    for run in runs.values():
        run.kill()


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_reference_for_every_order_of_threads(case_runs, name):
    output, _ = case_runs[name].communicate()
    assert case_runs[name].returncode == 0, output[-8000:]
    for op in CASES[name]:
        assert re.search(rf"::test_{op}.* PASSED", output), f"no case of {op} ran:\n{output[-2000:]}"


OUT_OF_RANGE = """
import torch
from tests.inputs import graphs
from tests.simt.emulated import run
rowptr, col, *rest = graphs()["power_law"].arrays
x = torch.randn(97, 4)
run("spmm", rowptr, col, *rest, x, None, None, None, None, None, False)
print("in range", flush=True)
col = col.clone()
col[0] = 97  # the first row past the end
run("spmm", rowptr, col, *rest, x, None, None, None, None, None, False)
"""


def test_address_sanitiser_watches_torch_memory(library):
    command = build.sanitized_command(sys.executable, "-c", OUT_OF_RANGE)
    done = subprocess.run(command, cwd=build.ROOT, env=build.sanitized_environment(), capture_output=True, text=True)
    assert "in range" in done.stdout, done.stderr[-4000:]
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr and "spmm_fwd_kernel" in done.stderr


def run_faulty(case, seed=1):
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    command = build.sanitized_command(str(build.FAULTY), case, str(seed))
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("case", ["barrier", "shared_inside", "dynamic_inside", "reductions", "reuse"])
def test_emulator_accepts_right_kernels(library, case):
    results = {run_faulty(case, seed).stdout for seed in range(4)}
    assert len(results) == 1
    values = [float(v) for v in results.pop().split()]
    expected = {"barrier": [float((i + 1) % 64) for i in range(64)], "reuse": [6.0] * 64}
    assert values == expected.get(case, [1.0] * 64)


def test_emulator_shows_a_missing_barrier(library):
    results = [run_faulty("missing_barrier", seed).stdout for seed in range(4)]
    assert len(set(results)) == 4 and all("nan" in result for result in results)


def test_emulator_shows_a_missing_barrier_before_reuse(library):
    right = run_faulty("reuse").stdout
    assert any(run_faulty("reuse_without_barrier", seed).stdout != right for seed in (1, 3))


def test_emulator_permutes_blocks(library):
    assert len({run_faulty("block_order", seed).stdout for seed in range(4)}) == 4


@pytest.mark.parametrize(
    "case, message",
    [
        ("shared_overrun", "AddressSanitizer: heap-buffer-overflow"),
        ("dynamic_overrun", "AddressSanitizer: heap-buffer-overflow"),
        ("global_overrun", "AddressSanitizer: heap-buffer-overflow"),
        ("unaligned", "misaligned address .* which requires 16 byte alignment"),
        ("divergent_barrier", r"divergent barrier: thread \(0,0,0\) waits in __syncthreads .* thread \(32,0,0\) has left the kernel"),
        ("two_barriers", r"divergent barrier: .* but thread \(32,0,0\) waits in __syncthreads"),
        ("divergent_shuffle", r"divergent warp operation: .* __shfl_xor_sync .* mask 0xffffffff but .* has left the kernel"),
        ("mixed_masks", r"divergent warp operation: .* __shfl_sync"),
        ("outside_mask", r"reads lane 20 in __shfl_sync .* not in the mask"),
        ("large_block", "invalid configuration of kernel .* block \\(2048,1,1\\)"),
        ("empty_grid", "invalid configuration of kernel .* grid \\(0,1,1\\)"),
    ],
)
def test_emulator_refuses_faults(library, case, message):
    done = run_faulty(case)
    assert done.returncode != 0 and re.search(message, done.stderr), done.stderr[:2000]


def compiled_by_the_installation() -> bool:
    """The installed CUDA library is newer than every source and holds both architectures."""
    library = native_library("cuda")
    files = [*(build.ROOT / "csrc" / "cuda").iterdir(), *(build.ROOT / "csrc" / "common").iterdir()]
    if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in files):
        return False
    from acefast import _C

    return {str(arch) for arch in build.CUDA_ARCHS} <= set(_C.build_info()["cuda_archs"].split(","))


if build.find_nvcc():

    def test_nvcc_compiles_every_kernel():
        if compiled_by_the_installation():
            return
        cubins = [build.cubin(source, arch) for source in build.sources() for arch in build.CUDA_ARCHS]
        build.build(*cubins)
        assert len(cubins) >= 2 * 7 and all(path.stat().st_size > 0 for path in cubins)

"""Compiles, without a GPU, exactly what the launchers launch: each op is called on CPU tensors with the launch replaced
by a recorder, and every recorded kernel is compiled for sm_80 and sm_90. None may spill."""

import re
import subprocess
from collections import Counter

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from acefast import Graph  # noqa: E402
from acefast.ops import reference  # noqa: E402
from acefast.ops.triton import gat as gat_kernels  # noqa: E402
from acefast.ops.triton import gen as gen_kernels  # noqa: E402
from acefast.ops.triton import spmm as spmm_kernels  # noqa: E402
from acefast.ops.triton.topk_mask import topk_mask  # noqa: E402
from tests.triton.cases import FACTORS, alive_like, edge_inputs, gat_inputs, gen_inputs  # noqa: E402

# ptxas may park a word or two outside the inner loop for the sake of occupancy; a spilled tile is hundreds of bytes.
SPILL_LIMIT = 16

POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip


@pytest.fixture
def launches(monkeypatch):
    """[(kernel, {argument: value}, options)] of the launches made in the test; nothing runs."""
    recorded = []

    def record(kernel, *args, grid, warmup, **kwargs):
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {n: kwargs.pop(n) for n in names if n in kwargs}
        assert set(values) == set(names), f"{kernel.__name__}: {set(names) ^ set(values)}"
        recorded.append((kernel, values, kwargs))

    monkeypatch.setattr(JITFunction, "run", record)
    return recorded


def source(kernel, values):
    """What the launcher would hand to the compiler; every tensor counts as aligned, as torch allocates them."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        special = not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif parameter.is_constexpr or value is None or (special and value == 1):
            signature[name], constants[(position,)] = "constexpr", value
        elif parameter.annotation_type:
            signature[name], special = parameter.annotation_type, False
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            special = special and value % 16 == 0
        if special and signature[name] != "constexpr":
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(cubin, folder):
    """Registers per thread, stack and local memory in bytes, as the machine code declares them."""
    (folder / "kernel.cubin").write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", folder / "kernel.cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK", "LOCAL")}


def compile_all(launches, folder):
    """name -> resources of every distinct launch, for both architectures."""
    report = {}
    for kernel, values, options in launches:
        ast = source(kernel, values)
        for arch in (80, 90):
            key = (kernel.__name__, arch, ast.hash())
            if key not in report:
                compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)
                assert compiled.asm["cubin"], f"{kernel.__name__} for sm_{arch}: no machine code"
                report[key] = use = resources(compiled.asm["cubin"], folder)
                print(f"{kernel.__name__} sm_{arch}: {use}")
                assert use["STACK"] + use["LOCAL"] <= SPILL_LIMIT, f"{kernel.__name__} for sm_{arch} spills: {use}"
    return report


def small_graph(index=torch.int32):
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(0, 40, (2, 1100), generator=generator)
    arrays = Graph.from_edge_index(edges, num_nodes=40).arrays
    return Graph(*(t if i in (0, 3) else t.to(index) for i, t in enumerate(arrays)))


@pytest.mark.parametrize(
    ("num_feats", "dtype", "index"),
    [
        (128, torch.float32, torch.int32),
        (7, torch.float32, torch.int32),
        (512, torch.bfloat16, torch.int32),
        (128, torch.float16, torch.int64),
        (64, torch.float64, torch.int64),
    ],
)
def test_spmm_compiles(num_feats, dtype, index, launches, tmp_path):
    graph = small_graph(index)
    for factors in ((), ("weight", "mask", "keep"), FACTORS) if dtype == torch.float32 else (FACTORS,):
        x, dy, values = edge_inputs(graph, num_feats, dtype, factors)
        spmm_kernels.spmm(*graph.arrays, x, *values.values(), False)
        spmm_kernels.spmm_bwd(*graph.arrays, dy, x, *values.values(), True, True, factors == FACTORS)
    assert any("join" in kernel.__name__ for kernel, _, _ in launches), "these sizes were to be cut into pieces"
    compile_all(launches, tmp_path)


def test_spmm_without_permutation_compiles(launches, tmp_path):
    graph = small_graph()
    rowptr, col, _, colptr, row, _ = graph.arrays
    x, dy, values = edge_inputs(graph, 32, torch.float32, ("mask",))
    for need in ((True, False), (False, True)):
        spmm_kernels.spmm_bwd(rowptr, col, None, colptr, row, None, dy, x, *values.values(), *need, False)
    spmm_kernels.spmm(rowptr, col, None, colptr, row, None, x, *values.values(), False)
    compile_all(launches, tmp_path)


def run_gat(graph, heads, num_feats, dtype, mask, mask_on_logit, dropout):
    dy, inputs = gat_inputs(graph, heads, num_feats, dtype, mask, keep=mask is not None)
    how = (mask_on_logit, 0.2, dropout, 12345, 0, torch.tensor([7]) if mask == "edge" else None)
    saved = gat_kernels.gat(*graph.arrays, *inputs, *how, True)
    gat_kernels.gat_bwd(*graph.arrays, dy, *saved, *inputs, *how, mask is not None)


def run_gen(graph, num_feats, dtype, aggr, mask, removed):
    dy, inputs = gen_inputs(graph, num_feats, dtype, mask, mask, removed)
    saved = gen_kernels.gen(*graph.arrays, *inputs, aggr, 1e-7, removed)
    need = (True, mask, False, True, removed)
    gen_kernels.gen_bwd(*graph.arrays, dy, *saved, *inputs, aggr, 1e-7, *need)


@pytest.mark.parametrize(
    ("heads", "num_feats", "dtype", "mask", "mask_on_logit", "dropout"),
    [
        (8, 8, torch.float32, "edge", False, 0.6),
        (8, 8, torch.float32, "head", True, 0.0),
        (1, 7, torch.float32, "edge", True, 0.6),
        (4, 128, torch.bfloat16, "edge", False, 0.6),
        (3, 300, torch.float32, None, False, 0.0),
        (4, 16, torch.float64, "head", False, 0.6),
    ],
)
def test_gat_compiles(heads, num_feats, dtype, mask, mask_on_logit, dropout, launches, tmp_path):
    run_gat(small_graph(), heads, num_feats, dtype, mask, mask_on_logit, dropout)
    assert len(launches) == 6, "forward, join, mean, backward and two joins"
    compile_all(launches, tmp_path)


@pytest.mark.parametrize(
    ("num_feats", "dtype", "aggr", "mask", "removed"),
    [
        (128, torch.float32, reference.SOFTMAX, True, True),
        (7, torch.float32, reference.SOFTMAX, True, False),
        (512, torch.bfloat16, reference.SOFTMAX, True, False),
        (64, torch.float16, reference.SOFTMAX_SG, False, False),
        (64, torch.float64, reference.SOFTMAX, True, False),
    ],
)
def test_gen_compiles(num_feats, dtype, aggr, mask, removed, launches, tmp_path):
    run_gen(small_graph(), num_feats, dtype, aggr, mask, removed)
    compile_all(launches, tmp_path)


@pytest.mark.parametrize(("heads", "num_feats"), [(8, 8), (3, 300)])
def test_spmm_with_heads_compiles(heads, num_feats, launches, tmp_path):
    graph = small_graph()
    x, dy, values = edge_inputs(graph, num_feats, torch.float32, FACTORS, heads=heads)
    spmm_kernels.spmm(*graph.arrays, x, *values.values(), False)
    spmm_kernels.spmm_bwd(*graph.arrays, dy, x, *values.values(), True, True, False)
    compile_all(launches, tmp_path)


def recompilations(launches):
    return {(kernel.__name__, source(kernel, values).hash()) for kernel, values, _ in launches}


def test_sizes_do_not_recompile(launches):
    """Graphs of other sizes meet the kernels that are already compiled."""
    for num_nodes, num_edges in ((40, 1100), (41, 1601), (513, 2048), (7, 100_001)):
        edges = torch.randint(0, num_nodes, (2, num_edges), generator=torch.Generator().manual_seed(0))
        graph = Graph.from_edge_index(edges, num_nodes=num_nodes)
        x, dy, values = edge_inputs(graph, 16, torch.float32)
        spmm_kernels.spmm(*graph.arrays, x, *values.values(), False)
        spmm_kernels.spmm_bwd(*graph.arrays, dy, x, *values.values(), True, True, False)
        run_gat(graph, 4, 16, torch.float32, "edge", False, 0.1 * (num_nodes % 3 + 1))
        run_gen(graph, 16, torch.float32, reference.SOFTMAX, True, True)
    variants = Counter(name for name, _ in recompilations(launches))
    assert variants.pop("join_kernel") == 5, "of y and dx, of dz and da_src, of dx"
    assert len(variants) == 10 and set(variants.values()) == {1}, variants
    launches.clear()
    for size in (4097, 16 * 4096):
        topk_mask([torch.ones(size), torch.ones(5)], size // 3, None, True, True)
        topk_mask([torch.ones(size)], 0, None, True, True)
    assert len(recompilations(launches)) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_topk_mask_compiles(dtype, launches, tmp_path):
    scores = [torch.ones(5000, dtype=dtype), torch.ones(3, dtype=dtype)]
    topk_mask(scores, 100, alive_like(scores), True, True)
    if dtype == torch.float32:
        topk_mask(scores, 100, None, False, False)
    compile_all(launches, tmp_path)


def test_number_of_launches_depends_on_dtype_and_list_alone(launches):
    """What a CUDA graph needs."""
    for dtype, digits in ((torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 2)):
        for scores in ([torch.ones(10), torch.ones(9)], [torch.randn(9000), torch.zeros(1)]):
            launches.clear()
            topk_mask([s.to(dtype) for s in scores], 3, None, True, True)
            assert len(launches) == 2 + 1 + 1 + 3 * digits + 1

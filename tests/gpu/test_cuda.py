"""The ops on a real GPU, native and Triton, against the reference in float64 on the CPU."""

import pytest
import torch

import acefast
from acefast import CSR, ops
from acefast.ops import backend, reference
from tests.inputs import assert_close, graphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
GPU_BACKENDS = ["native", "triton"]


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request):
    if request.param == "native" and "cuda" not in backend.loaded():
        pytest.fail(f"the CUDA library did not load: {backend.report()['not_loaded']}")
    with acefast.backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", graphs())
@pytest.mark.parametrize("features", [1, 33, 128, 130])
def test_spmm(gpu_backend, name, dtype, features):
    g = graphs()[name]
    acc = reference.accumulator(dtype)
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(n, features, generator=generator).to(dtype) for n in (g.num_src, g.num_dst))
    weight, mask = (torch.rand(g.num_edges, generator=generator).to(acc) for _ in range(2))
    keep = torch.rand(g.num_edges, generator=generator) > 0.4
    exact = [t.double().requires_grad_() for t in (x, weight, mask)]
    with acefast.backend("torch"):
        y_exact = ops.spmm(g, *exact, keep)
        expected = torch.autograd.grad(y_exact, exact, dy.double())
    runs = []
    for _ in range(2):
        leaves = [t.cuda().requires_grad_() for t in (x, weight, mask)]
        y = ops.spmm(g.to("cuda"), *leaves, keep.cuda())
        runs.append((y, *torch.autograd.grad(y, leaves, dy.cuda())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    for what, a, b in zip(("y", "dx", "dweight", "dmask"), runs[0], (y_exact, *expected), strict=True):
        assert_close(a.cpu(), b, dtype, what)


@pytest.mark.parametrize("name", ["isolated", "hub", "power_law", "sorted"])
def test_native_only_ops(name):
    g = graphs()[name]
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(g.num_edges, generator=generator)
    x = torch.randn(g.num_src, 33, generator=generator)
    weight, wmask = torch.randn(17, 33, generator=generator), torch.rand(17, 33, generator=generator)
    wkeep = torch.rand(17, 33, generator=generator) > 0.5
    csr = CSR.from_dense(x * (torch.rand(x.shape, generator=generator) < 0.2))

    def everything(device, dtype):
        graph, m, h, w, wm = g.to(device), *(t.to(device, dtype).requires_grad_() for t in (mask, x, weight, wmask))
        sparse = csr.with_values(csr.value.to(dtype)).to(device)
        c, c_self = ops.gcn_norm(graph, m)
        dense, bag = ops.masked_linear(h, w, wm, keep=wkeep.to(device)), ops.masked_linear(sparse, w, wm)
        s = ops.sddmm(graph, h, h)
        dropped = ops.relu_dropout(h, 0.5, 7, 3)
        outputs = (c, c_self, dense, bag, s, dropped)
        total = sum((o * o).sum() for o in outputs)
        return *outputs, *torch.autograd.grad(total, (m, h, w, wm))

    with acefast.backend("torch"):
        expected = everything("cpu", torch.float64)
    for a, b in zip(everything("cuda", torch.float32), expected, strict=True):
        assert_close(a.detach().cpu(), b.detach(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "fresh_mask", "equal"])
def test_topk_mask(gpu_backend, dtype, kind):
    generator = torch.Generator().manual_seed(3)
    shapes = [(1433, 97), (0,), (7, 5), (300_001,)]
    random = [torch.rand(shape, generator=generator) for shape in shapes]
    scores = {"random": random, "fresh_mask": [1 + (r - 0.5) * 2e-5 for r in random], "equal": [r * 0 for r in random]}[kind]
    scores = [s.to(dtype) for s in scores]
    alive = [torch.rand(shape, generator=generator) < 0.8 for shape in shapes]
    k = sum(int(a.sum()) for a in alive) // 5
    with acefast.backend("torch"):
        expected = ops.topk_mask(scores, k, alive, largest=False)
    found = ops.topk_mask([s.cuda() for s in scores], k, [a.cuda() for a in alive], largest=False)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_no_op_waits_for_the_device(gpu_backend):
    g = graphs()["hub"].to("cuda")
    x, mask = torch.randn(40, 64, device="cuda", requires_grad=True), torch.rand(g.num_edges, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = ops.spmm(g, x, mask=mask)
        torch.autograd.grad(y, (x, mask), torch.ones_like(y))
        ops.topk_mask([mask], 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""The public ops on a real GPU, native and Triton, against the reference in float64 on the CPU; and what only a GPU shows:
graph capture, streams, the bits from run to run, no waiting for the device."""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch

import acefast
from acefast import CSR, Graph, ops
from acefast.ops import backend, reference
from bench.graphs import power_law
from tests.inputs import TOLERANCE, assert_close, graphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
GRAPHS = graphs()
HALVES = [torch.float16, torch.bfloat16]


@dataclasses.dataclass(frozen=True)
class Op:
    """One way to call an op: `call(graph, keep, *inputs)`; an input is "src" or "dst" (features [N, F]), "heads" ([N_src, 3,
    F]), "edge" ([E], a mask), "edges" ([E, 3]), "terms" and "row_terms" ([N_src, 3], [N_dst, 3]), "raw" (constant edge
    features [E, 5]), or "encoder", "bias" and "column" ([F, 5], [F], [F])."""

    schemas: tuple[str, ...]
    call: Callable
    inputs: tuple[str, ...]
    square: bool = False
    triton: bool = True  # where Triton serves the schemas it serves this way of calling them


OPS = {
    "spmm": Op(("spmm", "spmm_bwd"), lambda g, k, x, m, w: ops.spmm(g, x, weight=w, mask=m, keep=k), ("src", "edge", "edge")),
    "spmm_mean_heads": Op(
        ("spmm", "spmm_bwd"), lambda g, k, x, m: ops.spmm(g, x, mask=m, keep=k, reduce="mean"), ("heads", "edges")
    ),
    "spmm_max": Op(
        ("spmm_max", "spmm_max_bwd"), lambda g, k, x, m: ops.spmm(g, x, mask=m, keep=k, reduce="max"), ("src", "edge")
    ),
    "gat_message": Op(
        ("gat", "gat_bwd"),
        lambda g, k, z, a, b, m: ops.gat(g, z, a, b, mask=m, keep=k, dropout=0.3, seed=5),
        ("heads", "terms", "row_terms", "edges"),
    ),
    "gat_logit": Op(
        ("gat", "gat_bwd"),
        lambda g, k, z, a, b, m: ops.gat(g, z, a, b, mask=m, keep=k, mask_on="logit"),
        ("heads", "terms", "row_terms", "edge"),
    ),
    "gen_softmax": Op(
        ("gen", "gen_bwd"), lambda g, k, x, m, t: ops.gen(g, x, mask=m, keep=k, t=t), ("src", "edge", "column")
    ),
    "gen_in_denominator": Op(
        ("gen", "gen_bwd"),
        lambda g, k, x, m, t: ops.gen(g, x, mask=m, keep=k, t=t, pruned="in_denominator", mask_grad="all"),
        ("src", "edge", "column"),
    ),
    "gen_encoder": Op(
        ("gen", "gen_bwd"),
        lambda g, k, x, f, w, b, m, t: ops.gen(g, x, f, w, b, mask=m, keep=k, t=t),
        ("src", "raw", "encoder", "bias", "edge", "column"),
        triton=False,
    ),
    "gen_power": Op(
        ("gen", "gen_bwd"),
        lambda g, k, x, m, p: ops.gen(g, x, mask=m, keep=k, aggr="power", p=p),
        ("src", "edge", "column"),
        triton=False,
    ),
    "gen_max": Op(
        ("gen", "gen_bwd"), lambda g, k, x, m: ops.gen(g, x, mask=m, keep=k, aggr="max"), ("src", "edge"), triton=False
    ),
    "edge_softmax": Op(("edge_softmax", "edge_softmax_bwd"), lambda g, k, s: ops.edge_softmax(g, s, keep=k), ("edges",)),
    "sddmm": Op(("sddmm", "spmm"), lambda g, k, p, q: ops.sddmm(g, p, q), ("dst", "src"), triton=False),
    "gcn_norm": Op(("gcn_norm", "gcn_norm_bwd"), lambda g, k, m: ops.gcn_norm(g, m, k)[0], ("edge",), square=True),
}


def backends_of(op: Op) -> list[str]:
    """native, and triton where it has the op; a backend that should serve and does not fails the test."""
    return ["native"] + ["triton"] * (op.triton and set(op.schemas) <= set(backend._TRITON_OPS))


ON_BACKENDS = [(name, where) for name, op in OPS.items() for where in backends_of(op)]
ON_GRAPHS = [
    pytest.param(name, where, graph, dtype, id=f"{name}-{where}-{graph}-{str(dtype)[6:]}")
    for name, where in ON_BACKENDS
    for graph, g in GRAPHS.items()
    for dtype in (DTYPES if graph in ("hub", "bipartite") else [torch.float32])
    if g.num_src == g.num_dst or not OPS[name].square
]
MAIN = [pair for pair in ON_BACKENDS if pair[0] in ("spmm", "gat_message", "gat_logit", "gen_softmax", "gen_encoder")]


def inputs_of(op: Op, graph: Graph, features: int, dtype: torch.dtype, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    acc = reference.accumulator(dtype)
    shapes = {
        "src": ((graph.num_src, features), dtype), "dst": ((graph.num_dst, features), dtype),
        "heads": ((graph.num_src, 3, features), dtype), "edge": ((graph.num_edges,), acc), "edges": ((graph.num_edges, 3), acc),
        "terms": ((graph.num_src, 3), acc), "row_terms": ((graph.num_dst, 3), acc), "raw": ((graph.num_edges, 5), dtype),
        "encoder": ((features, 5), acc), "bias": ((features,), acc), "column": ((features,), acc),
    }  # fmt: skip
    values = []
    for kind in op.inputs:
        shape, kind_dtype = shapes[kind]
        positive = kind in ("edge", "column")  # masks are, degrees and exponents must be
        draw = torch.rand(shape, generator=generator) + 0.1 if positive else torch.randn(shape, generator=generator)
        values.append(draw.to(kind_dtype))
    return values


def run(op: Op, graph, keep, values, dy=None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """([y, gradients...], dy): one forward and backward."""
    leaves = [v.detach().requires_grad_(kind != "raw") for v, kind in zip(values, op.inputs, strict=True)]
    y = op.call(graph, keep, *leaves)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y))], dy


def assert_results_close(found, exact, narrow, dtype) -> None:
    """By norm, y and each gradient: the dtype's tolerance of it, or of 1 % of the largest one, and twice what the reference
    itself loses in that dtype, since gradients cancel."""
    largest = max(b.norm().item() for b in exact)
    for place, (a, b, c) in enumerate(zip(found, exact, narrow, strict=True)):
        what = "y" if place == 0 else f"gradient {place - 1}"
        assert a.shape == b.shape and a.dtype == c.dtype, f"{what}: {list(a.shape)} {a.dtype}"
        difference, lost = (a.cpu().double() - b).norm().item(), (c.double() - b).norm().item()
        allowed = TOLERANCE[dtype] * (max(b.norm().item(), 1e-2 * largest) + 1e-2 * b.numel() ** 0.5) + 2 * lost
        assert difference <= allowed, f"{what}: off by {difference:.3e} in norm, allowed {allowed:.3e}"


def on_gpu(graph, keep, values):
    return graph.to("cuda"), keep.cuda(), [v.cuda() for v in values]


def case(name: str, graph: Graph, features: int, dtype=torch.float32):
    op = OPS[name]
    keep = torch.rand(graph.num_edges, generator=torch.Generator().manual_seed(2)) > 0.4
    return op, graph, keep, inputs_of(op, graph, features, dtype)


def twin(nodes=3000, edges=60_000) -> Graph:
    """Large enough for many blocks and for rows that are cut."""
    return power_law(nodes, edges, 0.6, "cpu")


@pytest.mark.parametrize("selection", [False, True], ids=["flags", "selection"])
@pytest.mark.parametrize("name, where, graph, dtype", ON_GRAPHS)
def test_agrees_with_the_reference(name, where, graph, dtype, selection):
    for features in (1, 33, 128) if dtype == torch.float32 else (40,):
        op, g, keep, values = case(name, GRAPHS[graph], features, dtype)
        with acefast.backend("torch"):
            exact, dy = run(op, g, keep, [v.double() for v in values])
            narrow, _ = run(op, g, keep, values, dy)
        g, keep, values = on_gpu(g, keep, values)
        kept = g.select(keep) if selection else keep
        with acefast.backend(where):
            found, again = (run(op, g, kept, values, dy.cuda())[0] for _ in range(2))
        assert all(map(torch.equal, found, again)), "the bits differ from run to run"
        assert_results_close(found, exact, narrow, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, where in ON_BACKENDS if where == "triton"])
def test_native_and_triton_agree_on_a_large_graph(name, dtype):
    op, graph, keep, values = case(name, twin(), 128, dtype)
    graph, keep, values = on_gpu(graph, keep, values)
    with acefast.backend("torch"):
        narrow, dy = run(op, graph, keep, values)
    with acefast.backend("native"):
        native, _ = run(op, graph, keep, values, dy)
    with acefast.backend("triton"):
        triton, _ = run(op, graph, keep, values, dy)
    assert_results_close(triton, [t.cpu().double() for t in native], [t.cpu() for t in narrow], dtype)


@pytest.mark.parametrize("name, where", ON_BACKENDS, ids="-".join)
def test_bits_repeat_on_a_large_graph(name, where):
    op, graph, keep, values = case(name, twin(), 96)
    graph, keep, values = on_gpu(graph, keep, values)
    with acefast.backend(where):
        first, *others = (run(op, graph, keep, values)[0] for _ in range(4))
    assert all(all(map(torch.equal, first, other)) for other in others)


@pytest.mark.parametrize("name, where", MAIN, ids="-".join)
def test_forward_and_backward_are_captured_into_a_graph(name, where):
    op, graph, keep, values = case(name, GRAPHS["hub"], 64)
    graph, keep, values = on_gpu(graph, keep, values)
    dy = torch.randn_like(op.call(graph, keep, *values))
    selection = graph.select(keep)
    with acefast.backend(where):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(op, graph, selection, values, dy)
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            results, _ = run(op, graph, selection, values, dy)
        for value in values:
            value.copy_(torch.rand_like(value) + 0.1)
        captured.replay()
        torch.cuda.synchronize()
        expected, _ = run(op, graph, selection, values, dy)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("name, where", MAIN, ids="-".join)
def test_a_stream_of_its_own(name, where):
    """The inputs become ready on that stream only after work that takes a while: a launch elsewhere would read zeros."""
    op, graph, keep, values = case(name, GRAPHS["power_law"], 64)
    graph, keep, values = on_gpu(graph, keep, values)
    with acefast.backend(where):
        expected, dy = run(op, graph, keep, values)
        late = [torch.zeros_like(v) for v in values]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            for target, source in zip(late, values, strict=True):
                target.copy_(source)
            found, _ = run(op, graph, keep, late, dy)
        side.synchronize()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("autocast", HALVES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name, where", MAIN, ids="-".join)
def test_autocast_narrows_nothing_inside_an_op(name, where, dtype, autocast):
    op, graph, keep, values = case(name, GRAPHS["hub"], 64, dtype)
    graph, keep, values = on_gpu(graph, keep, values)
    with acefast.backend(where):
        expected, dy = run(op, graph, keep, values)
        with torch.autocast("cuda", dtype=autocast):
            found, _ = run(op, graph, keep, values, dy)
    assert found[0].dtype == dtype and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name, where", ON_BACKENDS, ids="-".join)
def test_no_op_waits_for_the_device(name, where):
    op, graph, keep, values = case(name, GRAPHS["hub"], 64)
    graph, keep, values = on_gpu(graph, keep, values)
    with acefast.backend(where):
        _, dy = run(op, graph, keep, values)  # compiles
    kept = int(keep.sum())
    torch.cuda.set_sync_debug_mode("error")
    try:
        selection = graph.select(keep, num_kept=kept)
        graph.compact(keep, num_kept=kept)
        with acefast.backend(where):
            run(op, graph, keep, values, dy)
            run(op, graph, selection, values, dy)
            ops.topk_mask([values[-1]], 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_bias_under_many_rows(dtype):
    """Which is summed in two steps there."""
    generator, acc = torch.Generator().manual_seed(3), reference.accumulator(dtype)
    x, weight, dy = (torch.randn(*shape, generator=generator).to("cuda", dtype) for shape in ((6_001, 5), (7, 5), (6_001, 7)))
    bias = torch.zeros(7, dtype=acc, device="cuda", requires_grad=True)
    (found,) = torch.autograd.grad(ops.masked_linear(x, weight, bias=bias), bias, dy)
    assert_close(found.cpu(), dy.double().sum(0).cpu(), acc, norm=float(dy.double().norm()))


@pytest.mark.parametrize("name", ["isolated", "hub", "power_law", "sorted"])
def test_dense_ops(name):
    graph = GRAPHS[name]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(graph.num_src, 33, generator=generator)
    weight, wmask = torch.randn(17, 33, generator=generator), torch.rand(17, 33, generator=generator)
    wkeep = torch.rand(17, 33, generator=generator) > 0.5
    rows = torch.randperm(10 * graph.num_src, generator=generator)[: graph.num_src]
    csr = CSR.from_dense(x * (torch.rand(x.shape, generator=generator) < 0.2))

    def everything(device, dtype):
        h, w, wm = (t.to(device, dtype).requires_grad_() for t in (x, weight, wmask))
        sparse = csr.with_values(csr.value.to(dtype)).to(device)
        dense, bag = ops.masked_linear(h, w, wm, keep=wkeep.to(device)), ops.masked_linear(sparse, w, wm)
        dropouts = [op(h, 0.5, 7, 3, rows=r) for op in (ops.relu_dropout, ops.elu_dropout) for r in (None, rows.to(device))]
        outputs = (dense, bag, *dropouts)
        total = sum((o * o).sum() for o in outputs)
        return *outputs, *torch.autograd.grad(total, (h, w, wm))

    with acefast.backend("torch"):
        expected = everything("cpu", torch.float64)
    for a, b in zip(everything("cuda", torch.float32), expected, strict=True):
        assert_close(a.detach().cpu(), b.detach(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "fresh_mask", "equal"])
@pytest.mark.parametrize("where", ["native", "triton"])
def test_topk_mask(where, dtype, kind):
    generator = torch.Generator().manual_seed(3)
    shapes = [(1433, 97), (0,), (7, 5), (300_001,)]
    random = [torch.rand(shape, generator=generator) for shape in shapes]
    scores = {"random": random, "fresh_mask": [1 + (r - 0.5) * 2e-5 for r in random], "equal": [r * 0 for r in random]}[kind]
    scores = [s.to(dtype) for s in scores]
    alive = [torch.rand(shape, generator=generator) < 0.8 for shape in shapes]
    k = sum(int(a.sum()) for a in alive) // 5
    with acefast.backend("torch"):
        expected = ops.topk_mask(scores, k, alive, largest=False)
    with acefast.backend(where):
        found = ops.topk_mask([s.cuda() for s in scores], k, [a.cuda() for a in alive], largest=False)
        written = [torch.ones_like(a) for a in found]
        ops.topk_mask([s.cuda() for s in scores], k, [a.cuda() for a in alive], largest=False, out=written)
    for masks in (found, written):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(masks, expected, strict=True))


class Pruned:
    """Masked parameters of a few shapes, and one round of everything that picks among them and trains them."""

    def __init__(self, device):
        generator = torch.Generator().manual_seed(4)
        shapes = [(700, 41), (0,), (5001,)]

        def random(count):
            return [[torch.rand(shape, generator=generator).to(device) for shape in shapes] for _ in range(count)]

        (self.grad, self.scores), self.state = random(2), random(7)
        self.keep = [part < 0.7 for part in random(1)[0]]
        self.out = [torch.zeros_like(part) for part in self.keep]
        self.step = torch.zeros(1, dtype=torch.int64, device=device)

    def round(self) -> list[torch.Tensor]:
        theta, mask, theta_mean, theta_square, mask_mean, mask_square, weight = self.state
        ops.topk_mask(self.scores, 999, self.keep, out=self.out)
        drawn = ops.gumbel_topk(self.scores, 999, 0.5, seed=3, alive=self.keep)
        exchanged = ops.exchange(self.keep, self.scores, self.grad, 77, 0.5, seed=3)
        moments = (theta_mean, theta_square), (mask_mean, mask_square)
        settings = ops.AdamSettings(lr=0.1, weight_decay=1e-3), ops.AdamSettings(l1=1e-2)
        ops.masked_adam(self.grad, theta, mask, *moments, self.step, *settings, keep=self.out, weight=weight)
        return [*drawn, *itertools.chain(*exchanged)]

    def written(self) -> list[torch.Tensor]:
        return [*self.out, *itertools.chain(*self.state), self.step]


def test_picking_and_training_are_captured_into_a_graph_and_wait_for_nothing():
    with acefast.backend("torch"):
        expected = Pruned("cpu")
        for _ in range(3):
            picks = expected.round()
    pruned = Pruned("cuda")
    with acefast.backend("native"):
        Pruned("cuda").round()  # loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager = pruned.round()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = pruned.round()
        captured.replay()
        captured.replay()
        torch.cuda.synchronize()
    for masks in (eager, found):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(masks, picks, strict=True))
    for a, b in zip(pruned.written(), expected.written(), strict=True):
        assert_close(a.cpu(), b, torch.float32)

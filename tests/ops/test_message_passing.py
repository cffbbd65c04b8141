"""spmm, sddmm and gcn_norm: values, gradients of both orders, determinism, contracts, bad input."""

import itertools

import pytest
import scipy.sparse
import torch

import acefast
from acefast import Graph, InputError, ops
from tests.inputs import assert_close, edge_sets

SQUARE = ["no_nodes", "no_edges", "one_edge", "isolated", "self_loops", "multi_edges", "hub", "power_law", "sorted"]
GRAPHS = [*SQUARE, "bipartite"]


def dense_matrix(g, coefficient):
    """[N_dst, N_src] by scipy, which adds up multi-edges: independent of the package's own gathers."""
    src, dst = g.edge_index().numpy()
    values = coefficient.double().numpy()
    return torch.from_numpy(scipy.sparse.coo_matrix((values, (dst, src)), shape=(g.num_dst, g.num_src)).toarray())


def edge_values(g, seed=1, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(g.num_edges, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=3)))
def test_spmm_equals_dense_product(each_backend, zoo, name, options):
    g = zoo[name]
    with_weight, with_mask, with_keep = options
    weight = edge_values(g, 1, torch.float32) if with_weight else None
    mask = edge_values(g, 2, torch.float32) - 0.2 if with_mask else None
    keep = edge_values(g, 3) > 0.4 if with_keep else None
    coefficient = torch.ones(g.num_edges, dtype=torch.float64)
    for factor in (weight, mask, keep):
        coefficient = coefficient if factor is None else coefficient * factor.double()
    matrix = dense_matrix(g, coefficient)
    for features in (1, 3, 33, 128, 130):
        x = torch.randn(g.num_src, features)
        assert_close(ops.spmm(g, x, weight, mask, keep), matrix @ x.double(), torch.float32, f"{name} F={features}")


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("pruned", ["absent", "in_denominator"])
def test_spmm_mean(each_backend, zoo, name, pruned):
    g = zoo[name]
    keep, mask = edge_values(g, 3) > 0.4, edge_values(g, 2)
    existing = keep.double() if pruned == "absent" else torch.ones(g.num_edges)
    count = dense_matrix(g, existing).sum(1, keepdim=True).clamp(min=1)
    x = torch.randn(g.num_src, 5, dtype=torch.float64)
    expected = dense_matrix(g, mask * keep) @ x / count
    assert_close(ops.spmm(g, x, mask=mask, keep=keep, reduce="mean", pruned=pruned), expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["hub", "power_law", "sorted", "bipartite"])
def test_dtypes_against_float64(each_backend, zoo, name, dtype):
    g = zoo[name]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(g.num_src, 48).to(dtype)
    mask, dy = edge_values(g, 5, acc), torch.randn(g.num_dst, 48).to(dtype)
    found = [t.requires_grad_() for t in (x.clone(), mask.clone())]
    exact = [t.double().requires_grad_() for t in (x, mask)]
    y = ops.spmm(g, found[0], mask=found[1])
    with acefast.backend("torch"):
        y_exact = ops.spmm(g, exact[0], mask=exact[1])
    assert y.dtype == dtype
    assert_close(y, y_exact, dtype, "y")
    for what, a, b in zip(
        ("dx", "dmask"), torch.autograd.grad(y, found, dy), torch.autograd.grad(y_exact, exact, dy.double()), strict=True
    ):
        assert_close(a, b, dtype, what)
    p, q = torch.randn(g.num_dst, 3, 5).to(dtype), torch.randn(g.num_src, 3, 5).to(dtype)
    src, dst = g.edge_index()
    assert_close(ops.sddmm(g, p, q), (p.double()[dst] * q.double()[src]).sum(-1), acc, "sddmm")


TINY = {
    "no_edges": (torch.zeros(2, 0, dtype=torch.long), 3),
    "multi_edges_and_loops": (torch.tensor([[0, 0, 2, 1, 3, 3, 1, 0], [1, 1, 2, 0, 1, 3, 1, 2]]), 5),
    "bipartite": (torch.tensor([[0, 1, 1, 0, 2, 2, 1], [4, 0, 1, 1, 3, 4, 4]]), (3, 6)),
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_gradients_of_both_orders(each_backend, name, reduce):
    g = Graph.from_edge_index(*TINY[name])
    x = torch.randn(g.num_src, 3, dtype=torch.float64, requires_grad=True)
    weight, mask, keep = edge_values(g, 1, grad=True), edge_values(g, 2, grad=True), edge_values(g, 3) > 0.3
    inputs = [x, weight, mask]
    if g.num_src == g.num_dst:
        inputs.append(torch.randn(g.num_src, dtype=torch.float64, requires_grad=True))

    def function(x, weight, mask, self_weight=None):
        return ops.spmm(g, x, weight, mask, keep, self_weight, reduce=reduce)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    p = torch.randn(g.num_dst, 2, 3, dtype=torch.float64, requires_grad=True)
    q = torch.randn(g.num_src, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, q: ops.sddmm(g, p, q), (p, q))
    assert torch.autograd.gradgradcheck(lambda p, q: ops.sddmm(g, p, q), (p, q))


@pytest.mark.parametrize("name", ["hub", "power_law", "sorted"])
def test_mask_gradient_of_removed_edges(each_backend, zoo, name):
    g = zoo[name]
    x, weight = torch.randn(g.num_src, 6, dtype=torch.float64), edge_values(g, 1, grad=True)
    keep, dy = edge_values(g, 3) > 0.5, torch.randn(g.num_dst, 6, dtype=torch.float64)
    src, dst = g.edge_index()
    full = weight.detach() * (dy[dst] * x[src]).sum(1)
    for mask_grad, expected in (("kept", full * keep), ("all", full)):
        mask = edge_values(g, 2, grad=True)
        y = ops.spmm(g, x, weight, mask, keep, mask_grad=mask_grad)
        dmask, dweight = torch.autograd.grad(y, (mask, weight), dy)
        assert_close(dmask, expected, torch.float64, mask_grad)
        assert bool((dweight[~keep] == 0).all())


def test_removed_edges_are_not_read_into_the_result(each_backend, zoo):
    """keep=False means the edge does not exist: not even its NaN counts."""
    g = zoo["power_law"]
    keep = edge_values(g, 3) > 0.5
    mask = edge_values(g, 2, torch.float32)
    poisoned = torch.where(keep, mask, torch.nan)
    x = torch.randn(g.num_src, 9)
    assert torch.equal(ops.spmm(g, x, mask=poisoned, keep=keep), ops.spmm(g, x, mask=mask, keep=keep))


@pytest.mark.parametrize("name", ["hub", "power_law", "isolated"])
def test_thread_count_and_repetition_do_not_change_bits(zoo, name):
    if "cpu" not in acefast.ops.backend.loaded():
        pytest.skip("the native CPU library was not built here")
    g = zoo[name]
    x, mask = torch.randn(g.num_src, 130), edge_values(g, 2, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            leaves = x.clone().requires_grad_(), mask.clone().requires_grad_()
            y = ops.spmm(g, leaves[0], mask=leaves[1])
            c, c_self = ops.gcn_norm(g, leaves[1])
            total = y.square().sum() + (c.sum() + c_self.sum())
            results.append((y, c, c_self, *torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)))
            assert torch.isfinite(total)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", SQUARE)
@pytest.mark.parametrize("degrees", ["masked", "static"])
@pytest.mark.parametrize("loops", ["none", "ones", "given"])
def test_gcn_norm_formula_and_gradient(each_backend, zoo, name, degrees, loops):
    g = zoo[name]
    weights = {"none": 0.0, "ones": 1.0, "given": torch.rand(g.num_dst, dtype=torch.float64) + 0.5}[loops]
    add_self_loops = {"none": False, "ones": True, "given": weights}[loops]
    mask, keep = edge_values(g, 2) - 0.3, edge_values(g, 3) > 0.4
    amount = mask * keep if degrees == "masked" else torch.ones(g.num_edges, dtype=torch.float64)
    degree = dense_matrix(g, amount).sum(1) + weights
    dinv = torch.where(degree > 0, degree.clamp(min=1e-300) ** -0.5, 0.0)
    src, dst = g.edge_index()
    c, c_self = ops.gcn_norm(g, mask, keep, add_self_loops, degrees)
    assert_close(c, dinv[dst] * dinv[src], torch.float64)
    if loops == "none":
        assert c_self is None
    else:
        assert_close(c_self, dinv**2 * weights, torch.float64)
    if g.num_edges > 1000 or loops == "none":
        return  # numerical differentiation is for the small graphs, away from degrees at 0
    positive = (mask + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m: tuple(t for t in ops.gcn_norm(g, m, keep, add_self_loops, degrees)), (positive,)
    )


def test_gcn_norm_agrees_with_pyg(each_backend, zoo):
    from torch_geometric.nn.conv.gcn_conv import gcn_norm as pyg_gcn_norm

    g = zoo["power_law"]
    no_loops = g.edge_index()[:, g.edge_index()[0] != g.edge_index()[1]]
    g = Graph.from_edge_index(no_loops, g.num_nodes)
    mask = edge_values(g, 2, torch.float32)
    _, expected = pyg_gcn_norm(no_loops, mask, g.num_nodes)
    c, c_self = ops.gcn_norm(g, mask)
    assert_close(torch.cat((c * mask, c_self)), expected, torch.float32)


def test_opcheck(each_backend, zoo):
    g = zoo["multi_edges"]
    x, dy = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    weight, mask = edge_values(g, 1, torch.float32, True), edge_values(g, 2, torch.float32, True)
    keep, own, scale = edge_values(g, 3) > 0.5, torch.rand(6, requires_grad=True), torch.rand(6)
    for optional in ((weight, mask, keep, own, scale), (None, mask, None, None, None)):
        torch.library.opcheck(torch.ops.acefast.spmm, (*g.arrays, x, *optional, False))
        torch.library.opcheck(torch.ops.acefast.spmm_bwd, (*g.arrays, dy, x, *optional, True, True, False))
    torch.library.opcheck(torch.ops.acefast.sddmm, (*g.arrays, x, dy))
    torch.library.opcheck(torch.ops.acefast.gcn_norm, (*g.arrays, mask, keep, torch.rand(6), True))
    torch.library.opcheck(torch.ops.acefast.gcn_norm, (*g.arrays, None, None, None, False))
    dinv, dc = torch.rand(6), torch.rand(g.num_edges)
    torch.library.opcheck(torch.ops.acefast.gcn_norm_bwd, (*g.arrays, dinv, dc, None, None, keep))
    torch.library.opcheck(torch.ops.acefast.gcn_norm_bwd, (*g.arrays, dinv, dc, torch.rand(6), torch.rand(6), keep))


def test_compiles_with_fullgraph(each_backend, zoo):
    g = zoo["power_law"]
    mask = edge_values(g, 2, torch.float32, True)
    x = torch.randn(g.num_src, 8, requires_grad=True)

    def layer(x, mask):
        c, c_self = ops.gcn_norm(g, mask)
        return ops.spmm(g, x, weight=c, mask=mask, self_weight=c_self).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, found = (torch.autograd.grad(f(x, mask), (x, mask)) for f in (layer, compiled))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, torch.float32)


def test_fresh_random_graphs(each_backend):
    seed = int(torch.randint(0, 2**31, ()).item())
    for name, (edges, sizes) in edge_sets(seed).items():
        g = Graph.from_edge_index(edges, sizes)
        x = torch.randn(g.num_src, 7, dtype=torch.float64)
        expected = dense_matrix(g, torch.ones(g.num_edges)) @ x
        assert_close(ops.spmm(g, x), expected, torch.float64, f"{name}, seed {seed}")


X = torch.randn(6, 4)
E = 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(x=torch.randn(5, 4)), "x must have shape [6, *] or [6, *, *], got [5, 4]"),
        (dict(x=torch.randn(6)), "x must have shape [6, *] or [6, *, *]"),
        (dict(x=torch.ones(6, 4, dtype=torch.int64)), "x must be float32"),
        (dict(x="x"), "x must be a tensor, got str"),
        (dict(mask=torch.ones(E - 1)), "mask must have shape [80], got [79]"),
        (dict(mask=torch.ones(E, dtype=torch.float64)), "mask must be torch.float32"),
        (dict(mask=torch.ones(E, dtype=torch.float16)), "mask must be torch.float32"),
        (dict(weight=torch.ones(E, 1)), "weight must have shape [80]"),
        (dict(keep=torch.ones(E)), "keep must be torch.bool"),
        (dict(keep=torch.ones(E, dtype=torch.bool, device="meta")), "keep must be on cpu"),
        (dict(self_weight=torch.ones(5)), "self_weight must have shape [6]"),
        (dict(reduce="median"), "reduce must be one of"),
        (dict(mask_grad=True), "mask_grad must be one of"),
        (dict(pruned="zeroed"), "pruned must be one of"),
        (dict(g="graph"), "first argument must be an acefast.Graph"),
    ],
)
def test_spmm_refuses(zoo, arguments, words):
    with pytest.raises(InputError) as caught:
        ops.spmm(**{"g": zoo["multi_edges"], "x": X, **arguments})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_other_refusals(zoo):
    g, bipartite = zoo["multi_edges"], zoo["bipartite"]
    with pytest.raises(InputError, match="square graph"):
        ops.gcn_norm(bipartite)
    with pytest.raises(InputError, match="square graph"):
        ops.spmm(bipartite, torch.randn(23, 2), self_weight=torch.ones(57))
    with pytest.raises(InputError, match="degrees must be one of"):
        ops.gcn_norm(g, degrees="none")
    with pytest.raises(InputError, match="agree but in their rows"):
        ops.sddmm(g, torch.randn(6, 2), torch.randn(6, 3))
    with pytest.raises(InputError, match="backend must be one of"):
        acefast.set_backend("cuda")
    with acefast.backend("triton"), pytest.raises(RuntimeError, match="does not serve sddmm on cpu"):
        ops.sddmm(g, X, X)

import pytest
import torch

from acefast import CSR, Graph, nn
from acefast.errors import InputError
from acefast.nn import GCN, GCNConv, MaskedLinear


def small(seed=0, nodes=12, edges=40, features=9):
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, nodes, (2, edges), generator=g)
    x = torch.rand(nodes, features, generator=g) * (torch.rand(nodes, features, generator=g) < 0.4)
    return Graph.from_edge_index(index, num_nodes=nodes), index, x


def dense_gcn(index, nodes, x, weights, mask, keep, self_loops=True, degrees="masked", biases=None):
    """The same network on a dense adjacency matrix."""
    m = mask * keep
    a = torch.zeros(nodes, nodes).index_put((index[1], index[0]), m, accumulate=True)
    counted = m if degrees == "masked" else torch.ones_like(m)
    d = torch.zeros(nodes).index_put((index[1],), counted, accumulate=True)
    if self_loops:  # one for each node that has none
        missing = torch.ones(nodes)
        missing[index[1][(index[0] == index[1]) & keep]] = 0
        a, d = a + torch.diag(missing), d + missing
    if degrees != "none":
        s = torch.where(d > 0, d.clamp(min=1e-30) ** -0.5, torch.zeros_like(d))
        a = s[:, None] * a * s[None, :]
    h = x
    for i, w in enumerate(weights):
        h = a @ (h @ w.T) + (0 if biases is None else biases[i])
        if i < len(weights) - 1:
            h = h.relu()
    return h


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(
    ("self_loops", "degrees", "bias"), [(True, "masked", False), (True, "static", True), (False, "none", True)]
)
def test_gcn_and_its_gradients_equal_the_dense_formula(csr, layers, self_loops, degrees, bias):
    graph, index, x = small()
    model = GCN(9, 16, 4, layers=layers, bias=bias, self_loops=self_loops, degrees=degrees, seed=3).eval()
    g = torch.Generator().manual_seed(9)
    mask = (1 + 0.1 * torch.rand(40, generator=g)).requires_grad_()
    keep = torch.rand(40, generator=g) < 0.8
    names = list(model.maskable())
    masks = {n: (torch.rand(model.get_parameter(n).shape, generator=g) + 0.5).requires_grad_() for n in names}
    keeps = {n: torch.rand(model.get_parameter(n).shape, generator=g) < 0.7 for n in names}
    y = model(graph, CSR.from_dense(x) if csr else x, mask, keep, masks, keeps)
    leaves = [mask, *masks.values(), *model.parameters()]
    c = torch.randn(y.shape, generator=g)
    got = torch.autograd.grad((y * c).sum(), leaves)

    weights = [model.get_parameter(n) * masks[n] * keeps[n] for n in names]
    biases = [layer.bias for layer in model.layers] if bias else None
    expected = dense_gcn(index, 12, x, weights, mask, keep, self_loops, degrees, biases)
    assert torch.allclose(y, expected, atol=1e-5)
    for a, b in zip(got, torch.autograd.grad((expected * c).sum(), leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_removed_elements_do_not_exist():
    graph, index, x = small()
    model = GCN(9, 8, 3, seed=1).eval()
    keep = torch.arange(40) % 2 == 0
    part = Graph.from_edge_index(index[:, keep], num_nodes=12)
    assert torch.allclose(model(graph, x, edge_keep=keep), model(part, x), atol=1e-6)


def test_initial_weights_come_from_the_seed_alone():
    a, b, c = GCN(9, 8, 3, seed=1), GCN(9, 8, 3, seed=1), GCN(9, 8, 3, seed=2)
    torch.manual_seed(0)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.layers[0].lin.weight, c.layers[0].lin.weight)
    deeper = GCN(9, 8, 3, layers=3, seed=1)
    assert torch.equal(deeper.layers[0].lin.weight, a.layers[0].lin.weight)
    assert float(a.layers[0].lin.weight.detach().abs().max()) <= 1 / 3


def test_dropout_is_a_function_of_seed_and_step_and_off_in_evaluation():
    graph, _, x = small()
    model = GCN(9, 32, 3, seed=1)
    model.train()
    one, same, other = model(graph, x, seed=5, step=1), model(graph, x, seed=5, step=1), model(graph, x, seed=5, step=2)
    assert torch.equal(one, same) and not torch.equal(one, other)
    model.eval()
    assert torch.equal(model(graph, x, seed=5, step=1), model(graph, x, seed=6, step=2))


def test_maskable_names_are_parameter_names():
    model = nn.build("gcn", 9, 3, hidden=8, layers=3, bias=True)
    assert set(model.maskable()) <= set(dict(model.named_parameters()))
    assert len(model.maskable()) == 3
    with pytest.raises(InputError, match="backbone must be one of gcn"):
        nn.build("transformer", 9, 3)
    with pytest.raises(InputError, match="degrees must be one of"):
        GCNConv(3, 3, degrees="half")


def test_masked_linear_keeps_a_fixed_pattern():
    layer = MaskedLinear(5, 4)
    x = torch.randn(3, 5)
    full = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.allclose(layer(x), full, atol=1e-6)
    keep = torch.rand(4, 5) < 0.5
    layer.set_keep(keep)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight * keep, layer.bias), atol=1e-6)
    assert torch.allclose(layer(x, keep=torch.ones_like(keep)), full, atol=1e-6)
    with pytest.raises(InputError, match="keep must be bool"):
        layer.set_keep(torch.ones(4, 5))
    with pytest.raises(InputError, match="keep must be bool"):
        layer.set_keep(keep.T)

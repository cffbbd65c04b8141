"""GIN and GAT as the searches use them, against their formulas; the meanings of a pruned edge."""

import pytest
import torch
import torch.nn.functional as F

from acefast import CSR, Graph, InputError, nn, ops
from acefast.nn import GAT, GIN, dropout


@pytest.fixture
def example():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 12, (2, 40), generator=generator)
    x = torch.rand(12, 9, generator=generator) * (torch.rand(12, 9, generator=generator) < 0.4)
    mask = 0.5 + torch.rand(40, generator=generator)
    keep = torch.rand(40, generator=generator) < 0.7
    return Graph.from_edge_index(index, num_nodes=12), index, x, mask, keep


def dense_matrix(index, value, nodes=12):
    return torch.zeros(nodes, nodes).index_put((index[1], index[0]), value, accumulate=True)


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("pruned", ["absent", "in_denominator"])
def test_gin_is_its_formula(example, csr, pruned):
    graph, index, x, mask, keep = example
    model = GIN(9, 16, 4, pruned=pruned, seed=1).eval()
    counted = keep if pruned == "absent" else torch.ones_like(keep)
    count = dense_matrix(index, counted.float()).sum(1, keepdim=True).clamp(min=1)
    a = dense_matrix(index, mask * keep) / count + torch.eye(12)
    first, second = (layer.lin.weight for layer in model.layers)
    h = (a @ x @ first.T).relu()
    expected = (model.heads[0](h) + (a @ h @ second.T).relu()) / 2
    assert torch.allclose(model(graph, CSR.from_dense(x) if csr else x, mask, keep), expected, atol=1e-5)
    assert set(model.maskable()) == {"layers.0.lin.weight", "layers.1.lin.weight"}


@pytest.mark.parametrize("pruned", ["absent", "in_denominator"])
def test_gat_is_its_formula(example, pruned):
    graph, index, x, mask, keep = example
    model = GAT(9, 3, 4, heads=2, pruned=pruned, seed=1).eval()
    h = x
    for layer, last in zip(model.layers, (False, True), strict=True):
        z = (h @ layer.lin.weight.T).view(12, layer.heads, -1)
        a_src, a_dst = ((z * att).sum(2) for att in (layer.att_src, layer.att_dst))
        logits = F.leaky_relu(a_src[index[0]] + a_dst[index[1]], 0.2)
        if pruned == "absent":
            alpha = ops.edge_softmax(graph, logits.contiguous(), keep) * mask.unsqueeze(1)
        else:  # a removed edge has logit 0 and passes its message
            alpha = ops.edge_softmax(graph, (logits * (mask * keep).unsqueeze(1)).contiguous())
        out = torch.zeros(12, layer.heads, z.size(2)).index_add(0, index[1], alpha.unsqueeze(2) * z[index[0]])
        h = out.flatten(1) if last else F.elu(out.flatten(1))
    assert torch.allclose(model(graph, x, mask, keep), h, atol=1e-5)
    assert torch.allclose(model(graph, CSR.from_dense(x), mask, graph.select(keep)), h, atol=1e-5)


@pytest.mark.parametrize("backbone", nn.BACKBONES)
def test_noise_is_a_function_of_seed_and_step(example, backbone):
    graph, _, x, mask, keep = example
    model = nn.build(backbone, 9, 4, hidden=16, seed=0).train()
    y = model(graph, x, mask, keep, seed=3, step=5)
    assert torch.equal(y, model(graph, x, mask, keep, seed=3, step=5))
    for seed, step in ((3, 6), (4, 5)):
        assert not torch.equal(y, model(graph, x, mask, keep, seed=seed, step=step))
    model.eval()
    assert torch.equal(model(graph, x, mask, keep, seed=3), model(graph, x, mask, keep, seed=4))
    assert not torch.equal(y, model(graph, x, mask, keep))
    with pytest.raises(InputError, match="backbone must be one of"):
        nn.build("mlp", 9, 4)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("backbone", ["gcn", "gin", "gat"])
def test_macs_count_what_is_multiplied(example, backbone, sparse):
    graph, index, x, _, keep = example
    x = CSR.from_dense(x) if sparse else x
    n, entries = x.shape[0], (x.to_dense() if sparse else torch.ones(x.shape)) != 0
    model = nn.build(backbone, 9, 4, hidden=16, seed=0)
    kept = {name: torch.rand(w.shape, generator=torch.manual_seed(3)) < 0.4 for name, w in model.maskable().items()}
    first, second = (kept[f"layers.{i}.lin.weight"] for i in range(2))
    # One product for each entry of x and kept weight that meet; hidden features are dense.
    products = int((entries.double() @ first.double().t()).sum()) + n * int(second.sum())
    loops = n - index[0, keep & (index[0] == index[1])].unique().numel()
    edges = int(keep.sum())
    width = len(first) if sparse or backbone == "gat" else 9  # dense features are passed on before they get wider
    passed = {
        "gcn": (edges + loops) * (width + 4),
        "gin": (edges + n) * (width + 4) + n * 16 * 4,  # the head
        "gat": (edges + 2 * n) * (width + 4),  # two attention terms for each node
    }[backbone]
    assert model.macs(graph, x, keep, kept) == products + passed
    whole = {name: torch.ones_like(pattern) for name, pattern in kept.items()}
    everything = torch.ones_like(keep)
    assert model.macs(graph, x) == model.macs(graph, x, everything, whole) > model.macs(graph, x, keep, kept)


def test_dropout_drops_the_same_elements_of_dense_rows_and_sparse_matrices():
    x = torch.randn(40, 6)
    y = dropout(x, 0.4, 7, 1)
    kept = y != 0
    assert torch.allclose(y[kept], x[kept] / 0.6) and 0.45 < float(kept.float().mean()) < 0.75
    rows = torch.tensor([5, 0, 33])
    assert torch.equal(dropout(x[rows], 0.4, 7, 1, rows), y[rows])
    matrix = CSR.from_dense(x * (x > 0))
    dropped = dropout(matrix, 0.4, 7, 1)
    assert torch.equal(dropout(matrix.take(rows), 0.4, 7, 1).value, dropped.take(rows).value)
    assert dropout(x, 0.0, 7, 1) is x

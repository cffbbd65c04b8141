"""The layers: equal to PyG's at the same weights, to dense formulas with masks, compiled and exported."""

import pytest
import torch
import torch_geometric.nn as pyg

from acefast import Graph, InputError, nn
from tests.inputs import assert_close

EDGES = torch.randint(0, 30, (2, 160), generator=torch.Generator().manual_seed(0))
EDGES = torch.unique(EDGES, dim=1)[:, torch.randperm(torch.unique(EDGES, dim=1).size(1), generator=torch.Generator().manual_seed(1))]
NODES = 33  # the last three are isolated
LOOPS = int((EDGES[0] == EDGES[1]).sum())


def perceptron(linear):
    return torch.nn.Sequential(linear(8, 12), torch.nn.ReLU(), linear(12, 5))


GEN = {
    "softmax": {"aggr": "softmax", "t": 0.7, "learn_t": True},
    "softmax_sg": {"aggr": "softmax_sg", "t": 1.3},
    "power": {"aggr": "power", "p": 1.7, "learn_p": True, "eps": 0.05},
    "mean": {"aggr": "mean", "norm": "layer", "num_layers": 1},
    "max": {"aggr": "max", "norm": None, "num_layers": 3, "bias": True},
    "add": {"aggr": "add", "msg_norm": True, "learn_msg_scale": True, "expansion": 3},
}
LAYERS = {
    "gcn": lambda lib: lib.GCNConv(8, 5),
    "gcn_narrow": lambda lib: lib.GCNConv(4, 9, bias=False),
    "gcn_raw": lambda lib: lib.GCNConv(8, 5, normalize=False),
    "gin": lambda lib: lib.GINConv(perceptron(torch.nn.Linear), eps=0.3, train_eps=True),
    "gat": lambda lib: lib.GATConv(8, 6, heads=3, negative_slope=0.1),
    "gat_mean": lambda lib: lib.GATConv(8, 6, heads=2, concat=False, residual=True, bias=False),
    "gat_raw": lambda lib: lib.GATConv(8, 6, add_self_loops=False),
} | {f"gen_{name}": lambda lib, options=options: lib.GENConv(8, 5, **options) for name, options in GEN.items()}


def features(width=8, seed=2):
    return torch.randn(NODES, width, generator=torch.Generator().manual_seed(seed))


def pair(make):
    """(ours, PyG's) with the same weights, loaded by name."""
    torch.manual_seed(4)
    theirs, ours = make(pyg), make(nn)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def outputs_and_gradients(layer, x, *edges):
    x = x.clone().requires_grad_()
    y = layer(x, *edges)
    parameters = dict(layer.named_parameters())
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((y * weight).sum(), [x, *parameters.values()])
    return {"y": y, "dx": gradients[0]} | dict(zip(parameters, gradients[1:], strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_agree_with_pyg(each_backend, name):
    assert LOOPS > 0, "the graph is to have self-loops of its own"
    ours, theirs = pair(LAYERS[name])
    width = 4 if name == "gcn_narrow" else 8
    edges = EDGES
    if name == "gen_power":  # PyG clamps to [1e-4, 100], also where a row is empty; these messages lie inside both ranges
        edges = torch.cat((EDGES, torch.arange(30, NODES).expand(2, -1)), 1)
    expected = outputs_and_gradients(theirs, features(width), edges)
    for edges in (edges, Graph.from_edge_index(edges, NODES)):
        found = outputs_and_gradients(ours, features(width), edges)
        for key, value in expected.items():
            assert_close(found[key], value, torch.float32, f"{name} {key}")


@pytest.mark.parametrize("improved", [False, True])
def test_gcn_with_edge_weights_agrees_with_pyg(each_backend, improved):
    """PyG heeds `improved` only where edge weights are given."""
    ours, theirs = pair(lambda lib: lib.GCNConv(8, 5, improved=improved))
    weight = torch.rand(EDGES.size(1), generator=torch.Generator().manual_seed(5))
    assert_close(ours(features(), EDGES, weight), theirs(features(), EDGES, weight), torch.float32)


@pytest.mark.parametrize(("edge_dim", "learned"), [(3, True), (5, False), (None, False)])
def test_gen_with_edge_features_agrees_with_pyg(each_backend, edge_dim, learned):
    ours, theirs = pair(lambda lib: lib.GENConv(8, 5, edge_dim=edge_dim, bias=True, norm=None, learn_t=learned))
    attributes = torch.randn(EDGES.size(1), edge_dim or 5, generator=torch.Generator().manual_seed(5))
    expected = outputs_and_gradients(theirs, features(), EDGES, attributes)
    found = outputs_and_gradients(ours, features(), EDGES, attributes)
    for key, value in expected.items():
        assert_close(found[key], value, torch.float32, key)


@pytest.mark.parametrize("name", ["gin", "gat", "gen"])
def test_bipartite_layers_agree_with_pyg(each_backend, name):
    edges = torch.stack((EDGES[0] % 20, EDGES[1] % 13))
    x = features(8)[:20], features(6, seed=7)[:13]
    make = {
        "gin": lambda lib: lib.GINConv(perceptron(torch.nn.Linear)),
        "gat": lambda lib: lib.GATConv((8, 6), 4, heads=2, add_self_loops=False),
        "gen": lambda lib: lib.GENConv((8, 6), 5),
    }[name]
    if name == "gin":
        x = x[0], features(8)[:13]
    ours, theirs = pair(make)
    assert_close(ours(x, edges), theirs(x, edges), torch.float32)


@pytest.mark.parametrize("block", ["res+", "res", "dense", "plain"])
def test_residual_block_agrees_with_pyg(each_backend, block):
    def make(lib):
        residual = lib.ResGCN if lib is nn else lib.DeepGCNLayer
        return residual(lib.GENConv(8, 8, learn_t=True), torch.nn.LayerNorm(8), torch.nn.ReLU(), block=block)

    ours, theirs = pair(make)
    expected = outputs_and_gradients(theirs, features(), EDGES)
    for ours.ckpt_grad in (False, True):
        for key, value in outputs_and_gradients(ours, features(), EDGES).items():
            assert_close(value, expected[key], torch.float32, key)


def masked_inputs():
    generator = torch.Generator().manual_seed(8)
    mask = torch.rand(EDGES.size(1), generator=generator)
    return mask, torch.rand(EDGES.size(1), generator=generator) < 0.6


@pytest.mark.parametrize("name", ["gcn", "gin", "gat", "gen_softmax"])
def test_a_removed_edge_is_an_edge_that_was_never_there(each_backend, name):
    """keep, its prepared selection and the graph without the removed edges give the same layer."""
    ours, _ = pair(LAYERS[name])
    ours.eval()
    g, (mask, keep) = Graph.from_edge_index(EDGES, NODES), masked_inputs()
    smaller = Graph.from_edge_index(EDGES[:, keep], NODES)
    expected = ours(features(), smaller, edge_mask=mask[keep])
    for pattern in (keep, g.select(keep)):
        assert_close(ours(features(), g, edge_mask=mask, edge_keep=pattern), expected, torch.float32, str(pattern)[:20])


@pytest.mark.parametrize("name", ["gcn", "gat", "gen_softmax"])
def test_weight_masks(each_backend, name):
    """Masks and patterns on weights equal the same layer with smaller weights."""
    ours, _ = pair(LAYERS[name])
    generator = torch.Generator().manual_seed(9)
    weights = ours.maskable()
    masks = {n: torch.rand(w.shape, generator=generator) for n, w in weights.items()}
    keeps = {n: torch.rand(w.shape, generator=generator) < 0.6 for n, w in weights.items()}
    found = ours(features(), EDGES, weight_masks=masks, weight_keep=keeps)
    with torch.no_grad():
        for n, w in weights.items():
            w.mul_(masks[n] * keeps[n])
    assert_close(found, ours(features(), EDGES), torch.float32)


@pytest.mark.parametrize("name", ["gcn", "gin", "gat", "gen_softmax", "gen_power", "gen_max", "resgcn"])
def test_layers_compile_and_export(name):
    torch.manual_seed(0)
    layer = nn.ResGCN(nn.GENConv(8, 8), torch.nn.LayerNorm(8), torch.nn.ReLU()) if name == "resgcn" else LAYERS[name](nn)
    g, (mask, keep) = Graph.from_edge_index(EDGES, NODES), masked_inputs()
    x = features()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, graph, mask, keep):
            return self.layer(x, graph, edge_mask=mask, edge_keep=keep)

    model = Model().train()
    for pattern in (keep, g.select(keep)):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        leaves = x.clone().requires_grad_(), mask.clone().requires_grad_()
        results = []
        for function in (model, compiled):
            y = function(leaves[0], g, leaves[1], pattern)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for a, b in zip(*results, strict=True):
            assert_close(a, b, torch.float32)
        model.eval()
        exported = torch.export.export(model, (x, g, mask, pattern))
        assert any("acefast" in str(node.target) for node in exported.graph.nodes)
        assert_close(exported.module()(x, g, mask, pattern), model(x, g, mask, pattern), torch.float32)
        model.train()


def test_a_graph_is_built_once_of_an_edge_index(monkeypatch):
    built = []
    real = Graph.from_edge_index
    monkeypatch.setattr(Graph, "from_edge_index", staticmethod(lambda *args: built.append(1) or real(*args)))
    layer, edges = nn.GINConv(torch.nn.Identity()), EDGES.clone()
    first = layer(features(), edges)
    assert torch.equal(layer(features(), edges), first) and len(built) == 1
    edges[0, 0] = (edges[0, 0] + 1) % NODES
    assert not torch.equal(layer(features(), edges), first) and len(built) == 2


def test_attention_dropout_follows_the_seed(each_backend):
    layer = nn.GATConv(8, 6, heads=2, dropout=0.5)
    with torch.no_grad():
        a, b, c = (layer(features(), EDGES, seed=seed) for seed in (1, 1, 2))
        torch.manual_seed(0)
        drawn = [layer(features(), EDGES) for _ in range(2)]
        layer.eval()
        assert torch.equal(layer(features(), EDGES, seed=1), layer(features(), EDGES))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(*drawn)


@pytest.mark.parametrize("name", ["gcn", "gat", "gen_softmax"])
def test_autocast(each_backend, name):
    ours, _ = pair(LAYERS[name])
    ours.eval()
    x = features().requires_grad_()
    mask, _ = masked_inputs()
    expected = ours(features(), EDGES, edge_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x, EDGES, edge_mask=mask.requires_grad_())
    assert_close(y, expected, torch.bfloat16)
    gradients = torch.autograd.grad(y.float().square().sum(), [x, mask, *ours.parameters()])
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients)


def test_what_layers_refuse():
    g = Graph.from_edge_index(EDGES, NODES)
    with pytest.raises(InputError, match="the graph has 33 nodes, x has 32 rows"):
        nn.GCNConv(8, 5)(features()[:32], g)
    with pytest.raises(InputError, match=r"acefast.Graph or a tensor \[2, E\], got list"):
        nn.GINConv(torch.nn.Identity())(features(), [[0], [1]])
    with pytest.raises(InputError, match="norm must be None or one of"):
        nn.GENConv(8, 5, norm="group")
    with pytest.raises(InputError, match="block must be one of"):
        nn.ResGCN(block="skip")
    with pytest.raises(InputError, match="self-loops need a square graph"):
        nn.GATConv((8, 8), 2)((features(), features()[:5]), torch.tensor([[7], [2]]))

"""DeeperGCN and GraphSAGE against their formulas; recomputation to the bit; running statistics."""

import weakref

import pytest
import torch

from acefast import Graph
from acefast.nn import SAGE, DeeperGCN, build, state_of
from acefast.nn.resgcn import segment
from acefast.ops import backend

NODES, EDGES, RAW = 14, 60, 3


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def example():
    draw = drawn()
    index = torch.randint(0, NODES, (2, EDGES), generator=draw)
    x = torch.randn(NODES, 5, generator=draw)
    mask, keep = 0.5 + torch.rand(EDGES, generator=draw), torch.rand(EDGES, generator=draw) < 0.7
    return Graph.from_edge_index(index, num_nodes=NODES), index, x, mask, keep, torch.rand(EDGES, RAW, generator=draw)


def normalised(h, layer):
    mean, variance = h.mean(0), h.var(0, unbiased=False)
    return (h - mean) / (variance + 1e-5).sqrt() * layer.weight + layer.bias


def test_deeper_gcn_is_its_formula(example):
    """In training mode: pre-activation, residuals, both edge encoders, one edge mask for all layers, masks on the weights."""
    graph, index, x, mask, keep, attr = example
    model = DeeperGCN(5, 8, 4, layers=3, dropout=0.0, aggr="softmax", t=0.7, mlp_layers=2, norm="layer", edge_attr=attr, seed=1)
    model.train()
    names = [f"layers.{i}.conv.mlp.{j}.weight" for i in range(3) for j in (0, 4)]
    assert list(model.maskable()) == names and sum(w.numel() for w in model.maskable().values()) == 3 * 2 * 8 * 16
    weights = {name: torch.rand(w.shape, generator=drawn(2)) for name, w in model.maskable().items()}
    h = x @ model.node_encoder.weight.T + model.node_encoder.bias
    encoded = attr @ model.edge_encoder.weight.T + model.edge_encoder.bias
    for i, layer in enumerate(model.layers):
        a = layer.norm(h).relu() if i else h
        message = (a[index[0]] + encoded @ layer.edge_encoder.weight.T + layer.edge_encoder.bias).relu() + 1e-7
        message = (message * mask.unsqueeze(1))[keep]
        dst = index[1][keep]
        e = (0.7 * message).exp()
        total = torch.zeros_like(a).index_add(0, dst, e)
        y = torch.zeros_like(a).index_add(0, dst, e / total[dst] * message) + a
        first, norm, second = (layer.conv.mlp[j] for j in (0, 1, 4))
        y = norm(y @ (first.weight * weights[names[2 * i]]).T + first.bias).relu()
        y = y @ (second.weight * weights[names[2 * i + 1]]).T + second.bias
        h = y + h if i else y
    expected = model.layers[0].norm(h).relu() @ model.lin.weight.T + model.lin.bias
    assert torch.allclose(model(graph, x, mask, keep, weights), expected, atol=1e-5)
    assert torch.allclose(model(graph, x, mask, graph.select(keep), weights), expected, atol=1e-5)


def test_counted_weights_are_those_of_the_published_configurations():
    arxiv, proteins = DeeperGCN(128, 128, 40), DeeperGCN(16, 64, 112, mlp_layers=2, norm="layer", edge_attr=torch.zeros(1, 8))
    for model in (arxiv, proteins):
        assert sum(w.numel() for w in model.maskable().values()) == 458_752


def test_segments_of_layers_take_the_fewest_tensors():
    for layers, kept in ((1, 5), (4, 9), (11, 5), (12, 5), (28, 5), (28, 9), (112, 5)):
        peaks = {k: -(-layers // k) + kept * k for k in range(1, layers + 1)}
        assert peaks[segment(layers, kept)] == min(peaks.values())
    assert [segment(layers, 5) for layers in (4, 12, 28, 112)] == [1, 2, 2, 4]


@pytest.mark.parametrize(("norm", "layers"), [("batch", 4), ("layer", 4), ("batch", 25)])
def test_recomputation_gives_the_same_bits(example, norm, layers):
    graph, _, x, mask, keep, attr = example
    results = []
    for recompute in (False, True):
        model = DeeperGCN(
            5, 8, 4, layers=layers, aggr="softmax", learn_t=True, mlp_layers=2, norm=norm, edge_attr=attr,
            recompute=recompute, seed=1,
        ).train()
        edge_mask = mask.clone().requires_grad_()
        masks = {name: torch.rand(w.shape, generator=drawn(3)).requires_grad_() for name, w in model.maskable().items()}
        for step in range(3):
            logits = model(graph, x, edge_mask, keep, masks, seed=5, step=step)
            logits.square().sum().backward()
        gradients = [t.grad for t in (*model.parameters(), edge_mask, *masks.values())]
        results.append((logits.detach(), *gradients, *(b.clone() for b in model.buffers())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert float(results[0][0].std()) > 0 and all(bool(g.isfinite().all()) for g in results[0])


def test_evaluation_takes_the_running_statistics(example):
    graph, _, x, mask, keep, _ = example
    model = DeeperGCN(5, 8, 4, layers=2, seed=1)
    assert {name.split(".")[-1] for name in state_of(model).keys() - dict(model.named_parameters()).keys()} == {
        "running_mean",
        "running_var",
    }
    fresh = model.eval()(graph, x, mask, keep)
    model.train()(graph, x, mask, keep)
    assert not torch.equal(model.eval()(graph, x, mask, keep), fresh)
    h = model.node_encoder(x)
    h = model.layers[0].convolved(h, graph, None, None, mask, keep, {}, {})
    norm = model.layers[1].norm
    expected = (h - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
    assert torch.allclose(model.layers[1].activated(h, 0.0, 0, 0), expected.relu(), atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
@pytest.mark.parametrize("pruned", ["absent", "in_denominator"])
def test_sage_is_its_formula(example, shape, pruned):
    graph, index, x, mask, keep, _ = example
    x = torch.randn(NODES, shape[0], generator=drawn(4))
    model = SAGE(shape[0], shape[1], 4, pruned=pruned, seed=1).eval()
    masks = {name: torch.rand(w.shape, generator=drawn(5)) for name, w in model.maskable().items()}
    counted = keep if pruned == "absent" else torch.ones_like(keep)
    count = torch.zeros(NODES).index_add(0, index[1], counted.float()).clamp(min=1)
    a = torch.zeros(NODES, NODES).index_put((index[1], index[0]), mask * keep, accumulate=True) / count.unsqueeze(1)
    h = x
    for i, layer in enumerate(model.layers):
        near, own = (getattr(layer, n).weight * masks[f"layers.{i}.{n}.weight"] for n in ("lin_l", "lin_r"))
        h = h.relu() if i else h
        h = a @ h @ near.T + layer.lin_l.bias + h @ own.T
    assert torch.allclose(model(graph, x, mask, keep, masks), h, atol=1e-5)
    nodes = torch.tensor([3, 0, 9])
    blocks = model.blocks(graph, nodes, keep)
    assert (blocks is None) == (pruned == "in_denominator")
    if blocks is not None:
        part = model(graph, x[blocks[0].src_nodes], mask, graph.select(keep), masks, blocks=blocks)
        assert torch.allclose(part, h[nodes], atol=1e-5)


def test_sage_is_pyg(example):
    from torch_geometric.nn import SAGEConv

    graph, index, x, *_ = example
    layer, peer = build("sage", 5, 4, hidden=8, layers=1).layers[0], SAGEConv(5, 4)
    peer.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(x, graph), peer(x, index), atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_the_shared_edge_mask_is_summed_layer_by_layer(example, monkeypatch, recompute):
    """Of the layers' gradients [E] no more than the sum and the newest exist at a time."""
    graph, _, x, mask, *_ = example
    alive, most = [], []

    def counted(op, *args, call=backend.call):
        result = call(op, *args)
        if op == "gen_bwd":
            alive.append(weakref.ref(result[1]))
            most.append(sum(gradient() is not None for gradient in alive))
        return result

    monkeypatch.setattr(backend, "call", counted)
    model = DeeperGCN(5, 8, 4, layers=8, recompute=recompute, seed=1).train()
    model(graph, x, mask.clone().requires_grad_()).sum().backward()
    assert len(most) == 8 and max(most) <= 2


def test_macs_count_what_is_multiplied(example):
    graph, _, x, _, keep, attr = example
    edges = int(keep.sum())
    model = DeeperGCN(5, 8, 4, layers=2, mlp_layers=2, edge_attr=attr)
    kept = {name: torch.rand(w.shape, generator=drawn(3)) < 0.4 for name, w in model.maskable().items()}
    products = NODES * sum(int(k.sum()) for k in kept.values()) + NODES * (5 * 8 + 8 * 4)
    assert model.macs(graph, x, keep, kept) == products + 2 * ((edges + NODES) * 8 + edges * RAW * 8)
    sage = SAGE(5, 8, 4)
    kept = {name: torch.rand(w.shape, generator=drawn(3)) < 0.4 for name, w in sage.maskable().items()}
    assert sage.macs(graph, x, keep, kept) == NODES * sum(int(k.sum()) for k in kept.values()) + edges * (5 + 4)


@pytest.mark.parametrize("pruned", ["absent", "in_denominator"])
def test_compacted_networks_give_the_same_logits(example, pruned):
    graph, _, x, _, keep, attr = example
    deep, with_edges = (DeeperGCN(5, 8, 4, layers=2, edge_attr=a, pruned=pruned).eval() for a in (None, attr))
    for model in (deep, with_edges, SAGE(5, 8, 4, pruned=pruned).eval()):
        smaller, arguments = model.compact(graph, keep)
        assert torch.allclose(model(smaller, x, **arguments), model(graph, x, edge_keep=keep), atol=1e-6)

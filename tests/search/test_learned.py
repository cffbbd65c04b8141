"""Features that are learned with the network, and links a part at a time."""

from dataclasses import replace

import pytest
import torch

from acefast.data import load_dataset, split_links
from acefast.errors import InputError
from acefast.nn import build
from acefast.pruning import Pattern, SoftMasks
from acefast.search import compact, export_ticket, resolve_config, retrain_ticket, run_search
from acefast.search.rounds import build_model, prepare_data
from acefast.tasks import make_task
from acefast.train import Schedule, train

BACKBONES = ("gcn", "gin", "gat", "sage", "resgcn")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_network_reads_its_own_features_where_none_are_given(tiny, backbone):
    model = build(backbone, 6, 3, hidden=8, layers=2, seed=1).embed(80, 6, seed=4).eval()
    other = build(backbone, 6, 3, hidden=8, layers=2, seed=1).eval()
    bound = (6 / (80 + 6)) ** 0.5
    assert model.embedding.shape == (80, 6) and 0.9 * bound < float(model.embedding.detach().abs().max()) <= bound
    assert "embedding" not in model.maskable() and "embedding" not in dict(other.named_parameters())
    logits = model(tiny.graph, None)
    assert torch.equal(logits, other(tiny.graph, model.embedding.detach()))
    logits.square().sum().backward()
    assert float(model.embedding.grad.abs().sum()) > 0
    assert model.macs(tiny.graph, None) == other.macs(tiny.graph, model.embedding.detach())
    with pytest.raises(InputError, match="call embed first"):
        other(tiny.graph, None)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_search_with_learned_features(tiny, tiny_config, backbone):
    config = tiny_config(backbone=backbone, features="learned", method="ace", layers=2, heads=2, rounds=1)
    run = run_search(tiny, config)
    ticket = run.ticket(1)
    assert ticket.rewind["embedding"].shape == (80, config.hidden) and "embedding" not in ticket.weight_keep
    assert run_search(tiny, config).history == run.history
    again = retrain_ticket(ticket, tiny)
    assert (again["val"], again["test"]) == (again["found_val"], again["found_test"])
    exported = export_ticket(ticket, tiny)
    assert not torch.equal(exported.rewind["embedding"], ticket.rewind["embedding"])
    model = build_model(prepare_data(tiny, config), config).eval()
    model.load_state_dict(exported.rewind, strict=False)
    data = prepare_data(tiny, config)
    masked = model(data.graph, None, None, ticket.edge_keep, {}, ticket.weight_keep)
    assert torch.allclose(compact(exported, tiny)(), masked, atol=1e-5)


@pytest.mark.parametrize("backbone", ["gcn", "gin", "gat"])
def test_both_ways_of_training_learn_the_same_features(tiny, backbone):
    data = replace(tiny, x=None, features="learned", train=tiny.train[:3], val=tiny.val[:4])
    model = build(backbone, 6, data.num_classes, hidden=8, dropout=0.0, seed=2).embed(80, 6, seed=4)
    if backbone == "gat":
        data = replace(data, graph=data.graph.with_self_loops())
    blocks, called = model.blocks, []
    model.blocks = lambda graph, nodes, *rest: called.append(nodes.numel()) or blocks(graph, nodes, *rest)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    pattern, fits = Pattern.full(data.graph.num_edges, model.maskable()), []
    for fast in (True, False):
        masks = SoftMasks.init(pattern, 1e-5, lambda name: torch.Generator().manual_seed(1))
        schedule = Schedule(20, lr=0.01, weight_decay=5e-4, mask_lr=0.01)
        fits.append(train(model, data, schedule, start, pattern, masks, seed=4, keep_weights=True, fast=fast))
    one, two = (fit.weights["embedding"] for fit in fits)
    assert called and torch.allclose(one, two, atol=1e-5) and not torch.allclose(one, start["embedding"], atol=1e-3)
    assert (fits[0].val, fits[0].test, fits[0].best_epoch) == (fits[1].val, fits[1].test, fits[1].best_epoch)


def test_links_are_passed_over_a_part_at_a_time(tiny):
    data = split_links(tiny)
    per = 30
    task, whole = make_task(data, seed=5, links=per), len(data.train) // per
    assert whole >= 3 and len(data.train) % per
    passes = []
    for turn in (0, 1):
        parts = [task._part(turn * whole + place) for place in range(whole)]
        assert all(part.shape == (per, 2) for part in parts)
        passes.append({tuple(pair) for pair in torch.cat(parts).tolist()})
        assert len(passes[-1]) == per * whole and passes[-1] <= {tuple(pair) for pair in data.train.tolist()}
    assert torch.equal(task._part(0), make_task(data, seed=5, links=per)._part(0))  # after another pass, and anew
    assert not torch.equal(task._part(0), task._part(whole)) and not torch.equal(task._part(0), task._part(1))
    z = torch.randn(80, 4, generator=torch.Generator().manual_seed(1))
    good, bad = task.scores(z, "train", 1)
    a, b = task._part(1).unbind(1)
    assert torch.allclose(good, (z[a] * z[b]).sum(1), atol=1e-5) and len(bad) == per
    everything = make_task(data, seed=5, links=10**6)
    assert torch.equal(everything.scores(z, "train", 1)[0], make_task(data, seed=5).scores(z, "train", 1)[0])


def test_the_preset_of_a_data_set_without_features():
    config = resolve_config("twin:ogbl-ddi:0.05", "gcn", "ugs", task="link", rounds=1, mask_epochs=3, fix_epochs=3, threads=1, hidden=16)
    assert (config.features, config.links, config.embedding, config.decoder) == ("learned", 16384, 256, "mlp")
    run = run_search(load_dataset("twin:ogbl-ddi:0.05"), replace(config, links=500, embedding=16))
    assert run.rounds[1]["metric"] == "hits@20" and run.rounds[1]["edges_kept"] < run.rounds[0]["edges_kept"]

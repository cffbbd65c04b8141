"""Tasks: their losses and metrics by the definition, what links draw, and that both ways of training agree on them."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from acefast.data import load_dataset, split_links, synthetic_citation
from acefast.errors import InputError
from acefast.graph import Graph
from acefast.nn import HadamardMLP, build
from acefast.pruning import Pattern, SoftMasks
from acefast.search import compact, export_ticket, find_ticket, resolve_config, retrain_ticket, run_search
from acefast.search.rounds import prepare_data
from acefast.tasks import make_task
from acefast.train import Schedule, train


@pytest.fixture(scope="module")
def links():
    data = synthetic_citation(
        400, 60, 3, seed=2, num_edges=800, words=6.0, train_per_class=6, num_val=40, num_test=50, name="small"
    )
    return split_links(data)


def area(links, others):
    apart = links[:, None] - others
    return float(((apart > 0).double() + (apart == 0).double() / 2).mean())


@pytest.mark.parametrize("split", ["val", "test"])
def test_links_are_judged_by_scalar_products(links, split):
    z = torch.randint(-2, 3, (400, 4), generator=torch.Generator().manual_seed(1)).float()  # ties among the scores
    task = make_task(links, seed=5)
    outputs = z[task.nodes[split]]
    good, bad = ((z[p[:, 0]] * z[p[:, 1]]).sum(1) for p in (getattr(links, split), getattr(links, f"{split}_neg")))
    assert task.metric(outputs, split) == pytest.approx(area(good, bad), abs=1e-12)
    loss = (F.softplus(-good).sum() + F.softplus(bad).sum()) / (len(good) + len(bad))
    assert float(task.loss(outputs, split)) == pytest.approx(float(loss), rel=1e-6)
    ranked = make_task(replace(links, metric="hits@20"), seed=5)
    assert ranked.metric(outputs, split) == float((good > bad.sort(descending=True).values[19]).double().mean())


def test_training_draws_other_pairs_anew_for_each_epoch(links):
    z = torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    task = make_task(links, seed=5)
    drawn = []
    for epoch in (0, 1, 0):
        good, bad = task.scores(z, "train", epoch)
        a, b = links.train.unbind(1)
        assert torch.allclose(good, (z[a] * z[b]).sum(1), atol=1e-5) and len(bad) == len(good)
        drawn.append(bad)
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(make_task(links, seed=5).scores(z, "train", 1)[1], drawn[1])
    assert not torch.equal(make_task(links, seed=6).scores(z, "train", 1)[1], drawn[1])
    edges = {tuple(edge) for edge in links.graph.edge_index().T.tolist()}
    assert not edges & {tuple(pair) for pair in task.others.draw(20_000, torch.Generator().manual_seed(2)).tolist()}


@pytest.mark.parametrize(("backbone", "decoder"), [("gcn", "mlp"), ("gcn", "product"), ("gin", "product"), ("gat", "product")])
def test_the_fast_way_is_the_straightforward_one_on_links(monkeypatch, links, backbone, decoder):
    data = prepare_data(links, resolve_config("small", backbone, task="link"))
    # a part of the graph suffices for few links: the outputs come from blocks
    data = replace(data, val=data.val[:6], val_neg=data.val_neg[:6])
    model = build(backbone, data.num_features, 8, hidden=16, seed=2)
    model.decoder = HadamardMLP(8, seed=2) if decoder == "mlp" else None
    blocks, called = model.blocks, []
    model.blocks = lambda graph, nodes, *rest: called.append(nodes.numel()) or blocks(graph, nodes, *rest)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(3)
    full = Pattern.full(data.graph.num_edges, model.maskable())
    pattern = full.map(lambda t: torch.rand(t.shape, generator=draw) < 0.7)
    entropy, losses, fits = F.binary_cross_entropy_with_logits, [], []

    def recorded(scores, labels):
        loss = entropy(scores, labels)
        losses[-1].append(float(loss.detach())) if loss.requires_grad else None
        return loss

    monkeypatch.setattr("torch.nn.functional.binary_cross_entropy_with_logits", recorded)
    schedule = Schedule(30, lr=0.01, weight_decay=5e-4, mask_lr=0.01, s1=1e-3, s2=1e-3)
    for fast in (True, False):
        losses.append([])
        masks = SoftMasks.init(pattern, 1e-5, lambda name: torch.Generator().manual_seed(1))
        fits.append(train(model, data, schedule, start, pattern, masks, seed=4, keep_weights=True, fast=fast))
    assert called and len(losses[0]) == 30 and losses[0][-1] < losses[0][0]
    assert torch.allclose(*(torch.tensor(values) for values in losses), rtol=1e-5, atol=1e-6)
    one, two = fits
    assert (one.val, one.test, one.best_epoch) == (two.val, two.test, two.best_epoch)
    learned = [name for name in one.weights if name.startswith("decoder")]
    assert len(learned) == 4 * (decoder == "mlp")
    for name in learned:
        assert torch.allclose(one.weights[name], two.weights[name], atol=1e-5) and not torch.equal(one.weights[name], start[name])
    for axis in ("edges", "weights"):
        for a, b in zip(one.masks.axis(axis), two.masks.axis(axis), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_several_labels_of_a_node_some_unknown():
    data = load_dataset("twin:ogbn-proteins:0.001")
    y = data.y.clone()
    y[::3, ::2] = math.nan
    data = replace(data, y=y)
    task = make_task(data)
    z = torch.randn(data.num_nodes, 112, generator=torch.Generator().manual_seed(1))
    outputs, labels = z[data.train], y[data.train]
    known = ~labels.isnan()
    assert float(task.loss(outputs, "train")) == pytest.approx(
        float(F.binary_cross_entropy_with_logits(outputs[known], labels[known])), rel=1e-5
    )
    columns = zip(z[data.val].T, y[data.val].T, strict=True)
    areas = [area(s[t == 1], s[t == 0]) for s, t in columns if (t == 1).any() and (t == 0).any()]
    assert task.metric(z[data.val], "val") == pytest.approx(sum(areas) / len(areas), abs=1e-12)
    run = find_ticket(data, "gcn", "dense", hidden=8, fix_epochs=3, threads=1)
    assert run.rounds[0]["metric"] == "rocauc" and 0 < run.rounds[0]["test"] < 1


@pytest.mark.parametrize(
    ("backbone", "method", "decoder"),
    [("gcn", "ace", "product"), ("gcn", "ace", "mlp"), ("gin", "ugs", "product"), ("gat", "ugs", "mlp")],
)
def test_a_search_for_links_ends_with_tickets_that_train_again(tiny, tiny_config, backbone, method, decoder, tmp_path):
    complement = "none" if method == "ace" else "joint"  # scores what was removed by the loss, too
    config = tiny_config(
        task="link", backbone=backbone, method=method, embedding=4, decoder=decoder, score="gradient", complement=complement
    )
    run = run_search(tiny, config, tmp_path / "run")
    assert run_search(tiny, config).history == run.history
    graph = split_links(tiny).graph
    loops = tiny.num_nodes if backbone == "gat" else 0
    for number in (1, 2):
        event, ticket = run.rounds[number], run.ticket(number)
        assert event["metric"] == ticket.metadata["metric"] == "rocauc" and 0 <= event["test"] <= 1
        assert event["edges_total"] == ticket.edge_keep.numel() == graph.num_edges + loops
    held = {tuple(pair) for part in (split_links(tiny).val, split_links(tiny).test) for pair in part.tolist()}
    seen = ticket.graph(graph.with_self_loops() if loops else graph)
    assert not held & {pair for a, b in seen.edge_index().T.tolist() for pair in ((a, b), (b, a))}
    row = retrain_ticket(ticket, tiny)
    assert (row["val"], row["test"], row["metric"]) == (event["val"], event["test"], "rocauc")
    exported = compact(export_ticket(ticket, tiny), tiny)
    outputs, task = exported(), make_task(split_links(tiny), decoder=exported.decoder)
    assert task.metric(outputs[task.nodes["test"]], "test") == pytest.approx(event["test"], abs=0.01)
    other = retrain_ticket(ticket, tiny, backbone="gin" if backbone != "gin" else "gcn")
    assert other["edges_total"] == graph.num_edges and 0 <= other["test"] <= 1
    with pytest.raises(InputError, match="ticket for another graph"):
        ticket.check_graph(tiny.graph)


def test_links_that_a_data_set_brings_are_taken_as_they_are(tiny_config):
    twin = load_dataset("twin:ogbl-collab:0.001")
    run = find_ticket(twin, "gcn", "ugs", task="link", rounds=1, hidden=8, embedding=4, mask_epochs=2, fix_epochs=2, threads=1)
    assert run.rounds[1]["metric"] == "hits@50" and run.rounds[0]["edges_kept"] == twin.graph.num_edges


def test_what_cannot_be_learned_is_refused(tiny, tiny_config):
    twin = load_dataset("twin:ogbl-ddi:0.02")
    with pytest.raises(InputError, match="set task link"):
        run_search(twin, tiny_config())
    with pytest.raises(InputError, match="score agreement compares classes of nodes"):
        run_search(tiny, tiny_config(task="link", edge_score="agreement"))
    with pytest.raises(InputError, match="has no features"):
        run_search(twin, tiny_config(task="link"))
    with pytest.raises(InputError, match="preset released is a procedure for task node"):
        resolve_config("cora", preset="released", task="link")
    with pytest.raises(InputError, match="task must be one of node, link"):
        resolve_config("cora", task="graph")
    with pytest.raises(InputError, match="embedding must be 1 or more"):
        resolve_config("cora", task="link", embedding=0)
    complete = torch.combinations(torch.arange(80)).T
    with pytest.raises(InputError, match="pairs of nodes without an edge are needed"):
        run_search(replace(tiny, graph=Graph.from_edge_index(complete, num_nodes=80)), tiny_config(task="link"))

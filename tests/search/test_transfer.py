"""What a search costs, and a ticket trained anew: the search's own numbers again, another seed, another backbone, and what does not fit."""

from dataclasses import replace

import pytest
import torch

import acefast
from acefast import nn
from acefast.errors import InputError
from acefast.graph import Graph
from acefast.pruning import Pattern, Ticket
from acefast.random import named_seed
from acefast.search import retrain_ticket
from acefast.search.rounds import prepare
from acefast.search.transfer import shuffled
from acefast.train import Schedule, train


@pytest.fixture(scope="module")
def run(tiny):
    short = dict(mask_epochs=4, fix_epochs=6, ace_epochs=2, ace_rounds=1, threads=1, seed=3)
    return acefast.find_ticket(tiny, "gcn", "ace", rounds=2, hidden=8, dropout=0.4, **short)


def test_a_search_counts_its_epochs(run):
    cost = [(line["stage"], line["epochs"]) for line in run.timings]
    stages = [("imp", 4), ("ace-1", 2 + 2), ("candidate", 2), ("retrain", 6)]  # ace-1: retained and complement model
    assert cost == [("dense", 6), *stages, *stages]


def test_its_own_weights_repeat_the_search(tiny, run):
    row = retrain_ticket(run.ticket(2), tiny, dense=True)
    found, baseline = run.rounds[2], run.rounds[0]
    assert {key: row[key] for key in ("val", "test", "best_epoch", "edges_kept", "weights_kept")} == {
        key: found[key] for key in ("val", "test", "best_epoch", "edges_kept", "weights_kept")
    }
    assert (row["dense_val"], row["dense_test"]) == (baseline["val"], baseline["test"])
    assert (row["found_val"], row["found_test"], row["start"], row["seed"]) == (found["val"], found["test"], "rewind", 3)


def test_a_long_training_beside_a_search_keeps_nothing(monkeypatch, tiny, run):
    monkeypatch.setattr("acefast.search.trainings.SECONDS", 0.0)
    row = retrain_ticket(run.ticket(2), tiny)
    assert (row["val"], row["test"]) == (run.rounds[2]["val"], run.rounds[2]["test"])


def test_another_seed_starts_at_its_fresh_weights(tiny, run):
    ticket = run.ticket(1)
    row = retrain_ticket(ticket, tiny, seed=11)
    data = tiny.with_row_normalized_features()
    model = nn.build("gcn", data.num_features, 3, seed=11, hidden=8, dropout=0.4)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not torch.equal(start["layers.0.lin.weight"], ticket.rewind["layers.0.lin.weight"])
    pattern = Pattern(ticket.edge_keep, ticket.weight_keep)
    noise = named_seed(11, 1, "retrain", "retrain", "dropout")
    fit = train(model, data, Schedule(6, 0.008, 8e-5), start, pattern, seed=noise)
    assert (row["val"], row["test"], row["best_epoch"]) == (fit.val, fit.test, fit.best_epoch)
    assert (row["start"], row["seed"]) == ("fresh", 11)


def test_shuffled_masks_keep_as_much_elsewhere(tiny, run):
    ticket = run.ticket(2)
    row = retrain_ticket(ticket, tiny, shuffle=True)
    assert row == {**retrain_ticket(ticket, tiny, shuffle=True), "seconds": row["seconds"]}
    counts = ("edges_kept", "edges_total", "weights_kept", "weights_total")
    assert [row[key] for key in counts] == [run.rounds[2][key] for key in counts] and row["shuffled"]
    pattern = Pattern(ticket.edge_keep, ticket.weight_keep)
    other = shuffled(pattern, prepare(tiny, run.config, None, lambda event: None))
    assert {k: int(v.sum()) for k, v in other.flat("").items()} == {k: int(v.sum()) for k, v in pattern.flat("").items()}
    assert not any(torch.equal(a, b) for a, b in zip(other.flat("").values(), pattern.flat("").values()))


@pytest.mark.parametrize("backbone", ["gin", "gat"])
def test_another_backbone_takes_the_edges_alone(tiny, run, backbone):
    ticket = run.ticket(2)
    row = retrain_ticket(ticket, tiny, backbone=backbone)
    assert (row["backbone"], row["start"], row["epochs"]) == (backbone, "fresh", 6), "deviations from the preset stay"
    loops = tiny.num_nodes if backbone == "gat" else 0  # gat's own self-loops are all kept
    assert (row["edges_kept"], row["edges_total"]) == tuple(n + loops for n in ticket.counts["edges"])
    assert row["weights_kept"] == row["weights_total"]


def test_a_ticket_of_gat_leaves_its_loops_behind(tiny):
    short = dict(mask_epochs=2, fix_epochs=3, hidden=8, heads=2, threads=1)
    ticket = acefast.find_ticket(tiny, "gat", "ugs", rounds=1, axes="edges", **short).ticket(1)
    assert retrain_ticket(ticket, tiny)["test"] == ticket.metadata["test"]
    row = retrain_ticket(ticket, tiny, backbone="gcn", seed=4)
    kept = int(ticket.edge_keep[: tiny.graph.num_edges].sum())
    assert (row["edges_kept"], row["edges_total"]) == (kept, tiny.graph.num_edges)


def test_what_does_not_fit_is_refused(tiny, run):
    ticket = run.ticket(1)
    graph = Graph.from_edge_index(tiny.graph.edge_index().flip(1), num_nodes=tiny.num_nodes)
    with pytest.raises(InputError, match="ticket for another graph"):
        retrain_ticket(ticket, replace(tiny, graph=graph))
    with pytest.raises(InputError, match="the ticket does not fit this model"):
        retrain_ticket(ticket, replace(tiny, x=torch.ones(tiny.num_nodes, 5)))
    with pytest.raises(InputError, match="seed must be 0 or more"):
        retrain_ticket(ticket, tiny, seed=-1)
    with pytest.raises(InputError, match="backbone must be one of"):
        retrain_ticket(ticket, tiny, backbone="nope")
    with pytest.raises(InputError, match="dataset 'tiny' is not known"):
        retrain_ticket(ticket)
    metadata = {key: value for key, value in ticket.metadata.items() if key != "settings"}
    with pytest.raises(InputError, match="does not say its settings"):
        retrain_ticket(Ticket(ticket.edge_keep, ticket.weight_keep, ticket.rewind, metadata), tiny)

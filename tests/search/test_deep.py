"""Searches with a deep network: running statistics, recomputation, what a ticket holds of them."""

import pytest
import torch

from acefast.errors import InputError
from acefast.nn import DeeperGCN, build, state_of
from acefast.pruning import Pattern, SoftMasks, Ticket
from acefast.search import compact, export_ticket, resolve_config, retrain_ticket, run_search
from acefast.train import Schedule, train

DEEP = dict(backbone="resgcn", layers=3, lr=0.02, fix_lr=0.01, rounds=1)


@pytest.mark.parametrize("fast", [True, False])
def test_buffers_are_rewound_and_those_of_the_best_epoch_kept(tiny, fast):
    model = DeeperGCN(tiny.num_features, 8, tiny.num_classes, layers=3, seed=2)
    start = {name: value.clone() for name, value in state_of(model).items()}
    full = Pattern.full(tiny.graph.num_edges, model.maskable())
    schedule, seen = Schedule(20, lr=0.05, mask_lr=0.02), []

    def fit():
        masks = SoftMasks.init(full, 1e-5, lambda name: torch.Generator().manual_seed(1))
        on_epochs = lambda *e: seen.append((e[1], {n: b.clone() for n, b in model.named_buffers()}))  # noqa: E731
        return train(model, tiny, schedule, start, full, masks, 3, keep_weights=True, on_epochs=on_epochs, fast=fast)

    one, two = fit(), fit()
    assert one.best_epoch < 19, "the last epoch must not be the best one, or this shows nothing"
    assert (one.val, one.val_loss, one.test, one.best_epoch) == (two.val, two.val_loss, two.test, two.best_epoch)
    for name, buffer in state_of(model).items():
        if "running" in name:
            assert torch.equal(buffer, seen[one.best_epoch][1][name]) and torch.equal(two.weights[name], buffer)
            assert torch.equal(seen[0][1][name], seen[20][1][name]) and not torch.equal(buffer, start[name])


def test_a_search_recomputes_or_not_with_the_same_result(tiny, tiny_config):
    runs = [run_search(tiny, tiny_config(**DEEP, method="ace", recompute=recompute)) for recompute in ("no", "yes")]
    assert runs[0].history == runs[1].history
    assert runs[0].config.hash() == runs[1].config.hash()
    ticket = runs[0].ticket(1)
    assert ticket.counts["weights"] == (3 * 64 - int(0.2 * 3 * 64), 3 * 64)
    assert "layers.1.norm.running_var" in ticket.rewind
    again = retrain_ticket(ticket, tiny)
    assert (again["val"], again["test"]) == (again["found_val"], again["found_test"])


def test_a_ticket_sets_the_statistics_and_refuses_a_model_without_them(tiny):
    model = build("resgcn", tiny.num_features, tiny.num_classes, hidden=8, layers=2)
    rewind = {name: torch.full_like(value, 0.5) for name, value in state_of(model).items()}
    keep = {name: torch.ones_like(w, dtype=torch.bool) for name, w in model.maskable().items()}
    ticket = Ticket(torch.ones(tiny.graph.num_edges, dtype=torch.bool), keep, rewind, {"fingerprint": tiny.graph.fingerprint()})
    ticket.apply(model)
    assert all(bool((value == 0.5).all()) for value in state_of(model).values())
    other = build("resgcn", tiny.num_features, tiny.num_classes, hidden=8, layers=2, norm="layer")
    with pytest.raises(InputError, match="running_mean"):
        ticket.apply(other)


@pytest.mark.parametrize("backbone", ["resgcn", "sage"])
@pytest.mark.parametrize("pruned", ["absent", "zeroed"])
def test_the_new_backbones_run_down_the_ladder(tiny, tiny_config, backbone, pruned):
    run = run_search(tiny, tiny_config(backbone=backbone, layers=3, pruned_edges=pruned, method="ugs", lr=0.02))
    assert [row["edges_kept"] < row["edges_total"] for row in run.rounds] == [False, True, True]
    assert all(0 <= row["test"] <= 1 for row in run.rounds)


def test_settings_of_a_data_set_hold_for_its_twin():
    arxiv, twin = resolve_config("ogbn-arxiv", "resgcn"), resolve_config("twin:ogbn-arxiv:0.1", "resgcn")
    assert arxiv.differences(twin) == ["dataset"]
    assert (arxiv.layers, arxiv.hidden, arxiv.lr, arxiv.fix_lr, arxiv.row_normalise) == (28, 128, 1e-3, 0.01, False)
    proteins = resolve_config("ogbn-proteins", "resgcn")
    assert (proteins.hidden, proteins.mlp_layers, proteins.norm, proteins.learn_t) == (64, 2, "layer", True)
    assert resolve_config("cora").fix_lr == resolve_config("cora").lr
    assert not resolve_config("cora", features="fastrp").row_normalise
    with pytest.raises(InputError, match="mlp_layers must be 1 or 2, got 3"):
        resolve_config("cora", "resgcn", mlp_layers=3)


def test_an_exported_ticket_has_the_trained_statistics(tiny, tiny_config):
    ticket = run_search(tiny, tiny_config(**DEEP, method="ugs")).ticket(1)
    exported = export_ticket(ticket, tiny)
    assert not torch.equal(exported.rewind["layers.1.norm.running_mean"], ticket.rewind["layers.1.norm.running_mean"])
    right = compact(exported, tiny).predict()[tiny.test] == tiny.y[tiny.test]
    assert float(right.float().mean()) == pytest.approx(ticket.metadata["test"])

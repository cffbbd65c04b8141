"""Epochs captured and replayed: with a recorder in place of a CUDA graph they give what epochs run one by one give, to the bit."""

from dataclasses import replace

import pytest
import torch

from acefast.data import synthetic_citation
from acefast.nn import GCN, Network, build, state_of
from acefast.ops import relu_dropout
from acefast.pruning import Pattern, SoftMasks
from acefast.search import run_search
from acefast.tasks import make_task
from acefast.train import WARM_UP, Schedule, train
from tests.recorder import Recorder

DATA = synthetic_citation(
    400, 60, 3, seed=2, num_edges=800, words=6.0, train_per_class=6, num_val=40, num_test=50, name="small"
)
EPOCHS = 30
NUMBERS = ("best_epoch", "val", "val_loss", "test", "seed")


@pytest.fixture
def recorder(monkeypatch):
    """Trainings are captured by it."""
    recorder = Recorder()
    monkeypatch.setattr("acefast.train.capture_on", lambda device: recorder)
    return recorder


def trained(backbone="gcn", share=0.5, frozen=False, model=None, data=DATA, schedule=None, **more):
    """(the Fit, the metrics of all epochs) of a fresh network."""
    settings = dict(layers=3) if backbone == "resgcn" else {}
    model = model or build(backbone, data.num_features, data.num_classes, hidden=8, dropout=0.3, seed=2, **settings)
    start = {name: value.clone() for name, value in state_of(model).items()}
    draw = torch.Generator().manual_seed(3)
    pattern = Pattern.full(data.graph.num_edges, model.maskable()).map(lambda t: torch.rand(t.shape, generator=draw) < share)
    masks = None if frozen else SoftMasks.init(pattern, 1e-5, lambda name: torch.Generator().manual_seed(1))
    schedule = schedule or Schedule(EPOCHS, lr=0.02, weight_decay=5e-4, mask_lr=0.01, s1=1e-3, s2=1e-3)
    vals = []

    def on_epochs(first, some):
        assert first == len(vals) + (EPOCHS - schedule.epochs)
        vals.extend(some)

    fit = train(model, data, schedule, start, pattern, masks, 4, True, on_epochs, **more)
    return fit, vals


def assert_same(one, two):
    assert [getattr(one, name) for name in NUMBERS] == [getattr(two, name) for name in NUMBERS]
    assert one.weights.keys() == two.weights.keys() and all(torch.equal(w, two.weights[n]) for n, w in one.weights.items())
    assert (one.masks is None) == (two.masks is None)
    if one.masks is not None:
        assert torch.equal(one.masks.edges, two.masks.edges)
        assert all(torch.equal(m, two.masks.weights[name]) for name, m in one.masks.weights.items())


@pytest.mark.parametrize(
    ("backbone", "share", "frozen"),
    [("gcn", 0.5, False), ("gcn", 1.0, True), ("gin", 0.5, False), ("gat", 0.5, False), ("gat", 1.0, True),
     ("sage", 0.5, False), ("resgcn", 0.5, False), ("resgcn", 1.0, True)],
)  # fmt: skip
def test_a_captured_training_gives_the_same_bits(recorder, monkeypatch, backbone, share, frozen):
    ahead = trained(backbone, share, frozen)
    assert (recorder.captured, recorder.replays) == (1, EPOCHS - WARM_UP)
    monkeypatch.setattr("acefast.train.capture_on", lambda device: None)
    fit, vals = trained(backbone, share, frozen)
    assert 0 < fit.best_epoch and len(set(vals)) > 3, "the metrics must differ, or this shows nothing"
    assert vals == ahead[1] and fit.val == max(vals) and fit.best_epoch == vals.index(fit.val)
    assert_same(fit, ahead[0])

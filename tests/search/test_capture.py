"""Epochs captured and replayed, with a recorder in place of a CUDA graph, give what epochs one by one give, to the bit."""

from dataclasses import replace

import pytest
import torch

from acefast.nn import GCN, Network
from acefast.search import run_search
from acefast.train import WARM_UP
from tests.captured import DATA, EPOCHS, SCHEDULE, Recorder, assert_same, stops_of, trained
from tests.stopping import Stop


@pytest.fixture
def recorder(monkeypatch):
    """Trainings are captured by it."""
    recorder = Recorder()
    monkeypatch.setattr("acefast.train.capture_on", lambda device: recorder)
    return recorder


@pytest.mark.parametrize(
    ("network", "share", "frozen"),
    [("gcn", 0.5, False), ("gcn", 1.0, True), ("gin", 0.5, False), ("gat", 0.5, False), ("gat", 1.0, True),
     ("sage", 0.5, False), ("resgcn", 0.5, False), ("resgcn", 1.0, True), ("recomputed", 0.5, False), ("narrow", 0.5, False)],
)  # fmt: skip
def test_a_captured_training_gives_the_same_bits(recorder, monkeypatch, network, share, frozen):
    ahead = trained(network, share, frozen)
    assert (recorder.captured, recorder.replays) == (1, EPOCHS - WARM_UP)
    monkeypatch.setattr("acefast.train.capture_on", lambda device: None)
    fit, vals = trained(network, share, frozen)
    assert 0 < fit.best_epoch and len(set(vals)) > 3, "the metrics must differ, or this shows nothing"
    assert vals == ahead[1] and fit.val == max(vals) and fit.best_epoch == vals.index(fit.val)
    assert_same(fit, ahead[0])


def test_a_captured_training_stands_where_the_other_does_and_each_goes_on_from_the_other(recorder, monkeypatch):
    monkeypatch.setattr("acefast.train.AHEAD", 5)
    ahead, some = stops_of()
    monkeypatch.setattr("acefast.train.capture_on", lambda device: None)
    fit, every = stops_of()
    assert_same(fit, ahead)
    assert set(every) == set(range(1, EPOCHS + 1)) > set(some) >= {WARM_UP, EPOCHS} and len(some) > 4
    for epochs, (facts, tensors) in some.items():
        assert facts == every[epochs][0] and tensors.keys() == every[epochs][1].keys()
        assert all(torch.equal(t, every[epochs][1][name]) for name, t in tensors.items())
    restored = lambda stop: trained("resgcn", on_start=lambda training: training.restore(*stop))[0]  # noqa: E731
    assert_same(fit, restored(sorted(some.items())[2][1]))
    monkeypatch.setattr("acefast.train.capture_on", lambda device: recorder)
    for epochs in (10, EPOCHS - 1, EPOCHS):
        assert_same(fit, restored(every[epochs]))
    assert recorder.captured == 2  # what is left after epoch 10; one epoch or none is not captured


def test_a_captured_search_is_the_same_and_goes_on_where_it_was_stopped(recorder, monkeypatch, tiny, tiny_config, tmp_path):
    monkeypatch.setattr("acefast.train.AHEAD", 4)
    config = tiny_config(method="ace", rounds=1, ace_rounds=2, mask_epochs=9, fix_epochs=9, ace_epochs=6)
    events, stopped = [], set()

    def progress(event):
        if event["event"] == "epoch":
            events.append(event)
            place = event["round"], event["stage"], event["model"], event["epoch"]
            if event["epoch"] in (2, 5, 7) and place not in stopped:
                stopped.add(place)
                raise Stop

    def work_off(out, **more):
        while True:
            try:
                return run_search(tiny, config, out, **more)
            except Stop:
                continue

    ahead = run_search(tiny, config, tmp_path / "ahead")
    assert recorder.captured > 4
    again = work_off(tmp_path / "stopped", progress=progress)
    monkeypatch.setattr("acefast.train.capture_on", lambda device: None)
    whole = run_search(tiny, config, tmp_path / "whole")
    assert len(stopped) > 4 and whole.history == ahead.history == again.history
    epochs = [[(line["round"], line["stage"], line["epochs"]) for line in run.timings] for run in (whole, ahead, again)]
    assert epochs[0] == epochs[1] == epochs[2]


def test_it_is_written_where_epochs_that_ran_ahead_passed_a_multiple(recorder, monkeypatch, tiny, tiny_config, tmp_path):
    monkeypatch.setattr("acefast.train.AHEAD", 4)
    written = []
    monkeypatch.setattr("acefast.search.trainings.Trainings.save", lambda self: written.append(self.epochs))
    run_search(tiny, tiny_config(method="dense", fix_epochs=12), tmp_path, checkpoint_epochs=5)
    assert written == [7, 11]  # 3 epochs, 4, 4 and one


class Given(Network):
    """A GCN that does not read the step where it lies but takes part in the forward as `use` says."""

    def __init__(self, use):
        super().__init__()
        self.inner, self.use = GCN(DATA.num_features, 8, DATA.num_classes, dropout=0.3, seed=2), use

    def maskable(self):
        return {f"inner.{name}": weight for name, weight in self.inner.maskable().items()}

    def forward(self, graph, x, edge_mask=None, edge_keep=None, weight_masks=None, weight_keep=None, seed=0, step=0):
        return self.use(self, self.inner(graph, x, edge_mask, edge_keep, {}, {}, seed, step))


class Counted(Given):
    """Its noise depends on how often the host called it."""

    calls = 0

    def forward(self, *args, seed=0, step=0, **kwargs):
        self.calls += self.training
        return super().forward(*args[:6], seed, self.calls)


def test_the_recorder_shows_an_epoch_that_depends_on_the_host(recorder, monkeypatch):
    counted = trained(model=Counted(lambda self, y: y))
    monkeypatch.setattr("acefast.train.capture_on", lambda device: None)
    fit, vals = trained(model=Counted(lambda self, y: y))
    assert recorder.captured == 1 and vals[:WARM_UP] == counted[1][:WARM_UP] and vals != counted[1]


ON_VALUES = {  # of the host's, or of tensors that reach the host
    "value": lambda y: y * float(y.detach().max() > -9),
    "flags": lambda y: y[y.abs().sum(1) > -1],
    "constant": lambda y: y * torch.tensor(1.0),
    "shape": lambda y: y.index_select(0, (y.sum(1) > -99).nonzero().squeeze(1)),
    "list": lambda y: y * (len(y.detach()[0].tolist()) / 3),
}


@pytest.mark.parametrize("use", ON_VALUES.values(), ids=ON_VALUES)
def test_the_recorder_refuses_what_a_graph_cannot_hold(recorder, use):
    with pytest.raises(RuntimeError, match="cannot be captured"):
        trained(model=Given(lambda self, y: use(y)))


def test_what_cannot_be_captured_is_not(monkeypatch, tiny):
    def refuse(device):
        raise AssertionError("it asked for a capture")

    monkeypatch.setattr("acefast.train.capture_on", refuse)
    labels = torch.stack((tiny.y == 0, tiny.y == 1), 1).float()
    trained(data=replace(tiny, y=labels, task="multilabel", metric="rocauc", num_classes=2))
    trained(fast=False)
    trained(schedule=replace(SCHEDULE, evaluate_every=2))
    assert trained(until=lambda masks: False)[0].best_epoch == EPOCHS - 1
    model = Given(lambda self, y: y)
    model.capturable = False
    trained(model=model)
    with pytest.raises(AssertionError, match="asked for"):
        trained()

"""Trainings on a GPU whose epochs are captured, against the same ones epoch by epoch."""

import pytest
import torch

from acefast.capture import CudaCapture
from acefast.train import WARM_UP
from tests.captured import DATA, EPOCHS, stops_of, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def captured(monkeypatch):
    """How often each graph that a training captures is replayed."""
    counts, capture = [], CudaCapture.capture

    def counting(self, run):
        replay = capture(self, run)
        counts.append(0)

        def count():
            counts[-1] += 1
            replay()

        return count

    monkeypatch.setattr(CudaCapture, "capture", counting)
    return counts


def assert_close(one, two):
    assert (one.best_epoch, one.val, one.test) == (two.best_epoch, two.val, two.test)
    assert one.val_loss == pytest.approx(two.val_loss, rel=1e-5)
    tensors = [[*fit.weights.values(), *([] if fit.masks is None else [fit.masks.edges])] for fit in (one, two)]
    torch.testing.assert_close(*tensors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["gcn", "gin", "gat", "sage", "resgcn", "recomputed", "narrow"])
@pytest.mark.parametrize("share, frozen", [(0.5, False), (1.0, True)])
def test_captured_epochs_are_the_same_training(captured, monkeypatch, network, share, frozen):
    data = DATA.to("cuda")
    ahead, seen = trained(network, share, frozen, data=data)
    assert captured == [EPOCHS - WARM_UP]
    monkeypatch.setattr("acefast.train.capture_on", lambda device: None)
    fit, vals = trained(network, share, frozen, data=data)
    assert vals == seen and captured == [EPOCHS - WARM_UP]
    assert_close(ahead, fit)


def test_a_captured_training_goes_on_from_where_one_stood(captured, monkeypatch):
    monkeypatch.setattr("acefast.train.AHEAD", 5)
    data = DATA.to("cuda")
    fit, stops = stops_of(data=data)
    for epochs in (WARM_UP, sorted(stops)[2]):
        again, _ = trained("resgcn", data=data, on_start=lambda training, stop=stops[epochs]: training.restore(*stop))
        assert_close(again, fit)
    assert len(captured) == 3

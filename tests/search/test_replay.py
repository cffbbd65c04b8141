"""Epochs on the CPU whose ops are called again in their place give what epochs as written give, to the bit."""

import weakref

import pytest
import torch

from acefast.capture import Recording
from acefast.train import WARM_UP, _OneByOne
from tests.captured import EPOCHS, assert_same, trained
from tests.search.test_capture import ON_VALUES, Counted, Given


@pytest.fixture
def replays(monkeypatch):
    """Names of the recorded functions, as they are replayed."""
    seen, record = [], Recording.record

    def recorded(self, run):
        given, replay = record(self, run)
        name = len(self._calls)
        return given, replay and (lambda: seen.append(name) or replay())

    monkeypatch.setattr(Recording, "record", recorded)
    return seen


def as_written(monkeypatch, **more):
    with monkeypatch.context() as patch:
        patch.setattr("acefast.train._Replayed", _OneByOne)
        return trained(**more)


@pytest.mark.parametrize(
    ("network", "share", "frozen"),
    [("gcn", 0.5, False), ("gcn", 1.0, True), ("gin", 0.5, False), ("gat", 0.5, False), ("gat", 1.0, True), ("sage", 0.5, False),
     ("wide", 0.01, False), ("resgcn", 0.5, False), ("resgcn", 1.0, True), ("recomputed", 0.5, False), ("narrow", 0.5, False)],
)  # fmt: skip
def test_a_replayed_training_gives_the_same_bits(replays, monkeypatch, network, share, frozen):
    fit, vals = trained(network, share, frozen)
    assert len(replays) == 2 * (EPOCHS - WARM_UP) - 3  # the first evaluation after the warm-up, then a step, are recorded
    assert all(one != two for one, two in zip(replays, replays[1:])), "in turn"
    other, expected = as_written(monkeypatch, network=network, share=share, frozen=frozen)
    assert vals == expected and len(set(vals)) > 2
    assert_same(fit, other)


@pytest.mark.parametrize("use", ON_VALUES.values(), ids=ON_VALUES)
@pytest.mark.parametrize("when", [True, False], ids=["step", "evaluation"])
def test_what_depends_on_values_is_not_replayed(replays, monkeypatch, use, when):
    def given():
        return Given(lambda self, y: use(y) if self.training == when else y)

    fit, vals = trained(model=given())
    other, expected = as_written(monkeypatch, model=given())
    assert vals == expected and not replays
    assert_same(fit, other)


def test_a_replay_that_depends_on_the_host_would_show(monkeypatch):
    _, vals = trained(model=Counted(lambda self, y: y))
    assert vals != as_written(monkeypatch, model=Counted(lambda self, y: y))[1]


def test_ops_are_called_again_on_what_is_there_now():
    x, total = torch.arange(12.0).reshape(3, 4), torch.zeros(4)
    leaf = torch.ones(4, requires_grad=True)
    handed = []

    def first():
        y = (x * leaf).relu()
        handed[:] = [y]
        z = y.detach().clone()
        z.t()[1:3].mul_(2.0)  # through a view of a view
        parts = z.chunk(2, dim=1)
        total.add_(parts[1].sum(0).repeat(2))
        return [z.max(0).values, torch.stack(parts), z.view(torch.int32).bitwise_not(), torch.ops.aten.split_copy.Tensor(z, 2)[1]]

    def second():
        handed[0].square().sum().backward()
        gradient, leaf.grad = leaf.grad, None
        return [gradient * 1.0]

    def results():
        return [t.clone() for run in (first, second) for t in run()]

    with torch.no_grad():
        expected = []
        for value in range(4):
            x.fill_(value - 1.5), x[0].fill_(value)
            with torch.enable_grad():
                expected.append([*results(), total.clone()])
    total.zero_()
    recording, replays = Recording(), []
    for value in range(4):
        x.fill_(value - 1.5), x[0].fill_(value)
        if replays:
            found = [t for replay in replays for t in replay()]
        else:
            found = []
            for run in (first, second):
                given, replay = recording.record(run)
                found += given
                replays.append(replay)
        assert recording.refused is None
        for t, other in zip([*found, total], expected[value], strict=True):
            assert torch.equal(t, other) and t.dtype == other.dtype


def test_memory_is_forgotten_after_its_last_use():
    x, alive = torch.ones(1000), []

    def run():
        y = x
        for _ in range(5):
            y = y * 2.0
        return [y.sum()]

    recording = Recording()
    _, replay = recording.record(run)
    calls = recording._calls

    def spied(function):
        def call(*args, **kwargs):
            alive.append(sum(ref() is not None for ref in refs))
            made = function(*args, **kwargs)
            refs.append(weakref.ref(made))
            return made

        return call

    refs = []
    calls[:] = [(spied(function), *rest) for function, *rest in calls]
    assert replay()[0] == 32_000 and max(alive) == 1, alive
    assert [t is None for t in recording._made] == [True] * 5 + [False]

"""Stopping within a stage: trainings go on at the epoch where they were, to the bit; what does not belong is not trusted."""

import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from acefast.data import synthetic_citation
from acefast.errors import InputError
from acefast.kept import KeptWeights
from acefast.nn import build, state_of
from acefast.pruning import Pattern, SoftMasks
from acefast.search import Run, find_ticket, run_search, trainings
from acefast.search import rounds as round_loop
from acefast.search.folder import Folder, read_state, write_state
from acefast.train import Schedule, train
from tests.stopping import Stop

SEARCHES = {
    "ace": dict(method="ace", protect=1, carry=0.5),
    "ace-none": dict(method="ace", complement="none", edge_score="share"),
    "ace-crossed": dict(method="ace", complement="crossed", axes="joint"),
    "released": dict(method="ace", preset="released"),
    "links": dict(method="ace", task="link", embedding=4, score="gradient", links=60),
    "learned": dict(method="ugs", features="learned"),
    "deep": dict(method="ace", backbone="resgcn", layers=3, lr=0.02, fix_lr=0.01),
    "noise": dict(method="ugs", noise_check=1),
    "best-of-n": dict(method="ugs-best"),
}


def contents(folder):
    """Bytes of all that must be reproducible: history and tickets."""
    return {path.name: path.read_bytes() for path in (folder / "history.jsonl", *sorted((folder / "tickets").iterdir()))}


def epochs_of(folder):
    return [(line["round"], line["stage"], line["epochs"]) for line in Run.load(folder).timings]


def stopping_once_at_each(*kinds):
    """(a callback that stops the search when it first comes to each event of these kinds, what it stopped at, the epochs that it
    saw)."""
    seen, epochs = set(), []

    def progress(event):
        if event["event"] == "epoch":
            epochs.append(event)
        place = tuple(event.get(name) for name in ("event", "round", "stage", "model", "epoch", "done"))
        if event["event"] in kinds and place not in seen:
            seen.add(place)
            raise Stop

    return progress, seen, epochs


def work_off(times, *args, **more):
    for _ in range(times):
        try:
            return run_search(*args, **more)
        except Stop:
            continue
    raise AssertionError("it did not end")


@pytest.mark.parametrize("name", SEARCHES)
def test_stopping_after_every_epoch_gives_the_same_bits_and_trains_none_twice(tiny, tiny_config, tmp_path, name):
    config = tiny_config(**{**dict(rounds=1, ace_rounds=2, mask_epochs=3, fix_epochs=3), **SEARCHES[name]})
    run_search(tiny, config, tmp_path / "whole")
    progress, seen, epochs = stopping_once_at_each("epoch", "training", "candidate")
    run = work_off(400, tiny, config, tmp_path / "stopped", progress)
    assert run.complete and contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert epochs_of(tmp_path / "stopped") == epochs_of(tmp_path / "whole")
    assert len(epochs) == sum(count for *_, count in epochs_of(tmp_path / "whole")) < len(seen)
    assert not (tmp_path / "stopped" / "training.safetensors").exists()


def test_a_training_that_tells_its_epochs_begins_anew_with_the_same_end(tiny, tiny_config, tmp_path):
    config = tiny_config(method="gebt", rounds=1)
    whole = run_search(tiny, config)
    progress, _, epochs = stopping_once_at_each("epoch")
    run = work_off(50, tiny, config, tmp_path, progress)
    assert run.history == whole.history and len(epochs) > sum(line["epochs"] for line in run.timings)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on by a second whenever it is read."""
    now = [0.0]

    def monotonic():
        now[0] += 1.0
        return now[0]

    for module in (trainings, round_loop):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=monotonic, perf_counter=lambda: now[0]))


def test_a_time_limit_leaves_a_run_that_goes_on(tiny, tiny_config, tmp_path, ticking):
    whole = run_search(tiny, tiny_config(), tmp_path / "whole")
    runs = []
    while not runs or not runs[-1].complete:
        runs.append(run_search(tiny, tiny_config(), tmp_path / "limited", time_limit=9))
        assert len(runs) < 100
    assert len(runs) > 5 and runs[-1].history == whole.history
    assert contents(tmp_path / "limited") == contents(tmp_path / "whole")
    assert epochs_of(tmp_path / "limited") == epochs_of(tmp_path / "whole")
    assert not run_search(tiny, tiny_config(), tmp_path / "none", time_limit=0).rounds
    assert run_search(tiny, tiny_config(), tmp_path / "part", time_limit=25).rounds
    assert run_search(tiny, tiny_config(), tmp_path / "limited", time_limit=0).complete
    assert Run.load(tmp_path / "limited").complete and not Run.load(tmp_path / "part").complete


def test_a_run_in_memory_stops_by_its_limit_too(tiny, tiny_config, ticking):
    short = dict(rounds=9, mask_epochs=4, fix_epochs=4, threads=1)
    run = find_ticket(tiny, "gcn", "ugs", time_limit=40, **short)
    assert not run.complete and 0 < len(run.rounds) < 10 and len(run.tickets) == len(run.rounds) - 1


@pytest.mark.parametrize("what, says", [(dict(time_limit=-1), "time_limit must be 0 or more seconds, got -1"),
                                        (dict(time_limit=float("nan")), "time_limit must be"),
                                        (dict(checkpoint_epochs=0), "checkpoint_epochs must be 1 or more, got 0")])  # fmt: skip
def test_what_cannot_be_is_refused_and_leaves_no_folder(tiny, tiny_config, tmp_path, what, says):
    with pytest.raises(InputError, match=says):
        run_search(tiny, tiny_config(), tmp_path / "run", **what)
    assert not (tmp_path / "run").exists()


def test_it_is_written_by_the_minute_or_by_epochs(tiny, tiny_config, tmp_path, monkeypatch, ticking):
    written = []
    keep = Folder.keep_training
    monkeypatch.setattr(Folder, "keep_training", lambda self, state: written.append(state) or keep(self, state))
    config = tiny_config(method="dense", fix_epochs=200)
    run_search(tiny, config, tmp_path / "minutes")
    by_minute = [state.values["running"]["epochs"] for state in written]
    assert len(by_minute) == 3 and all(50 <= b - a <= 65 for a, b in zip([0, *by_minute], by_minute))
    written.clear()
    run_search(tiny, config, tmp_path / "epochs", checkpoint_epochs=70)
    assert [state.values["running"]["epochs"] for state in written] == [70, 140]


def test_a_short_search_never_writes_it(tiny, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Folder, "keep_training", lambda self, state: pytest.fail("written"))
    run_search(tiny, tiny_config(), tmp_path)


@pytest.fixture
def stopped(tiny, tiny_config, tmp_path):
    """(folder, what it must end with): stopped in round 1 within the second training of an ACE round."""

    def stop(event):
        if event["event"] == "epoch" and (event["round"], event["stage"], event["model"]) == (1, "ace-2", "complement"):
            raise Stop

    run_search(tiny, tiny_config(), tmp_path / "whole")
    with pytest.raises(Stop):
        run_search(tiny, tiny_config(), tmp_path / "run", stop)
    return tmp_path / "run", contents(tmp_path / "whole")


def damaged(path, how, tiny, tiny_config, tmp_path):
    whole = path.read_bytes()
    if how == "cut short":
        path.write_bytes(whole[:-9])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "noise":
        path.write_bytes(bytes(range(256)) * 20)
    elif how == "a bit of a tensor":
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    elif how == "a digit of the record":
        path.write_bytes(whole.replace(b'\\"epochs\\": 1', b'\\"epochs\\": 2', 1))
        assert path.read_bytes() != whole
    elif how == "a checkpoint":
        shutil.copy(path.parent / "checkpoint.safetensors", path)
    elif how == "other tensors":
        state = read_state(path)
        state.tensors["running/tracked/0"] = torch.zeros(3)
        write_state(path, state)
    elif how == "other trainings":
        state = read_state(path)
        state.values["finished"][0]["key"]["lr"] = 7.0
        write_state(path, state)
    elif how == "another run":
        with pytest.raises(Stop):
            run_search(tiny, tiny_config(seed=4), tmp_path / "other", stopping_once_at_each("epoch")[0])
        shutil.copy(tmp_path / "other" / path.name, path)


HOW = ["cut short", "empty", "noise", "a bit of a tensor", "a digit of the record", "a checkpoint", "other tensors",
       "other trainings", "another run"]  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_what_is_damaged_or_foreign_is_left_with_one_sentence(tiny, tiny_config, tmp_path, stopped, how):
    folder, expected = stopped
    damaged(folder / "training.safetensors", how, tiny, tiny_config, tmp_path)
    with pytest.warns(UserWarning, match="it is removed, and what it held is trained anew") as caught:
        run_search(tiny, tiny_config(), folder)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert contents(folder) == expected and not (folder / "training.safetensors").exists()


def test_whole_it_goes_on_and_a_kill_after_the_commit_leaves_nothing_to_say(tiny, tiny_config, stopped, monkeypatch):
    folder, expected = stopped
    path = folder / "training.safetensors"
    values = read_state(path).values
    assert [fit["key"]["model"] for fit in values["finished"]] == ["retained"] and values["running"]["epochs"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with monkeypatch.context() as patched:  # killed between the commit of the stage and the removal
            patched.setattr(Folder, "drop_training", lambda self: (_ for _ in ()).throw(Stop))
            with pytest.raises(Stop):
                run_search(tiny, tiny_config(), folder)
        assert path.exists()
        run_search(tiny, tiny_config(), folder)
    assert contents(folder) == expected and not path.exists()


DATA = synthetic_citation(
    400, 60, 3, seed=2, num_edges=800, words=6.0, train_per_class=6, num_val=40, num_test=50, name="small"
)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("backbone", "hidden", "share", "frozen"),
    [("gcn", 16, 0.5, False), ("gcn", 16, 1.0, True), ("gcn", 512, 0.01, False), ("gcn", 512, 0.01, True),
     ("gat", 8, 0.5, False), ("resgcn", 8, 0.5, False), ("gcn", 8, 0.0, False)],
)  # fmt: skip
def test_a_training_goes_on_from_any_epoch_to_the_bit(backbone, hidden, share, frozen, fast):
    draw = torch.Generator().manual_seed(3)
    layers = 3 if backbone == "resgcn" else 2
    model = build(backbone, DATA.num_features, DATA.num_classes, hidden=hidden, layers=layers, seed=2)
    start = {name: value.clone() for name, value in state_of(model).items()}
    full = Pattern.full(DATA.graph.num_edges, model.maskable())
    pattern = full.map(lambda t: torch.rand(t.shape, generator=draw) < share)
    if hidden == 512:
        assert KeptWeights.pays(pattern.weights["layers.0.lin.weight"], DATA.x)
    schedule, stops = Schedule(12, lr=0.02, weight_decay=5e-4, mask_lr=0.01, s1=1e-3, s2=1e-3), {}

    def fit(on_start=None, on_epochs=None):
        masks = None if frozen else SoftMasks.init(pattern, 1e-5, lambda name: torch.Generator().manual_seed(1))
        return train(model, DATA, schedule, start, pattern, masks, 4, True, on_epochs, fast, on_start=on_start)

    at_work = []

    def keep(epoch, vals):
        training = at_work[0]
        stops[epoch] = training.facts(), {name: t.clone() for name, t in training.tensors().items()}

    whole = fit(at_work.append, keep)
    after = {name: value.clone() for name, value in state_of(model).items()}
    for epoch in (0, 6, 11):
        seen = []
        again = fit(lambda training, stop=stops[epoch]: training.restore(*stop), lambda *e: seen.append(e[0]))
        assert seen == list(range(epoch + 1, 12))
        numbers = [[getattr(one, name) for name in ("best_epoch", "val", "val_loss", "test", "seed")] for one in (whole, again)]
        assert numbers[0] == numbers[1]
        for name, value in state_of(model).items():
            assert torch.equal(value, after[name]) and torch.equal(again.weights[name], whole.weights[name])
        if not frozen:
            assert torch.equal(again.masks.edges, whole.masks.edges)
            assert all(torch.equal(again.masks.weights[name], m) for name, m in whole.masks.weights.items())


def test_the_tensors_of_another_training_are_refused_and_change_nothing(tiny):
    model = build("gcn", tiny.num_features, tiny.num_classes, hidden=8, seed=2)
    start = {name: value.clone() for name, value in state_of(model).items()}

    def refuse(training):
        before = {name: t.clone() for name, t in training.tensors().items()}
        facts = training.facts() | {"epochs": 3, "best_epoch": 1}
        with pytest.raises(InputError, match="of another training"):
            training.restore(facts, training.tensors())
        assert training.epochs == 0 and all(torch.equal(t, before[name]) for name, t in training.tensors().items())

    schedule = Schedule(4, lr=0.05)
    one, two = train(model, tiny, schedule, start), train(model, tiny, schedule, start, on_start=refuse)
    assert replace(one, weights=None).__dict__ == replace(two, weights=None).__dict__

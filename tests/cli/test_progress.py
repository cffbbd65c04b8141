"""Progress on and off a terminal, fed with the events of a search."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from acefast import progress
from acefast.progress import SearchProgress, clock


@pytest.fixture
def now(monkeypatch):
    """A clock that the test turns: now[0] is the time in seconds."""
    time = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: time[0]))
    return time


def play(shown, now, rounds=2, done=0, stages=("imp", "retrain"), seconds=10.0, epochs=None):
    shown({"event": "run", "rounds": rounds, "stages": list(stages), "done": done, "epochs": epochs})
    for k in range(done, rounds + 1):
        for stage in stages if k else ["dense"]:
            shown({"event": "stage", "round": k, "stage": stage})
            shown({"event": "training", "round": k, "stage": stage, "model": stage, "epochs": 2, "done": 0})
            for epoch in (1, 2):
                now[0] += seconds / 2
                shown(
                    {
                        "event": "epoch",
                        "round": k,
                        "stage": stage,
                        "model": stage,
                        "epoch": epoch,
                        "epochs": 2,
                        "val": 0.5,
                    }
                )
            if stage in ("dense", "retrain"):
                kept = {"edges_kept": 95 if k else 100, "edges_total": 100, "weights_kept": 8, "weights_total": 10}
                shown({"event": "round", "round": k, **kept, "val": 0.8, "test": 0.7})
            shown({"event": "stage_end", "round": k, "stage": stage})


def test_plain_lines_are_one_a_round_with_the_time_left(now):
    out = io.StringIO()
    with SearchProgress("ugs", Console(file=out, width=60)) as shown:
        play(shown, now)
    what = "5.00 % of edges removed, 20.00 % of weights removed, val 80.00 %, test 70.00 %"
    assert out.getvalue().splitlines() == [
        "ugs: dense baseline: val 80.00 %, test 70.00 %; 00:10 elapsed",
        f"ugs: round 1 of 2: {what}; 00:30 elapsed, about 00:20 left",
        f"ugs: round 2 of 2: {what}; 00:50 elapsed",
    ]


def test_the_time_left_is_known_from_the_first_epoch_where_the_epochs_are(now):
    out = io.StringIO()
    with SearchProgress("ugs", Console(file=out, width=60)) as shown:
        play(shown, now, epochs=10)
    left = [line.split("; ")[1] for line in out.getvalue().splitlines()]
    assert left == ["00:10 elapsed, about 00:40 left", "00:30 elapsed, about 00:20 left", "00:50 elapsed"]


def test_a_training_that_goes_on_counts_what_is_left_and_long_ones_tell_their_epoch(now):
    out = io.StringIO()
    training = {"round": 0, "stage": "dense", "model": "dense", "epochs": 100}
    with SearchProgress("ugs", Console(file=out, width=60)) as shown:
        shown({"event": "run", "rounds": 1, "stages": ["imp"], "done": 0, "epochs": 300})
        shown({"event": "stage", "round": 0, "stage": "dense"})
        shown({"event": "training", **training, "done": 40})
        for epoch in range(41, 46):
            now[0] += 100.0
            shown({"event": "epoch", **training, "epoch": epoch, "val": 0.5})
    assert out.getvalue().splitlines() == [
        "ugs: going on after epoch 40 of 100, dense baseline",
        "ugs: epoch 44 of 100, dense baseline; 06:40 elapsed, about 7:06:40 left",
    ]


def test_the_bar_shows_the_last_evaluation(now):
    training = {"round": 0, "stage": "dense", "model": "dense", "epochs": 100}
    with SearchProgress("ugs", Console(file=io.StringIO(), width=60, force_terminal=True)) as shown:
        shown({"event": "run", "rounds": 1, "stages": ["imp"], "done": 0, "epochs": 300})
        shown({"event": "stage", "round": 0, "stage": "dense"})
        for _ in range(2):
            shown({"event": "training", **training, "done": 0})
            for epoch, val, text in ((1, None, "epoch 1/100"), (2, 0.5, "epoch 2/100, val 50.0 %"), (3, None, "epoch 3/100, val 50.0 %")):
                shown({"event": "epoch", **training, "epoch": epoch, "val": val})
                task = next(task for task in shown.bars.tasks if task.id == shown.training)
                assert (task.fields["text"], task.completed) == (text, epoch)


def test_long_stages_are_announced(now):
    out = io.StringIO()
    with SearchProgress("ugs", Console(file=out, width=60)) as shown:
        play(shown, now, rounds=1, seconds=100.0)
    assert "ugs: round 1 of 1, retrain; 03:20 elapsed" in out.getvalue().splitlines()


def test_resumed_and_complete_runs(now):
    out = io.StringIO()
    with SearchProgress("ugs", Console(file=out)) as shown:
        play(shown, now, done=2)
    assert out.getvalue().startswith("ugs: going on with round 2 of 2\n") and not shown.was_complete
    with SearchProgress("ugs", Console(file=out)) as shown:
        play(shown, now, done=3)
    assert shown.was_complete


def test_a_terminal_gets_bars(now):
    out = io.StringIO()
    with SearchProgress("ugs", Console(file=out, width=90, force_terminal=True)) as shown:
        play(shown, now)
        assert shown.bars.tasks[0].total == 5 and shown.bars.tasks[0].completed == 4
        assert shown.bars.tasks[1].fields["text"] == "epoch 2/2, val 50.0 %"
    assert "━" in out.getvalue()


@pytest.mark.parametrize("seconds, text", [(0, "00:00"), (61.4, "01:01"), (3599.7, "1:00:00"), (36061, "10:01:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text

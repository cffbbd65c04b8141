"""Whole searches on a tiny graph: counts, axes, resuming, what a folder refuses."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import acefast
from acefast.errors import InputError
from acefast.nn import GCN
from acefast.pruning import ladder
from acefast.search import rounds as round_loop
from acefast.search import Run, find_ticket, load_config, resolve_config, run_search

METHODS = [("dense", "paper"), ("ugs", "paper"), ("ace", "paper"), ("ace", "released")]


def contents(folder):
    """Bytes of all that must be reproducible: history and tickets."""
    files = [folder / "history.jsonl", *sorted((folder / "tickets").iterdir())]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("method", ["ugs", "ace"])
def test_counts_are_exactly_the_ladder_over_20_rounds(tiny, tiny_config, method):
    config = tiny_config(method=method, rounds=20, mask_epochs=1, fix_epochs=1, ace_epochs=1, ace_rounds=1)
    run = run_search(tiny, config)
    rounds = run.rounds
    assert [r["round"] for r in rounds] == list(range(21))
    assert [r["edges_kept"] for r in rounds] == ladder(tiny.graph.num_edges, 0.05, 20)
    assert [r["weights_kept"] for r in rounds] == ladder(8 * (30 + 3), 0.2, 20)


def test_ladder_is_exact_when_all_scores_tie(tiny, tiny_config):
    config = tiny_config(method="ugs", rounds=5, mask_epochs=1, fix_epochs=1, mask_noise=0.0, lr=1e-30, s1=0.0, s2=0.0)
    rounds = run_search(tiny, config).rounds
    assert [r["edges_kept"] for r in rounds] == ladder(tiny.graph.num_edges, 0.05, 5)
    assert [r["weights_kept"] for r in rounds] == ladder(8 * (30 + 3), 0.2, 5)


@pytest.mark.parametrize("method", ["ugs", "ace"])
@pytest.mark.parametrize("axes", ["edges", "weights"])
def test_a_single_axis_leaves_the_other_whole(tiny, tiny_config, axes, method):
    run = run_search(tiny, tiny_config(method=method, axes=axes))
    ticket = run.ticket(2)
    other = "weights" if axes == "edges" else "edges"
    assert all(r[f"{other}_kept"] == r[f"{other}_total"] for r in run.rounds)
    assert run.rounds[2][f"{axes}_kept"] < run.rounds[1][f"{axes}_kept"] < run.rounds[0][f"{axes}_kept"]
    whole = list(ticket.weight_keep.values()) if axes == "edges" else [ticket.edge_keep]
    assert all(bool(keep.all()) for keep in whole)
    assert not any(f"{other}_exchanged" in event for event in run.history)


def test_tickets_hold_what_the_history_says(tiny, tiny_config, tmp_path):
    run = run_search(tiny, tiny_config(), tmp_path / "run")
    for number, event in enumerate(run.rounds):
        if number:
            ticket = run.ticket(number)
            assert int(ticket.edge_keep.sum()) == event["edges_kept"]
            assert sum(int(k.sum()) for k in ticket.weight_keep.values()) == event["weights_kept"]
            assert ticket.metadata["val"] == event["val"]
            assert ticket.metadata["config_hash"] == run.config.hash()
            assert ticket.metadata["fingerprint"] == tiny.graph.fingerprint()
    loaded = Run.load(tmp_path / "run")
    assert loaded.history == run.history
    assert loaded.config == run.config
    assert {t["stage"] for t in loaded.timings} == {"dense", "imp", "ace-1", "ace-2", "ace-3", "candidate", "retrain"}
    with pytest.raises(InputError, match="tickets of rounds 1 to 2"):
        loaded.ticket(3)


def test_same_search_twice_gives_the_same_bits_in_memory_and_on_disk(tiny, tiny_config, tmp_path):
    one, two = run_search(tiny, tiny_config(), tmp_path / "one"), run_search(tiny, tiny_config())
    assert one.history == two.history
    for a, b in zip(one.tickets, two.tickets, strict=True):
        assert torch.equal(a.edge_keep, b.edge_keep)
        assert all(torch.equal(a.weight_keep[name], b.weight_keep[name]) for name in b.weight_keep)
        assert all(torch.equal(a.rewind[name], b.rewind[name]) for name in b.rewind)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["stage_end", "stage", "epoch"])
@pytest.mark.parametrize(("method", "preset"), METHODS)
def test_resuming_after_every_boundary_gives_the_same_bits(tiny, tiny_config, tmp_path, method, preset, kind):
    config = tiny_config(method=method, preset=preset)
    undisturbed = tmp_path / "undisturbed"
    run_search(tiny, config, undisturbed)

    folder = tmp_path / "killed"
    seen = set()

    def kill_once_at_each(event):
        place = (event["event"], event.get("round"), event.get("stage"), event.get("model"))
        if event["event"] == kind and place not in seen:
            seen.add(place)
            raise Killed

    for _ in range(200):
        try:
            run_search(tiny, config, folder, kill_once_at_each)
            break
        except Killed:
            continue
    assert len(seen) >= len({(t["round"], t["stage"]) for t in Run.load(undisturbed).timings})
    assert contents(folder) == contents(undisturbed)
    before = contents(folder)
    run_search(tiny, config, folder)
    assert contents(folder) == before


WORKER = """
import os, signal, sys
from acefast.data import synthetic_citation
from acefast.search import resolve_config, run_search
data = synthetic_citation(80, 30, 3, num_edges=160, words=6.0, train_per_class=6, num_val=20, num_test=24)
settings = dict(hidden=8, rounds=2, mask_epochs=20, fix_epochs=20, ace_epochs=5, ace_rounds=3, threads=1)
config = resolve_config("tiny", **settings)
events = 0
def progress(event):
    global events
    events += 1
    if events == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
run_search(data, config, sys.argv[1], progress, checkpoint_epochs=1)
"""


def work(folder, kill_at=0):
    """Run the search in a process of its own, which SIGKILLs itself at the given event; its exit status."""
    return subprocess.run([sys.executable, "-c", WORKER, str(folder), str(kill_at)], timeout=300).returncode


@pytest.fixture(scope="module")
def undisturbed():
    with tempfile.TemporaryDirectory() as folder:
        assert work(Path(folder) / "run") == 0
        yield contents(Path(folder) / "run")


@pytest.mark.parametrize("event", [40, 150])
def test_sigkill_and_rerun_gives_the_same_bits(tmp_path, undisturbed, event):
    assert work(tmp_path, event) == -signal.SIGKILL
    assert work(tmp_path) == 0
    assert contents(tmp_path) == undisturbed
    assert not list(tmp_path.rglob(".*.tmp"))


def test_being_stopped_before_any_write_gives_the_same_bits(tiny, tiny_config, tmp_path, monkeypatch):
    config = tiny_config(rounds=1, ace_rounds=1)
    run_search(tiny, config, tmp_path / "undisturbed")
    replace, calls = os.replace, 0

    def stop_before(number):
        def stopping(source, target):
            nonlocal calls
            calls += 1
            if calls == number:
                raise Killed
            replace(source, target)

        return stopping

    for number in range(1, 100):
        folder, calls = tmp_path / str(number), 0
        monkeypatch.setattr(os, "replace", stop_before(number))
        try:
            run_search(tiny, config, folder, checkpoint_epochs=1)
        except Killed:
            monkeypatch.setattr(os, "replace", replace)
            run_search(tiny, config, folder)
            assert contents(folder) == contents(tmp_path / "undisturbed"), number
        else:
            break
    assert number > 40  # config, the trainings at each epoch, per stage checkpoint, summary, history and timings, and a ticket


def test_a_half_written_state_is_mended(tiny, tiny_config, tmp_path):
    """Derived files that lag behind the checkpoint, as after a kill between two writes, are rewritten from it."""
    config = tiny_config(method="ugs")
    run_search(tiny, config, tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "history.jsonl").write_text("")
    (tmp_path / "checkpoint.json").unlink()
    (tmp_path / "tickets" / ".round-02.safetensors.1.tmp").write_bytes(b"half")
    run_search(tiny, config, tmp_path)
    assert contents(tmp_path) == whole
    assert (tmp_path / "checkpoint.json").exists()


def test_a_folder_of_another_search_is_refused_and_left_as_it_is(tiny, tiny_config, tmp_path):
    run_search(tiny, tiny_config(method="ugs"), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"holds a search with seed = 3 \(now 4\)"):
        run_search(tiny, tiny_config(method="ugs", seed=4), tmp_path)
    other = tiny.with_row_normalized_features()
    with pytest.raises(InputError, match="another data set"):
        run_search(other, tiny_config(method="ugs"), tmp_path)
    model = GCN(tiny.num_features, 8, tiny.num_classes, seed=99)
    with pytest.raises(InputError, match="other first weights"):
        run_search(tiny, tiny_config(method="ugs"), tmp_path, model=model)
    assert contents(tmp_path) == before


def test_going_on_in_another_environment_is_said(tiny, tiny_config, tmp_path):
    def stop(event):
        if event["event"] == "stage_end" and event["round"] == 1:
            raise Killed

    with pytest.raises(Killed):
        run_search(tiny, tiny_config(), tmp_path, stop)
    with acefast.backend("torch"), pytest.warns(UserWarning, match="backend auto"):
        run_search(tiny, tiny_config(), tmp_path)


def test_a_folder_with_other_files_is_refused(tiny, tiny_config, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds files of no search"):
        run_search(tiny, tiny_config(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "config.toml").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot use"):
        run_search(tiny, tiny_config(), tmp_path / "file")


def test_two_writers_are_refused(tiny, tiny_config, tmp_path):
    def second(event):
        if event["event"] == "stage":
            run_search(tiny, tiny_config(), tmp_path)

    with pytest.raises(InputError, match="another process is running"):
        run_search(tiny, tiny_config(), tmp_path, second)


def test_a_damaged_checkpoint_is_refused(tiny, tiny_config, tmp_path):
    run_search(tiny, tiny_config(method="ugs"), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    before = contents(tmp_path)
    with pytest.raises(InputError, match="not a whole checkpoint"):
        run_search(tiny, tiny_config(method="ugs"), tmp_path)
    assert contents(tmp_path) == before


def test_an_edited_config_is_refused(tiny, tiny_config, tmp_path):
    run_search(tiny, tiny_config(method="ugs"), tmp_path)
    path = tmp_path / "config.toml"
    path.write_text(path.read_text().replace("seed = 3", "seed = 4"))
    with pytest.raises(InputError, match="was changed"):
        run_search(tiny, tiny_config(method="ugs", seed=4), tmp_path)


def test_history_lines_are_strict_json_and_carry_no_times(tiny, tiny_config, tmp_path):
    run_search(tiny, tiny_config(), tmp_path)
    events = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert {"imp", "candidate", "ace_round", "round"} == {e["event"] for e in events}
    assert not any("second" in key for event in events for key in event)
    timings = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert all(t["seconds"] >= 0 for t in timings)


def test_find_ticket_with_own_model_and_own_method(tiny):
    from acefast.search.stages import imp, retrain

    model = GCN(tiny.num_features, 6, tiny.num_classes, seed=7)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    short = dict(rounds=1, mask_epochs=2, fix_epochs=2, threads=1)
    run = find_ticket(tiny, model, lambda config: [("imp", imp), ("retrain", retrain)], **short)
    assert len(run.rounds) == 2
    assert all(torch.equal(run.ticket(1).rewind[name], first[name]) for name in first)
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters())
    with pytest.raises(InputError, match="within config"):
        find_ticket(tiny, "gcn", "ugs", resolve_config("cora"), rounds=3)


def test_an_unavailable_device_is_refused(tiny, tiny_config):
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            run_search(tiny, tiny_config(device="cuda"))


def test_a_ladder_goes_on_by_itself_as_long_as_its_last_rung_wins(tiny, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(round_loop, "LADDER", 2)
    plan = []

    def progress(event):
        if event["event"] in ("run", "rounds"):
            plan.append(event["rounds"])

    run = run_search(tiny, tiny_config(method="ugs", rounds="auto", fix_epochs=9), tmp_path / "auto", progress)
    vals = [event["val"] for event in run.rounds]
    wins = [val > vals[0] - round_loop.MARGIN for val in vals]
    kept = [event["edges_kept"] + event["weights_kept"] for event in run.rounds]
    removed = [None] + [after < before for before, after in zip(kept, kept[1:])]
    assert all(w and r for w, r in zip(wins[2:-1], removed[2:-1])) and not (wins[-1] and removed[-1])
    assert plan == list(range(2, len(vals))) and len(vals) > 4
    assert load_config(tmp_path / "auto" / "config.toml").rounds == "auto"
    assert run_search(tiny, tiny_config(method="ugs", rounds="auto", fix_epochs=9), tmp_path / "auto").rounds == run.rounds


def test_a_ladder_that_always_wins_ends_where_nothing_is_left_to_remove(tiny_config):
    event = {"event": "round", "edges_kept": 9, "weights_kept": 4, "val": 0.8}
    config = tiny_config(rounds="auto")
    history = [event | {"weights_kept": 90 - k} for k in range(21)]
    assert round_loop.last_round(config, history[:5]) == 20
    assert round_loop.last_round(config, history) == 21
    assert round_loop.last_round(config, [*history, history[-1]]) == 21
    assert round_loop.last_round(config, [*history[:-1], history[-1] | {"val": 0.7949}]) == 20


def test_files_have_the_permissions_that_the_user_gives_new_ones(tiny, tiny_config, tmp_path):
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    run_search(tiny, tiny_config(rounds=1), tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"checkpoint.safetensors", "round-01.safetensors", "history.jsonl"}
    assert all(path.stat().st_mode == expected for path in files)

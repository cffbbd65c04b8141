"""Ctrl-C and SIGTERM leave a folder that the same command takes to the same end."""

import signal
import time

import pytest

from acefast import cli
from acefast.search.folder import read_state


def wait_for(path, process, text):
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and text in path.read_bytes():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not come: {process.communicate()}")


def test_stopped_search_resumes_to_the_same_end(acefast, start, small, tmp_path):
    args = ["search", *small, "--method", "ace", "--ace-rounds", 1, "--rounds", 4, "--out"]
    whole = acefast(*args, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    folder = tmp_path / "stopped"
    for number, status, name, round_ in ((signal.SIGTERM, 143, "SIGTERM", 0), (signal.SIGINT, 130, "Ctrl-C", 2)):
        process = start(*args, folder)
        wait_for(folder / "history.jsonl", process, f'"event": "round", "round": {round_}'.encode())
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, (process.returncode, err)
        assert err == f"acefast: stopped by {name}; the same command goes on from the last epoch that was saved\n"
        assert not (folder / "report.md").exists()

    resumed = acefast(*args, folder)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on with round" in resumed.stdout
    assert (folder / "history.jsonl").read_bytes() == (tmp_path / "whole" / "history.jsonl").read_bytes()
    tickets = sorted(path.name for path in (folder / "tickets").iterdir())
    assert tickets == [f"round-{k:02d}.safetensors" for k in range(1, 5)]
    for name in tickets:
        assert (folder / "tickets" / name).read_bytes() == (tmp_path / "whole" / "tickets" / name).read_bytes()


def test_a_signal_within_a_training_lets_the_epoch_end_and_loses_none(acefast, start, small, tmp_path, capsys):
    args = ["search", *small, "--method", "dense", "--fix-epochs", 600, "--checkpoint-epochs", 100, "--out"]
    assert acefast(*args, tmp_path / "whole").returncode == 0
    folder = tmp_path / "stopped"
    process = start(*args, folder)
    wait_for(folder / "training.safetensors", process, b"")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, (out, err)
    saved = read_state(folder / "training.safetensors").values
    assert 100 <= saved["running"]["epochs"] < 600
    assert cli.main([*map(str, args[:-1]), "--time-limit", "0", "--out", str(folder)]) == 3
    says = f"acefast: the time limit came before the end of {folder}; the same command goes on from there\n"
    assert capsys.readouterr().err == says
    resumed = acefast(*args, folder)
    assert resumed.returncode == 0 and f"going on after epoch {saved['running']['epochs']} of 600" in resumed.stdout
    assert (folder / "history.jsonl").read_bytes() == (tmp_path / "whole" / "history.jsonl").read_bytes()
    assert not (folder / "training.safetensors").exists()


def test_a_signal_waits_for_the_next_event_and_comes_at_once_the_second_time():
    told, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(cli.Stopped), cli._stopping_between_events(told.append) as tell:
        tell("one")
        signal.raise_signal(signal.SIGTERM)
        tell("two")
    with pytest.raises(cli.Stopped), cli._stopping_between_events(told.append):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # as a terminal's Ctrl-C beside a grid's SIGTERM
        told.append("three")
        signal.raise_signal(signal.SIGTERM)
        told.append("four")
    assert told == ["one", "two", "three"] and signal.getsignal(signal.SIGTERM) is before

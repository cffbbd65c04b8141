"""Ctrl-C and SIGTERM leave a folder that the same command takes to the same end."""

import signal
import time


def wait_for(path, process, text):
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and text in path.read_text():
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
        wait_for(folder / "history.jsonl", process, f'"event": "round", "round": {round_}')
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, (process.returncode, err)
        assert err == f"acefast: stopped by {name}; the same command goes on from the last finished stage\n"
        assert not (folder / "report.md").exists()

    resumed = acefast(*args, folder)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on with round" in resumed.stdout
    assert (folder / "history.jsonl").read_bytes() == (tmp_path / "whole" / "history.jsonl").read_bytes()
    tickets = sorted(path.name for path in (folder / "tickets").iterdir())
    assert tickets == [f"round-{k:02d}.safetensors" for k in range(1, 5)]
    for name in tickets:
        assert (folder / "tickets" / name).read_bytes() == (tmp_path / "whole" / "tickets" / name).read_bytes()

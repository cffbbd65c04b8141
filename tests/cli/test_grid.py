"""Grids: what a file plans, and how it is worked off. Most searches here are stand-ins that start at once."""

import io
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import tomli_w
from rich.console import Console

from acefast import cli, grid
from acefast.errors import InputError
from acefast.files import exclusive

# A stand-in for `acefast search`, called with its folder, what to do and the rounds to do.
FAKE = """
import json, os, pathlib, signal, sys, time
folder, what, rounds = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def stop(*signal):
    (folder / "stopped").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(folder / "starts").open("a").write("x")
print("chatter")
if what == "bad" and not (folder / "mended").exists():
    print("acefast: lr is bad: lower it", file=sys.stderr)
    sys.exit(2)
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
for done in range(rounds + 1):
    if what == "slow" and done == 1:
        time.sleep(60)
    if done == rounds:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whose last round is written ends by itself
    (folder / "checkpoint.json").write_text(json.dumps({"round": done + 1}))
"""


@pytest.fixture
def fake(monkeypatch):
    """Searches do what their variant's name says; the settings of each started one, in order."""
    started = []

    def command(settings, out):
        config = grid.resolve_config(**settings)
        started.append(settings)
        out.mkdir(exist_ok=True)
        (out / "config.toml").write_text(tomli_w.dumps({**config.to_dict(), "hash": config.hash()}))
        return [sys.executable, "-c", FAKE, str(out), settings.get("variant", "good"), str(config.rounds)]

    monkeypatch.setattr(grid, "command", command)
    monkeypatch.setattr(grid.torch, "get_num_threads", lambda: 4)
    return started


@pytest.fixture
def write(tmp_path):
    def call(text):
        path = tmp_path / "grid.toml"
        path.write_text(text)
        return path

    return call


def names(path):
    return [run.name for run in grid.plan(path)]


def test_lists_are_combined_seed_by_seed(write):
    path = write('dataset = ["cora", "pubmed"]\nmethod = ["ugs", "ace"]\nseed = [3, 1]\naxes = "edges"')
    assert names(path) == [
        f"{dataset}-gcn-{method}-edges-seed{seed}"
        for seed in (1, 3) for dataset in ("cora", "pubmed") for method in ("ugs", "ace")
    ]  # fmt: skip
    hidden = {run.name: run.config.hidden for run in grid.plan(path)}
    assert hidden["cora-gcn-ugs-edges-seed1"] == 512 and hidden["pubmed-gcn-ace-edges-seed1"] == 256


def test_variants_replace_settings_and_sweeps_are_named(write):
    path = write(
        'method = ["ugs", "ace"]\nseed = 7\n[variant.plain]\n[variant.hot]\nmethod = "ace"\ntau = [0.5, 1]\nlr = 0.05'
    )
    runs = {run.name: run.config for run in grid.plan(path)}
    assert list(runs) == [
        "cora-gcn-ugs-joint-plain-seed7",
        "cora-gcn-ace-joint-plain-seed7",
        "cora-gcn-ace-joint-hot-tau=0.5-seed7",
        "cora-gcn-ace-joint-hot-tau=1.0-seed7",
    ]
    hot = runs["cora-gcn-ace-joint-hot-tau=1.0-seed7"]
    assert (hot.variant, hot.tau, hot.lr, hot.mask_lr) == ("hot", 1.0, 0.05, 0.05)


def test_a_command_resolves_to_what_was_planned(write, monkeypatch):
    text = 'preset = "paper"\nlr = 0.05\nmask_lr = 0.008\nbias = true\nself_loops = false\nseed = 2\n[variant.a]\ntau = 0'
    (run,) = grid.plan(write(text))
    seen = []
    monkeypatch.setattr(cli, "run", lambda config, out, *rest: seen.append((config, str(out))))
    monkeypatch.setattr(cli, "finish", lambda *args: None)
    args = grid.command(run.settings | {"threads": 3}, "folder")
    assert args[:3] == [sys.executable, "-m", "acefast.cli"] and cli.main(args[3:]) == 0
    assert seen == [(grid.replace(run.config, threads=3), "folder")]


@pytest.mark.parametrize(
    "text, says",
    [
        ("dataset = [", "cannot be read as TOML"),
        ('dataset = "nope"', "'nope' is not known"),
        ("learning_rate = 1", "unknown setting 'learning_rate'"),
        ('rounds = "many"', "rounds must be of type int"),
        ("seed = []", "a list in it is empty"),
        ("seed = [1, 1]", "names the run cora-gcn-ace-joint-seed1 twice"),
        ("tau = [[1]]", "tau must be of type float"),
        ('variant = "x"', "variant must be tables"),
        ("[variant]\nx = 1", "variant must be tables"),
        ("[tau]\nx = 1", "tau must be of type float"),
        ('preset = "released"\nmethod = ["ace", "ugs"]', "method must be ace or dense"),
    ],
)
def test_a_bad_grid_is_one_sentence_and_runs_nothing(write, tmp_path, capsys, text, says):
    assert cli.main(["grid", str(write(text)), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0] and "grid.toml" in lines[0]
    assert not (tmp_path / "out").exists()


def test_bad_options(write, tmp_path, capsys):
    args = ["grid", str(write("seed = 1")), "--out", str(tmp_path / "out")]
    for more, says in ((["--jobs", "0"], "--jobs must be"), (["--time-limit", "1 day"], "such as 90s, 25m or 1h30m")):
        assert cli.main(args + more) == 2
        assert says in capsys.readouterr().err
    assert cli.main(["grid", str(tmp_path / "absent.toml"), "--out", "x"]) == 2
    assert "absent.toml cannot be read" in capsys.readouterr().err
    assert [cli._seconds(text) for text in ("90", "90s", "25m", "1h30m", "2h1s")] == [90, 90, 1500, 5400, 7201]


def starts(folder):
    return len((folder / "starts").read_text())


def test_failures_are_told_and_tried_again(write, fake, tmp_path, capsys):
    path, out = write("rounds = 2\n[variant.good]\n[variant.bad]\n[variant.killed]"), tmp_path / "out"
    args = ["grid", str(path), "--out", str(out), "--jobs", "2"]
    assert cli.main(args) == grid.FAILED
    text = capsys.readouterr().out
    assert "3 runs in" in text and "2 at a time, 2 threads each" in text and "1 complete, 2 failed, 0 left" in text
    good, bad, killed = (out / f"cora-gcn-ace-joint-{name}-seed0" for name in ("good", "bad", "killed"))
    assert f"failed: {bad.name}: lr is bad: lower it (see {out / 'logs' / bad.name}.log)" in text
    assert f"{killed.name}: ended by SIGKILL" in text
    assert "chatter" in (out / "logs" / f"{good.name}.log").read_text()

    (bad / "mended").touch()
    assert cli.main(args) == grid.FAILED
    assert "2 complete (1 before), 1 failed, 0 left" in capsys.readouterr().out
    assert [starts(folder) for folder in (good, bad, killed)] == [1, 2, 2]


def test_the_time_limit_stops_searches_which_go_on_first(write, fake, tmp_path, capsys, monkeypatch):
    path, out = write("rounds = 2\nseed = [0, 1]\n[variant.good]\n[variant.slow]"), tmp_path / "out"
    args = ["grid", str(path), "--out", str(out)]
    rounds = {f"cora-gcn-ace-joint-{name}-seed{seed}": n for name, n in (("good", 3), ("slow", 1)) for seed in (0, 1)}

    def over():
        """Whether the searches that end by themselves have, and the others hang."""
        return started() and all(grid.Folder(out / name).rounds_done() == n for name, n in rounds.items())

    started = lambda: True  # noqa: E731
    clock = SimpleNamespace(monotonic=lambda: 100.0 if over() else 0.0, sleep=time.sleep)
    monkeypatch.setattr(grid, "time", clock)
    assert cli.main([*args, "--jobs", "4", "--time-limit", "1m"]) == grid.LEFT
    assert "2 complete, 0 failed, 2 left" in capsys.readouterr().out
    slow = out / "cora-gcn-ace-joint-slow-seed1"
    assert (slow / "stopped").exists() and starts(slow) == 1
    assert cli.main([*args, "--time-limit", "0"]) == grid.LEFT and starts(slow) == 1

    # Another number of jobs means other threads for new runs; what was begun keeps its own and comes first.
    path.write_text(path.read_text().replace("seed = [0, 1]", "seed = [0, 1, 2]"))
    fake.clear()
    capsys.readouterr()
    started = lambda: len(fake) == 1  # noqa: E731
    assert cli.main([*args, "--jobs", "1", "--time-limit", "1m"]) == grid.LEFT
    text = capsys.readouterr().out
    assert "1 at a time, 4 threads each" in text and "2 of them keep the number of threads" in text
    assert [(run["variant"], run["seed"], run["threads"]) for run in fake] == [("slow", 0, 1)]


def test_ctrl_c_stops_the_searches(write, fake, tmp_path, capsys):
    path, out = write("rounds = 2\n[variant.slow]"), tmp_path / "out"
    folder = out / "cora-gcn-ace-joint-slow-seed0"

    def interrupt():
        while not (folder / "checkpoint.json").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert cli.main(["grid", str(path), "--out", str(out)]) == 130
    assert "stopped by Ctrl-C; the same command goes on" in capsys.readouterr().err
    assert (folder / "stopped").exists()


def test_one_grid_at_a_time_in_a_folder_and_changed_settings_are_told(write, fake, tmp_path, capsys):
    path, out = write("rounds = 1"), tmp_path / "out"
    with exclusive(out, "", "folder of a grid", "running a grid"), pytest.raises(InputError, match="another process"):
        grid.run_grid(path, out, 1, None, Console(file=io.StringIO()))
    folder = out / "cora-gcn-ace-joint-seed0"
    folder.mkdir()
    (folder / "config.toml").write_text('dataset = "cora"\nhash = "0"\n')
    assert cli.main(["grid", str(path), "--out", str(out)]) == grid.FAILED
    assert "was changed after the run began" in capsys.readouterr().out and not fake


def test_a_terminal_gets_bars(write, fake, tmp_path):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    assert grid.run_grid(write("rounds = 1\nseed = [0, 1]"), tmp_path / "out", 2, None, console) == grid.COMPLETE
    assert "2/2 runs" in text.getvalue()


def test_a_real_search(write, tmp_path, capsys):
    settings = 'dataset = "synthetic-cora"\nmethod = "ugs"\nhidden = 8\nthreads = 1\nrounds = 1\n'
    path, out = write(settings + "mask_epochs = 2\nfix_epochs = 2\n"), tmp_path / "out"
    assert cli.main(["grid", str(path), "--out", str(out)]) == grid.COMPLETE, capsys.readouterr().out
    assert (out / "synthetic-cora-gcn-ugs-joint-seed0" / "tickets" / "round-01.safetensors").exists()
    assert cli.main(["grid", str(path), "--out", str(out)]) == grid.COMPLETE
    assert "1 complete (1 before), 0 failed, 0 left" in capsys.readouterr().out

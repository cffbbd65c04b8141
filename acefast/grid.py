"""Many searches from one file of settings: each a run folder, each in a process of its own, a few at a time."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from acefast.data import check_name
from acefast.errors import InputError
from acefast.files import exclusive
from acefast.progress import clock
from acefast.search import SearchConfig, load_config, resolve_config
from acefast.search.config import tomllib
from acefast.search.folder import Folder
from acefast.search.rounds import last_round

NAMED = ("dataset", "backbone", "method", "axes", "variant")  # what a run's folder is called by, besides what is swept
POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0  # a search that does not end by SIGTERM within it is killed, which it survives as well
COMPLETE, FAILED, LEFT = 0, 1, 3  # exit status
STOPPED = {sign * number + status for number in (signal.SIGINT, signal.SIGTERM) for sign, status in ((1, 128), (-1, 0))}


@dataclass(frozen=True)
class Planned:
    """One run of a grid: the name of its folder, its settings as given, and what they resolve to."""

    name: str
    settings: dict
    config: SearchConfig


def plan(path: Path) -> list[Planned]:
    """The runs of a grid file, seed by seed so that a part of them is a part of every cell.

    Every setting of a search by name; a list is swept over, and the tables [variant.NAME] replace settings of the file.
    Raises InputError, which names the file, for what is no grid, before anything runs.
    """
    try:
        base = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as TOML: {getattr(error, 'strerror', None) or error}") from None
    variants = base.pop("variant", {"": {}})
    if not isinstance(variants, dict) or not all(isinstance(table, dict) for table in variants.values()):
        raise InputError(f"{path}: variant must be tables of settings [variant.NAME], got {variants!r}")
    runs: dict[str, Planned] = {}
    for variant, changes in variants.items():
        swept = {key: value if isinstance(value, list) else [value] for key, value in {**base, **changes}.items()}
        several = [key for key, values in swept.items() if len(values) > 1 and key not in (*NAMED, "seed")]
        for values in itertools.product(*swept.values()):
            settings = dict(zip(swept, values, strict=True)) | ({"variant": variant} if variant else {})
            try:
                config = resolve_config(**settings)
                check_name(config.dataset)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            run = Planned(_name(config, several), settings, config)
            if run.name in runs:
                raise InputError(f"{path} names the run {run.name} twice: leave one of them away")
            runs[run.name] = run
    if not runs:
        raise InputError(f"{path} names no run: a list in it is empty")
    return sorted(runs.values(), key=lambda run: run.config.seed)


def _name(config: SearchConfig, several: list[str]) -> str:
    parts = [Path(config.dataset).stem, *(getattr(config, name) for name in NAMED[1:])]
    parts += [f"{key}={getattr(config, key)}" for key in several] + [f"seed{config.seed}"]
    return "-".join(re.sub(r"[^\w.=+-]", "_", part) for part in parts if part)


def run_grid(path: Path, out: Path, jobs: int, seconds: float | None, console: Console) -> int:
    """Work off the grid file ``path`` into ``out``, ``jobs`` searches at a time, for at most ``seconds``.

    Returns the exit status: COMPLETE, FAILED, or LEFT where the time came first. However it ends, also by an
    exception, the searches that run are stopped as by SIGTERM, so that their folders go on. Raises InputError for a
    bad file, and where another grid runs in ``out``.
    """
    if jobs < 1:
        raise InputError(f"--jobs must be 1 or more, got {jobs}")
    runs = plan(path)
    with exclusive(out, "logs", "folder of a grid", "running a grid"):
        return _Grid(runs, out, jobs, console).work(seconds)


class _Grid:
    """A grid at work: ``waiting`` runs with their command, ``running`` searches, and what became of the others."""

    def __init__(self, runs: list[Planned], out: Path, jobs: int, console: Console):
        self.runs, self.out, self.jobs, self.console = runs, out, jobs, console
        self.waiting: list[tuple[Planned, int]] = []
        self.running: list[_Search] = []
        self.complete: list[str] = []
        self.failed: dict[str, str] = {}
        threads, kept = max(1, torch.get_num_threads() // jobs), 0
        for run in runs:
            # The number of threads is part of what a search is, since its last bits depend on it.
            settings = {"threads": threads, **run.settings}
            folder = Folder(out / run.name)
            if (folder.path / "config.toml").exists():
                try:
                    stored = load_config(folder.path / "config.toml")
                except InputError as error:
                    self.failed[run.name] = str(error)
                    continue
                if "threads" not in run.settings:
                    settings["threads"] = stored.threads
                config = replace(run.config, threads=settings["threads"])
                if folder.rounds_done() > last_round(config, folder.history()) and not config.differences(stored):
                    self.complete.append(run.name)
                    continue
                kept += settings["threads"] != threads
            self.waiting.append((replace(run, settings=settings), folder.rounds_done()))
        self.waiting.sort(key=lambda entry: entry[1] == 0)  # what was begun comes first
        self.found_complete = len(self.complete)
        self.rounds_left = sum(1 + last_round(run.config, []) - done for run, done in self.waiting)
        self.rounds_ended, self.began = 0, time.monotonic()
        self.say(f"{len(runs)} runs in {out}, {len(self.complete)} of them complete; {jobs} at a time, {threads} "
                 f"{'thread' if threads == 1 else 'threads'} each")  # fmt: skip
        if kept:
            self.say(f"{kept} of them keep the number of threads that they were begun with")

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)
        self.console.file.flush()

    def work(self, seconds: float | None) -> int:
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[text]}"),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        with self.bars:
            self.overall = self.bars.add_task("grid", total=self.rounds_left, text="")
            try:
                while self.waiting or self.running:
                    if seconds is not None and time.monotonic() - self.began >= seconds:
                        break
                    while self.waiting and len(self.running) < self.jobs:
                        run, done = self.waiting.pop(0)
                        self.running.append(_Search(run, done, self.out, self.bars))
                    time.sleep(POLL_SECONDS)
                    self.watch()
            finally:
                left = len(self.waiting) + self.stop()
        return self.tell(left)

    def watch(self) -> None:
        """Take note of the searches that ended, and draw."""
        for search in [search for search in self.running if search.process.poll() is not None]:
            self.running.remove(search)
            self.ended(search)
        done = sum(search.update() for search in self.running) + self.rounds_ended
        elapsed = time.monotonic() - self.began
        about = f", about {clock(elapsed * (self.rounds_left - done) / done)} left" if done else ""
        runs = f"{len(self.complete) + len(self.failed)}/{len(self.runs)} runs"
        self.bars.update(self.overall, completed=done, text=f"{runs}, {clock(elapsed)} elapsed{about}")

    def ended(self, search: "_Search") -> None:
        name = search.run.name
        search.close()
        self.rounds_ended += search.rounds + 1 - search.done_before
        if search.process.returncode == 0:
            self.complete.append(name)
            what = "complete"
        else:
            self.failed[name] = f"{search.error()} (see {search.log})"
            what = f"failed: {self.failed[name]}"
        place = f"[{len(self.complete) + len(self.failed)}/{len(self.runs)}]"
        self.say(f"{place} {name}: {what} ({clock(time.monotonic() - search.began)})")

    def stop(self) -> int:
        """Stop the searches that run, wait for them, and return how many did not end by themselves."""
        for search in self.running:
            search.process.send_signal(signal.SIGTERM)
        stopped = 0
        for search in self.running:
            try:
                search.process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                search.process.kill()
                search.process.wait()
            if search.process.returncode in (*STOPPED, -signal.SIGKILL):
                search.close()
                stopped += 1
            else:  # it ended by itself before the signal reached it
                self.ended(search)
        self.running = []
        return stopped

    def tell(self, left: int) -> int:
        """Print what became of the grid; returns the exit status."""
        before = f" ({self.found_complete} before)" if self.found_complete else ""
        self.say(f"{len(self.complete)} complete{before}, {len(self.failed)} failed, {left} left")
        for name, error in self.failed.items():
            self.say(f"failed: {name}: {error}")
        if left or self.failed:
            self.say("the same command goes on with what is left and tries again what failed")
        self.say(f"report: acefast report {self.out}")
        return FAILED if self.failed else LEFT if left else COMPLETE


class _Search:
    """A search that runs: `acefast search` in a process of its own, its output in logs/NAME.log."""

    def __init__(self, run: Planned, done: int, out: Path, bars: Progress):
        self.run, self.done_before, self.bars = run, done, bars
        self.folder = Folder(out / run.name)
        self.rounds = last_round(run.config, [])  # a ladder that goes on by itself may take more
        self.log = out / "logs" / f"{run.name}.log"
        self.began = time.monotonic()
        self.task = bars.add_task(f"  {run.name}", total=self.rounds + 1, text="")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command(run.settings, self.folder.path), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )  # fmt: skip

    def update(self) -> int:
        """Draw the progress; returns the rounds finished since this process began."""
        done = max(self.done_before, self.folder.rounds_done())
        text = f"round {min(done, self.rounds)}/{self.rounds}, {clock(time.monotonic() - self.began)}"
        self.bars.update(self.task, completed=done, text=text)
        return done - self.done_before

    def close(self) -> None:
        self.bars.remove_task(self.task)

    def error(self) -> str:
        """Why it failed, in its own last words."""
        if self.process.returncode < 0:
            return f"ended by {signal.Signals(-self.process.returncode).name}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].removeprefix("acefast: ") if lines else f"exit status {self.process.returncode}"


def command(settings: dict, out: Path) -> list[str]:
    """`acefast search` with these settings, into ``out``."""
    options = []
    for key, value in settings.items():
        option = key.replace("_", "-")
        options.append(f"--{'' if value else 'no-'}{option}" if isinstance(value, bool) else f"--{option}={value}")
    return [sys.executable, "-m", "acefast.cli", "search", *options, f"--out={out}"]

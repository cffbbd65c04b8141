"""The command line: acefast search | plan | grid | demo | report | pack | inspect | retrain | export | predict | time | env.

Bad input ends with one sentence on standard error and exit status 2, a time limit that comes first with 3, Ctrl-C with 130
and SIGTERM with 143.
"""

import contextlib
import io
import json
import os
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import acefast
from acefast import report
from acefast.data import Sizes, download_planetoid, load_dataset, split_links
from acefast.errors import InputError
from acefast.files import write_atomic
from acefast.grid import LEFT, run_grid
from acefast.ops import backend
from acefast.progress import SearchProgress, clock
from acefast.pruning.ticket import Ticket
from acefast.search import (
    Machine,
    Run,
    SearchConfig,
    compact,
    export_ticket,
    load_data,
    look_ahead,
    resolve_config,
    retrain_ticket,
    run_search,
    time_inference,
)
from acefast.search.config import Backbone
from acefast.search.deploy import prepared
from acefast.search.folder import to_lines
from acefast.search.plan import check_device
from acefast.search.rounds import using_threads
from acefast.tasks import make_task

# The default job: small enough for two cores and a few minutes, all else as in preset paper.
DEMO = dict(dataset="synthetic-cora", rounds=5, mask_epochs=100, fix_epochs=100, ace_epochs=10, ace_rounds=3)
DEMO_METHODS = ("dense", "ugs", "ace")
PLANNED_EDGES = 10**6  # from here on a search begins with its plan


@dataclass(frozen=True)
class SearchOptions:
    """Search for a winning ticket: train the dense baseline, then prune round by round.

    Settings that are not given come from --preset for the --dataset, --task, --backbone and --method; the defaults shown here
    are those for what is given. The run's folder can be resumed at any time by the same command, from the epoch at which it
    was stopped: Ctrl-C, SIGTERM and the time limit let the running epoch end and write what was trained; a second Ctrl-C ends
    at once. Exit status 3 when the time limit came first.
    """

    out: Path
    """Folder of the run: settings, history, checkpoint, tickets, report and plot. Made where it is missing."""
    settings: Annotated[SearchConfig, tyro.conf.arg(name="", help="Settings of the search.")]
    download: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Fetch the files of cora, citeseer or pubmed that --data-root lacks, and check their SHA-256."""
    memory_limit: str | None = None
    """Memory that the run may take, such as 16GB; what the machine (or the GPU) has unless given. A run that is planned to need
    more is refused."""
    time_limit: str | None = None
    """Time after which the search stops so that the same command can go on later, such as 90s, 25m or 1h30m; loading counts."""
    checkpoint_epochs: int | None = None
    """Epochs between two writes of what the running stage has trained so far; about a minute unless given."""


@dataclass(frozen=True)
class PlanOptions:
    """Tell the memory and the time of a search before it runs: bytes by part at the peak, seconds of an epoch.

    Takes the settings of acefast search. Known data sets and generated twins are not loaded; times are estimates, from this
    machine's speed at a copy and a product. Exit status 2 where the search does not fit, with what would.
    """

    settings: Annotated[SearchConfig, tyro.conf.arg(name="", help="Settings of the search.")]
    memory_limit: str | None = None
    """Memory that the run may take, such as 16GB; what the machine (or the GPU) has unless given."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""


@dataclass(frozen=True)
class GridOptions:
    """Run many searches from one file, a few at a time, each in a process of its own.

    In GRID.toml every setting of a search (see acefast search --help) stands by its name; a list of values gives a run
    for each of them, and all lists are combined: dataset = ["cora", "citeseer"], method = ["ugs", "ace"],
    seed = [0, 1, 2]. Tables [variant.NAME] hold settings that replace those above them; where there are any, the runs
    are those of the variants. Each run is a folder of its own in --out, as of acefast search, with its output in
    logs/. The same command goes on with what is not finished and tries again what failed. A run that was begun keeps
    its number of threads. Exit status: 0 when all runs are complete, 1 when some failed, 3 when the time limit came
    first.
    """

    grid: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="GRID.toml")]
    """The file of settings."""
    out: Path
    """Folder of the runs, one subfolder each."""
    jobs: int | None = None
    """Searches at a time, each with its share of the CPU threads; one for each CPU thread unless given."""
    time_limit: str | None = None
    """Time after which the running searches are stopped so that they can go on later, such as 90s, 25m or 1h30m."""


@dataclass(frozen=True)
class DemoOptions:
    """Run the default job: dense, UGS and ACE-GLT on a generated citation graph of Cora's size, a few rounds with
    shortened epochs, ending with the table and the plot of all three.

    Needs no data; can be resumed by the same command.
    """

    out: Path = Path("runs/demo")
    """Folder of the runs and of their report."""
    rounds: int = DEMO["rounds"]
    """Rounds of pruning."""
    seed: int = 0
    """Seed of all random numbers."""


@dataclass(frozen=True)
class ReportOptions:
    """Print and write the table and the plot of accuracy over sparsity of one or several runs.

    Runs that differ by seed alone are shown as mean and standard deviation. report.md and accuracy.png go to --out,
    else into the folder of a single run, else into the folder that holds the runs or packs.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DIR...")]
    """Run folders, folders that hold run folders, files of acefast pack."""
    out: Path | None = None
    """Folder for report.md and accuracy.png."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON list, a row per run and round, and nothing else; files are written only with --out."""


@dataclass(frozen=True)
class PackOptions:
    """Put what a report needs of many runs into one small file of JSON lines, which acefast report takes in their place.

    A file that exists keeps its runs: one that is there already is replaced by a record with at least as many rounds, and
    refused where the two contradict each other.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DIR...")]
    """Run folders, folders that hold run folders, files of acefast pack."""
    out: Path
    """The file, such as results.jsonl."""


@dataclass(frozen=True)
class InspectOptions:
    """Tell what is in a ticket: where it comes from, what it keeps, and whether it fits a graph."""

    ticket: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TICKET")]
    """A ticket, such as tickets/round-03.safetensors of a run folder."""
    data_root: str | None = None
    """Folder of the raw data files: also check the ticket against the graph."""
    dataset: str | None = None
    """Check against this data set; the ticket's own unless given."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""


@dataclass(frozen=True)
class RetrainOptions:
    """Train a ticket anew, with its masks frozen and by the settings of the search that found it, and tell what it
    reaches.

    As it is, it starts at its own first weights, which repeats the search's result; another seed gives fresh weights
    under the same masks; another backbone takes over the edges alone.
    """

    ticket: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TICKET")]
    """A ticket, such as tickets/round-03.safetensors of a run folder."""
    seed: int | None = None
    """Seed of the first weights and of all noise; the ticket's own unless given."""
    backbone: Backbone | None = None
    """Graph network to train; the ticket's own unless given."""
    dataset: str | None = None
    """Data set with the ticket's graph; the ticket's own unless given."""
    data_root: str = ""
    """Folder of the data files."""
    device: str | None = None
    """Device of the computation; that of the search unless given."""
    dense: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also train the unpruned network from the same seed."""
    shuffle: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep as many edges, and as many weights of each layer, at random places: the control of what the masks are worth."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one line of JSON."""


@dataclass(frozen=True)
class ExportOptions:
    """Train a ticket with its masks frozen, as retrain does, and write it with the trained weights, to be used.

    The file is a ticket (safetensors): its masks, the trained weights with 0 where removed, the settings, and what was
    reached. acefast predict and acefast.compact take it.
    """

    ticket: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TICKET")]
    """A ticket, such as tickets/round-03.safetensors of a run folder."""
    out: Path
    """The file to write, such as model.safetensors."""
    seed: int | None = None
    """Seed of the first weights and of all noise; the ticket's own unless given."""
    dataset: str | None = None
    """Data set with the ticket's graph; the ticket's own unless given."""
    data_root: str = ""
    """Folder of the data files."""
    device: str | None = None
    """Device of the training; that of the search unless given."""


@dataclass(frozen=True)
class PredictOptions:
    """Tell what an exported ticket reaches by its compacted network, and write its outputs."""

    ticket: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A file of acefast export."""
    out: Path | None = None
    """Where to write the outputs of all nodes, float32 [nodes, classes], as a .npy file: logits; of task link, embeddings."""
    dataset: str | None = None
    """Data set with the ticket's graph; the ticket's own unless given."""
    data_root: str = ""
    """Folder of the data files."""


@dataclass(frozen=True)
class TimeOptions:
    """Measure an inference of compacted tickets against the dense network as it is and in the same form, in turns, on the CPU.

    For a run folder the fastest and the median seconds of each ticket measured go into its inference.jsonl, which acefast
    pack and acefast report take up: the ratio, and after how many inferences the search has paid.
    """

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TICKET|RUN")]
    """A ticket, or a run folder."""
    every: int = 5
    """Of a run folder every so many rounds, and the last one."""
    repeats: int = 50
    """Timed inferences of each of the three networks."""
    threads: int = 1
    """CPU threads."""
    dataset: str | None = None
    """Data set with the ticket's graph; the ticket's own unless given."""
    data_root: str = ""
    """Folder of the data files; of a run its own unless given."""


@dataclass(frozen=True)
class EnvOptions:
    """Print versions, what was built and for which architectures, which backend serves which op, and why a binary did
    not load."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""


class OutOfTime(Exception):
    """A search whose time limit came before its end; the text says so."""


class Stopped(BaseException):
    """A signal that ends the command."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def main(args: list[str] | None = None) -> int:
    """Run a command line (sys.argv without the program by default) and return its exit status."""
    args = list(sys.argv[1:] if args is None else args)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *place: _say(str(message))
            return _dispatch(args)
    except InputError as error:
        return _fail(str(error))
    except OutOfTime as over:
        _say(str(over))
        return LEFT
    except Stopped as stop:
        name = "Ctrl-C" if stop.number == signal.SIGINT else signal.Signals(stop.number).name
        _fail(f"stopped by {name}; the same command goes on from the last epoch that was saved")
        return 128 + stop.number
    except BrokenPipeError:
        # Whoever read the output went away; nothing more can be said to them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(number, frame):
    raise Stopped(number)


@contextlib.contextmanager
def _stopping_between_events(progress: Callable[[dict], None]) -> Iterator[Callable[[dict], None]]:
    """The callback of a search which a signal stops at its next event, such as an epoch's end, so that nothing is lost; the
    same signal again stops it at once."""
    came: list[int] = []

    def note(number, frame):
        if number in came:
            raise Stopped(number)
        came.append(number)

    def tell(event: dict) -> None:
        progress(event)
        if came:
            raise Stopped(came[0])

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield tell
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if came:
        raise Stopped(came[0])


def _say(sentence: str) -> None:
    print(f"acefast: {' '.join(sentence.split()).removeprefix('acefast: ')}", file=sys.stderr, flush=True)


def _fail(sentence: str) -> int:
    _say(sentence)
    return 2


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] == "--version":
        print(f"acefast {acefast.__version__}")
        return 0
    if args[0] not in COMMANDS:
        raise InputError(f"unknown command {args[0]!r}: expected one of {', '.join(COMMANDS)} (see acefast --help)")
    _, command = COMMANDS[args[0]]
    return command(args[1:])


def _usage() -> str:
    lines = ["usage: acefast COMMAND [OPTIONS]", "", "Graph lottery tickets by ACE-GLT.", ""]
    lines += [f"  {name:<10}{what}" for name, (what, _) in COMMANDS.items()]
    return "\n".join(
        [*lines, "", "acefast COMMAND --help tells the options of a command; --version prints the version."]
    )


def parse(options, command: str, args: list[str], default=tyro.MISSING):
    """The options of a command from its arguments. Raises InputError with tyro's message as one sentence."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            if default is tyro.MISSING:
                return tyro.cli(options, prog=f"acefast {command}", args=args)
            return tyro.cli(options, prog=f"acefast {command}", args=args, default=default)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    raise InputError(f"{_sentence(complaint.getvalue())} (see acefast {command} --help)")


def _sentence(boxed: str) -> str:
    """tyro's message out of its box: what stands before the first rule."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        line = line.strip("│╭╮╰╯ ")
        if line.startswith(("─", "---")):
            parts.append([])
        elif line:
            parts[-1].append(line)
    parts = [part for part in parts if part]
    if "╭" not in text:  # without box characters the title is a part of its own
        parts = parts[1:]
    return " ".join(parts[0]).removesuffix(".")


def _resolved(options_class, command: str, args: list[str], *first) -> tuple:
    """(options, configuration) of a command with the settings of a search, `first` standing before them in its options."""
    names = {key: _given(args, key) for key in ("dataset", "task", "backbone", "method", "preset")}
    defaults = resolve_config(**{key: value for key, value in names.items() if value is not None})
    options = parse(options_class, command, args, options_class(*first, defaults))
    flags = {arg.split("=", 1)[0].replace("_", "-") for arg in args}
    given = {
        field.name: getattr(options.settings, field.name)
        for field in fields(SearchConfig)
        if not flags.isdisjoint(f"--{no}{field.name.replace('_', '-')}" for no in ("", "no-"))
    }
    return options, resolve_config(**given)


def search(args: list[str]) -> int:
    began = time.monotonic()
    options, config = _resolved(SearchOptions, "search", args, tyro.MISSING)
    end = None if options.time_limit is None else began + _seconds(options.time_limit)
    console = Console()
    if options.download:
        for path in download_planetoid(config.dataset, config.data_root):
            console.print(f"fetched {path}", soft_wrap=True, highlight=False)
    was_complete = run(config, options.out, console, options.memory_limit, end, options.checkpoint_epochs)
    if was_complete:
        console.print(f"{options.out} is complete; nothing was computed.", soft_wrap=True)
    finish(console, [options.out], None)
    return 0


def plan(args: list[str]) -> int:
    options, config = _resolved(PlanOptions, "plan", args)
    data = None if Sizes.named(config.dataset, config.features) else load_data(config)
    ahead = _outlook(config, data, options.memory_limit, measure=True)
    if options.json:
        facts = {"bytes": ahead.plan.bytes, "limit": ahead.limit, **asdict(ahead.plan), "sizes": asdict(ahead.sizes)}
        print(json.dumps(facts, indent=1))
    else:
        _show_plan(_console(), ahead)
    ahead.check()
    return 0


def _outlook(config: SearchConfig, data, memory_limit: str | None, measure: bool = False):
    """The outlook of a search, its data loaded or None; times where `measure` or where the graph is large."""
    sizes = data or Sizes.named(config.dataset, config.features)
    large = (sizes.graph.num_edges if data else sizes.edges) >= PLANNED_EDGES
    check_device(config.device)
    with using_threads(config.threads):
        machine = Machine.measure(config.device) if measure or large else None
    return look_ahead(config, sizes, None if memory_limit is None else _bytes(memory_limit), machine)


def _show_plan(console: Console, ahead) -> None:
    plan, sizes, config = ahead.plan, ahead.sizes, ahead.config
    table = Table(box=None, show_header=False, pad_edge=False)
    for part, size in plan.parts.items():
        table.add_row(f"  {part}", f"{size / 1e9:8.3f} GB")
    again = f" in {config.dtype}" if config.dtype != "float32" else ""
    again += ", activations recomputed" if plan.recompute else ""
    console.print(
        f"plan: {config.dataset} with {sizes.nodes:,} nodes and {sizes.edges:,} edges, {config.backbone} with {config.layers} "
        f"layers of {config.hidden}{again}: {plan.bytes / 1e9:.3g} GB at the peak, {ahead.limit / 1e9:.3g} GB are there",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(table, highlight=False)
    console.print(
        f"  an epoch takes about {plan.seconds:.3g} s at full density, {plan.epochs:,} of them at most "
        f"{clock(plan.epochs * plan.seconds)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _bytes(text: str) -> int:
    """The bytes of 16GB, 512MB, 1.5GiB, 512MiB."""
    units = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|MiB|GiB)", text)
    if parts is None:
        raise InputError(f"--memory-limit must be a size such as 16GB or 512MiB, got {text!r}")
    return int(float(parts[1]) * units[parts[2]])


def grid(args: list[str]) -> int:
    options = parse(GridOptions, "grid", args)
    seconds = None if options.time_limit is None else _seconds(options.time_limit)
    jobs = torch.get_num_threads() if options.jobs is None else options.jobs
    return run_grid(options.grid, options.out, jobs, seconds, _console())


def _seconds(text: str) -> float:
    """The seconds of 90s, 25m, 1h30m; a number alone counts seconds."""
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if parts is None or not text:
        raise InputError(f"--time-limit must be a time such as 90s, 25m or 1h30m, got {text!r}")
    hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return 3600 * hours + 60 * minutes + seconds


def demo(args: list[str]) -> int:
    options = parse(DemoOptions, "demo", args)
    console = Console()
    configs = [
        resolve_config(
            backbone="gcn", method=method, preset="paper", **DEMO | dict(rounds=options.rounds, seed=options.seed)
        )
        for method in DEMO_METHODS
    ]
    complete = [run(config, options.out / config.method, console) for config in configs]
    if all(complete):
        console.print(f"{options.out} is complete; nothing was computed.", soft_wrap=True)
    finish(console, [options.out / method for method in DEMO_METHODS], options.out)
    return 0


def run(
    config: SearchConfig, out: Path, console: Console,
    memory_limit: str | None = None, end: float | None = None, checkpoint_epochs: int | None = None,
) -> bool:  # fmt: skip
    """Search with progress shown, refused before anything is made where it would not fit; True where the folder already was
    complete. Raises OutOfTime where ``end``, by ``time.monotonic``, came first."""
    data = None if Sizes.named(config.dataset, config.features) else load_data(config)
    ahead = _outlook(config, data, memory_limit)
    if ahead.sizes.edges >= PLANNED_EDGES:
        _show_plan(console, ahead)
    ahead.check()
    config, data = ahead.config, data or load_data(ahead.config)
    console.print(
        f"{config.method}: {'links of ' * (config.task == 'link')}{config.dataset} with {data.num_nodes:,} nodes and "
        f"{data.graph.num_edges:,} edges, "
        f"{config.backbone}, preset {config.preset}, axes {config.axes}, seed {config.seed}; run folder {out}",
        soft_wrap=True,
        highlight=False,
    )
    time_limit = None if end is None else max(0.0, end - time.monotonic())
    with SearchProgress(config.method, console) as progress, _stopping_between_events(progress) as tell:
        done = run_search(data, config, out, tell, time_limit=time_limit, checkpoint_epochs=checkpoint_epochs,
                          memory_limit=ahead.limit)  # fmt: skip
    if not done.complete:
        raise OutOfTime(f"the time limit came before the end of {out}; the same command goes on from there")
    return progress.was_complete


def finish(console: Console, folders, out: Path | None) -> None:
    """Print and write the report of `folders`, the files' paths last."""
    groups = report.read_groups(folders)
    text, plot = report.write(groups, out)
    report.show(groups, console)
    console.print(f"table: {text}\nplot:  {plot}", soft_wrap=True, highlight=False)


def _given(args: list[str], key: str) -> str | None:
    """The last value given to --key, before the options are parsed: other defaults depend on it."""
    value = None
    for one, two in zip(args, [*args[1:], None]):
        if one == f"--{key}":
            value = two
        elif one.startswith(f"--{key}="):
            value = one.split("=", 1)[1]
    return value


def report_(args: list[str]) -> int:
    options = parse(ReportOptions, "report", args)
    if not options.runs:
        raise InputError("report needs at least one run folder or pack: name the --out folder of a search")
    if not options.json:
        finish(Console(), options.runs, options.out)
        return 0
    groups = report.read_groups(options.runs)
    if options.out is not None:
        report.write(groups, options.out)
    print(json.dumps(report.rows(groups), indent=1, allow_nan=False))
    return 0


def pack(args: list[str]) -> int:
    options = parse(PackOptions, "pack", args)
    if not options.runs:
        raise InputError("pack needs at least one run folder: name the --out folder of a search")
    counts = report.pack(options.runs, options.out)
    print(f"{options.out}: {counts['packed']} runs; {counts['new']} new, {counts['replaced']} replaced, {counts['kept']} kept")
    return 0


def inspect(args: list[str]) -> int:
    options = parse(InspectOptions, "inspect", args)
    ticket = Ticket.load(options.ticket)
    counts, removed = ticket.counts, ticket.sparsity
    facts = {
        "ticket": str(options.ticket),
        "bytes": options.ticket.stat().st_size,
        "metadata": ticket.metadata,
        **{axis: {"kept": kept, "total": total, "sparsity": removed[axis]} for axis, (kept, total) in counts.items()},
        "masks": {
            name: {"shape": list(keep.shape), "kept": int(keep.sum()), "total": keep.numel()}
            for name, keep in ticket.weight_keep.items()
        },
        "rewind": {
            name: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in ticket.rewind.items()
        },
    }
    if options.data_root is not None or options.dataset is not None:
        facts["graph"] = _fit(ticket, options)
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        _print_ticket(facts)
    return 0


def _fit(ticket: Ticket, options: InspectOptions) -> dict:
    """What the ticket leaves of its graph; refuses another graph."""
    name = options.dataset or ticket.metadata.get("dataset")
    released = ticket.metadata.get("preset") == "released"
    features = ticket.metadata.get("settings", {}).get("features", "given")
    data = load_dataset(name, options.data_root, keep_self_loops=released, features=features)
    if ticket.metadata.get("task") == "link" != data.task:
        data = split_links(data)
    graph = data.graph
    if ticket.metadata.get("backbone") == "gat":
        graph = graph.with_self_loops()  # they carry masks, see acefast.search.rounds.prepare_data
    kept = ticket.graph(graph)
    return {
        "dataset": name,
        "nodes": graph.num_dst,
        "edges": graph.num_edges,
        "edges_kept": kept.num_edges,
        "isolated_before": _isolated(graph),
        "isolated": _isolated(kept),
    }


def _isolated(graph) -> int:
    """Nodes without an edge to or from another one."""
    touched = torch.zeros(graph.num_dst, dtype=torch.bool)
    source, destination = graph.edge_index()
    apart = source != destination
    touched[torch.cat([source[apart], destination[apart]])] = True
    return int((~touched).sum())


def _print_ticket(facts: dict) -> None:
    console = _console()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("ticket", f"{facts['ticket']} ({facts['bytes']:,} bytes)")
    for key, value in facts["metadata"].items():
        if key != "settings":  # as many as a search has; --json tells them
            table.add_row(key, f"{100 * value:.2f} %" if key in ("val", "test") else str(value))
    for axis in ("edges", "weights"):
        part = facts[axis]
        table.add_row(axis, f"{part['kept']:,} of {part['total']:,} kept, {part['sparsity']:.2f} % removed")
    if "graph" in facts:
        graph = facts["graph"]
        table.add_row("graph", f"fits {graph['dataset']}: {graph['nodes']:,} nodes, {graph['edges']:,} edges")
        table.add_row("isolated nodes", f"{graph['isolated']:,} ({graph['isolated_before']:,} in the whole graph)")
    console.print(table, highlight=False)
    parts = Table("parameter", "shape", "dtype", "kept", "removed %", box=box.SIMPLE_HEAD)
    for name, value in facts["rewind"].items():
        mask = facts["masks"].get(name)
        kept = (
            [f"{mask['kept']:,} of {mask['total']:,}", f"{100 - 100 * mask['kept'] / max(1, mask['total']):.2f}"]
            if mask
            else ["not masked", ""]
        )
        parts.add_row(name, " × ".join(map(str, value["shape"])), value["dtype"], *kept)
    console.print(parts, highlight=False)


def retrain(args: list[str]) -> int:
    options = parse(RetrainOptions, "retrain", args)
    ticket = Ticket.load(options.ticket)
    row = retrain_ticket(
        ticket, options.dataset, options.seed, options.backbone,
        data_root=options.data_root, device=options.device, dense=options.dense, shuffle=options.shuffle,
    )  # fmt: skip
    if options.json:
        print(json.dumps({"ticket": str(options.ticket), **row}))
        return 0
    kept = ", ".join(f"{row[f'{axis}_kept']:,} of {row[f'{axis}_total']:,} {axis}" for axis in ("edges", "weights"))
    kept += " kept at random places" if row["shuffled"] else " kept"
    start = {"rewind": "the ticket's own first weights", "fresh": "fresh weights"}[row["start"]]
    metric = "" if row["metric"] == "accuracy" else f" ({row['metric']})"
    lines = [
        f"{row['dataset']}, {row['backbone']}, seed {row['seed']}, {row['epochs']} epochs from {start}: {kept}",
        f"val {100 * row['val']:.2f} %, test {100 * row['test']:.2f} % at epoch {row['best_epoch'] + 1}; the search "
        f"reported val {100 * row['found_val']:.2f} %, test {100 * row['found_test']:.2f} %{metric}",
    ]
    if options.dense:
        lines.append(f"dense: val {100 * row['dense_val']:.2f} %, test {100 * row['dense_test']:.2f} %")
    _console().print("\n".join(lines), highlight=False, soft_wrap=True)
    return 0


def export(args: list[str]) -> int:
    options = parse(ExportOptions, "export", args)
    exported = export_ticket(
        Ticket.load(options.ticket), options.dataset, options.seed, data_root=options.data_root, device=options.device
    )
    exported.save(options.out)
    reached = exported.metadata["trained"]
    print(f"{options.out}: val {100 * reached['val']:.2f} %, test {100 * reached['test']:.2f} %")
    return 0


def predict(args: list[str]) -> int:
    options = parse(PredictOptions, "predict", args)
    ticket = Ticket.load(options.ticket)
    if "trained" not in ticket.metadata:
        raise InputError(f"{options.ticket} holds no trained weights: make a file by acefast export")
    _, data = prepared(ticket, options.dataset, options.data_root)
    network = compact(ticket, options.dataset, data_root=options.data_root)
    logits = network()
    if options.out is not None:
        content = io.BytesIO()
        np.save(content, logits.numpy(), allow_pickle=False)
        write_atomic(options.out, content.getvalue())
    task = make_task(data, decoder=network.decoder)
    val, test = (task.metric(logits[task.nodes[split]], split) for split in ("val", "test"))
    print(f"{data.name}: {data.metric} val {100 * val:.2f} %, test {100 * test:.2f} %")
    return 0


def _times(row: dict) -> str:
    """Fastest and median milliseconds of the three networks, and the ratios of the fastest."""
    names = {"dense": "dense", "regrouped": "dense regrouped", "compact": "compacted"}
    each = [
        f"{words} {1e3 * row[f'inference_{name}']:.3f} ms (median {1e3 * row[f'inference_{name}_median']:.3f})"
        for name, words in names.items()
    ]
    ratios = (f"{row[f'inference_{name}'] / row['inference_compact']:.2f}x" for name in ("dense", "regrouped"))
    return f"{', '.join(each)}; {' and '.join(ratios)}; {row['repeats']} in turns, {row['inference_threads']} threads"


def time_(args: list[str]) -> int:
    options = parse(TimeOptions, "time", args)
    if options.every < 1:
        raise InputError(f"--every must be 1 or more, got {options.every}")
    is_folder = options.path.is_dir()
    tickets, data_root, rows = {None: options.path}, options.data_root, []
    if is_folder:
        searched = Run.load(options.path)
        tickets, data_root = searched.ticket_paths(options.every), data_root or searched.config.data_root
    for number, path in tickets.items():
        how = dict(data_root=data_root, repeats=options.repeats, threads=options.threads)
        row = {"round": number, **time_inference(Ticket.load(path), options.dataset, **how)}
        rows.append(row)
        print(f"{path.name}: {_times(row)}", flush=True)
    if is_folder:
        write_atomic(options.path / "inference.jsonl", to_lines(rows))
    return 0


def env(args: list[str]) -> int:
    options = parse(EnvOptions, "env", args)
    facts = backend.report()
    system = {"python": platform.python_version(), "system": platform.platform(), "threads": torch.get_num_threads()}
    if options.json:
        print(json.dumps({"system": system, **facts}, indent=1))
        return 0
    console = _console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, version in (facts["versions"] | system).items():
        table.add_row(name, str(version) if version is not None else "not installed")
    table.add_row("instruction set", facts["cpu_capability"])
    table.add_row("CUDA device", "found by torch" if facts["cuda_available"] else "none found by torch")
    console.print(table, highlight=False)
    console.print("\nbuilt", highlight=False, style="bold")
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts["build"].items():
        table.add_row(f"  {name}", str(value) or "-")
    table.add_row("  libraries", ", ".join(facts["libraries"]) or "none")
    for device, name in facts["loaded"].items():
        table.add_row(f"  loaded for {device}", name)
    for device, why in facts["not_loaded"].items():
        table.add_row(f"  not loaded for {device}", why)
    if facts["triton_error"]:
        table.add_row("  triton unusable", facts["triton_error"])
    console.print(table, highlight=False)
    devices = list(next(iter(facts["serving"].values())))
    serving = Table("op", *devices, box=box.SIMPLE_HEAD)
    for op, by_device in facts["serving"].items():
        serving.add_row(op, *(by_device[device] for device in devices))
    console.print("\nbackend that serves each op", highlight=False, style="bold")
    console.print(serving, highlight=False)
    return 0


def _console() -> Console:
    """Standard output; wide and plain where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=160, color_system=None)


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "search": ("search for a winning ticket in a graph and a network", search),
    "plan": ("memory and time of a search, before it runs", plan),
    "grid": ("many searches from one file of settings, some at a time", grid),
    "demo": ("dense, UGS and ACE-GLT on a generated graph, in minutes and without data", demo),
    "report": ("table and plot of accuracy over sparsity of runs", report_),
    "pack": ("what a report needs of many runs, in one small file", pack),
    "inspect": ("tell what is in a ticket", inspect),
    "retrain": ("train a ticket anew: from its first weights, another seed's, or under another backbone", retrain),
    "export": ("train a ticket and write it with the trained weights", export),
    "predict": ("predictions of an exported ticket", predict),
    "time": ("inference of compacted tickets against the dense network", time_),
    "env": ("versions, what was built, which backend serves which op", env),
}

if __name__ == "__main__":
    sys.exit(main())

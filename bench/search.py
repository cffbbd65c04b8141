"""`python -m bench search`: seconds, epochs and memory of whole searches, and of the same trainings written the usual way on PyG.

Each data set's search runs in a fresh process, as a user's does, with the GCN of preset `paper`. Then the five trainings that
a search is made of are timed in another process, acefast and the peer (bench/peers/search.py) in turns, so that drift of
the machine meets both alike: dense, imp, retained, complement and retrain, those after pruning on a first round's ticket.
The time of a whole peer search is its time per epoch in each of them times the epochs of the search: its masks are dense,
so its epochs do not get cheaper as the search goes on; what it would need besides training is left out. How much cheaper
those of acefast get is measured in turns too, with the elements that the search kept at rung 15.
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from acefast import train
from acefast.data import DATASETS
from acefast.errors import InputError
from acefast.files import write_atomic
from acefast.progress import SearchProgress, clock
from acefast.pruning import Pattern, SoftMasks, Ticket, prune
from acefast.search import SearchConfig, load_data, resolve_config, run_search, stages
from bench.harness import environment, status_bytes, timed
from tests.inputs import REPOSITORY, data_folder

TURNS = 5  # timings of each implementation and phase
LATE = 15  # the rung whose epochs are compared with those of rung 0
QUICK = dict(rounds=2, hidden=16, mask_epochs=6, fix_epochs=6, ace_epochs=2, ace_rounds=2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", nargs="+", choices=DATASETS, metavar="NAME", help=f"of: {', '.join(DATASETS)}; default: cora")
    parser.add_argument("--data-root", type=Path, help="folder with planetoid/; default: ACEFAST_DATA, ../shared/data or .data")
    parser.add_argument("--method", choices=("ace", "ugs"), default="ace")
    parser.add_argument("--rounds", type=int, help="rounds of pruning; default: 20")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True, help="on cuda: epochs as CUDA graphs")
    parser.add_argument("--search", action=argparse.BooleanOptionalAction, default=True, help="run the whole search")
    parser.add_argument("--phases", action=argparse.BooleanOptionalAction, default=True, help="time the trainings by themselves")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="time the PyG peer beside them")
    parser.add_argument("--epochs", type=int, default=50, help="timed epochs of each training, a multiple of 5; default: 50")
    parser.add_argument("--runs", type=Path, help="keep the searches' run folders here, one for each data set and label")
    parser.add_argument("--label", default="", help="what the code is at, stored with the figures; `bench plot` compares labels")
    parser.add_argument("--quick", action="store_true", help="a dry run: the generated graph, a tiny network, few rounds and epochs")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def main(options: argparse.Namespace, arguments: list[str]) -> int:
    try:
        return measure(options)
    except BrokenProcessPool:
        print("bench: a process that measured was killed, perhaps for want of memory", file=sys.stderr)
        return 1


def measure(options: argparse.Namespace) -> int:
    if options.epochs < TURNS or options.epochs % TURNS:
        raise InputError(f"--epochs must be a multiple of {TURNS}, got {options.epochs}")
    if not (options.search or options.phases):
        raise InputError("--no-search and --no-phases together leave nothing to measure: give one of them")
    if options.json is not None:
        writable(options.json)
    jobs = []
    for name in options.dataset or ["synthetic-cora" if options.quick else "cora"]:
        settings = settings_of(name, options)
        load_data(resolve_config(**settings))
        folder = None if options.runs is None else options.runs / "-".join(filter(None, (name, options.method, options.label)))
        if options.search and folder is not None and folder.exists():
            raise InputError(f"{folder} exists and a search that is timed needs a fresh folder: choose another --runs or --label")
        jobs.append((settings, folder))
    head = environment() | {"threads": options.threads, "device": options.device}
    print("  ".join(f"{key}={value}" for key, value in head.items()))
    rows = []
    for settings, folder in jobs:
        row = {"benchmark": "search", "label": options.label, "device": options.device, **facts(resolve_config(**settings))}
        row["captured"] = options.capture and options.device == "cuda"
        if options.search:
            with tempfile.TemporaryDirectory() as scratch:
                run = folder or Path(scratch) / "run"
                row["search"] = in_a_fresh_process(whole_search, settings, run, options.capture)
                print_search(row)
                row["late"] = in_a_fresh_process(time_rungs, settings, run, options.capture)
                print_rungs(row)
        if options.phases:
            row["phases"] = in_a_fresh_process(time_phases, settings, options.epochs, options.peer, options.capture)
            row |= totals(row)
            print_phases(row)
        rows.append(row)
        if options.json is not None:  # after each data set: a run that is cut short leaves what it measured
            write_atomic(options.json, json.dumps({"environment": head, "rows": rows}, indent=1, allow_nan=False) + "\n")
    if options.json is not None:
        print(f"written: {options.json}")
    return 0


def writable(path: Path) -> None:
    """Make the folder of the results before anything is measured for them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--json: cannot make the folder of {path}: {error.strerror}") from None


def settings_of(name: str, options: argparse.Namespace) -> dict:
    """What `resolve_config` is given."""
    root = options.data_root or next((f for f in (data_folder(), REPOSITORY / ".data") if f.is_dir()), None)
    settings = dict(dataset=name, method=options.method, threads=options.threads, device=options.device)
    if root is not None:
        settings["data_root"] = str(root / "planetoid")
    if options.quick:
        settings |= QUICK
    if options.rounds is not None:
        settings["rounds"] = options.rounds
    return settings


def facts(config: SearchConfig) -> dict:
    return {key: getattr(config, key) for key in ("dataset", "method", "preset", "rounds", "hidden", "seed", "threads")}


def in_a_fresh_process(function, *arguments):
    """function(*arguments), so that its peak memory is its own and nothing is warm."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def one_by_one() -> None:
    """Have no epoch captured in this process from here on."""
    train.capture_on = lambda device: None


# The whole search.


class Trainings(list):
    """Called with a search's events: one record for each training, its seconds from its begin to its last epoch."""

    def __call__(self, event: dict) -> None:
        if event["event"] == "training":
            self.began = time.perf_counter()
            self.append({key: event[key] for key in ("round", "stage", "model", "epochs")})
        elif event["event"] == "epoch":
            self[-1]["seconds"] = time.perf_counter() - self.began

    def epoch_ms(self, round_: int, stage: str) -> float | None:
        """Mean milliseconds of the epochs of a stage that is one training; None where the search has no such stage."""
        found = (t for t in self if (t["round"], t["stage"]) == (round_, stage))
        return next((1e3 * t["seconds"] / t["epochs"] for t in found), None)


def whole_search(settings: dict, folder: Path, captured: bool) -> dict:
    """Figures of one search: total_s from reading the data to the last checkpoint, stage_s by kind of stage ("other" is what
    is between them, the checkpoints above all), epochs, peak_bytes of this process (torch included), and by rung the kept
    shares and the milliseconds of an epoch of training masks and of retraining with these elements kept."""
    from rich.console import Console

    if not captured:
        one_by_one()
    config = resolve_config(**settings)
    trainings, rungs, stage_s = Trainings(), [], defaultdict(float)
    with SearchProgress(config.dataset, Console()) as progress:

        def on_event(event):
            trainings(event)
            progress(event)

        began = time.perf_counter()
        run = run_search(load_data(config), config, folder, on_event)
        total = time.perf_counter() - began
    for timing in run.timings:
        stage_s["ace" if timing["stage"].startswith("ace-") else timing["stage"]] += timing["seconds"]
    stage_s["other"] = total - sum(stage_s.values())
    for rung, line in enumerate(run.rounds):
        rungs.append(
            {"rung": rung, "edges_density": line["edges_kept"] / line["edges_total"],
             "weights_density": line["weights_kept"] / line["weights_total"],
             "imp_ms": trainings.epoch_ms(rung + 1, "imp"), "retrain_ms": trainings.epoch_ms(rung, "retrain" if rung else "dense")}
        )  # fmt: skip
    epochs = sum(training["epochs"] for training in trainings)
    # Not ru_maxrss, into which Linux counts the process that this one was forked from.
    return {"total_s": total, "stage_s": dict(stage_s), "epochs": epochs, "peak_bytes": status_bytes("VmHWM"), "rungs": rungs}


def time_rungs(settings: dict, folder: Path, captured: bool) -> dict:
    """Milliseconds of an epoch of training masks and of retraining, with all elements and with those that the search in `folder`
    kept at rung LATE (or its last): medians of TURNS trainings as long as the search's, in turns, and the median of the turns'
    ratios."""
    if not captured:
        one_by_one()
    config = resolve_config(**settings)
    rung = min(LATE, config.rounds)
    ticket = Ticket.load(folder / "tickets" / f"round-{rung:02}.safetensors")
    row = {"rung": rung}

    def measure(search, state):
        late = Pattern(ticket.edge_keep, ticket.weight_keep)
        state.put("keep", late)
        trainings = {
            "imp": (lambda pattern: search.train_masks(state, "imp", "imp", pattern, config.mask_epochs), config.mask_epochs),
            "retrain": (lambda pattern: search.retrain(state, "retrain", pattern), config.fix_epochs),
        }
        for name, (training, epochs) in trainings.items():
            turns = [
                [1e3 * timed(functools.partial(training, pattern), config.device) / epochs for pattern in (search.full(), late)]
                for _ in range(TURNS + 1)
            ]
            first, last = (statistics.median(t) for t in zip(*turns[1:]))  # the first turn warms up
            ratio = statistics.median(b / a for a, b in turns[1:])
            row.update({f"{name}_first_ms": first, f"{name}_late_ms": last, f"{name}_ratio": ratio})

    short = resolve_config(**settings | dict(rounds=1))
    run_search(load_data(config), short, method=lambda _: [("rungs", measure), ("retrain", stages.retrain)])
    return row


# The trainings by themselves.


def search_epochs(config: SearchConfig) -> dict[str, int]:
    """Epochs of a whole search by phase, those that the method has."""
    c = config
    epochs = {"dense": c.fix_epochs, "imp": c.rounds * c.mask_epochs}
    if c.method == "ace":
        epochs["retained"] = c.rounds * (c.ace_rounds + 1) * c.ace_epochs
        epochs["complement"] = c.rounds * c.ace_rounds * c.ace_epochs
    return {**epochs, "retrain": c.rounds * c.fix_epochs}


def time_phases(settings: dict, epochs: int, with_peer: bool, captured: bool) -> list[dict]:
    """Milliseconds of an epoch in each phase: TURNS times `epochs` epochs of acefast as the search calls them, and in between
    `epochs` / TURNS epochs of the peer."""
    if not captured:
        one_by_one()
    config = resolve_config(**settings)
    rows = []
    print(f"{config.dataset}: timing {epochs} epochs of each training, {TURNS} times" + with_peer * " and the peer's once", flush=True)

    def measure(search, state):
        phases = phases_of(search, state, with_peer)
        for phase, count in search_epochs(config).items():
            rows.append({"phase": phase, "epochs": count, **timings(*phases[phase], epochs, config.device)})
            print_phase(config.dataset, rows[-1])

    short = settings | dict(rounds=1, mask_epochs=epochs, fix_epochs=epochs, ace_epochs=epochs)
    # A method of our own, so that data, network and trainings are exactly the search's; its dense baseline warms up.
    run_search(load_data(config), resolve_config(**short), method=lambda _: [("phases", measure), ("retrain", stages.retrain)])
    return rows


def phases_of(search, state, with_peer: bool) -> dict:
    """{phase: (a whole training of acefast, the peer's training or None)}; the ticket is a first round's, drawn at random."""
    config = search.config
    full = search.full()
    uniform = SoftMasks.init(full, 0.5, search.make("phases"))
    ticket = prune(full, uniform, {axis: getattr(config, f"prune_{axis}") for axis in search.axes})
    state.put("keep", ticket)

    def peer(pattern, masks):
        if with_peer:
            from bench.peers.search import Training

            soft = SoftMasks.init(pattern, config.mask_noise, search.make("phases", "mask"), search.axes) if masks else None
            return Training(search.data, search.start, config, pattern, soft)

    def frozen(name, pattern):
        return lambda: search.retrain(state, name, pattern), peer(pattern or full, False)

    def soft(name, pattern):
        return lambda: search.train_masks(state, name, name, pattern, config.mask_epochs), peer(pattern, True)

    return {
        "dense": frozen("dense", None),
        "imp": soft("imp", full),
        "retained": soft("retained", ticket),
        "complement": soft("complement", ticket.complement(search.axes)),
        "retrain": frozen("retrain", ticket),
    }


def timings(ours, peer, epochs: int, device: str) -> dict:
    """Of each implementation: median and minimum of the turns, and the median of its CPU time over all threads, which other
    work on the machine disturbs less."""
    calls = {"acefast": (ours, 1, epochs)}  # what is called, how often in a turn, and the epochs of that
    if peer is not None:
        calls["peer"] = (peer.epoch, epochs // TURNS, epochs // TURNS)
    for call, *_ in calls.values():
        timed(call, device)
    wall, cpu = defaultdict(list), defaultdict(list)
    for _ in range(TURNS):
        for impl, (call, times, count) in calls.items():
            before = time.process_time()
            wall[impl].append(1e3 * timed(call, device, times) * times / count)
            cpu[impl].append(1e3 * (time.process_time() - before) / count)
    row = {}
    for impl in calls:
        row |= {f"{impl}_ms": statistics.median(wall[impl]), f"{impl}_min_ms": min(wall[impl]), f"{impl}_cpu_ms": statistics.median(cpu[impl])}
    if peer is not None:
        row |= {"ratio": row["peer_ms"] / row["acefast_ms"], "cpu_ratio": row["peer_cpu_ms"] / row["acefast_cpu_ms"]}
    return row


def totals(row: dict) -> dict:
    """Seconds of all the search's epochs at what they take in the phases, and how many times longer the peer takes: than
    acefast at the same densities, and than the whole search where that was run."""
    seconds = {
        impl: sum(p["epochs"] * p[f"{impl}_ms"] for p in row["phases"]) / 1e3
        for impl in ("acefast", "peer")
        if f"{impl}_ms" in row["phases"][0]
    }
    result = {f"{impl}_epochs_s": total for impl, total in seconds.items()}
    if "peer" in seconds:
        result["ratio_of_epochs"] = seconds["peer"] / seconds["acefast"]
        if "search" in row:
            result["ratio_to_search"] = seconds["peer"] / row["search"]["total_s"]
    return result


# What is printed.


def print_search(row: dict) -> None:
    search = row["search"]
    parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in search["stage_s"].items())
    print(f"{row['dataset']}: {search['total_s']:.1f} s ({parts}), {search['epochs']:,} epochs, peak {search['peak_bytes'] / 2**20:.0f} MiB")
    for rung in search["rungs"]:
        figures = "".join(f"  {key[:-3]} {rung[key]:.2f} ms" for key in ("retrain_ms", "imp_ms") if rung[key] is not None)
        print(f"  rung {rung['rung']:>2}  edges {rung['edges_density']:.3f}  weights {rung['weights_density']:.3f}{figures}", flush=True)


def print_rungs(row: dict) -> None:
    late = row["late"]
    figures = [
        f"{name} {late[f'{name}_late_ms']:.2f} of {late[f'{name}_first_ms']:.2f} ms ({late[f'{name}_ratio']:.2f})"
        for name in ("imp", "retrain")
    ]
    print(f"{row['dataset']}: an epoch at rung {late['rung']} and at rung 0, in turns: {', '.join(figures)}", flush=True)


def print_phase(dataset: str, phase: dict) -> None:
    figures = [
        f"{impl} {phase[f'{impl}_ms']:8.2f} ms (min {phase[f'{impl}_min_ms']:.2f}, CPU {phase[f'{impl}_cpu_ms']:.2f})"
        for impl in ("acefast", "peer")
        if f"{impl}_ms" in phase
    ]
    if "ratio" in phase:
        figures.append(f"{phase['ratio']:.1f} x (CPU {phase['cpu_ratio']:.1f} x)")
    print(f"{dataset}: an epoch of {phase['phase']:<10} {'   '.join(figures)}   {phase['epochs']:,} in a search", flush=True)


def print_phases(row: dict) -> None:
    seconds = f"all epochs at that: acefast {clock(row['acefast_epochs_s'])}"
    if "peer_epochs_s" in row:
        seconds += f", peer {clock(row['peer_epochs_s'])}, {row['ratio_of_epochs']:.1f} x"
    if "ratio_to_search" in row:
        seconds += f", {row['ratio_to_search']:.1f} x the whole search"
    print(f"{row['dataset']}: {seconds}", flush=True)

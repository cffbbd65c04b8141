"""`python -m bench large`: seconds and memory of searches on graphs of OGB's sizes: epochs by kind, and a whole round of ACE.

Each data set in a fresh process, with the settings of preset `paper` for it and those given by --set. An epoch with soft masks
(imp) and one with frozen ones (retrain), each with its evaluation and what remembers the best epoch, is the difference of a long
and a short training, by their epochs: what only a training's begin costs stands beside it. The peak is that of all of these.
With --round one whole round of ACE is run as a search runs it, after a dense baseline of a single epoch, whose seconds are
estimated from the epochs; twenty rounds at the cost of that one, the dearest since all later ones keep fewer edges, are too.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from acefast.errors import InputError
from acefast.files import write_atomic
from acefast.progress import clock
from acefast.search import Machine, ace, load_data, look_ahead, resolve_config, run_search, stages
from acefast.search.config import tomllib
from bench.harness import environment, status_bytes, timed
from bench.search import in_a_fresh_process, one_by_one, writable
from tests.inputs import REPOSITORY, data_folder

ROUNDS = 20  # of the search that one round stands for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="ogbn-arxiv, twin:ogbn-proteins:0.1, ...")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings as TOML, e.g. 'backbone=\"resgcn\"' layers=28")
    parser.add_argument("--data-root", type=Path, help="folder with ogb/; default: ACEFAST_DATA, ../shared/data or .data")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10, help="of the long training above those of the short one; default: 10")
    parser.add_argument("--short", type=int, default=4, help="epochs of the short training; a captured one needs 4; default: 4")
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True, help="on cuda: epochs as CUDA graphs")
    parser.add_argument("--round", action="store_true", help="run one whole round of ACE too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def main(options: argparse.Namespace, arguments: list[str]) -> int:
    if min(options.epochs, options.short) < 1:
        raise InputError(f"--epochs and --short must be 1 or more, got {options.epochs} and {options.short}")
    if options.json is not None:
        writable(options.json)
    root = options.data_root or next((f for f in (data_folder(), REPOSITORY / ".data") if f.is_dir()), None)
    settings = dict(dataset=options.dataset, device=options.device, threads=options.threads, rounds=1) | given(options.set)
    if root is not None:
        settings["data_root"] = str(root)
    resolve_config(**settings)
    row = {"benchmark": "large", "device": options.device, "captured": options.capture and options.device == "cuda"}
    row |= in_a_fresh_process(time_epochs, settings, options.short, options.epochs, options.capture)
    print_epochs(row)
    if options.round:
        row["round"] = in_a_fresh_process(time_round, settings, row["retrain_s"], options.capture)
        print_round(row["round"])
    if options.json is not None:
        head = environment() | {"threads": options.threads, "device": options.device}
        write_atomic(options.json, json.dumps({"environment": head, "rows": [row]}, indent=1, allow_nan=False) + "\n")
        print(f"written: {options.json}")
    return 0


def given(texts: list[str]) -> dict:
    """The settings of --set."""
    try:
        return tomllib.loads("\n".join(texts))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--set takes KEY=VALUE in TOML, such as layers=28 or 'backbone=\"gcn\"': {error}") from None


def peak_bytes(device: str) -> int:
    """The most that this process held so far: of the GPU's memory in tensors, of the machine's in all."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


def time_epochs(settings: dict, short: int, epochs: int, captured: bool) -> dict:
    if not captured:
        one_by_one()
    config = resolve_config(**settings | dict(mask_epochs=short, fix_epochs=short))
    began = time.perf_counter()
    data = load_data(config)
    row = {"load_s": time.perf_counter() - began}
    row |= {key: getattr(config, key) for key in ("dataset", "backbone", "layers", "hidden", "dtype", "features", "evaluate_every")}
    outlook = look_ahead(config, data, machine=Machine.measure(config.device))
    row |= {"recompute": outlook.plan.recompute, "planned_bytes": outlook.plan.bytes, "planned_s": outlook.plan.seconds}

    def measure(search, state):
        row.update(nodes=search.data.num_nodes, edges=search.data.graph.num_edges)
        own, full = search.config, search.full()
        state.put("keep", full)

        def retrained(count):
            search.config = replace(own, fix_epochs=count)
            search.retrain(state, "retrain", full)
            search.config = own

        kinds = {"imp": lambda count: search.train_masks(state, "imp", "imp", full, count), "retrain": retrained}
        for name, training in kinds.items():
            training(short)  # loads and compiles
            one, more = (timed(partial(training, count), config.device) for count in (short, short + epochs))
            row[f"{name}_s"] = (more - one) / epochs
            row[f"{name}_begin_s"] = one - short * row[f"{name}_s"]
        row["peak_bytes"] = peak_bytes(config.device)

    run_search(data, config, method=lambda _: [("epochs", measure), ("retrain", stages.retrain)])
    return row


def time_round(settings: dict, epoch_s: float, captured: bool) -> dict:
    """Seconds and epochs of a round's stages, and of twenty rounds like this one after a dense baseline with `epoch_s` an epoch."""
    if not captured:
        one_by_one()
    config = resolve_config(**settings)

    def whole(search, state):
        search.config = replace(search.config, fix_epochs=config.fix_epochs)

    data = load_data(config)
    began = time.perf_counter()
    run = run_search(data, replace(config, fix_epochs=1), method=lambda _: [("whole", whole), *ace.stages(config)])
    total = time.perf_counter() - began
    stages_of_round = [stage for stage in run.timings if stage["round"] == 1 and stage["stage"] != "whole"]
    seconds, dense_s = sum(stage["seconds"] for stage in stages_of_round), config.fix_epochs * epoch_s
    return {
        "total_s": total, "round_s": seconds, "stages": stages_of_round, "epochs": sum(stage["epochs"] for stage in stages_of_round),
        "dense_estimated_s": dense_s, "search_estimated_s": dense_s + ROUNDS * seconds, "peak_bytes": peak_bytes(config.device),
        "result": run.rounds[-1],
    }  # fmt: skip


# What is printed.


def print_epochs(row: dict) -> None:
    print(
        f"{row['dataset']}: {row['backbone']}, {row['layers']} layers of {row['hidden']}, {row['dtype']}, {row['nodes']:,} nodes, "
        f"{row['edges']:,} masked edges, read in {row['load_s']:.1f} s"
    )
    for name in ("imp", "retrain"):
        print(f"  an epoch of {name:<8} {1e3 * row[f'{name}_s']:.1f} ms, a training's begin {row[f'{name}_begin_s']:.2f} s")
    recomputed = ", activations computed again" if row["recompute"] else ""
    print(
        f"  peak {row['peak_bytes'] / 1e9:.2f} GB{recomputed}; planned {row['planned_bytes'] / 1e9:.2f} GB and "
        f"{1e3 * row['planned_s']:.1f} ms an epoch of imp", flush=True,
    )  # fmt: skip


def print_round(found: dict) -> None:
    for stage in found["stages"]:
        print(f"  {stage['stage']:<9} {stage['seconds']:7.2f} s, {stage['epochs']} epochs")
    print(
        f"  a round {found['round_s']:.1f} s, {found['epochs']} epochs; estimated: dense {found['dense_estimated_s']:.1f} s, "
        f"{ROUNDS} rounds like it {clock(found['search_estimated_s'])}; peak {found['peak_bytes'] / 1e9:.2f} GB", flush=True,
    )  # fmt: skip

"""Training a ticket anew: from its own first weights, from those of another seed, or its edges under another backbone; and
keeping what was trained."""

import dataclasses
import time
from collections.abc import Callable

import torch

from acefast.data import Dataset
from acefast.errors import InputError
from acefast.nn import state_of
from acefast.pruning import Pattern, Ticket
from acefast.random import generator
from acefast.search.config import SearchConfig, resolve_config
from acefast.search.rounds import load_data, prepare, prepare_data, using_threads
from acefast.search.search import Search
from acefast.search.state import State

NAMES = ("dataset", "task", "backbone", "method", "preset")


def retrain_ticket(
    ticket: Ticket,
    dataset: Dataset | str | None = None,
    seed: int | None = None,
    backbone: str | None = None,
    *,
    data_root: str = "",
    device: str | None = None,
    dense: bool = False,
    shuffle: bool = False,
    progress: Callable[[dict], None] | None = None,
) -> dict:
    """Train ``ticket`` with its masks frozen, by the settings of the search that found it, and return what it reaches.

    ``seed`` and ``backbone`` are the ticket's own unless given. With both its own the training starts at the rewind
    weights and repeats, to the bit where threads and versions are the same, what the search reported; with another seed it
    starts at that seed's fresh weights. Another backbone takes the ticket's edges alone, all of its own weights, and its
    preset's settings but for those in which the search deviated from its preset. ``dataset``: the data set or its name,
    the ticket's own unless given; it must have the ticket's graph. ``dense`` also trains the unpruned network. ``shuffle`` is
    the control of the masks: as many edges, and as many weights of each layer, are kept at random places, drawn by the seed.

    The result: dataset, task, metric, backbone, seed, start ("rewind" or "fresh"), shuffled, edges_kept, edges_total,
    weights_kept, weights_total, epochs, val, test (fractions of the metric), best_epoch, seconds, found_val and found_test (what the search
    reported), and dense_val and dense_test where they were asked for. ``progress`` is called as by ``run_search``. Raises
    InputError for a ticket that does not fit.
    """
    return _train(ticket, dataset, seed, backbone, data_root, device, dense, shuffle, progress)[0]


def export_ticket(
    ticket: Ticket,
    dataset: Dataset | str | None = None,
    seed: int | None = None,
    *,
    data_root: str = "",
    device: str | None = None,
    progress: Callable[[dict], None] | None = None,
) -> Ticket:
    """The ticket trained as by :func:`retrain_ticket`, to be used: a ticket with the same masks that holds the trained weights
    in the place of the first ones, 0 where removed, and in its metadata ``trained`` with seed, start, epochs, best_epoch, val
    and test. ``acefast.compact`` makes its network. Raises InputError for a ticket that does not fit."""
    row, weights = _train(ticket, dataset, seed, None, data_root, device, False, False, progress)
    weights = {name: w.cpu().mul(ticket.weight_keep.get(name, 1)) for name, w in weights.items()}
    trained = {key: row[key] for key in ("seed", "start", "epochs", "best_epoch", "val", "test")}
    return Ticket(ticket.edge_keep, ticket.weight_keep, weights, {**ticket.metadata, "trained": trained})


def _train(
    ticket, dataset, seed, backbone, data_root, device, dense, shuffle, progress
) -> tuple[dict, dict[str, torch.Tensor]]:
    """(what ``retrain_ticket`` returns, the trained weights by name)."""
    if "trained" in ticket.metadata:
        raise InputError("this ticket was exported, its weights are trained ones: give the ticket that it was made from")
    found = settings_of(ticket)
    config = _deviate(found, seed, backbone)
    changes = {"device": device, "data_root": data_root, "dataset": dataset if isinstance(dataset, str) else None}
    config = dataclasses.replace(config, **{key: value for key, value in changes.items() if value})
    data = dataset if isinstance(dataset, Dataset) else load_data(config)
    ticket.check_graph(prepare_data(data, found).graph)
    own_backbone = config.backbone == found.backbone
    own_start = own_backbone and config.seed == found.seed
    began = time.perf_counter()
    with using_threads(config.threads):
        search = prepare(data, config, None, progress or (lambda event: None))
        if own_backbone:
            ticket.check_model(search.model)
            pattern = Pattern(ticket.edge_keep, ticket.weight_keep)
        else:
            # Self-loops that a backbone adds follow the data's edges: another's are dropped, its own are all kept.
            edges = torch.ones(search.data.graph.num_edges, dtype=torch.bool)
            shared = min(edges.numel(), ticket.edge_keep.numel())
            edges[:shared] = ticket.edge_keep[:shared]
            pattern = search.full().with_axis("edges", [edges])
        pattern = pattern.map(lambda keep: keep.to(search.data.device))
        if shuffle:
            pattern = shuffled(pattern, search)
        if own_start:
            search.start = {name: value.to(search.data.device) for name, value in ticket.rewind.items()}
        fit = search.retrain(State(round=ticket.metadata["round"]), "retrain", pattern)
        seconds = time.perf_counter() - began
        weights = {name: value.clone() for name, value in state_of(search.model).items()}
        unpruned = search.retrain(State(), "dense", None) if dense else None
    row = {
        "dataset": config.dataset, "task": config.task, "metric": search.data.metric,
        "backbone": config.backbone, "seed": config.seed,
        "start": "rewind" if own_start else "fresh", "shuffled": shuffle, **pattern.counts(), "epochs": config.fix_epochs,
        "val": fit.val, "test": fit.test, "best_epoch": fit.best_epoch, "seconds": seconds,
        "found_val": ticket.metadata["val"], "found_test": ticket.metadata["test"],
        **({"dense_val": unpruned.val, "dense_test": unpruned.test} if dense else {}),
    }  # fmt: skip
    return row, weights


def shuffled(pattern: Pattern, search: Search) -> Pattern:
    """As many kept elements in each tensor, at places drawn by the search's seed."""

    def shuffle(name: str, keep: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(keep.numel(), generator=generator(search.config.seed, "shuffle", name))
        return keep.flatten()[order.to(keep.device)].view_as(keep)

    weights = {name: shuffle(name, keep) for name, keep in pattern.weights.items()}
    return Pattern(shuffle("edges", pattern.edges), weights)


def settings_of(ticket: Ticket) -> SearchConfig:
    """The configuration of the search that found the ticket."""
    missing = {"settings", "round", "val", "test"} - ticket.metadata.keys()
    if missing:
        raise InputError(f"this ticket does not say its {min(missing)}: retrain one that acefast search has written")
    return SearchConfig.from_dict(ticket.metadata["settings"])


def _deviate(found: SearchConfig, seed: int | None, backbone: str | None) -> SearchConfig:
    """The configuration with another seed, and that of another backbone's preset with the search's own deviations."""
    if seed is not None:
        found = SearchConfig.from_dict({**found.to_dict(), "seed": seed})
    if backbone is None or backbone == found.backbone:
        return found
    names = {name: getattr(found, name) for name in NAMES}
    preset = resolve_config(**names).to_dict()
    deviations = {key: value for key, value in found.to_dict().items() if value != preset[key] and key not in NAMES}
    return resolve_config(**{**names, "backbone": backbone}, **{**deviations, "seed": found.seed})

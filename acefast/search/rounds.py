"""The round loop: dense baseline, then rounds of a method's stages, each stage committed before the next begins."""

import gc
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

import acefast
from acefast import nn
from acefast.data import Dataset, load_dataset, split_links
from acefast.errors import InputError
from acefast.memory import kept_memory
from acefast.ops.backend import get_backend
from acefast.pruning import Ticket, find_score
from acefast.search import released
from acefast.search.config import UNHASHED, SearchConfig, reads_edge_features, resolve_config
from acefast.search.folder import Folder, Memory
from acefast.search.methods import find_method
from acefast.search.plan import check_device, epochs_of, look_ahead
from acefast.search.run import Run
from acefast.search.search import Search
from acefast.search.stages import dense as dense_stage
from acefast.search.state import State
from acefast.search.trainings import OutOfTime, Trainings

LADDER, MARGIN = 20, 0.005  # of a search with rounds = "auto"

def run_search(
    dataset: Dataset,
    config: SearchConfig,
    out=None,
    progress: Callable[[dict], None] | None = None,
    model: torch.nn.Module | None = None,
    method: Callable[[SearchConfig], list] | None = None,
    time_limit: float | None = None,
    checkpoint_epochs: int | None = None,
    memory_limit: int | None = None,
) -> Run:
    """Run (or go on with) the search that ``config`` describes and return its record.

    ``out`` is the run's folder; None keeps the run in memory. ``progress(event)`` is called with every line of the
    history and with events "run", "stage", "training", "epoch", "stage_end" in between; what it raises ends the call
    and leaves the folder resumable from there. ``model`` takes the place of the configured backbone: a module with ``maskable()``
    and the forward of ``acefast.nn.GCN``, whose weights at the time of the call are the first weights. ``method`` takes
    the place of the configured one: a function from the configuration to a round's stages, (name, f(search, state)).

    After ``time_limit`` seconds the epoch that runs is ended, what was trained so far is written, and the Run that is
    returned is not ``complete``; the same call goes on from there, where there is a folder. Besides, what a stage has trained
    so far is written about once a minute, or every ``checkpoint_epochs`` epochs of a stage (``acefast.search.trainings``), so
    that a process that is killed loses no more. Where tensors are large and four times the planned memory is there (within
    ``memory_limit`` bytes; default: what the machine has), freed memory stays with the process until the end, which is faster.

    Raises InputError where the folder belongs to another search or data set, or is in use.
    """
    end = _end(time_limit)
    if checkpoint_epochs is not None and checkpoint_epochs < 1:
        raise InputError(f"checkpoint_epochs must be 1 or more, got {checkpoint_epochs}")
    store = Memory() if out is None else Folder(out)
    with using_threads(config.threads):
        search = prepare(dataset, config, model, progress or (lambda event: None))  # refuses before a folder is made
    search.trainings = Trainings(store, checkpoint_epochs, end)
    keeps = look_ahead(search.config, search.data, memory_limit).keeps_memory
    with store.locked(), using_threads(config.threads), _frozen_objects(), kept_memory() if keeps else nullcontext():
        store.open(config)
        identity = {"data": dataset.fingerprint, "start": _fingerprint(search)}
        state = store.load(config.device)
        if state is None:
            state = State(values={**identity, "environment": _environment()})
        _same(state.values, identity, store.path)
        make_stages = method or (released.stages if _released(config) else find_method(config.method))
        try:
            _rounds(search, state, store, make_stages(config), None if method else epochs_of(config))
        except OutOfTime:
            pass  # the Run tells that it is not complete
        finally:
            search.rewind()
        return Run(config, state.history, state.timings, store)


def _end(time_limit: float | None) -> float:
    """When the time is over, by ``time.monotonic``."""
    if time_limit is None:
        return math.inf
    if not time_limit >= 0:
        raise InputError(f"time_limit must be 0 or more seconds, got {time_limit}")
    return time.monotonic() + time_limit


def find_ticket(
    dataset, model="gcn", method="ace", config=None,
    *, out=None, progress=None, time_limit=None, checkpoint_epochs=None, memory_limit=None, **settings,
) -> Run:  # fmt: skip
    """The whole search as one call.

    dataset: a ``Dataset``, or the name of one that ``data_root`` (among ``settings``) holds. model: a backbone's name
    or a module (see :func:`run_search`). method: a method's name or a function that gives a round's stages. config: a
    :class:`SearchConfig`, or a preset's name, from which ``settings`` deviate. ``out`` and what follows: as of
    :func:`run_search`. Raises InputError for what cannot be.
    """
    own_model = None if isinstance(model, str) else model
    own_method = None if isinstance(method, str) else method
    if not isinstance(config, SearchConfig):
        preset = config or settings.pop("preset", "paper")
        name = dataset if isinstance(dataset, str) else dataset.name
        names = ("gcn" if own_model else model, "ace" if own_method else method)
        config = resolve_config(name, *names, preset, **settings)
    elif settings:
        raise InputError(f"give {', '.join(settings)} within config, or a preset's name as config")
    if isinstance(dataset, str):
        dataset = load_data(config)
    return run_search(dataset, config, out, progress, own_model, own_method, time_limit, checkpoint_epochs, memory_limit)


def load_data(config: SearchConfig) -> Dataset:
    """The data set that the configuration names; with its files' self-loops where the released code counts them."""
    return load_dataset(
        config.dataset, config.data_root or None, keep_self_loops=config.preset == "released", features=config.features
    )


def _released(config: SearchConfig) -> bool:
    return config.preset == "released" and config.method == "ace"


def prepare(dataset: Dataset, config: SearchConfig, model, progress) -> Search:
    """The data and the first weights that ``config`` (or ``model``) describes, on its device, ready to train."""
    check_device(config.device)
    data = prepare_data(dataset, config).to(config.device)
    if config.backbone == "resgcn" and config.recompute == "auto":
        config = look_ahead(config, data).config
    if model is None:
        model = build_model(data, config)
    elif isinstance(model, nn.Network):
        model.dtype = getattr(torch, config.dtype)
    elif config.dtype != "float32":
        raise InputError(
            f"dtype {config.dtype} is for the networks of acefast.nn, and the model given is a {type(model).__name__}: narrow "
            "within it and take dtype float32, that of its outputs"
        )
    return Search(config, data, model.to(config.device), progress)


def prepare_data(dataset: Dataset, config: SearchConfig) -> Dataset:
    """The data as the configured task and backbone see it: features divided by their sums where ``row_normalise``; for task
    link its edges split by ``split_links`` where it does not come with links to predict; for gat a self-loop for each node,
    edge number E + i, which carries a mask like any edge (UGS); features of edges where the network reads them; dense features
    in the configured dtype. Raises InputError where the data cannot be learned so."""
    if dataset.task == "link" and config.task != "link":
        raise InputError(f"{dataset.name} has the task 'link', and {config.task!r} was asked for: set task link (--task link)")
    if config.features == "learned":
        dataset = replace(dataset, x=None, features="learned")
    elif dataset.x is None:
        raise InputError(f"{dataset.name} has no features, which every backbone needs: take features learned or fastrp")
    if dataset.task != "node" or config.task != "node":
        for name in (config.score, config.edge_score or config.score):
            if "predictions" in find_score(name).needs:
                raise InputError(f"score {name} compares classes of nodes, which {dataset.name} has not in this task: choose another")
    data = dataset.with_row_normalized_features() if config.row_normalise else dataset
    data = split_links(data) if config.task == "link" and data.task != "link" else data
    if data.edge_attr is not None and not reads_edge_features(config):
        data = replace(data, edge_attr=None)
    if config.backbone == "gat":
        data = replace(data, graph=data.graph.with_self_loops())
    return data if config.dtype == "float32" else data.with_features_in(getattr(torch, config.dtype))


def build_model(data: Dataset, config: SearchConfig, seed: int | None = None) -> torch.nn.Module:
    """The configured backbone for data from ``prepare_data``, with first weights drawn from ``seed`` (default: the
    configuration's)."""
    pruned = "absent" if config.pruned_edges == "absent" else "in_denominator"
    own = {
        "gcn": dict(bias=config.bias, self_loops=config.self_loops, degrees=config.degrees),
        "gin": dict(pruned=pruned),
        "gat": dict(pruned=pruned, heads=config.heads),
        "sage": dict(pruned=pruned),
        "resgcn": dict(
            aggr=config.aggr, t=config.t, learn_t=config.learn_t, mlp_layers=config.mlp_layers, norm=config.norm,
            edge_attr=data.edge_attr, pruned=pruned, recompute=config.recompute == "yes",
        ),
    }[config.backbone]  # fmt: skip
    outputs = config.embedding if config.task == "link" else data.num_classes
    seed, learned = config.seed if seed is None else seed, data.x is None
    model = nn.build(
        config.backbone, config.hidden if learned else data.num_features, outputs, seed=seed,
        hidden=config.hidden, layers=config.layers, dropout=config.dropout, **own,
    )  # fmt: skip
    if config.task == "link" and config.decoder == "mlp":
        model.decoder = nn.HadamardMLP(outputs, config.dropout, seed)
    model.dtype = getattr(torch, config.dtype)
    return model.embed(data.num_nodes, config.hidden, seed) if learned else model


def _rounds(search: Search, state: State, store, stages: list, planned: tuple[int, int] | None) -> None:
    """Work off the rounds that are left; ``state`` always is what the store holds. ``planned``: epochs of the dense baseline
    and, at most, of a round, where they are known."""
    last, trainings = last_round(search.config, state.history) if stages else 0, search.trainings
    epochs = None if planned is None else planned[0] + last * planned[1] - sum(line["epochs"] for line in state.timings)
    names = [name for name, _ in stages]
    search.progress({"event": "run", "rounds": last, "stages": names, "done": state.round, "epochs": epochs})
    while state.round <= last:
        plan = stages if state.round else [("dense", dense_stage)]
        name, stage = plan[state.stage]
        trainings.open(_identity(search.config, state))
        search.progress({"event": "stage", "round": state.round, "stage": name})
        following = state.copy()
        stage(search, following)
        following.stage += 1
        following.timings.append({"round": state.round, "stage": name, **trainings.cost()})
        if following.stage == len(plan):
            if following.round:
                store.save_ticket(following.round, _ticket(search, following))
            following.round, following.stage = following.round + 1, 0
        store.commit(following)
        trainings.close()
        search.progress({"event": "stage_end", "round": state.round, "stage": name})
        vars(state).update(vars(following))
        if stages and last_round(search.config, state.history) != last:
            last = last_round(search.config, state.history)
            search.progress({"event": "rounds", "rounds": last})


def _identity(config: SearchConfig, state: State) -> dict:
    """The stage that follows ``state``, with all that its trainings depend on; the timings, which no other run has, stand for the
    stages before it."""
    before = json.dumps([state.values, state.timings, _environment()])
    digest = hashlib.sha256(before.encode()).hexdigest()
    return {"run": config.hash(), "round": state.round, "stage": state.stage, "after": digest}


def last_round(config: SearchConfig, history: list[dict]) -> int:
    """The last round of the ladder as far as the history so far decides it. ``rounds`` auto: round 20, and one more as long as
    the last one removed something and its validation accuracy is above dense - ``MARGIN``."""
    if config.rounds != "auto":
        return config.rounds
    rounds = [event for event in history if event["event"] == "round"]
    done = len(rounds) - 1
    if done < LADDER:
        return LADDER
    counts = ("edges_kept", "weights_kept")
    removed = any(rounds[-1][name] < rounds[-2][name] for name in counts)
    return done + (removed and rounds[-1]["val"] > rounds[0]["val"] - MARGIN)


def _ticket(search: Search, state: State) -> Ticket:
    """The ticket of the round that has just been retrained."""
    pattern = state.get("result")
    state.drop("result")
    c = search.config
    metadata = {
        "dataset": c.dataset, "task": c.task, "metric": search.data.metric,
        "fingerprint": search.data.graph.fingerprint(), "backbone": c.backbone,
        "method": c.method, "preset": c.preset, "axes": c.axes, "round": state.round, "seed": c.seed,
        **state.values.pop("result"), "config_hash": c.hash(), "acefast_version": acefast.__version__,
        "settings": {key: value for key, value in c.to_dict().items() if key not in UNHASHED},
    }  # fmt: skip
    pattern = pattern.map(lambda keep: keep.cpu())
    return Ticket(pattern.edges, pattern.weights, {name: t.cpu() for name, t in search.start.items()}, metadata)


def _fingerprint(search: Search) -> str:
    digest = hashlib.sha256()
    for name, tensor in search.start.items():
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _same(found: dict, identity: dict, path) -> None:
    what = {"data": "another data set", "start": "a model with other first weights"}
    for key, value in identity.items():
        if found.get(key) != value:
            raise InputError(f"{path} holds a search on {what[key]}: give the same one or another --out")
    before, now = found["environment"], _environment()
    changed = [f"{key} {before.get(key)} (now {now[key]})" for key in now if before.get(key) != now[key]]
    if changed:
        warnings.warn(
            f"{path} was begun with {', '.join(changed)}: what follows may differ in its last bits", stacklevel=3
        )


def _environment() -> dict:
    return {
        "acefast": acefast.__version__, "torch": torch.__version__, "backend": get_backend(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


@contextmanager
def _frozen_objects():
    """The objects that exist are left out of garbage collection inside: at Cora's size it would be a tenth of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def using_threads(count: int):
    """So many CPU threads within, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

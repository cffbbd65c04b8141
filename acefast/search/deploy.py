"""Tickets put to use: the pruned network taken out of the masked one, and what an inference of it takes."""

import copy
import dataclasses
import time
from statistics import median

import torch
from torch import Tensor

from acefast.csr import CSR
from acefast.data import Dataset
from acefast.errors import InputError
from acefast.kept import KeptWeights
from acefast.nn import Network
from acefast.pruning import Pattern, Ticket
from acefast.search.config import SearchConfig
from acefast.search.rounds import build_model, load_data, prepare_data, using_threads
from acefast.search.transfer import settings_of


class CompactNetwork(torch.nn.Module):
    """A pruned network for inference alone: the kept edges as a graph of their own, coefficients of edges made once, removed
    weights 0, and those that meet sparse features as lists of the kept ones where `KeptWeights.pays`.

    ``forward(x)`` gives the logits [N, classes] of the masked network, to the bit but for the order of additions in products
    with dense inputs of another layout; ``predict(x)`` the classes [N]. x is as ``prepared`` data has it; the data's own
    unless given. Made by :func:`compact`.
    """

    def __init__(self, model: Network, data: Dataset, pattern: Pattern):
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.graph, self.arguments = self.model.compact(data.graph, pattern.edges)
        self.x, self.keeps = data.x, {}
        for name, parameter in self.model.named_parameters():
            keep = pattern.weights.get(name)
            if keep is not None:
                parameter.mul_(keep)
            if isinstance(data.x, CSR) and parameter.dim() == 2 and parameter.size(1) == data.num_features:
                parameter.data = parameter.data.t().contiguous().t()  # it is read column by column
                if keep is not None and KeptWeights.pays(keep):
                    kept = self.keeps[name] = KeptWeights(keep)
                    kept.values = kept.listed(parameter)
            elif keep is not None and not bool(keep.all()):
                self.keeps[name] = keep

    @torch.no_grad()
    def forward(self, x: Tensor | CSR | None = None) -> Tensor:
        return self.model(self.graph, self.x if x is None else x, weight_keep=self.keeps, **self.arguments)

    def predict(self, x: Tensor | CSR | None = None) -> Tensor:
        """The class of each node, int64 [N]."""
        return self(x).argmax(1)


def compact(ticket: Ticket, dataset: Dataset | str | None = None, *, data_root: str = "", dense: bool = False) -> CompactNetwork:
    """The ticket's network, with the weights that the ticket holds (of an exported ticket the trained ones), for inference.

    ``dataset``: the data set or its name, the ticket's own unless given. ``dense`` keeps every edge and weight, for
    comparisons. Raises InputError for a ticket that does not fit or was not written by a search.
    """
    config, data = prepared(ticket, dataset, data_root)
    model = build_model(data, config)
    ticket.check_model(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ticket.rewind[name])
    pattern = Pattern(ticket.edge_keep, ticket.weight_keep)
    return CompactNetwork(model, data, pattern.map(torch.ones_like) if dense else pattern)


def prepared(ticket: Ticket, dataset: Dataset | str | None, data_root: str) -> tuple[SearchConfig, Dataset]:
    """The settings of the search that found the ticket and the data as its backbone sees them, which have its graph."""
    config = settings_of(ticket)
    changes = {"data_root": data_root, "dataset": dataset if isinstance(dataset, str) else None}
    config = dataclasses.replace(config, **{key: value for key, value in changes.items() if value})
    data = prepare_data(dataset if isinstance(dataset, Dataset) else load_data(config), config)
    ticket.check_graph(data.graph)
    return config, data


def time_inference(
    ticket: Ticket, dataset: Dataset | str | None = None, *, data_root: str = "", repeats: int = 50, threads: int = 1
) -> dict:
    """Seconds of an inference (the logits of all nodes) of the compacted network and of the dense one in the same form, on
    the CPU, taken in turns, after one of each that does not count.

    inference_dense and inference_compact are the fastest of ``repeats``, which a busy machine disturbs least; with _median
    the medians; inference_threads the CPU threads. Raises InputError as :func:`compact` does.
    """
    if repeats < 1 or threads < 1:
        raise InputError(f"repeats and threads must be 1 or more, got {repeats} and {threads}")
    networks = {name: compact(ticket, dataset, data_root=data_root, dense=name == "dense") for name in ("dense", "compact")}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    with using_threads(threads):
        for repeat in range(repeats + 1):
            for name, network in networks.items():
                began = time.perf_counter()
                network()
                if repeat:
                    seconds[name].append(time.perf_counter() - began)
    fastest = {f"inference_{name}": min(values) for name, values in seconds.items()}
    medians = {f"inference_{name}_median": median(values) for name, values in seconds.items()}
    return {**fastest, **medians, "inference_threads": threads, "repeats": repeats}

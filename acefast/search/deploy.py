"""Tickets put to use: the pruned network taken out of the masked one, and what an inference of it takes."""

import copy
import dataclasses
import functools
import time
from statistics import median

import torch
from torch import Tensor

from acefast.csr import CSR
from acefast.data import Dataset
from acefast.errors import InputError
from acefast.kept import KeptWeights
from acefast.nn import Network, state_of
from acefast.pruning import Pattern, Ticket
from acefast.search.config import SearchConfig
from acefast.search.rounds import build_model, load_data, prepare_data, using_threads
from acefast.search.transfer import settings_of


WIDTH = 256  # hidden channels at a time: at Cora's size what they need stays in a core's cache (measured: 128 to 256 are best)


class CompactNetwork(torch.nn.Module):
    """A pruned network for inference alone: the kept edges as a graph of their own, coefficients of edges made once, removed
    weights 0; of sparse features the columns that no kept weight reads fall away, and the weights are lists of the kept ones
    where `KeptWeights.pays`; a wide network as a sum over groups of its hidden channels where it is one (`Network.parts`).

    ``forward(x)`` gives the outputs float32 [N, classes] of the masked network, to the bit but for the additions over groups
    (in another order, and of a search in bfloat16 rounded in each group); ``predict(x)`` the classes [N]. x as the search sees
    it (``prepared``), the data's own unless given. Made by :func:`compact`.
    ``decoder``: what scores pairs of nodes by the outputs; None for scalar products.
    """

    def __init__(self, model: Network, data: Dataset, pattern: Pattern):
        super().__init__()
        model = copy.deepcopy(model).eval()
        self.graph, self.arguments = model.compact(data.graph, pattern.edges)
        self.decoder, model.decoder = model.requires_grad_(False).decoder, None
        self.parts = torch.nn.ModuleList()
        self.inputs = []  # of each part: its features, the columns that they are, the patterns that its forward is given
        for part, places in model.parts(WIDTH):
            keeps = {name: keep[places[name]] if name in places else keep for name, keep in pattern.weights.items()}
            self.parts.append(part.requires_grad_(False))
            self.inputs.append(_prepare(part, data.x, keeps))

    @torch.no_grad()
    def forward(self, x: Tensor | CSR | None = None) -> Tensor:
        logits = []
        for part, (own, columns, keeps) in zip(self.parts, self.inputs, strict=True):
            h = own if x is None else x if columns is None else x.columns(columns)
            logits.append(part(self.graph, h, weight_keep=keeps, **self.arguments))
        return functools.reduce(torch.add, logits)

    def predict(self, x: Tensor | CSR | None = None) -> Tensor:
        """The class of each node, int64 [N] (task node)."""
        return self(x).argmax(1)


def _prepare(model: Network, x: Tensor | CSR, keeps: dict[str, Tensor]):
    """Set removed weights to 0, bring the first layer's to the form in which sparse features are read fastest, and return
    (features, the columns bool [F] that they are or None for all, patterns that the forward is to be given)."""
    with torch.no_grad():
        for name, keep in keeps.items():
            model.get_parameter(name).mul_(keep)
    first, name = getattr(model.layers[0], "lin", None), "layers.0.lin.weight"
    given = {other: keep.contiguous() for other, keep in keeps.items() if other != name and not bool(keep.all())}
    if first is None:  # features meet other weights than those of one layer alone
        return x, None, given
    if not isinstance(x, CSR):
        return x, None, {**given, name: keeps[name]}
    columns = keeps[name].any(0)
    keep, features = keeps[name][:, columns], x.columns(columns)
    first.weight = torch.nn.Parameter(first.weight[:, columns].t().contiguous().t(), requires_grad=False)
    first.in_features = keep.size(1)
    if KeptWeights.pays(keep, features):
        given[name] = KeptWeights(keep)
        given[name].values = given[name].listed(first.weight)
    return features, columns, given


def compact(
    ticket: Ticket, dataset: Dataset | str | None = None, *, data_root: str = "", dense: bool = False
) -> CompactNetwork:
    """The ticket's network, with the weights that the ticket holds (of an exported ticket the trained ones), for inference.

    ``dataset``: the data set or its name, the ticket's own unless given. ``dense`` keeps every edge and weight, for
    comparisons. Raises InputError for a ticket that does not fit or was not written by a search.
    """
    config, data = prepared(ticket, dataset, data_root)
    model = build_model(data, config)
    ticket.check_model(model)
    with torch.no_grad():
        for name, value in state_of(model).items():
            value.copy_(ticket.rewind[name])
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
    """Seconds of an inference (the logits of all nodes) on the CPU of three networks, taken in turns after one of each that
    does not count: inference_dense, the unpruned network as the library's module runs it; inference_regrouped, the same in
    the form of :class:`CompactNetwork`, so that what pruning itself brings can be told; inference_compact, the ticket's.

    Each is the fastest of ``repeats``, which a busy machine disturbs least; with _median the medians; inference_threads the
    CPU threads. Raises InputError as :func:`compact` does.
    """
    if repeats < 1 or threads < 1:
        raise InputError(f"repeats and threads must be 1 or more, got {repeats} and {threads}")
    config, data = prepared(ticket, dataset, data_root)
    model = build_model(data, config).eval()
    calls = {
        "dense": lambda: model(data.graph, data.x),
        "regrouped": compact(ticket, dataset, data_root=data_root, dense=True),
        "compact": compact(ticket, dataset, data_root=data_root),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with using_threads(threads), torch.no_grad():
        for repeat in range(repeats + 1):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                if repeat:
                    seconds[name].append(time.perf_counter() - began)
    fastest = {f"inference_{name}": min(values) for name, values in seconds.items()}
    medians = {f"inference_{name}_median": median(values) for name, values in seconds.items()}
    return {**fastest, **medians, "inference_threads": threads, "repeats": repeats}

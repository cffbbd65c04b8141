"""Memory and time of a search from sizes alone, before anything is loaded: what is held at the peak, by part, and what fits.

The peak is that of a training step with soft masks, after the first pruning where edges are pruned. Counted are the tensors
that exist then; two constants are measured, the code that torch loads at its first step and the working memory of one layer's
backward pass, in tensors like its output. Times are estimates: bytes and multiplications of an epoch over this machine's
speed at a copy and at a product, good to a factor of two.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from acefast import memory
from acefast.data import Dataset, Sizes
from acefast.errors import InputError
from acefast.nn.resgcn import kept_tensors, segment
from acefast.search.config import SearchConfig, reads_edge_features
from acefast.train import lists_edges

LIBRARIES = 160 * 2**20  # what a first training step makes torch load, CPU
LOADING = 24  # bytes an edge beside the data that making a twin takes; a first reading of OGB's files may take 90, later ones 0
WORKING = {"resgcn": 5, "gat": 4}  # tensors like a layer's widest, in its backward pass; of the others 3
EXPONENTIAL = {"resgcn": 2.0, "gat": 2.0}  # time of a pass over the messages in copies of them, where it is not the sum's 1
KEPT = 4  # times its plan that a search may come to take where freed memory is kept; measured: up to 3
ROUNDS = 20  # that a ladder of "auto" is planned with
PAIRS = 6  # [pairs, embedding] tensors of an MLP on pairs: both ends, their product, two of the MLP, a gradient
PASSES = 4  # over the messages in an epoch: forward, backward by both ends, evaluation


@dataclass(frozen=True)
class Machine:
    """Bytes a second of a copy (read and written) and multiply-adds a second of a product of float32 matrices."""

    copied: float
    multiplied: float

    @classmethod
    def measure(cls, device: str = "cpu") -> "Machine":
        """Of this machine now, in less than a second."""
        source, a = torch.ones(2**24, device=device), torch.ones(1024, 512, device=device)
        target, b = torch.empty_like(source), torch.ones(512, 512, device=device)

        def best(call):
            seconds = []
            for _ in range(5):
                began = time.perf_counter()
                call()
                if source.is_cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            return min(seconds)

        copy, product = best(lambda: target.copy_(source)), best(lambda: a @ b)
        return cls(8 * source.numel() / copy, a.numel() * b.size(1) / product)


@dataclass(frozen=True)
class Plan:
    """Bytes by part at the peak of the search (`data` of them are the data's own), seconds of an epoch with soft masks and
    evaluation at full density (None: not asked for), epochs of the whole search, and whether activations are recomputed."""

    parts: dict[str, int]
    data: int
    epochs: int
    recompute: bool
    seconds: float | None = None

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def predict(sizes: Sizes, config: SearchConfig, machine: Machine | None = None, process: int = 0) -> Plan:
    """The plan of a search with `config` (its recompute "auto" counts as "no") on data of `sizes`, in a process that holds
    `process` bytes already."""
    if config.task == "link":
        sizes = replace(sizes, outputs=config.embedding)
    learned = config.hidden if config.features == "learned" else 0
    if learned:
        sizes = replace(sizes, columns=learned, entries=sizes.nodes * learned)
    n, e, f = sizes.nodes, sizes.edges, config.hidden
    if config.backbone == "gat":
        e += n  # a loop for each node, with a mask
    rounds = ROUNDS if config.rounds == "auto" else config.rounds
    masked = config.sweeps_edges and rounds > 0
    kept = 1 - config.prune_edges * (rounds > 1) if masked else 1.0
    listed = kept < 1 and lists_edges(e, int(kept * e))
    recompute = config.backbone == "resgcn" and config.recompute == "yes"
    exchanges = _exchanges(config)
    widths = _widths(sizes, config)
    weights = _weights(sizes, config, widths)
    index = 4 if max(n, e) < 2**31 else 8
    features, narrowed = sizes.feature_bytes, 0
    if config.dtype == "bfloat16" and not sizes.narrow:
        dense = sizes.entries if sizes.entries == n * sizes.columns else 0
        narrowed = 2 * (dense + sizes.edges * sizes.edge_columns * reads_edge_features(config))
        if config.device != "cpu" and not learned:  # which gets the narrow features alone
            features, narrowed = features - narrowed, 0
    working = WORKING.get(config.backbone, 3) * max(widths[1:])
    if config.backbone == "resgcn" and config.mlp_layers == 2:
        working += 4 * f
    parts = {
        "process": process + (LIBRARIES if config.device == "cpu" else 0),
        "graph, both ways": int(e * index * (2 if sizes.undirected else 3) + 16 * n),
        "features and labels": features,
        "features in bfloat16": narrowed,
        "weights, masks, moments": 44 * weights,
        "learned features, gradients, moments": 28 * n * learned,
        "edge mask, gradients, moments": int(e * (12 + 20 * kept if listed else 24)) if masked else 0,
        "kept edges, both ways": int(e * 4 * index * kept) if listed else 0,
        "patterns and scores": e * (20 if exchanges else 4) if masked else 0,
        "coefficients of edges": 24 * e if config.backbone == "gcn" and config.degrees != "none" else 0,
        "activations kept": n * _kept_bytes(config, widths, recompute),
        "activations at work": n * (_element(config) * working + 12 * sizes.outputs),
        "scores of links": PAIRS * 4 * 2 * min(config.links or e, e) * config.embedding if config.decoder == "mlp" else 0,
    }
    data = parts["graph, both ways"] + parts["features and labels"]
    loading = LOADING * sizes.edges - (sum(parts.values()) - parts["process"] - data)
    parts["loading, beyond training"] = max(0, loading)
    dense, each = epochs_of(config)
    plan = Plan({name: size for name, size in parts.items() if size}, data, dense + rounds * each, recompute)
    if machine is None:
        return plan
    passes = PASSES + recompute
    messages = sum(min(a, b) if config.backbone != "resgcn" else b for a, b in zip(widths, widths[1:], strict=False))
    numbers = EXPONENTIAL.get(config.backbone, 1.0) * e * messages + 10 * n * sum(widths[1:])
    moved = _element(config) * passes * numbers + 60 * e * masked
    zeros = n * sizes.columns - sizes.entries  # of sparse features
    absent = zeros * widths[1] * (2 if config.backbone == "sage" else 1)
    multiplied = passes * (n * weights - absent)
    return replace(plan, seconds=moved / machine.copied + multiplied / machine.multiplied)


def epochs_of(config: SearchConfig) -> tuple[int, int]:
    """Epochs of the dense baseline and, at most, of a round."""
    each = config.fix_epochs + config.mask_epochs * (config.method != "random")
    each += config.ace_epochs * (2 * config.ace_rounds + 1) if _exchanges(config) else 0
    return config.fix_epochs, each


def _exchanges(config: SearchConfig) -> bool:
    """Whether the method has ACE's epochs, or about as many."""
    return config.method not in ("dense", "random", "ugs", "gebt")


def _widths(sizes: Sizes, config: SearchConfig) -> list[int]:
    """Columns of what goes into each layer, and of the logits."""
    f, count = config.hidden * (config.heads if config.backbone == "gat" else 1), config.layers
    return [f] * (count + 1) if config.backbone == "resgcn" else [sizes.columns, *[f] * (count - 1), sizes.outputs]


def _weights(sizes: Sizes, config: SearchConfig, widths: list[int]) -> int:
    layers = sum(a * b for a, b in zip(widths, widths[1:], strict=False))
    if config.backbone == "resgcn":
        layers *= 4 if config.mlp_layers == 2 else 1
        layers += config.hidden * (sizes.columns + sizes.outputs + config.hidden * config.layers * bool(sizes.edge_columns))
    return layers * (2 if config.backbone == "sage" else 1)


def _element(config: SearchConfig) -> int:
    """Bytes of a number of a hidden feature."""
    return 2 if config.dtype == "bfloat16" else 4


def _kept_bytes(config: SearchConfig, widths: list[int], recompute: bool) -> int:
    """Bytes a node of the [N, ...] tensors that a forward pass keeps for backward."""
    size = _element(config)
    if config.backbone == "resgcn":
        kept = kept_tensors(config.aggr, config.mlp_layers)
        together = segment(config.layers, kept) if recompute else config.layers
        a_layer = size * kept + (4 - size) * config.aggr.startswith("softmax")  # whose denominators are float32
        return config.hidden * (size * (-(-config.layers // together) - 1) + a_layer * together)
    pairs = list(zip(widths, widths[1:], strict=False))
    if config.backbone == "gat":  # the dropped input and its noise; z, its weighted sums, ELU's output
        return size * sum(2 * a + 3 * b for a, b in pairs)
    return size * (sum(a for a, _ in pairs[1:]) + sum(min(a, b) for a, b in pairs))  # inputs, and what is aggregated


def check_device(device: str) -> None:
    """Raises InputError for a GPU where torch finds none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device} was asked for and torch finds no CUDA device here: use device cpu")


def available(device: str = "cpu") -> int:
    """Bytes that this process may still take: of the machine's memory and of its control group's limit; of a GPU its free
    memory."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    free = [psutil.virtual_memory().available]
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            values = [int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit, used)]
        except (OSError, ValueError):  # no such control group, or no limit in it ("max")
            continue
        free.append(values[0] - values[1])
    return max(0, min(free))


@dataclass(frozen=True)
class Outlook:
    """A search that was planned: its settings with recompute "yes" or "no" in the place of "auto", sizes, plan, and the bytes
    that it may take and that the process holds besides the data."""

    config: SearchConfig
    sizes: Sizes
    plan: Plan
    limit: int
    process: int

    @property
    def keeps_memory(self) -> bool:
        """Whether freed memory should stay with the process (``acefast.memory``): where it would be given back after each use,
        and ``KEPT`` times the plan is there."""
        row = _element(self.config) * max(_widths(self.sizes, self.config)[1:])
        given_back = self.config.device == "cpu" and self.sizes.nodes * row > memory.GIVEN_BACK
        return given_back and KEPT * self.plan.bytes <= self.limit

    def check(self) -> None:
        """Raises InputError, with the figure and what would fit, where the plan is above the limit."""
        if self.plan.bytes <= self.limit:
            return
        config = self.config
        again = {"recompute": "yes"} if config.backbone == "resgcn" else {}
        offers = [self._fitting("recompute", ["yes"])] if again and not self.plan.recompute else []
        offers += [self._fitting("dtype", ["bfloat16"], **again)] if config.dtype == "float32" else []
        offers.append(self._fitting("layers", range(config.layers - 1, 0, -1), **again))
        offers.append(self._fitting("hidden", [config.hidden >> k for k in range(1, config.hidden.bit_length())], **again))
        found = " or ".join(filter(None, offers))
        raise InputError(
            f"this search needs about {gigabytes(self.plan.bytes)} of memory and {gigabytes(self.limit)} are there: "
            f"{f'what would fit is {found}' if found else 'with fewer layers or hidden channels it does not fit either'}; "
            "--memory-limit sets another limit"
        )

    def _fitting(self, key: str, values, **more) -> str | None:
        """The first of the values of a setting that fits, in words."""
        for value in values:
            need = predict(self.sizes, replace(self.config, **{**more, key: value}), process=self.process).bytes
            if need <= self.limit:
                with_recompute = " --recompute yes" if more and not self.plan.recompute else ""
                return f"--{key} {value}{with_recompute} ({gigabytes(need)})"
        return None


def look_ahead(
    config: SearchConfig, data: Sizes | Dataset, limit: int | None = None, machine: Machine | None = None
) -> Outlook:
    """The outlook of a search on data that are loaded or of which only sizes are known; `limit` in the place of what this
    process holds and may still take."""
    check_device(config.device)
    loaded = isinstance(data, Dataset)
    sizes = Sizes.of(data) if loaded else data
    on_gpu = config.device.startswith("cuda")
    held = predict(sizes, config).data if loaded and data.device.type == torch.device(config.device).type else 0
    used = held if on_gpu else psutil.Process().memory_info().rss
    limit = used + available(config.device) if limit is None else limit
    process = max(0, used - held)
    if config.recompute == "auto":
        wanted = config.backbone == "resgcn" and predict(sizes, config, process=process).bytes > limit
        config = replace(config, recompute="yes" if wanted else "no")
    return Outlook(config, sizes, predict(sizes, config, machine, process), limit, process)


def gigabytes(size: float) -> str:
    """1.23 GB, of 10^9 bytes."""
    return f"{size / 1e9:.3g} GB"

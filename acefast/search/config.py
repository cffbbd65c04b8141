"""Every setting of a search, and how presets, data set, backbone and command line resolve to one frozen record."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch

from acefast.data import twin_of
from acefast.errors import InputError
from acefast.pruning import find_score

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

PRESETS = Path(__file__).resolve().parent.parent / "presets"

Backbone = Literal["gcn", "gin", "gat", "sage", "resgcn"]
Preset = Literal["paper", "best", "released"]
Axes = Literal["joint", "edges", "weights"]
Task = Literal["node", "link"]


@dataclass(frozen=True)
class SearchConfig:
    """The resolved settings of one search; made by :func:`resolve_config`, saved with the run as ``config.toml``."""

    dataset: str = "cora"
    """Data set: cora, citeseer, pubmed, synthetic-cora; of OGB ogbn-arxiv, ogbn-proteins, ogbn-products, ogbl-collab, ogbl-ddi; a
    generated twin, twin:NAME or twin:NAME:SCALE; or a file NAME.npz of your own graph (its keys: README)."""
    data_root: str = ""
    """Folder of the data files (not part of the configuration's hash)."""
    features: Literal["given", "fastrp", "learned"] = "given"
    """Features of the nodes: the data set's own, an embedding of the graph alone (FastRP, 128 columns), or an embedding that is
    trained with the network (as many columns as hidden channels, never masked)."""
    variant: str = ""
    """Name that reports give to these settings (not part of the configuration's hash)."""
    task: Task = "node"
    """What is learned: node, the labels of the nodes, or link, which nodes are joined, on a split of the edges."""
    backbone: Backbone = "gcn"
    """Graph network: gcn (Kipf and Welling), gin or gat (as UGS has them), sage (GraphSAGE), resgcn (DeeperGCN)."""
    method: str = "ace"
    """Search method: dense (the baseline alone), random, ugs (prunes by trained masks), gebt (early-bird), ace (also
    exchanges); the controls ugs-epochs and ugs-best (ACE's epochs, ACE's choice of the best), ace-random (random exchange);
    from Python also a name that was added to acefast.search.METHODS."""
    preset: Preset = "paper"
    """Where settings that are not given come from: the paper's procedure, the study's outcome, or the released code's procedure."""
    axes: Axes = "joint"
    """What is pruned: edges and weights together, or one of them alone."""
    rounds: int | Literal["auto"] = 20
    """Rounds of pruning after the dense baseline (round 0); auto goes on after round 20 as long as the last one's validation
    accuracy is within 0.5 points of dense."""
    seed: int = 0
    """Seed of all random numbers; each consumer draws from a generator named after it."""

    layers: int = 2
    """Number of layers of the network."""
    hidden: int = 512
    """Hidden channels; of each head for gat."""
    embedding: int = 16
    """link: numbers that the network gives for each node; a pair is scored by its two nodes' (decoder)."""
    decoder: Literal["product", "mlp"] = "product"
    """link: how a pair is scored: by the scalar product, or by an MLP on the product of each two numbers (OGB's examples), which
    is trained with the network and never masked."""
    links: int = 0
    """link: training links of an epoch, which then is one step on a part of them, passing over all in a random order; with as
    many pairs that no edge joins; 0: all of them."""
    heads: int = 8
    """Attention heads of the hidden layers of gat."""
    dropout: float = 0.5
    """Dropout probability in [0, 1): after each hidden layer of gcn and sage, each layer of gin; on inputs and attention of
    gat; on the input of each layer of resgcn but the first."""
    bias: bool = False
    """gcn: whether the layers have a bias (never masked)."""
    self_loops: bool = True
    """gcn: whether the layers add a self-loop to each node; added loops carry no mask (those of gat are edges)."""
    degrees: Literal["masked", "static", "none"] = "masked"
    """gcn: normalisation of the sum, by masked degrees, by degrees of the whole graph, or none (raw neighbour sum)."""
    aggr: Literal["softmax", "softmax_sg", "softmax_sum", "power", "mean", "max", "sum"] = "softmax_sg"
    """resgcn: aggregation of GENConv; softmax_sg lets no gradient through the softmax's weights."""
    t: float = 0.1
    """resgcn: (inverse) temperature of the softmax aggregations, or its start where it is learned."""
    learn_t: bool = False
    """resgcn: whether each layer learns its t."""
    mlp_layers: int = 1
    """resgcn: linear maps in each layer's MLP, 1 or 2, all of them masked."""
    norm: Literal["batch", "layer"] = "batch"
    """resgcn: normalisation before each layer and within its MLP; evaluation takes the running statistics of batch."""
    edge_features: bool = True
    """resgcn: whether features of the edges, where the data have them, enter the messages by linear encoders."""
    recompute: Literal["auto", "yes", "no"] = "auto"
    """resgcn: whether backward computes a layer's activations again in place of keeping them, which gives the same to the bit;
    auto: where acefast plan sees that they do not fit otherwise (not part of the configuration's hash)."""
    pruned_edges: Literal["absent", "zeroed"] = "absent"
    """Whether a pruned edge does not exist or has mask 0. Zeroed, it stays in the mean of gin and sage and in the softmax of
    resgcn, and for gat it has logit 0 and passes its message, as in the released code; the two coincide for gcn."""
    row_normalise: bool = True
    """Whether each node's features are divided by their sum."""

    lr: float = 0.008
    """Learning rate of Adam on the weights."""
    fix_lr: float = 0.008
    """Learning rate in retraining with frozen masks, and of the dense baseline; lr unless given."""
    weight_decay: float = 8e-5
    """Weight decay (L2, inside Adam) on the weights."""
    mask_lr: float = 0.008
    """Learning rate of Adam on the soft masks; the weights' lr unless given."""
    mask_weight_decay: float = 0.0
    """Weight decay on the soft masks; preset released takes the weights' unless given."""
    s1: float = 1e-2
    """L1 coefficient of the soft edge mask."""
    s2: float = 1e-2
    """L1 coefficient of the soft weight masks."""
    mask_noise: float = 1e-5
    """Soft masks start at 1 + uniform(-mask_noise, mask_noise) on kept elements."""
    mask_epochs: int = 200
    """Epochs of training weights and soft masks together in each round."""
    fix_epochs: int = 200
    """Epochs of retraining with frozen masks; also of the dense baseline."""
    ace_epochs: int = 20
    """Epochs of each retained and complement model of ACE."""
    evaluate_every: int = 1
    """Epochs from one evaluation on the validation split to the next, the best of which is the training's best epoch; after the
    last epoch there is always one."""
    ace_rounds: int = 6
    """ACE rounds (train, exchange) in each round of pruning."""

    prune_edges: float = 0.05
    """Fraction of the remaining edges removed in each round."""
    prune_weights: float = 0.2
    """Fraction of the remaining weights removed in each round."""
    score: str = "magnitude"
    """Importance: magnitude |m|, product |m*w|, gradient |dL/dm|, combined |m*w*dL/dm|, or random; from Python also a
    name that was added to acefast.pruning.SCORES."""
    edge_score: str = ""
    """Importance of the edges where it is another: also agreement <p_u, p_v> of the classes predicted for the ends,
    influence, agreement / sqrt((1 + d_u)(1 + d_v)) by kept degrees, or share, agreement / (1 + d_v); score's unless given."""
    tie_directions: bool = False
    """Whether the two directions of an undirected edge are pruned and exchanged together."""
    protect: int = 0
    """Rounds for which mined elements are pruned only after all others."""
    carry: float = 0.0
    """Share in [0, 1) of an element's earlier standardised importance in what it is pruned and exchanged by; 0: none."""
    noise_check: int = 0
    """First rounds in which pruning is repeated under a second draw of the mask noise, to log how far the two agree."""

    complement: Literal["joint", "crossed", "none"] = "joint"
    """Complement model: removed edges with removed weights, or each axis alone beside the kept other one; none: no such
    model, the retained one tells what the removed elements would gain it."""
    exchange_edges: float = 0.02
    """Edges exchanged in an ACE round, as a fraction of min(kept, removed)."""
    exchange_weights: float = 0.02
    """Weights exchanged in an ACE round, as a fraction of min(kept, removed)."""
    tau: float = 0.1
    """Temperature of the exchange in standardised score units; 0 takes the plain top k."""
    standardise: Literal["zscore", "rank"] = "zscore"
    """How importance is standardised within each candidate set and axis."""
    stop_overlap: float = 0.6
    """Overlap of mined and then erased elements above which an exchange is taken back and redrawn at half its rate."""

    threads: int = 1
    """CPU threads, recorded because results are bit-equal only for the same number; torch's own unless given."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of features and hidden features in every training, evaluation and inference; with bfloat16 what layers keep takes
    half the memory, and weights, masks, moments, scores, losses and outputs stay float32."""
    device: str = "cpu"
    """Device of the computation: cpu or cuda."""

    @property
    def sweeps_edges(self) -> bool:
        return self.axes != "weights"

    @property
    def sweeps_weights(self) -> bool:
        return self.axes != "edges"

    def to_dict(self) -> dict:
        """Every setting by name, as TOML and JSON hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "SearchConfig":
        """The record of ``to_dict``; raises :class:`InputError` for a key or a value that is not a setting's."""
        if "lr" in values:  # records from before the setting existed
            values = {"fix_lr": values["lr"], **values}
        config = cls(**_checked(values))
        _check_combination(config)
        return config

    def hash(self) -> str:
        """16 hex digits over every setting but those UNHASHED: equal hashes mean the same search.

        Settings LATER than version 1 of the run folder count where they are not at their default alone, so that folders from
        before them stay valid."""
        values = {key: value for key, value in self.to_dict().items() if key not in UNHASHED}
        defaults = {key: FIELDS[key].default for key in LATER} | {"fix_lr": self.lr}
        values = {key: value for key, value in values.items() if key not in LATER or value != defaults[key]}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: "SearchConfig") -> list[str]:
        """Names of the hashed settings in which two configurations differ."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [key for key in mine if key not in UNHASHED and mine[key] != theirs[key]]


def reads_edge_features(config: SearchConfig) -> bool:
    """Whether the network has a use for features of the edges."""
    return config.backbone == "resgcn" and config.edge_features


UNHASHED = ("data_root", "variant", "recompute")
LATER = (
    "task embedding decoder links features aggr t learn_t mlp_layers norm edge_features fix_lr evaluate_every dtype"
).split()
FIXED_BY_RELEASED = (
    "mask_noise score edge_score tie_directions protect carry noise_check complement prune_edges exchange_edges tau "
    "standardise pruned_edges"
).split()
FIELDS = {field.name: field for field in dataclasses.fields(SearchConfig)}


def resolve_config(
    dataset: str = "cora", backbone: str = "gcn", method: str = "ace", preset: str = "paper", **overrides
) -> SearchConfig:
    """Fill a :class:`SearchConfig` from the preset's tables and ``overrides`` (those that are None count as not given).

    Later tables of ``presets/<preset>.toml`` win over earlier ones and overrides over all; a generated twin takes the tables of
    its data set. Raises :class:`InputError`
    for unknown names, values out of range, and combinations that are not possible.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    task = given.pop("task", FIELDS["task"].default)
    chosen = dict(dataset=dataset, task=task, backbone=backbone, method=method, preset=preset)
    _checked({**chosen, **given})
    settings, facts = dict(chosen), chosen | given | {"dataset": twin_of(dataset)}
    for table in _preset_tables(preset):
        when = {key: value if isinstance(value, list) else [value] for key, value in table.get("when", {}).items()}
        if all(facts.get(key) in values for key, values in when.items()):
            settings.update({key: value for key, value in table.items() if key != "when"})
    if preset == "released":
        for key in FIXED_BY_RELEASED:
            if key in given and given[key] != settings.get(key, FIELDS[key].default):
                raise InputError(f"preset released has no setting {key}: leave it away or use preset paper")
    settings.update(given)
    settings.setdefault("mask_lr", settings["lr"])
    settings.setdefault("fix_lr", settings["lr"])
    settings.setdefault("mask_weight_decay", settings["weight_decay"])
    settings.setdefault("threads", torch.get_num_threads())
    if method == "dense":
        settings["rounds"] = 0
    return SearchConfig.from_dict(settings)


@cache
def _preset_tables(preset: str) -> list[dict]:
    with open(PRESETS / f"{preset}.toml", "rb") as file:
        found = tomllib.load(file)
    return [*(_preset_tables(found["base"]) if "base" in found else []), *found["settings"]]


def _kind(field) -> tuple[type | None, tuple[str, ...]]:
    """(type, strings that are accepted besides it) of a setting's values."""
    parts = (field.type, *get_args(field.type))
    kinds = [part for part in parts if isinstance(part, type)]
    return kinds[0] if kinds else None, tuple(c for part in parts for c in get_args(part) if isinstance(c, str))


def _checked(values: dict) -> dict:
    """The values with integers turned to floats where a setting is one; refuses unknown keys and values."""
    result = {}
    for key, value in values.items():
        if key not in FIELDS:
            raise InputError(f"unknown setting {key!r}: expected one of {', '.join(FIELDS)}")
        field = FIELDS[key]
        kind, choices = _kind(field)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind and value not in choices:
            expected = ([f"of type {kind.__name__}"] if kind else []) + ([f"one of {', '.join(choices)}"] if choices else [])
            raise InputError(f"{key} must be {' or '.join(expected)}, got {value!r}")
        if key in RANGES and not RANGES[key][0](value):
            raise InputError(f"{key} must be {RANGES[key][1]}, got {value!r}")
        result[key] = value
    return result


def _range(names: str, test, words: str) -> dict:
    return {name: (test, words) for name in names.split()}


RANGES = {
    **_range("rounds", lambda v: v == "auto" or v >= 0, "0 or more, or auto"),
    **_range("seed links ace_rounds protect noise_check", lambda v: v >= 0, "0 or more"),
    **_range("layers hidden embedding heads mask_epochs fix_epochs ace_epochs evaluate_every threads", lambda v: v >= 1, "1 or more"),
    **_range("dropout prune_edges prune_weights carry", lambda v: 0 <= v < 1, "in [0, 1)"),
    **_range("exchange_edges exchange_weights", lambda v: 0 <= v <= 1, "in [0, 1]"),
    **_range("stop_overlap", lambda v: 0 <= v <= 1, "in [0, 1]"),
    **_range("lr mask_lr fix_lr", lambda v: 0 < v < float("inf"), "greater than 0"),
    **_range("weight_decay mask_weight_decay s1 s2 mask_noise tau", lambda v: 0 <= v < float("inf"), "0 or more"),
    **_range("mlp_layers", lambda v: v in (1, 2), "1 or 2"),
    "t": (lambda v: v == v and abs(v) < float("inf"), "finite"),
    **_range("device", lambda v: v == "cpu" or v.split(":")[0] == "cuda", "cpu or cuda"),
}


def _check_combination(config: SearchConfig) -> None:
    from acefast.search.methods import find_method  # which itself is made of what reads a configuration

    find_method(config.method)
    find_score(config.score)
    find_score(config.edge_score or config.score)
    if "predictions" in find_score(config.score).needs:
        raise InputError(f"score {config.score} is one of edges: give it as edge_score")
    if config.preset == "released":
        if config.task != "node":
            raise InputError(f"preset released is a procedure for task node, got {config.task!r}: use preset paper")
        if config.backbone != "gcn":
            raise InputError(f"preset released exists for backbone gcn only, got {config.backbone!r}")
        if config.method not in ("ace", "dense"):
            raise InputError(
                f"preset released is the procedure of ACE-GLT's code: method must be ace or dense, got {config.method!r}"
            )
        if config.axes == "edges":
            raise InputError("preset released never removes an edge, so axes must be joint or weights, got 'edges'")

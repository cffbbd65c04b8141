"""Runs as records, from their folders: every line is checked before a number of it is shown. Packed runs: pack.py."""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from acefast.errors import InputError
from acefast.search.config import FIELDS, UNHASHED

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

NAMES = ("dataset", "backbone", "method", "preset", "axes")
COUNTS = ("edges_kept", "edges_total", "weights_kept", "weights_total")
AXES = ("edges", "weights")
INFERENCE = ("inference_dense", "inference_regrouped", "inference_compact", "inference_threads")
# What stages tell of each axis, as <axis>_<name>, and how the values of a round are put together.
DETAILS: dict[str, Callable] = {
    "exchanged": sum,  # elements erased and mined, in all ACE rounds
    "fired": sum,  # exchanges that were taken back and redrawn at half their rate
    "erased_rank": fmean,  # mean rank of the picks among the candidates: 0 first, 0.5 random
    "mined_rank": fmean,
    "survival": fmean,  # fraction of the recently mined that pruning left
    "spread": fmean,  # standard deviation of the scores that pruning went by
    "agreement": fmean,  # share of what was pruned on which two draws of the masks' first noise agree
    "homophily_kept": fmean,  # fraction of the kept edges whose ends have one label
    "homophily_removed": fmean,  # the same of the removed ones
    "degree_kept": fmean,  # mean degree of the ends of the kept edges, in the whole graph
    "degree_removed": fmean,
}
# The order of what a report shows: the known names first, then others by name.
ORDER = {
    "dataset": ("cora", "citeseer", "pubmed"),
    "backbone": ("gcn", "gin", "gat"),
    "axes": ("joint", "edges", "weights"),
    "method": ("dense", "random", "gebt", "ugs", "ugs-epochs", "ugs-best", "ace-random", "ace"),
}
MEND = "run the search's command again to mend it, or acefast pack where it is a pack"
CHANGED = "the file was changed; make it anew, a run folder by its search and a pack by acefast pack"
# Settings that do not make another experiment of a run: its repetition, its place, the machine and what gives the same bits.
NOT_GROUPED = {"seed", "hash", "data_root", "threads", "device", "recompute"}


@dataclass(frozen=True)
class Rung:
    """One round of a run: its counts, its accuracies (fractions), what it exchanged, how long it took, the multiply-accumulates
    of one inference, seconds of one of the dense network, of the same in compacted form and of the compacted one on so many
    threads where they were measured, and details by name, such as edges_mined_rank (see DETAILS), those that the method has."""

    round: int
    edges_kept: int
    edges_total: int
    weights_kept: int
    weights_total: int
    val: float
    test: float
    exchanged: int | None
    seconds: float | None
    epochs: int | None = None
    macs: int | None = None
    metric: str = "accuracy"  # what val and test are
    inference_dense: float | None = None
    inference_regrouped: float | None = None
    inference_compact: float | None = None
    inference_threads: int | None = None
    details: dict[str, float] = field(default_factory=dict)

    @property
    def edge_sparsity(self) -> float:
        """Removed / total edges, a fraction."""
        return 1 - self.edges_kept / self.edges_total if self.edges_total else 0.0

    @property
    def weight_sparsity(self) -> float:
        """Removed / total weights, a fraction."""
        return 1 - self.weights_kept / self.weights_total if self.weights_total else 0.0


@dataclass(frozen=True)
class RunRecord:
    """What a run folder or a line of a pack holds: its settings, its finished rounds, 0 (dense) first, and the versions,
    processor and fingerprints {name: text} that it began with. A packed run's path is that of its pack, then its name."""

    path: Path
    config: dict
    rungs: tuple[Rung, ...]
    environment: dict[str, str] = field(default_factory=dict)
    pack: Path | None = None

    @property
    def metric(self) -> str:
        """What val and test are."""
        return self.rungs[-1].metric

    @property
    def name(self) -> str:
        """That of the run's folder."""
        return self.path.name if self.pack else self.path.resolve().name

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def names(self) -> tuple[str, ...]:
        """(dataset, backbone, method, preset, axes)."""
        return tuple(self.config[name] for name in NAMES)

    @property
    def group_key(self) -> str:
        """Equal for runs that differ by seed alone."""
        return json.dumps({k: v for k, v in self.config.items() if k not in NOT_GROUPED}, sort_keys=True, default=str)

    @property
    def place(self) -> tuple:
        """Sorts runs by cell (dataset, backbone, axes), method, variant (none first), other settings, seed."""
        names = (self.config[key] for key in ORDER)
        ranked = [((*known, name).index(name), name) for known, name in zip(ORDER.values(), names)]
        return (*ranked, str(self.config.get("variant", "")), self.group_key, self.seed)


@dataclass(frozen=True)
class Group:
    """Runs that differ by seed alone, in the order of their seeds."""

    runs: tuple[RunRecord, ...]
    label: str

    @property
    def config(self) -> dict:
        return self.runs[0].config

    @property
    def common(self) -> int:
        """The number of rounds, dense included, that every run has."""
        return min(len(run.rungs) for run in self.runs)

    def at(self, k: int) -> list[Rung]:
        """Round k of the runs that have it."""
        return [run.rungs[k] for run in self.runs if k < len(run.rungs)]

    @property
    def exchanged(self) -> int | None:
        """Elements exchanged in all runs and rounds; None where the method exchanges nothing by design."""
        counts = [rung.exchanged for run in self.runs for rung in run.rungs if rung.exchanged is not None]
        return sum(counts) if counts else None


def find_runs(folder: Path) -> list[Path]:
    """`folder` where it is a run folder, else those below it, in order. Raises InputError where there is none."""
    if is_run(folder):
        return [folder]
    inside = sorted(path.parent for path in folder.rglob("config.toml") if is_run(path.parent))
    if not inside:
        raise InputError(f"{folder} holds no run (no config.toml with history.jsonl); name the --out folder of a search")
    return inside


def is_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file() and (folder / "history.jsonl").is_file()


def read_run(folder) -> RunRecord:
    """Read and check config.toml, history.jsonl, timings.jsonl and, where they are there, checkpoint.json and inference.jsonl
    of one run.

    Raises InputError, which names the file and the line, for what is missing, cut short, malformed or contradictory.
    """
    folder = Path(folder)
    config = check_config(folder / "config.toml", _read_config(folder / "config.toml"))
    timings = folder / "timings.jsonl"
    costs = sum_costs(lines_of(timings) if timings.exists() else ())
    measured = folder / "inference.jsonl"
    inferences = check_inferences(lines_of(measured) if measured.exists() else ())
    rungs = collect_rungs(lines_of(folder / "history.jsonl"), costs, inferences)
    if not rungs:
        raise InputError(f"{folder} has no finished round yet; let its search finish at least the dense baseline")
    return RunRecord(folder, config, rungs, _read_environment(folder / "checkpoint.json"))


def collect_rungs(events, costs: dict, inferences: dict) -> tuple[Rung, ...]:
    """The rungs that (place, event) pairs of a history tell of, each with the details seen since the one before."""
    rungs: list[Rung] = []
    seen: dict[str, list] = defaultdict(list)
    for place, event in events:
        if not isinstance(event.get("event"), str):
            raise InputError(f"{place} has no text 'event'; {CHANGED}")
        _note_details(place, event, seen)
        if event["event"] == "round":
            details = {name: float(DETAILS[name.split("_", 1)[1]](values)) for name, values in seen.items()}
            rungs.append(_rung(place, event, rungs, costs, inferences, details))
            seen.clear()
    return tuple(rungs)


def group_runs(runs) -> list[Group]:
    """Group runs that differ by seed alone, in the order of `RunRecord.place`; labels tell the groups apart.

    Raises InputError where two runs of a group have the same seed.
    """
    groups: dict[str, list[RunRecord]] = {}
    for run in sorted(runs, key=lambda run: run.place):
        groups.setdefault(run.group_key, []).append(run)
    for members in groups.values():
        for one, two in zip(members, members[1:]):
            if one.seed == two.seed:
                raise InputError(
                    f"{one.path} and {two.path} are the same search with seed {one.seed}; name one of them, as a run "
                    f"counted twice would feign agreement"
                )
    return [Group(tuple(members), label) for members, label in zip(groups.values(), _labels(list(groups.values())))]


def _labels(groups) -> list[str]:
    """The method and the variant's name, with whatever else sets groups of one dataset, backbone and axes apart."""

    def same(one, other, *names):
        return all(one.get(name) == other.get(name) for name in names)

    labels = []
    for members in groups:
        config = members[0].config
        rivals = [other[0].config for other in groups if other is not members]
        rivals = [other for other in rivals if same(other, config, "dataset", "backbone", "axes", "variant")]
        label = f"{config['method']} {config.get('variant', '')}".rstrip()
        if any(same(other, config, "method") and not same(other, config, "preset") for other in rivals):
            label += f" {config['preset']}"
        twins = [other for other in rivals if same(other, config, *NAMES)]
        differing = sorted(
            key for key in config if key not in NOT_GROUPED and any(other.get(key) != config[key] for other in twins)
        )
        labels.append(" ".join([label, *(f"{key}={config[key]}" for key in differing)]))
    return labels


def _read_config(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path} cannot be read as TOML: {reason}; name the --out folder of a search") from None


def check_config(place, config: dict) -> dict:
    """The settings, which must have the names and the seed; those that this version has besides are at their defaults."""
    for name, kind in [*((name, str) for name in NAMES), ("seed", int)]:
        if type(config.get(name)) is not kind:
            raise InputError(f"{place} must have {name} as {kind.__name__}, got {config.get(name)!r}; it is no search's")
    features = config.get("features", "given")
    marks = {" links": config.get("task") == "link", f", features {features}": features != "given"}
    for mark, holds in marks.items():  # never in one table, panel or test with other tasks and features
        if holds and mark not in config["dataset"]:
            config["dataset"] += mark
    defaults = {name: field.default for name, field in FIELDS.items() if name not in UNHASHED}
    return defaults | {"fix_lr": config.get("lr", FIELDS["lr"].default)} | config


def _read_environment(path: Path) -> dict[str, str]:
    """What a run began with, by checkpoint.json; empty where there is none."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_bytes())["values"]
        found = {"data": values["data"], "start": values["start"], **values["environment"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is not that of a search; run the search's command again to mend it") from None
    return check_environment(path, found)


def check_environment(place, found) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"{place}: the environment must be texts by name, got {found!r}; {CHANGED}")
    return found


def sum_costs(timings) -> dict[int, tuple[float, int | None]]:
    """{round: (seconds, epochs)} of (place, line) pairs; epochs are None where a stage does not say them."""
    total: dict[int, tuple[float, int | None]] = {}
    for place, line in timings:
        k, seconds, epochs = line.get("round"), line.get("seconds"), line.get("epochs")
        if type(k) is not int or k < 0 or not _is_number(seconds) or seconds < 0:
            raise InputError(f"{place} must have a round and its seconds, got {k!r} and {seconds!r}; {CHANGED}")
        if epochs is not None and (type(epochs) is not int or epochs < 0):
            raise InputError(f"{place} must have epochs as a whole number, got {epochs!r}; {CHANGED}")
        before = total.get(k, (0.0, 0))
        total[k] = before[0] + seconds, None if epochs is None or before[1] is None else before[1] + epochs
    return total


def check_inferences(lines) -> dict[int, dict]:
    """{round: its fields INFERENCE} of (place, line) pairs."""
    found = {}
    for place, line in lines:
        k, (*seconds, threads) = line.get("round"), map(line.get, INFERENCE)
        if type(k) is not int or not all(_is_number(s) and s > 0 for s in seconds) or type(threads) is not int:
            names = ", ".join(INFERENCE)
            raise InputError(f"{place} must have a round and its {names}, got {line}; measure again by acefast time")
        found[k] = dict(zip(INFERENCE, (*map(float, seconds), threads)))
    return found


def _note_details(place: str, event: dict, seen: dict[str, list]) -> None:
    """Add what the event tells of each axis to `seen`."""
    for name in (f"{axis}_{what}" for axis in AXES for what in DETAILS):
        value = event.get(name)
        if value is None:
            continue
        value = int(value) if isinstance(value, bool) else value
        if not _is_number(value) or value < 0:
            raise InputError(f"{place}: {name} must be a number of 0 or more, got {value!r}; {CHANGED}")
        seen[name].append(value)


def lines_of(path: Path):
    """(place, object) of each line of a file of JSON objects."""
    try:
        text = path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; name the --out folder of a search, or a pack") from None
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        place = f"{path} line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise InputError(f"{place} is no JSON object (cut short or changed?); {MEND}")
        yield place, value
    if text and not text.endswith("\n"):
        raise InputError(f"{path} is cut short: its last line has no end; {MEND}")


def _rung(place: str, event: dict, before: list[Rung], costs: dict, inferences: dict, details: dict[str, float]) -> Rung:
    def refuse(what):
        raise InputError(f"{place}: {what}; {CHANGED}")

    if type(event.get("round")) is not int or event["round"] != len(before):
        refuse(f"round must be {len(before)}, the next one, got {event.get('round')!r}")
    for name in COUNTS:
        if type(event.get(name)) is not int or event[name] < 0:
            refuse(f"{name} must be a whole number, got {event.get(name)!r}")
    for axis in AXES:
        kept, total = event[f"{axis}_kept"], event[f"{axis}_total"]
        if kept > total:
            refuse(f"{kept} {axis} cannot be kept of {total}")
        if before and total != getattr(before[0], f"{axis}_total"):
            refuse(f"{axis}_total must be {getattr(before[0], f'{axis}_total')} as in round 0, got {total}")
    for name in ("val", "test"):
        if not _is_number(event.get(name)) or not 0 <= event[name] <= 1:
            refuse(f"{name} must be a fraction in [0, 1], got {event.get(name)!r}")
    exchanged = event.get("exchanged")
    if isinstance(exchanged, dict):
        exchanged = sum(exchanged.values()) if all(type(n) is int for n in exchanged.values()) else exchanged
    if exchanged is not None and (type(exchanged) is not int or exchanged < 0):
        refuse(f"exchanged must be a whole number, got {event['exchanged']!r}")
    macs = event.get("macs")
    if macs is not None and (type(macs) is not int or macs < 0):
        refuse(f"macs must be a whole number, got {macs!r}")
    counts = {name: event[name] for name in ("round", *COUNTS)}
    seconds, epochs = costs.get(event["round"], (None, None))
    val, test = float(event["val"]), float(event["test"])
    metric = event.get("metric", "accuracy")
    if type(metric) is not str:
        refuse(f"metric must be a text, got {metric!r}")
    told = dict(val=val, test=test, exchanged=exchanged, seconds=seconds, epochs=epochs, macs=macs, metric=metric)
    return Rung(**counts, **told, **inferences.get(event["round"], {}), details=details)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def common_folder(runs) -> Path:
    """Where a report goes by default: the folder of a single run, else the one that the runs' folders and packs lie in, or
    the current one if they share none."""
    if len(runs) == 1 and not runs[0].pack:
        return runs[0].path
    homes = {(run.pack or run.path).resolve().parent: (run.pack or run.path).parent for run in runs}
    return next(iter(homes.values())) if len(homes) == 1 else Path()

"""Many runs in one file of JSON lines, small enough to keep beside the code: what a report needs of each and no more.

A line is an object with
    run          the name of the run's folder
    config       every setting but data_root
    environment  versions, processor and the fingerprints of data and first weights, texts by name; {} where unknown
    rungs        a list of objects, dense first: the fields of `Rung` that are known and its details by their names
Lines are sorted by `RunRecord.place` and keys by name, so the same runs give the same bytes.
"""

import json
from dataclasses import fields
from pathlib import Path

from acefast.errors import InputError
from acefast.files import write_atomic
from acefast.report.runs import (
    AXES,
    CHANGED,
    DETAILS,
    INFERENCE,
    Rung,
    RunRecord,
    check_config,
    check_environment,
    check_inferences,
    collect_rungs,
    find_runs,
    lines_of,
    read_run,
    sum_costs,
)

KEYS = {"run": str, "config": dict, "environment": dict, "rungs": list}
FIELDS = [field.name for field in fields(Rung) if field.name != "details"]
KNOWN = {*FIELDS, *(f"{axis}_{what}" for axis in AXES for what in DETAILS)}
SAME = ("edges_kept", "edges_total", "weights_kept", "weights_total", "val", "test", "exchanged")


def read_runs(sources) -> list[RunRecord]:
    """The runs of packs, of run folders and of folders that hold some, each file and folder once.

    Raises InputError for a source that is missing, holds no run or is damaged.
    """
    found: dict[Path, Path] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise InputError(f"there is no run folder or pack {source}; name the --out folder of a search, or a pack")
        for path in [source] if source.is_file() else find_runs(source):
            found.setdefault(path.resolve(), path)
    return [run for path in found.values() for run in (read_pack(path) if path.is_file() else [read_run(path)])]


def read_pack(path) -> list[RunRecord]:
    """The runs of a pack, each checked as those of a folder. Raises InputError, which names the line."""
    path = Path(path)
    runs = [_read_line(path, place, line) for place, line in lines_of(path)]
    if not runs:
        raise InputError(f"{path} holds no run; name a file that acefast pack has written")
    return runs


def _read_line(path: Path, place: str, line: dict) -> RunRecord:
    for key, kind in KEYS.items():
        if not isinstance(line.get(key), kind) or not line[key] and key != "environment":
            raise InputError(f"{place} must have {key} as a {kind.__name__}, not empty; name a file of acefast pack")
    places = [f"{place} rung {k}" for k in range(len(line["rungs"]))]
    for here, rung in zip(places, line["rungs"]):
        unknown = rung.keys() - KNOWN if isinstance(rung, dict) else {str(rung)[:40]}
        if unknown:
            raise InputError(f"{here} has {min(unknown)!r}, which is nothing that this acefast knows; {CHANGED}")
    rungs = list(zip(places, line["rungs"]))
    return RunRecord(
        path=path / line["run"],
        config=check_config(place, line["config"]),
        rungs=collect_rungs(
            events=[(here, {"event": "round", **rung}) for here, rung in rungs],
            costs=sum_costs((here, rung) for here, rung in rungs if "seconds" in rung or "epochs" in rung),
            inferences=check_inferences((here, rung) for here, rung in rungs if not rung.keys().isdisjoint(INFERENCE)),
        ),
        environment=check_environment(place, line["environment"]),
        pack=path,
    )


def to_line(run: RunRecord) -> str:
    """The run as a line of a pack."""
    rungs = [{name: getattr(rung, name) for name in FIELDS} | rung.details for rung in run.rungs]
    value = {
        "run": run.name,
        "config": {key: setting for key, setting in run.config.items() if key != "data_root"},
        "environment": run.environment,
        "rungs": [{name: value for name, value in rung.items() if value is not None} for rung in rungs],
    }
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str) + "\n"


def pack(sources, out) -> dict[str, int]:
    """Write the runs of `sources` into the pack `out` beside those that it has; the numbers of runs "packed", "new",
    "replaced" and "kept".

    Of two records of the same search (same settings and seed) the one with more rungs stays, the later one where they have
    as many. Raises InputError where they contradict each other, and for what `read_runs` refuses; `out` is then as before.
    """
    out = Path(out)
    runs = {(run.group_key, run.seed): run for run in (read_pack(out) if out.exists() else [])}
    counts = {"packed": 0, "new": 0, "replaced": 0, "kept": 0}
    for run in read_runs(sources):
        before = runs.get((run.group_key, run.seed))
        longer = before is None or len(run.rungs) >= len(before.rungs)
        counts["new" if before is None else "replaced" if longer else "kept"] += 1
        if before is not None:
            _refuse_contradiction(before, run)
        if longer:
            runs[run.group_key, run.seed] = run
    counts["packed"] = len(runs)
    write_atomic(out, "".join(to_line(run) for run in sorted(runs.values(), key=lambda run: run.place)))
    return counts


def _refuse_contradiction(one: RunRecord, two: RunRecord) -> None:
    for a, b in zip(one.rungs, two.rungs):
        for name in SAME:
            if getattr(a, name) != getattr(b, name):
                raise InputError(
                    f"{one.path} and {two.path} are the same search with seed {one.seed} and contradict each other: {name} "
                    f"of round {a.round} is {getattr(a, name)!r} and {getattr(b, name)!r}; pack one of them alone"
                )

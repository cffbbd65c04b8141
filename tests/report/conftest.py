"""Run folders made by hand: what a search writes, with numbers that the test chooses."""

import json
from pathlib import Path

import pytest

EDGES, WEIGHTS = 10_556, 737_280


def ladder(total: int, share: float, rounds: int) -> list[int]:
    kept = [total]
    for _ in range(rounds):
        kept.append(kept[-1] - int(share * kept[-1]))
    return kept


def write(folder, tests, vals=None, *, seed=0, method="ugs", axes="joint", exchanged=None, seconds=2.5, events=(), epochs=None, macs=(), **config):
    """Write a run folder whose round k has test accuracy tests[k]; `events` come before each round's; returns its Path."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    settings = dict(dataset="cora", backbone="gcn", method=method, preset="paper", axes=axes, seed=seed) | config
    (folder / "config.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    rounds = len(tests) - 1
    edges = ladder(EDGES, 0.05 if axes != "weights" else 0, rounds)
    weights = ladder(WEIGHTS, 0.2 if axes != "edges" else 0, rounds)
    lines, timings = [], []
    for k, test in enumerate(tests):
        val = vals[k] if vals else test
        lines.append({"event": "stage", "round": k, "name": "retrain", "epochs": 3})
        lines += [event | {"round": k} for event in events if k]
        lines.append(
            {"event": "round", "round": k, "edges_kept": edges[k], "edges_total": EDGES, "weights_kept": weights[k]}
            | {"weights_total": WEIGHTS, "val": val, "test": test, "exchanged": exchanged}
            | {"macs": count for count in macs[k : k + 1]}
        )
        told = {} if epochs is None else {"epochs": epochs}
        timings += [{"round": k, "stage": "mask", "seconds": seconds} | told, {"round": k, "stage": "fix", "seconds": 1.0} | told]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings))
    return folder


@pytest.fixture
def write_run():
    return write

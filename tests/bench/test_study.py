"""The committed grids are grids, and the study's page is made from packs of their runs."""

import json

import pytest

from acefast import report
from acefast.grid import plan
from acefast.search import resolve_config, run_search
from bench.__main__ import main
from tests.inputs import REPOSITORY

GRIDS = sorted((REPOSITORY / "bench" / "grids").glob("*.toml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_committed_grids_can_be_planned(path):
    runs = plan(path)
    seeds = {run.config.seed for run in runs}
    assert seeds == ({100, 101} if path.stem.startswith("study") else set(range(len(seeds)))), "the study has seeds of its own"


def test_the_study_page_compares_variants_on_validation(tmp_path, capsys):
    from acefast.data import load_dataset

    data = load_dataset("synthetic-cora")
    settings = dict(rounds=1, mask_epochs=1, fix_epochs=2, hidden=4, threads=1, noise_check=1)
    for variant, changes in {"base": {}, "other": {"s2": 0.0, "score": "product"}}.items():
        for seed in (0, 1):
            config = resolve_config("synthetic-cora", "gcn", "ugs", variant=variant, seed=seed, **settings, **changes)
            run_search(data, config, tmp_path / "runs" / f"{variant}-{seed}")
    report.pack([tmp_path / "runs"], tmp_path / "masks.jsonl")
    assert main(["study", str(tmp_path / "masks.jsonl"), "--out", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "study.md").read_text()
    rows = {line.split(" | ")[1]: line.split(" | ") for line in text.splitlines() if line.startswith("| synthetic-cora")}
    runs = [json.loads(line) for line in (tmp_path / "masks.jsonl").read_text().splitlines()]

    def area(variant):
        values = [[rung["val"] for rung in run["rungs"]] for run in runs if run["config"]["variant"] == variant]
        return sum(50 * (dense + last) for dense, last in values) / len(values)

    assert float(rows["ugs other"][3]) == pytest.approx(area("other"), abs=0.006)
    assert float(rows["ugs other"][4].split()[0]) == pytest.approx(area("other") - area("base"), abs=0.006)
    assert rows["ugs base"][4].startswith("+0.00")
    assert (tmp_path / "page" / "masks.png").stat().st_size > 5000
    assert main(["study", str(tmp_path / "masks.jsonl"), "--base", "ugs none", "--out", str(tmp_path / "other")]) == 2
    assert "no pack has runs of 'ugs none' on synthetic-cora" in capsys.readouterr().err

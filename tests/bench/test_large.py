"""The benchmark of large graphs: its figures are those of what ran, and bad input is told in one sentence."""

import json

import pytest

from bench.__main__ import main

SMALL = ["large", "--dataset", "twin:ogbn-arxiv:0.002", "--set", 'backbone="resgcn"', "layers=2", "hidden=8"]


def test_epochs_and_a_round(tmp_path, capsys):
    epochs = ["mask_epochs=3", "fix_epochs=4", "ace_epochs=2", "ace_rounds=2"]
    assert main([*SMALL, *epochs, "--short", "1", "--epochs", "2", "--round", "--json", str(tmp_path / "large.json")]) == 0
    (row,) = json.loads((tmp_path / "large.json").read_text())["rows"]
    assert (row["backbone"], row["layers"], row["hidden"], row["captured"]) == ("resgcn", 2, 8, False)
    assert row["nodes"] == 339 and row["edges"] > row["nodes"] and row["peak_bytes"] > 0 and row["planned_bytes"] > 0
    found = row["round"]
    stages = [(stage["stage"], stage["epochs"]) for stage in found["stages"]]
    assert stages == [("imp", 3), ("ace-1", 4), ("ace-2", 4), ("candidate", 2), ("retrain", 4)] and found["epochs"] == 17
    assert found["round_s"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    assert found["search_estimated_s"] == pytest.approx(4 * row["retrain_s"] + 20 * found["round_s"])
    kept = found["result"]["weights_kept"] / found["result"]["weights_total"]
    assert kept == pytest.approx(0.8, abs=0.01)  # a whole round was pruned
    printed = capsys.readouterr().out
    assert "an epoch of imp" in printed and "20 rounds like it" in printed


@pytest.mark.parametrize(
    "more, message",
    [
        (["--set", "layers"], "--set takes KEY=VALUE in TOML"),
        (["--set", "colour=1"], "unknown setting 'colour'"),
        (["--epochs", "0"], "--epochs and --short must be 1 or more, got 0 and 4"),
    ],
)
def test_bad_input(more, message, capsys):
    assert main(["large", "--dataset", "twin:ogbn-arxiv:0.002", *more]) == 2
    assert message in capsys.readouterr().err

"""acefast plan, and the refusal of a search that does not fit."""

import json

import pytest

from tests.cli.test_refusals import refused


def test_plan_tells_parts_time_and_what_fits(acefast):
    args = ["--dataset", "ogbn-arxiv", "--backbone", "resgcn", "--memory-limit", "6GB"]
    done = acefast("plan", *args)
    assert done.returncode == 0, done.stderr
    assert "169,343 nodes and 2,484,941 edges, resgcn with 28 layers of 128, activations recomputed" in done.stdout
    assert "6 GB are there" in done.stdout and "activations kept" in done.stdout and "an epoch takes about" in done.stdout
    narrow = acefast("plan", *args, "--dtype", "bfloat16").stdout
    assert "28 layers of 128 in bfloat16" in narrow and "features in bfloat16" in narrow
    facts = json.loads(acefast("plan", *args, "--json").stdout)
    assert facts["limit"] == 6 * 10**9 and facts["bytes"] == sum(facts["parts"].values()) < facts["limit"]
    assert facts["seconds"] > 0 and facts["epochs"] == 500 + 20 * (250 + 500 + 650) and facts["recompute"]


@pytest.mark.parametrize("command", ["plan", "search"])
def test_what_does_not_fit_is_refused(acefast, tmp_path, command):
    out = ["--out", tmp_path / "run"] if command == "search" else []
    args = ["--dataset", "twin:ogbn-proteins", "--backbone", "resgcn", "--memory-limit", "4GiB", *out]
    says = refused(acefast(command, *args))
    assert "needs about" in says and "4.29 GB are there" in says and "--memory-limit" in says
    assert not (tmp_path / "run").exists()


def test_a_small_search_is_checked_too(acefast, small, tmp_path):
    done = acefast("search", *small, "--rounds", 1, "--out", tmp_path / "run", "--memory-limit", "100MB")
    assert "needs about" in refused(done) and not (tmp_path / "run").exists()
    assert "16GB" in refused(acefast("plan", *small, "--memory-limit", "lots"))

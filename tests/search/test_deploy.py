"""Tickets put to use: the compacted network is the masked one; exported, reloaded in a fresh process, timed."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import acefast
from acefast import cli, report
from acefast.errors import InputError
from acefast.pruning import Ticket
from acefast.search import compact, export_ticket, retrain_ticket, time_inference
from acefast.search.deploy import prepared
from acefast.search.rounds import build_model

SHORT = dict(mask_epochs=3, fix_epochs=5, hidden=8, heads=2, threads=1, seed=2)
VARIANTS = [
    ("gcn", {}),
    ("gcn", dict(degrees="static", bias=True)),
    ("gcn", dict(degrees="none", self_loops=False, layers=3)),
    ("gin", {}),
    ("gin", dict(pruned_edges="zeroed")),
    ("gat", {}),
    ("gat", dict(pruned_edges="zeroed")),
]


@pytest.mark.parametrize("backbone, settings", VARIANTS)
def test_a_compacted_network_predicts_what_the_masked_one_does(tiny, backbone, settings):
    run = acefast.find_ticket(tiny, backbone, "ugs", rounds=2, prune_edges=0.2, prune_weights=0.5, **SHORT, **settings)
    exported = export_ticket(run.ticket(2), tiny)
    config, data = prepared(exported, tiny, "")
    masked = exported.apply(build_model(data, config)).eval()
    with torch.no_grad():
        expected = masked(data.graph, data.x, None, exported.edge_keep)
    network = compact(exported, tiny)
    assert torch.equal(network(), expected) and torch.equal(network(data.x), expected)
    assert torch.equal(network.predict(), expected.argmax(1))
    if settings.get("pruned_edges") != "zeroed":
        assert network.graph.num_edges == int(exported.edge_keep.sum()) < data.graph.num_edges
    right = network.predict() == data.y
    trained = exported.metadata["trained"]
    assert float(right[data.test].float().mean()) == pytest.approx(trained["test"]) == run.rounds[2]["test"]
    dense = compact(exported, tiny, dense=True)
    assert not torch.equal(dense(), expected) and dense.graph.num_edges == data.graph.num_edges


@pytest.mark.parametrize("bias", [False, True])
def test_a_wide_network_is_the_sum_of_its_parts(tiny, monkeypatch, bias):
    run = acefast.find_ticket(tiny, "gcn", "ugs", rounds=1, prune_weights=0.5, bias=bias, **{**SHORT, "hidden": 20})
    ticket = export_ticket(run.ticket(1), tiny)
    expected = compact(ticket, tiny)()
    monkeypatch.setattr("acefast.search.deploy.WIDTH", 8)
    network = compact(ticket, tiny)
    assert [part.layers[0].lin.out_features for part in network.parts] == [8, 8, 4]
    assert torch.allclose(network(), expected, atol=1e-6) and torch.equal(network.predict(), expected.argmax(1))
    assert torch.equal(network(), compact(ticket, tiny)())


def test_few_kept_weights_are_lists(tiny, monkeypatch):
    run = acefast.find_ticket(tiny, "gcn", "ugs", rounds=1, prune_weights=0.9, **SHORT)
    expected = compact(run.ticket(1), tiny)()
    monkeypatch.setattr("acefast.kept.KeptWeights.pays", lambda keep, x: True)
    network = compact(run.ticket(1), tiny)
    name = "layers.0.lin.weight"
    assert network.inputs[0][2][name].values.numel() == int(run.ticket(1).weight_keep[name].sum())
    assert torch.allclose(network(), expected, atol=1e-6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder of a search of two rounds on the generated graph."""
    folder = tmp_path_factory.mktemp("run") / "ugs"
    short = dict(mask_epochs=2, fix_epochs=3, hidden=8, threads=1)
    acefast.find_ticket("synthetic-cora", "gcn", "ugs", rounds=2, out=folder, **short)
    return folder


def test_an_exported_ticket_predicts_the_same_in_a_fresh_process(finished, tmp_path, capsys):
    ticket, model = finished / "tickets" / "round-02.safetensors", tmp_path / "model.safetensors"
    assert cli.main(["export", str(ticket), "--out", str(model)]) == 0
    assert "test" in capsys.readouterr().out
    here = compact(Ticket.load(model))().numpy()
    command = [sys.executable, "-m", "acefast.cli", "predict", model, "--out", tmp_path / "logits.npy"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    trained = Ticket.load(model).metadata["trained"]
    assert done.stdout == f"synthetic-cora: accuracy val {100 * trained['val']:.2f} %, test {100 * trained['test']:.2f} %\n"
    there = np.load(tmp_path / "logits.npy", allow_pickle=False)
    assert there.dtype == np.float32 and there.tobytes() == here.tobytes()
    with pytest.raises(InputError, match="was exported"):
        retrain_ticket(Ticket.load(model))
    assert cli.main(["predict", str(ticket)]) == 2
    assert "holds no trained weights" in capsys.readouterr().err


def test_times_of_a_run_reach_the_report(finished, tmp_path, capsys):
    assert cli.main(["time", str(finished), "--repeats", "2"]) == 0
    assert capsys.readouterr().out.startswith("round-02.safetensors: dense ")
    row = report.rows(report.read_groups([finished]))[2]
    assert row["inference_dense"] > 0 < row["inference_compact"] and row["inference_threads"] == 1
    assert "compacted ms" in report.write(report.read_groups([finished]), tmp_path)[0].read_text()
    ticket = Ticket.load(finished / "tickets" / "round-01.safetensors")
    times = time_inference(ticket, repeats=3)
    assert times["inference_dense_median"] >= times["inference_dense"] and times["repeats"] == 3
    with pytest.raises(InputError, match="1 or more"):
        time_inference(ticket, repeats=0)
    (finished / "inference.jsonl").write_text('{"round": 2}\n')
    assert cli.main(["report", str(finished)]) == 2
    assert "measure again by acefast time" in capsys.readouterr().err

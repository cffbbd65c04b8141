"""The benchmark of whole searches: its peer is the same computation, its figures add up, its pictures are drawn."""

import json

import pytest
import torch

from acefast.data import synthetic_citation
from acefast.nn import GCN
from acefast.pruning import Pattern, SoftMasks
from acefast.search import resolve_config
from acefast.train import Schedule, train
from bench import search
from bench.__main__ import main
from bench.peers.search import Training

EPOCHS = 40


@pytest.fixture(autouse=True)
def one_thread():
    """On tensors this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny():
    data = synthetic_citation(
        80, 30, 3, seed=1, num_edges=160, words=6.0, train_per_class=6, num_val=20, num_test=24, name="tiny"
    )
    return data.with_row_normalized_features()


def phase_of(name: str, full: Pattern) -> tuple[Pattern, SoftMasks | None]:
    """Elements and soft masks of a phase; "negative" is one with edge masks and degrees below 0."""
    ticket = full.map(lambda keep: (torch.arange(keep.numel()) % 4 > 0).view(keep.shape))
    patterns = {"retained": ticket, "complement": ticket.complement(), "retrain": ticket}
    pattern = patterns.get(name, full)
    if name in ("dense", "retrain"):
        return pattern, None
    soft = SoftMasks.init(pattern, 1e-5, lambda tensor: torch.Generator().manual_seed(1))
    if name == "negative":
        soft.edges[::2] *= -1.3
    return pattern, soft


@pytest.mark.parametrize("name", ["dense", "imp", "retained", "complement", "retrain", "negative"])
def test_the_peer_is_the_same_training(tiny, name):
    model = GCN(tiny.num_features, 8, tiny.num_classes, dropout=0.0, seed=2)
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    pattern, soft = phase_of(name, Pattern.full(tiny.graph.num_edges, model.maskable()))
    rates = dict(lr=0.01, weight_decay=1e-3, mask_lr=0.02, mask_weight_decay=1e-3, s1=1e-2, s2=2e-2)
    if name == "negative":
        rates["mask_lr"] = 1e-4  # a degree that passes 0 would blow up roundings
    peer = Training(tiny, start, resolve_config(dropout=0.0, **rates), pattern, soft)
    ours = []
    fit = train(
        model, tiny, Schedule(EPOCHS, **rates), start, pattern, soft, keep_weights=True,
        on_epochs=lambda first, vals: ours.extend(vals),
    )  # fmt: skip
    assert [peer.epoch() for _ in range(EPOCHS)] == ours
    best = peer.best
    assert fit.best_epoch == best["best_epoch"] > 3
    assert (fit.val, fit.test) == (best["val"], best["test"]) and fit.val_loss == pytest.approx(best["val_loss"], rel=1e-5)
    for number, (key, keep) in enumerate(pattern.weights.items()):
        torch.testing.assert_close(best["state"][f"convs.{number}.weight"][keep], fit.weights[key][keep], rtol=1e-5, atol=1e-6)
    if soft is not None:
        found = [best["state"][f"{place}.train_mask"] for place in ("edge_masks", "convs.0.masks", "convs.1.masks")]
        torch.testing.assert_close(found, [fit.masks.edges, *fit.masks.weights.values()], rtol=1e-5, atol=1e-6)
    if name == "negative":
        degrees = torch.ones(tiny.num_nodes).index_add(0, tiny.graph.edge_index()[1], fit.masks.edges)
        assert int((degrees < 0).sum()) > 3


def bench_search(path, *arguments) -> int:
    return main(["search", "--quick", "--epochs", "5", "--threads", "1", "--json", str(path), *arguments])


def test_a_quick_benchmark_becomes_figures_and_pictures(tmp_path, capfd, monkeypatch):
    fresh = search.in_a_fresh_process
    # A process for the search alone; the trainings run here, where PyG is loaded already.
    monkeypatch.setattr(search, "in_a_fresh_process", lambda f, *given: fresh(f, *given) if f is search.whole_search else f(*given))
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    runs = ["--runs", str(tmp_path / "runs"), "--label", "before"]
    assert bench_search(before, *runs) == 0
    late = json.loads(before.read_text())["rows"][0]["late"]
    assert late["rung"] == 2 and all(late[f"{name}_{key}"] > 0 for name in ("imp", "retrain") for key in ("first_ms", "late_ms", "ratio"))
    (row,) = json.loads(before.read_text())["rows"]
    whole, phases = row["search"], row["phases"]
    assert [phase["phase"] for phase in phases] == ["dense", "imp", "retained", "complement", "retrain"]
    assert whole["epochs"] == sum(phase["epochs"] for phase in phases) == 6 + 2 * (6 + 3 * 2 + 2 * 2 + 6)
    assert set(whole["stage_s"]) == {"dense", "imp", "ace", "candidate", "retrain", "other"}
    assert sum(whole["stage_s"].values()) == pytest.approx(whole["total_s"]) and min(whole["stage_s"].values()) > 0
    assert 100 * 2**20 < whole["peak_bytes"] < 4 * 2**30
    kept = [(rung["edges_density"], rung["weights_density"]) for rung in whole["rungs"]]
    assert kept == [pytest.approx((0.95**rung, 0.8**rung), rel=1e-3) for rung in range(3)]
    assert [rung["imp_ms"] is None for rung in whole["rungs"]] == [False, False, True]
    assert sum(rung["imp_ms"] or 0 for rung in whole["rungs"]) * 6 / 1e3 < whole["stage_s"]["imp"]
    assert row["peer_epochs_s"] == pytest.approx(sum(phase["epochs"] * phase["peer_ms"] for phase in phases) / 1e3)
    assert row["ratio_to_search"] == pytest.approx(row["peer_epochs_s"] / whole["total_s"])
    assert (tmp_path / "runs" / "synthetic-cora-ace-before" / "tickets" / "round-02.safetensors").exists()

    capfd.readouterr()
    assert bench_search(after, *runs) == 2 and not after.exists()
    assert "choose another --runs or --label" in capfd.readouterr().err
    assert bench_search(after, "--no-search", "--no-peer", "--method", "ugs") == 0
    results = json.loads(after.read_text())
    (alone,) = results["rows"]
    assert [phase["phase"] for phase in alone["phases"]] == ["dense", "imp", "retrain"]
    assert "search" not in alone and "peer_epochs_s" not in alone
    results["rows"] = [row | {"label": "after"}, alone]
    after.write_text(json.dumps(results))
    assert main(["plot", str(before), str(after), "--out", str(tmp_path / "plots")]) == 0
    pictures = sorted(picture.name for picture in (tmp_path / "plots").iterdir())
    names = [f"ace-{name}" for name in ("phases", "rungs", "steps")] + ["ugs-phases"]
    assert pictures == [f"search-cpu-synthetic-cora-{name}.png" for name in names]
    results["rows"][0]["rounds"] = 20
    after.write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="have rounds 2 and 20"):
        main(["plot", str(before), str(after), "--out", str(tmp_path / "plots")])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--epochs", "7"], "--epochs must be a multiple of 5, got 7"),
        (["--no-search", "--no-phases"], "leave nothing to measure"),
        (["--json", "/dev/null/results.json"], "cannot make the folder of /dev/null/results.json"),
        (["--rounds", "-1"], "rounds must be 0 or more"),
        (["--dataset", "cora", "--data-root", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, words, capfd):
    assert main(["search", *arguments]) == 2
    said = capfd.readouterr().err
    assert words in said and said.startswith("bench: ") and said.count("\n") == 1

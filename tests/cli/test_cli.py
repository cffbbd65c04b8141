"""Commands as their users meet them: output, exit status, files."""

import json
import re

import pytest
import torch

from acefast import cli
from acefast.data import load_dataset
from acefast.pruning.ticket import Ticket
from acefast.search import SearchConfig


def test_search_prints_progress_table_and_paths(finished):
    folder, process = finished
    lines = process.stdout.splitlines()
    assert any(re.search(r"dense baseline: val \d+\.\d\d %, test", line) for line in lines)
    assert any("round 2 of 2: 9.74 % of edges removed, 36.00 % of weights removed" in line for line in lines)
    assert len([line for line in lines if "elapsed" in line]) <= 8, "one line a round, not one an epoch"
    assert lines[-2:] == [f"table: {folder / 'report.md'}", f"plot:  {folder / 'accuracy.png'}"]
    assert "Traceback" not in process.stderr
    assert {path.name for path in (folder / "tickets").iterdir()} == {"round-01.safetensors", "round-02.safetensors"}
    assert "| dense |" in (folder / "report.md").read_text()


def test_finished_run_is_not_computed_again(finished, acefast, small):
    folder, first = finished
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    again = acefast("search", *small, "--method", "ugs", "--rounds", 2, "--out", folder)
    assert again.returncode == 0 and "is complete; nothing was computed" in again.stdout
    assert "elapsed" not in again.stdout
    assert again.stdout.splitlines()[-4:] == first.stdout.splitlines()[-4:]
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before


def test_report_json(finished, capsys):
    folder, _ = finished
    assert cli.main(["report", str(folder), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert [row["weights_kept"] for row in rows] == [11520, 9216, 7373]
    assert all(row["seconds"] > 0 and row["dataset"] == "synthetic-cora" for row in rows)


def test_report_to_another_folder(finished, capsys, tmp_path):
    folder, _ = finished
    assert cli.main(["report", str(folder.parent), "--out", str(tmp_path / "new")]) == 0
    assert "sparsest rung" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["accuracy.png", "report.md"]


def test_inspect(finished, capsys):
    folder, _ = finished
    path = folder / "tickets" / "round-02.safetensors"
    assert cli.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "9,528 of 10,556 kept, 9.74 % removed" in text and "layers.0.lin.weight" in text
    assert cli.main(["inspect", str(path), "--json", "--dataset", "synthetic-cora"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["edges"] == {"kept": 9528, "total": 10556, "sparsity": pytest.approx(9.7386, abs=1e-3)}
    assert facts["metadata"]["method"] == "ugs" and facts["graph"]["edges_kept"] == 9528
    assert sum(mask["kept"] for mask in facts["masks"].values()) == facts["weights"]["kept"] == 7373


def test_inspect_knows_the_self_loops_of_gat(capsys, tmp_path):
    graph = load_dataset("synthetic-cora").graph.with_self_loops()
    source, destination = graph.edge_index()
    keep = (source == destination) | ((source != 0) & (destination != 0))  # node 0 keeps its own loop alone
    metadata = {"fingerprint": graph.fingerprint(), "dataset": "synthetic-cora", "backbone": "gat"}
    Ticket(keep, {}, {}, metadata).save(tmp_path / "gat.safetensors")
    assert cli.main(["inspect", str(tmp_path / "gat.safetensors"), "--dataset", "synthetic-cora", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["graph"]
    assert (facts["edges"], facts["edges_kept"]) == (10556 + 2708, int(keep.sum()))
    assert facts["isolated_before"] == 0 and facts["isolated"] >= 1


def test_retrain(finished, capsys):
    folder, _ = finished
    path = str(folder / "tickets" / "round-02.safetensors")
    last = json.loads((folder / "history.jsonl").read_text().splitlines()[-1])
    assert cli.main(["retrain", path]) == 0
    text = capsys.readouterr().out
    here = f"val {100 * last['val']:.2f} %, test {100 * last['test']:.2f} %"
    assert f"{here} at epoch {last['best_epoch'] + 1}; the search reported {here}" in text
    assert "9,528 of 10,556 edges, 7,373 of 11,520 weights kept" in text
    assert cli.main(["retrain", path, "--seed", "5", "--dense", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    row = json.loads(line)
    assert (row["ticket"], row["seed"], row["start"], row["weights_kept"]) == (path, 5, "fresh", 7373)
    assert {"val", "test", "dense_val", "dense_test", "seconds"} <= row.keys()


def test_env(capsys):
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("acefast", torch.__version__, "built", "spmm", "topk_mask", "cpu"))
    assert cli.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["serving"]["spmm"]["cpu"] in ("native", "torch")


def test_help_names_every_command_and_setting(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("search", "grid", "demo", "report", "inspect", "retrain", "env"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["search", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in SearchConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert cli.main(["--version"]) == 0


@pytest.fixture
def resolved(monkeypatch):
    """The configuration and folder that a search would run with, without running it."""
    seen = {}
    monkeypatch.setattr(cli, "run", lambda config, out, *rest: seen.update(config=config, out=out))
    monkeypatch.setattr(cli, "finish", lambda *args: None)

    def call(*args):
        assert cli.main(["search", *args, "--out", "x"]) == 0
        return seen["config"]

    return call


def test_presets_resolve_before_flags(resolved):
    config = resolved(*"--dataset pubmed --method ugs --rounds 20 --mask-epochs 50".split())
    assert (config.hidden, config.s1, config.s2, config.mask_epochs, config.rounds) == (512, 1e-6, 1e-3, 50, 20)
    assert resolved("--dataset", "pubmed").hidden == 256
    assert resolved("--dataset=pubmed", "--hidden=64").hidden == 64
    assert resolved("--preset", "released", "--dataset", "citeseer").seed == 4428
    assert resolved("--preset", "released", "--seed", "1").seed == 1
    assert resolved("--bias").bias and not resolved("--preset", "released", "--no-bias").bias


def test_settings_that_follow_others_still_do(resolved):
    # mask_lr is the weights' lr unless it is given, also where lr comes from the command line.
    assert resolved("--lr", "0.05").mask_lr == 0.05
    assert resolved("--lr", "0.05", "--mask-lr", "0.01").mask_lr == 0.01
    assert resolved("--lr", "0.05", "--mask_lr=0.008").mask_lr == 0.008, "given, though it is the preset's value"
    assert resolved("--method", "dense", "--rounds", "20").rounds == 0


def refuse(capsys, *args) -> str:
    assert cli.main([*map(str, args)]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("acefast: ") and "Traceback" not in captured.err + captured.out
    return lines[0]


@pytest.mark.parametrize(
    "args, says",
    [
        (["frobnicate"], "unknown command 'frobnicate'"),
        (["search"], "--out"),
        (["search", "--out"], "--out"),
        (["search", "--out", "x", "--dataset", "nope"], "'nope' is not known"),
        (["search", "--out", "x", "--method", "nope"], "nope"),
        (["search", "--out", "x", "--backbone", "mlp"], "mlp"),
        (["search", "--out", "x", "--rounds", "abc"], "--rounds"),
        (["search", "--out", "x", "--rounds", "-1"], "rounds must be 0 or more"),
        (["search", "--out", "x", "--lr", "nan"], "lr must be"),
        (["search", "--out", "x", "--dropout", "1.5"], "dropout must be"),
        (["search", "--out", "x", "--preset", "released", "--axes", "edges"], "preset released"),
        (["search", "--out", "x", "--frobnicate", "3"], "--frobnicate"),
        (["search", "--out", "x", "--round", "3"], "--round"),
        (["report"], "at least one run folder"),
        (["report", "absent"], "no run folder or pack absent"),
        (["report", "--frobnicate", "x"], "--frobnicate"),
        (["inspect"], "TICKET"),
        (["inspect", "absent.safetensors"], "no ticket absent.safetensors"),
        (["search", "--task", "graph", "--out", "x"], "graph"),
        (["search", "--task", "link", "--preset", "released", "--out", "x"], "procedure for task node"),
        (["search", "--task", "link", "--embedding", "0", "--out", "x"], "embedding must be 1 or more"),
        (["search", "--dataset", "twin:ogbl-ddi:0.02", "--out", "x"], "set task link (--task link)"),
        (["retrain", "absent.safetensors"], "no ticket absent.safetensors"),
        (["retrain", "x", "--backbone", "nope"], "nope"),
        (["env", "more"], "more"),
    ],
)
def test_usage_errors_are_one_sentence(capsys, monkeypatch, tmp_path, args, says):
    monkeypatch.chdir(tmp_path)
    assert says in refuse(capsys, *args)
    assert not list(tmp_path.iterdir())


def test_report_refuses_what_is_damaged_and_keeps_the_old_report(finished, capsys, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    (folder / "report.md").write_text("the old report")
    history = (folder / "history.jsonl").read_text()
    (folder / "history.jsonl").write_text(history[: len(history) // 2])
    assert "history.jsonl" in refuse(capsys, "report", folder)
    assert (folder / "report.md").read_text() == "the old report"


def test_inspect_refuses_what_is_damaged(finished, capsys, tmp_path):
    data = (finished[0] / "tickets" / "round-01.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    assert "not a whole ticket" in refuse(capsys, "inspect", tmp_path / "cut")
    (tmp_path / "text").write_text("no ticket at all")
    assert "not a whole ticket" in refuse(capsys, "inspect", tmp_path / "text")


def test_inspect_refuses_a_ticket_for_another_graph(finished, capsys, tmp_path):
    ticket = Ticket.load(finished[0] / "tickets" / "round-01.safetensors")
    ticket.metadata["fingerprint"] = "0" * 64
    ticket.save(tmp_path / "other.safetensors")
    says = refuse(capsys, "inspect", tmp_path / "other.safetensors", "--dataset", "synthetic-cora")
    assert "ticket for another graph" in says


def test_out_that_cannot_be_a_folder(finished, capsys, tmp_path, small):
    (tmp_path / "file").write_text("kept")
    args = ["search", *small, "--method", "dense", "--out"]
    assert "cannot use" in refuse(capsys, *args, tmp_path / "file")
    assert "cannot use" in refuse(capsys, *args, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("kept")
    assert "holds files of no search" in refuse(capsys, *args, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir() if path.is_file() and path.name[0] != "."] == [
        "thesis.tex"
    ]
    assert "cannot make the folder" in refuse(capsys, "report", finished[0], "--out", tmp_path / "file" / "below")


def test_links(capsys, tmp_path, small):
    out = tmp_path / "links"
    args = ["search", "--task", "link", *small, "--method", "ugs", "--rounds", "1", "--out", str(out)]
    assert cli.main(args) == 0
    shown = capsys.readouterr().out
    assert "ugs: links of synthetic-cora" in shown and " % (rocauc)" in shown
    assert "synthetic-cora links, gcn, ugs (rocauc; paper" in (out / "report.md").read_text()
    path = str(out / "tickets" / "round-01.safetensors")
    assert cli.main(["inspect", path, "--dataset", "synthetic-cora"]) == 0
    assert "fits synthetic-cora: 2,708 nodes, 8,976 edges" in capsys.readouterr().out
    assert cli.main(["report", str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["dataset"], row["metric"], row["edges_total"]) for row in rows} == {("synthetic-cora links", "rocauc", 8976)}
    assert cli.main(["retrain", path, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["val"], again["test"], again["task"]) == (rows[1]["val"], rows[1]["test"], "link")


def test_demo_runs_the_three_methods_into_one_report(monkeypatch, capsys, tmp_path):
    small = dict(hidden=8, mask_epochs=2, fix_epochs=2, ace_epochs=1, ace_rounds=1, threads=1)
    monkeypatch.setattr(cli, "DEMO", cli.DEMO | small)
    assert cli.main(["demo", "--out", str(tmp_path / "demo"), "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "Side by side" in out and out.rstrip().endswith(f"plot:  {tmp_path / 'demo' / 'accuracy.png'}")
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "accuracy.png",
        "ace",
        "dense",
        "report.md",
        "ugs",
    ]
    assert cli.main(["demo", "--out", str(tmp_path / "demo"), "--rounds", "1"]) == 0
    assert "is complete; nothing was computed" in capsys.readouterr().out

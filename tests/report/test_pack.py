"""Packs: the same report as from the folders, merging, and lines that are refused."""

import json

import pytest

from acefast import cli, report
from acefast.errors import InputError
from acefast.report.pack import to_line

EVENT = {"event": "imp", "edges_spread": 0.1 + 0.2, "edges_homophily_kept": 0.81, "edges_homophily_removed": 0.5}
SECONDS = {"inference_dense": 0.005, "inference_regrouped": 0.004, "inference_compact": 0.002}
INFERENCE = {"round": 2, **SECONDS, "inference_threads": 1}


@pytest.fixture
def runs(tmp_path, write_run):
    """A folder of runs of two methods and data sets, one of them with all that a search tells."""
    for seed in range(3):
        for dataset in ("cora", "pubmed"):
            told = dict(dataset=dataset, seed=seed, data_root=f"place-{seed}", epochs=7)
            write_run(tmp_path / "runs" / f"{dataset}-u{seed}", [0.8, 0.81 + seed / 1000, 0.79], **told)
            ace = dict(method="ace", exchanged={"edges": 3, "weights": 4}, events=[EVENT], tau=0.1)
            folder = write_run(tmp_path / "runs" / f"{dataset}-a{seed}", [0.8, 0.805, 1 / 3], **told, **ace)
    (folder / "inference.jsonl").write_text(json.dumps(INFERENCE | {"repeats": 50}) + "\n")
    values = {"data": "d1", "start": "s1", "environment": {"torch": "2.13"}, "best": {"val": 0.5}}
    (folder / "checkpoint.json").write_text(json.dumps({"round": 3, "stage": 0, "values": values}))
    return tmp_path / "runs"


def text_and_rows(sources, out):
    groups = report.read_groups(sources)
    rows = [{key: value for key, value in row.items() if key != "run"} for row in report.rows(groups)]
    text, plot = report.write(groups, out)
    return text.read_text(), plot.read_bytes(), rows


def test_a_pack_gives_the_report_of_its_folders(tmp_path, runs, capsys):
    file = tmp_path / "all.jsonl"
    assert cli.main(["pack", str(runs), "--out", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: 12 runs; 12 new, 0 replaced, 0 kept\n"
    expected = text_and_rows([runs], tmp_path / "one")
    assert "0.810" in expected[0] and "homophily of kept" in expected[0]
    assert "5.000 |        4.000 |        2.000 | 2.50x |        2.00x |      7.0 |      3,500 |" in expected[0]
    assert text_and_rows([file], tmp_path / "two") == expected
    line = json.loads(file.read_text().splitlines()[-1])
    assert (line["run"], line["environment"]) == ("pubmed-a2", {"data": "d1", "start": "s1", "torch": "2.13"})
    assert "data_root" not in line["config"]

    # Folders and packs in any mix and order; packs of packs; the same bytes.
    half = tmp_path / "half.jsonl"
    report.pack(sorted(runs.glob("pubmed*"), reverse=True), half)
    assert text_and_rows([half, *runs.glob("cora*")], tmp_path / "three") == expected
    report.pack([*runs.glob("cora*"), half, half], half)
    assert half.read_bytes() == file.read_bytes()
    assert report.write(report.read_groups([file]))[0].parent == tmp_path


def test_merging_takes_the_longer_record_and_refuses_a_contradiction(tmp_path, write_run):
    out = tmp_path / "all.jsonl"
    long = write_run(tmp_path / "long", [0.8, 0.81, 0.79])
    short = write_run(tmp_path / "short", [0.8, 0.81], seconds=9.0)
    other = write_run(tmp_path / "other", [0.8, 0.82])
    assert report.pack([short], out) == {"packed": 1, "new": 1, "replaced": 0, "kept": 0}
    assert report.pack([long], out) == {"packed": 1, "new": 0, "replaced": 1, "kept": 0}
    whole = out.read_bytes()
    assert report.pack([short], out) == {"packed": 1, "new": 0, "replaced": 0, "kept": 1}
    with pytest.raises(InputError, match="contradict each other: val of round 1 is 0.81 and 0.82"):
        report.pack([other], out)
    assert out.read_bytes() == whole == to_line(report.read_run(long)).encode()
    with pytest.raises(InputError, match="same search with seed 0"):
        report.read_groups([out, long])
    with pytest.raises(InputError, match="cannot write"):
        report.pack([long], tmp_path / "absent" / "all.jsonl")


def edit(**values):
    return lambda line: line | values


def rung(k, **values):
    return lambda line: line | {"rungs": [r | values if i == k else r for i, r in enumerate(line["rungs"])]}


@pytest.mark.parametrize(
    "change, message",
    [
        (edit(run=""), "line 1 must have run as a str"),
        (edit(config=[]), "line 1 must have config as a dict"),
        (edit(config={"dataset": "cora"}), "line 1 must have backbone as str"),
        (edit(environment={"torch": 2}), "line 1: the environment must be texts"),
        (edit(rungs=[]), "line 1 must have rungs as a list"),
        (edit(rungs=["x"]), "line 1 rung 0 has 'x'"),
        (rung(1, edges_luck=3), "line 1 rung 1 has 'edges_luck', which is nothing"),
        (rung(1, round=2), "line 1 rung 1: round must be 1"),
        (rung(1, test=1.2), "line 1 rung 1: test must be a fraction"),
        (rung(1, edges_kept=99_999), "line 1 rung 1: 99999 edges cannot be kept"),
        (rung(1, weights_total=5, weights_kept=1), "line 1 rung 1: weights_total must be"),
        (rung(1, edges_spread=-1), "line 1 rung 1: edges_spread must be a number"),
        (rung(1, inference_dense=0.1), "line 1 rung 1 must have a round and its inference_dense, inference_regrouped"),
        (rung(0, seconds="1"), "line 1 rung 0 must have a round and its seconds"),
    ],
)
def test_a_line_that_was_changed_is_refused(tmp_path, write_run, change, message, capsys):
    file = tmp_path / "all.jsonl"
    report.pack([write_run(tmp_path / "run", [0.8, 0.81])], file)
    file.write_text(json.dumps(change(json.loads(file.read_text()))) + "\n")
    assert cli.main(["report", str(file)]) == 2
    said = capsys.readouterr().err
    assert message in said and str(file) in said and said.count("\n") == 1


@pytest.mark.parametrize("text, message", [("", "holds no run"), ("{}\n", "must have run"), ("{", "no JSON object")])
def test_a_file_that_is_no_pack_is_refused(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        report.read_groups([tmp_path / "x.jsonl"])


def test_a_damaged_checkpoint_is_refused(tmp_path, write_run):
    folder = write_run(tmp_path / "run", [0.8])
    (folder / "checkpoint.json").write_text("{}")
    with pytest.raises(InputError, match="run the search's command again"):
        report.pack([folder], tmp_path / "all.jsonl")


def test_a_record_of_before_a_setting_existed_groups_with_those_at_its_default(tmp_path, write_run):
    write_run(tmp_path / "old", [0.8, 0.7], seed=0)
    write_run(tmp_path / "new", [0.8, 0.7], seed=1, edge_score="")
    write_run(tmp_path / "other", [0.8, 0.7], seed=2, edge_score="share")
    groups = report.read_groups([tmp_path])
    assert sorted([run.seed for run in group.runs] for group in groups) == [[0, 1], [2]]

"""What must be refused from outside, each in a process of its own: one sentence, exit status 2, nothing overwritten."""

import os
import pickle
import shutil

import pytest


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(process) -> str:
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2, (process.returncode, process.stderr)
    assert len(lines) == 1 and lines[0].startswith("acefast: "), process.stderr
    assert "Traceback" not in process.stderr + process.stdout
    return lines[0]


class Names:
    """Pickles as a call of os.system, which must not happen."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def cut_short(folder, marker):
    path = folder / "ind.cora.allx"
    path.write_bytes(path.read_bytes()[:5000])
    return "ind.cora.allx"


def names_a_function(folder, marker):
    (folder / "ind.cora.ally").write_bytes(pickle.dumps(Names(f"touch {marker}"), protocol=2))
    return "ind.cora.ally"


def index_out_of_range(folder, marker):
    path = folder / "ind.cora.test.index"
    path.write_text(path.read_text().replace("2692\n", "999999\n", 1))
    return "999999"


@pytest.mark.parametrize("damage", [cut_short, names_a_function, index_out_of_range])
def test_damaged_data(acefast, planetoid, small, tmp_path, damage):
    shutil.copytree(planetoid, tmp_path / "data", ignore=shutil.ignore_patterns("*.pubmed.*", "*.citeseer.*"))
    named = damage(tmp_path / "data", tmp_path / "marker")
    args = ["search", *small, "--dataset", "cora", "--data-root", tmp_path / "data", "--out", tmp_path / "run"]
    assert named in refused(acefast(*args))
    assert not (tmp_path / "run").exists() and not (tmp_path / "marker").exists()


def test_a_type_of_features_that_is_none(acefast, small, tmp_path):
    says = refused(acefast("search", *small, "--dtype", "float16", "--out", tmp_path / "run"))
    assert "float32" in says and "bfloat16" in says and "float16" in says and not (tmp_path / "run").exists()


def test_missing_folder(acefast, small, tmp_path):
    absent = tmp_path / "absent"
    says = refused(acefast("search", *small, "--dataset", "cora", "--data-root", absent, "--out", tmp_path / "run"))
    assert str(absent) in says and not (tmp_path / "run").exists()


def test_ticket_for_another_graph(acefast, finished, planetoid):
    folder, _ = finished
    ticket = folder / "tickets" / "round-01.safetensors"
    says = refused(acefast("inspect", ticket, "--dataset", "cora", "--data-root", planetoid))
    assert "ticket for another graph" in says


def test_other_settings_in_the_same_folder(acefast, finished, small):
    folder, _ = finished
    before = contents(folder)
    says = refused(acefast("search", *small, "--method", "ugs", "--rounds", 2, "--lr", 0.5, "--out", folder))
    assert "lr" in says and "0.5" in says
    assert contents(folder) == before

"""Planetoid files fetched from a server on this machine."""

import functools
import http.server
import shutil
import threading

import pytest

from acefast import cli
from acefast.data import download, download_planetoid, load_planetoid


@pytest.fixture
def server(cora, monkeypatch):
    """Serves Cora's files from a folder; its `paths` lists what was asked for."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            self.server.paths.append(self.path)

    handler = functools.partial(Handler, directory=cora)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.paths = []
        threading.Thread(target=running.serve_forever, args=[0.02], daemon=True).start()
        monkeypatch.setattr(download, "SOURCE", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("no_proxy", "*")
        yield running
        running.shutdown()


def test_every_published_file_has_its_checksum(planetoid):
    for name in ("cora", "citeseer", "pubmed"):
        for part in download.PARTS:
            file = f"ind.{name}.{part}"
            download._check((planetoid / file).read_bytes(), file, "", "")
    assert len(download.SHA256) == 24


def test_what_is_missing_is_fetched_once(server, cora, tmp_path):
    root = tmp_path / "new" / "root"
    fetched = download_planetoid("cora", root)
    assert len(fetched) == len(server.paths) == 8 and all(path.parent == root for path in fetched)
    assert load_planetoid("cora", root).fingerprint == load_planetoid("cora", cora).fingerprint
    assert download_planetoid("cora", root) == [] and len(server.paths) == 8
    fetched[3].unlink()
    assert download_planetoid("cora", root) == [fetched[3]] and len(server.paths) == 9
    shutil.copytree(root, tmp_path / "other" / "planetoid")
    assert download_planetoid("cora", tmp_path / "other") == [] and len(server.paths) == 9


def test_what_is_not_the_published_file_is_refused(server, cora, tmp_path, refusal):
    root = tmp_path / "root"
    good = (cora / "ind.cora.tx").read_bytes()
    (cora / "ind.cora.tx").write_bytes(good[:-1] + b"!")
    text = refusal(download_planetoid, "cora", root)
    assert "/ind.cora.tx sent is not the published file" in text and "SHA-256" in text
    assert [path.name for path in root.iterdir()] == ["ind.cora.x"], "what was whole stays, the rest leaves nothing"
    (cora / "ind.cora.tx").write_bytes(good)
    (root / "ind.cora.x").write_text("mine")
    assert "ind.cora.x is not the published file" in refusal(download_planetoid, "cora", root)
    assert (root / "ind.cora.x").read_text() == "mine"


def test_what_cannot_be_fetched_is_refused(server, cora, tmp_path, refusal, monkeypatch):
    (cora / "ind.cora.y").unlink()
    assert "ind.cora.y: HTTP Error 404" in refusal(download_planetoid, "cora", tmp_path / "root")
    monkeypatch.setattr(download, "SOURCE", "http://127.0.0.1:9")
    assert "cannot fetch http://127.0.0.1:9/ind.cora.y" in refusal(download_planetoid, "cora", tmp_path / "root")
    assert "only cora, citeseer, pubmed" in refusal(download_planetoid, "synthetic-cora", tmp_path)
    assert "--data-root" in refusal(download_planetoid, "cora", "")
    (tmp_path / "file").write_text("")
    assert "cannot use" in refusal(download_planetoid, "cora", tmp_path / "file")


def test_the_command_fetches_only_with_its_flag(server, tmp_path, capsys):
    args = "search --dataset cora --method dense --hidden 4 --threads 1 --fix-epochs 1".split()
    args += ["--data-root", str(tmp_path / "root"), "--out", str(tmp_path / "run")]
    (tmp_path / "root").mkdir()
    assert cli.main(args) == 2 and not server.paths
    assert cli.main([*args, "--download"]) == 0 and len(server.paths) == 8
    assert f"fetched {tmp_path / 'root' / 'ind.cora.graph'}" in capsys.readouterr().out

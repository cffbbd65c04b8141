"""OGB's data sets: the real ogbn-arxiv and ogbl-ddi, and small folders of the same layout for the others."""

import gzip
import os
import shutil
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

from acefast.data import load_dataset
from acefast.data.ogb import OGB


def rows(data) -> np.ndarray:
    return data.graph.edge_index().numpy()


def is_symmetric_and_sorted(data) -> bool:
    src, dst = rows(data)
    key, other = dst * data.num_nodes + src, src * data.num_nodes + dst
    return bool((key[1:] >= key[:-1]).all()) and np.array_equal(np.sort(other), key)


# The real ones


def test_arxiv_has_the_published_counts(ogb, cache):
    data = load_dataset("ogbn-arxiv", ogb.parent, features="fastrp", cache=cache)
    assert (data.num_nodes, data.graph.num_edges, data.num_classes, data.features) == (169_343, 2_484_941, 40, "fastrp")
    assert [index.numel() for index in (data.train, data.val, data.test)] == [90_941, 29_799, 48_603]
    assert data.graph.eid is None and is_symmetric_and_sorted(data)
    assert data.graph.self_loops().shape[1] == data.num_nodes
    plain = load_dataset("ogbn-arxiv", ogb, features="fastrp", add_self_loops=False, cache=cache)
    assert plain.graph.num_edges == 2_315_598 and plain.graph.self_loops().shape[1] == 0
    with gzip.open(ogb / "ogbn_arxiv" / "raw" / "node-label.csv.gz") as file:
        assert data.y.tolist() == [int(line) for line in file]


def test_ddi_has_the_published_counts(ogb, cache):
    data = load_dataset("ogbl-ddi", ogb, cache=cache)
    assert (data.num_nodes, data.graph.num_edges, data.x, data.y, data.features) == (
        4_267,
        2 * 1_067_911,
        None,
        None,
        "none",
    )
    shapes = [list(getattr(data, field).shape) for field in ("train", "val", "test", "val_neg", "test_neg")]
    assert shapes == [[1_067_911, 2], [133_489, 2], [133_489, 2], [101_882, 2], [95_599, 2]]
    assert (data.task, data.metric) == ("link", "hits@20") and is_symmetric_and_sorted(data)
    keys = [
        pairs.sort(1).values @ torch.tensor([4_267, 1])
        for pairs in (data.train, data.val, data.test, data.val_neg, data.test_neg)
    ]
    assert torch.cat(keys[:3]).unique().numel() == sum(key.numel() for key in keys[:3]), "the splits share no edge"
    assert not torch.isin(torch.cat(keys[3:]), torch.cat(keys[:3])).any()


def test_what_is_there_is_mapped(ogb, cache):
    for name, options in (("ogbn-arxiv", dict(features="fastrp")), ("ogbl-ddi", {})):
        first = load_dataset(name, ogb, cache=cache, **options)
        start = time.perf_counter()
        again = load_dataset(name, ogb, cache=cache, **options)
        assert time.perf_counter() - start < 3
        assert again.fingerprint == first.fingerprint


def test_arxiv_without_features_says_what_to_do(ogb, cache, refusal):
    text = refusal(load_dataset, "ogbn-arxiv", ogb, cache=cache)
    assert "raw/node-feat.csv.gz is missing" in text and "--features fastrp" in text


def test_a_read_only_folder_is_left_alone(ogb, tmp_path):
    shutil.copytree(ogb / "ogbl_ddi", tmp_path / "ogbl_ddi")
    os.chmod(tmp_path / "ogbl_ddi", 0o555)
    with pytest.warns(UserWarning, match="is read-only"):
        load_dataset("ogbl-ddi", tmp_path)
    os.chmod(tmp_path / "ogbl_ddi", 0o755)
    assert not (tmp_path / "ogbl_ddi" / "acefast").exists()


# Small ones of the same layout


def write_csv(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in np.asarray(values).reshape(len(values), -1).tolist())


class Small:
    """A random folder of `name`, and what was written into it."""

    nodes, num_edges = 40, 130

    def __init__(self, name, root, train_pt=True):
        layout, rng = OGB[name], np.random.default_rng(len(name))
        self.name, self.root, self.folder = name, root, root / name.replace("-", "_")
        raw, split = self.folder / "raw", self.folder / "split" / layout.split
        split.mkdir(parents=True)
        raw.mkdir()
        self.edges = rng.integers(0, self.nodes, (self.num_edges, 2))
        self.edges[:3] = self.edges[3:6, ::-1]  # the reverse of other rows
        self.edges[6] = self.edges[7] = 5, 5
        self.x = rng.integers(-99, 99, (self.nodes, 3)) / 8
        self.edge_attr = rng.integers(1, 99, (self.num_edges, 1 if name == "ogbl-collab" else 4)) / (
            1 if name == "ogbl-collab" else 8
        )
        self.y = rng.integers(0, 2, (self.nodes, 5 if layout.task == "multilabel" else 1))
        self.species = rng.choice([9606, 4932, 3702], self.nodes)
        self.split = {
            part: np.sort(index)
            for part, index in zip(("train", "valid", "test"), np.split(rng.permutation(self.nodes)[:30], [15, 20]))
        }
        self.pairs = {part: rng.integers(0, self.nodes, (6, 2, 2)) for part in ("train", "valid", "test")}
        if layout.binary:
            self.y = self.y.astype(np.float32)
            self.y[np.setdiff1d(np.arange(self.nodes), np.concatenate(list(self.split.values())))] = np.nan
            lists = dict(num_nodes_list=np.array([self.nodes]), num_edges_list=np.array([self.num_edges]))
            np.savez_compressed(
                raw / "data.npz", edge_index=self.edges.T, node_feat=np.float32(self.x), node_year=self.y, **lists
            )
            np.savez_compressed(raw / "node-label.npz", node_label=self.y)
        else:
            write_csv(raw / "edge.csv.gz", self.edges)
            write_csv(raw / "num-node-list.csv.gz", [self.nodes])
            write_csv(raw / "num-edge-list.csv.gz", [self.num_edges])
            if layout.task != "link":
                write_csv(raw / "node-label.csv.gz", self.y)
            if layout.edge_attr:
                write_csv(
                    raw / f"{layout.edge_attr}.csv.gz",
                    self.edge_attr.astype(int) if name == "ogbl-collab" else self.edge_attr,
                )
            if layout.node_features:
                write_csv(
                    raw / f"{layout.node_features}.csv.gz", self.species if layout.task == "multilabel" else self.x
                )
        for part in self.split:
            if layout.task != "link":
                write_csv(split / f"{part}.csv.gz", self.split[part])
            elif part != "train" or train_pt:
                pairs = {"edge": self.pairs[part][:, 0], "edge_neg": self.pairs[part][:, 1], "year": np.arange(6)}
                torch.save(pairs, split / f"{part}.pt")

    def load(self, **options):
        return load_dataset(self.name, self.root, **options)

    def directed(self):
        """(src, dst, row) of both directions of each row, by (dst, src, row), the self-loops of the one before those of the
        other direction."""
        src, dst = np.concatenate((self.edges, self.edges[:, ::-1])).T
        row = np.tile(np.arange(self.num_edges), 2)
        order = np.lexsort((row, (src == dst) & (np.arange(len(src)) >= self.num_edges), src, dst))
        return src[order], dst[order], row[order]


@pytest.fixture
def small(tmp_path):
    return lambda name, **options: Small(name, tmp_path, **options)


def test_proteins(small):
    files = small("ogbn-proteins")
    data = files.load()
    src, dst, row = files.directed()
    assert np.array_equal(rows(data), np.stack((src, dst))) and data.graph.eid is None
    assert np.array_equal(data.edge_attr.numpy(), np.float32(files.edge_attr[row]))
    assert (data.task, data.metric, data.num_classes) == ("multilabel", "rocauc", 5)
    assert np.array_equal(data.y.numpy(), np.float32(files.y))
    sums = np.zeros((files.nodes, 4))
    np.add.at(sums, dst, files.edge_attr[row])
    one_hot = files.species[:, None] == np.array([3702, 4932, 9606])
    assert np.array_equal(data.x.numpy(), np.float32(np.concatenate((sums, one_hot), 1)))
    assert data.features == "sums of edge features, species"


def test_proteins_with_species_as_the_archive_names_them(small):
    files = small("ogbn-proteins")
    raw = files.folder / "raw"
    wanted = files.load().x
    (raw / "node_species.csv.gz").rename(raw / "species.csv.gz")
    assert torch.equal(files.load().x, wanted) and (raw / "species.csv.gz").exists()


def test_products(small):
    files = small("ogbn-products")
    data = files.load()
    assert np.array_equal(rows(data), np.stack(files.directed()[:2]))
    assert np.array_equal(data.x.numpy(), np.float32(files.x)) and data.features == "given"
    assert np.array_equal(data.y.numpy(), files.y[:, 0]) and data.num_classes == 47
    assert all(
        np.array_equal(getattr(data, ours).numpy(), files.split[theirs])
        for ours, theirs in (("train", "train"), ("val", "valid"), ("test", "test"))
    )


def test_arxiv(small):
    files = small("ogbn-arxiv")
    src, dst, _ = files.directed()
    wanted = np.unique(np.stack((dst, src)), axis=1)[::-1]
    assert np.array_equal(rows(files.load(add_self_loops=False)), wanted)
    loops = np.arange(files.nodes)
    wanted = np.unique(np.concatenate((np.stack((dst, src)), np.stack((loops, loops))), 1), axis=1)[::-1]
    data = files.load()
    assert np.array_equal(rows(data), wanted) and np.array_equal(data.x.numpy(), np.float32(files.x))


def test_papers(small):
    files = small("ogbn-papers100M")
    data = files.load()
    src, dst = files.edges.T
    assert np.array_equal(rows(data), np.stack((src, dst))[:, np.lexsort((src, dst))])
    assert np.array_equal(data.x.numpy(), np.float32(files.x))
    assert np.array_equal(data.y.numpy(), np.where(np.isnan(files.y[:, 0]), -1, files.y[:, 0])) and data.y.min() == -1


@pytest.mark.parametrize("name", ["ogbl-collab", "ogbl-ddi"])
@pytest.mark.parametrize("train_pt", [True, False])
def test_link_prediction(small, name, train_pt):
    files = small(name, train_pt=train_pt)
    data = files.load()
    src, dst, row = files.directed()
    assert np.array_equal(rows(data), np.stack((src, dst)))
    assert np.array_equal(data.train.numpy(), files.pairs["train"][:, 0] if train_pt else files.edges)
    for ours, theirs in (("val", "valid"), ("test", "test")):
        assert np.array_equal(getattr(data, ours).numpy(), files.pairs[theirs][:, 0])
        assert np.array_equal(getattr(data, f"{ours}_neg").numpy(), files.pairs[theirs][:, 1])
    if name == "ogbl-collab":
        assert np.array_equal(data.edge_attr.numpy(), np.float32(files.edge_attr[row])) and data.metric == "hits@50"
        assert np.array_equal(data.x.numpy(), np.float32(files.x))


@pytest.mark.parametrize("name", OGB)
def test_the_cache_follows_the_files(small, name, tmp_path):
    files = small(name)
    first = files.load()
    stored = files.folder / "acefast"
    inodes = {path: path.stat().st_ino for path in stored.rglob("*.npy")}
    assert inodes and files.load().fingerprint == first.fingerprint
    assert inodes == {path: path.stat().st_ino for path in stored.rglob("*.npy")}, "nothing was made anew"
    for path in stored.rglob("col.npy"):
        path.write_bytes(path.read_bytes()[:-4] + b"\xff" * 4)
    assert files.load().fingerprint == first.fingerprint
    assert files.load(cache=tmp_path / "elsewhere").fingerprint == first.fingerprint
    shutil.copytree(stored, tmp_path / "foreign")
    shutil.rmtree(files.folder)
    Small.num_edges, before = 131, Small.num_edges
    try:
        other = Small(name, tmp_path)
    finally:
        Small.num_edges = before
    shutil.copytree(tmp_path / "foreign", stored)
    assert other.load().graph.num_edges != first.graph.num_edges


def test_a_copied_folder_keeps_its_cache(small, tmp_path):
    files = small("ogbn-products")
    files.load()
    shutil.copytree(files.folder, tmp_path / "copy" / "ogbn_products", copy_function=shutil.copyfile)
    (tmp_path / "copy" / "ogbn_products" / "raw" / "edge.csv.gz").touch()
    before = (tmp_path / "copy" / "ogbn_products" / "acefast" / "graph" / "col.npy").stat().st_ino
    load_dataset("ogbn-products", tmp_path / "copy" / "ogbn_products")
    assert (tmp_path / "copy" / "ogbn_products" / "acefast" / "graph" / "col.npy").stat().st_ino == before


def test_stored_arrays_that_are_no_graph_are_refused(small, refusal):
    """Whole by their checksums and under the right key, and still not believed."""
    import json
    import zlib

    files = small("ogbl-ddi")
    files.load()
    entry = files.folder / "acefast" / "graph"
    col, meta = np.load(entry / "col.npy"), json.loads((entry / "meta.json").read_text())
    col[3] = files.nodes
    np.save(entry / "col.npy", col)
    meta["arrays"]["col"][2] = zlib.crc32(col)
    (entry / "meta.json").write_text(json.dumps(meta))
    assert "not those of a graph of 40 nodes" in refusal(files.load)


@pytest.mark.parametrize(
    "name, change, said",
    [
        (
            "ogbn-products",
            lambda f: (f.folder / "raw" / "edge.csv.gz").unlink(),
            "is not on disk, no raw/edge.csv.gz in ",
        ),
        (
            "ogbn-products",
            lambda f: (f.folder / "raw" / "node-label.csv.gz").unlink(),
            "node-label.csv.gz cannot be read: No such file",
        ),
        (
            "ogbn-products",
            lambda f: (f.folder / "raw" / "node-feat.csv.gz").unlink(),
            "node-feat.csv.gz is missing, fetch it",
        ),
        (
            "ogbn-products",
            lambda f: (f.folder / "split" / "sales_ranking" / "valid.csv.gz").unlink(),
            "valid.csv.gz cannot be read",
        ),
        (
            "ogbn-products",
            lambda f: write_csv(f.folder / "raw" / "edge.csv.gz", f.edges[:-1]),
            "has 129 rows, expected 130",
        ),
        ("ogbn-products", lambda f: write_csv(f.folder / "raw" / "edge.csv.gz", f.edges + 9), "expected 0 to 39"),
        (
            "ogbn-products",
            lambda f: write_csv(f.folder / "raw" / "edge.csv.gz", f.edges[:, :1]),
            "must hold pairs of nodes, got [130, 1]",
        ),
        (
            "ogbn-products",
            lambda f: write_csv(f.folder / "raw" / "node-label.csv.gz", f.y + 46),
            "labels must lie in [0, 47)",
        ),
        (
            "ogbn-products",
            lambda f: write_csv(f.folder / "split" / "sales_ranking" / "test.csv.gz", [40]),
            "names node 40",
        ),
        (
            "ogbn-proteins",
            lambda f: write_csv(f.folder / "raw" / "edge-feat.csv.gz", f.edge_attr[1:]),
            "has 129 rows, expected 130",
        ),
        ("ogbn-products", lambda f: write_csv(f.folder / "raw" / "node-label.csv.gz", f.y + 0.5), "must hold integers"),
        (
            "ogbn-products",
            lambda f: write_csv(f.folder / "raw" / "num-edge-list.csv.gz", [2**40]),
            "expected a number of edges below 2^31",
        ),
        (
            "ogbn-products",
            lambda f: write_csv(f.folder / "raw" / "num-node-list.csv.gz", [-1]),
            "says -1, expected a number of nodes",
        ),
        (
            "ogbn-papers100M",
            lambda f: np.savez(f.folder / "raw" / "node-label.npz", node_label=f.y + 0.5),
            "one whole number or NaN",
        ),
        ("ogbn-papers100M", lambda f: (f.folder / "raw" / "data.npz").write_bytes(b"PK"), "data.npz is damaged"),
        ("ogbn-papers100M", lambda f: np.savez(f.folder / "raw" / "node-label.npz", y=f.y), "has no array node_label"),
        ("ogbl-ddi", lambda f: (f.folder / "split" / "target" / "valid.pt").unlink(), "valid.pt cannot be read"),
        (
            "ogbl-ddi",
            lambda f: torch.save({"edge": 1}, f.folder / "split" / "target" / "test.pt"),
            "must hold pairs of nodes as edge",
        ),
        (
            "ogbl-ddi",
            lambda f: torch.save(
                {"edge": f.edges + 40, "edge_neg": f.edges}, f.folder / "split" / "target" / "test.pt"
            ),
            "test names node",
        ),
    ],
)
def test_refused(small, refusal, name, change, said):
    files = small(name)
    change(files)
    assert said in refusal(files.load)


def test_refused_options(small, refusal):
    files = small("ogbn-products")
    assert "features 'x' are not known" in refusal(files.load, features="x")
    assert "self-loops are added to ogbn-arxiv alone" in refusal(files.load, add_self_loops=True)


# Download


PACKAGE = """
import shutil, zipfile
def download_url(url, folder, log=True):
    if url.startswith("http"):
        raise RuntimeError("Stopped downloading due to interruption.\\nmore")
    return shutil.copy(url, folder)
def extract_zip(path, folder, log=True):
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
def decide_download(url):
    return input()
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(url): a package ogb whose table has that address for ogbn-products."""

    def make(url):
        for folder in ("nodeproppred", "utils"):
            (tmp_path / "packages" / "ogb" / folder).mkdir(parents=True)
            (tmp_path / "packages" / "ogb" / folder / "__init__.py").touch()
        (tmp_path / "packages" / "ogb" / "__init__.py").touch()
        (tmp_path / "packages" / "ogb" / "utils" / "url.py").write_text(PACKAGE)
        table = f",ogbn-arxiv,ogbn-products\ndownload_name,arxiv,products\nurl,http://x,{url}\n"
        (tmp_path / "packages" / "ogb" / "nodeproppred" / "master.csv").write_text(table)
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
        for module in [module for module in sys.modules if module.split(".")[0] == "ogb"]:
            monkeypatch.delitem(sys.modules, module)

    yield make
    for module in [module for module in sys.modules if module.split(".")[0] == "ogb"]:
        del sys.modules[module]


def test_download(small, package, tmp_path, monkeypatch, capsys):
    files = small("ogbn-products")
    with zipfile.ZipFile(tmp_path / "products.zip", "w") as archive:
        for path in files.folder.rglob("*.gz"):
            archive.write(path, "products/" + str(path.relative_to(files.folder)))
    package(tmp_path / "products.zip")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    data = load_dataset("ogbn-products", tmp_path / "new", download=True)
    assert data.fingerprint == files.load().fingerprint and capsys.readouterr().out == ""
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ogbn_products"]
    shutil.rmtree(tmp_path / "packages")
    assert (
        load_dataset("ogbn-products", tmp_path / "new", download=True).fingerprint == data.fingerprint
    )  # ogb is not asked again


def test_a_failed_download_leaves_nothing(package, tmp_path, refusal):
    package("http://nowhere")
    text = refusal(load_dataset, "ogbn-products", tmp_path / "new", download=True)
    assert "could not be fetched" in text and "(Stopped downloading due to interruption.)" in text
    assert list((tmp_path / "new").iterdir()) == []


def test_download_without_the_package_is_said(tmp_path, refusal, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install ogb" in refusal(load_dataset, "ogbn-products", tmp_path, download=True)

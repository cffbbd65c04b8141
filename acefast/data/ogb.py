"""Data sets of the Open Graph Benchmark (Hu et al., NeurIPS 2020), read from OGB's files as they lie on disk."""

import csv
import hashlib
import importlib
import importlib.util
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from acefast.data import edges
from acefast.data.cache import cached
from acefast.data.dataset import Dataset, check_features
from acefast.data.fastrp import fastrp
from acefast.data.raw import read_csv, read_npz, read_pt
from acefast.errors import InputError

PARTS = ("train", "train"), ("val", "valid"), ("test", "test")  # our names and OGB's
FORMAT = 1  # of what is cached; another number makes all of it anew


@dataclass(frozen=True)
class Layout:
    """What is where in a data set's folder, and how its graph is made of the rows of raw/edge.csv.gz: "both" directions of each
    row (OGB's add_inverse_edge), "simple" (undirected, each edge once) or "directed" (the rows as they are)."""

    task: str
    metric: str
    split: str
    graph: str = "both"
    classes: int = 0
    self_loops: bool = False  # one at each node as an edge of the graph, unless the caller says otherwise
    edge_attr: str | None = None
    node_features: str | None = "node-feat"
    binary: bool = False  # npz files

    def files(self) -> list[str]:
        """Names of the files, without the node features, in the data set's folder."""
        if self.binary:
            raw = ["data.npz", "node-label.npz"]
        else:
            raw = ["edge.csv.gz", "num-node-list.csv.gz", "num-edge-list.csv.gz"]
            raw += ["node-label.csv.gz"] if self.task != "link" else []
            raw += [f"{self.edge_attr}.csv.gz"] if self.edge_attr else []
        ending = "pt" if self.task == "link" else "csv.gz"
        return [f"raw/{name}" for name in raw] + [f"split/{self.split}/{part}.{ending}" for _, part in PARTS]


OGB = {
    "ogbn-arxiv": Layout("node", "accuracy", "time", graph="simple", classes=40, self_loops=True),
    "ogbn-proteins": Layout("multilabel", "rocauc", "species", edge_attr="edge-feat", node_features="node_species"),
    "ogbn-products": Layout("node", "accuracy", "sales_ranking", classes=47),
    "ogbn-papers100M": Layout("node", "accuracy", "time", graph="directed", classes=172, binary=True),
    "ogbl-collab": Layout("link", "hits@50", "time", edge_attr="edge_weight"),
    "ogbl-ddi": Layout("link", "hits@20", "target", node_features=None),
}


def load_ogb(
    name: str,
    root: str | Path | None,
    *,
    features: str = "given",
    add_self_loops: bool | None = None,
    seed: int = 0,
    download: bool = False,
    cache: str | Path | None = None,
) -> Dataset:
    """The data set `name`, one of OGB, from its folder (ogbn_arxiv for ogbn-arxiv, with raw/ and split/), which is `root` or lies
    in it or in `root`/ogb. Edges come in CSR order, sorted by (destination, source).

    ogbn-arxiv       undirected, each edge once, with a self-loop at each node unless `add_self_loops` is False
    ogbn-proteins    both directions of each edge; edge_attr [E, 8]; x [N, 16]: the sum of the features of a node's edges, and
                     its species one-hot; y [N, 112]
    ogbn-products    both directions of each edge
    ogbn-papers100M  directed; y -1 where a node has no label; takes as much memory as its features, 57 GB
    ogbl-collab      both directions of the training edges, one of each year they stand for; edge_attr [E, 1]: papers written
    ogbl-ddi         both directions of the training edges; no features, x None; train are the rows of raw/edge.csv.gz where
                     train.pt is absent

    `features` "fastrp" puts an embedding of the graph (`acefast.data.fastrp`, from `seed`) in the place of the features, whose
    file may then be absent, "learned" None, for a network that learns an embedding. With `download` a data set that is absent is
    fetched by the package ogb into `root`; otherwise the network is not used. What is made of the files is kept, under a hash of
    them, in the subfolder acefast of their folder, or in `cache`; a folder without write permission is left alone.

    Raises InputError, in one sentence, for data that is missing, damaged or inconsistent.
    """
    layout = OGB[name]
    check_features(features)
    if add_self_loops and not layout.self_loops:
        raise InputError(f"{name}: self-loops are added to ogbn-arxiv alone, leave add_self_loops out")
    loops = layout.self_loops if add_self_loops is None else add_self_loops
    folder = _folder(name, root, download)
    store, key = _store(folder, cache), _identity(name, folder, layout.files())

    kind = "graph-with-self-loops" if loops else "graph"
    data = cached(store, kind, key, lambda: _read(name, folder, layout, loops))
    graph = edges.to_graph(data)
    if features == "fastrp":
        x = cached(store, f"fastrp-{seed}", key, lambda: {"x": fastrp(graph, seed).numpy()})["x"]
    elif features == "learned" or layout.node_features is None:
        x, features = None, features if features == "learned" else "none"
    else:
        path = _feature_file(name, folder, layout)
        feature_key = _identity(key, folder, [f"raw/{path.name}"])
        x = cached(store, "node-feat", feature_key, lambda: _node_features(path, layout, data, graph.num_dst))["x"]
        features = "given" if layout.task != "multilabel" else "sums of edge features, species"
    multilabel = layout.task == "multilabel"
    return Dataset(
        name=name,
        graph=graph,
        x=x,
        num_classes=data["y"].shape[1] if multilabel else layout.classes,
        task=layout.task,
        metric=layout.metric,
        features=features,
        **{field: data.get(field) for field in ("y", "train", "val", "test", "edge_attr", "val_neg", "test_neg")},
    )


def read_edges(name: str, folder: Path) -> tuple[np.ndarray, int]:
    """(rows int32 [R, 2], nodes) of the raw edges of the data set `name` in its folder, checked."""
    raw = folder / "raw"
    if OGB[name].binary:
        rows = read_npz(raw / "data.npz", "edge_index", np.int32).T
        num_nodes, file = int(read_npz(raw / "data.npz", "num_nodes_list", np.int64)[0]), raw / "data.npz"
    else:
        num_nodes, num_edges = (
            int(read_csv(raw / f"num-{of}-list.csv.gz", 1, np.int64)[0, 0]) for of in ("node", "edge")
        )
        file = raw / "edge.csv.gz"
        for of, count in (("node", num_nodes), ("edge", num_edges)):
            if not 0 < count < 2**31:
                raise InputError(
                    f"{raw / f'num-{of}-list.csv.gz'} says {count}, expected a number of {of}s below 2^31, fetch it anew"
                )
        rows = read_csv(file, num_edges, np.int32)
    if rows.ndim != 2 or rows.shape[1] != 2:
        raise InputError(f"{file} must hold pairs of nodes, got {list(rows.shape)}")
    if rows.size and not 0 <= rows.min() <= rows.max() < num_nodes:
        raise InputError(f"{file} names nodes {rows.min()} to {rows.max()}, expected 0 to {num_nodes - 1}")
    return rows, num_nodes


def _read(name: str, folder: Path, layout: Layout, loops: bool) -> dict[str, np.ndarray]:
    """All but the node features: the arrays of `acefast.data.edges` and the fields of Dataset."""
    rows, n = read_edges(name, folder)
    src, dst = np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1])
    data = _split(folder / "split" / layout.split, rows) if layout.task == "link" else _labels(folder, layout, n)
    num_rows = len(rows)
    del rows
    if layout.graph == "simple":
        return data | edges.undirected_simple(src, dst, n, add_self_loops=loops)
    if layout.graph == "directed":
        arrays = edges.directed(src, dst, n)
    else:
        low, high, number = edges.sorted_pairs(src, dst, n)
        del src, dst
        arrays = edges.undirected(low, high, n, number=number if layout.edge_attr else None, double_loops=True)
    raw = arrays.pop("raw", None)
    if layout.edge_attr:
        edge_attr = read_csv(folder / "raw" / f"{layout.edge_attr}.csv.gz", num_rows, np.float32)
        data["edge_attr"] = edges.of_raw(edge_attr, raw)
    return data | arrays


def _labels(folder: Path, layout: Layout, n: int) -> dict[str, np.ndarray]:
    multilabel = layout.task == "multilabel"
    if layout.binary:
        path = folder / "raw" / "node-label.npz"
        y = read_npz(path, "node_label", np.float32)
        if y.size != n or (y != np.floor(y))[~np.isnan(y)].any():
            raise InputError(f"{path} must hold one whole number or NaN for each of the {n} nodes, and does not")
        y = np.where(np.isnan(y), -1, y).astype(np.int64).reshape(n, 1)
    else:
        y = read_csv(folder / "raw" / "node-label.csv.gz", n, np.float32 if multilabel else np.int64)
    data = {"y": y if multilabel else y[:, 0].copy()}
    for field, part in PARTS:
        data[field] = read_csv(folder / "split" / layout.split / f"{part}.csv.gz", None, np.int64)[:, 0]
    return data


def _split(folder: Path, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Edges and negatives of a link task: int64 [n, 2]."""
    data = {}
    for field, part in PARTS:
        path = folder / f"{part}.pt"
        if field == "train" and not path.exists():
            data[field] = rows.astype(np.int64)
            continue
        arrays = read_pt(path)
        for key, suffix in (("edge", ""), ("edge_neg", "_neg"))[: 1 if field == "train" else 2]:
            if key not in arrays or arrays[key].ndim != 2 or arrays[key].dtype.kind == "f":
                raise InputError(f"{path} must hold pairs of nodes as {key}, and does not")
            data[field + suffix] = arrays[key].astype(np.int64)
    return data


def _feature_file(name: str, folder: Path, layout: Layout) -> Path:
    names = ["data.npz"] if layout.binary else [f"{layout.node_features}.csv.gz"]
    # OGB's archive of ogbn-proteins calls it species.csv.gz, and its reader renames it.
    names += ["species.csv.gz"] if layout.task == "multilabel" else []
    path = next((folder / "raw" / file for file in names if (folder / "raw" / file).is_file()), None)
    if path is None:
        missing = folder / "raw" / names[0]
        raise InputError(
            f"{name}: {missing} is missing, fetch it or take an embedding of the graph (--features fastrp)"
        )
    return path


def _node_features(path: Path, layout: Layout, data: dict, n: int) -> dict[str, np.ndarray]:
    if layout.binary:
        return {"x": read_npz(path, "node_feat", np.float32)}
    if layout.task != "multilabel":
        return {"x": read_csv(path, n, np.float32)}
    species = np.unique(read_csv(path, n, np.int64)[:, 0], return_inverse=True)[1]
    return {"x": edge_sums_and_groups(data["edge_attr"], data["rowptr"], torch.from_numpy(species)).numpy()}


def edge_sums_and_groups(edge_attr: torch.Tensor, rowptr: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """[N, D + groups] float32: the sum of the features of the edges into each node, and its group (int64 [N]) one-hot."""
    sums = torch.segment_reduce(edge_attr, "sum", offsets=rowptr, axis=0)
    return torch.cat((sums, torch.nn.functional.one_hot(group).float()), 1)


def _folder(name: str, root: str | Path | None, download: bool) -> Path:
    """The folder of the data set, found or, with `download`, made."""
    folder, marker = name.replace("-", "_"), "data.npz" if OGB[name].binary else "edge.csv.gz"
    if root is None:
        raise InputError(f"dataset {name} is read from disk, name the folder that holds {folder} (--data-root DIR)")
    root = Path(root)
    sought = [root / folder, root / "ogb" / folder, *([root] if root.name == folder else [])]
    for place in sought:
        if (place / "raw" / marker).is_file():
            return place
    if download:
        return _download(name, root / folder)
    raise InputError(
        f"{name} is not on disk, no raw/{marker} in {' or '.join(map(str, sought))}: name another folder (--data-root DIR) or let "
        "the package ogb fetch it (--download)"
    )


def _download(name: str, folder: Path) -> Path:
    """`folder`, filled with what the address in ogb's table of data sets holds; whole or not at all."""
    package = importlib.util.find_spec("ogb")
    if package is None:
        raise InputError(
            f"{name} is not on disk and cannot be fetched without the package ogb, install it (pip install ogb)"
        )
    kind = "linkproppred" if OGB[name].task == "link" else "nodeproppred"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            with open(Path(package.submodule_search_locations[0]) / kind / "master.csv", newline="") as file:
                table = {row[""]: row[name] for row in csv.DictReader(file)}
            url = importlib.import_module("ogb.utils.url")
            url.extract_zip(url.download_url(table["url"], temporary, log=False), temporary, log=False)
            os.replace(Path(temporary) / table["download_name"], folder)
    except Exception as error:
        # ogb turns whatever goes wrong, an interruption too, into exceptions of any kind.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name} could not be fetched into {folder} ({reason}), check the network and the space on the disk"
        ) from None
    return folder


def _store(folder: Path, cache: str | Path | None) -> Path | None:
    """Where to keep what is made of the files: None where `folder` is read-only, which then is respected even as root."""
    if cache is not None:
        return Path(cache) / folder.name
    if not folder.stat().st_mode & 0o222 or not os.access(folder, os.W_OK):
        warnings.warn(
            f"{folder} is read-only, so its graph will be made anew at each start: name a folder for it (cache)",
            stacklevel=4,
        )
        return None
    return folder / "acefast"


def _identity(name: str, folder: Path, files: list[str]) -> str:
    """SHA-256 of the files' names, sizes and last 64 KiB, in which gzip and zip have the checksums of all they hold."""
    digest = hashlib.sha256(f"{FORMAT} {name}".encode())
    for file in files:
        try:
            with open(folder / file, "rb") as content:
                size = content.seek(0, os.SEEK_END)
                content.seek(max(0, size - 2**16))
                digest.update(f"\n{file} {size} ".encode() + content.read())
        except FileNotFoundError:
            digest.update(f"\n{file} absent".encode())
        except OSError as error:
            raise InputError(f"{folder / file} cannot be read: {error.strerror or type(error).__name__}") from None
    return digest.hexdigest()

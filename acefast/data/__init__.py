"""Datasets by name, each as one checked `Dataset` record."""

from dataclasses import replace
from pathlib import Path

from acefast.data.dataset import Dataset, check_features
from acefast.data.download import download_planetoid
from acefast.data.fastrp import fastrp
from acefast.data.links import split_links
from acefast.data.npz import load_npz
from acefast.data.ogb import OGB, load_ogb
from acefast.data.planetoid import PUBLISHED, load_planetoid
from acefast.data.sizes import Sizes
from acefast.data.synthetic import synthetic_citation
from acefast.data.twin import PREFIX, TWINS, load_twin, twin_of
from acefast.errors import InputError

__all__ = [
    "DATASETS",
    "Dataset",
    "Sizes",
    "check_name",
    "download_planetoid",
    "fastrp",
    "load_dataset",
    "load_npz",
    "load_ogb",
    "load_planetoid",
    "load_twin",
    "split_links",
    "synthetic_citation",
    "twin_of",
]

DATASETS = (*PUBLISHED, *OGB, "synthetic-cora", *(PREFIX + name for name in TWINS))


def check_name(name: str) -> None:
    """Raises InputError for a name that `load_dataset` does not know; the data of one it knows may still be missing."""
    if name not in DATASETS and not name.startswith(PREFIX) and not name.endswith(".npz"):
        raise InputError(f"dataset {name!r} is not known, expected one of {', '.join(DATASETS)}, or a file NAME.npz")


def load_dataset(
    name: str,
    root: str | Path | None = None,
    *,
    keep_self_loops: bool = False,
    add_self_loops: bool | None = None,
    features: str = "given",
    seed: int = 0,
    download: bool = False,
    cache: str | Path | None = None,
) -> Dataset:
    """The dataset called `name`, one of DATASETS, a twin also scaled, as in twin:ogbn-proteins:0.1 (`load_twin`), or that of
    the file `name`.npz (`load_npz`).

    `root` is the folder of the raw files, which all but generated graphs need and a file's name is taken from.
    `keep_self_loops` keeps the self-loops that the files of cora, citeseer and pubmed have; `add_self_loops`, `download` and
    `cache` are those of `load_ogb`. `features` "fastrp" puts an embedding of the graph (`fastrp`) in the place of the features,
    "learned" nothing (None), for a network that learns an embedding of the nodes.
    `seed` is that of a generated graph and of the embedding. Raises InputError, in one sentence, for a name that is not known
    and for data that is missing or damaged.
    """
    check_name(name)
    if name in OGB:
        return load_ogb(
            name, root, features=features, add_self_loops=add_self_loops, seed=seed, download=download, cache=cache
        )
    if add_self_loops and not name.startswith(PREFIX):
        raise InputError(f"{name}: self-loops are added to ogbn-arxiv and its twin alone, leave add_self_loops out")
    check_features(features)
    if name in PUBLISHED:
        data = load_planetoid(name, root, keep_self_loops)
    elif name.endswith(".npz"):
        data = load_npz(Path(root or "", name))
    elif name.startswith(PREFIX):
        data = load_twin(name, seed, add_self_loops=add_self_loops)
    else:
        data = synthetic_citation(seed=seed, name=name)
    made = {"given": lambda: data.x, "fastrp": lambda: fastrp(data.graph, seed), "learned": lambda: None}[features]
    return data if features == "given" else replace(data, x=made(), features=features)

"""Datasets by name, each as one checked `Dataset` record."""

from pathlib import Path

from acefast.data.dataset import Dataset
from acefast.data.download import download_planetoid
from acefast.data.npz import load_npz
from acefast.data.planetoid import PUBLISHED, load_planetoid
from acefast.data.synthetic import synthetic_citation
from acefast.errors import InputError

__all__ = [
    "DATASETS",
    "Dataset",
    "check_name",
    "download_planetoid",
    "load_dataset",
    "load_npz",
    "load_planetoid",
    "synthetic_citation",
]

DATASETS = (*PUBLISHED, "synthetic-cora")


def check_name(name: str) -> None:
    """Raises InputError for a name that `load_dataset` does not know; the data of one it knows may still be missing."""
    if name not in DATASETS and not name.endswith(".npz"):
        raise InputError(f"dataset {name!r} is not known, expected one of {', '.join(DATASETS)}, or a file NAME.npz")


def load_dataset(name: str, root: str | Path | None = None, *, keep_self_loops: bool = False, seed: int = 0) -> Dataset:
    """The dataset called `name`, one of DATASETS, or that of the file `name`.npz (see `load_npz`).

    `root` is the folder of the raw files, which cora, citeseer and pubmed need and a file's name is taken from;
    `keep_self_loops` keeps the self-loops that the published files have; `seed` is that of a generated graph. Raises
    InputError, in one sentence, for a name that is not known and for data that is missing or damaged.
    """
    check_name(name)
    if name.endswith(".npz"):
        return load_npz(Path(root or "", name))
    if name in PUBLISHED:
        return load_planetoid(name, root, keep_self_loops)
    return synthetic_citation(seed=seed, name=name)

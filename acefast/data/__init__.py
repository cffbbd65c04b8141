"""Datasets by name, each as one checked `Dataset` record."""

from pathlib import Path

from acefast.data.dataset import Dataset
from acefast.data.planetoid import PUBLISHED, load_planetoid
from acefast.data.synthetic import synthetic_citation
from acefast.errors import InputError

__all__ = ["DATASETS", "Dataset", "is_known", "load_dataset", "load_planetoid", "synthetic_citation"]

DATASETS = (*PUBLISHED, "synthetic-cora")


def is_known(name: str) -> bool:
    """Whether `load_dataset` knows the name; its data may still be missing."""
    return name in DATASETS


def load_dataset(name: str, root: str | Path | None = None, *, keep_self_loops: bool = False, seed: int = 0) -> Dataset:
    """The dataset called `name`, one of DATASETS.

    `root` is the folder of the raw files, which cora, citeseer and pubmed need; `keep_self_loops` keeps the self-loops
    that those files have; `seed` is that of a generated graph. Raises InputError, in one sentence, for a name that is
    not known and for data that is missing or damaged.
    """
    if name in PUBLISHED:
        return load_planetoid(name, root, keep_self_loops)
    if name == "synthetic-cora":
        return synthetic_citation(seed=seed, name=name)
    raise InputError(f"dataset {name!r} is not known, expected one of {', '.join(DATASETS)}")

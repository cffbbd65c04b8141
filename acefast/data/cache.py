"""Arrays stored next to the data they were made from, and mapped into memory when they are needed again."""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def cached(folder: Path | None, name: str, key: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """The arrays of make(), kept in `folder`/`name` under `key`: a later call with that key maps them into memory (copy on
    write: the files never change) and does not call `make`. A reader sees all of an entry or nothing.

    An entry is taken only if its key, names, dtypes, shapes and the CRC-32 of every array are those it was stored with; any
    other is made anew and replaced. Where `folder` is None nothing is kept; where it cannot be written nothing is kept
    either, and a warning says so.
    """
    if folder is None:
        return _tensors(make())
    entry = folder / name
    arrays = _read(entry, key)
    if arrays is None:
        made = make()
        try:
            arrays = _store(entry, key, made)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            warnings.warn(
                f"{folder} cannot be written ({reason}), so {name} will be made anew at each start", stacklevel=2
            )
            arrays = made
    return _tensors(arrays)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _description(array: np.ndarray) -> list:
    return [array.dtype.str, list(array.shape), zlib.crc32(np.ascontiguousarray(array))]


def _map(entry: Path, name: str) -> np.ndarray:
    return np.load(entry / f"{name}.npy", mmap_mode="c", allow_pickle=False)


def _read(entry: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of an entry that is whole and has that key, else None."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        if meta["key"] != key:
            return None
        arrays = {name: _map(entry, name) for name in meta["arrays"]}
        whole = all(_description(array) == meta["arrays"][name] for name, array in arrays.items())
    except Exception:  # Whatever a missing, damaged or foreign file provokes: it is made anew.
        return None
    return arrays if whole else None


def _store(entry: Path, key: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Writes the entry beside its place, moves it there, and maps it. Raises OSError where that fails."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    new, old = (entry.with_name(f".{entry.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    try:
        new.mkdir()
        for name, array in arrays.items():
            np.save(new / f"{name}.npy", array)
        meta = {"key": key, "arrays": {name: _description(array) for name, array in arrays.items()}}
        (new / "meta.json").write_text(json.dumps(meta))
        if entry.exists():
            os.replace(entry, old)
        os.replace(new, entry)
    finally:
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)
    return {name: _map(entry, name) for name in arrays}

"""Your own graph from one .npz file, read without running anything that it names."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from acefast.csr import CSR
from acefast.data.dataset import Dataset
from acefast.errors import InputError

KEYS = ("edge_index", "y", "train", "val", "test")
CSR_KEYS = ("x_rowptr", "x_col", "x_value", "x_shape")
KINDS = {torch.int64: ("iu", "integers"), torch.float32: ("iufb", "numbers"), torch.bool: ("b", "truth values")}


def load_npz(path: str | Path) -> Dataset:
    """The dataset in a file of `numpy.savez` or `savez_compressed`, called after the file, with these arrays:

        edge_index         [2, E] integers   row 0 source, row 1 destination; both directions of an undirected edge
        x                  [N, F] numbers    features, or in parts, as of a scipy.sparse.csr_matrix:
        x_rowptr, x_col, x_value, x_shape    its indptr [N+1], indices, data and shape (N, F)
        y                  [N]    integers   classes 0, 1, ...
        train, val, test   node numbers, or bool [N]

    Other arrays are not read. Raises InputError, in one sentence, for a file that is missing, damaged or holds
    something else.
    """
    path = Path(path)
    arrays = _read(path)
    missing = [key for key in KEYS if key not in arrays]
    if "x" not in arrays:
        missing += [key if key != CSR_KEYS[0] else f"x or {key}" for key in CSR_KEYS if key not in arrays]
    if missing:
        raise InputError(f"{path} has no array {missing[0]}, expected {', '.join(KEYS)} and x or {', '.join(CSR_KEYS)}")

    try:
        return _dataset(arrays, path.stem)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _dataset(arrays: dict[str, np.ndarray], name: str) -> Dataset:
    def tensor(key: str, dtype: torch.dtype) -> Tensor:
        array, (kinds, words) = arrays[key], KINDS[dtype]
        if array.dtype.kind not in kinds:
            raise InputError(f"{key} must hold {words}, got {array.dtype} {list(array.shape)}")
        with np.errstate(over="ignore"):  # what becomes infinite is refused with all features that are not finite
            return torch.from_numpy(array.astype(str(dtype).removeprefix("torch.")))

    if "x" in arrays:
        x = tensor("x", torch.float32)
    else:
        shape = tensor("x_shape", torch.int64).tolist()
        if np.shape(shape) != (2,) or not all(0 < size < 2**31 for size in shape):
            raise InputError(f"x_shape must be the two sizes (N, F), got {shape}")
        dtypes = zip(CSR_KEYS, (torch.int64, torch.int64, torch.float32))
        x = CSR(*(tensor(key, dtype) for key, dtype in dtypes), tuple(shape))
    split = (tensor(key, torch.bool if arrays[key].dtype.kind == "b" else torch.int64) for key in ("train", "val", "test"))
    return Dataset.from_arrays(tensor("edge_index", torch.int64), x, tensor("y", torch.int64), *split, name=name)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file that a dataset is made of."""
    if not path.is_file():
        raise InputError(f"there is no file {path}, expected one that numpy.savez wrote (--data-root names its folder)")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is no .npz file, expected one that numpy.savez wrote")
    try:
        with np.load(path, allow_pickle=False) as found:
            return {key: found[key] for key in (*KEYS, "x", *CSR_KEYS) if key in found}
    except (OSError, ValueError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read: {reason}") from None

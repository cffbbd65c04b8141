"""The files that OGB's data sets are made of, read in pieces and without running anything: csv.gz, npz, pt."""

import gzip
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from acefast.errors import InputError

PIECE = 2**24  # bytes in memory at once
_TO_SPACES = bytes.maketrans(b",\n\r", b"   ")
_NOT_SEPARATORS = bytes(set(range(256)) - set(b",\n"))


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def read_csv(path: Path, rows: int | None, dtype) -> np.ndarray:
    """The numbers of a csv.gz without a header, as `dtype` [rows, columns]; the first row says how many columns there are, and
    None stands for as many rows as there are.

    Raises InputError, in one sentence, for a file that is missing, damaged or empty, has another number of rows or a row of
    another length, or a cell that is no number of that dtype.
    """
    blocks, values, done = [], None, 0
    for block in _blocks(path, np.dtype(dtype)):
        if rows is None:
            blocks.append(block)
        else:
            values = np.empty((rows, block.shape[1]), dtype=dtype) if values is None else values
            if done + len(block) > rows:
                raise InputError(f"{path} has more than the expected {rows} rows, fetch it anew")
            values[done : done + len(block)] = block
        done += len(block)
    if not done or rows not in (None, done):
        raise InputError(f"{path} has {done} rows, expected {'some' if rows is None else rows}, fetch it anew")
    return np.concatenate(blocks) if rows is None else values


def _blocks(path: Path, dtype: np.dtype):
    """The rows, some at a time, as `dtype` [some, columns]."""
    done, columns, rest = 0, None, b""
    for piece in _pieces(path):
        cut = piece.rfind(b"\n") + 1
        if not cut:
            rest += piece
            continue
        text, rest = rest + piece[:cut], piece[cut:]
        if columns is None:
            columns = text[: text.index(b"\n")].count(b",") + 1
        block = _parsed(path, text, columns, done, dtype)
        done += len(block)
        yield block


def _pieces(path: Path):
    """The text of a gzip file, ending in a newline."""
    piece = b""
    try:
        with gzip.open(path, "rb") as file:
            while more := file.read(PIECE):
                piece = more
                yield piece
    except EOFError:
        raise InputError(f"{path} is cut short, fetch it anew") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}), fetch it anew") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_why(error)}") from None
    if piece and not piece.endswith(b"\n"):
        yield b"\n"


def _parsed(path: Path, text: bytes, columns: int, done: int, dtype: np.dtype) -> np.ndarray:
    """Whole rows of text as `dtype` [rows, columns]; `done` rows came before them."""
    separators = text.translate(None, _NOT_SEPARATORS)
    rows = text.count(b"\n")
    if separators != (b"," * (columns - 1) + b"\n") * rows:
        raise InputError(
            f"{path} must have {columns} numbers in each row, and has not in rows {done + 1} to {done + rows}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # what numpy before 2.3 gives in place of a ValueError
            numbers = np.fromstring(
                text.translate(_TO_SPACES), dtype=np.int64 if dtype.kind == "i" else np.float64, sep=" "
            )
    except (ValueError, DeprecationWarning):
        numbers = np.empty(0)
    if numbers.size != rows * columns:
        kind = "integers" if dtype.kind == "i" else "numbers"
        raise InputError(f"{path} must hold {kind}, and has something else in rows {done + 1} to {done + rows}")
    _check_range(path, numbers, dtype)
    return numbers.reshape(rows, columns).astype(dtype)


def _check_range(path: Path, numbers: np.ndarray, dtype: np.dtype) -> None:
    if dtype.kind == "i" and numbers.size:
        low, high = int(numbers.min()), int(numbers.max())
        if not np.iinfo(dtype).min <= low <= high <= np.iinfo(dtype).max:
            raise InputError(f"{path} has numbers in [{low}, {high}], which do not fit {dtype}, fetch it anew")


def read_npz(path: Path, name: str, dtype) -> np.ndarray:
    """The array `name` of an npz file, converted to `dtype` piece by piece: what the file holds is never there as a whole.

    Raises InputError, in one sentence, for a file that is missing, damaged or lacks `name`, and for an array of objects.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, stored = header(file)
            if stored.kind not in "iuf":
                raise InputError(f"{path} must hold numbers as {name}, got {stored}")
            values = np.empty(int(np.prod(shape, dtype=np.int64)), dtype=dtype)
            step = PIECE // stored.itemsize
            for start in range(0, values.size, step):
                part = values[start : start + step]
                numbers = np.frombuffer(file.read(part.size * stored.itemsize), dtype=stored)
                _check_range(path, numbers, part.dtype)
                part[...] = numbers
            file.read(1)  # past the end, where the checksum is compared
            return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)
    except KeyError:
        raise InputError(f"{path} has no array {name}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_why(error)}") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged or no npz of numbers, fetch it anew") from None


def _numpy_types() -> list:
    """What a pickled numpy array of numbers names, under numpy 2's and numpy 1's names."""
    reconstruct = np.zeros(0).__reduce__()[0]
    numbers = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.float16, np.float32, np.float64)
    return [
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        *(type(np.dtype(number)) for number in numbers),
    ]


def read_pt(path: Path) -> dict[str, np.ndarray]:
    """The arrays of numbers in a dictionary that torch.save wrote (tensors or numpy arrays, by name); other entries, as
    lists of names, are left out. torch's restricted reader takes them, with no more than numpy's arrays and numbers allowed.

    Raises InputError, in one sentence, for a file that is missing or damaged, or names anything else.
    """
    try:
        with torch.serialization.safe_globals(_numpy_types()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the reader finds unusual, it refuses or reads
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_why(error)}") from None
    except Exception:
        # Whatever a damaged or foreign file provokes in the reader is the file's fault.
        what = "damaged, of a pickle protocol above 2, or naming more than arrays of numbers"
        raise InputError(f"{path} is nothing that torch reads without running code ({what}), fetch it anew") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a dictionary of arrays, got {type(content).__name__}")
    arrays = {}
    for name, value in content.items():
        value = value.numpy() if isinstance(value, torch.Tensor) else value
        if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
            arrays[name] = value
    return arrays

"""Files written whole or not at all, and folders held by one process at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from acefast.errors import InputError


def write_atomic(path: str | os.PathLike, data: bytes | str, sync: bool = True) -> None:
    """Write `data` to `path` by :func:`replacing`. Text is UTF-8."""
    with replacing(path, sync) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, sync: bool = True) -> Iterator[Path]:
    """The path of a file to write, which then takes the place of `path`, so that a reader, or a machine that stops, sees the
    old file or the new one and no part of either: a temporary file beside it, synced, then renamed over it. The folder must
    exist. Without `sync` the promise holds for readers and for a process that is killed, not for a machine that stops.

    Raises InputError where the path cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # of a file that this process makes; a library that writes it may choose another
            yield temporary
            temporary.chmod(mode)
            if sync:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that can be written"
        ) from None


@contextlib.contextmanager
def exclusive(folder: Path, inside: str, kind: str, work: str) -> Iterator[None]:
    """Hold `folder` for this process, by a lock on its file .lock that ends with the process; it and its subfolder
    `inside` are made where they are missing.

    Raises InputError where another process holds it or it cannot be made; `kind` ("run folder") and `work` ("running
    the search") are for that sentence.
    """
    try:
        (folder / inside).mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")
    except OSError as error:
        raise InputError(f"cannot use {folder} as a {kind}: {error.strerror}; choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process is {work} in {folder}; wait for it or choose another --out") from None
        yield

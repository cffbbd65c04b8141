"""Files written whole or not at all."""

import os
from pathlib import Path

from acefast.errors import InputError


def write_atomic(path: str | os.PathLike, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader, or a machine that stops, sees the old file or the new one and no part of
    either: a temporary file beside it, synced, then renamed over it. The folder must exist. Text is UTF-8.

    Raises InputError where the path cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that can be written"
        ) from None

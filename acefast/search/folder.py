"""A run as a folder: written atomically, by one process at a time, and refused where it belongs to another search.

``checkpoint.safetensors`` is the one record that counts: tensors, and everything else as JSON in its metadata. The
others (checkpoint.json, history.jsonl, timings.jsonl) are rewritten from it after each stage and at the next start, so what
is killed between two writes leaves nothing that the next one does not mend, and they need not be synced.
``training.safetensors``, of the same form, holds what the stage that runs has trained so far (``acefast.search.trainings``); it
goes with that stage.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import tomli_w
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from acefast.errors import InputError
from acefast.files import exclusive, replacing, write_atomic
from acefast.pruning import Ticket
from acefast.search.config import SearchConfig, tomllib
from acefast.search.state import State

CHECKPOINT, TRAINING = "checkpoint.safetensors", "training.safetensors"
RECORD, CHECKSUM = "acefast.checkpoint", "crc32"


class Memory:
    """The same for a run that is kept in memory alone."""

    path = None

    def __init__(self):
        self.tickets: dict[int, Ticket] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def open(self, config: SearchConfig) -> None:
        pass

    def load(self, device) -> State | None:
        return None

    def commit(self, state: State) -> None:
        pass

    def training(self) -> State | None:
        return None

    def keep_training(self, state: State) -> None:
        pass

    def drop_training(self) -> None:
        pass

    def save_ticket(self, number: int, ticket: Ticket) -> None:
        self.tickets[number] = ticket

    def ticket(self, number: int) -> Ticket:
        return self.tickets[number]


class Folder:
    """A run folder at ``path``; made where it is missing."""

    def __init__(self, path):
        self.path = Path(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; raises InputError where another one holds it or it cannot be made."""
        with exclusive(self.path, "tickets", "run folder", "running the search"):
            yield

    def rounds_done(self) -> int:
        """Finished rounds by checkpoint.json, the dense baseline among them, without reading the checkpoint itself; 0
        where the file is missing or damaged, which the search mends."""
        try:
            return int(json.loads((self.path / "checkpoint.json").read_text())["round"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def history(self) -> list[dict]:
        """The events of history.jsonl; none where it is missing or damaged, which the search mends."""
        try:
            return [json.loads(line) for line in (self.path / "history.jsonl").read_text().splitlines()]
        except (OSError, ValueError):
            return []

    def open(self, config: SearchConfig) -> None:
        """Write config.toml, or check that the folder's own is of the same search; clear away unfinished files."""
        path = self.path / "config.toml"
        if path.exists():
            stored = load_config(path)
            different = config.differences(stored)
            if different:
                mine, theirs = config.to_dict(), stored.to_dict()
                listed = ", ".join(f"{key} = {theirs[key]!r} (now {mine[key]!r})" for key in different)
                raise InputError(f"{self.path} holds a search with {listed}: give the same settings or another --out")
        else:
            foreign = [p.name for p in self.path.iterdir() if p.name != "tickets" and not p.name.startswith(".")]
            foreign += [p.name for p in (self.path / "tickets").iterdir()]
            if foreign:
                raise InputError(
                    f"{self.path} holds files of no search ({foreign[0]}): choose an empty folder as --out"
                )
            write_atomic(path, tomli_w.dumps({**config.to_dict(), "hash": config.hash()}))
        for leftover in [*self.path.glob(".*.tmp"), *(self.path / "tickets").glob(".*.tmp")]:
            leftover.unlink()

    def load(self, device) -> State | None:
        """The state after the last finished stage, None before the first one; raises InputError for a damaged file."""
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            state = read_state(path, device)
        except InputError as error:
            raise InputError(f"{error}: delete it to begin this run anew") from None
        self._write_lines(state)
        return state

    def commit(self, state: State) -> None:
        """Make ``state`` the one that a rerun goes on from."""
        write_state(self.path / CHECKPOINT, state)
        self.drop_training()
        self._write_lines(state)

    def training(self) -> State | None:
        """What ``keep_training`` has written last, None where there is nothing; raises InputError for a damaged file."""
        path = self.path / TRAINING
        return read_state(path) if os.path.lexists(path) else None

    def keep_training(self, state: State) -> None:
        """Keep what the stage that runs has trained so far, until the next ``commit``."""
        write_state(self.path / TRAINING, state)

    def drop_training(self) -> None:
        """Forget it."""
        try:
            (self.path / TRAINING).unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"cannot remove {self.path / TRAINING}: {error.strerror}; remove it by hand") from None

    def _write_lines(self, state: State) -> None:
        summary = {"round": state.round, "stage": state.stage, "values": state.values}
        write_atomic(self.path / "checkpoint.json", json.dumps(summary, indent=1) + "\n", sync=False)
        write_atomic(self.path / "history.jsonl", to_lines(state.history), sync=False)
        write_atomic(self.path / "timings.jsonl", to_lines(state.timings), sync=False)

    def ticket_path(self, number: int) -> Path:
        return self.path / "tickets" / f"round-{number:02d}.safetensors"

    def save_ticket(self, number: int, ticket: Ticket) -> None:
        ticket.save(self.ticket_path(number))

    def ticket(self, number: int) -> Ticket:
        return Ticket.load(self.ticket_path(number))


def to_lines(events: list[dict]) -> str:
    """One JSON object a line; floats by their shortest exact form."""
    return "".join(json.dumps(event, allow_nan=False) + "\n" for event in events)


def load_config(path: str | os.PathLike) -> SearchConfig:
    """The configuration of a run's ``config.toml``; raises InputError where it is missing or was changed by hand."""
    try:
        values = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot read {path} as the configuration of a run: {error}") from None
    stored = values.pop("hash", None)
    config = SearchConfig.from_dict(values)
    if stored != config.hash():
        raise InputError(f"{path} was changed after the run began: its hash is {stored!r}, expected {config.hash()!r}")
    return config


def write_state(path: Path, state: State) -> None:
    """Write a state from where its tensors are, whole or not at all, with a checksum of all of it."""
    tensors, record = state.to_flat()
    text = json.dumps(record)
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, {RECORD: text, CHECKSUM: _checksum(text, tensors)})
        except SafetensorError as error:
            raise InputError(f"cannot write {path}: {error}; choose a folder that can be written") from None


def read_state(path: Path, device="cpu") -> State:
    """The inverse of ``write_state``; raises InputError where the file is no whole state. Files from before there was a
    checksum are read without."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        text = metadata[RECORD]
        record = json.loads(text)
        tensors = {name: tensors[name] for name in record["order"]}
        checksum = _checksum(text, tensors)
        if metadata.get(CHECKSUM, checksum) != checksum:
            raise ValueError("its content does not match its checksum")
        return State.from_flat(tensors, record, device)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise InputError(f"{path} is not a whole checkpoint ({error})") from None


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    """CRC-32 of the record and of the tensors in its order."""
    value = zlib.crc32(text.encode())
    for tensor in tensors.values():
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"

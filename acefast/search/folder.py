"""A run as a folder: written atomically, by one process at a time, and refused where it belongs to another search.

``checkpoint.safetensors`` is the one record that counts: tensors, and everything else as JSON in its metadata. The
others (checkpoint.json, history.jsonl, timings.jsonl) are rewritten from it after each stage and at the next start, so what
is killed between two writes leaves nothing that the next one does not mend, and they need not be synced.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import tomli_w
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from acefast.errors import InputError
from acefast.files import exclusive, write_atomic
from acefast.pruning import Ticket
from acefast.search.config import SearchConfig, tomllib
from acefast.search.state import State

CHECKPOINT = "checkpoint.safetensors"
RECORD = "acefast.checkpoint"


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
        record, tensors = read_checkpoint(path)
        state = State.from_flat(tensors, record, device)
        self._write_lines(state)
        return state

    def commit(self, state: State) -> None:
        """Make ``state`` the one that a rerun goes on from."""
        tensors, record = state.to_flat()
        write_atomic(self.path / CHECKPOINT, save(tensors, {RECORD: json.dumps(record)}))
        self._write_lines(state)

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


def read_checkpoint(path: Path) -> tuple[dict, dict]:
    """(record, tensors) of a checkpoint; raises InputError where it is not a whole one."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})[RECORD])
            return record, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, ValueError, OSError, RuntimeError) as error:
        raise InputError(f"{path} is not a whole checkpoint ({error}): delete it to begin this run anew") from None

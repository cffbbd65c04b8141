"""The record of a finished (or resumable) search."""

import json
from dataclasses import dataclass
from pathlib import Path

from acefast.errors import InputError
from acefast.pruning import Ticket
from acefast.search.config import SearchConfig
from acefast.search.folder import Folder, Memory, load_config


@dataclass(frozen=True, eq=False)
class Run:
    """Settings, history (events as in history.jsonl), timings, and the tickets by round."""

    config: SearchConfig
    history: list[dict]
    timings: list[dict]
    store: Folder | Memory

    @property
    def path(self) -> Path | None:
        """The run's folder, None for a run in memory."""
        return self.store.path

    @property
    def rounds(self) -> list[dict]:
        """One event per round, 0 is the dense baseline: kept and total counts, val, test, exchanged."""
        return [event for event in self.history if event["event"] == "round"]

    @property
    def complete(self) -> bool:
        """Whether all rounds are done that the settings ask for; not where a time limit came first."""
        from acefast.search.rounds import last_round  # which itself makes runs

        return len(self.rounds) > last_round(self.config, self.history)

    def ticket(self, number: int) -> Ticket:
        """The ticket of round ``number``, from 1."""
        last = len(self.rounds) - 1
        if not 1 <= number <= last:
            raise InputError(f"this run has tickets of rounds 1 to {last}, got {number}")
        return self.store.ticket(number)

    @property
    def tickets(self) -> list[Ticket]:
        """The tickets of rounds 1, 2, ..."""
        return [self.store.ticket(number) for number in range(1, len(self.rounds))]

    def ticket_paths(self, every: int = 1) -> dict[int, Path]:
        """{round: file} of the tickets of every so many rounds and of the last, of a run in a folder."""
        last = len(self.rounds) - 1
        chosen = [number for number in range(1, last + 1) if number % every == 0 or number == last]
        return {number: self.store.ticket_path(number) for number in chosen}

    @classmethod
    def load(cls, path) -> "Run":
        """Read a run folder; raises InputError where it holds none."""
        folder = Folder(path)
        lines = {}
        for name in ("history", "timings"):
            file = folder.path / f"{name}.jsonl"
            try:
                lines[name] = [json.loads(line) for line in file.read_text().splitlines()]
            except (OSError, ValueError) as error:
                raise InputError(f"cannot read {file} of a run: {error}") from None
        return cls(load_config(folder.path / "config.toml"), store=folder, **lines)

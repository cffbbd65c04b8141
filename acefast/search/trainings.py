"""What the stage that runs has trained so far, kept so that a stage that is stopped goes on within.

training.safetensors holds the fits of the stage's finished trainings and, of the running one, what its next epoch goes on
from. It is written at most once a minute, or every so many epochs where that is asked for, and whenever the search stops
between two epochs; where epochs run ahead of the host (``acefast.train.train``), after those that do. A rerun of the stage
takes from it what is there and ends with the same bits. It counts for the stage that it was written in alone, after the
same committed stages and in the same environment, and goes when the stage is committed.

A training with ``until``, which tells its epochs to something outside of it that is not kept, is begun anew.
"""

import math
import time
import warnings

import torch

from acefast.errors import InputError
from acefast.pruning import SoftMasks
from acefast.search.folder import TRAINING, Folder, Memory
from acefast.search.state import State
from acefast.train import Fit, Training

SECONDS = 60.0  # of a stage between two writes, at least
SHARE = 0.05  # of a stage's time that writing may take, unless asked for by epochs
FACTS = ("best_epoch", "val", "val_loss", "test", "seed")  # a fit's numbers


class OutOfTime(Exception):
    """The time limit of a run is over, and its folder holds all that was trained."""


class Trainings:
    """The trainings of a stage, in order: those finished, and the running one.

    ``store`` keeps them. ``every``: epochs of the stage between two writes, None for the clock. ``end``: when the run stops, by
    ``time.monotonic``. ``epochs`` counts those of the stage, before an interruption too. A training's ``key`` is a JSON
    value that says what it is.
    """

    def __init__(self, store: Folder | Memory | None = None, every: int | None = None, end: float = math.inf):
        self.store, self.every, self.end = store or Memory(), every, end
        self.stage: dict | None = None  # none is open: trainings beside a search, of which nothing is kept
        self.close()

    def close(self) -> None:
        """Forget the stage, which is committed."""
        self.finished: list[tuple[dict, Fit]] = []
        self.running: tuple[dict, Training] | None = None
        self.found: State | None = None
        self.epochs, self.began = 0, time.perf_counter()
        self._wait(0.0)

    def open(self, stage: dict) -> None:
        """Begin the stage that ``stage`` describes (``run``, ``round``, ``stage`` and more) with what the store holds of it.
        Raises OutOfTime where there is no time for it."""
        if time.monotonic() >= self.end:
            raise OutOfTime
        self.close()
        self.stage = stage
        try:
            found = self.store.training()
        except InputError as error:
            self._leave(error)
            return
        if found is None:
            return
        there = found.values.get("of")
        if there == stage:
            self.found = found
            self.epochs, self.began = found.values["epochs"], self.began - found.values["seconds"]
        elif _before(there, stage):  # of a stage that was committed, and then the run was killed
            self.store.drop_training()
        else:
            self._leave(f"{TRAINING} in {self.store.path} is of another stage or run")

    def _leave(self, why) -> None:
        warnings.warn(f"{why}: it is removed, and what it held is trained anew", stacklevel=2)
        self.found = None
        self.store.drop_training()

    def cost(self) -> dict:
        """Seconds and epochs of the stage so far."""
        return {"seconds": time.perf_counter() - self.began, "epochs": self.epochs}

    def take(self, key: dict, device) -> Fit | None:
        """The fit of the stage's next training where it was finished before an interruption."""
        number = len(self.finished)
        if self.found is None or number >= len(self.found.values["finished"]):
            return None
        facts = self.found.values["finished"][number]
        if facts["key"] != key:
            self._leave(f"{TRAINING} in {self.store.path} holds other trainings than this stage has")
            return None
        masks = self.found.get(f"{number}/masks", SoftMasks)
        weights = _under(f"{number}/weights/", self.found)
        fit = Fit(
            masks=None if masks is None else masks.map(lambda m: m.to(device)),
            weights={name: w.to(device) for name, w in weights.items()}, **{name: facts[name] for name in FACTS},
        )  # fmt: skip
        self.finished.append((key, fit))
        return fit

    def begin(self, key: dict, training: Training) -> None:
        """A training of the stage begins, or goes on from where it was interrupted."""
        self.running = key, training
        found, self.found = self.found, None
        facts = None if found is None else found.values["running"]
        if facts is not None and facts["key"] == key:
            try:
                training.restore(facts, _under("running/", found))
            except InputError as error:
                self._leave(f"{TRAINING} in {self.store.path}: {error}")

    def pause(self, before: int) -> None:
        """Between two epochs, ``before`` of the stage having been done at the last pause: write where it is time to. Raises
        OutOfTime where the time is over."""
        if time.monotonic() >= self.due or (self.every is not None and self.epochs // self.every > before // self.every):
            began = time.monotonic()
            self.save()
            if began >= self.end:
                raise OutOfTime
            self._wait(time.monotonic() - began)

    def _wait(self, cost: float) -> None:
        """Until it is time to write again, the last time having cost so many seconds."""
        self.due = self.end if self.every else min(self.end, time.monotonic() + max(SECONDS, cost / SHARE))

    def end_training(self, key: dict, fit: Fit | None) -> None:
        """The running training is over; with a fit where it was finished and is worth keeping."""
        self.running = None
        if fit is not None:
            self.finished.append((key, fit))

    def save(self) -> None:
        """Write what there is of the open stage, between two epochs; nothing while all of it is there from before."""
        if self.stage is None:
            return
        facts, tensors = None, {}
        if self.running is not None and self.running[1].epochs:
            key, training = self.running
            facts = {"key": key, **training.facts()}
            tensors = {f"running/{name}": tensor for name, tensor in training.tensors().items()}
        if self.found is not None or (facts is None and not self.finished):
            return
        finished = []
        for number, (key, fit) in enumerate(self.finished):
            finished.append({"key": key, **{name: getattr(fit, name) for name in FACTS}})
            tensors |= {} if fit.masks is None else fit.masks.flat(f"{number}/masks")
            tensors |= {f"{number}/weights/{name}": w for name, w in fit.weights.items()}
        values = {"of": self.stage, **self.cost(), "finished": finished, "running": facts}
        self.store.keep_training(State(tensors=tensors, values=values))


def _under(prefix: str, state: State) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: t for name, t in state.tensors.items() if name.startswith(prefix)}


def _before(there, stage: dict) -> bool:
    """Whether ``there`` is an earlier stage of the same run."""
    place = lambda each: (each["round"], each["stage"])  # noqa: E731
    return isinstance(there, dict) and there.get("run") == stage["run"] and place(there) < place(stage)

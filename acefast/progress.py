"""What a running search shows: bars on a terminal, one plain line a round elsewhere."""

import time
from collections import defaultdict

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

QUIET_SECONDS = 30.0  # without a terminal, a stage is announced when nothing was printed for so long
LONG_SECONDS = 300.0  # and within a training the epoch


class SearchProgress:
    """The `progress` of `run_search`: called with its events, used as a context so that the bars go away.

    The time left is the mean time of each stage so far, in this process, times the stages to come; until each stage has
    been seen once, the mean time of an epoch times the epochs that the search has left at most, where they are known.
    """

    def __init__(self, name: str, console: Console):
        self.name, self.console = name, console
        self.rounds = self.done = 0
        self.stages: list[str] = []
        self.epochs_left: int | None = None
        self.epochs = 0  # in this process
        self.waiting: list[str] = []
        self.took: dict[str, list[float]] = defaultdict(list)
        self.began = self.spoke = time.monotonic()
        self.stage_began, self.in_stage = self.began, False
        self.finished: dict | None = None
        self.was_complete = False
        self.bars: Progress | None = None

    def __enter__(self):
        if self.console.is_terminal:
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                transient=True,
            )
            self.overall = self.bars.add_task(self.name, total=None, text="")
            self.training = self.bars.add_task("", total=None, text="", visible=False)
            self.bars.start()
        return self

    def __exit__(self, *error):
        if self.bars is not None:
            self.bars.stop()

    def __call__(self, event: dict) -> None:
        handler = getattr(self, f"on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def on_run(self, event):
        self.rounds, self.stages, self.done = event["rounds"], list(event["stages"]), event["done"]
        self.epochs_left = event["epochs"]
        self.was_complete = self.done > self.rounds
        if 0 < self.done <= self.rounds:
            self.say(f"{self.name}: going on with round {self.done} of {self.rounds}")

    def on_rounds(self, event):
        self.rounds = event["rounds"]

    def on_stage(self, event):
        self.stage_began, self.in_stage = time.monotonic(), True
        round_, stage = event["round"], event["stage"]
        here = self.stages[self.stages.index(stage) :] if stage in self.stages else [stage]
        self.waiting = here + self.stages * (self.rounds - round_)
        if self.bars is None and self.stage_began - self.spoke > QUIET_SECONDS:
            self.say(f"{self.name}: {self.where(event)}; {self.times()}")
        self.draw(round_, stage)

    def on_stage_end(self, event):
        self.took[event["stage"]].append(time.monotonic() - self.stage_began)
        self.waiting, self.in_stage = self.waiting[1:], False
        if self.bars is not None:
            self.bars.update(self.training, visible=False)
        if self.finished is not None:
            self.say(f"{self.name}: {describe(self.finished, self.rounds)}; {self.times()}")
            self.finished = None

    def on_training(self, event):
        done, self.val = event["done"], ""
        self.count(done)
        if 0 < done < event["epochs"]:
            self.say(f"{self.name}: going on after epoch {done} of {event['epochs']}, {self.where(event)}")
        if self.bars is not None:
            self.bars.reset(self.training, total=event["epochs"], completed=done, visible=True, text="")
            self.bars.update(self.training, description=f"  {event['model']}")

    def on_epoch(self, event):
        self.epochs += 1
        self.count(1)
        if self.bars is not None:
            if event["val"] is not None:
                self.val = f", val {100 * event['val']:.1f} %"
            self.bars.update(
                self.training, completed=event["epoch"], text=f"epoch {event['epoch']}/{event['epochs']}{self.val}"
            )  # fmt: skip
            self.bars.update(self.overall, text=self.times())
        elif time.monotonic() - self.spoke > LONG_SECONDS:
            self.say(f"{self.name}: epoch {event['epoch']} of {event['epochs']}, {self.where(event)}; {self.times()}")

    def count(self, epochs: int) -> None:
        """So many epochs of the search are trained."""
        if self.epochs_left is not None:
            self.epochs_left -= epochs

    def where(self, event) -> str:
        return f"round {event['round']} of {self.rounds}, {event['stage']}" if event["round"] else "dense baseline"

    def on_round(self, event):
        self.finished = event

    def draw(self, round_: int, stage: str) -> None:
        if self.bars is not None:
            per_round = max(1, len(self.stages))
            total = 1 + self.rounds * per_round
            what = f"{self.name}: round {round_}/{self.rounds}, {stage}" if round_ else f"{self.name}: dense baseline"
            self.bars.update(
                self.overall, description=what, total=total, completed=total - len(self.waiting), text=self.times()
            )

    def times(self) -> str:
        """Elapsed, and the estimate of what is left."""
        elapsed = f"{clock(time.monotonic() - self.began)} elapsed"
        if any(stage not in self.took for stage in self.waiting):
            if not self.epochs or (self.epochs_left or 0) <= 0:
                return elapsed
            seconds = (time.monotonic() - self.began) / self.epochs
            return f"{elapsed}, about {clock(self.epochs_left * seconds)} left"
        if not self.waiting:
            return elapsed
        means = [sum(self.took[stage]) / len(self.took[stage]) for stage in self.waiting]
        here = min(means[0], time.monotonic() - self.stage_began) if self.in_stage else 0.0
        return f"{elapsed}, about {clock(sum(means) - here)} left"

    def say(self, line: str) -> None:
        self.spoke = time.monotonic()
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)
        self.console.file.flush()


def describe(event: dict, rounds: int) -> str:
    """A round's line of the history in words."""
    removed = (
        f"{100 - 100 * event[f'{axis}_kept'] / event[f'{axis}_total']:.2f} % of {axis} removed, "
        for axis in ("edges", "weights")
        if event["round"] and event[f"{axis}_total"]
    )
    what = f"round {event['round']} of {rounds}: " if event["round"] else "dense baseline: "
    metric = f" ({event['metric']})" if "metric" in event else ""
    return f"{what}{''.join(removed)}val {100 * event['val']:.2f} %, test {100 * event['test']:.2f} %{metric}"


def clock(seconds: float) -> str:
    """02:03, or 1:02:03 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"

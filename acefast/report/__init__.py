"""Tables and plots from run folders and packs."""

from pathlib import Path

from rich.console import Console

from acefast.errors import InputError
from acefast.files import write_atomic
from acefast.report import table
from acefast.report.pack import pack, read_runs
from acefast.report.runs import Group, Rung, RunRecord, common_folder, group_runs, read_run
from acefast.report.winning import Verdict, judge

REPORT, PLOT = "report.md", "accuracy.png"

__all__ = [
    "Group",
    "RunRecord",
    "Rung",
    "Verdict",
    "group_runs",
    "judge",
    "pack",
    "read_groups",
    "read_run",
    "read_runs",
    "rows",
    "show",
    "write",
]

rows = table.rows


def read_groups(sources) -> list[Group]:
    """Every run of `sources` (run folders, folders that hold some, packs), checked and grouped over seeds.

    Raises InputError.
    """
    return group_runs(read_runs(sources))


def show(groups: list[Group], console: Console | None = None) -> None:
    """Print the tables and what they say."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=200, color_system=None)
    console.print(table.as_terminal(groups), soft_wrap=False)


def write(groups: list[Group], out=None) -> tuple[Path, Path]:
    """Write report.md and accuracy.png into `out` and return their paths.

    Without `out`: into the run's folder for one run, else into the folder that holds the runs or packs, or the current one
    where they share none. Raises InputError where the folder cannot be written.
    """
    from acefast.report.plot import accuracy_plot  # Imported where it is needed: matplotlib takes a second.

    out = Path(out) if out is not None else common_folder([run for group in groups for run in group.runs])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out}: {error.strerror}; choose another --out") from None
    write_atomic(out / PLOT, accuracy_plot(groups))
    write_atomic(out / REPORT, table.as_markdown(groups, PLOT))
    return out / REPORT, out / PLOT

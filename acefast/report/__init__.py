"""Tables and plots from run folders."""

from pathlib import Path

from rich.console import Console

from acefast.errors import InputError
from acefast.files import write_atomic
from acefast.report import table
from acefast.report.runs import Group, Rung, RunRecord, common_folder, find_runs, group_runs, read_run
from acefast.report.winning import Verdict, judge

REPORT, PLOT = "report.md", "accuracy.png"

__all__ = [
    "Group",
    "RunRecord",
    "Rung",
    "Verdict",
    "find_runs",
    "group_runs",
    "judge",
    "read_run",
    "read_groups",
    "rows",
    "show",
    "write",
]

rows = table.rows


def read_groups(folders) -> list[Group]:
    """Every run in or below `folders`, read, checked and grouped over seeds. Raises InputError."""
    return group_runs([read_run(path) for path in find_runs(folders)])


def show(groups: list[Group], console: Console | None = None) -> None:
    """Print the tables and what they say."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=200, color_system=None)
    console.print(table.as_terminal(groups), soft_wrap=False)


def write(groups: list[Group], out=None) -> tuple[Path, Path]:
    """Write report.md and accuracy.png into `out` and return their paths.

    Without `out`: into the run's folder for one run, else into the folder that holds the runs, or the current one where
    they share none. Raises InputError where the folder cannot be written.
    """
    from acefast.report.plot import accuracy_plot  # Imported where it is needed: matplotlib takes a second.

    paths = [run.path for group in groups for run in group.runs]
    out = Path(out) if out is not None else paths[0] if len(paths) == 1 else common_folder(paths)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out}: {error.strerror}; choose another --out") from None
    write_atomic(out / PLOT, accuracy_plot(groups))
    write_atomic(out / REPORT, table.as_markdown(groups, PLOT))
    return out / REPORT, out / PLOT

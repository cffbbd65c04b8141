"""The numbers of runs as rows and as tables."""

import io
from statistics import fmean, stdev

from rich import box
from rich.console import Console
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from acefast.report.runs import COUNTS, NAMES, Group
from acefast.report.winning import SEEDS_TO_CLAIM, judge


def rows(groups: list[Group]) -> list[dict]:
    """One JSON row per run and round.

    run, dataset, backbone, method, preset, axes, seed, round (0 = dense), edges_kept, edges_total, weights_kept,
    weights_total, val, test (fractions), winning_loose, winning_strict (the claim over all seeds of the group: null for
    a single run, false below 10 seeds), exchanged, seconds; beyond these label, seeds (in the group), noninferior (the
    strict rule whatever the number of seeds) and bound (its lower bound).
    """
    result = []
    for group in groups:
        verdict = judge(group)
        for run in group.runs:
            for k, rung in enumerate(run.rungs):
                result.append(
                    {"run": str(run.path), **{name: run.config[name] for name in NAMES}, "seed": run.seed, "round": k}
                    | {name: getattr(rung, name) for name in (*COUNTS, "val", "test")}
                    | {"winning_loose": verdict.loose[k], "winning_strict": verdict.claimed[k]}
                    | {"exchanged": rung.exchanged, "seconds": rung.seconds, "label": group.label}
                    | {"seeds": len(group.runs), "noninferior": verdict.noninferior[k], "bound": verdict.bound[k]}
                )
    return result


def ladder(group: Group) -> Table:
    """One row per rung: sparsity of each axis, accuracies in percent (mean ± std over seeds), wins or not, seconds."""
    verdict = judge(group)
    ace = group.exchanged is not None
    table = Table(
        "rung", "edges removed %", "weights removed %", "val %", "test %", "wins", *["exchanged"] * ace, "seconds"
    )
    for column in table.columns:
        column.justify = "right"
    partial = max(len(run.rungs) for run in group.runs) > group.common
    if partial:
        table.add_column("seeds", justify="right")
    for k in range(len(verdict.loose)):
        here = group.at(k)
        cells = [
            "dense" if k == 0 else str(k),
            f"{100 * fmean(r.edge_sparsity for r in here):.2f}",
            f"{100 * fmean(r.weight_sparsity for r in here):.2f}",
            percent([r.val for r in here]),
            percent([r.test for r in here]),
            "" if k == 0 else "strict" if verdict.claimed[k] else "loose" if verdict.loose[k] else "no",
        ]
        if ace:
            counts = [r.exchanged for r in here if r.exchanged is not None]
            cells.append(f"{fmean(counts):.0f}" if counts else "")
        seconds = [r.seconds for r in here if r.seconds is not None]
        cells.append(f"{fmean(seconds):.1f}" if seconds else "")
        table.add_row(*cells, *[str(len(here))] * partial, style="bold" if k and cells[5] != "no" else "")
    return table


def comparison(groups: list[Group]) -> Table:
    """One row per group: dense accuracy, best accuracy, the sparsest winning rung in both forms, seconds in all.
    Of dataset, backbone and axes only what differs has a column."""
    differing = [name for name in ("dataset", "backbone", "axes") if len({g.config[name] for g in groups}) > 1]
    table = Table(*differing, "method", "seeds", "rungs", "dense test %", "best test %")
    for name in ("wins to (loose)", "edges %", "weights %", "test %", "wins to (strict)", "exchanged", "seconds"):
        table.add_column(name)
    for column in table.columns[len(differing) + 1 :]:
        column.justify = "right"
    for group in groups:
        verdict = judge(group)
        rungs, k = len(verdict.loose) - 1, verdict.loosest
        won = group.at(k)
        best = max(range(group.common), key=lambda k: fmean(r.test for r in group.at(k)))
        seconds = [r.seconds for run in group.runs for r in run.rungs if r.seconds is not None]
        cells = [*(group.config[name] for name in differing), group.label, str(len(group.runs)), str(rungs)]
        cells.append(percent([r.test for r in group.at(0)]))
        if rungs:
            cells += [
                f"{percent([r.test for r in group.at(best)])} ({f'rung {best}' if best else 'dense'})",
                f"rung {k}" if k else "none",
                f"{100 * fmean(r.edge_sparsity for r in won):.2f}" if k else "",
                f"{100 * fmean(r.weight_sparsity for r in won):.2f}" if k else "",
                percent([r.test for r in won]) if k else "",
                "not claimed"
                if verdict.strictest is None
                else f"rung {verdict.strictest}"
                if verdict.strictest
                else "none",
            ]
        else:
            cells += [""] * 6
        cells += ["" if group.exchanged is None else str(group.exchanged), f"{sum(seconds):.1f}" if seconds else ""]
        table.add_row(*cells)
    return table


def findings(group: Group) -> list[str]:
    """What the table of `group` says, in sentences."""
    verdict, n = judge(group), len(group.runs)
    planned = group.config.get("rounds", 0)
    short = [run for run in group.runs if isinstance(planned, int) and len(run.rungs) <= planned]
    unfinished = [f"Unfinished: {len(run.rungs) - 1} of {planned} rounds in {run.path}." for run in short]
    if len(verdict.loose) == 1:
        return unfinished
    mean = "mean test" if n > 1 else "test"
    found = [
        f"Loose form (sparsest rung whose {mean} is not below dense): {removed(group, verdict.loosest)}."
        + (" With one seed it may be chance." if n == 1 and verdict.loosest else "")
    ]
    if n == 1:
        found.append(f"Strict form: not judged on a single run; it is claimed with {SEEDS_TO_CLAIM} seeds or more.")
    elif n < SEEDS_TO_CLAIM:
        upto = max((k for k, ok in enumerate(verdict.noninferior) if ok), default=0)
        found.append(
            f"Strict form: not claimed with {n} seeds ({SEEDS_TO_CLAIM} are needed); its rule holds up to "
            f"{'no rung' if upto == 0 else f'rung {upto}'} here."
        )
    else:
        found.append(
            f"Strict form (every rung up to it non-inferior on validation, lower 95 % bound above -0.5 points, {n} "
            f"seeds): {removed(group, verdict.strictest or 0)}."
        )
    if group.config["method"] == "ace" and not group.exchanged:
        found.append("This ACE run exchanged nothing: its tickets are those of pruning alone.")
    return unfinished + found


def removed(group: Group, k: int) -> str:
    """Rung k in words: what it removes and the test accuracy it keeps."""
    if k == 0:
        return "none"
    here = group.at(k)
    axes = {"edges": ("edge",), "weights": ("weight",)}.get(group.config["axes"], ("edge", "weight"))
    parts = (f"{100 * fmean(getattr(r, f'{axis}_sparsity') for r in here):.2f} % of {axis}s" for axis in axes)
    return f"rung {k}, {' and '.join(parts)} removed, test {percent([r.test for r in here])} %"


def percent(values: list[float]) -> str:
    """Mean, with ± the sample standard deviation where there are several, of fractions in percent."""
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.2f}{spread}"


def heading(group: Group) -> str:
    config, n = group.config, len(group.runs)
    seeds = f"seed {group.runs[0].seed}" if n == 1 else f"{n} seeds"
    rungs = max(len(run.rungs) for run in group.runs) - 1
    size = group.at(0)[0]
    sizes = f"{size.edges_total:,} edges, {size.weights_total:,} weights"
    kind = f"{config['preset']}, {config['axes']} axes, {rungs} rounds" if rungs else config["preset"]
    return f"{config['dataset']}, {config['backbone']}, {group.label} ({kind}, {seeds}; {sizes})"


def as_terminal(groups: list[Group]):
    """Everything as one rich renderable."""
    parts = []
    for group in groups:
        table = ladder(group)
        table.box = box.SIMPLE_HEAD
        parts += [Text(heading(group), style="bold"), table, *(Text(line) for line in findings(group)), Text()]
    if len(groups) > 1:
        table = comparison(groups)
        table.box = box.SIMPLE_HEAD
        parts += [Text("Side by side", style="bold"), table]
    return Lines(*parts)


def as_markdown(groups: list[Group], plot: str) -> str:
    """The report's text: tables, findings, the plot by its file name, and what the columns mean."""
    parts = ["# Accuracy and sparsity\n", f"![Accuracy over sparsity]({plot})\n"]
    if len(groups) > 1:
        parts += ["## Side by side\n", _markdown(comparison(groups))]
    for group in groups:
        parts += [f"## {heading(group)}\n", _markdown(ladder(group)), *(f"{line}\n" for line in findings(group))]
        parts += [f"Runs: {', '.join(f'`{run.path.resolve().name}`' for run in group.runs)}.\n"]
    parts.append(
        "Sparsity is removed / total. Accuracies are at the best validation epoch, mean ± sample standard deviation "
        "over seeds. Wins: *strict* where every rung up to it is non-inferior to dense on validation (lower 95 % bound "
        f"of the paired difference above -0.5 points, {SEEDS_TO_CLAIM} seeds or more), *loose* where the mean test "
        "accuracy is not below dense. Seconds are those of the rounds as run, all stages.\n"
    )
    return "\n".join(parts)


def _markdown(table: Table) -> str:
    table.box = box.MARKDOWN
    out = io.StringIO()
    Console(file=out, width=400, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.strip() for line in out.getvalue().splitlines() if line.strip()) + "\n"

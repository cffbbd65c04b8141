"""The numbers of runs as rows and as tables."""

import io
from statistics import fmean, stdev

from rich import box
from rich.console import Console
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from acefast.report.paired import ALPHA, compare
from acefast.report.published import PUBLISHED
from acefast.report.runs import AXES, COUNTS, DETAILS, INFERENCE, NAMES, Group
from acefast.report.winning import SEEDS_TO_CLAIM, judge

STRUCTURE = ("homophily_kept", "homophily_removed", "degree_kept", "degree_removed")
ROUNDS = tuple(what for what in DETAILS if what not in STRUCTURE)
MOST_LADDERS = 6  # groups whose ladders are printed in a terminal; the file has them all
# How a detail of each axis is headed and written.
COLUMNS = {
    "exchanged": ("exchanged", "{:.0f}"),
    "fired": ("taken back", "{:.1f}"),
    "erased_rank": ("rank of erased", "{:.2f}"),
    "mined_rank": ("rank of mined", "{:.2f}"),
    "survival": ("survival", "{:.2f}"),
    "spread": ("score spread", "{:.1e}"),
    "agreement": ("agreement", "{:.2f}"),
    "homophily_kept": ("homophily of kept", "{:.3f}"),
    "homophily_removed": ("homophily of removed", "{:.3f}"),
    "degree_kept": ("degree of kept", "{:.1f}"),
    "degree_removed": ("degree of removed", "{:.1f}"),
}


def rows(groups: list[Group]) -> list[dict]:
    """One JSON row per run and round.

    run, dataset, backbone, method, preset, axes, seed, round (0 = dense), edges_kept, edges_total, weights_kept,
    weights_total, val, test (fractions), winning_loose, winning_strict (the claim over all seeds of the group: null for
    a single run, false below 10 seeds), exchanged, seconds; beyond these metric (of val and test), variant, label, seeds
    (in the group), noninferior (the strict rule whatever the number of seeds), bound (its lower bound), epochs, macs,
    the details of each axis that the method tells, such as edges_mined_rank, and inference_dense, inference_regrouped,
    inference_compact (seconds) and inference_threads where they were measured. dataset is NAME links where task is link, and names
    features that are not given.
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
                    | {"metric": run.metric}
                    | {"variant": run.config.get("variant", ""), "seeds": len(group.runs)}
                    | {"noninferior": verdict.noninferior[k], "bound": verdict.bound[k]}
                    | {"epochs": rung.epochs, "macs": rung.macs, **rung.details}
                    | {name: getattr(rung, name) for name in INFERENCE if getattr(rung, name) is not None}
                )
    return result


def ladder(group: Group) -> Table:
    """One row per rung: sparsity of each axis, accuracies in percent (mean ± std over seeds), wins or not, seconds, and how
    many times fewer multiply-accumulates an inference takes than the dense one."""
    verdict = judge(group)
    ace = group.exchanged is not None
    counted = any(rung.macs for rung in group.at(0))
    table = Table("rung", "edges removed %", "weights removed %", "val %", "test %", "wins", *["exchanged"] * ace, "seconds")
    if counted:
        table.add_column("MACs")
    for column in table.columns:
        column.justify = "right"
    partial = max(len(run.rungs) for run in group.runs) > group.common
    if partial:
        table.add_column("seeds", justify="right")
    for k in range(len(verdict.loose)):
        here = group.at(k)
        cells = [
            "dense" if k == 0 else str(k),
            *sparsities(group, k),
            percent([r.val for r in here]),
            percent([r.test for r in here]),
            "" if k == 0 else "strict" if verdict.claimed[k] else "loose" if verdict.loose[k] else "no",
        ]
        if ace:
            counts = [r.exchanged for r in here if r.exchanged is not None]
            cells.append(f"{fmean(counts):.0f}" if counts else "")
        seconds = [r.seconds for r in here if r.seconds is not None]
        cells.append(f"{fmean(seconds):.1f}" if seconds else "")
        if counted:
            cells.append(fewer_macs(group, k))
        table.add_row(*cells, *[str(len(here))] * partial, style="bold" if k and cells[5] != "no" else "")
    return table


def fewer_macs(group: Group, k: int) -> str:
    """Multiply-accumulates of the dense network over those of rung k, both as means over seeds; those of round 0 in
    millions."""
    counts = [[rung.macs for rung in group.at(i)] for i in (0, k)]
    if not all(count for both in counts for count in both):
        return ""
    dense, here = map(fmean, counts)
    return f"{dense / here:.1f}x" if k else f"{dense / 1e6:.1f} M"


def comparison(groups: list[Group]) -> Table:
    """One row per group: dense accuracy, best accuracy, the sparsest winning rung in both forms, epochs and seconds of a
    search (mean over seeds). Of dataset, backbone and axes only what differs has a column."""
    differing = [name for name in ("dataset", "backbone", "axes") if len({g.config[name] for g in groups}) > 1]
    table = Table(*differing, "method", "seeds", "rungs", "dense test %", "best test %")
    for name in ("wins to (loose)", "edges %", "weights %", "test %", "wins to (strict)", "exchanged", "epochs", "seconds"):
        table.add_column(name)
    for column in table.columns[len(differing) + 1 :]:
        column.justify = "right"
    for group in groups:
        verdict = judge(group)
        rungs, k = len(verdict.loose) - 1, verdict.loosest
        won = group.at(k)
        best = max(range(group.common), key=lambda k: fmean(r.test for r in group.at(k)))
        cells = [*(group.config[name] for name in differing), group.label, str(len(group.runs)), str(rungs)]
        cells.append(percent([r.test for r in group.at(0)]))
        if rungs:
            cells += [
                f"{percent([r.test for r in group.at(best)])} ({f'rung {best}' if best else 'dense'})",
                f"rung {k}" if k else "none",
                *(sparsities(group, k) if k else ("", "")),
                percent([r.test for r in won]) if k else "",
                "not claimed"
                if verdict.strictest is None
                else f"rung {verdict.strictest} ({' / '.join(sparsities(group, verdict.strictest))})"
                if verdict.strictest
                else "none",
            ]
        else:
            cells += [""] * 6
        cells += ["" if group.exchanged is None else str(group.exchanged)]
        cells += [cost(group, "epochs", "{:.0f}"), cost(group, "seconds", "{:.1f}")]
        table.add_row(*cells)
    return table


def cost(group: Group, what: str, form: str) -> str:
    """Epochs or seconds of a whole search, mean over the runs; empty where a round does not say them."""
    values = [getattr(rung, what) for run in group.runs for rung in run.rungs]
    return "" if None in values else form.format(sum(values) / len(group.runs))


def diagnosis(group: Group, which=ROUNDS, epochs: bool = True) -> Table | None:
    """What each round did, mean over seeds: a column for each detail of each axis that the method tells, among `which`, and
    the epochs; None where it tells nothing."""
    rungs = range(1, max(len(run.rungs) for run in group.runs))
    names = [f"{axis}_{what}" for what in which for axis in AXES]
    names = [name for name in names if any(name in r.details for k in rungs for r in group.at(k))]
    if not names:
        return None
    epochs = epochs and any(r.epochs is not None for k in rungs for r in group.at(k))
    table = Table("rung")
    for name in names:
        axis, what = name.split("_", 1)
        table.add_column(f"{axis}: {COLUMNS[what][0]}")
    if epochs:
        table.add_column("epochs")
    for column in table.columns:
        column.justify = "right"
    for k in rungs:
        cells = [str(k)]
        for name in names:
            values = [r.details[name] for r in group.at(k) if name in r.details]
            cells.append(COLUMNS[name.split("_", 1)[1]][1].format(fmean(values)) if values else "")
        values = [r.epochs for r in group.at(k) if r.epochs is not None]
        table.add_row(*cells, *[f"{fmean(values):.0f}" if values else ""] * epochs)
    return table


def structure(group: Group) -> Table | None:
    """What the kept and the removed edges of each rung are like, mean over seeds; None where the runs do not say it."""
    return diagnosis(group, STRUCTURE, epochs=False)


def inference(group: Group) -> Table | None:
    """What an inference of the dense and of the compacted network takes at the rungs where it was measured, means over seeds,
    and after how many of them the search has paid; None where nothing was measured."""
    table = Table("rung")
    times = ("dense ms", "regrouped ms", "compacted ms")
    for name in ("seeds", "threads", *times, "ratio", "of regrouped", "search s", "pays after"):
        table.add_column(name)
    for column in table.columns:
        column.justify = "right"
    for k in range(max(len(run.rungs) for run in group.runs)):
        runs = [run for run in group.runs if k < len(run.rungs) and run.rungs[k].inference_dense is not None]
        if not runs:
            continue
        here = [run.rungs[k] for run in runs]
        dense, same, compact = (fmean(getattr(rung, name) for rung in here) for name in INFERENCE[:3])
        spent = [rung.seconds for run in runs for rung in run.rungs[1 : k + 1]]
        cost = None if None in spent else sum(spent) / len(runs)
        pays = "" if cost is None else f"{cost / (same - compact):,.0f}" if same > compact else "never"
        threads = "/".join(sorted({str(rung.inference_threads) for rung in here}))
        table.add_row(
            str(k), str(len(runs)), threads, *(f"{1e3 * s:.3f}" for s in (dense, same, compact)),
            f"{dense / compact:.2f}x", f"{same / compact:.2f}x", "" if cost is None else f"{cost:.1f}", pays,
        )  # fmt: skip
    return table if table.rows else None


def published(groups: list[Group]) -> Table | None:
    """The loose form's sparsities and the highest mean accuracy over the rungs, each next to the paper's; None where
    nothing of it was published."""
    known = [g for g in groups if tuple(g.config[n] for n in ("dataset", "backbone", "method")) in PUBLISHED]
    known = [group for group in known if group.common > 1]
    if not known:
        return None
    table = Table("dataset", "backbone", "method", "axes")
    for name in ("seeds", "edges %", "published", "weights %", "published", "best test %", "published"):
        table.add_column(name, justify="right")
    for group in known:
        dataset, backbone, method, axes = (group.config[n] for n in ("dataset", "backbone", "method", "axes"))
        figures, k = PUBLISHED[dataset, backbone, method], judge(group).loosest
        best = max(range(1, group.common), key=lambda k: fmean(r.test for r in group.at(k)))
        cells = [dataset, backbone, group.label, axes, str(len(group.runs))]
        for axis, removed_share in zip(AXES, sparsities(group, k)):
            paper = getattr(figures, axis)
            if axes in (axis, "joint"):
                cells += [removed_share if k else "-", paper if axes == axis else f"({paper})"]
            else:
                cells += ["", ""]
        table.add_row(*cells, percent([r.test for r in group.at(best)]), figures.accuracy)
    return table


def paired(groups: list[Group]) -> Table | None:
    """The pre-declared comparison of methods, a row per cell and pair; None where no two have seeds in common."""
    comparisons = compare(groups)
    if not comparisons:
        return None
    table = Table("dataset", "backbone", "axes", "methods")
    for name in ("seeds", "rungs", "difference", "95 % interval", "d", "p", "p (Holm)", "verdict"):
        table.add_column(name, justify="right")
    for c in comparisons:
        low, high = c.interval
        table.add_row(
            *c.cell, f"{c.method} - {c.base}", str(len(c.areas)), str(c.rungs), f"{100 * c.mean:+.2f}",
            f"{100 * low:+.2f} to {100 * high:+.2f}", "" if c.d is None else f"{c.d:+.2f}",
            "" if c.p is None else f"{c.p:.4f}", "" if c.p_holm is None else f"{c.p_holm:.4f}", c.verdict,
        )  # fmt: skip
    return table


def sparsities(group: Group, k: int) -> tuple[str, str]:
    """Removed edges and weights at rung k in percent."""
    here = group.at(k)
    return tuple(f"{100 * fmean(getattr(r, f'{axis}_sparsity') for r in here):.2f}" for axis in ("edge", "weight"))


def findings(group: Group) -> list[str]:
    """What the table of `group` says, in sentences."""
    verdict, n = judge(group), len(group.runs)
    planned = group.config.get("rounds", 0)
    short = [run for run in group.runs if isinstance(planned, int) and len(run.rungs) <= planned]
    unfinished = [f"Unfinished: {len(run.rungs) - 1} of {planned} rounds in {run.name}." for run in short]
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
    metric = "" if group.runs[0].metric == "accuracy" else f"{group.runs[0].metric}; "
    return f"{config['dataset']}, {config['backbone']}, {group.label} ({metric}{kind}, {seeds}; {sizes})"


PAIRED = (
    "Difference: the area between the two test accuracy curves over the rungs (trapezoids, divided by the number of rungs), "
    "in points, paired by seed; its mean over seeds with Student's 95 % interval, and d, the mean over the standard "
    f"deviation. p: exact two-sided sign-flip test over the seeds, for cells with {SEEDS_TO_CLAIM} seeds or more; Holm's "
    "correction over those cells of the same two methods. A win needs a difference above 0 and a corrected p below "
    f"{ALPHA}; a tie is no win, and cells with fewer seeds are described, not claimed. That ACE beats UGS is claimed only "
    "where it beats the budget controls too.\n"
)
PAPER = (
    "Published: Wang et al., ECAI 2023 (arXiv 2308.02916). Sparsities are those of the sparsest rung that wins in the loose "
    "form; the published ones are of one axis alone, so those beside joint axes, in brackets, are no like for like. "
    "Accuracies are the highest over the rungs. * is the paper's own significance, - is none.\n"
)
LADDER = (
    "Sparsity is removed / total. Accuracies are at the best validation epoch, mean ± sample standard deviation over seeds. "
    "Wins: *strict* where every rung up to it is non-inferior to dense on validation (lower 95 % bound of the paired "
    f"difference above -0.5 points, {SEEDS_TO_CLAIM} seeds or more), *loose* where the mean test accuracy is not below dense. "
    "Epochs and seconds are those of the rounds as run, all stages, mean over seeds. MACs: exact multiply-accumulates of one "
    "inference of the dense network on the whole graph, and how many times fewer a rung takes. Counted are the products of "
    "kept weights with inputs (of sparse features their entries alone) and, for each kept edge and self-loop, one for each "
    "channel that it passes on (of the fewer ones before or after the transform); for gat also two for each node and channel, "
    "for gin the heads. Not counted: normalisation, softmax, biases, activations; channels that nothing reads are "
    "counted.\n"
)
DIAGNOSIS = (
    "What the rounds did, means over seeds. Exchanged: elements erased, and as many mined, in all ACE rounds; taken back: "
    "exchanges redrawn at half their rate; rank of the picks among their candidates, 0 the first, 0.5 random; survival: the "
    "share of the recently mined that the round's pruning left; score spread: standard deviation of the scores that pruning "
    "went by; agreement: the share of what was pruned on which two draws of the masks' first noise agree; homophily: the "
    "fraction of edges whose two ends have one label; degree: the mean degree of their ends in the whole graph.\n"
)


DEPLOYED = (
    "Inference: the logits of all nodes on the CPU, of the dense network as its module runs it, of the same regrouped for "
    "inference, and of the compacted one, in turns, each the fastest of its repeats (acefast time). Compacted: kept edges as a "
    "graph of their own, coefficients made once, columns that no kept weight reads left out; regrouped and compacted: hidden "
    "channels in groups that stay in the cache. Ratio: dense / compacted; of regrouped is what pruning itself brings. Pays "
    "after: the inferences whose time saved against the regrouped network is that of the search, rounds 1 up to this one.\n"
)


def as_terminal(groups: list[Group]):
    """Everything that fits a terminal as one rich renderable: side by side, compared, and the ladders of a few groups."""
    parts = []
    if len(groups) <= MOST_LADDERS:
        for group in groups:
            parts += [Text(heading(group), style="bold"), _boxed(ladder(group)), *map(Text, findings(group)), Text()]
    if len(groups) > 1:
        parts += [Text("Side by side", style="bold"), _boxed(comparison(groups))]
        if (table := paired(groups)) is not None:
            parts += [Text("Methods compared", style="bold"), _boxed(table)]
    return Lines(*parts)


def _boxed(table: Table) -> Table:
    table.box = box.SIMPLE_HEAD
    return table


def as_markdown(groups: list[Group], plot: str) -> str:
    """The report's text: the plot by its file name, all groups side by side, methods compared, the published figures, then
    each group's ladder, findings and details, and what the columns mean."""
    parts = ["# Accuracy and sparsity\n", f"![Accuracy over sparsity]({plot})\n"]
    if len(groups) > 1:
        parts += ["## Side by side\n", _markdown(comparison(groups))]
    if (table := paired(groups)) is not None:
        parts += ["## Methods compared\n", _markdown(table), PAIRED]
    if (table := published(groups)) is not None:
        parts += ["## Next to the published figures\n", _markdown(table), PAPER]
    for group in groups:
        parts += [f"## {heading(group)}\n", _markdown(ladder(group)), *(f"{line}\n" for line in findings(group))]
        parts += [_markdown(table) for table in (diagnosis(group), structure(group), inference(group)) if table is not None]
        parts.append(f"Runs: {', '.join(f'`{run.name}`' for run in group.runs)}.\n")
    parts += ["## What the columns mean\n", LADDER]
    if any(diagnosis(group) or structure(group) for group in groups):
        parts.append(DIAGNOSIS)
    if any(inference(group) for group in groups):
        parts.append(DEPLOYED)
    return "\n".join(parts)


def _markdown(table: Table) -> str:
    table.box = box.MARKDOWN
    out = io.StringIO()
    Console(file=out, width=1000, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.strip() for line in out.getvalue().splitlines() if line.strip()) + "\n"

"""`python -m bench study`: what moves accuracy, from the packs of the study's runs, as tables and pictures.

A pack (`acefast pack`) is a part of the study and its runs' variants are what it compares; all runs of a data set have the
same seeds and ladder. Validation alone is looked at.
"""

from pathlib import Path
from statistics import fmean

from acefast import report
from acefast.errors import InputError
from bench.plot import COLOURS


def add_arguments(parser) -> None:
    parser.add_argument("packs", type=Path, nargs="+", help="packs of the study's parts, in their order")
    parser.add_argument("--base", default="ugs base", help="variant that the others are held against (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of study.md and its pictures")


def main(options, arguments) -> int:
    parts = {path.stem: report.read_groups([path]) for path in options.packs}
    groups = {part: {(group.config["dataset"], name(group)): group for group in members} for part, members in parts.items()}
    everything = {key: group for members in groups.values() for key, group in members.items()}
    missing = {dataset for dataset, _ in everything} - {dataset for dataset, variant in everything if variant == options.base}
    if missing:
        raise InputError(f"no pack has runs of {options.base!r} on {min(missing)} to hold the others against: name another --base")
    text = [
        "# What moves accuracy: the study of the settings\n",
        "Validation accuracy, mean over the rungs (the area under the curve over the ladder, in percent), seeds that no other "
        f"result uses. Difference: to `{options.base}` on the same seeds, in points, mean and smallest to largest over the seeds. "
        "Agreement: share of what the first round prunes that a second draw of the masks' noise prunes as well, edges and "
        "weights; chance is what a round removes.\n",
    ]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    for part, members in groups.items():
        picture = options.out / f"{part}.png"
        draw(part, members, options.base, everything, picture)
        text += [f"## {part}\n", f"![{part}]({picture.name})\n", table(members, options.base, everything)]
    (options.out / "study.md").write_text("\n".join(text))
    print(f"wrote {options.out / 'study.md'} and {len(groups)} pictures")
    return 0


def name(group) -> str:
    return f"{group.config['method']} {group.config.get('variant', '')}".strip()


def area(run) -> float:
    """Mean validation accuracy over the rungs, in percent: trapezoids from dense to the last one."""
    values = [100 * rung.val for rung in run.rungs]
    return (sum(values) - (values[0] + values[-1]) / 2) / (len(values) - 1)


def differences(group, base) -> list[float]:
    theirs = {run.seed: run for run in base.runs}
    return [area(run) - area(theirs[run.seed]) for run in group.runs if run.seed in theirs]


def table(members: dict, base: str, everything: dict) -> str:
    lines = [
        "| data set | variant | seeds | validation | difference | last rung | agreement | homophily kept / removed | epochs a round |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (dataset, variant), group in members.items():
        found = differences(group, everything[dataset, base])
        moved = f"{fmean(found):+.2f} ({min(found):+.2f} to {max(found):+.2f})" if found else ""
        first, last = group.at(1), group.at(group.common - 1)
        lines.append(
            f"| {dataset} | {variant} | {len(group.runs)} | {fmean(area(run) for run in group.runs):.2f} | {moved} | "
            f"{fmean(100 * r.val for r in last):.2f} | {detail(first, 'edges_agreement')} / {detail(first, 'weights_agreement')} | "
            f"{detail(last, 'edges_homophily_kept')} / {detail(last, 'edges_homophily_removed')} | "
            f"{fmean(r.epochs for r in last):.0f} |"
        )
    return "\n".join(lines) + "\n"


def detail(rungs, key: str) -> str:
    values = [rung.details[key] for rung in rungs if key in rung.details]
    return f"{fmean(values):.2f}" if values else "-"


def draw(title: str, members: dict, base: str, everything: dict, path: Path) -> None:
    """A panel per data set: a line per variant, a dot per seed, a bar at the mean, the base as a vertical line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    datasets = sorted({dataset for dataset, _ in members})
    variants = list(dict.fromkeys(variant for _, variant in members))
    figure, panels = pyplot.subplots(
        1, len(datasets), figsize=(5.2 * len(datasets), 1.2 + 0.32 * len(variants)),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, dataset in zip(panels[0], datasets):
        for row, variant in enumerate(variants):
            if (dataset, variant) in members:
                values = [area(run) for run in members[dataset, variant].runs]
                panel.plot(values, [row] * len(values), "o", color=COLOURS[0], alpha=0.5, markersize=5)
                panel.plot([fmean(values)] * 2, [row - 0.3, row + 0.3], color=COLOURS[0], linewidth=2)
        panel.axvline(fmean(area(run) for run in everything[dataset, base].runs), color=COLOURS[1], linewidth=1, label=base)
        panel.set_title(dataset)
        panel.set_xlabel("validation accuracy, mean over the rungs, %")
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(variants)), variants)
    panels[0][0].invert_yaxis()
    panels[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

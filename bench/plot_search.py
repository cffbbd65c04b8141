"""Pictures of the results of `bench search`: epochs over the rungs, phases against the peer, and steps from label to label."""

from pathlib import Path

from bench.plot import COLOURS, bar

STAGES = ("dense", "imp", "ace", "candidate", "retrain", "other")
BELOW = dict(fontsize=8, frameon=False, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # where a legend goes


def draw(rows: list[dict], out: Path) -> list[Path]:
    """Up to three files per device, data set and method; rows are drawn in their order, which is that of the steps.
    Ends with one sentence where the rows of a picture are of searches that cannot be compared."""
    import matplotlib

    matplotlib.use("Agg")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["device"], row["dataset"], row["method"]), []).append(row)
    written = []
    for case, group in groups.items():
        for key in ("preset", "rounds", "hidden", "threads"):
            values = sorted({row[key] for row in group})
            if len(values) > 1:
                listed = " and ".join(map(str, values))
                raise SystemExit(f"bench: the results on {' '.join(case)} have {key} {listed}: draw them into folders of their own")
        pictures = {
            "rungs": (_rungs, [row for row in group if "search" in row], 1),
            "phases": (_phases, [row for row in group if "phases" in row], 1),
            "steps": (_steps, group, 2),
        }
        for name, (picture, chosen, least) in pictures.items():
            if len(chosen) >= least:
                path = out / f"search-{'-'.join(case)}-{name}.png"
                picture(f"search · {' · '.join(case)}", chosen, path)
                written.append(path)
    return written


def _label(row: dict) -> str:
    return row["label"] or "acefast"


def _figure(title: str, columns: int, height: float):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(7.5 * columns, height), layout="constrained", squeeze=False)
    figure.suptitle(title)
    for axis in axes[0]:
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rungs(title: str, rows: list[dict], path: Path) -> None:
    """Milliseconds of an epoch over the rungs, and what is kept there."""
    figure, (times, kept) = _figure(title, 2, 4.5)
    for colour, row in zip(_cycle(rows), rows, strict=True):
        rungs = row["search"]["rungs"]
        for key, what, style in (("imp_ms", "training with soft masks", "-"), ("retrain_ms", "retraining", "--")):
            points = [(rung["rung"], rung[key]) for rung in rungs if rung[key] is not None]
            if points:
                times.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=f"{_label(row)}: {what}")
    times.set_ylabel("ms an epoch, evaluation included")
    times.set_ylim(bottom=0)
    for key, colour in (("edges_density", COLOURS[2]), ("weights_density", COLOURS[3])):
        kept.plot([r["rung"] for r in rungs], [r[key] for r in rungs], color=colour, marker=".", label=key.split("_")[0])
    kept.set_ylabel("kept share")
    kept.set_ylim(0, 1.05)
    for axis in (times, kept):
        axis.set_xlabel("rung: rounds of pruning so far")
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _phases(title: str, rows: list[dict], path: Path) -> None:
    """Seconds of all epochs of each phase, acefast and the peer, and the stages of the whole searches."""
    import matplotlib.pyplot as plt

    searched = [row for row in rows if "search" in row]
    peer = next((row for row in reversed(rows) if "peer_epochs_s" in row), None)
    bars = [(_label(row), "acefast", row) for row in rows] + ([("PyG", "peer", peer)] if peer else [])
    colours = dict(zip([name for name, *_ in bars], _cycle(bars), strict=False))
    phases = [phase["phase"] for phase in rows[0]["phases"]]
    height = 1.8 + 0.24 * len(bars) * (len(phases) + 1)
    figure, axes = _figure(title, 2 if searched else 1, height)
    axis, place, places = axes[0], 0, []
    for phase in [*phases, "all"]:
        top = place
        for name, impl, row in bars:
            seconds = _seconds(row, impl, phase)
            ratio = f", {seconds / _seconds(rows[-1], 'acefast', phase):.1f}×" if impl == "peer" else ""
            bar(axis, place, seconds, colours[name], f" {seconds:.3g} s{ratio}")
            place += 1
        places.append((top + place - 1) / 2)
        place += 1
    axis.set_yticks(places, [*phases, "all"], fontsize=8)
    axis.set_ylim(place - 0.5, -1)
    axis.set_xscale("log")
    axis.margins(x=0.25)
    axis.set_xlabel("seconds of a search's epochs at what they take when timed alone (log)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    axis.legend(handles, list(colours), **BELOW)
    if searched:
        _stages(axes[1], searched)
    _save(figure, path)


def _seconds(row: dict, impl: str, phase: str) -> float:
    if phase == "all":
        return row[f"{impl}_epochs_s"]
    found = next(p for p in row["phases"] if p["phase"] == phase)
    return found["epochs"] * found[f"{impl}_ms"] / 1e3


def _stages(axis, rows: list[dict]) -> None:
    """The whole searches as stacked stages."""
    for place, row in enumerate(rows):
        left, stages = 0.0, row["search"]["stage_s"]
        for stage, colour in zip(STAGES, COLOURS, strict=False):
            seconds = stages.get(stage, 0.0)
            axis.barh(place, seconds, left=left, color=colour, height=0.6, label=stage if place == 0 else None)
            left += seconds
        axis.text(left, place, f" {row['search']['total_s']:.3g} s, {row['search']['peak_bytes'] / 2**20:.0f} MiB", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.margins(x=0.25)
    axis.set_xlabel("seconds of the whole search")
    axis.legend(**BELOW)


def _steps(title: str, rows: list[dict], path: Path) -> None:
    """What each step brought: an epoch of training masks, and the whole search."""
    figure, (epochs, totals) = _figure(title, 2, 1.8 + 0.35 * len(rows))
    for place, row in enumerate(rows):
        imp, total = _imp_ms(row), row.get("search", {}).get("total_s")
        for axis, value, unit in ((epochs, imp, "ms"), (totals, total, "s")):
            if value is not None:
                bar(axis, place, value, COLOURS[0], f" {value:.3g} {unit}")
    for axis, what in ((epochs, "ms an epoch of training masks, all kept"), (totals, "seconds of the whole search")):
        axis.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.margins(x=0.2)
        axis.set_xlabel(what)
    _save(figure, path)


def _imp_ms(row: dict) -> float | None:
    """Timed alone, else in the search."""
    alone = next((p["acefast_ms"] for p in row.get("phases", []) if p["phase"] == "imp"), None)
    return row["search"]["rungs"][0]["imp_ms"] if alone is None and "search" in row else alone


def _cycle(items) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(items))]

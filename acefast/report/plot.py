"""Accuracy over sparsity, one line per method, as a PNG."""

import io
import itertools
import math
from statistics import fmean, stdev

import matplotlib
import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from acefast.report.runs import Group
from acefast.report.winning import judge

STYLE = {"ugs": ("#0072B2", "o"), "ace": ("#D55E00", "s"), "random": ("#999999", "v"), "gebt": ("#009E73", "^")}
SPARE = [("#CC79A7", "D"), ("#56B4E9", "P"), ("#E69F00", "X"), ("#7A5195", "h"), ("#4D4D4D", "<"), ("#8C6D31", ">")]
TICKS = [0, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95, 97, 98, 99, 99.5, 99.9]
DENSE = "#444444"


def accuracy_plot(groups: list[Group]) -> bytes:
    """PNG bytes: one panel per dataset, backbone and axes, a line of panels per dataset and backbone where several axes were
    pruned; in a panel all methods: mean test accuracy over sparsity with a band of ±1 standard deviation over seeds, the dense
    accuracy as a dashed line, a ring around the sparsest rung of the loose form.

    Sparsity is drawn on the scale of what remains (its logarithm), so that the rungs of a ladder lie evenly. With joint
    axes the main axis is that of the weights and the one on top is that of the edges.
    """
    panels: dict[tuple, list[Group]] = {}
    for group in groups:
        panels.setdefault(tuple(group.config[name] for name in ("dataset", "backbone", "axes")), []).append(group)
    # A dense run prunes no axis: it belongs to every panel of its dataset and backbone.
    for key in [key for key, members in panels.items() if not any(map(has_curve, members))]:
        homes = [
            other for other in panels if other != key and other[:2] == key[:2] and any(map(has_curve, panels[other]))
        ]
        if homes:
            lone = panels.pop(key)
            for home in homes:
                panels[home] = lone + panels[home]
    styles = line_styles(groups)
    swept = list(dict.fromkeys(axes for *_, axes in panels))
    homes = list(dict.fromkeys(key[:2] for key in panels))
    if len(swept) > 1 and len(homes) > 1:
        columns, places = len(swept), [homes.index(key[:2]) * len(swept) + swept.index(key[2]) for key in panels]
    else:
        columns, places = min(len(panels), 3), range(len(panels))
    lines = max(places) // columns + 1
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"}):
        figure = Figure(figsize=(7.0 if columns == 1 else 5.6 * columns, 5.2 * lines), dpi=110, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        free = list(figure.subplots(lines, columns, squeeze=False).flat)
        for place, (key, members) in zip(places, panels.items()):
            draw_panel(free[place], key, members, styles)
        for place in set(range(lines * columns)) - set(places):
            free[place].set_axis_off()
        canvas.draw()
    out = io.BytesIO()
    whole = Image.fromarray(numpy.asarray(canvas.buffer_rgba())).convert("RGB")
    whole.quantize(256).save(out, "PNG", optimize=True)  # a third of the bytes
    return out.getvalue()


def has_curve(group: Group) -> bool:
    return group.common > 1


def line_styles(groups: list[Group]) -> dict[str, tuple[str, str]]:
    """{label: (colour, marker)}, the same in every panel; a method's own style goes to the group without a variant."""
    styles: dict[str, tuple[str, str]] = {}
    spare = itertools.cycle(SPARE)
    for group in sorted(filter(has_curve, groups), key=lambda group: bool(group.config.get("variant"))):
        if group.label not in styles:
            own = STYLE.get(group.config["method"])
            styles[group.label] = own if own is not None and own not in styles.values() else next(spare)
    return styles


def draw_panel(axes, key: tuple[str, str, str], groups: list[Group], styles: dict[str, tuple[str, str]]) -> None:
    dataset, backbone, swept = key
    main = "edge" if swept == "edges" else "weight"
    curves = [group for group in groups if has_curve(group)]
    for group in curves:
        draw_curve(axes, group, main, *styles[group.label])
    draw_dense(axes, groups)

    right = max((position(sparsity(group, main, k)) for group in curves for k in range(group.common)), default=0.25)
    axes.set_xlim(-0.03 * right, 1.03 * right)
    ticks(axes.xaxis, axes.set_xticks, [(position(t / 100), t) for t in TICKS], right)
    axes.set_xlabel(f"{main}s removed, % (scale of what remains)")
    axes.set_ylabel(f"test {groups[0].runs[0].metric}, %")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{dataset}, {backbone}, {'edges and weights' if swept == 'joint' else swept + ' alone'}")
    if swept == "joint" and curves:
        edge_axis(axes, curves, right)
    if any(judge(group).loosest for group in curves):
        axes.plot([], [], "o", markersize=9, fillstyle="none", color=DENSE, label="sparsest rung not below dense")
    low, high = axes.get_ylim()
    if high - low < 2:  # points of accuracy; less would blow up noise
        axes.set_ylim((low + high) / 2 - 1, (low + high) / 2 + 1)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def draw_curve(axes, group: Group, main: str, color: str, marker: str) -> None:
    rungs = range(group.common)
    tests = [[100 * rung.test for rung in group.at(k)] for k in rungs]
    x = [position(sparsity(group, main, k)) for k in rungs]
    y = [fmean(values) for values in tests]
    n = len(group.runs)
    label = group.label + (f" ({n} seeds, ± 1 sd)" if n > 1 else "")
    axes.plot(x, y, color=color, marker=marker, markersize=4, linewidth=1.6, label=label, zorder=3)
    if n > 1:
        spread = [stdev(values) for values in tests]
        low, high = [a - s for a, s in zip(y, spread)], [a + s for a, s in zip(y, spread)]
        axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0, zorder=1)
    best = judge(group).loosest
    if best:
        axes.plot(
            x[best], y[best], marker="o", markersize=11, fillstyle="none", color=color, markeredgewidth=1.4, zorder=4
        )


def draw_dense(axes, groups: list[Group]) -> None:
    """Dashed lines at the dense accuracies, one for all groups that agree to 0.05 points; named where they are not the most."""
    lines: list[tuple[float, list[str]]] = []
    for group in groups:
        level = 100 * fmean(rung.test for rung in group.at(0))
        same = next((labels for other, labels in lines if abs(other - level) < 0.05), None)
        lines.append((level, [group.label])) if same is None else same.append(group.label)
    lines.sort(key=lambda line: -len(line[1]))
    for style, (level, labels) in zip(("--", ":", "-.", (0, (1, 3)), (0, (5, 5))) * len(lines), lines):
        plain = len(lines) == 1 or labels == ["dense"] or len(labels) > max(len(other) for _, other in lines[1:])
        of = "" if plain else f" of {', '.join(labels)}"
        axes.axhline(level, color=DENSE, linestyle=style, linewidth=1.2, zorder=2, label=f"dense{of}, {level:.1f} %")


def edge_axis(axes, curves: list[Group], right: float) -> None:
    """Edge sparsity: on top where all curves remove the same edges beside the same weights, else at each line's end."""
    ladders = [[(sparsity(g, "weight", k), sparsity(g, "edge", k)) for k in range(g.common)] for g in curves]
    longest = max(ladders, key=len)
    agree = all(abs(a - b) < 0.005 for rungs in ladders for one, two in zip(rungs, longest) for a, b in zip(one, two))
    rising = all(one[0] < two[0] and one[1] < two[1] for one, two in zip(longest, longest[1:]))
    if not (agree and rising):
        for group in curves:
            last = group.common - 1
            axes.annotate(
                f"{100 * sparsity(group, 'edge', last):.0f} % of edges removed",
                (position(sparsity(group, "weight", last)), 100 * fmean(rung.test for rung in group.at(last))),
                xytext=(0, -13),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
        return
    places = []
    for tick in range(0, 100, 5):
        for one, two in zip(longest, longest[1:]):
            low, high = position(one[1]), position(two[1])
            here = position(tick / 100)
            if low <= here <= high and (not places or places[-1][1] != tick):
                share = (here - low) / (high - low)
                places.append(((1 - share) * position(one[0]) + share * position(two[0]), tick))
    top = axes.twiny()
    top.set_xlim(axes.get_xlim())
    ticks(top.xaxis, top.set_xticks, places, right)
    top.set_xlabel("edges removed, %")
    top.spines[["left", "right", "bottom"]].set_visible(False)


def ticks(axis, set_ticks, places: list[tuple[float, float]], right: float) -> None:
    """Label the places up to `right` that lie at least a twentieth of it apart."""
    chosen: list[tuple[float, float]] = []
    for place, value in places:
        if place <= 1.001 * right and (not chosen or place - chosen[-1][0] >= 0.05 * right):
            chosen.append((place, value))
    set_ticks([place for place, _ in chosen], [f"{value:g}" for _, value in chosen])


def sparsity(group: Group, axis: str, k: int) -> float:
    """Mean removed fraction of "edge" or "weight" at rung k."""
    return fmean(getattr(rung, f"{axis}_sparsity") for rung in group.at(k))


def position(removed: float) -> float:
    """Place of a sparsity on the scale of what remains; everything removed is drawn as 99.99 %."""
    return -math.log(max(1 - removed, 1e-4))

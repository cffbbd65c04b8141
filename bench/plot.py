"""`python -m bench plot`: draws committed or fresh results as PNG: time of each implementation over ours, and peak memory.

Results of `bench search` become pictures of their own: epochs over the rungs, phases against the peer, and, where there are
several labels, what each step brought, in the order of the files.
"""

import argparse
import json
import math
import re
from pathlib import Path

COLOURS = ("#1b6ca8", "#e07b39", "#4f9d69", "#b5485d", "#8067b7", "#8c7853", "#d48fc0", "#7f8c8d", "#b8a637", "#3aa6a6", "#5b5ea6", "#9b2335", "#a3c585", "#e8b4a0")
GROUPS_PER_PAGE = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, help="results of `bench ops` or `bench search`; default: bench/results/*.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files")


def main(options: argparse.Namespace, arguments: list[str]) -> int:
    from bench import plot_search
    from bench.__main__ import RESULTS

    files = options.files or sorted(RESULTS.glob("*.json"))
    if not files:
        raise SystemExit(f"bench: no results in {RESULTS}")
    rows = []
    for path in files:
        try:
            rows += json.loads(path.read_text())["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"bench: {path} does not hold results of `bench ops` or `bench search` ({type(error).__name__}: {error})") from None
    options.out.mkdir(parents=True, exist_ok=True)
    searches = [row for row in rows if row.get("benchmark") == "search"]
    single = [row for row in rows if row.get("benchmark") != "search"]
    for path in draw(single, options.out) + plot_search.draw(searches, options.out):
        print(path)
    return 0


def draw(rows: list[dict], out: Path) -> list[Path]:
    """One file per device, dtype and op, over several where it has many cases."""
    import matplotlib

    matplotlib.use("Agg")
    pages: dict[tuple, dict[tuple, list[dict]]] = {}
    for row in rows:
        case = (row["shape"], row.get("variant", ""), row["pass"])
        pages.setdefault((row["device"], row["dtype"], row["op"]), {}).setdefault(case, []).append(row)
    written = []
    for (device, dtype, op), cases in pages.items():
        items = [item for item in cases.items() if any(_is_timed(row) for row in item[1])]
        for number, start in enumerate(range(0, len(items), GROUPS_PER_PAGE), 1):
            suffix = "" if len(items) <= GROUPS_PER_PAGE else f"-{number}"
            path = out / f"{device}-{dtype}-{op}{suffix}.png"
            _page(f"{op} · {device} · {dtype}", dict(items[start : start + GROUPS_PER_PAGE]), path)
            written.append(path)
    return written


def _is_timed(row: dict) -> bool:
    return row["median_s"] is not None and math.isfinite(row["median_s"])


def _label(shape: str, variant: str, what: str) -> str:
    def short(match):
        number = int(match[2])
        return f"{match[1]}={number / 1e6:.1f}M" if number >= 10**6 else f"{match[1]}={number / 1e3:.0f}k" if number >= 10**4 else match[0]

    shape = re.sub(r"\b(\w)=(\d+)", short, shape)
    return "\n".join(part for part in (shape, ", ".join(filter(None, (variant, what)))) if part)


def _page(title: str, cases: dict[tuple, list[dict]], path: Path) -> None:
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["impl"] for rows in cases.values() for row in rows))
    colour = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    bars = sum(len(rows) + 1 for rows in cases.values())
    figure, axes = plt.subplots(1, 2, figsize=(15, 1.8 + 0.24 * bars), sharey=True, layout="constrained")
    places, labels, place = [], [], 0
    for case, rows in cases.items():
        ours = next(row["median_s"] for row in rows if _is_timed(row))
        top = place
        for row in rows:
            if _is_timed(row):
                ratio, peak = row["median_s"] / ours, max(row["peak_bytes"], 1) / 2**20
                milliseconds = row["median_s"] * 1e3
                time = f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1e3:.3g} s"
                bar(axes[0], place, ratio, colour[row["impl"]], f" {ratio:.2g}× ({time})" if ratio < 100 else f" {ratio:.0f}× ({time})")
                bar(axes[1], place, peak, colour[row["impl"]], f" {peak:.3g} MiB" if peak < 1000 else f" {peak / 1024:.3g} GiB")
            else:
                note = row.get("note") or "not timed"
                axes[0].text(0.02, place, f"{row['impl']}: {note[:60]}", transform=axes[0].get_yaxis_transform(), va="center", fontsize=7, color="#666666")
            place += 1
        places.append((top + place - 1) / 2)
        labels.append(_label(*case))
        place += 1
    axes[0].set_yticks(places, labels, fontsize=8)
    axes[0].set_ylim(place - 0.5, -1)
    for axis, what in zip(axes, ("time over acefast's (log); in brackets the median", "peak memory beyond the inputs, MiB (log)"), strict=True):
        axis.set_xscale("log")
        axis.set_xlabel(what)
        axis.margins(x=0.25)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axvline(1, color="#333333", linewidth=0.8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bar(axis, place: int, value: float, colour: str, text: str) -> None:
    axis.barh(place, value, color=colour, height=0.85)
    axis.text(value, place, text, va="center", fontsize=7)

"""The pre-declared comparison of two methods in a cell (dataset, backbone, axes), and the claims it allows.

With accuracies a_s,k and b_s,k on test of seed s at rung k = 0 (dense) ... K of the same ladder:

    area of a seed   D_s = 1/K sum_k=1..K ((a-b)_s,k-1 + (a-b)_s,k) / 2
    test             exact two-sided sign-flip test of mean_s D_s = 0: all 2^n signs are equally likely
    correction       Holm over the cells with n >= 10 of the same two methods
    effect           mean_s D_s with Student's 95 % interval, and d = mean / standard deviation

Rungs lie evenly on the scale of what remains, so D_s is the area between the curves of the plot over its length. A win
needs mean D_s > 0 and a corrected p below 0.05, a tie is no win, and cells with fewer than 10 seeds are described, not
claimed. Beyond 20 seeds the exact test takes too long and is not made.
"""

from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean, stdev

from acefast.report.runs import Group, RunRecord
from acefast.report.winning import SEEDS_TO_CLAIM, half_width

ALPHA = 0.05
MOST_SEEDS = 20  # 2^20 signs are seconds, each further seed doubles them


@dataclass(frozen=True)
class Comparison:
    """Method minus base, by their labels: the areas by seed, the fractions they are made of, p where the cell has the
    seeds to claim, and p_holm over the family of such cells."""

    cell: tuple[str, str, str]
    method: str
    base: str
    rungs: int
    areas: tuple[float, ...]
    p: float | None = None
    p_holm: float | None = None

    @property
    def mean(self) -> float:
        return fmean(self.areas)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean."""
        half = half_width(self.areas, 0.975)
        return self.mean - half, self.mean + half

    @property
    def d(self) -> float | None:
        """Mean over standard deviation, None where all areas are equal."""
        spread = stdev(self.areas)
        return self.mean / spread if spread else None

    @property
    def verdict(self) -> str:
        """win, loss or tie; "not claimed" where the cell is only described, "not tested" with too many seeds."""
        if self.p_holm is None:
            return "not claimed" if len(self.areas) < SEEDS_TO_CLAIM else "not tested"
        if self.p_holm >= ALPHA:
            return "tie"
        return "win" if self.mean > 0 else "loss"


def compare(groups: list[Group]) -> list[Comparison]:
    """Every two groups of a cell with two seeds or more in common and the same ladder, the later one in the groups' order
    (`RunRecord.place`) held against the earlier, corrected over the cells."""
    cells: dict[tuple, list[Group]] = {}
    for group in groups:
        if group.common > 1:
            key = tuple(group.config[name] for name in ("dataset", "backbone", "axes"))
            cells.setdefault(key, []).append(group)
    found = []
    for cell, members in cells.items():
        for base, method in combinations(members, 2):
            comparison = _compare(cell, method, base)
            if comparison is not None:
                found.append(comparison)
    return correct(found)


def _compare(cell, method: Group, base: Group) -> Comparison | None:
    theirs = {run.seed: run for run in base.runs}
    pairs = [(run, theirs[run.seed]) for run in method.runs if run.seed in theirs]
    if len(pairs) < 2:
        return None
    rungs = min(len(run.rungs) for pair in pairs for run in pair) - 1
    if rungs < 1 or not all(_same_ladder(*pair, rungs) for pair in pairs):
        return None
    areas = tuple(area([a.rungs[k].test - b.rungs[k].test for k in range(rungs + 1)]) for a, b in pairs)
    claimable = SEEDS_TO_CLAIM <= len(areas) <= MOST_SEEDS
    return Comparison(cell, method.label, base.label, rungs, areas, sign_flip(areas) if claimable else None)


def _same_ladder(one: RunRecord, two: RunRecord, rungs: int) -> bool:
    """Whether the rungs have the same sparsities, to half a percent, so that the released procedure's ties do not count."""
    axes = ("edge_sparsity", "weight_sparsity")
    return all(
        abs(getattr(one.rungs[k], axis) - getattr(two.rungs[k], axis)) < 0.005 for k in range(rungs + 1) for axis in axes
    )


def area(differences: list[float]) -> float:
    """Mean height of the trapezoids over K + 1 differences; rounded to 1e-12, so that what cancels is a tie."""
    whole = sum(differences) - (differences[0] + differences[-1]) / 2
    return round(whole / (len(differences) - 1), 12)


def sign_flip(areas) -> float:
    """Exact two-sided p of the mean of n paired differences: the share of the 2^n signs with a mean as far from 0."""
    import numpy as np
    from scipy.stats import permutation_test  # Imported where it is needed: it takes a second.

    test = permutation_test(
        (np.asarray(areas),), np.mean, permutation_type="samples", vectorized=True, n_resamples=np.inf, batch=1 << 16
    )
    return float(test.pvalue)


def holm(ps: list[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of m, times m - i + 1, not below the one before, at most 1."""
    corrected, least = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = least
    return corrected


def correct(comparisons: list[Comparison]) -> list[Comparison]:
    """The comparisons with p_holm, each over those of the same two methods that have a p."""
    families: dict[tuple[str, str], list[int]] = {}
    for place, c in enumerate(comparisons):
        if c.p is not None:
            families.setdefault((c.method, c.base), []).append(place)
    result = list(comparisons)
    for places in families.values():
        for place, p in zip(places, holm([comparisons[place].p for place in places])):
            result[place] = replace(comparisons[place], p_holm=p)
    return result

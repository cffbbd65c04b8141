"""When a rung wins: the strict form that may be claimed, and the paper's loose one.

With dense accuracy d_s and ticket accuracy t_s,k of seed s at rung k, all from the same code, seeds and epochs:

    loose    mean_s t_s,k >= mean_s d_s on test                                                   (the paper's tables)
    strict   for every rung i <= k: mean_s(t_s,i - d_s) - T * sd_s(t_s,i - d_s) / sqrt(n) > -0.005 on validation,
             T the 95 % quantile of Student's t with n - 1 degrees of freedom; claimed with n >= 10 only

A strict rung is found on validation and reported on test. Accuracies are fractions.
"""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

from acefast.report.runs import Group

MARGIN = 0.005
SEEDS_TO_CLAIM = 10


@dataclass(frozen=True)
class Verdict:
    """Per rung of a group: `loose` bool, `noninferior` bool or None (single run), `bound` the lower 95 % bound of the
    paired validation difference or None, and `claimed` the strict form: None for a single run, False below 10 seeds."""

    loose: tuple[bool, ...]
    noninferior: tuple[bool | None, ...]
    bound: tuple[float | None, ...]
    claimed: tuple[bool | None, ...]

    @property
    def loosest(self) -> int:
        """The sparsest rung that wins in the loose form; 0 (dense) where none does."""
        return max(k for k, wins in enumerate(self.loose) if wins)

    @property
    def strictest(self) -> int | None:
        """The sparsest rung that wins in the strict form; 0 where none does, None where nothing may be claimed."""
        wins = [k for k, claimed in enumerate(self.claimed) if claimed]
        return max(wins) if wins else None


def half_width(differences: list[float], quantile: float) -> float:
    """Distance from the mean of n >= 2 paired differences to its bound, by that quantile of Student's t."""
    from scipy.special import stdtrit  # Imported where it is needed: it takes longer than a report without seeds.

    n = len(differences)
    return float(stdtrit(n - 1, quantile)) * stdev(differences) / math.sqrt(n)


def lower_bound(differences: list[float]) -> float:
    """One-sided lower 95 % bound of the mean of n >= 2 paired differences."""
    return fmean(differences) - half_width(differences, 0.95)


def judge(group: Group) -> Verdict:
    """Both forms for each rung of `group`. A rung that not all runs have reached wins in neither."""
    n = len(group.runs)
    dense = group.at(0)
    rungs = max(len(run.rungs) for run in group.runs)
    loose, noninferior, bounds = [], [], []
    for k in range(rungs):
        here = group.at(k)
        whole = len(here) == n
        # The slack covers the rounding of the two means; equal accuracies are not below.
        loose.append(whole and fmean(r.test for r in here) >= fmean(r.test for r in dense) - 1e-12)
        bound = lower_bound([r.val - d.val for r, d in zip(here, dense)]) if whole and n > 1 else None
        bounds.append(bound)
        earlier = noninferior[-1] if noninferior else True
        noninferior.append(None if n == 1 else bool(earlier and bound is not None and bound > -MARGIN))
    claimed = [None if n == 1 else bool(n >= SEEDS_TO_CLAIM and ok) for ok in noninferior]
    return Verdict(tuple(loose), tuple(noninferior), tuple(bounds), tuple(claimed))

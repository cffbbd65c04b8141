"""Importance of edges and weights, behind one interface: a score has a name, and a search method only names it.

magnitude |m|; product |m w|; gradient |dL/dm|; combined |m w dL/dm|; random uniform in [0, 1). An edge has no weight
of its own, so there w = 1 (UGS, Chen et al. 2021, for the magnitude; Molchanov et al. 2019 for the Taylor term).

For edges u -> v alone, with p the predicted class probabilities and d the degrees over existing edges: agreement
<p_u, p_v>; influence <p_u, p_v> / sqrt((1 + d_u)(1 + d_v)), GCN's coefficient as far as it joins nodes of a class; share
<p_u, p_v> / (1 + d_v), the part of what v receives that comes from its own class.

A score of one's own is a function of `Inputs` that says what it needs; with a name it serves every search:

    SCORES["square"] = Score(lambda of: of.mask.square())
    acefast.find_ticket("cora", score="square", data_root=...)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.pruning.pattern import Pattern, SoftMasks

NEEDS = ("weights", "gradients", "generators", "predictions")


@dataclass(frozen=True)
class Inputs:
    """What a score sees of the edges or of one masked weight. All tensors have the mask's shape."""

    mask: Tensor
    """The soft mask m."""
    weight: Tensor | None
    """The weight w that the mask multiplies; None for the edges."""
    gradient: Tensor | None
    """dL/dm; None unless the score needs gradients."""
    generator: torch.Generator | None
    """A CPU generator of this tensor's own; None unless the score needs generators."""
    agreement: Tensor | None = None
    """[E], of the edges only: <p_u, p_v>, the chance that two draws from the classes predicted for the two ends agree; None unless
    the score needs predictions."""
    degrees: tuple[Tensor, Tensor] | None = None
    """([E], [E]), beside agreement: existing edges out of the edge's source, and into its destination."""

    @property
    def product(self) -> Tensor:
        """m w."""
        return self.mask if self.weight is None else self.mask * self.weight


@dataclass(frozen=True)
class Score:
    """``function`` of :class:`Inputs` gives the importance, in the mask's shape, larger for more important; ``needs``
    names what it reads besides the mask: "weights", "gradients", "generators", "predictions" (for edges)."""

    function: Callable[[Inputs], Tensor]
    needs: tuple[str, ...] = ()

    def __post_init__(self):
        unknown = [need for need in self.needs if need not in NEEDS]
        if unknown:
            raise InputError(f"Score: needs must be of {', '.join(NEEDS)}, got {', '.join(map(repr, unknown))}")


def _uniform(of: Inputs) -> Tensor:
    return torch.rand(of.mask.shape, generator=of.generator).to(of.mask.device)


SCORES: dict[str, Score] = {
    "magnitude": Score(lambda of: of.mask.abs()),
    "product": Score(lambda of: of.product.abs(), ("weights",)),
    "gradient": Score(lambda of: of.gradient.abs(), ("gradients",)),
    "combined": Score(lambda of: (of.product * of.gradient).abs(), ("weights", "gradients")),
    "random": Score(_uniform, ("generators",)),
    "agreement": Score(lambda of: of.agreement, ("predictions",)),
    "influence": Score(lambda of: of.agreement * ((1 + of.degrees[0]) * (1 + of.degrees[1])).rsqrt(), ("predictions",)),
    "share": Score(lambda of: of.agreement / (1 + of.degrees[1]), ("predictions",)),
}


def find_score(name: "str | Score") -> Score:
    """The score of a name in `SCORES`; a Score is itself. Raises InputError for an unknown name."""
    if isinstance(name, Score):
        return name
    if name not in SCORES:
        raise InputError(f"score must be one of {', '.join(SCORES)}, got {name!r}")
    return SCORES[name]


def score(
    name: "str | Score",
    masks: SoftMasks,
    weights: Mapping[str, Tensor] | None = None,
    gradients: SoftMasks | None = None,
    make: Callable[[str], torch.Generator] | None = None,
    predictions: tuple[Tensor, tuple[Tensor, Tensor]] | None = None,
    edges: "str | Score | None" = None,
) -> SoftMasks:
    """Scores [like masks] of every element that ``masks`` covers; larger is more important. ``edges`` names another score for
    the edges.

    ``weights`` by name, ``gradients`` of the masks, ``make(name)`` the generator of each tensor, and ``predictions`` the
    edges' (agreement, degrees), where a score needs them. Raises InputError for an unknown name and for what is needed and missing.
    """
    given = {
        "weights": weights if masks.weights else {}, "gradients": gradients, "generators": make,
        "predictions": predictions if masks.edges is not None else (),
    }  # fmt: skip

    def of(key: str, mask: Tensor, weight: Tensor | None, gradient: Tensor | None, *ends: Tensor) -> Tensor:
        chosen = name if edges is None or key != "edges" else edges
        kind = find_score(chosen)
        missing = [need for need in kind.needs if given[need] is None]
        if missing:
            raise InputError(f"score {chosen!r} needs {' and '.join(missing)}, which were not given")
        return kind.function(Inputs(mask, weight, gradient, make(key) if "generators" in kind.needs else None, *ends))

    gradients = gradients or SoftMasks(None, {})
    return SoftMasks(
        None if masks.edges is None else of("edges", masks.edges, None, gradients.edges, *(predictions or ())),
        {key: of(key, m, (weights or {}).get(key), gradients.weights.get(key)) for key, m in masks.weights.items()},
    )


def standardise(scores: list[Tensor], alive: list[Tensor], how: str) -> list[Tensor]:
    """Scores with mean 0 and deviation 1 over the alive elements of all tensors together; 0 elsewhere.

    "zscore": (s - mean) / std, 0 where std is 0; "rank": the same of the ranks, equal scores taking their mean rank.
    Statistics in float64, result float32.
    """
    values = torch.cat([s.flatten() for s in scores]).double()
    living = torch.cat([a.flatten() for a in alive])
    count = int(living.sum())
    if not count:
        return [torch.zeros_like(s, dtype=torch.float32) for s in scores]
    if how == "rank":
        values = torch.zeros_like(values).masked_scatter_(living, mean_ranks(values[living]))
    values = values.where(living, 0.0)
    mean, largest = float(values.sum()) / count, float(values.abs().max())
    values = (values - mean).where(living, 0.0)
    deviation = (float(values.square().sum()) / count) ** 0.5
    # a spread below the rounding of the mean is no spread
    values = (values / deviation if deviation > 1e-12 * largest else torch.zeros_like(values)).float()
    parts = values.split([s.numel() for s in scores])
    return [part.view_as(s) for part, s in zip(parts, scores, strict=True)]


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks 0 .. n-1 of values [n] as float64, equal values taking their mean rank."""
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values, right=False)
    upto = torch.searchsorted(ordered, values, right=True)
    return (below + upto - 1).double() / 2


def mean_rank_of_picks(scores: list[Tensor], alive: list[Tensor], picked: list[Tensor], largest: bool) -> float | None:
    """Mean rank of the picks among the alive, scaled so that 0 is the best possible pick and 0.5 a random one.

    ``largest`` says that large scores are meant to be picked. Scores are finite. None without picks.
    """
    values = torch.cat([s.where(a, torch.inf).flatten() for s, a in zip(scores, alive, strict=True)])
    chosen = torch.cat([s[p] for s, p in zip(scores, picked, strict=True)]).sort().values
    n, k = sum(int(a.sum()) for a in alive), chosen.numel()
    if not k or n < 2:
        return None
    values_picked, times = chosen.unique_consecutive(return_counts=True)
    place = torch.searchsorted(values_picked, values)  # the first pick that is not below the value
    equal = values_picked[place.clamp(max=values_picked.numel() - 1)] == values
    counts = torch.bincount(2 * place + equal, minlength=2 * values_picked.numel() + 2).view(-1, 2)[:-1]
    same = counts[:, 1]
    below = counts.sum(1).cumsum(0) - same  # place p holds what lies between the picks p - 1 and p, and p's equals
    rank = float((times * (2 * below + same - 1)).sum()) / (2 * k * (n - 1))
    return 1 - rank if largest else rank


def spread(scores: list[Tensor], alive: Pattern | list[Tensor]) -> float:
    """Standard deviation of the scores of the alive elements."""
    values = torch.cat([s[a] for s, a in zip(scores, alive, strict=True)])
    return float(values.double().std(correction=0)) if values.numel() else 0.0

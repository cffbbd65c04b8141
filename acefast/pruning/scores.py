"""Importance of edges and weights, behind one interface: a score is a name.

magnitude |m|; product |m w|; gradient |dL/dm|; combined |m w dL/dm|; random uniform in [0, 1). An edge has no weight
of its own, so there w = 1 (UGS, Chen et al. 2021, for the magnitude; Molchanov et al. 2019 for the Taylor term).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from acefast.pruning.pattern import Pattern, SoftMasks

SCORES: dict[str, Callable[[Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "magnitude": lambda mask, weight, gradient: mask.abs(),
    "product": lambda mask, weight, gradient: (mask if weight is None else mask * weight).abs(),
    "gradient": lambda mask, weight, gradient: gradient.abs(),
    "combined": lambda mask, weight, gradient: ((mask if weight is None else mask * weight) * gradient).abs(),
}
NEEDS_WEIGHTS = ("product", "gradient", "combined")
NEEDS_GRADIENT = ("gradient", "combined")


def score(
    name: str,
    masks: SoftMasks,
    weights: Mapping[str, Tensor] | None = None,
    gradients: SoftMasks | None = None,
    make: Callable[[str], torch.Generator] | None = None,
) -> SoftMasks:
    """Scores [like masks] of every element that ``masks`` covers; larger is more important.

    ``weights`` by name for product and combined, ``gradients`` of the masks for gradient and combined, ``make(name)``
    the generator of each tensor for random.
    """
    if name == "random":
        edges = None if masks.edges is None else _uniform(masks.edges, make("edges"))
        return SoftMasks(edges, {key: _uniform(m, make(key)) for key, m in masks.weights.items()})
    function = SCORES[name]
    gradients = gradients or SoftMasks(None, {})
    edges = None if masks.edges is None else function(masks.edges, None, gradients.edges)
    return SoftMasks(
        edges,
        {key: function(m, (weights or {}).get(key), gradients.weights.get(key)) for key, m in masks.weights.items()},
    )


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator).to(like.device)


def standardise(scores: list[Tensor], alive: list[Tensor], how: str) -> list[Tensor]:
    """Scores with mean 0 and deviation 1 over the alive elements of all tensors together; 0 elsewhere.

    "zscore": (s - mean) / std, 0 where std is 0; "rank": the same of the ranks, equal scores taking their mean rank.
    Statistics in float64, result float32.
    """
    values = torch.cat([s[a] for s, a in zip(scores, alive, strict=True)]).double()
    if not values.numel():
        return [torch.zeros_like(s, dtype=torch.float32) for s in scores]
    if how == "rank":
        values = mean_ranks(values)
    deviation = values.std(correction=0)
    # a spread below the rounding of the mean is no spread
    flat = (values - values.mean()) / deviation if float(deviation) > 1e-12 * float(values.abs().max()) else values * 0
    result, first = [], 0
    for s, a in zip(scores, alive, strict=True):
        out = torch.zeros(s.shape, dtype=torch.float32, device=s.device)
        count = int(a.sum())
        out[a] = flat[first : first + count].float()
        result.append(out)
        first += count
    return result


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks 0 .. n-1 of values [n] as float64, equal values taking their mean rank."""
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values, right=False)
    upto = torch.searchsorted(ordered, values, right=True)
    return (below + upto - 1).double() / 2


def mean_rank_of_picks(scores: list[Tensor], alive: list[Tensor], picked: list[Tensor], largest: bool) -> float | None:
    """Mean rank of the picks among the alive, scaled so that 0 is the best possible pick and 0.5 a random one.

    ``largest`` says that large scores are meant to be picked. None without picks.
    """
    values = torch.cat([s[a] for s, a in zip(scores, alive, strict=True)])
    chosen = torch.cat([s[p] for s, p in zip(scores, picked, strict=True)]).sort().values
    n, k = values.numel(), chosen.numel()
    if not k or n < 2:
        return None
    values_picked, times = chosen.unique_consecutive(return_counts=True)
    place = torch.searchsorted(values_picked, values)  # the first pick that is not below the value
    equal = values_picked[place.clamp(max=values_picked.numel() - 1)] == values
    below = torch.bincount(place[~equal], minlength=values_picked.numel() + 1)[:-1].cumsum(0)
    same = torch.bincount(place[equal], minlength=values_picked.numel())
    below = below + same.cumsum(0) - same
    rank = float((times * (2 * below + same - 1)).sum()) / (2 * k * (n - 1))
    return 1 - rank if largest else rank


def spread(scores: list[Tensor], alive: Pattern | list[Tensor]) -> float:
    """Standard deviation of the scores of the alive elements."""
    values = torch.cat([s[a] for s, a in zip(scores, alive, strict=True)])
    return float(values.double().std(correction=0)) if values.numel() else 0.0

"""The metrics of the tasks, on the device of their arguments, as OGB's evaluators define them (ogb 1.3.6, `evaluate.py`)."""

import torch
from torch import Tensor

from acefast.errors import InputError


def accuracy(scores: Tensor, y: Tensor) -> float:
    """Share of rows of `scores` [n, C] whose largest column is `y` [n] int64."""
    return float(accuracy_there(scores, y))


def accuracy_there(scores: Tensor, y: Tensor) -> Tensor:
    """The accuracy as a float64 [] on the device, which is not waited for."""
    _check("accuracy", scores.dim() == 2 and y.shape == scores.shape[:1], scores, y)
    right = (scores.argmax(1) == y).sum().double()
    return right / torch.full_like(right, y.numel())  # by a plain number CUDA multiplies with its reciprocal, which rounds twice


def rocauc(scores: Tensor, y: Tensor) -> float:
    """Mean over labels of the area under the ROC curve, P(s⁺ > s⁻) + P(s⁺ = s⁻) / 2 for a random positive and a random
    negative: `scores` and `y` [n, T], y of 0, 1 and NaN, which is skipped. A label without positives or without negatives does
    not count. NaN where a score is NaN. Raises InputError where no label counts."""
    _check("rocauc", scores.dim() == 2 and y.shape == scores.shape, scores, y)
    scores, order = scores.detach().T.contiguous().sort(dim=1)  # [T, n]
    y = y.T.gather(1, order)
    positive, negative = (y == 1).double(), (y == 0).double()
    below = torch.nn.functional.pad(negative.cumsum(1), (1, 0))  # negatives among the first k scores
    first, last = (torch.searchsorted(scores, scores, side=side) for side in ("left", "right"))  # of each group of ties
    wins = (positive * (below.gather(1, first) + below.gather(1, last)) / 2).sum(1)
    pairs = positive.sum(1) * negative.sum(1)
    counts = pairs > 0
    if not bool(counts.any()):
        raise InputError("rocauc: no label has both a positive and a negative, choose other nodes to evaluate on")
    area = torch.where(scores.isnan().any(1), torch.nan, wins / pairs)
    return float(area[counts].mean())


def hits(positive: Tensor, negative: Tensor, k: int) -> float:
    """Hits@k: share of the scores `positive` [n] above the k-th largest of `negative` [m], ties lost; 1 where m < k."""
    _check("hits", positive.dim() == negative.dim() == 1 and positive.numel() > 0 and k > 0, positive, negative)
    if negative.numel() < k:
        return 1.0
    return float((positive > negative.topk(k).values[-1]).double().mean())


def _check(what: str, fit: bool, a: Tensor, b: Tensor) -> None:
    if not fit or not a.numel():
        raise InputError(f"{what}: the shapes {list(a.shape)} and {list(b.shape)} do not go together")

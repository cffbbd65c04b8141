"""Removing exactly as many elements as asked for, and exchanging removed for kept ones."""

import torch
from torch import Tensor

from acefast import ops
from acefast.errors import InputError
from acefast.graph import Graph
from acefast.pruning.directions import lowest_tied
from acefast.pruning.pattern import Pattern, SoftMasks
from acefast.pruning.schedule import prune_count


def prune(
    pattern: Pattern,
    scores: SoftMasks,
    fractions: dict[str, float],
    protected: Pattern | None = None,
    *,
    tie_directions: bool = False,
    graph: Graph | None = None,
) -> Pattern:
    """Remove the floor(fraction * remaining) elements with the lowest scores on each axis of ``fractions``, ties by
    position.

    Protected elements go only after all others. With ``tie_directions`` the two directions of an undirected edge of
    ``graph`` go together, at one edge fewer where the count would cut a pair (:func:`lowest_tied`).
    """
    counts = {axis: pattern.kept(axis) - prune_count(pattern.kept(axis), part) for axis, part in fractions.items()}
    if protected is not None:
        scores = scores.map(lambda s, safe: s.masked_fill(safe, torch.inf), protected)
    return prune_to(pattern, scores, counts, tie_directions=tie_directions, graph=graph)


def prune_to(
    pattern: Pattern, scores: SoftMasks, counts: dict[str, int], *, tie_directions: bool = False, graph: Graph | None = None
) -> Pattern:
    """Leave the counts[axis] elements with the highest scores on each axis of ``counts``; the others are removed, among
    equal scores the first ones. ``tie_directions`` as for :func:`prune`."""
    if tie_directions and graph is None:
        raise InputError("prune: tie_directions needs the graph, give graph=")
    for axis, left in counts.items():
        keep, values = pattern.axis(axis), scores.axis(axis)
        count = pattern.kept(axis) - left
        if tie_directions and axis == "edges":
            removed = [lowest_tied(graph, values[0], count, keep[0])]
        else:
            removed = ops.topk_mask(values, count, alive=keep, largest=False, by="value")
        pattern = pattern.with_axis(axis, [k & ~r for k, r in zip(keep, removed, strict=True)])
    return pattern


def exchange(
    keep: list[Tensor], scores: list[Tensor], k: int, tau: float, seed: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(new keep, erased, mined): k kept elements drawn by softmax(-score/tau) leave, k removed ones drawn by
    softmax(score/tau) enter. Each tensor's scores serve kept and removed elements alike."""
    return tuple(ops.exchange(keep, scores, scores, k, tau=tau, seed=seed))

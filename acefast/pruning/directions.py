"""The two directions of an undirected edge, taken together.

The pair of e is e and `graph.reverse_edges()[e]`. A self-loop and an edge without a reverse are on their own.
"""

import torch
from torch import Tensor

from acefast import ops
from acefast.graph import Graph


def lowest_tied(graph: Graph, scores: Tensor, count: int, alive: Tensor) -> Tensor:
    """Which `count` alive edges have the lowest scores, the two directions of an edge always together: bool [E].

    scores [E] float, alive bool [E]. A pair has the mean of its two scores and counts as two edges; an edge on its own,
    or the last alive one of a pair, has its score and counts as one. They are taken in order of score, the lower edge
    number first among equals, while they fit; a pair that `count` would cut stays, so `count` edges are picked, or
    count - 1. One radix selection, no sort. Raises InputError for NaN among the alive scores and for `count` out of
    range.
    """
    reverse = graph.reverse_edges().long()
    both = alive & alive[reverse]
    scores = torch.where(both, scores / 2 + scores[reverse] / 2, scores)
    edges = torch.arange(graph.num_edges, device=graph.device)
    first = (edges <= reverse).nonzero()
    pairs = torch.cat((first, reverse[first]), 1)  # [P, 2], an edge on its own twice
    once = torch.cat((torch.ones_like(first, dtype=torch.bool), first != reverse[first]), 1)
    order = pairs[once]  # every edge, beside its reverse
    picked = torch.empty_like(alive)
    # with the directions of a pair side by side, the selection cuts the last pair alone
    picked[order] = ops.topk_mask([scores[order]], count, [alive[order]], largest=False, by="value")[0]
    return picked & (picked[reverse] | ~both)


class Pairs:
    """The edges that have a reverse as elements of their own: [E] to [P] and back. first < second: their numbers [P]."""

    def __init__(self, graph: Graph):
        reverse = graph.reverse_edges().long()
        self.first = (torch.arange(graph.num_edges, device=graph.device) < reverse).nonzero().squeeze(1)
        self.second = reverse[self.first]

    def keep(self, keep: Tensor) -> Tensor:
        """Pairs of which both edges are kept: bool [P] of bool [E]."""
        return keep[self.first] & keep[self.second]

    def mean(self, scores: Tensor) -> Tensor:
        """The mean score of each pair: [P] of [E]."""
        return scores[self.first] / 2 + scores[self.second] / 2

    def put(self, edges: Tensor, values: Tensor) -> Tensor:
        """`edges` [E] with `values` [P] at both edges of each pair."""
        return edges.index_put((self.first,), values).index_put((self.second,), values)

"""Link prediction on a graph: pairs that no edge joins, and a split of the edges that leaks nothing."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from acefast.data.dataset import Dataset
from acefast.errors import InputError
from acefast.graph import Graph
from acefast.random import generator

VAL, TEST = 20, 10  # one undirected edge in so many validates, tests


def pair_codes(a: Tensor, b: Tensor, n: int) -> Tensor:
    """Numbers of the pairs {a, b} (int64 [P], a != b) of n nodes, each in [0, n (n - 1) / 2), the same for {b, a}:
    (d - 1) n + i where {a, b} = {i, (i + d) mod n} and d is the shorter way around the circle of nodes, of two equal ways
    that with i < n / 2."""
    way = (b - a) % n
    back = (2 * way > n) | ((2 * way == n) & (a >= way))
    return (torch.where(back, n - way, way) - 1) * n + torch.where(back, b, a)


def code_pairs(codes: Tensor, n: int) -> Tensor:
    """The pairs int64 [P, 2] of `pair_codes`."""
    first = codes % n
    return torch.stack((first, (first + codes // n + 1) % n), 1)


class NonEdges:
    """The pairs of different nodes of which `pairs` (int64 [P, 2], in any direction, also repeated) holds none.

    They are numbered by their codes with those of `pairs` left out, so a pair is drawn by its number, exactly uniformly and
    without rejection: O(P) memory, O(log P) a draw. ``count``: how many there are.
    """

    def __init__(self, pairs: Tensor, n: int):
        a, b = pairs[pairs[:, 0] != pairs[:, 1]].unbind(1)
        codes = torch.unique(pair_codes(a, b, n))
        self.n, self.count = n, n * (n - 1) // 2 - codes.numel()
        self.before = codes - torch.arange(codes.numel(), device=codes.device)  # non-edges below each edge's code

    def draw(self, count: int, draws: torch.Generator) -> Tensor:
        """`count` pairs int64 [count, 2], drawn independently. Raises InputError where there is none."""
        if not self.count:
            raise InputError("every two nodes are joined by an edge, expected some that are not to learn from")
        return self._numbered(torch.randint(self.count, (count,), generator=draws))

    def distinct(self, count: int, draws: torch.Generator) -> Tensor:
        """`count` different pairs int64 [count, 2]. Raises InputError where there are fewer."""
        if count > self.count:
            raise InputError(f"{count} pairs of nodes without an edge are needed, and the graph has {self.count}")
        if 2 * count >= self.count:
            return self._numbered(torch.randperm(self.count, generator=draws)[:count])
        numbers = np.empty(0, dtype=np.int64)
        while len(numbers) < count:
            numbers = np.concatenate((numbers, torch.randint(self.count, (count,), generator=draws).numpy()))
            numbers = numbers[np.sort(np.unique(numbers, return_index=True)[1])]
        return self._numbered(torch.from_numpy(numbers[:count]))

    def _numbered(self, numbers: Tensor) -> Tensor:
        numbers = numbers.to(self.before.device)
        return code_pairs(numbers + torch.searchsorted(self.before, numbers, right=True), self.n)


def split_links(data: Dataset, seed: int = 0) -> Dataset:
    """The task of predicting the links of `data`'s graph, with metric rocauc.

    Of the P undirected edges floor(P / 20) validate and floor(P / 10) test, at random; the others train, and they alone, in
    the directions in which they were listed and in their order, are the graph of the result. All copies of an edge and both of
    its directions are in the same part; self-loops are no links and stay in the graph. As many pairs, different ones that no
    edge of any part joins, are val_neg and test_neg. UGS (Chen et al., ICML 2021, code) takes the same shares, but never
    an edge that holds a component together. Everything is drawn from `seed`, by default the same for all
    searches, so that they share one split. Raises InputError for a graph that is too small or too dense, for data whose
    task is link already, and for features that were made of the whole graph.
    """
    if data.task == "link":
        raise InputError(f"{data.name} comes with a split of its links: use it as it is")
    if data.features not in ("given", "learned"):
        raise InputError(
            f"the features of {data.name} ({data.features}) are made of the whole graph and would tell the edges held out: "
            "give features that are not"
        )
    src, dst = data.graph.edge_index()
    n, apart = data.num_nodes, src != dst
    codes, number = torch.unique(pair_codes(src[apart], dst[apart], n), return_inverse=True)
    num_val, num_test = codes.numel() // VAL, codes.numel() // TEST
    if not num_val:
        raise InputError(f"{data.name} has {codes.numel()} undirected edges, expected at least {VAL} to split them")
    order = torch.randperm(codes.numel(), generator=generator(seed, "links", "split")).to(codes.device)
    val, test, train = (part.sort().values for part in order.split((num_val, num_test, codes.numel() - num_val - num_test)))
    trains = torch.zeros(codes.numel(), dtype=torch.bool, device=codes.device)
    trains[train] = True
    keep = torch.ones_like(apart)
    keep[apart] = trains[number]
    negatives = NonEdges(torch.stack((src, dst), 1), n).distinct(num_val + num_test, generator(seed, "links", "negatives"))
    return replace(
        data,
        graph=Graph.from_edge_index(data.graph.edge_index()[:, keep], num_nodes=n),
        y=None,
        num_classes=0,
        train=code_pairs(codes[train], n),
        val=code_pairs(codes[val], n),
        test=code_pairs(codes[test], n),
        val_neg=negatives[:num_val],
        test_neg=negatives[num_val:],
        task="link",
        metric="rocauc",
        edge_attr=None if data.edge_attr is None else data.edge_attr[keep],
    )

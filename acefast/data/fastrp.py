"""FastRP: features of a graph that has none, from the graph alone (Chen et al., "Fast and Accurate Network Embeddings via Very
Sparse Random Projection", CIKM 2019, here with a dense Gaussian projection and without weights)."""

import torch
from torch import Tensor

from acefast import ops
from acefast.graph import Graph
from acefast.random import generator

COLUMNS = 128
POWERS = (2, 3, 4, 5)


def fastrp(graph: Graph, seed: int = 0) -> Tensor:
    """X = Σ_{k in POWERS} (D⁻¹ A)^k R, each column then shifted and scaled to mean 0 and variance 1: float32 [N, COLUMNS].

    A is the adjacency matrix without self-loops, rows destinations, repeated edges counted; D its row sums; R [N, COLUMNS]
    standard normal, drawn on the CPU from `seed`. Costs max(POWERS) products of the graph with a matrix of that size.
    """
    x = torch.randn(graph.num_dst, COLUMNS, generator=generator(seed, "fastrp")).to(graph.device)
    loops, keep = graph.self_loops()[0], None
    if loops.numel():
        keep = torch.ones(graph.num_edges, dtype=torch.bool, device=graph.device)
        keep[loops] = False
        keep = graph.select(keep)
    total = torch.zeros_like(x)
    for power in range(1, max(POWERS) + 1):
        x = ops.spmm(graph, x, keep=keep, reduce="mean")
        if power in POWERS:
            total += x
    total -= total.mean(0)
    spread = total.square().mean(0).sqrt()
    return total.div_(torch.where(spread > 0, spread, 1))

"""The graphs that the benchmarks run on: real where the data folder has them, generated of the same size elsewhere."""

import gzip
from pathlib import Path

import numpy as np
import torch

from acefast import Graph

ARXIV_NODES = 169_343


def undirected_with_self_loops(edges: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """Both directions of every edge once, no duplicates, one self-loop per node, sorted by (destination, source)."""
    loops = torch.arange(num_nodes)
    src = torch.cat((edges[0], edges[1], loops))
    dst = torch.cat((edges[1], edges[0], loops))
    key = torch.unique(dst * num_nodes + src)
    return torch.stack((key % num_nodes, key // num_nodes))


def arxiv(data_root: Path | None, seed: int = 0) -> tuple[str, Graph]:
    """ogbn-arxiv, undirected and with self-loops (2,484,941 edges): real, or a power-law twin of its size."""
    raw = None if data_root is None else data_root / "ogb" / "ogbn_arxiv" / "raw" / "edge.csv.gz"
    if raw is not None and raw.exists():
        with gzip.open(raw) as file:
            edges = np.loadtxt(file, delimiter=",", dtype=np.int64)
        edges = undirected_with_self_loops(torch.from_numpy(edges.T.copy()), ARXIV_NODES)
        return "ogbn-arxiv", Graph.from_edge_index(edges, ARXIV_NODES)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.arange(1, ARXIV_NODES + 1, dtype=torch.float64).pow(-0.6)
    order = torch.randperm(ARXIV_NODES, generator=generator)
    ends = order[torch.multinomial(weight, 2 * 1_180_000, replacement=True, generator=generator)].view(2, -1)
    return "twin:ogbn-arxiv", Graph.from_edge_index(undirected_with_self_loops(ends, ARXIV_NODES), ARXIV_NODES)

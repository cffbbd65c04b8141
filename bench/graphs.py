"""The graphs that the benchmarks run on: real where the data folder has them, generated twins of the same size elsewhere.

All are in CSR order, so that every implementation reads the same per-edge tensors. Cora and ogbn-arxiv are undirected and
have a self-loop at each node, as they are trained on; the others are undirected as they come, without added loops.
"""

import dataclasses
import gzip
from pathlib import Path

import numpy as np
import torch

from acefast import Graph


@dataclasses.dataclass(frozen=True)
class Shape:
    """A data set's size. A twin has its nodes and its directed edges, with degrees that fall as rank^-exponent; the exponent
    gives about the real largest degree. No multi-edges, and no node without an edge."""

    title: str
    nodes: int
    edges: int
    exponent: float
    cpu_scale: float = 1.0  # the default on the CPU, where implementations that make E x F tensors must fit 24 GiB


SHAPES = {
    "cora": Shape("cora", 2_708, 13_264, 0.5),
    "arxiv": Shape("ogbn-arxiv", 169_343, 2_484_941, 0.6),
    "proteins": Shape("ogbn-proteins", 132_534, 79_122_504, 0.25, cpu_scale=0.02),
    "products": Shape("ogbn-products", 2_449_029, 123_718_280, 0.45, cpu_scale=0.02),
    "reddit": Shape("reddit", 232_965, 114_615_892, 0.35, cpu_scale=0.02),
}


def load(name: str, scale: float | None, device: str, data_root: Path | None, seed: int = 0) -> tuple[str, Graph]:
    """(title, Graph on `device`). `scale` shrinks the nodes at constant mean degree; None is 1 on a GPU and the shape's own
    default on the CPU. The real graph is taken where `data_root` has it and nothing is shrunk."""
    shape = SHAPES[name]
    if scale is None:
        scale = shape.cpu_scale if device == "cpu" else 1.0
    if scale == 1.0 and data_root is not None:
        edges = _real(name, data_root, shape.nodes)
        if edges is not None:
            return shape.title, Graph.from_edge_index(edges.to(device), shape.nodes)
    nodes, edges = max(8, round(shape.nodes * scale)), max(16, round(shape.edges * scale))
    edge_index = power_law(nodes, edges, shape.exponent, device, seed)
    title = f"twin:{shape.title}" if scale == 1.0 else f"twin:{shape.title}*{scale:g}"
    return title, Graph.from_edge_index(edge_index, nodes)


def power_law(nodes: int, edges: int, exponent: float, device: str, seed: int = 0) -> torch.Tensor:
    """[2, E] int64 on `device`, sorted by (destination, source): both directions of E/2 distinct pairs, a ring among them,
    the ends of the others drawn with probability ~ rank^-exponent. E is `edges` rounded down to even, or as many as there
    are pairs. Seeded on the CPU, so that every device gets the same graph."""
    generator = torch.Generator().manual_seed(seed)
    ring = torch.arange(nodes, device=device)
    ring_keys = _pair_keys(ring, (ring + 1) % nodes, nodes)
    wanted = min(edges // 2 - nodes, nodes * (nodes - 3) // 4)  # half of all pairs at most: drawing more would not end
    order = torch.randperm(nodes, generator=generator).to(device)
    keys = ring_keys[:0]
    while keys.numel() < wanted:
        ends = []
        for _ in range(2):
            uniform = torch.rand(int(1.1 * (wanted - keys.numel())) + 16, generator=generator).to(device)
            ends.append(order[(nodes * uniform.double().pow(1 / (1 - exponent))).long().clamp(max=nodes - 1)])
        apart = (ends[0] - ends[1]) % nodes
        drawn = _pair_keys(*ends, nodes)[(apart > 1) & (apart < nodes - 1)]
        keys = torch.unique(torch.cat((keys, drawn)))
    if keys.numel() > wanted:
        keys = keys[torch.randperm(keys.numel(), generator=generator)[: max(0, wanted)].to(device)]
    keys = torch.cat((keys, ring_keys))
    low, high = keys.div(nodes, rounding_mode="floor"), keys % nodes
    return _from_keys(torch.sort(torch.cat((keys, high * nodes + low))).values, nodes)


def _pair_keys(a: torch.Tensor, b: torch.Tensor, nodes: int) -> torch.Tensor:
    return torch.minimum(a, b) * nodes + torch.maximum(a, b)


def undirected_with_self_loops(edges: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """Both directions of every edge once, no duplicates, one self-loop per node, sorted by (destination, source)."""
    loops = torch.arange(num_nodes)
    src = torch.cat((edges[0], edges[1], loops))
    dst = torch.cat((edges[1], edges[0], loops))
    return _from_keys(torch.unique(dst * num_nodes + src), num_nodes)


def _from_keys(key: torch.Tensor, num_nodes: int) -> torch.Tensor:
    dst = key.div(num_nodes, rounding_mode="floor")
    return torch.stack((key - dst * num_nodes, dst))


def _real(name: str, data_root: Path, num_nodes: int) -> torch.Tensor | None:
    if name == "arxiv":
        path = data_root / "ogb" / "ogbn_arxiv" / "raw" / "edge.csv.gz"
        if path.exists():
            with gzip.open(path) as file:
                edges = np.loadtxt(file, delimiter=",", dtype=np.int64)
            return undirected_with_self_loops(torch.from_numpy(edges.T.copy()), num_nodes)
    if name == "cora" and (data_root / "planetoid" / "ind.cora.graph").exists():
        from acefast.data.planetoid import load_planetoid

        graph = load_planetoid("cora", data_root / "planetoid").graph
        return undirected_with_self_loops(graph.edge_index(), num_nodes)
    return None

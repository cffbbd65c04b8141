"""The graphs that the benchmarks run on: real where the data folder has them, generated twins of the same size elsewhere.

All are in CSR order, so that every implementation reads the same per-edge tensors. Cora and ogbn-arxiv are undirected and
have a self-loop at each node, as they are trained on; the others are undirected as they come, without added loops.
"""

import dataclasses
from pathlib import Path

import numpy as np

from acefast import Graph
from acefast.data import edges, load_planetoid
from acefast.data.ogb import read_edges
from acefast.data.twin import TWINS, draw_pairs


@dataclasses.dataclass(frozen=True)
class Shape:
    """A data set's size. A twin has its nodes and its directed edges, with degrees that fall as rank^-exponent; the exponent
    gives about the real largest degree. No multi-edges, and no node without an edge."""

    title: str
    nodes: int
    edges: int
    exponent: float
    cpu_scale: float = 1.0  # the default on the CPU, where implementations that make E x F tensors must fit 24 GiB


def _of(title: str, cpu_scale: float = 1.0) -> Shape:
    twin = TWINS[title]
    return Shape(title, twin.nodes, 2 * twin.pairs + twin.self_loops * twin.nodes, twin.exponent, cpu_scale)


SHAPES = {
    "cora": Shape("cora", 2_708, 13_264, 0.5),
    "arxiv": _of("ogbn-arxiv"),
    "proteins": _of("ogbn-proteins", cpu_scale=0.02),
    "products": _of("ogbn-products", cpu_scale=0.02),
    "reddit": _of("reddit", cpu_scale=0.02),
}


def load(name: str, scale: float | None, device: str, data_root: Path | None, seed: int = 0) -> tuple[str, Graph]:
    """(title, Graph on `device`). `scale` shrinks the nodes at constant mean degree; None is 1 on a GPU and the shape's own
    default on the CPU. The real graph is taken where `data_root` has it and nothing is shrunk."""
    shape = SHAPES[name]
    if scale is None:
        scale = shape.cpu_scale if device == "cpu" else 1.0
    if scale == 1.0 and data_root is not None:
        graph = _real(name, data_root)
        if graph is not None:
            return shape.title, graph.to(device)
    nodes, num_edges = max(8, round(shape.nodes * scale)), max(16, round(shape.edges * scale))
    title = f"twin:{shape.title}" if scale == 1.0 else f"twin:{shape.title}*{scale:g}"
    return title, power_law(nodes, num_edges, shape.exponent, device, seed)


def power_law(nodes: int, num_edges: int, exponent: float, device: str, seed: int = 0) -> Graph:
    """Both directions of num_edges/2 pairs of `acefast.data.twin.draw_pairs` in CSR order, on `device`; the same on every one."""
    low, high, _ = draw_pairs(nodes, num_edges // 2, exponent, seed)
    return edges.to_graph(edges.undirected(low, high, nodes)).to(device)


def _real(name: str, data_root: Path) -> Graph | None:
    if name == "arxiv" and (data_root / "ogb" / "ogbn_arxiv" / "raw" / "edge.csv.gz").exists():
        rows, nodes = read_edges("ogbn-arxiv", data_root / "ogb" / "ogbn_arxiv")
        src, dst = rows.T
    elif name == "cora" and (data_root / "planetoid" / "ind.cora.graph").exists():
        graph = load_planetoid("cora", data_root / "planetoid").graph
        nodes, (src, dst) = graph.num_dst, graph.edge_index().numpy().astype(np.int32)
    else:
        return None
    return edges.to_graph(edges.undirected_simple(src, dst, nodes, add_self_loops=True))

"""What every layer does with the edges and masks it is given."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from acefast.errors import InputError
from acefast.graph import Graph, Selection

_built = WeakTensorKeyDictionary()  # edge_index -> (its version, num_nodes, Graph); an entry goes with its tensor


def as_graph(edges: Graph | Tensor, num_nodes: int | tuple[int, int]) -> Graph:
    """`edges` as a Graph: itself, or one built of an edge_index [2, E] once and found again while that tensor lives and is
    not changed. Raises InputError for bad edges, for a graph of another size, and for an edge_index in compiled code."""
    sizes = num_nodes if isinstance(num_nodes, tuple) else (num_nodes, num_nodes)
    if isinstance(edges, Graph):
        if (edges.num_src, edges.num_dst) != sizes:
            raise InputError(f"the graph has {edges.num_nodes} nodes, x has {num_nodes} rows")
        return edges
    if not isinstance(edges, Tensor):
        raise InputError(f"edge_index must be an acefast.Graph or a tensor [2, E], got {type(edges).__name__}")
    if torch.compiler.is_compiling():
        raise InputError("a compiled or exported layer takes a Graph: build it outside, Graph.from_edge_index(edge_index)")
    found = _built.get(edges)
    if found is None or found[:2] != (edges._version, sizes):
        found = edges._version, sizes, Graph.from_edge_index(edges, sizes)
        _built[edges] = found
    return found[2]


def with_self_loops(
    g: Graph, mask: Tensor | None, keep: Tensor | Selection | None
) -> tuple[Graph, Tensor | None, Tensor | Selection | None]:
    """The graph with a loop for each node that has none (kept), and mask and keep for it: added loops have mask 1."""
    looped = g.with_self_loops()
    if mask is not None:
        mask = torch.cat((mask, mask.new_ones(g.num_dst, *mask.shape[1:])))
    own_loops = g.self_loops().numel() > 0
    if isinstance(keep, Selection):
        if not (own_loops and torch.compiler.is_compiling()):
            return looped, mask, keep.with_self_loops()
        keep = keep.keep  # how many loops are added is not known while tracing
    if keep is None and not own_loops:
        return looped, mask, None
    own = torch.ones(g.num_edges, dtype=torch.bool, device=g.device) if keep is None else keep
    return looped, mask, torch.cat((own, g.missing_self_loops(keep)))


def part_of(values: Mapping[str, Tensor] | None, prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with `prefix`, without it: what a submodule sees of its parent's masks."""
    return {name.removeprefix(prefix): value for name, value in (values or {}).items() if name.startswith(prefix)}

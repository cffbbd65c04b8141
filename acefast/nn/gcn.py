"""Graph convolution of Kipf and Welling (ICLR 2017) with masks on edges and weights, and the network made of it."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from acefast import ops
from acefast.csr import CSR
from acefast.errors import InputError
from acefast.graph import Block, Graph, Selection
from acefast.nn.edges import as_graph, part_of, with_self_loops
from acefast.nn.linear import MaskedLinear
from acefast.nn.network import Network

DEGREES = ("masked", "static", "none")


class GCNConv(nn.Module):
    """y = A (x (W * m)^T) + b with A_ij = c_ij w_e m_e over kept edges e: j -> i, and c_ii on the diagonal.

    With `normalize`, c_ij = d_i^-1/2 d_j^-1/2 (``ops.gcn_norm``) with degrees "masked" (the sum of w_e m_e over the kept
    edges) or "static" (the number of all edges, or the sum of their w_e); without, the raw sum, c_ij = 1. A node without a
    self-loop among the kept edges gets one, of weight 1 (2 with `improved`), without a mask. Parameters are named as
    PyG's: lin.weight [out_channels, in_channels], bias. Aggregates before the transform where that is cheaper.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        improved: bool = False,
        add_self_loops: bool | None = None,  # default: as normalize
        normalize: bool = True,
        bias: bool = True,
        degrees: str = "masked",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if degrees not in DEGREES[:2]:
            raise InputError(f"degrees must be one of {', '.join(DEGREES[:2])}, got {degrees!r}")
        self.lin = MaskedLinear(in_channels, out_channels, bias=False, generator=generator)
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.improved, self.normalize, self.degrees = improved, normalize, degrees
        self.add_self_loops = normalize if add_self_loops is None else add_self_loops
        self._reset_bias(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weight and bias uniform in +-in_channels^-1/2."""
        self.lin.reset_parameters(generator)
        self._reset_bias(generator)

    @torch.no_grad()
    def _reset_bias(self, generator):
        if self.bias is not None:
            bound = max(1, self.lin.in_features) ** -0.5
            self.bias.uniform_(-bound, bound, generator=generator)

    def maskable(self) -> dict[str, nn.Parameter]:
        """The weights that a search may prune, by parameter name."""
        return {"lin.weight": self.lin.weight}

    def coefficients(self, graph: Graph, edge_mask=None, edge_keep=None) -> tuple[Tensor | None, Tensor | None]:
        """(c [E], c_self [N]) of A; None where A holds ones or no diagonal. The same for all layers of a network."""
        loops = None
        if self.add_self_loops:
            dtype = torch.float32 if edge_mask is None else edge_mask.dtype
            loops = graph.missing_self_loops(edge_keep).to(dtype)
            loops = 2 * loops if self.improved else loops
        if not self.normalize:
            return None, loops
        return ops.gcn_norm(graph, edge_mask, edge_keep, False if loops is None else loops, self.degrees)

    def blocks(self, graph: Graph, nodes: Tensor, hops: int, edge_keep=None) -> list[Block]:
        """``graph.blocks`` with this layer's self-loops among the edges, edge E + i being the loop of node i."""
        if self.add_self_loops:
            graph, _, edge_keep = with_self_loops(graph, None, edge_keep)
        return graph.blocks(nodes, hops, edge_keep)

    def entries(self, graph: Graph, edge_mask=None, edge_keep=None) -> Tensor | None:
        """The entries of A on the edges of ``blocks``, c_e m_e [E], and with self-loops c_self [N] behind them; None for
        ones. The same for all layers of a network."""
        c, c_self = self.coefficients(graph, edge_mask, edge_keep)
        entries = edge_mask if c is None else c if edge_mask is None else c * edge_mask
        if c_self is None:
            return entries
        return torch.cat((c_self.new_ones(graph.num_edges) if entries is None else entries, c_self))

    def macs(self, graph: Graph, x: CSR | int, edge_keep: Tensor | None = None, weight_keep=None) -> int:
        """Multiply-accumulates of a call (see :meth:`acefast.nn.Network.macs`): the product's + (kept edges + added
        self-loops) · channels before or after the transform, as it aggregates. x sparse, or the number of dense rows."""
        passing = graph.num_edges if edge_keep is None else int(edge_keep.sum())
        if self.add_self_loops:
            passing += int(graph.missing_self_loops(edge_keep).sum())
        channels = self.lin.in_features if self._aggregates_first(x) else self.lin.out_features
        return self.lin.macs(x, (weight_keep or {}).get("lin.weight")) + passing * channels

    def _aggregates_first(self, x) -> bool:
        """Whether before the transform: where that is cheaper."""
        return not isinstance(x, CSR) and self.lin.in_features < self.lin.out_features

    def forward(
        self,
        x: Tensor | CSR,  # [N, in_channels]
        edge_index: Graph | Tensor,  # or int [2, E]
        edge_weight: Tensor | None = None,  # float [E], takes part in the degrees
        edge_mask: Tensor | None = None,  # float [E]
        edge_keep: Tensor | Selection | None = None,  # bool [E]
        weight_masks: Mapping[str, Tensor] | None = None,  # float, by the names of maskable()
        weight_keep: Mapping[str, Tensor] | None = None,  # bool, by the names of maskable()
        coefficients: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> Tensor:  # [N, out_channels]
        """On a Block of ``blocks`` (x [N_src, in_channels] -> [N_dst, out_channels]) edge_weight is what ``entries`` gave and
        stands for all that concerns edges."""
        if isinstance(edge_index, Block):
            edge_mask = edge_keep = None
            coefficients = edge_weight, None
            graph, edge_weight = edge_index, None
        else:
            graph = as_graph(edge_index, x.shape[0])
        if edge_weight is not None:
            edge_mask = edge_weight if edge_mask is None else edge_weight * edge_mask
        if coefficients is None:
            coefficients = self.coefficients(graph, edge_mask, edge_keep)
        c, c_self = coefficients

        def aggregate(h):
            return ops.spmm(graph, h, weight=c, mask=edge_mask, keep=edge_keep, self_weight=c_self)

        mask, keep = (weight_masks or {}).get("lin.weight"), (weight_keep or {}).get("lin.weight")
        if self._aggregates_first(x):
            y = self.lin(aggregate(x), mask, keep)
        else:
            y = aggregate(self.lin(x, mask, keep))
        return y if self.bias is None else (y + self.bias).to(y.dtype)


class GCN(Network):
    """Layers of :class:`GCNConv` with ReLU and dropout between them.

    Maskable weights: the linear of every layer (``maskable()``), named ``layers.<i>.lin.weight``. In training mode
    the dropout noise is a function of (seed, step, layer, element) alone.
    """

    def __init__(
        self,
        in_channels,
        hidden,
        out_channels,
        layers=2,
        dropout=0.5,
        bias=False,
        self_loops=True,
        degrees="masked",
        seed=0,
    ):
        super().__init__()
        if degrees not in DEGREES:
            raise InputError(f"degrees must be one of {', '.join(DEGREES)}, got {degrees!r}")
        normalisation = {"normalize": False} if degrees == "none" else {"degrees": degrees}
        widths = [in_channels, *[hidden] * (layers - 1), out_channels]
        self.layers = nn.ModuleList(
            GCNConv(a, b, add_self_loops=self_loops, bias=bias, **normalisation) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.dropout = dropout
        self.reset_parameters(seed)

    def blocks(self, graph: Graph, nodes: Tensor, edge_keep=None) -> list[Block]:
        """The part of the graph that the logits of ``nodes`` depend on, a block for each layer."""
        return self.layers[0].blocks(graph, nodes, len(self.layers), edge_keep)

    def edge_arguments(self, graph: Graph, edge_mask=None, edge_keep=None, blocks: list[Block] | None = None) -> dict:
        """The arguments of ``forward`` that are made of edges and their masks alone, the same for equal masks."""
        first = self.layers[0]
        make = first.coefficients if blocks is None else first.entries
        return {"coefficients": make(graph, edge_mask, edge_keep)}

    def compact(self, graph: Graph, edge_keep: Tensor) -> tuple[Graph, dict]:
        """The smaller graph and its coefficients, those that the kept edges have in the whole one."""
        c, c_self = self.layers[0].coefficients(graph, None, edge_keep)
        return graph.compact(edge_keep), {"coefficients": (None if c is None else c[edge_keep], c_self)}

    def parts(self, width: int) -> list[tuple[Network, dict[str, tuple[slice, slice]]]]:
        """Of two layers the last sum runs over hidden channels, which may be taken in groups."""
        channels = self.layers[0].lin.out_features
        if len(self.layers) != 2 or channels <= width:
            return [(self, {})]
        found = []
        for begin in range(0, channels, width):
            group, every = slice(begin, begin + width), slice(None)
            places = {"layers.0.lin.weight": (group, every), "layers.1.lin.weight": (every, group)}
            part = copy.deepcopy(self)
            for (name, place), layer in zip(places.items(), part.layers, strict=True):
                layer.lin.weight = nn.Parameter(self.get_parameter(name).detach()[place].contiguous())
                layer.lin.out_features, layer.lin.in_features = layer.lin.weight.shape
            if self.layers[0].bias is not None:
                part.layers[0].bias = nn.Parameter(self.layers[0].bias.detach()[group].clone())
                part.layers[1].bias = None if begin else part.layers[1].bias
            found.append((part, places))
        return found

    def forward(
        self,
        graph: Graph,
        x: Tensor | CSR | None,  # [N, in_channels]; see Network.embed for None
        edge_mask: Tensor | None = None,  # float [E]
        edge_keep: Tensor | Selection | None = None,  # bool [E]
        weight_masks: Mapping[str, Tensor] | None = None,  # float, by parameter name
        weight_keep: Mapping[str, Tensor] | None = None,  # bool, by parameter name
        seed: int = 0,
        step: int | Tensor = 0,
        blocks: list[Block] | None = None,
        coefficients: tuple[Tensor | None, Tensor | None] | Tensor | None = None,
    ) -> Tensor:  # logits [N, out_channels]
        """With ``blocks`` of the same graph and edge_keep, x has the rows of the first one's sources and the logits are those
        of the last one's destinations: the same numbers as those rows without. ``coefficients``: what ``edge_arguments`` or
        ``compact`` gave, made here unless given."""
        shared = coefficients
        if shared is None:
            shared = self.edge_arguments(graph, edge_mask, edge_keep, blocks)["coefficients"]
        h = self.given(x)
        for index, layer in enumerate(self.layers):
            if index:
                rows = None if blocks is None else blocks[index].src_nodes
                h = ops.relu_dropout(h, self.dropout if self.training else 0.0, seed, step * len(self.layers) + index, rows)
            own = part_of(weight_masks, f"layers.{index}."), part_of(weight_keep, f"layers.{index}.")
            if blocks is None:
                h = layer(h, graph, None, edge_mask, edge_keep, *own, shared)
            else:
                h = layer(h, blocks[index], shared, None, None, *own)
        return h

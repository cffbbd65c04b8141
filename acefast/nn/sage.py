"""GraphSAGE layer of Hamilton et al. (NeurIPS 2017) with masks on edges and weights, and the network made of it."""

import torch
from torch import Tensor, nn

from acefast import ops
from acefast.csr import CSR
from acefast.graph import Block, Graph
from acefast.nn.edges import part_of
from acefast.nn.linear import MaskedLinear
from acefast.nn.network import Network


class SAGELayer(nn.Module):
    """y_i = W_l (mean over kept edges e: j -> i of m_e x_j) + b + W_r x_i (Hamilton et al., alg. 1 with the mean and without
    the normalisation of y). Parameters are named as PyG's SAGEConv: lin_l.weight, lin_l.bias, lin_r.weight.

    With `pruned` "in_denominator" a removed edge still counts in the mean. Multiplies first where that is cheaper.
    """

    def __init__(self, in_channels: int, out_channels: int, pruned: str = "absent", generator=None):
        super().__init__()
        self.lin_l = MaskedLinear(in_channels, out_channels, generator=generator)
        self.lin_r = MaskedLinear(in_channels, out_channels, bias=False, generator=generator)
        self.pruned = pruned

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As :class:`MaskedLinear`."""
        self.lin_l.reset_parameters(generator)
        self.lin_r.reset_parameters(generator)

    def maskable(self) -> dict[str, nn.Parameter]:
        """The weights that a search may prune, by parameter name."""
        return {"lin_l.weight": self.lin_l.weight, "lin_r.weight": self.lin_r.weight}

    def macs(self, graph: Graph, x: CSR | int, edge_keep: Tensor | None = None, weight_keep=None) -> int:
        """Multiply-accumulates of a call (see :meth:`acefast.nn.Network.macs`): those of both products + kept edges · channels
        before or after the transform, as it aggregates. x sparse, or the number of dense rows."""
        keeps, passing = weight_keep or {}, graph.num_edges if edge_keep is None else int(edge_keep.sum())
        channels = self.lin_l.out_features if self._aggregates_last(x) else self.lin_l.in_features
        products = (getattr(self, name).macs(x, keeps.get(f"{name}.weight")) for name in ("lin_l", "lin_r"))
        return sum(products) + passing * channels

    def _aggregates_last(self, x) -> bool:
        """Whether after the transform: where that is cheaper."""
        return isinstance(x, CSR) or self.lin_l.in_features > self.lin_l.out_features

    def forward(self, x, graph, edge_mask=None, edge_keep=None, masks=None, keeps=None) -> Tensor:
        """x [N_src, in_channels] -> [N_dst, out_channels]; `graph` square or a Block; masks and keeps by parameter name."""
        kept = None if isinstance(graph, Block) else edge_keep  # a Block has the kept edges alone

        def linear(name, h, bias=True):
            return getattr(self, name)(h, masks.get(f"{name}.weight"), keeps.get(f"{name}.weight"), bias)

        def mean(h):
            return ops.spmm(graph, h, mask=edge_mask, keep=kept, reduce="mean", pruned=self.pruned)

        masks, keeps = masks or {}, keeps or {}
        if self._aggregates_last(x):
            near = mean(linear("lin_l", x, bias=False))
            return near + self.lin_l.bias.to(near.dtype) + linear("lin_r", x)[: graph.num_dst]
        return linear("lin_l", mean(x)) + linear("lin_r", x[: graph.num_dst])


class SAGE(Network):
    """Layers of :class:`SAGELayer` with ReLU and dropout between them.

    Maskable weights: both linear maps of every layer, ``layers.<i>.lin_l.weight`` and ``layers.<i>.lin_r.weight``. In training
    mode the dropout noise is a function of (seed, step, layer, element) alone.
    """

    def __init__(self, in_channels, hidden, out_channels, layers=2, dropout=0.5, pruned="absent", seed=0):
        super().__init__()
        widths = [in_channels, *[hidden] * (layers - 1), out_channels]
        self.layers = nn.ModuleList(SAGELayer(a, b, pruned) for a, b in zip(widths, widths[1:], strict=False))
        self.dropout = dropout
        self.reset_parameters(seed)

    def blocks(self, graph: Graph, nodes: Tensor, edge_keep=None) -> list[Block] | None:
        """The part of the graph that the logits of ``nodes`` depend on, a block for each layer; None where removed edges
        count in the means, which blocks do not hold."""
        if self.layers[0].pruned != "absent":
            return None
        return graph.blocks(nodes, len(self.layers), edge_keep)

    def compact(self, graph: Graph, edge_keep: Tensor) -> tuple[Graph, dict]:
        """The smaller graph, or the whole one with a selection where removed edges count in the means."""
        if self.layers[0].pruned == "absent":
            return super().compact(graph, edge_keep)
        return graph, {"edge_keep": graph.select(edge_keep)}

    def forward(
        self, graph, x, edge_mask=None, edge_keep=None, weight_masks=None, weight_keep=None, seed=0, step=0, blocks=None
    ):
        """Arguments and result as :meth:`acefast.nn.GCN.forward`."""
        h = self.given(x)
        for index, layer in enumerate(self.layers):
            part = graph if blocks is None else blocks[index]
            if index:
                rows = part.src_nodes if isinstance(part, Block) else None
                h = ops.relu_dropout(h, self.dropout if self.training else 0.0, seed, step * len(self.layers) + index, rows)
            own = part_of(weight_masks, f"layers.{index}."), part_of(weight_keep, f"layers.{index}.")
            h = layer(h, part, edge_mask, edge_keep, *own)
        return h

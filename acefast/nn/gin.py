"""Graph isomorphism layer of Xu et al. (ICLR 2019) with masks on edges, and the network that UGS makes of it."""

import torch
from torch import Tensor, nn

from acefast import ops
from acefast.csr import CSR
from acefast.graph import Block, Graph, Selection
from acefast.nn.edges import as_graph
from acefast.nn.linear import MaskedLinear
from acefast.nn.network import Network
from acefast.random import generator


class GINConv(nn.Module):
    """y = net((1 + eps) x_i + sum over kept edges e: j -> i of m_e x_j) (Xu et al., eq. 4.1).

    `nn` is any module [*, F] -> [*, out]; `eps` is learned with `train_eps`. Named as PyG's: nn.*, eps.
    """

    def __init__(self, nn: nn.Module, eps: float = 0.0, train_eps: bool = False):
        super().__init__()
        self.nn = nn
        value = torch.tensor([float(eps)])
        if train_eps:
            self.eps = torch.nn.Parameter(value)
        else:
            self.register_buffer("eps", value)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],  # [N, F], or of sources and destinations
        edge_index: Graph | Tensor,  # or int [2, E]
        edge_mask: Tensor | None = None,  # float [E]
        edge_keep: Tensor | Selection | None = None,  # bool [E]
    ) -> Tensor:  # [N, out]
        x_src, x_dst = x if isinstance(x, tuple) else (x, x)
        graph = as_graph(edge_index, (x_src.size(0), x_dst.size(0)))
        y = ops.spmm(graph, x_src, mask=edge_mask, keep=edge_keep)
        return self.nn(y + ((1 + self.eps) * x_dst).to(y.dtype))


class GINLayer(nn.Module):
    """(x_i + mean over kept edges e: j -> i of m_e x_j) (W * m)^T, the bias-free layer of UGS's GIN.

    With `pruned` "in_denominator" a removed edge still counts in the mean. Multiplies first where that is cheaper.
    """

    def __init__(self, in_channels: int, out_channels: int, pruned: str = "absent", generator=None):
        super().__init__()
        self.lin = MaskedLinear(in_channels, out_channels, bias=False, generator=generator)
        self.pruned = pruned

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As :class:`MaskedLinear`."""
        self.lin.reset_parameters(generator)

    def maskable(self) -> dict[str, nn.Parameter]:
        """The weights that a search may prune, by parameter name."""
        return {"lin.weight": self.lin.weight}

    def macs(self, graph: Graph, x: CSR | int, edge_keep: Tensor | None = None, weight_keep=None) -> int:
        """Multiply-accumulates of a call (see :meth:`acefast.nn.Network.macs`): the product's + (kept edges + N, each node
        itself) · channels before or after the transform, as it aggregates. x sparse, or the number of dense rows."""
        passing = graph.num_dst + (graph.num_edges if edge_keep is None else int(edge_keep.sum()))
        channels = self.lin.out_features if self._aggregates_last(x) else self.lin.in_features
        return self.lin.macs(x, (weight_keep or {}).get("lin.weight")) + passing * channels

    def _aggregates_last(self, x) -> bool:
        """Whether after the transform: where that is cheaper."""
        return isinstance(x, CSR) or self.lin.in_features > self.lin.out_features

    def forward(self, x, graph, edge_mask=None, edge_keep=None, mask=None, keep=None) -> Tensor:
        """x [N_src, in_channels] -> [N_dst, out_channels]; `graph` square or a Block; mask and keep of lin.weight."""

        def aggregate(h):
            kept = None if isinstance(graph, Block) else edge_keep  # a Block has the kept edges alone
            near = ops.spmm(graph, h, mask=edge_mask, keep=kept, reduce="mean", pruned=self.pruned)
            return near + h[: graph.num_dst]

        if self._aggregates_last(x):
            return aggregate(self.lin(x, mask, keep))
        return self.lin(aggregate(x), mask, keep)


class GIN(Network):
    """The GIN of UGS (Chen et al., ICML 2021, code): layers of :class:`GINLayer`, ReLU and dropout after each of them, and an
    unmasked linear head on each hidden layer; the logits are the mean of the heads' and the last layer's outputs.

    Maskable weights: the linear of every layer, ``layers.<i>.lin.weight``; ``heads.<i>`` have weight and bias. In training
    mode the dropout noise is a function of (seed, step, layer, element) alone.
    """

    def __init__(self, in_channels, hidden, out_channels, layers=2, dropout=0.5, pruned="absent", seed=0):
        super().__init__()
        widths = [in_channels, *[hidden] * (layers - 1), out_channels]
        self.layers = nn.ModuleList(GINLayer(a, b, pruned) for a, b in zip(widths, widths[1:], strict=False))
        self.heads = nn.ModuleList(nn.Linear(hidden, out_channels) for _ in range(layers - 1))
        self.dropout = dropout
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fresh weights from generators named after the layers and heads."""
        super().reset_parameters(seed)
        for index, head in enumerate(self.heads):
            draw = generator(seed, "init", f"head-{index}")
            for parameter in head.parameters():
                parameter.uniform_(-head.in_features**-0.5, head.in_features**-0.5, generator=draw)

    def blocks(self, graph: Graph, nodes: Tensor, edge_keep=None) -> list[Block] | None:
        """The part of the graph that the logits of ``nodes`` depend on, a block for each layer; None where removed edges
        count in the means, which blocks do not hold."""
        if self.layers[0].pruned != "absent":
            return None
        return graph.blocks(nodes, len(self.layers), edge_keep)

    def macs(self, graph, x, edge_keep=None, weight_keep=None) -> int:
        """That of the layers + N · weights of each head."""
        return super().macs(graph, x, edge_keep, weight_keep) + sum(graph.num_dst * head.weight.numel() for head in self.heads)

    def compact(self, graph: Graph, edge_keep: Tensor) -> tuple[Graph, dict]:
        """The smaller graph, or the whole one with a selection where removed edges count in the means."""
        if self.layers[0].pruned == "absent":
            return super().compact(graph, edge_keep)
        return graph, {"edge_keep": graph.select(edge_keep)}

    def forward(self, graph, x, edge_mask=None, edge_keep=None, weight_masks=None, weight_keep=None, seed=0, step=0, blocks=None):
        """Arguments and result as :meth:`acefast.nn.GCN.forward`."""
        masks, keeps = weight_masks or {}, weight_keep or {}
        h, logits = self.given(x), []
        for index, layer in enumerate(self.layers):
            part = graph if blocks is None else blocks[index]
            name = f"layers.{index}.lin.weight"
            h = layer(h, part, edge_mask, edge_keep, masks.get(name), keeps.get(name))
            rows = part.dst_nodes if isinstance(part, Block) else None
            h = ops.relu_dropout(h, self.dropout if self.training else 0.0, seed, step * len(self.layers) + index, rows)
            if index < len(self.heads):
                wanted = h.size(0) if blocks is None else blocks[-1].num_dst  # the first rows of every later block
                logits.append(self.heads[index](h[:wanted]))
        return sum(logits, h) / (1 + len(logits))

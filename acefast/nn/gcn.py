"""Graph convolution of Kipf and Welling (ICLR 2017) with masks on edges and weights, and the network made of it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from acefast import ops
from acefast.csr import CSR
from acefast.errors import InputError
from acefast.graph import Graph
from acefast.nn.linear import MaskedLinear
from acefast.random import generator

DEGREES = ("masked", "static", "none")


class GCNConv(nn.Module):
    """y = A (x (W * m)^T) + b with A_ij = c_ij m_ij over kept edges j -> i, and c_ii on the diagonal.

    degrees "masked" or "static": c_ij = d_i^-1/2 d_j^-1/2 (``ops.gcn_norm``), where added self-loops count 1 and carry
    no mask; "none": the raw sum, c_ij = 1. Aggregates before the transform where that is cheaper.
    """

    def __init__(self, in_channels, out_channels, bias=False, self_loops=True, degrees="masked", generator=None):
        super().__init__()
        if degrees not in DEGREES:
            raise InputError(f"degrees must be one of {', '.join(DEGREES)}, got {degrees!r}")
        self.linear = MaskedLinear(in_channels, out_channels, bias=False, generator=generator)
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.self_loops, self.degrees = self_loops, degrees
        self._reset_bias(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weight and bias uniform in +-in_channels^-1/2."""
        self.linear.reset_parameters(generator)
        self._reset_bias(generator)

    @torch.no_grad()
    def _reset_bias(self, generator):
        if self.bias is not None:
            bound = max(1, self.linear.in_features) ** -0.5
            self.bias.uniform_(-bound, bound, generator=generator)

    def coefficients(self, graph: Graph, edge_mask=None, edge_keep=None) -> tuple[Tensor | None, Tensor | None]:
        """(c [E], c_self [N]) of A; None where A holds ones or no diagonal. The same for all layers of a network."""
        if self.degrees == "none":
            ones = torch.ones(graph.num_dst, device=graph.device) if self.self_loops else None
            return None, ones
        c, c_self = ops.gcn_norm(graph, edge_mask, edge_keep, add_self_loops=self.self_loops, degrees=self.degrees)
        return c, c_self if self.self_loops else None

    def forward(
        self,
        graph: Graph,
        x: Tensor | CSR,  # [N, in_channels]
        edge_mask: Tensor | None = None,  # float [E]
        edge_keep: Tensor | None = None,  # bool [E]
        weight_mask: Tensor | None = None,  # float [out_channels, in_channels]
        weight_keep: Tensor | None = None,  # bool [out_channels, in_channels]
        coefficients: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> Tensor:  # [N, out_channels]
        if coefficients is None:
            coefficients = self.coefficients(graph, edge_mask, edge_keep)
        c, c_self = coefficients

        def aggregate(h):
            return ops.spmm(graph, h, weight=c, mask=edge_mask, keep=edge_keep, self_weight=c_self)

        if not isinstance(x, CSR) and self.linear.in_features < self.linear.out_features:
            y = self.linear(aggregate(x), weight_mask, weight_keep)
        else:
            y = aggregate(self.linear(x, weight_mask, weight_keep))
        return y if self.bias is None else y + self.bias


class GCN(nn.Module):
    """Layers of :class:`GCNConv` with ReLU and dropout between them.

    Maskable weights: the linear of every layer (``maskable()``), named ``layers.<i>.linear.weight``. In training mode
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
        widths = [in_channels, *[hidden] * (layers - 1), out_channels]
        self.layers = nn.ModuleList(
            GCNConv(a, b, bias, self_loops, degrees) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.dropout = dropout
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:
        """Fresh weights from generators named after the layers."""
        for index, layer in enumerate(self.layers):
            layer.reset_parameters(generator(seed, "init", index))

    def maskable(self) -> dict[str, nn.Parameter]:
        """The weights that a search may prune, by parameter name."""
        return {f"layers.{i}.linear.weight": layer.linear.weight for i, layer in enumerate(self.layers)}

    def forward(
        self,
        graph: Graph,
        x: Tensor | CSR,  # [N, in_channels]
        edge_mask: Tensor | None = None,  # float [E]
        edge_keep: Tensor | None = None,  # bool [E]
        weight_masks: Mapping[str, Tensor] | None = None,  # float, by parameter name
        weight_keep: Mapping[str, Tensor] | None = None,  # bool, by parameter name
        seed: int = 0,
        step: int = 0,
        before_noise=None,
    ) -> Tensor:  # logits [N, out_channels]
        """``before_noise``: what the function of that name gave for the same weights, masks and patterns."""
        masks, keeps = weight_masks or {}, weight_keep or {}
        if before_noise is None:
            before_noise = self.before_noise(graph, x, edge_mask, edge_keep, masks, keeps)
        h, coefficients = before_noise
        for index, layer in enumerate(self.layers[1:], 1):
            h = ops.relu_dropout(h, self.dropout if self.training else 0.0, seed, step * len(self.layers) + index)
            name = f"layers.{index}.linear.weight"
            h = layer(graph, h, edge_mask, edge_keep, masks.get(name), keeps.get(name), coefficients)
        return h

    def before_noise(self, graph, x, edge_mask=None, edge_keep=None, weight_masks=None, weight_keep=None):
        """The first layer's sums [N, hidden] and the coefficients of the graph: the part of ``forward`` ahead of any
        dropout, which evaluation after an optimiser step and the next training step have in common."""
        layer, name = self.layers[0], "layers.0.linear.weight"
        coefficients = layer.coefficients(graph, edge_mask, edge_keep)
        mask, keep = (weight_masks or {}).get(name), (weight_keep or {}).get(name)
        return layer(graph, x, edge_mask, edge_keep, mask, keep, coefficients), coefficients

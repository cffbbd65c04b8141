"""DeeperGCN (Li et al., 2020): a deep stack of residual GENConv layers with masks, and its recomputation in backward."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acefast import ops
from acefast.csr import CSR
from acefast.errors import InputError
from acefast.graph import Graph, Selection
from acefast.nn.edges import part_of
from acefast.nn.gen import GENConv, normalised
from acefast.nn.linear import MaskedLinear
from acefast.nn.network import Network
from acefast.random import generator

NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


def kept_tensors(aggr: str, mlp_layers: int) -> int:
    """How many [N, hidden] tensors a layer keeps for its backward: its input, what goes into the convolution, the messages'
    sum, of a softmax its denominators, the MLP's input; and twice the width before and after the MLP's norm."""
    return 4 + aggr.startswith("softmax") + (4 if mlp_layers == 2 else 0)


def segment(layers: int, kept: int) -> int:
    """Layers that are computed again together in backward: of so many layers that keep `kept` tensors each, that with the fewest
    tensors at the peak, layers / k + kept * k (Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016)."""
    return min(range(1, layers + 1), key=lambda k: -(-layers // k) + kept * k)


class ResidualLayer(nn.Module):
    """h + conv(dropout(relu(norm(h)))), the block "res+" of Li et al. (fig. 2); with `edge_encoder` [F, F] behind the network's
    own encoder of edge features."""

    def __init__(self, conv: GENConv, norm: nn.Module, edge_encoder: MaskedLinear | None = None):
        super().__init__()
        self.conv, self.norm, self.edge_encoder = conv, norm, edge_encoder

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Linear maps as torch.nn.Linear from `generator`, the rest at its start."""
        self.conv.reset_parameters(generator)
        self.norm.reset_parameters()
        if self.edge_encoder is not None:
            self.edge_encoder.reset_parameters(generator)

    def maskable(self) -> dict[str, nn.Parameter]:
        """The linear maps of the convolution's MLP, by parameter name."""
        return {f"conv.{name}": weight for name, weight in self.conv.maskable().items()}

    def macs(self, graph: Graph, x: int, edge_keep: Tensor | None = None, weight_keep=None) -> int:
        """Multiply-accumulates of a call (see :meth:`acefast.nn.Network.macs`): (kept edges + N, each node itself) · channels, and
        the products of the MLP. x the number of rows."""
        keeps, passing = weight_keep or {}, graph.num_dst + (graph.num_edges if edge_keep is None else int(edge_keep.sum()))
        maps = ((name, m) for name, m in self.conv.mlp.named_children() if isinstance(m, MaskedLinear))
        products = sum(m.macs(x, keeps.get(f"conv.mlp.{name}.weight")) for name, m in maps)
        return passing * self.conv.out_channels + products

    def activated(self, h: Tensor, p: float, seed: int, step: int | Tensor) -> Tensor:
        """dropout(relu(norm(h))) [N, F]."""
        return ops.relu_dropout(normalised(self.norm, h), p, seed, step)

    def convolved(self, h, graph, edge_attr, encoder, edge_mask, edge_keep, masks, keeps) -> Tensor:
        """conv(h) [N, F]; `encoder` the network's MaskedLinear of edge features, `masks` and `keeps` by this layer's names."""
        if encoder is not None:  # two linear maps with nothing between them are one
            own = self.edge_encoder
            with torch.autocast(h.device.type, enabled=False):
                encoder = own.weight @ encoder.weight, own.weight @ encoder.bias + own.bias
        of_conv = part_of(masks, "conv."), part_of(keeps, "conv.")
        return self.conv(h, graph, edge_attr, edge_mask, edge_keep, *of_conv, encoder=encoder)


class DeeperGCN(Network):
    """Node encoder, `layers` of GENConv, linear head (Li et al., DeeperGCN, 2020, and its code for ogbn-arxiv and -proteins):

        h = conv_0(W x + b),    h = h + conv_l(dropout(relu(norm_l(h)))) for l = 1 .. L-1,    logits of dropout(relu(norm_0(h)))

    Args: aggr, t, learn_t of :class:`GENConv`, with mlp_layers linear maps (with bias) each and its norm between them; norm
        "batch" or "layer". edge_attr: features [E, D] of the graph's edges by number, constant; with them each layer adds W_l
        (W f_e + b) + b_l to the messages, which is one linear map of f_e. recompute: in training, what layers compute is not
        kept for backward but computed again there, to the bit, a `segment` of layers at a time, of which only the input is kept.
    Masks: one edge mask for all layers; weights ``layers.<i>.conv.mlp.<j>.weight``, named as by PyG's GENConv (j 0, and 4 with
        two linear maps). In training mode the dropout noise is a function of (seed, step, layer, element) alone.
    There is no ``blocks``: statistics of a batch are those of all nodes.
    """

    def __init__(
        self, in_channels, hidden, out_channels, layers=28, dropout=0.5, aggr="softmax_sg", t=0.1, learn_t=False, mlp_layers=1,
        norm="batch", edge_attr: Tensor | None = None, pruned="absent", recompute=False, seed=0,
    ):  # fmt: skip
        super().__init__()
        if norm not in NORMS:
            raise InputError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        self.node_encoder, self.lin = MaskedLinear(in_channels, hidden), MaskedLinear(hidden, out_channels)
        self.edge_encoder = None if edge_attr is None else MaskedLinear(edge_attr.size(1), hidden)
        self.register_buffer("edge_attr", edge_attr, persistent=False)
        settings = dict(aggr=aggr, t=t, learn_t=learn_t, num_layers=mlp_layers, norm=norm, bias=True, pruned=pruned)
        self.layers = nn.ModuleList(
            ResidualLayer(
                GENConv(hidden, hidden, **settings),
                NORMS[norm](hidden),
                None if edge_attr is None else MaskedLinear(hidden, hidden),
            )
            for _ in range(layers)
        )
        self.dropout, self.recompute, self.kept = dropout, recompute, kept_tensors(aggr, mlp_layers)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fresh weights from generators named after the layers and encoders."""
        super().reset_parameters(seed)
        for name in ("node_encoder", "edge_encoder", "lin"):
            if getattr(self, name) is not None:
                getattr(self, name).reset_parameters(generator(seed, "init", name))

    def macs(self, graph: Graph, x: CSR | Tensor | None, edge_keep: Tensor | None = None, weight_keep=None) -> int:
        """That of the layers + N · weights of the encoder and the head; with edge features, that of one encoder [hidden, D] at
        each kept edge in each layer."""
        nodes, count = graph.num_dst, graph.num_edges if edge_keep is None else int(edge_keep.sum())
        own = self.node_encoder.macs(x if isinstance(x, CSR) else nodes) + self.lin.macs(nodes)
        encoded = 0 if self.edge_encoder is None else len(self.layers) * self.edge_encoder.macs(count)
        layers = (
            layer.macs(graph, nodes, edge_keep, part_of(weight_keep, f"layers.{index}."))
            for index, layer in enumerate(self.layers)
        )
        return own + encoded + sum(layers)

    def compact(self, graph: Graph, edge_keep: Tensor) -> tuple[Graph, dict]:
        """The smaller graph, or the whole one with a selection where removed edges count or edges have features."""
        if self.layers[0].conv.pruned == "absent" and self.edge_attr is None:
            return super().compact(graph, edge_keep)
        return graph, {"edge_keep": graph.select(edge_keep)}

    def forward(
        self,
        graph: Graph,
        x: Tensor | CSR | None,  # [N, in_channels]; see Network.embed for None
        edge_mask: Tensor | None = None,  # float [E]
        edge_keep: Tensor | Selection | None = None,  # bool [E]
        weight_masks=None,  # float, by the names of maskable()
        weight_keep=None,  # bool, by the names of maskable(); KeptWeights of node_encoder.weight
        seed: int = 0,
        step: int | Tensor = 0,
    ) -> Tensor:  # logits [N, out_channels]
        p, count = self.dropout if self.training else 0.0, len(self.layers)
        edges = self.edge_attr, self.edge_encoder, edge_mask, edge_keep

        def part(index: int, h: Tensor) -> Tensor:
            layer, prefix = self.layers[index], f"layers.{index}."
            own = part_of(weight_masks, prefix), part_of(weight_keep, prefix)
            if not index:
                return layer.convolved(h, graph, *edges, *own)
            return layer.convolved(layer.activated(h, p, seed, step * count + index), graph, *edges, *own).add_(h)

        def parts(begin: int, end: int, h: Tensor) -> Tensor:
            for index in range(begin, end):
                h = part(index, h)
            return h

        h = self.node_encoder(self.given(x), keep=(weight_keep or {}).get("node_encoder.weight"))
        if self.recompute and self.training and torch.is_grad_enabled():
            size = segment(count, self.kept)
            for begin in range(0, count, size):
                end = min(begin + size, count)
                h = checkpoint(
                    parts, begin, end, h, use_reentrant=False, preserve_rng_state=False,
                    context_fn=lambda part=self.layers[begin:end]: (nullcontext(), statistics_kept(part)),
                )  # fmt: skip
        else:
            h = parts(0, count, h)
        return self.lin(self.layers[0].activated(h, p, seed, step * count))


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, a forward pass in training mode changes copies of the buffers of `module`: what is computed again in backward
    counts once in the running statistics."""
    kept = [(m, name, b) for m in module.modules() for name, b in m.named_buffers(recurse=False)]
    for owner, name, buffer in kept:
        setattr(owner, name, buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in kept:
            setattr(owner, name, buffer)

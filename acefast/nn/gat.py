"""Graph attention layer of Velickovic et al. (ICLR 2018) with masks on edges and weights, and the network made of it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from acefast import ops
from acefast.csr import CSR
from acefast.errors import InputError
from acefast.graph import Block, Graph, Selection
from acefast.nn.dropout import dropout
from acefast.nn.edges import as_graph, part_of, with_self_loops
from acefast.nn.linear import MaskedLinear
from acefast.nn.network import Network
from acefast.ops.reference import accumulator


class _WideProduct(torch.autograd.Function):
    """x [N, K] times b [K, M] in b's dtype; backward makes the wide copy of x again, in place of keeping it."""

    @staticmethod
    def forward(ctx, x, b):
        ctx.save_for_backward(x, b)
        return x.to(b.dtype) @ b

    @staticmethod
    def backward(ctx, dy):
        x, b = ctx.saved_tensors
        return (dy @ b.t()).to(x.dtype), x.to(b.dtype).t() @ dy


def attention_terms(z: Tensor, *attention: Tensor) -> list[Tensor]:
    """<att_h, z_nh> [N, H] for each `att` [1, H, C], z [N, H, C]; in att's dtype. One product with block-diagonal matrices, so
    that no other [N, H, C] is kept for them."""
    heads, width = z.shape[1:]
    eye = torch.eye(heads, dtype=attention[0].dtype, device=z.device).unsqueeze(1)
    blocks = torch.cat([(eye * att[0].unsqueeze(2)).reshape(heads * width, heads) for att in attention], 1)
    with torch.autocast(z.device.type, enabled=False):
        rows = z.flatten(1)
        terms = rows @ blocks if rows.dtype == blocks.dtype else _WideProduct.apply(rows, blocks)
    return [terms[:, i * heads : (i + 1) * heads] for i in range(len(attention))]


class GATConv(nn.Module):
    """Multi-head attention over the kept edges (``ops.gat``), heads side by side (`concat`) or averaged.

    z = x (W * m)^T [N, H, C]; a_src = <att_src, z>, a_dst = <att_dst, z> per head. `add_self_loops` gives a loop with mask 1
    to each node that has none. `mask_on` "message" or "logit": where the edge mask acts. Parameters are named as PyG's:
    lin.weight (lin_src.weight and lin_dst.weight for a pair of in_channels), att_src, att_dst [1, H, C], bias, res.weight.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        heads: int = 1,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        add_self_loops: bool = True,
        bias: bool = True,
        residual: bool = False,
        mask_on: str = "message",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.heads, self.out_channels, self.concat = heads, out_channels, concat
        self.negative_slope, self.dropout, self.add_self_loops, self.mask_on = negative_slope, dropout, add_self_loops, mask_on
        width = heads * out_channels if concat else out_channels
        if isinstance(in_channels, int):
            self.lin = MaskedLinear(in_channels, heads * out_channels, bias=False)
        else:
            self.lin_src, self.lin_dst = (MaskedLinear(channels, heads * out_channels, bias=False) for channels in in_channels)
        self.att_src, self.att_dst = (nn.Parameter(torch.empty(1, heads, out_channels)) for _ in range(2))
        last = in_channels if isinstance(in_channels, int) else in_channels[1]
        self.res = MaskedLinear(last, width, bias=False) if residual else None
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights and attention vectors by Glorot's uniform rule, bias 0, as PyG."""
        for parameter in (*self.maskable().values(), self.att_src, self.att_dst):
            bound = math.sqrt(6.0 / (parameter.size(-2) + parameter.size(-1)))
            parameter.uniform_(-bound, bound, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def maskable(self) -> dict[str, nn.Parameter]:
        """The weights that a search may prune, by parameter name."""
        return {f"{name}.weight": m.weight for name, m in self.named_children() if isinstance(m, MaskedLinear)}

    def macs(self, graph: Graph, x: CSR | int, edge_keep: Tensor | None = None, weight_keep=None) -> int:
        """Multiply-accumulates of a call (see :meth:`acefast.nn.Network.macs`): the products' + (2 N + kept edges + added
        self-loops) · heads · channels, 2 N of them for the attention terms. x sparse, or the number of dense rows, and the
        same for sources and destinations."""
        passing = 2 * graph.num_dst + (graph.num_edges if edge_keep is None else int(edge_keep.sum()))
        if self.add_self_loops:
            passing += int(graph.missing_self_loops(edge_keep).sum())
        keeps = weight_keep or {}
        products = sum(getattr(self, name.removesuffix(".weight")).macs(x, keeps.get(name)) for name in self.maskable())
        return products + passing * self.heads * self.out_channels

    def forward(
        self,
        x: Tensor | CSR | tuple[Tensor, Tensor],  # [N, in_channels], or of sources and destinations
        edge_index: Graph | Tensor,  # or int [2, E], or a Block
        edge_mask: Tensor | None = None,  # float [E] or [E, H]
        edge_keep: Tensor | Selection | None = None,  # bool [E]
        weight_masks: Mapping[str, Tensor] | None = None,  # float, by the names of maskable()
        weight_keep: Mapping[str, Tensor] | None = None,  # bool, by the names of maskable()
        seed: int | None = None,
        step: int | Tensor = 0,
    ) -> Tensor:  # [N, H C], or [N, C] averaged
        """`seed` and `step` of the attention dropout, as of ``ops.gat``; without a seed torch's generator gives it."""
        masks, keeps = weight_masks or {}, weight_keep or {}

        def linear(name, h):
            return getattr(self, name)(h, masks.get(f"{name}.weight"), keeps.get(f"{name}.weight"))

        x_src, x_dst = x if isinstance(x, tuple) else (x, x)
        block = isinstance(edge_index, Block) and x_src is x_dst and hasattr(self, "lin")
        graph = edge_index if block else as_graph(edge_index, (x_src.shape[0], x_dst.shape[0]))
        if self.add_self_loops:
            graph, edge_mask, edge_keep = with_self_loops(graph, edge_mask, edge_keep)
        shared = hasattr(self, "lin")
        z = linear("lin" if shared else "lin_src", x_src).view(-1, self.heads, self.out_channels)
        z_dst = z
        if not (shared and x_dst is x_src):
            z_dst = linear("lin" if shared else "lin_dst", x_dst).view(-1, self.heads, self.out_channels)
        dtype = accumulator(z.dtype)
        att_src, att_dst = self.att_src.to(dtype), self.att_dst.to(dtype)
        if z_dst is z:
            a_src, a_dst = attention_terms(z, att_src, att_dst)
            a_dst = a_dst[: graph.num_dst]  # on a Block, whose destinations are the first of its sources
        else:
            (a_src,), (a_dst,) = attention_terms(z, att_src), attention_terms(z_dst, att_dst)
        y = ops.gat(
            graph, z, a_src, a_dst, edge_mask, edge_keep, self.mask_on, self.negative_slope,
            self.dropout, self._seed(seed), self.training, step=step,
        )  # fmt: skip
        y = y.flatten(1) if self.concat else y.mean(1)
        if self.res is not None:
            y = y + linear("res", x_dst)[: graph.num_dst]
        return y if self.bias is None else (y + self.bias).to(y.dtype)

    def _seed(self, seed: int | None) -> int:
        if seed is not None:
            return seed
        if not self.training or self.dropout == 0:
            return 0
        if torch.compiler.is_compiling():
            raise InputError("GATConv: compiled code with attention dropout needs an explicit seed")
        return int(torch.randint(2**62, ()))


class GAT(Network):
    """The GAT of Velickovic et al. as UGS uses it (Chen et al., ICML 2021): layers of :class:`GATConv` with `heads` heads of
    `hidden` channels side by side, a last layer with one head, ELU between them; dropout on every layer's input and attention.

    No biases. The layers add no self-loops: those of ``acefast.search`` are edges of the graph and carry masks. Maskable
    weights: ``layers.<i>.lin.weight``. With `pruned` "in_denominator" a removed edge has logit 0 and still passes its message,
    and masks act on the logits (the released code's and UGS's semantics). In training mode the noise is a function of (seed,
    step, layer, element) alone.
    """

    def __init__(self, in_channels, hidden, out_channels, layers=2, heads=8, dropout=0.6, pruned="absent", seed=0):
        super().__init__()
        mask_on = "message" if pruned == "absent" else "logit"
        widths = [in_channels, *[hidden * heads] * (layers - 1)]
        shapes = [(width, hidden, heads) for width in widths[:-1]] + [(widths[-1], out_channels, 1)]
        self.layers = nn.ModuleList(
            GATConv(width, out, count, dropout=dropout, add_self_loops=False, bias=False, mask_on=mask_on)
            for width, out, count in shapes
        )
        self.dropout, self.pruned = dropout, pruned
        self.reset_parameters(seed)

    def blocks(self, graph: Graph, nodes: Tensor, edge_keep=None) -> list[Block] | None:
        """The part of the graph that the logits of ``nodes`` depend on, a block for each layer; None where removed edges pass
        messages, which blocks do not hold."""
        return graph.blocks(nodes, len(self.layers), edge_keep) if self.pruned == "absent" else None

    def macs(self, graph, x, edge_keep=None, weight_keep=None) -> int:
        """With `pruned` "in_denominator" every edge passes its message, a removed one too."""
        return super().macs(graph, x, edge_keep if self.pruned == "absent" else None, weight_keep)

    def compact(self, graph: Graph, edge_keep: Tensor) -> tuple[Graph, dict]:
        """The smaller graph, or the whole one with a selection where removed edges pass messages."""
        if self.pruned == "absent":
            return super().compact(graph, edge_keep)
        return graph, {"edge_keep": graph.select(edge_keep)}

    def forward(self, graph, x, edge_mask=None, edge_keep=None, weight_masks=None, weight_keep=None, seed=0, step=0, blocks=None):
        """Arguments and result as :meth:`acefast.nn.GCN.forward`."""
        if self.pruned != "absent" and edge_keep is not None:
            flags = edge_keep.keep if isinstance(edge_keep, Selection) else edge_keep
            edge_mask, edge_keep = flags.float() if edge_mask is None else edge_mask * flags, None
        p, h = self.dropout if self.training else 0.0, self.given(x)
        for index, layer in enumerate(self.layers):
            part = graph if blocks is None else blocks[index]
            rows, kept = (part.src_nodes, None) if isinstance(part, Block) else (None, edge_keep)
            noise = 2 * (step * len(self.layers) + index)  # the input's; the attention's is the next one
            h = ops.elu_dropout(h, p, seed, noise, rows) if index else dropout(h, p, seed, noise, rows)
            own = part_of(weight_masks, f"layers.{index}."), part_of(weight_keep, f"layers.{index}.")
            h = layer(h, part, edge_mask, kept, *own, seed=seed, step=noise + 1)
        return h

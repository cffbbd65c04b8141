"""Graph attention layer of Velickovic et al. (ICLR 2018) with masks on edges and weights."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from acefast import ops
from acefast.errors import InputError
from acefast.graph import Graph, Selection
from acefast.nn.edges import as_graph, with_self_loops
from acefast.nn.linear import MaskedLinear
from acefast.ops.reference import accumulator


def attention_terms(z: Tensor, *attention: Tensor) -> list[Tensor]:
    """<att_h, z_nh> [N, H] for each `att` [1, H, C], z [N, H, C]; in att's dtype. One product with block-diagonal matrices, so
    that no other [N, H, C] is made for them."""
    heads, width = z.shape[1:]
    eye = torch.eye(heads, dtype=attention[0].dtype, device=z.device).unsqueeze(1)
    blocks = torch.cat([(eye * att[0].unsqueeze(2)).reshape(heads * width, heads) for att in attention], 1)
    with torch.autocast(z.device.type, enabled=False):
        terms = z.flatten(1).to(blocks.dtype) @ blocks
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

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],  # [N, in_channels], or of sources and destinations
        edge_index: Graph | Tensor,  # or int [2, E]
        edge_mask: Tensor | None = None,  # float [E] or [E, H]
        edge_keep: Tensor | Selection | None = None,  # bool [E]
        weight_masks: Mapping[str, Tensor] | None = None,  # float, by the names of maskable()
        weight_keep: Mapping[str, Tensor] | None = None,  # bool, by the names of maskable()
        seed: int | None = None,
    ) -> Tensor:  # [N, H C], or [N, C] averaged
        """`seed` of the attention dropout; without one torch's generator gives it."""
        masks, keeps = weight_masks or {}, weight_keep or {}

        def linear(name, h):
            return getattr(self, name)(h, masks.get(f"{name}.weight"), keeps.get(f"{name}.weight"))

        x_src, x_dst = x if isinstance(x, tuple) else (x, x)
        graph = as_graph(edge_index, (x_src.size(0), x_dst.size(0)))
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
        else:
            (a_src,), (a_dst,) = attention_terms(z, att_src), attention_terms(z_dst, att_dst)
        y = ops.gat(
            graph, z, a_src, a_dst, edge_mask, edge_keep, self.mask_on, self.negative_slope,
            self.dropout, self._seed(seed), self.training,
        )  # fmt: skip
        y = y.flatten(1) if self.concat else y.mean(1)
        if self.res is not None:
            y = y + linear("res", x_dst)
        return y if self.bias is None else (y + self.bias).to(y.dtype)

    def _seed(self, seed: int | None) -> int:
        if seed is not None:
            return seed
        if not self.training or self.dropout == 0:
            return 0
        if torch.compiler.is_compiling():
            raise InputError("GATConv: compiled code with attention dropout needs an explicit seed")
        return int(torch.randint(2**62, ()))

"""GENConv and the residual block of DeeperGCN (Li et al., 2020) with masks on edges and weights."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acefast import ops
from acefast.errors import InputError
from acefast.graph import Graph, Selection
from acefast.nn.edges import as_graph
from acefast.nn.linear import MaskedLinear

_NORMS = {
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
    "instance": nn.InstanceNorm1d,
}
_PYG_NAMES = {"add": "sum", "powermean": "power"}
BLOCKS = ("res+", "res", "dense", "plain")


class _Aggregation(nn.Module):
    """t and p of the aggregation, each a parameter [1] where it is learned, else a number."""

    def __init__(self, t, learn_t, p, learn_p):
        super().__init__()
        self.initial = {"t": t, "p": p}
        self.t = nn.Parameter(torch.empty(1)) if learn_t else t
        self.p = nn.Parameter(torch.empty(1)) if learn_p else p
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, self.initial[name])


def normalised(norm: nn.Module, h: Tensor) -> Tensor:
    """norm(h) in h's dtype, its statistics in float32. Factors of a LayerNorm take h's dtype: its CUDA kernel has one for both,
    and an autocast region would keep a float32 copy of h for backward."""
    if not isinstance(norm, nn.LayerNorm) or all(factor.dtype == h.dtype for factor in norm.parameters()):
        return norm(h)
    factors = (None if factor is None else factor.to(h.dtype) for factor in (norm.weight, norm.bias))
    with torch.autocast(h.device.type, enabled=False):
        return F.layer_norm(h, norm.normalized_shape, *factors, norm.eps)


class MessageNorm(nn.Module):
    """y = scale * |x|_2 * m / |m|_2 per row (Li et al., eq. 8); `scale` [1] is learned with `learn_scale`."""

    def __init__(self, learn_scale: bool = False):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=learn_scale)

    def forward(self, x: Tensor, message: Tensor) -> Tensor:
        return F.normalize(message, p=2.0, dim=-1) * x.norm(p=2, dim=-1, keepdim=True) * self.scale


class GENConv(nn.Module):
    """y_i = MLP(x_i + AGG over kept edges e: j -> i of (relu(x_j + edge_e) + eps) m_e) (``ops.gen``; Li et al., eqs. 3-7).

    `aggr`: softmax, softmax_sg, softmax_sum, power (powermean), mean, max, sum (add). With `edge_dim` other than out_channels
    the edge features [E, edge_dim] go through lin_edge inside the kernel; without, they are [E, out_channels]. `pruned` as in
    ``ops.gen``. Parameters are named as PyG's: lin_src, lin_dst, lin_edge, aggr_module.t or .p, msg_norm.scale,
    mlp.<i>; `sum_power`, the s of softmax_sum, is learned with `learn_s`.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        aggr: str = "softmax",
        t: float = 1.0,
        learn_t: bool = False,
        p: float = 1.0,
        learn_p: bool = False,
        msg_norm: bool = False,
        learn_msg_scale: bool = False,
        norm: str | None = "batch",
        num_layers: int = 2,
        expansion: int = 2,
        eps: float = 1e-7,
        bias: bool = False,
        edge_dim: int | None = None,
        s: float = 0.0,
        learn_s: bool = False,
        pruned: str = "absent",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if norm is not None and norm not in _NORMS:
            raise InputError(f"norm must be None or one of {', '.join(_NORMS)}, got {norm!r}")
        self.aggr, self.eps, self.pruned, self.out_channels = _PYG_NAMES.get(aggr, aggr), eps, pruned, out_channels
        sources, destinations = (in_channels, in_channels) if isinstance(in_channels, int) else in_channels
        if sources != out_channels:
            self.lin_src = MaskedLinear(sources, out_channels, bias=bias)
        if edge_dim is not None and edge_dim != out_channels:
            self.lin_edge = MaskedLinear(edge_dim, out_channels, bias=bias)
        if destinations != out_channels:
            self.lin_dst = MaskedLinear(destinations, out_channels, bias=bias)
        self.aggr_module = _Aggregation(t, learn_t, p, learn_p)
        self.sum_power = nn.Parameter(torch.tensor([float(s)])) if learn_s else s
        widths = [out_channels, *[out_channels * expansion] * (num_layers - 1), out_channels]
        self.mlp = nn.Sequential()
        for index, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            self.mlp.append(MaskedLinear(a, b, bias=bias))
            if index < num_layers - 1:
                if norm is not None:
                    self.mlp.append(_NORMS[norm](b))
                self.mlp.append(nn.ReLU())
                self.mlp.append(nn.Dropout(0.0))  # keeps the places of PyG's names
        if msg_norm:
            self.msg_norm = MessageNorm(learn_msg_scale)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Linear maps as torch.nn.Linear from `generator`, norms and aggregation at their start."""
        for module in self.modules():
            if isinstance(module, MaskedLinear):
                module.reset_parameters(generator)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def maskable(self) -> dict[str, nn.Parameter]:
        """The weights that a search may prune, by parameter name."""
        return {f"{name}.weight": m.weight for name, m in self.named_modules() if isinstance(m, MaskedLinear)}

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],  # [N, in_channels], or of sources and destinations
        edge_index: Graph | Tensor,  # or int [2, E]
        edge_attr: Tensor | None = None,  # [E, edge_dim], or [E, out_channels] where there is no lin_edge
        edge_mask: Tensor | None = None,  # float [E]
        edge_keep: Tensor | Selection | None = None,  # bool [E]
        weight_masks: Mapping[str, Tensor] | None = None,  # float, by the names of maskable()
        weight_keep: Mapping[str, Tensor] | None = None,  # bool, by the names of maskable()
        mask_grad: str = "kept",
        encoder: tuple[Tensor, Tensor] | None = None,  # [out_channels, D] and [out_channels], of edge_attr [E, D]
    ) -> Tensor:  # [N, out_channels]
        """`encoder` takes the place of lin_edge."""
        masks, keeps = weight_masks or {}, weight_keep or {}

        def linear(name, h):
            return self.get_submodule(name)(h, masks.get(f"{name}.weight"), keeps.get(f"{name}.weight"))

        x_src, x_dst = x if isinstance(x, tuple) else (x, x)
        graph = as_graph(edge_index, (x_src.size(0), x_dst.size(0)))
        source = linear("lin_src", x_src) if hasattr(self, "lin_src") else x_src
        if edge_attr is not None:
            edge_attr = edge_attr.to(source.dtype)
            if encoder is None and hasattr(self, "lin_edge"):
                encoder = self._encoder(masks, keeps)
        y = ops.gen(
            graph, source, edge_attr, *(encoder or (None, None)), mask=edge_mask, keep=edge_keep, aggr=self.aggr, t=self.aggr_module.t,
            p=self.aggr_module.p, s=self.sum_power, eps=self.eps, mask_grad=mask_grad, pruned=self.pruned,
        )  # fmt: skip
        if hasattr(self, "msg_norm"):
            y = self.msg_norm(x_dst, y)
        y = y + (linear("lin_dst", x_dst) if hasattr(self, "lin_dst") else x_dst)
        for name, module in self.mlp.named_children():
            y = linear(f"mlp.{name}", y) if isinstance(module, MaskedLinear) else normalised(module, y)
        return y

    def _encoder(self, masks, keeps):
        """(W * m * keep, b) of lin_edge: small enough to be made."""
        layer, weight = self.lin_edge, self.lin_edge.weight
        mask, keep = masks.get("lin_edge.weight"), keeps.get("lin_edge.weight", layer.keep)
        if mask is not None:
            weight = weight * mask
        if keep is not None:
            weight = torch.where(keep, weight, 0.0)
        return weight, layer.bias


class ResGCN(nn.Module):
    """Residual block around a convolution (Li et al., fig. 2), with the arguments of PyG's DeepGCNLayer:

        res+   x + conv(dropout(act(norm(x))))          res    dropout(x + act(norm(conv(x))))
        dense  dropout([x, act(norm(conv(x)))])         plain  dropout(act(norm(conv(x))))

    `ckpt_grad` recomputes the convolution in backward instead of keeping what it needs. Further arguments of a call (edges,
    masks) go to `conv`.
    """

    def __init__(
        self,
        conv: nn.Module | None = None,
        norm: nn.Module | None = None,
        act: nn.Module | None = None,
        block: str = "res+",
        dropout: float = 0.0,
        ckpt_grad: bool = False,
    ):
        super().__init__()
        if block.lower() not in BLOCKS:
            raise InputError(f"block must be one of {', '.join(BLOCKS)}, got {block!r}")
        self.conv, self.norm, self.act = conv, norm, act
        self.block, self.dropout, self.ckpt_grad = block.lower(), dropout, ckpt_grad

    def reset_parameters(self) -> None:
        for module in (self.conv, self.norm):
            if module is not None:
                module.reset_parameters()

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.block == "res+":
            h = F.dropout(self._normalised(x), p=self.dropout, training=self.training)
            return x + self._convolved(h, *args, **kwargs)
        h = self._normalised(self._convolved(x, *args, **kwargs))
        if self.block == "res":
            h = x + h
        elif self.block == "dense":
            h = torch.cat((x, h), dim=-1)
        return F.dropout(h, p=self.dropout, training=self.training)

    def _normalised(self, h):
        h = h if self.norm is None else normalised(self.norm, h)
        return h if self.act is None else self.act(h)

    def _convolved(self, h, *args, **kwargs):
        if self.conv is None:
            return h
        if self.ckpt_grad and h.requires_grad:
            return checkpoint(self.conv, h, *args, use_reentrant=False, **kwargs)
        return self.conv(h, *args, **kwargs)

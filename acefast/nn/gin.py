"""Graph isomorphism layer of Xu et al. (ICLR 2019) with masks on edges."""

import torch
from torch import Tensor, nn

from acefast import ops
from acefast.graph import Graph, Selection
from acefast.nn.edges import as_graph


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

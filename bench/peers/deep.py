"""DeeperGCN the usual way: PyG's GENConv and DeepGCNLayer, E x F messages times an edge mask, convolutions checkpointed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import DeepGCNLayer, GENConv


class MaskedGENConv(GENConv):
    """GENConv of equal widths without edge features, each message times its edge's mask [E]."""

    def forward(self, x: Tensor, edge_index: Tensor, edge_mask: Tensor) -> Tensor:
        # propagate_type: (x: OptPairTensor, edge_mask: Tensor)
        return self.mlp(self.propagate(edge_index, x=(x, x), edge_mask=edge_mask) + x)

    def message(self, x_j: Tensor, edge_mask: Tensor) -> Tensor:
        return (x_j.relu() + self.eps) * edge_mask.unsqueeze(1)


class DeeperGCN(nn.Module):
    """The network of PyG's example for ogbn-proteins, with batch norm and one linear map a layer; parameters are named as those
    of acefast.nn.DeeperGCN. With `checkpoints` each convolution is computed again in backward."""

    def __init__(self, in_channels, hidden, out_channels, layers, aggr="softmax_sg", t=0.1, learn_t=False, checkpoints=True):
        super().__init__()
        self.checkpoints = checkpoints
        self.node_encoder, self.lin = nn.Linear(in_channels, hidden), nn.Linear(hidden, out_channels)
        self.layers = nn.ModuleList(
            DeepGCNLayer(
                MaskedGENConv(hidden, hidden, aggr=aggr, t=t, learn_t=learn_t, num_layers=1, bias=True),
                nn.BatchNorm1d(hidden), nn.ReLU(), ckpt_grad=checkpoints,
            )
            for _ in range(layers)
        )  # fmt: skip

    def forward(self, x: Tensor, edge_index: Tensor, edge_mask: Tensor) -> Tensor:  # logits [N, out_channels]
        first = self.layers[0]
        h = self.node_encoder(x)
        if self.checkpoints:
            h = checkpoint(first.conv, h, edge_index, edge_mask, use_reentrant=False)
        else:
            h = first.conv(h, edge_index, edge_mask)
        for layer in self.layers[1:]:
            h = layer(h, edge_index, edge_mask)
        return self.lin(F.relu(first.norm(h)))

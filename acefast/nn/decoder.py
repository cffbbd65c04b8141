"""Scores of pairs of nodes by the outputs of a network: what a link is told by.

A decoder has

    prepare(pairs, num_nodes)              what it reads of pairs int64 [P, 2] of so many nodes, made once for many calls
    decoder(prepared, z, seed, step)       [P]: the scores by the outputs z [num_nodes, C]; differentiable
"""

import torch
from torch import Tensor, nn

from acefast import ops
from acefast.graph import Graph
from acefast.nn.linear import MaskedLinear
from acefast.random import generator, named_seed

CHUNK = 2**16  # pairs at a time: what is not kept for a backward pass is at most so many rows


class ScalarProduct(nn.Module):
    """s_ij = <z_i, z_j> (UGS, Chen et al., ICML 2021, code). An ``sddmm`` over the pairs, so no [P, C] is made."""

    def prepare(self, pairs: Tensor, num_nodes: int) -> Graph:
        return Graph.from_edge_index(pairs.T, num_nodes=num_nodes)

    def forward(self, pairs: Graph, z: Tensor, seed: int = 0, step: int = 0) -> Tensor:
        return ops.sddmm(pairs, z, z)


class HadamardMLP(nn.Module):
    """s_ij = w_2 dropout(relu(W_1 (z_i * z_j) + b_1)) + b_2, with W_1 [C, C] (the link predictor of OGB's examples, Hu et al.,
    NeurIPS 2020). Symmetric in i and j; never masked.

    The rows z_i are gathered by an ``spmm`` of one entry a row, whose backward pass is a sum in a fixed order. In training mode
    the dropout noise is a function of (seed, step, pair, channel) alone.
    """

    def __init__(self, channels: int, dropout: float = 0.5, seed: int = 0):
        super().__init__()
        self.hidden, self.score, self.dropout = MaskedLinear(channels, channels), MaskedLinear(channels, 1), dropout
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:
        """Uniform in +-C^-1/2, from generators named after the layers."""
        for name, layer in self.named_children():
            layer.reset_parameters(generator(seed, "init", "decoder", name))

    def prepare(self, pairs: Tensor, num_nodes: int) -> list[tuple[Graph, Graph]]:
        return [
            tuple(
                Graph.from_edge_index(torch.stack((ends, torch.arange(len(ends), device=ends.device))), (num_nodes, len(ends)))
                for ends in chunk.unbind(1)
            )
            for chunk in pairs.split(CHUNK)
        ]  # fmt: skip

    def forward(self, pairs: list[tuple[Graph, Graph]], z: Tensor, seed: int = 0, step: int = 0) -> Tensor:
        scores = []
        for index, (one, two) in enumerate(pairs):
            h = self.hidden(ops.spmm(one, z) * ops.spmm(two, z))
            h = ops.relu_dropout(h, self.dropout if self.training else 0.0, named_seed(seed, index), step)
            scores.append(self.score(h).squeeze(1))
        return torch.cat(scores)


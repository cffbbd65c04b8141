"""The kernels. Each page holds one op: docstring with the formula, checks, fake and autograd; `reference` computes it in
plain torch, `backend` chooses what runs."""

from acefast.ops import compact as _compact  # noqa: F401  (registers what Graph.compact and Graph.select call)
from acefast.ops.edge_softmax import edge_softmax
from acefast.ops.exchange import exchange
from acefast.ops.gat import gat
from acefast.ops.gcn_norm import gcn_norm
from acefast.ops.gen import gen
from acefast.ops.gumbel_topk import gumbel_topk
from acefast.ops.masked_adam import AdamSettings, masked_adam
from acefast.ops.masked_linear import masked_linear
from acefast.ops.relu_dropout import elu_dropout, relu_dropout
from acefast.ops.sddmm import sddmm
from acefast.ops.spmm import spmm
from acefast.ops.topk_mask import topk_mask

__all__ = [
    "AdamSettings",
    "edge_softmax",
    "elu_dropout",
    "exchange",
    "gat",
    "gcn_norm",
    "gen",
    "gumbel_topk",
    "masked_adam",
    "masked_linear",
    "relu_dropout",
    "sddmm",
    "spmm",
    "topk_mask",
]

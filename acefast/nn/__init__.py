"""Masked layers and networks, built on nothing but ``acefast.ops``."""

from acefast.errors import InputError
from acefast.nn.decoder import HadamardMLP, ScalarProduct
from acefast.nn.dropout import dropout
from acefast.nn.gat import GAT, GATConv
from acefast.nn.gcn import GCN, GCNConv
from acefast.nn.gen import GENConv, MessageNorm, ResGCN
from acefast.nn.gin import GIN, GINConv
from acefast.nn.linear import MaskedLinear
from acefast.nn.network import Network, state_of
from acefast.nn.resgcn import DeeperGCN
from acefast.nn.sage import SAGE

BACKBONES = {"gcn": GCN, "gin": GIN, "gat": GAT, "sage": SAGE, "resgcn": DeeperGCN}


def build(backbone: str, in_channels: int, out_channels: int, seed: int = 0, **settings):
    """The network called ``backbone`` with weights drawn from ``seed``; raises InputError for an unknown name.

    ``settings``: hidden, layers, dropout, and what else the network's constructor takes.
    """
    if backbone not in BACKBONES:
        raise InputError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
    return BACKBONES[backbone](in_channels, out_channels=out_channels, seed=seed, **settings)


__all__ = [
    "BACKBONES",
    "GAT",
    "GCN",
    "GIN",
    "SAGE",
    "DeeperGCN",
    "GATConv",
    "GCNConv",
    "GENConv",
    "GINConv",
    "HadamardMLP",
    "MaskedLinear",
    "MessageNorm",
    "Network",
    "ResGCN",
    "ScalarProduct",
    "build",
    "dropout",
    "state_of",
]

"""`python -m bench epoch`: seconds and memory of training epochs of two masked networks on one graph.

A GCN with soft masks on edges and weights (acefast.nn.GCN, 3 layers), and residual blocks of GENConv with the learned
softmax and a soft edge mask (acefast.nn.ResGCN), as in DeeperGCN. Features and labels are random: this
measures, it does not learn. An epoch is forward, cross-entropy over all nodes, backward and a step of Adam.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import nn

from acefast import Graph
from acefast.nn import GCN, GENConv, ResGCN
from bench import graphs
from bench.harness import environment, measured, timed
from tests.inputs import REPOSITORY, data_folder

CLASSES = 40  # of ogbn-arxiv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=graphs.SHAPES, default="arxiv", metavar="SHAPE")
    parser.add_argument("--scale", type=float)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=7, help="residual blocks of the second network")
    parser.add_argument("--epochs", type=int, default=5, help="epochs that are timed, after one that is not")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--json", type=Path)


class ResidualGEN(nn.Module):
    """Encoder, residual blocks of GENConv with a learned t each, decoder."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, blocks: int):
        super().__init__()
        self.encode, self.decode = nn.Linear(in_channels, hidden), nn.Linear(hidden, out_channels)
        self.blocks = nn.ModuleList(
            ResGCN(GENConv(hidden, hidden, learn_t=True, num_layers=1), nn.LayerNorm(hidden), nn.ReLU()) for _ in range(blocks)
        )

    def forward(self, graph: Graph, x, edge_mask):
        x = self.encode(x)
        for block in self.blocks:
            x = block(x, graph, edge_mask=edge_mask)
        return self.decode(x)


def main(options: argparse.Namespace, arguments: list[str]) -> int:
    root = options.data_root or next((f for f in (data_folder(), REPOSITORY / ".data") if f.is_dir()), None)
    title, g = graphs.load(options.shape, options.scale, options.device, root)
    torch.manual_seed(0)
    x = torch.randn(g.num_src, options.features).to(options.device)
    labels = torch.randint(0, CLASSES, (g.num_dst,)).to(options.device)
    edge_mask = torch.ones(g.num_edges, device=options.device, requires_grad=True)
    gcn = GCN(options.features, options.features, CLASSES, layers=3).to(options.device)
    weight_masks = {name: torch.ones_like(w).requires_grad_() for name, w in gcn.maskable().items()}
    stack = ResidualGEN(options.features, options.features, CLASSES, options.blocks).to(options.device)
    networks = {
        "gcn, 3 layers": (gcn, lambda: gcn(g, x, edge_mask, weight_masks=weight_masks), [edge_mask, *weight_masks.values()]),
        f"resgen, {options.blocks} blocks": (stack, lambda: stack(g, x, edge_mask), [edge_mask]),
    }
    results = []
    for name, (network, logits, masks) in networks.items():
        optimizer = torch.optim.Adam([*network.parameters(), *masks], lr=1e-3)

        def epoch(logits=logits, optimizer=optimizer):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(logits(), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        first = float(epoch())
        _, _, peak = measured(epoch, options.device)
        seconds = [timed(epoch, options.device) for _ in range(options.epochs)]
        last = float(epoch())
        results.append(
            {"network": name, "shape": f"{title} N={g.num_src} E={g.num_edges} F={options.features}", "device": options.device,
             "median_s": statistics.median(seconds), "min_s": min(seconds), "repeats": len(seconds), "peak_bytes": peak,
             "first_loss": first, "last_loss": last, "ok": last < first}
        )  # fmt: skip
        print(f"{name:<16} {title}: {statistics.median(seconds) * 1e3:.1f} ms an epoch, peak {peak / 2**20:.0f} MiB, "
              f"loss {first:.4f} -> {last:.4f}")  # fmt: skip
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": environment(), "epochs": results}, indent=1) + "\n")
    return 0 if all(result["ok"] for result in results) else 1

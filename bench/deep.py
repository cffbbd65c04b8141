"""`python -m bench deep`: time and memory of DeeperGCN's training step over its depth, against the same network on PyG.

Residual layers of GENConv (softmax_sg, t 0.1, batch norm, one linear map a layer) with a soft edge mask shared by all layers:
forward, cross-entropy over all nodes, backward to weights and mask. Features and labels are random, and dropout is off, so that
losses and gradients can be held against each other before anything is timed: PyG's against acefast's in float64, since on a large
graph roundings decide for a few of the many inputs of a ReLU whether they pass, which moves gradients by more than rounding does.
acefast keeps its activations or computes them again; PyG checkpoints its convolutions. Where PyG does not fit, it is timed with fewer layers (--peer-layers), and the
figures by layer are those to compare.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from acefast.nn import DeeperGCN
from bench import graphs
from bench.harness import compare, copy_bandwidth, environment, limit_memory
from tests.inputs import REPOSITORY, data_folder

CLASSES = 40  # of ogbn-arxiv
ROUNDING = 2e-5  # of one layer, by norm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=graphs.SHAPES, default="arxiv", metavar="SHAPE")
    parser.add_argument("--scale", type=float, help="shrinks the graph at constant degree; 1: the real one where it is there")
    parser.add_argument("--layers", type=int, nargs="+", default=[28], help="depths; default: 28")
    parser.add_argument("--peer-layers", type=int, default=28, help="the deepest that PyG is run with; default: 28")
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing for each implementation")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--json", type=Path)


def networks(layers: int, features: int, device: str = "cpu", peer: bool = True) -> dict:
    """name -> the network with the same weights, with random features; the first is ours."""
    ours = {
        "acefast": DeeperGCN(features, features, CLASSES, layers=layers, dropout=0.0, seed=1),
        "acefast, recomputed": DeeperGCN(features, features, CLASSES, layers=layers, dropout=0.0, recompute=True, seed=1),
    }
    if peer:
        from bench.peers import deep

        ours["pyg, checkpoints"] = deep.DeeperGCN(features, features, CLASSES, layers)
        ours["pyg, checkpoints"].load_state_dict(ours["acefast"].state_dict())
    return {name: network.to(device).train() for name, network in ours.items()}


def step_of(network, graph, x, labels, mask):
    """A call that gives (loss, dL/dmask, dL/d of the last and the first layer's weights) of one training step."""
    edges = graph if isinstance(network, DeeperGCN) else graph.edge_index()

    def step():
        mask.grad = None
        network.zero_grad()
        logits = network(edges, x, mask) if isinstance(network, DeeperGCN) else network(x, edges, mask)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        return loss.detach(), mask.grad, network.lin.weight.grad, network.layers[0].conv.mlp[0].weight.grad

    return step


def equal_to(layers: int, exact=None):
    """Whether two steps' results agree, by norm, to the roundings of so many layers; or, with the `exact` results, whether the
    second ones are as near to those as the first ones are: at most twice as far, and roundings."""

    def far(a, b):
        return float((a.double() - b.double()).norm() / a.double().norm())

    def equal(expected, found):
        if exact is None:
            return all(far(a, b) <= ROUNDING * layers for a, b in zip(expected, found, strict=True))
        return all(far(c, b) <= ROUNDING * layers + 2 * far(c, a) for a, b, c in zip(expected, found, exact, strict=True))

    return equal


def exact_step(network, graph, x, labels, mask):
    """The results of a step in float64."""
    network, mask = copy.deepcopy(network).double(), mask.detach().double().requires_grad_()
    return tuple(result.detach() for result in step_of(network, graph, x.double(), labels, mask)())


def main(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.device == "cpu":
        limit_memory()
    root = options.data_root or next((f for f in (data_folder(), REPOSITORY / ".data") if f.is_dir()), None)
    title, g = graphs.load(options.shape, options.scale, options.device, root)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(g.num_src, options.features, generator=draw).to(options.device)
    labels = torch.randint(0, CLASSES, (g.num_dst,), generator=draw).to(options.device)
    mask = (1 + 1e-2 * torch.randn(g.num_edges, generator=draw)).to(options.device).requires_grad_()
    copied, rows = copy_bandwidth(options.device), []
    shape = f"{title} N={g.num_src} E={g.num_edges} F={options.features}"
    for layers in options.layers:
        made = networks(layers, options.features, options.device, layers <= options.peer_layers)
        steps = {name: step_of(network, g, x, labels, mask) for name, network in made.items()}
        peer = "pyg, checkpoints" in made
        exact = exact_step(made["acefast"], g, x, labels, mask) if peer else None
        checks = dict.fromkeys(made, equal_to(layers)) | ({"pyg, checkpoints": equal_to(layers, exact)} if peer else {})
        found = compare(
            steps, checks, options.device, options.budget, copied, op="deeper_gcn", shape=shape, case="fwd+bwd",
            dtype="float32", variant=f"{layers} layers", nodes=g.num_src, edges=g.num_edges, features=options.features,
        )  # fmt: skip
        for row in found:
            by_layer = {}
            if row.median_s is not None:
                by_layer = {"s_per_layer": row.median_s / layers, "bytes_per_layer": row.peak_bytes / layers}
                figures = f"{row.median_s:8.3f} s, {row.peak_bytes / 2**20:8.0f} MiB; a layer "
                figures += f"{row.median_s / layers * 1e3:.1f} ms, {row.peak_bytes / layers / 2**20:.1f} MiB"
            print(f"{shape}, {row.variant}: {row.impl:<20} {row.note if row.median_s is None else figures}")
            rows.append(row.to_json() | {"layers": layers, **by_layer})
        del made, steps
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return 0 if all(row["equal"] for row in rows if row["impl"].startswith("acefast")) else 1

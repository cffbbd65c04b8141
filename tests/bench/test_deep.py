"""The benchmark of the deep network: the peer computes what ours does, and the command runs."""

import json

import pytest
import torch

from bench import deep, graphs
from bench.__main__ import main


@pytest.mark.parametrize("layers", [1, 6])
def test_the_peer_is_our_network(layers):
    """Loss, and gradients of mask and weights, given the same weights, kept or computed again; also logits and statistics."""
    _, g = graphs.load("arxiv", 0.002, "cpu", None)
    draw = torch.Generator().manual_seed(0)
    x, labels = torch.randn(g.num_src, 16, generator=draw), torch.randint(0, deep.CLASSES, (g.num_dst,), generator=draw)
    mask = (0.5 + torch.rand(g.num_edges, generator=draw)).requires_grad_()
    made = deep.networks(layers, 16)
    results = {name: deep.step_of(network, g, x, labels, mask)() for name, network in made.items()}
    ours = results.pop("acefast")
    for name, theirs in results.items():
        assert all(float((a - b).norm()) <= 1e-5 * float(a.norm()) for a, b in zip(ours, theirs, strict=True)), name
    network, _, peer = (network.eval() for network in made.values())
    assert torch.allclose(network(g, x, mask), peer(x, g.edge_index(), mask), atol=1e-5)


def test_the_command_checks_and_writes(tmp_path, capsys):
    arguments = "deep --scale 0.002 --features 16 --layers 2 3 --peer-layers 2 --budget 0.01 --json".split()
    assert main([*arguments, str(tmp_path / "deep.json")]) == 0
    rows = json.loads((tmp_path / "deep.json").read_text())["rows"]
    assert [(row["impl"], row["layers"]) for row in rows] == [
        ("acefast", 2), ("acefast, recomputed", 2), ("pyg, checkpoints", 2), ("acefast", 3), ("acefast, recomputed", 3),
    ]  # fmt: skip
    assert all(row["equal"] and row["s_per_layer"] > 0 and row["bytes_per_layer"] >= 0 for row in rows)
    assert "a layer" in capsys.readouterr().out

"""Graphs and tolerances shared by tests and benchmarks."""

import os
from pathlib import Path

import torch

from acefast import Graph

REPOSITORY = Path(__file__).resolve().parents[1]

# Relative tolerance per dtype, judged by norm. float32: about 100 roundings of 6e-8. Half precision: the storage's own
# rounding, since sums run in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def data_folder() -> Path:
    """Where the real graphs lie: ACEFAST_DATA, or the folder shared/data beside the checkout."""
    return Path(os.environ.get("ACEFAST_DATA", REPOSITORY.parent / "shared" / "data"))


def _power_law(num_nodes: int, num_edges: int, generator: torch.Generator) -> torch.Tensor:
    weight = torch.arange(1, num_nodes + 1, dtype=torch.float64).pow(-0.8)
    return torch.multinomial(weight, num_edges, replacement=True, generator=generator)


def edge_sets(seed: int = 0) -> dict[str, tuple[torch.Tensor, tuple[int, int]]]:
    """name -> (edge_index [2, E], (N_src, N_dst)): the shapes that break kernels."""
    generator = torch.Generator().manual_seed(seed)

    def random(num_src, num_dst, num_edges):
        src = torch.randint(0, num_src, (num_edges,), generator=generator)
        return torch.stack((src, torch.randint(0, num_dst, (num_edges,), generator=generator)))

    hub = random(40, 40, 60)
    hub_in = torch.stack((torch.randint(0, 40, (3000,), generator=generator), torch.full((3000,), 7)))
    hub_out = hub_in.flip(0)
    shuffled = torch.randperm(6060, generator=generator)
    power = torch.stack((_power_law(97, 900, generator), _power_law(97, 900, generator)))
    ring = torch.arange(31)
    sorted_edges = random(50, 50, 300)
    sorted_edges = sorted_edges[:, torch.sort(sorted_edges[1], stable=True).indices]
    return {
        "no_nodes": (torch.zeros(2, 0, dtype=torch.long), (0, 0)),
        "no_edges": (torch.zeros(2, 0, dtype=torch.long), (5, 5)),
        "one_edge": (torch.tensor([[2], [0]]), (3, 3)),
        "isolated": (random(10, 10, 30) + 20, (60, 60)),
        "self_loops": (torch.stack((ring, ring)), (31, 31)),
        "multi_edges": (random(6, 6, 20).repeat(1, 4), (6, 6)),
        "hub": (torch.cat((hub, hub_in, hub_out), 1)[:, shuffled], (40, 40)),
        "power_law": (power, (97, 97)),
        "sorted": (sorted_edges, (50, 50)),
        "bipartite": (random(23, 57, 200), (23, 57)),
    }


def graphs(seed: int = 0) -> dict[str, Graph]:
    """The graphs of `edge_sets`."""
    return {name: Graph.from_edge_index(edges, num_nodes=sizes) for name, (edges, sizes) in edge_sets(seed).items()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str = "", norm: float = 0.0) -> None:
    """By norm: |a - b| <= tolerance * max(|b|, norm) plus an absolute floor, for values that cancel to 0."""
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    difference = (actual.double() - expected.double()).norm().item()
    allowed = TOLERANCE[dtype] * (max(expected.double().norm().item(), norm) + 1e-2 * expected.numel() ** 0.5)
    assert difference <= allowed, f"{what}: off by {difference:.3e} in norm, allowed {allowed:.3e}"

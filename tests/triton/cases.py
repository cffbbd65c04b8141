"""Comparisons of the Triton ops with the reference, for any device: the interpreter's tests run them on the CPU, a
GPU's tests on "cuda". The reference runs on the CPU, on inputs cast to float64; selections must agree exactly."""

import math

import torch

from acefast.ops import reference
from acefast.ops.triton.spmm import spmm, spmm_bwd
from acefast.ops.triton.topk_mask import topk_mask
from tests.inputs import assert_close

FACTORS = ("weight", "mask", "keep", "self_weight", "row_scale")


def edge_inputs(graph, num_feats, dtype, factors=FACTORS, seed=0):
    """(x, dy, {factor: tensor or None}) on the CPU; self_weight only where the graph is square."""
    generator = torch.Generator().manual_seed(seed)
    acc = reference.accumulator(dtype)
    sizes = {"weight": graph.num_edges, "mask": graph.num_edges, "keep": graph.num_edges}
    sizes |= {"self_weight": graph.num_dst, "row_scale": graph.num_dst}
    values = dict.fromkeys(FACTORS)
    for name in factors:
        if name != "self_weight" or graph.num_src == graph.num_dst:
            values[name] = torch.randn(sizes[name], dtype=acc, generator=generator)
    if values["keep"] is not None:
        values["keep"] = values["keep"] > -0.3
    x = torch.randn(graph.num_src, num_feats, generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.randn(graph.num_dst, num_feats, generator=generator, dtype=torch.float64).to(dtype)
    return x, dy, values


def _to(tensors, device):
    return [None if t is None else t.to(device) for t in tensors]


def _wide(tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def check_spmm(graph, num_feats, dtype, factors=FACTORS, seed=0, device="cpu"):
    """spmm agrees with the reference and, on a GPU, a second run with the first to the bit. Returns y."""
    x, _, values = edge_inputs(graph, num_feats, dtype, factors, seed)
    arrays, inputs = _to(graph.arrays, device), _to([x, *values.values()], device)
    y = spmm(*arrays, *inputs, False)
    assert y.dtype == dtype and y.shape == (graph.num_dst, num_feats)
    assert_close(y.cpu(), reference.spmm(*graph.arrays, *_wide([x, *values.values()]), False), dtype, "y")
    if y.is_cuda:
        assert torch.equal(y, spmm(*arrays, *inputs, False)), "spmm differs from run to run"
    return y


def check_spmm_bwd(graph, num_feats, dtype, factors=FACTORS, need=(True, True), all_edges=False, seed=0, device="cpu"):
    """spmm_bwd agrees with the reference and, on a GPU, a second run with the first to the bit. Returns the three."""
    x, dy, values = edge_inputs(graph, num_feats, dtype, factors, seed)
    arrays, inputs = _to(graph.arrays, device), _to([dy, x, *values.values()], device)
    actual = spmm_bwd(*arrays, *inputs, *need, all_edges)
    expected = reference.spmm_bwd(*graph.arrays, *_wide([dy, x, *values.values()]), *need, all_edges)
    acc = reference.accumulator(dtype)
    for name, a, b, kind in zip(("dx", "dcoef", "dself"), actual, expected, (dtype, acc, acc), strict=True):
        assert a.dtype == kind, f"{name} is {a.dtype}, expected {kind}"
        assert_close(a.cpu(), b, kind, name)
    if actual[0].is_cuda:
        again = spmm_bwd(*arrays, *inputs, *need, all_edges)
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)), "spmm_bwd differs from run to run"
    return actual


def check_topk(scores, k, alive=None, largest=True, magnitude=True, device="cpu"):
    """topk_mask picks exactly what the reference picks and reports the same status. Returns (keep, status)."""
    keep, status = topk_mask(_to(scores, device), k, None if alive is None else _to(alive, device), largest, magnitude)
    expected, expected_status = reference.topk_mask(scores, k, alive, largest, magnitude)
    assert status.dtype == torch.int32 and status.shape == (1,)
    assert int(status) == int(expected_status), f"status {int(status)}, expected {int(expected_status)}"
    for position, (a, b) in enumerate(zip(keep, expected, strict=True)):
        assert a.dtype == torch.bool and a.shape == b.shape
        assert torch.equal(a.cpu(), b), f"keep[{position}] differs at {int((a.cpu() != b).sum())} of {b.numel()} places"
    return keep, status


def score_lists(dtype, scale=1, seed=0):
    """name -> list of score tensors: the inputs that break selections; `scale` multiplies their length."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest denormal
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, tiny, -tiny, 3 * tiny, 0.0, 1.0], dtype=torch.float64)
    special = special.to(dtype)
    assert special[4] > 0
    return {
        "random": [normal(41 * scale)],
        "list": [normal(7, 3 * scale), normal(0), normal(17 * scale), normal(1)],
        "equal": [torch.ones(23 * scale, dtype=dtype), torch.full((19 * scale,), -1.0, dtype=dtype)],
        "fresh_mask": [1 + 1e-5 * normal(40 * scale)],
        "ties": [normal(60 * scale).mul(2).round()],
        "special": [special.repeat(4 * scale)],
        "outlier": [torch.cat((torch.ones(50 * scale, dtype=dtype), torch.full((1,), 3e4, dtype=dtype)))],
    }


def alive_like(scores, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(s.shape, generator=generator) > 0.4 for s in scores]

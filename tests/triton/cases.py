"""Comparisons of the Triton ops with the reference, for any device: the interpreter's tests run them on the CPU, a
GPU's tests on "cuda". The reference runs on the CPU, on inputs cast to float64; selections must agree exactly."""

import math

import torch

from acefast import Graph
from acefast.ops import reference
from acefast.ops.triton.gat import gat, gat_bwd
from acefast.ops.triton.gen import gen, gen_bwd
from acefast.ops.triton.spmm import spmm, spmm_bwd
from acefast.ops.triton.topk_mask import topk_mask, topk_mask_out
from tests.inputs import assert_close

FACTORS = ("weight", "mask", "keep", "self_weight", "row_scale")


def random_graph(num_src=9, num_dst=9, num_edges=31, seed=0):
    generator = torch.Generator().manual_seed(seed)
    src = torch.randint(0, num_src, (num_edges,), generator=generator)
    dst = torch.randint(0, num_dst - 1, (num_edges,), generator=generator)
    return Graph.from_edge_index(torch.stack((src, dst)), num_nodes=(num_src, num_dst))


def edge_inputs(graph, num_feats, dtype, factors=FACTORS, seed=0, heads=None):
    """(x, dy, {factor: tensor or None}) on the CPU; self_weight only where the graph is square. With `heads` features are
    [N, H, F] and weights and masks [E, H]."""
    generator = torch.Generator().manual_seed(seed)
    acc = reference.accumulator(dtype)
    edges = (graph.num_edges,) if heads is None else (graph.num_edges, heads)
    feats = (num_feats,) if heads is None else (heads, num_feats)
    sizes = {"weight": edges, "mask": edges, "keep": (graph.num_edges,)}
    sizes |= {"self_weight": (graph.num_dst,), "row_scale": (graph.num_dst,)}
    values = dict.fromkeys(FACTORS)
    for name in factors:
        if name != "self_weight" or graph.num_src == graph.num_dst:
            values[name] = torch.randn(sizes[name], dtype=acc, generator=generator)
    if values["keep"] is not None:
        values["keep"] = values["keep"] > -0.3
    x = torch.randn(graph.num_src, *feats, generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.randn(graph.num_dst, *feats, generator=generator, dtype=torch.float64).to(dtype)
    return x, dy, values


def selected(graph, keep):
    """The arrays of `graph.select(keep)`."""
    return reference.compact(*graph.arrays, keep, int(keep.sum()), False)[:6]


def _to(tensors, device):
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors]


def _wide(inputs):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs]


def _check(op, arrays, inputs, expected, names, device):
    """`op` gives the expected tensors, in the dtypes of `names` {name: dtype}, and on a GPU a second run the same bits. What
    cancels to nearly 0 is held against 5 % of the largest norm."""
    inputs = _to([*arrays, *inputs], device)
    actual = op(*inputs)
    finite = [b.masked_fill(b == -torch.inf, 0) for b in expected]
    largest = max(float(b.double().norm()) for b in finite)
    for (name, dtype), a, b, c in zip(names.items(), actual, expected, finite, strict=True):
        assert a.dtype == dtype, f"{name} is {a.dtype}, expected {dtype}"
        infinite = b == -torch.inf
        assert torch.equal(a.cpu() == -torch.inf, infinite), f"{name}: -inf at other places"
        assert_close(a.cpu().masked_fill(infinite, 0), c, dtype, name, 5e-2 * largest)
    if device != "cpu":
        again = op(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)), f"{op.__name__} differs from run to run"
    return actual


def check_spmm(graph, num_feats, dtype, factors=FACTORS, seed=0, heads=None, selection=False, device="cpu"):
    """spmm agrees with the reference and, on a GPU, a second run with the first to the bit. Returns y."""
    x, _, values = edge_inputs(graph, num_feats, dtype, factors, seed, heads)
    arrays = graph.arrays
    if selection:
        arrays, values["keep"] = selected(graph, values["keep"]), None
    inputs = [x, *values.values(), False]
    expected = reference.spmm(*arrays, *_wide(inputs))

    def run(*args):
        return (spmm(*args),)

    return _check(run, arrays, inputs, (expected,), {"y": dtype}, device)[0]


def check_spmm_bwd(graph, num_feats, dtype, factors=FACTORS, need=(True, True), all_edges=False, seed=0, heads=None,
                   selection=False, device="cpu"):  # fmt: skip
    """spmm_bwd agrees with the reference and, on a GPU, a second run with the first to the bit. Returns the three."""
    x, dy, values = edge_inputs(graph, num_feats, dtype, factors, seed, heads)
    arrays, acc = graph.arrays, reference.accumulator(dtype)
    if selection:
        arrays, values["keep"] = selected(graph, values["keep"]), None
    inputs = [dy, x, *values.values(), *need, all_edges]
    expected = reference.spmm_bwd(*arrays, *_wide(inputs))
    return _check(spmm_bwd, arrays, inputs, expected, {"dx": dtype, "dcoef": acc, "dself": acc}, device)


def gat_inputs(graph, heads, num_feats, dtype, mask=None, keep=False, seed=0):
    """(dy, [z, a_src, a_dst, mask, keep]); mask: None, "edge" or "head"."""
    generator = torch.Generator().manual_seed(seed)
    acc = reference.accumulator(dtype)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z, dy = (normal(n, heads, num_feats).to(dtype) for n in (graph.num_src, graph.num_dst))
    a_src, a_dst = (normal(n, heads).to(acc) for n in (graph.num_src, graph.num_dst))
    values = normal(graph.num_edges, heads).to(acc)
    values = {"edge": values[:, 0].contiguous(), "head": values, None: None}[mask]
    return dy, [z, a_src, a_dst, values, normal(graph.num_edges) > -0.3 if keep else None]


def check_gat(graph, heads, num_feats, dtype, mask=None, keep=False, mask_on_logit=False, dropout=0.0, save=True,
              selection=False, negative_slope=0.2, seed=0, device="cpu"):  # fmt: skip
    """gat and gat_bwd agree with the reference and, on a GPU, second runs with the first to the bit."""
    dy, inputs = gat_inputs(graph, heads, num_feats, dtype, mask, keep or selection, seed)
    arrays, acc = graph.arrays, reference.accumulator(dtype)
    if selection:
        arrays, inputs[-1] = selected(graph, inputs[-1]), None
    step = (0, torch.tensor([2**40 + 9])) if mask == "edge" else (2**40 + 9, None)
    how = [mask_on_logit, negative_slope, dropout, 0x1_2345_6789 + seed, *step]
    expected = reference.gat(*arrays, *_wide(inputs), *how, True)
    names = {"y": dtype, "lse": acc, "slope_y": dtype, "slope_sum": acc}
    _check(gat, arrays, [*inputs, *how, True], expected, names, device)
    if not save:
        nothing = expected[0].new_empty(0)
        _check(gat, arrays, [*inputs, *how, False], (*expected[:2], nothing, nothing), names, device)
    saved = [t.to(kind) for t, kind in zip(expected, names.values(), strict=True)]
    backward = [dy, *saved, *inputs, *how, mask is not None]
    expected = reference.gat_bwd(*arrays, *_wide(backward))
    names = {"dz": dtype, "da_src": acc, "da_dst": acc, "dmask": acc}
    return _check(gat_bwd, arrays, backward, expected, names, device)


def gen_inputs(graph, num_feats, dtype, mask=True, keep=True, removed=False, seed=0):
    """(dy, [x, edge, weight, bias, mask, keep, param, row_scale, removed]) of an aggregation without edge features."""
    generator = torch.Generator().manual_seed(seed)
    acc = reference.accumulator(dtype)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, dy = (normal(n, num_feats).to(dtype) for n in (graph.num_src, graph.num_dst))
    values = normal(graph.num_edges).to(acc)
    kept = normal(graph.num_edges) > -0.3
    gone = torch.zeros(graph.num_dst, dtype=torch.int64).index_add_(0, graph.edge_index()[1], (~kept).long())
    param = 1.0 + 0.5 * normal(num_feats).to(acc)
    return dy, [
        x, None, None, None, values if mask else None, kept if keep else None, param, None, gone if removed else None
    ]  # fmt: skip


def check_gen(graph, num_feats, dtype, aggr=reference.SOFTMAX, mask=True, keep=True, removed=False, need=(True, True, True),
              all_edges=False, selection=False, seed=0, device="cpu"):  # fmt: skip
    """gen and gen_bwd agree with the reference and, on a GPU, second runs with the first to the bit."""
    dy, inputs = gen_inputs(graph, num_feats, dtype, mask, keep, removed, seed)
    arrays, acc = graph.arrays, reference.accumulator(dtype)
    if selection:
        arrays, inputs[5] = selected(graph, inputs[5]), None
    how = [aggr, 1e-7]
    expected = reference.gen(*arrays, *_wide(inputs), *how, all_edges)
    _check(gen, arrays, [*inputs, *how, all_edges], expected, {"y": dtype, "lse": acc}, device)
    need_dx, need_dmask, need_dparam = need
    backward = [dy, expected[0].to(dtype), expected[1].to(acc), *inputs, *how,
                need_dx, need_dmask and mask, False, need_dparam, all_edges]  # fmt: skip
    expected = reference.gen_bwd(*arrays, *_wide(backward))
    names = {"dx": dtype, "dmask": acc, "dedge": dtype, "dbias": acc, "dparam": acc}
    return _check(gen_bwd, arrays, backward, expected, names, device)


def check_topk(scores, k, alive=None, largest=True, magnitude=True, device="cpu", out=None):
    """topk_mask, or with `out` topk_mask_out, picks exactly what the reference picks and reports the same status. Returns
    (keep, status)."""
    args = _to(scores, device), k, None if alive is None else _to(alive, device), largest, magnitude
    keep, status = topk_mask(*args) if out is None else (out, topk_mask_out(*args, out))
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

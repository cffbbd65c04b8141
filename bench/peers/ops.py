"""The same ops the ways that are in use: plain torch, PyG, torch_sparse, torch_scatter, DGL, each where it is installed.

Each function `<op>(g, ...)` returns {name: function of the case's inputs}. Graphs are in CSR order, so masks and scores are in
every library's own order. What a library prepares once for a graph (its CSR and CSC) is prepared here, outside of the timing.
"""

import contextlib
import functools
import importlib
import os

import torch
import torch.nn.utils.prune
from torch import nn
from torch.func import functional_call

from acefast import Graph

EPS = 1e-7  # of gen's messages


def _installed(name: str):
    """The module, or None where it is missing or does not load beside this torch."""
    os.environ.setdefault("DGLBACKEND", "pytorch")  # else DGL asks, and writes the answer to the home folder
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


@functools.lru_cache(maxsize=1)
def _torch_sparse_adjacency(g: Graph):
    sparse = _installed("torch_sparse")
    adj = sparse.SparseTensor(rowptr=g.rowptr, col=g.col.long(), sparse_sizes=(g.num_dst, g.num_src), is_sorted=True)
    adj.storage.row(), adj.storage.csr2csc(), adj.storage.colptr(), adj.storage.rowcount()
    return adj


@functools.lru_cache(maxsize=1)
def _dgl_graph(g: Graph):
    dgl = _installed("dgl")
    graph = g.to_dgl().int()
    graph.create_formats_()
    assert torch.equal(torch.stack(graph.edges(order="eid")).long(), g.edge_index())
    return dgl, graph


def forget_graphs() -> None:
    """Free what was prepared for the last graph."""
    _torch_sparse_adjacency.cache_clear()
    _dgl_graph.cache_clear()


def _rows(index: torch.Tensor, values: torch.Tensor, rows: int) -> torch.Tensor:
    return values.new_zeros(rows, *values.shape[1:]).index_add(0, index, values)


def _wide(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return index.reshape(-1, *[1] * (like.dim() - 1)).expand_as(like)


def _softmax(logits: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """Softmax over equal indices with torch's own scatter ops; the usual code."""
    with torch.no_grad():
        top = logits.new_full((rows, *logits.shape[1:]), -torch.inf).scatter_reduce(0, _wide(index, logits), logits, "amax")
    exponential = (logits - top[index]).exp()
    return exponential / _rows(index, exponential, rows)[index]


def spmm(g: Graph, reduce: str) -> dict:
    """Functions of (x [N, F], mask [E])."""
    src, dst = g.edge_index()
    col = g.col.long()
    scatter = {"sum": "sum", "mean": "mean", "max": "amax"}[reduce]

    def torch_csr(x, mask):
        return torch.sparse_csr_tensor(g.rowptr, col, mask.to(x.dtype), (g.num_dst, g.num_src)) @ x

    def torch_csr_reduce(x, mask):
        return torch.sparse.mm(torch.sparse_csr_tensor(g.rowptr, col, mask.to(x.dtype), (g.num_dst, g.num_src)), x, scatter)

    def scatter_reduce(x, mask):
        messages = mask.to(x.dtype).unsqueeze(1) * x[src]
        y = messages.new_zeros(g.num_dst, x.size(1))
        if reduce == "sum":
            return y.scatter_add(0, _wide(dst, messages), messages)
        return y.scatter_reduce(0, _wide(dst, messages), messages, scatter, include_self=False)

    def index_add(x, mask):
        y = _rows(dst, mask.to(x.dtype).unsqueeze(1) * x[src], g.num_dst)
        return y if reduce == "sum" else y / g.in_degrees().clamp(min=1).unsqueeze(1)

    peers = {"torch CSR, reduce": torch_csr_reduce, "torch gather, scatter": scatter_reduce}
    if reduce == "sum":
        peers = {"torch CSR": torch_csr} | peers
    if reduce != "max":
        peers["torch gather, index_add"] = index_add
    if sparse := _installed("torch_sparse"):
        adj = _torch_sparse_adjacency(g)
        peers["torch_sparse"] = lambda x, mask: sparse.matmul(adj.set_value(mask.to(x.dtype), layout="coo"), x, reduce=reduce)
    if _installed("dgl"):
        dgl, graph = _dgl_graph(g)
        fused = getattr(dgl.ops, f"u_mul_e_{reduce}")
        peers["DGL"] = lambda x, mask: fused(graph, x, mask.to(x.dtype).unsqueeze(1))
    return peers


def gat(g: Graph, mask_on: str | None, heads: int, width: int) -> dict:
    """Functions of (z [N, heads * width], att_src, att_dst [1, heads, width]) and mask [E] where `mask_on` is given."""
    src, dst = g.edge_index()
    shape = (g.num_src, heads, width)

    def by_hand(softmax):
        def call(z, att_src, att_dst, mask=None):
            z = z.view(shape)
            a_src, a_dst = (z * att_src).sum(2), (z * att_dst).sum(2)
            logits = nn.functional.leaky_relu(a_src[src] + a_dst[dst], 0.2)
            if mask_on == "logit":
                logits = logits * mask.to(z.dtype).unsqueeze(1)
            alpha = softmax(logits, dst, g.num_dst)
            if mask_on == "message":
                alpha = alpha * mask.to(z.dtype).unsqueeze(1)
            return _rows(dst, alpha.unsqueeze(2) * z[src], g.num_dst).flatten(1)

        return call

    peers = {"torch by hand": by_hand(_softmax)}
    if utils := _installed("torch_geometric.utils"):
        peers["PyG softmax, index_add"] = by_hand(lambda logits, index, rows: utils.softmax(logits, index, num_nodes=rows))
    if _installed("dgl"):
        dgl, graph = _dgl_graph(g)

        def dgl_ops(z, att_src, att_dst, mask=None):
            z = z.view(shape)
            logits = dgl.ops.u_add_v(graph, (z * att_src).sum(2), (z * att_dst).sum(2))
            logits = nn.functional.leaky_relu(logits, 0.2)
            if mask_on == "logit":
                logits = logits * mask.to(z.dtype).unsqueeze(1)
            alpha = dgl.ops.edge_softmax(graph, logits)
            if mask_on == "message":
                alpha = alpha * mask.to(z.dtype).unsqueeze(1)
            return dgl.ops.u_mul_e_sum(graph, z, alpha.unsqueeze(2)).flatten(1)

        peers["DGL ops"] = dgl_ops
    return peers if mask_on else peers | _gat_layers(g, heads, width)


def _gat_layers(g: Graph, heads: int, width: int) -> dict:
    """The libraries' layers, their linear map taken out."""
    peers = {}
    if geometric := _installed("torch_geometric.nn"):
        layer = geometric.GATConv(heads * width, width, heads, add_self_loops=False, bias=False).to(g.device)
        layer.lin = nn.Identity()

        def pyg(edges):
            def call(z, att_src, att_dst):
                return functional_call(layer, {"att_src": att_src, "att_dst": att_dst}, (z, edges))

            return call

        peers["PyG GATConv"] = pyg(g.edge_index())
        if _installed("torch_sparse"):
            peers["PyG GATConv, SparseTensor"] = pyg(_torch_sparse_adjacency(g))
    if _installed("dgl"):
        dgl, graph = _dgl_graph(g)
        from dgl.nn.pytorch import GATConv

        dgl_layer = GATConv(heads * width, width, heads, bias=False, allow_zero_in_degree=True).to(g.device)
        dgl_layer.fc = nn.Identity()

        def dgl_conv(z, att_src, att_dst):
            return functional_call(dgl_layer, {"attn_l": att_src, "attn_r": att_dst}, (graph, z)).flatten(1)

        peers["DGL GATConv"] = dgl_conv
    return peers


def gen(g: Graph, aggr: str, encoder: bool) -> dict:
    """Functions of (x [N, F], mask [E]), then t or p [1] where the aggregation has it, then (edge_attr [E, D], weight [F, D],
    bias [F]) with the encoder."""
    src, dst = g.edge_index()
    learned = aggr in ("softmax", "power")

    def message(x, mask, *rest):
        pre = x[src]
        if encoder:
            edge_attr, weight, bias = rest[-3:]
            pre = pre + nn.functional.linear(edge_attr, weight.to(x.dtype), bias.to(x.dtype))
        return (pre.relu() + EPS) * mask.to(x.dtype).unsqueeze(1)

    def way(aggregate):
        def call(x, mask, *rest):
            m = message(x, mask, *rest)
            return aggregate(m, rest[0].to(x.dtype)) if learned else aggregate(m)

        return call

    return {name: way(aggregate) for name, aggregate in _aggregations(g, aggr, dst).items()} | (
        {} if encoder or aggr != "mean" else _mean_by_spmm(g)
    )


def _aggregations(g: Graph, aggr: str, dst: torch.Tensor) -> dict:
    rows = g.num_dst
    scatter = _installed("torch_scatter")
    geometric = _installed("torch_geometric.nn")
    dgl, graph = _dgl_graph(g) if _installed("dgl") else (None, None)
    ways = {}
    if aggr == "softmax":
        ways["torch by hand"] = lambda m, t: _rows(dst, _softmax(m * t, dst, rows) * m, rows)
        if scatter:  # the released ACE-GLT code
            ways["torch_scatter (released code)"] = lambda m, t: scatter.scatter(
                scatter.scatter_softmax(m * t, dst, dim=0) * m, dst, dim=0, dim_size=rows, reduce="sum"
            )
        if dgl:
            ways["DGL ops"] = lambda m, t: dgl.ops.copy_e_sum(graph, dgl.ops.edge_softmax(graph, m * t) * m)
    elif aggr == "power":
        count = g.in_degrees().clamp(min=1).unsqueeze(1)
        ways["torch by hand"] = lambda m, p: (_rows(dst, m.clamp(1e-7, 10) ** p, rows) / count) ** (1 / p)
    else:
        reduce = {"max": "amax"}.get(aggr, aggr)
        ways["torch by hand"] = lambda m: m.new_zeros(rows, m.size(1)).scatter_reduce(
            0, _wide(dst, m), m, reduce, include_self=False
        )
        if scatter:
            ways["torch_scatter"] = lambda m: scatter.scatter(m, dst, dim=0, dim_size=rows, reduce=aggr)
            ways["torch_scatter segments"] = lambda m: scatter.segment_csr(m, g.rowptr, reduce=aggr)
        if dgl:
            ways["DGL ops"] = lambda m: getattr(dgl.ops, f"copy_e_{aggr}")(graph, m)
    if geometric and aggr in ("softmax", "power"):
        if aggr == "softmax":
            layer, name = geometric.SoftmaxAggregation(learn=True).to(g.device), "t"
        else:
            # Its lower clamp also acts on the mean of powers, so it is put below what the messages' own clamp leaves.
            layer, name = geometric.PowerMeanAggregation(learn=True, clamp_min=1e-12, clamp_max=10.0).to(g.device), "p"
        ways[f"PyG {type(layer).__name__}"] = lambda m, parameter: functional_call(
            layer, {name: parameter}, (m, dst), {"dim_size": rows}
        )
        ways[f"PyG {type(layer).__name__}, segments"] = lambda m, parameter: functional_call(
            layer, {name: parameter}, (m, dst), {"ptr": g.rowptr, "dim_size": rows}
        )
    return ways


def _mean_by_spmm(g: Graph) -> dict:
    """Without an encoder a mean of messages is a sparse product."""
    products = {name: f for name, f in spmm(g, "mean").items() if "gather" not in name}
    return {f"relu, then {name}": lambda x, mask, f=f: f(x.relu() + EPS, mask) for name, f in products.items()}


def edge_softmax(g: Graph) -> dict:
    """Functions of s [E, H]."""
    _, dst = g.edge_index()
    peers = {"torch by hand": lambda s: _softmax(s, dst, g.num_dst)}
    if scatter := _installed("torch_scatter"):
        peers["torch_scatter"] = lambda s: scatter.scatter_softmax(s, dst, dim=0)
    if utils := _installed("torch_geometric.utils"):
        peers["PyG softmax"] = lambda s: utils.softmax(s, dst, num_nodes=g.num_dst)
        peers["PyG softmax, segments"] = lambda s: utils.softmax(s, ptr=g.rowptr)
    if _installed("dgl"):
        dgl, graph = _dgl_graph(g)
        peers["DGL"] = lambda s: dgl.ops.edge_softmax(graph, s)
    return peers


def sddmm(g: Graph) -> dict:
    """Functions of (p [N_dst, F], q [N_src, F])."""
    src, dst = g.edge_index()
    col = g.col.long()

    def sampled(p, q):
        zeros = torch.sparse_csr_tensor(g.rowptr, col, p.new_zeros(g.num_edges), (g.num_dst, g.num_src))
        return torch.sparse.sampled_addmm(zeros, p, q.T, beta=0).values()

    peers = {"torch gather, multiply, sum": lambda p, q: (p[dst] * q[src]).sum(1), "torch sampled_addmm": sampled}
    if _installed("dgl"):
        dgl, graph = _dgl_graph(g)
        peers["DGL"] = lambda p, q: dgl.ops.u_dot_v(graph, q, p).squeeze(1)
    return peers


def gcn_norm(g: Graph) -> dict:
    """Functions of mask [E] > 0: mask_e d_i^-1/2 d_j^-1/2 with d the sum of the masks into a node."""
    edges = g.edge_index()
    src, dst = edges

    def by_hand(mask):
        inverse = _rows(dst, mask, g.num_dst).rsqrt()
        return inverse[dst] * mask * inverse[src]

    peers = {"torch by hand": by_hand}
    with contextlib.suppress(ImportError, OSError):
        from torch_geometric.nn.conv.gcn_conv import gcn_norm as normalise

        peers["PyG gcn_norm"] = lambda mask: normalise(edges, mask, g.num_dst, add_self_loops=False)[1]
    return peers


def topk_mask(scores: torch.Tensor, k: int) -> dict:
    """Functions of nothing: the k smallest magnitudes as a bool mask."""

    def mask_of(index):
        return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, index, True)

    def kthvalue():
        threshold = scores.abs().kthvalue(k).values
        mask = scores.abs() < threshold
        ties = (scores.abs() == threshold).nonzero().squeeze(1)
        return mask.index_fill_(0, ties[: k - int(mask.sum())], True)

    return {
        "torch.sort (stable)": lambda: mask_of(torch.sort(scores.abs(), stable=True).indices[:k]),
        "torch.sort": lambda: mask_of(torch.sort(scores.abs()).indices[:k]),
        "torch.topk": lambda: mask_of(torch.topk(scores.abs(), k, largest=False, sorted=False).indices),
        "torch.kthvalue": kthvalue,
    }


def prune(share: float) -> dict:
    """Functions of a Sequential of layers: the given share of all weights, those of least magnitude, set to 0."""

    def unstructured(model):
        pairs = [(layer, "weight") for layer in model]
        nn.utils.prune.global_unstructured(pairs, pruning_method=nn.utils.prune.L1Unstructured, amount=share)

    @torch.no_grad()
    def by_hand(model):
        weights = [layer.weight for layer in model]
        flat = torch.cat([w.flatten() for w in weights])
        removed = topk_mask(flat, int(share * flat.numel()))["torch.kthvalue"]()
        for w, part in zip(weights, removed.split([w.numel() for w in weights]), strict=True):
            w.masked_fill_(part.view_as(w), 0)

    return {"torch.nn.utils.prune": unstructured, "cat and torch.kthvalue": by_hand}


def masked_adam(theta: list, mask: list, theta_moments: tuple, mask_moments: tuple, settings: tuple) -> dict:
    """Functions of grad, a list like theta: the first step by the product rule and torch.optim.Adam, in place; they return
    theta * mask. The optimisers are made here, outside of the timing."""
    parameters = [*theta, *mask]

    def way(name):
        groups = [
            {"params": part, "lr": s.lr, "betas": (s.beta1, s.beta2), "eps": s.eps, "weight_decay": s.weight_decay}
            for part, s in zip((theta, mask), settings, strict=True)
        ]
        adam = torch.optim.Adam(groups, **{name: True})
        moments = (first + second for first, second in zip(theta_moments, mask_moments, strict=True))
        for p, mean, square in zip(parameters, *moments, strict=True):
            step = torch.zeros((), device=p.device if name == "fused" else "cpu")
            adam.state[p] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}

        @torch.no_grad()
        def step(grad):
            grads = torch._foreach_mul(grad, mask), torch._foreach_mul(grad, theta)
            for part, of_part, s in zip((theta, mask), grads, settings, strict=True):
                if s.l1:
                    torch._foreach_add_(of_part, torch._foreach_sign(part), alpha=s.l1)
                for p, g in zip(part, of_part, strict=True):
                    p.grad = g
            adam.step()
            return torch._foreach_mul(theta, mask)

        return step

    return {f"product rule, torch Adam ({name})": way(name) for name in ("foreach", "fused")}

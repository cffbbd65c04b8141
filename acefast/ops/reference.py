"""Every op in plain torch, with the argument order of its schema: the oracle of the tests and the fallback.

Written for clarity: messages of size E x F are materialised here and nowhere else.
"""

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums run in float64 for float64 and in float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def num_edges(col: Tensor, *per_edge: Tensor | None) -> int:
    """E: the length of the per-edge tensors, the number of slots `col` has where there is none."""
    return next((t.size(0) for t in per_edge if t is not None), col.size(0))


# Message passing. A graph is (rowptr, col, eid, colptr, row, ceid); see acefast.graph.Graph. In a prepared selection eid names
# fewer slots than there are edges.


def _slots(rowptr: Tensor, col: Tensor, eid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(source, destination, edge id) int64 [S] of the CSR slots."""
    degree = rowptr[1:] - rowptr[:-1]
    dst = torch.repeat_interleave(torch.arange(degree.numel(), device=col.device), degree, output_size=col.numel())
    return col.long(), dst, torch.arange(col.numel(), device=col.device) if eid is None else eid.long()


def _by_edge(num_edges: int, ids: Tensor, values: Tensor) -> Tensor:
    """`values` [S, ...] put at their edge ids into zeros [num_edges, ...]."""
    return values.new_zeros(num_edges, *values.shape[1:]).index_copy_(0, ids, values)


def _exists(keep: Tensor | None, ids: Tensor, dims: int) -> Tensor:
    """bool [S, 1, ...] with `dims` dimensions: which slots' edges are kept."""
    exists = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep[ids]
    return exists.reshape(-1, *[1] * (dims - 1))


def _zero_unless(flags: Tensor, values: Tensor) -> Tensor:
    """`values` where `flags`, else 0; what is not selected may be NaN."""
    return torch.where(flags, values, torch.zeros_like(values))


def _sum_rows(index: Tensor, values: Tensor, rows: int) -> Tensor:
    return values.new_zeros(rows, *values.shape[1:]).index_add_(0, index, values)


def _max_rows(index: Tensor, values: Tensor, rows: int) -> Tensor:
    """The largest value of each row, -inf where it has none."""
    best = values.new_full((rows, *values.shape[1:]), -torch.inf)
    return best.index_reduce_(0, index, values, "amax") if values.numel() else best


def _like(factor: Tensor, values: Tensor) -> Tensor:
    """`factor` with trailing dimensions of size 1 up to those of `values`."""
    return factor.reshape(*factor.shape, *[1] * (values.dim() - factor.dim()))


def _coefficient(ids, weight, mask, like) -> Tensor:
    """weight_e * mask_e of the slots, shaped to multiply features [S, ...]."""
    coefficient = like.new_ones(ids.numel())
    for factor in (weight, mask):
        if factor is not None:
            coefficient = _like(coefficient, factor) * factor[ids]
    return _like(coefficient, like)


def spmm(rowptr, col, eid, colptr, row, ceid, x, weight, mask, keep, self_weight, row_scale, all_edges):
    """y_i = row_scale_i * sum over kept e: j->i of weight_e mask_e x_j, plus self_weight_i x_i."""
    src, dst, ids = _slots(rowptr, col, eid)
    acc = x.to(accumulator(x.dtype))
    messages = _coefficient(ids, weight, mask, acc) * acc[src]
    y = _sum_rows(dst, _zero_unless(_exists(keep, ids, acc.dim()), messages), rowptr.numel() - 1)
    if row_scale is not None:
        y = y * _like(row_scale, y)
    if self_weight is not None:
        y = y + _like(self_weight, acc) * acc
    return y.to(x.dtype)


def spmm_bwd(rowptr, col, eid, colptr, row, ceid, dy, x, weight, mask, keep, self_weight, row_scale, need_dx, need_dcoef,
             all_edges):  # fmt: skip
    """dx_j = sum over e: j->i of coefficient_e dy_i + self_weight_j dy_j; dcoef_e = row_scale_i <dy_i, x_j>;
    dself_j = <dy_j, x_j>. What is not needed comes back empty."""
    src, dst, ids = _slots(rowptr, col, eid)
    dtype = accumulator(x.dtype)
    dy_acc, x_acc = dy.to(dtype), x.to(dtype)
    dx, dcoef, dself = x.new_empty(0), x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    scaled = dy_acc if row_scale is None else dy_acc * _like(row_scale, dy_acc)
    exists = _exists(keep, ids, x.dim())
    if need_dx:
        messages = _coefficient(ids, weight, mask, x_acc) * scaled[dst]
        total = _sum_rows(src, _zero_unless(exists, messages), x.size(0))
        if self_weight is not None:
            total = total + _like(self_weight, dy_acc) * dy_acc
        dx = total.to(x.dtype)
    if need_dcoef:
        products = (scaled[dst] * x_acc[src]).sum(-1)
        if not all_edges:
            products = _zero_unless(exists.squeeze(-1), products)
        dcoef = _by_edge(num_edges(col, weight, mask, keep), ids, products)
        if self_weight is not None:
            dself = (dy_acc * x_acc).flatten(1).sum(1)
    return dx, dcoef, dself


def _first_largest(dst, ids, values, exists, rows):
    """(largest [rows, F], its edge id int64 or -1): of equal ones the lowest id; 0 and -1 in a row without any."""
    values = torch.where(exists, values, -torch.inf)
    best = _max_rows(dst, values, rows)
    hit = exists & (values == best[dst])
    last = torch.iinfo(torch.int64).max
    candidates = torch.where(hit, ids.unsqueeze(1), last)
    arg = torch.full_like(best, last, dtype=torch.int64)
    if values.numel():
        arg = arg.index_reduce_(0, dst, candidates, "amin")
    none = arg == last
    return torch.where(none, 0.0, best), torch.where(none, -1, arg)


def spmm_max(rowptr, col, eid, colptr, row, ceid, x, weight, mask, keep, largest):
    """y_i = max (min) over kept e: j->i of weight_e mask_e x_j and the edge id of its first place, -1 where there is none."""
    src, dst, ids = _slots(rowptr, col, eid)
    acc = x.to(accumulator(x.dtype))
    sign = 1 if largest else -1
    messages = sign * _coefficient(ids, weight, mask, acc) * acc[src]
    y, arg = _first_largest(dst, ids, messages, _exists(keep, ids, 2), rowptr.numel() - 1)
    return (sign * y).to(x.dtype), arg.to(col.dtype)


def spmm_max_bwd(rowptr, col, eid, colptr, row, ceid, dy, arg, x, weight, mask, keep, need_dx, need_dcoef):
    """dx and the gradient of weight_e mask_e, from the edges that gave the extremes."""
    src, dst, ids = _slots(rowptr, col, eid)
    dtype = accumulator(x.dtype)
    routed = _zero_unless(arg[dst].long() == ids.unsqueeze(1), dy.to(dtype)[dst])
    dx, dcoef = x.new_empty(0), x.new_empty(0, dtype=dtype)
    if need_dx:
        messages = _zero_unless(_exists(keep, ids, 2), _coefficient(ids, weight, mask, routed) * routed)
        dx = _sum_rows(src, messages, x.size(0)).to(x.dtype)
    if need_dcoef:
        dcoef = _by_edge(num_edges(col, weight, mask, keep), ids, (routed * x.to(dtype)[src]).sum(1))
    return dx, dcoef


def sddmm(rowptr, col, eid, colptr, row, ceid, p, q):
    """s_e = <p_dst(e), q_src(e)> over the last dimension."""
    src, dst, ids = _slots(rowptr, col, eid)
    dtype = accumulator(p.dtype)
    return _by_edge(col.numel(), ids, (p.to(dtype)[dst] * q.to(dtype)[src]).sum(-1))


def _softmax_rows(dst, logits, exists, rows):
    """(softmax over each row's existing slots, 0 elsewhere; log-sum-exp [rows, ...], -inf in a row without any)."""
    logits = torch.where(exists, logits, -torch.inf)
    top = _max_rows(dst, logits, rows)
    top = torch.where(top.isfinite(), top, 0.0)
    exponential = torch.exp(logits - top[dst])
    total = _sum_rows(dst, exponential, rows)
    alpha = exponential / torch.where(total > 0, total, 1.0)[dst]
    return alpha, top + torch.log(total)


def edge_softmax(rowptr, col, eid, colptr, row, ceid, s, keep):
    """a_e = softmax of s over the kept edges into i, per head."""
    _, dst, ids = _slots(rowptr, col, eid)
    alpha, _ = _softmax_rows(dst, s[ids], _exists(keep, ids, s.dim()), rowptr.numel() - 1)
    return _by_edge(s.size(0), ids, alpha)


def edge_softmax_bwd(rowptr, col, eid, colptr, row, ceid, a, da, keep):
    """ds_e = a_e (da_e - sum over the row of a da)."""
    _, dst, ids = _slots(rowptr, col, eid)
    exists = _exists(keep, ids, a.dim())
    alpha, product = _zero_unless(exists, a[ids]), _zero_unless(exists, a[ids] * da[ids])
    total = _sum_rows(dst, product, rowptr.numel() - 1)
    return _by_edge(a.size(0), ids, product - alpha * total[dst])


def _attention(graph, z, a_src, a_dst, mask, keep, mask_on_logit, negative_slope, dropout, seed, step):
    """Per slot and head: (src, dst, ids, exists, alpha, lse, s, slope, mask, drop)."""
    rowptr, col, eid, *_ = graph
    src, dst, ids = _slots(rowptr, col, eid)
    heads = z.size(1)
    exists = _exists(keep, ids, 2).expand(-1, heads)
    reach = a_dst[dst] + a_src[src]
    slope = torch.ones_like(reach).masked_fill(reach < 0, negative_slope)
    s = reach * slope
    m = s.new_ones(1, 1) if mask is None else _like(mask[ids], s)
    m = _zero_unless(exists, m.expand(ids.numel(), heads))
    alpha, lse = _softmax_rows(dst, s * m if mask_on_logit else s, exists, rowptr.numel() - 1)
    drop = torch.ones_like(s)
    if dropout > 0:
        count = int(ids.max()) + 1 if ids.numel() else 0
        word = random_words(0, count * heads, seed, step, z.device).reshape(count, heads)[ids]
        scale = 0.0 if dropout >= 1 else 1.0 / (1.0 - dropout)
        drop = (word >= int(dropout * 2**32)).to(s.dtype) * scale
    return src, dst, ids, exists, alpha, lse, s, slope, m, drop


def gat(rowptr, col, eid, colptr, row, ceid, z, a_src, a_dst, mask, keep, mask_on_logit, negative_slope, dropout, seed, step,
        step_at, save):  # fmt: skip
    """y_i = sum of alpha_e mask_e drop_e z_j with alpha the softmax of LeakyReLU(a_dst_i + a_src_j) (mask on the message), or
    y_i = sum of alpha_e drop_e z_j with alpha the softmax of the same times mask_e (mask on the logit)."""
    src, dst, _, _, alpha, lse, _, slope, m, drop = _attention(
        (rowptr, col, eid), z, a_src, a_dst, mask, keep, mask_on_logit, negative_slope, dropout, seed,
        step if step_at is None else step_at,
    )  # fmt: skip
    rows, source = rowptr.numel() - 1, z.to(accumulator(z.dtype))[src]
    coefficient = alpha * drop * (1 if mask_on_logit else m)
    y = _sum_rows(dst, coefficient.unsqueeze(2) * source, rows).to(z.dtype)
    if not save:
        return y, lse, z.new_empty(0), lse.new_empty(0)
    slope_y = _sum_rows(dst, (alpha * slope * m * drop).unsqueeze(2) * source, rows).to(z.dtype)
    return y, lse, slope_y, _sum_rows(dst, alpha * slope * (m if mask_on_logit else 1), rows)


def gat_bwd(rowptr, col, eid, colptr, row, ceid, dy, y, lse, slope_y, slope_sum, z, a_src, a_dst, mask, keep, mask_on_logit,
            negative_slope, dropout, seed, step, step_at, need_dmask):  # fmt: skip
    """(dz, da_src, da_dst, dmask): see csrc/ops.h."""
    src, dst, ids, _, alpha, _, s, slope, m, drop = _attention(
        (rowptr, col, eid), z, a_src, a_dst, mask, keep, mask_on_logit, negative_slope, dropout, seed,
        step if step_at is None else step_at,
    )  # fmt: skip
    dtype = accumulator(z.dtype)
    dy_acc = dy.to(dtype)
    mean = (dy_acc * y.to(dtype)).sum(2)
    product = drop * (dy_acc[dst] * z.to(dtype)[src]).sum(2)
    dlogit = alpha * (product * (1 if mask_on_logit else m) - mean[dst])
    dreach = dlogit * slope * (m if mask_on_logit else 1)
    coefficient = alpha * drop * (1 if mask_on_logit else m)
    dz = _sum_rows(src, coefficient.unsqueeze(2) * dy_acc[dst], z.size(0)).to(z.dtype)
    da_dst = (dy_acc * slope_y.to(dtype)).sum(2) - mean * slope_sum
    dmask = s.new_empty(0)
    if need_dmask:
        per_head = dlogit * s if mask_on_logit else alpha * product
        dmask = _by_edge(mask.size(0), ids, per_head if mask.dim() == 2 else per_head.sum(1))
    return dz, _sum_rows(src, dreach, z.size(0)), da_dst, dmask


SUM, SOFTMAX, SOFTMAX_SG, POWER, MAX = range(5)  # the `aggr` of gen
POWER_LOW, POWER_HIGH = 1e-7, 10.0


def _messages(graph, x, edge, weight, bias, mask, keep, eps):
    """Per slot: (src, dst, ids, exists [S, 1], raw features, r before the relu, r, mask [S, 1], r * mask)."""
    src, dst, ids = _slots(*graph[:3])
    dtype = accumulator(x.dtype)
    exists = _exists(keep, ids, 2)
    pre, raw = x.to(dtype)[src], None
    if edge is not None:
        raw = edge.to(dtype)[ids]
        pre = pre + (raw if weight is None else raw @ weight.T)
    if bias is not None:
        pre = pre + bias
    r = pre.clamp(min=0) + eps
    m = pre.new_ones(ids.numel(), 1) if mask is None else mask[ids].unsqueeze(1)
    return src, dst, ids, exists, raw, pre, r, m, r * m


def gen(rowptr, col, eid, colptr, row, ceid, x, edge, weight, bias, mask, keep, param, row_scale, removed, aggr, eps,
        all_edges):  # fmt: skip
    """Generalised aggregation of msg_e = (relu(x_j + edge_e) + eps) mask_e: see csrc/ops.h."""
    _, dst, ids, exists, _, _, _, _, message = _messages((rowptr, col, eid), x, edge, weight, bias, mask, keep, eps)
    rows, stat = rowptr.numel() - 1, message.new_empty(0)
    absent = 0 if removed is None else removed.to(message.dtype).unsqueeze(1)
    if aggr == SUM:
        y = _sum_rows(dst, _zero_unless(exists, message), rows)
        y = y if row_scale is None else y * row_scale.unsqueeze(1)
    elif aggr in (SOFTMAX, SOFTMAX_SG):
        beta, kept = _softmax_rows(dst, param * message, exists.expand_as(message), rows)
        stat = kept if removed is None else torch.logaddexp(kept, torch.log(absent))
        share = torch.where(kept > -torch.inf, torch.exp(kept - stat), 0.0)
        y = _sum_rows(dst, _zero_unless(exists, beta * message), rows) * share
    elif aggr == POWER:
        total = _sum_rows(dst, _zero_unless(exists, message.clamp(POWER_LOW, POWER_HIGH) ** param), rows)
        mean = (total + absent * POWER_LOW**param) * row_scale.unsqueeze(1)
        y = torch.where(mean > 0, mean, 1.0) ** (1 / param) * (mean > 0)
    else:
        y, arg = _first_largest(dst, ids, message, exists.expand_as(message), rows)
        if removed is not None:
            beaten = (absent > 0) & (y < 0)
            y, arg = torch.where(beaten, 0.0, y), torch.where(beaten, -1, arg)
        stat = arg.to(col.dtype)
    return y.to(x.dtype), stat


def gen_bwd(rowptr, col, eid, colptr, row, ceid, dy, y, stat, x, edge, weight, bias, mask, keep, param, row_scale, removed,
            aggr, eps, need_dx, need_dmask, need_dedge, need_dparam, all_edges):  # fmt: skip
    """(dx, dmask, dedge, dbias, dparam): see csrc/ops.h."""
    src, dst, ids, exists, raw, pre, r, m, message = _messages((rowptr, col, eid), x, edge, weight, bias, mask, keep, eps)
    g, out = dy.to(message.dtype)[dst], y.to(message.dtype)[dst]
    dparam = message.new_zeros(x.size(1)) if need_dparam else message.new_empty(0)
    gone = torch.zeros_like(message)  # what multiplies r in the mask's gradient of a removed edge
    if aggr == SUM:
        dmessage = g if row_scale is None else g * row_scale[dst].unsqueeze(1)
        gone = dmessage
    elif aggr in (SOFTMAX, SOFTMAX_SG):
        beta = _zero_unless(exists, torch.exp(param * message - stat[dst]))
        slope = 1 + param * (message - out) if aggr == SOFTMAX else 1
        dmessage = beta * g * slope
        gone = g * torch.exp(-stat[dst]) * (1 - param * out if aggr == SOFTMAX else 1)
        if need_dparam and aggr == SOFTMAX:
            dparam = _zero_unless(exists, g * beta * message * (message - out)).sum(0)
    elif aggr == POWER:
        scale = row_scale.unsqueeze(1)
        clamped = message.clamp(POWER_LOW, POWER_HIGH)
        inside = (message >= POWER_LOW) & (message <= POWER_HIGH) & (out > 0)
        safe = torch.where(out > 0, out, 1.0)
        dmessage = _zero_unless(inside, g * scale[dst] * safe ** (1 - param) * clamped ** (param - 1))
        if need_dparam:
            rows, dy_acc = rowptr.numel() - 1, dy.to(message.dtype)
            q = _zero_unless(exists, clamped**param * scale[dst] * safe**-param * torch.log(clamped))
            positive = torch.where(y > 0, y.to(message.dtype), 1.0)
            logs = _sum_rows(dst, q, rows) - torch.log(positive)
            if removed is not None:
                low = torch.tensor(POWER_LOW, dtype=message.dtype)
                logs = logs + removed.unsqueeze(1) * scale * (low / positive) ** param * torch.log(low)
            dparam = _zero_unless(y > 0, dy_acc * positive / param * logs).sum(0)
    else:
        dmessage = _zero_unless(stat[dst].long() == ids.unsqueeze(1), g)
    dmessage = _zero_unless(exists, dmessage)
    dpre = _zero_unless(exists & (pre > 0), dmessage * m)
    dx = _sum_rows(src, dpre, x.size(0)).to(x.dtype) if need_dx else x.new_empty(0)
    dmask = message.new_empty(0)
    if need_dmask:
        per_edge = torch.where(exists, dmessage, gone) * r
        per_edge = per_edge if all_edges else _zero_unless(exists, per_edge)
        dmask = _by_edge(mask.size(0), ids, per_edge.sum(1))
    dedge, dbias = x.new_empty(0) if weight is None else message.new_empty(0), message.new_empty(0)
    if need_dedge:
        dedge = _by_edge(edge.size(0), ids, dpre).to(x.dtype) if weight is None else dpre.T @ _zero_unless(exists, raw)
        dbias = dbias if bias is None else dpre.sum(0)
    return dx, dmask, dedge, dbias, dparam


def gcn_norm(rowptr, col, eid, colptr, row, ceid, mask, keep, loops, masked):
    """c_e = d_dst^-1/2 d_src^-1/2 for every edge, c_self = loops/d, and d^-1/2 with 0 where d <= 0."""
    src, dst, ids = _slots(rowptr, col, eid)
    dtype = torch.float32 if mask is None else mask.dtype
    amount = torch.ones(ids.numel(), dtype=dtype, device=col.device)
    if masked:
        amount = _zero_unless(_exists(keep, ids, 1), amount if mask is None else mask[ids])
    degree = _sum_rows(dst, amount, rowptr.numel() - 1)
    if loops is not None:
        degree = degree + loops
    positive = degree > 0
    dinv = _zero_unless(positive, torch.where(positive, degree, 1.0).rsqrt())
    c_self = dinv.new_empty(0) if loops is None else dinv * dinv * loops
    return _by_edge(ids.numel(), ids, dinv[dst] * dinv[src]), c_self, dinv


def gcn_norm_bwd(rowptr, col, eid, colptr, row, ceid, dinv, dc, dc_self, loops, keep):
    """Gradient of the mask through the degrees: -1/2 dinv_i^3 g_i at i = dst(e), g the gradient of dinv."""
    src, dst, ids = _slots(rowptr, col, eid)
    per_slot = dc[ids]
    g = _sum_rows(dst, per_slot * dinv[src], dinv.numel()) + _sum_rows(src, per_slot * dinv[dst], dinv.numel())
    if dc_self is not None:
        g = g + 2 * dc_self * loops * dinv
    dmask = (-0.5 * dinv**3 * g)[dst]
    return _by_edge(dc.numel(), ids, _zero_unless(_exists(keep, ids, 1), dmask))


def compact(rowptr, col, eid, colptr, row, ceid, keep, num_kept, renumber):
    """The kept slots of both sides; ids renumbered by rank, or the caller's."""
    rank = torch.cumsum(keep, 0) - 1

    def true_places(flags):
        return torch.nonzero_static(flags, size=num_kept).squeeze(1)

    def side(ptr, other, ids):
        flags = keep if ids is None else keep[ids.long()]
        slots = true_places(flags)
        before = torch.zeros(other.numel() + 1, dtype=torch.int64, device=other.device)
        torch.cumsum(flags, 0, out=before[1:])
        named = slots if ids is None else ids[slots].long()
        if renumber:
            named = named[:0] if ids is None else rank[named]
        return before[ptr], other[slots], named.to(other.dtype)

    edge_ids = true_places(keep)
    return *side(rowptr, col, eid), *side(colptr, row, ceid), edge_ids if renumber else edge_ids[:0].clone()


# Elementwise and linear.

_U32 = 0xFFFFFFFF


def philox(counter: tuple, key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words of 32 random bits, as int64 tensors, for each counter.

    `counter` is four int64 tensors or integers in [0, 2^32), `key` two integers in [0, 2^32).
    """
    device = next((c.device for c in counter if isinstance(c, Tensor)), None)
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64, device=device) for c in counter))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps; the low 64 bits are the product's
        hi0, lo0 = (p0 >> 32) & _U32, p0 & _U32
        hi1, lo1 = (p1 >> 32) & _U32, p1 & _U32
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return [c0, c1, c2, c3]


def random_words(first: int, count: int, seed: int, stream: int | Tensor, device) -> Tensor:
    """Random 32-bit words of elements first .. first+count-1, int64 [count]: element n is word n%4 of
    Philox(counter=(lo(n/4), hi(n/4), lo(stream), hi(stream)), key=(lo(seed), hi(seed))).
    A stream may be an int64 tensor [1]."""
    start = first // 4
    block = torch.arange(start, (first + count + 3) // 4, dtype=torch.int64, device=device)
    stream_words = stream & _U32, (stream >> 32) & _U32
    words = philox((block & _U32, block >> 32, *stream_words), (seed & _U32, (seed >> 32) & _U32))
    return torch.stack(words, dim=1).reshape(-1)[first - 4 * start :][:count]


def relu_dropout(x, rows, p, seed, step, step_at):
    """y = max(x, 0) / (1-p) where the element is kept (`_kept`), else 0."""
    wide = x.to(accumulator(x.dtype))
    return torch.where(_kept(x, rows, p, seed, step, step_at) & (x > 0), wide * _scale(p, wide), 0.0).to(x.dtype)


def relu_dropout_bwd(dy, y, p):
    """dx = dy / (1-p) where y > 0, else 0."""
    wide = dy.to(accumulator(dy.dtype))
    return torch.where(y > 0, wide * _scale(p, wide), 0.0).to(dy.dtype)


def elu_dropout(x, rows, p, seed, step, step_at):
    """y = elu(x) / (1-p) where the element is kept (`_kept`), else 0; -0 where it is kept and x = 0."""
    wide = x.to(accumulator(x.dtype))
    elu = torch.where(x > 0, wide, torch.expm1(wide).copysign(wide.new_tensor(-1.0)))
    return torch.where(_kept(x, rows, p, seed, step, step_at), elu * _scale(p, wide), 0.0).to(x.dtype)


def elu_dropout_bwd(dy, y, p):
    """dx = 0 where y is +0 (dropped), else dy / (1-p) where y > 0 and dy (y + 1 / (1-p)) where it is not."""
    wide, out = dy.to(accumulator(dy.dtype)), y.to(accumulator(dy.dtype))
    scale = _scale(p, wide)
    dropped = (out == 0) & ~torch.signbit(out)
    return torch.where(dropped, 0.0, wide * torch.where(out > 0, scale, out + scale)).to(dy.dtype)


def _scale(p, like):
    """1 / (1-p) like the tensor; 0 at p = 1."""
    return like.new_tensor(1.0 / (1.0 - p) if p < 1.0 else 0.0)


def _kept(x, rows, p, seed, step, step_at):
    """Whether an element's random word is at least floor(p 2^32); none at p = 1."""
    if p >= 1.0:
        return torch.zeros_like(x, dtype=torch.bool)
    step = step if step_at is None else step_at
    if rows is None:
        word = random_words(0, x.numel(), seed, step, x.device).reshape(x.shape)
    else:
        width = x.numel() // max(1, x.size(0))
        element = rows.unsqueeze(1) * width + torch.arange(width, device=x.device)
        word = words_of(element, seed, step).reshape(x.shape)
    return word >= int(p * 2**32)


def words_of(element: Tensor, seed: int, stream: int | Tensor) -> Tensor:
    """The random words of single elements, int64 like `element` (see random_words)."""
    block, stream_words = element // 4, (stream & _U32, (stream >> 32) & _U32)
    words = philox((block & _U32, block >> 32, *stream_words), (seed & _U32, (seed >> 32) & _U32))
    return torch.stack(words, -1).gather(-1, (element % 4).unsqueeze(-1)).squeeze(-1)


def _masked(weight, mask, keep, dtype):
    product = weight.to(dtype)
    if mask is not None:
        product = product * mask
    return product if keep is None else torch.where(keep, product, torch.zeros_like(product))


def masked_linear(x, weight, mask, bias, keep, all_weights):
    """y = x (W * m * keep)^T + b."""
    dtype = accumulator(x.dtype)
    y = x.to(dtype) @ _masked(weight, mask, keep, dtype).T
    return (y if bias is None else y + bias).to(x.dtype)


def masked_linear_bwd(dy, x, weight, mask, keep, need_dx, need_dw, all_weights):
    """dx = dy (W * m * keep); dw = dy^T x, the gradient of the product W * m, 0 where keep is False unless all_weights."""
    dtype = accumulator(x.dtype)
    dx, dw = x.new_empty(0), weight.new_empty(0)
    if need_dx:
        dx = (dy.to(dtype) @ _masked(weight, mask, keep, dtype)).to(x.dtype)
    if need_dw:
        dw = _drop_removed(dy.to(dtype).T @ x.to(dtype), keep, all_weights).to(weight.dtype)
    return dx, dw


def _drop_removed(dw, keep, all_weights):
    return dw if keep is None or all_weights else torch.where(keep, dw, torch.zeros_like(dw))


def _dense(rowptr, col, value, cols):
    count = rowptr[1:] - rowptr[:-1]
    row = torch.repeat_interleave(torch.arange(count.numel(), device=col.device), count, output_size=col.numel())
    dense = torch.zeros(count.numel(), cols, dtype=accumulator(value.dtype), device=col.device)
    return dense.index_put_((row, col.long()), value.to(dense.dtype), accumulate=True)


def masked_linear_csr(rowptr, col, value, colptr, row, cvalue, weight, mask, bias, keep, all_weights):
    """y = x (W * m * keep)^T + b, x given as CSR and as its transpose."""
    y = masked_linear(_dense(rowptr, col, value, weight.size(1)), weight, mask, bias, keep, all_weights)
    return y.to(value.dtype)


def masked_linear_csr_bwd(rowptr, col, value, colptr, row, cvalue, dy, weight, mask, keep, all_weights):
    """dw = dy^T x, the gradient of the product W * m, 0 where keep is False unless all_weights."""
    x = _dense(rowptr, col, value, weight.size(1))
    return masked_linear_bwd(dy, x, weight, mask, keep, False, True, all_weights)[1]


def masked_linear_kept(rowptr, col, value, colptr, row, cvalue, weight, ptr, out, place, bias, outputs, tiled):
    """y = x W^T + b, W holding weight[place_e] at (out_e, column of e) and 0 elsewhere."""
    dtype = accumulator(value.dtype)
    columns = ptr.numel() - 1
    of_entry = torch.repeat_interleave(torch.arange(columns, device=ptr.device), ptr[1:] - ptr[:-1], output_size=out.numel())
    kept = torch.zeros(outputs, columns, dtype=dtype, device=weight.device)
    kept[out.long(), of_entry] = weight[place].to(dtype)
    return masked_linear(_dense(rowptr, col, value, columns), kept, None, bias, None, False).to(value.dtype)


def masked_linear_kept_bwd(rowptr, col, value, colptr, row, cvalue, dy, weight, ptr, out, place):
    """The gradient of weight: (dy^T x) at the kept entries, at their places, 0 elsewhere."""
    columns = ptr.numel() - 1
    of_entry = torch.repeat_interleave(torch.arange(columns, device=ptr.device), ptr[1:] - ptr[:-1], output_size=out.numel())
    x = _dense(rowptr, col, value, columns)
    dw = torch.zeros_like(weight)
    dw[place] = (dy.to(x.dtype).T @ x)[out.long(), of_entry].to(weight.dtype)
    return dw


# Selection.

NAN_SCORE, BAD_K = 1, 2  # bits of a selection's status


def ordered_key(scores: Tensor, magnitude: bool) -> Tensor:
    """int64 keys that order as the scores do (as |scores| with `magnitude`); -0 and +0 are equal; NaN above all."""
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if magnitude:
        scores = scores.abs()
    scores = scores + 0.0  # -0 becomes +0
    bits = scores.view(torch.int64 if scores.dtype == torch.float64 else torch.int32).long()
    lowest = -(2**63) if scores.dtype == torch.float64 else -(2**31)
    return torch.where(bits >= 0, bits, lowest - bits)


def topk_mask(scores, k, alive, largest, magnitude):
    """Exactly k True over the concatenation of `scores`, the largest (or smallest) among those alive, lowest index first
    among equals; status int32 [1] (0 = ok), and nothing selected when it is not ok."""
    flat = torch.cat([s.reshape(-1) for s in scores])
    living = torch.cat([a.reshape(-1) for a in alive]) if alive is not None else torch.ones_like(flat, dtype=torch.bool)
    nan = bool((flat.isnan() & living).any())
    bad_k = not 0 <= k <= int(living.sum())
    picked = torch.zeros_like(living)
    if not nan and not bad_k:
        index = living.nonzero().squeeze(1)
        key = ordered_key(flat[index], magnitude)
        order = torch.sort(key, descending=largest, stable=True).indices
        picked[index[order[:k]]] = True
    status = torch.tensor([NAN_SCORE * nan + BAD_K * bad_k], dtype=torch.int32, device=flat.device)
    return _split(picked, scores), status


def topk_mask_out(scores, k, alive, largest, magnitude, out):
    """topk_mask written into `out`; returns the status."""
    keep, status = topk_mask(scores, k, alive, largest, magnitude)
    torch._foreach_copy_(out, keep)
    return status


def _split(flat, like):
    """Views of `flat` cut and shaped like each tensor; separate tensors, as the schema demands."""
    parts = torch.split(flat, [t.numel() for t in like])
    return [part.reshape(t.shape).clone() for part, t in zip(parts, like, strict=True)]


def fixed_log(x: Tensor) -> Tensor:
    """log(x) of positive normal float32 x by one fixed polynomial in separate float32 multiplies and adds (Cephes logf's
    coefficients): the same bits on every backend. Relative error below 3e-7 away from x = 1, absolute near it."""
    bits = x.view(torch.int32)
    exponent = ((bits >> 23) & 0xFF) - 126
    fraction = ((bits & 0x007FFFFF) | 0x3F000000).view(torch.float32)  # in [1/2, 1)
    low = fraction < 0.70710678
    exponent = (exponent - low.int()).float()
    t = torch.where(low, fraction + fraction, fraction) - 1.0
    return _log1p(t, exponent)


_LOG_COEFFICIENTS = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


def _log1p(t: Tensor, exponent: Tensor) -> Tensor:
    """log(2^exponent (1+t)) for t in [-0.293, 0.4143]."""
    z = t * t
    y = torch.full_like(t, _LOG_COEFFICIENTS[0])
    for coefficient in _LOG_COEFFICIENTS[1:]:
        y = y * t
        y = y + coefficient
    y = (y * t) * z
    y = y + exponent * _LN2_LOW
    y = y - z * 0.5
    return (t + y) + exponent * _LN2_HIGH


def gumbel_noise(first: int, count: int, seed: int, stream: int, device) -> Tensor:
    """Standard Gumbel noise float32 [count] of elements first .. first+count-1: -log(-log(u)), u = (word + 1/2) / 2^32.

    Above u = sqrt(1/2), log(u) is taken as log1p of the exact complement, so that the upper tail keeps its resolution.
    """
    word = random_words(first, count, seed, stream, device)
    upper = word >= 0xB504F334
    below_one = ((0xFFFFFFFF - word).float() + 0.5) * 2.0**-32
    u = (word.float() + 0.5) * 2.0**-32
    zero = torch.zeros_like(u)
    log_u = torch.where(upper, _log1p(torch.where(upper, -below_one, zero), zero), fixed_log(torch.where(upper, 0.5, u)))
    return -fixed_log(-log_u)


def _gumbel_keys(scores, tau, seed, stream, largest):
    """Perturbed scores, one float32 tensor per score tensor: +-score * float32(1/tau) + noise; +-score for tau = 0."""
    keys, first = [], 0
    for s in scores:
        signed = s.float() if largest else -s.float()
        if tau > 0:
            noise = gumbel_noise(first, s.numel(), seed, stream, s.device).reshape(s.shape)
            signed = signed * torch.tensor(1.0 / tau, dtype=torch.float32) + noise
        keys.append(signed)
        first += s.numel()
    return keys


def gumbel_topk(scores, k, tau, seed, alive, largest):
    """The k largest of score/tau + Gumbel noise: k draws without replacement from softmax(+-score/tau)."""
    return topk_mask(_gumbel_keys(scores, tau, seed, 0, largest), k, alive, True, False)


def exchange(keep, kept_scores, pruned_scores, k, tau, seed):
    """k kept elements with small scores leave (noise stream 1), k removed ones with large scores enter (stream 2)."""
    removed = [~part for part in keep]
    erased, status_out = topk_mask(_gumbel_keys(kept_scores, tau, seed, 1, False), k, keep, True, False)
    mined, status_in = topk_mask(_gumbel_keys(pruned_scores, tau, seed, 2, True), k, removed, True, False)
    status = status_out | status_in
    new = [torch.where(status == 0, (part & ~out) | into, part) for part, out, into in zip(keep, erased, mined, strict=True)]
    return new, erased, mined, status


# Optimiser.


def masked_adam(
    grad, place, keep, theta, mask, theta_mean, theta_square, mask_mean, mask_square, weight, step, theta_settings,
    mask_settings,
):  # fmt: skip
    """One step of Adam on theta and mask, in place, from grad = dL/d(theta * mask)."""
    step += 1
    for n, p in enumerate(theta):
        g = grad[n].view_as(p) if place is None else grad[n].flatten()[place[n].flatten().long()].view_as(p)
        there = torch.ones_like(p, dtype=torch.bool) if keep is None else keep[n]
        from_theta, from_mask = (g * mask[n], g * p) if mask else (g, None)
        _adam(p, from_theta, theta_mean[n], theta_square[n], there, step, theta_settings)
        if mask:
            _adam(mask[n], from_mask, mask_mean[n], mask_square[n], there, step, mask_settings)
        if weight:
            product = torch.where(there, p * mask[n] if mask else p, torch.zeros_like(p))
            if place is None:
                weight[n].copy_(product.view_as(weight[n]))
            else:
                weight[n].view(-1)[place[n].flatten().long()] = product.flatten()


def _adam(p, gradient, mean, square, there, step, settings):
    """Adam (Kingma and Ba, ICLR 2015) as torch.optim.Adam writes it, with an L1 subgradient, where `there`."""
    lr, beta1, beta2, eps, weight_decay, l1 = settings
    t = step.to(torch.float64)
    gradient = gradient + weight_decay * p + l1 * p.sign()
    mean.copy_(torch.where(there, beta1 * mean + (1 - beta1) * gradient, mean))
    square.copy_(torch.where(there, beta2 * square + (1 - beta2) * gradient * gradient, square))
    rate = (lr / (1 - beta1**t)).to(p.dtype)
    root = (1 - beta2**t).sqrt().to(p.dtype)
    p.copy_(torch.where(there, p - rate * (mean / (square.sqrt() / root + eps)), p))

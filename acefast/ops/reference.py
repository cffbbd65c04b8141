"""Every op in plain torch, with the argument order of its schema: the oracle of the tests and the fallback.

Written for clarity: messages of size E x F are materialised here and nowhere else.
"""

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums run in float64 for float64 and in float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Message passing. A graph is (rowptr, col, eid, colptr, row, ceid); see acefast.graph.Graph.


def _edges(rowptr: Tensor, col: Tensor, eid: Tensor | None) -> tuple[Tensor, Tensor]:
    """(source, destination) int64 [E] in the caller's order."""
    degree = rowptr[1:] - rowptr[:-1]
    dst = torch.repeat_interleave(torch.arange(degree.numel(), device=col.device), degree, output_size=col.numel())
    src = col.long()
    if eid is None:
        return src, dst
    slot = torch.empty_like(src)
    slot[eid.long()] = torch.arange(slot.numel(), device=col.device)
    return src[slot], dst[slot]


def _coefficient(num_edges, like, dtype, weight, mask, keep, row_scale, dst) -> Tensor:
    """weight_e * mask_e * row_scale_dst [E], 0 where keep is False."""
    coefficient = torch.ones(num_edges, dtype=dtype, device=like.device)
    for factor in (weight, mask, None if row_scale is None else row_scale[dst]):
        if factor is not None:
            coefficient = coefficient * factor
    return coefficient if keep is None else torch.where(keep, coefficient, torch.zeros_like(coefficient))


def spmm(rowptr, col, eid, colptr, row, ceid, x, weight, mask, keep, self_weight, row_scale, all_edges):
    """y_i = row_scale_i * sum over kept e: j->i of weight_e mask_e x_j, plus self_weight_i x_i."""
    src, dst = _edges(rowptr, col, eid)
    acc = x.to(accumulator(x.dtype))
    coefficient = _coefficient(src.numel(), x, acc.dtype, weight, mask, keep, row_scale, dst)
    messages = coefficient.unsqueeze(1) * acc[src]
    if keep is not None:
        messages = torch.where(keep.unsqueeze(1), messages, torch.zeros_like(messages))
    y = torch.zeros(rowptr.numel() - 1, x.size(1), dtype=acc.dtype, device=x.device).index_add_(0, dst, messages)
    if self_weight is not None:
        y = y + self_weight.unsqueeze(1) * acc
    return y.to(x.dtype)


def spmm_bwd(rowptr, col, eid, colptr, row, ceid, dy, x, weight, mask, keep, self_weight, row_scale, need_dx, need_dcoef,
             all_edges):  # fmt: skip
    """dx_j = sum over e: j->i of coefficient_e dy_i + self_weight_j dy_j; dcoef_e = row_scale_i <dy_i, x_j>;
    dself_j = <dy_j, x_j>. What is not needed comes back empty."""
    src, dst = _edges(rowptr, col, eid)
    dtype = accumulator(x.dtype)
    dy_acc, x_acc = dy.to(dtype), x.to(dtype)
    dx = x.new_empty(0)
    dcoef = x.new_empty(0, dtype=dtype)
    dself = x.new_empty(0, dtype=dtype)
    if need_dx:
        coefficient = _coefficient(src.numel(), x, dtype, weight, mask, keep, row_scale, dst)
        messages = coefficient.unsqueeze(1) * dy_acc[dst]
        if keep is not None:
            messages = torch.where(keep.unsqueeze(1), messages, torch.zeros_like(messages))
        total = torch.zeros_like(x_acc).index_add_(0, src, messages)
        if self_weight is not None:
            total = total + self_weight.unsqueeze(1) * dy_acc
        dx = total.to(x.dtype)
    if need_dcoef:
        dcoef = (dy_acc[dst] * x_acc[src]).sum(1)
        if row_scale is not None:
            dcoef = dcoef * row_scale[dst]
        if keep is not None and not all_edges:
            dcoef = torch.where(keep, dcoef, torch.zeros_like(dcoef))
        if self_weight is not None:
            dself = (dy_acc * x_acc).sum(1)
    return dx, dcoef, dself


def sddmm(rowptr, col, eid, colptr, row, ceid, p, q):
    """s_e = <p_dst(e), q_src(e)> over the last dimension."""
    src, dst = _edges(rowptr, col, eid)
    dtype = accumulator(p.dtype)
    return (p.to(dtype)[dst] * q.to(dtype)[src]).sum(-1)


def gcn_norm(rowptr, col, eid, colptr, row, ceid, mask, keep, add_self_loops, masked):
    """c_e = d_dst^-1/2 d_src^-1/2 for every edge, c_self = 1/d, and d^-1/2 with 0 where d <= 0."""
    src, dst = _edges(rowptr, col, eid)
    dtype = torch.float32 if mask is None else mask.dtype
    ones = torch.ones(src.numel(), dtype=dtype, device=col.device)
    amount = ones if mask is None or not masked else mask
    if masked and keep is not None:
        amount = torch.where(keep, amount, torch.zeros_like(amount))
    degree = torch.zeros(rowptr.numel() - 1, dtype=dtype, device=col.device).index_add_(0, dst, amount)
    if add_self_loops:
        degree = degree + 1
    positive = degree > 0
    dinv = torch.where(positive, torch.where(positive, degree, torch.ones_like(degree)).rsqrt(), torch.zeros_like(degree))
    return dinv[dst] * dinv[src], dinv * dinv if add_self_loops else dinv.new_empty(0), dinv


def gcn_norm_bwd(rowptr, col, eid, colptr, row, ceid, dinv, dc, dc_self, keep):
    """Gradient of the mask through the degrees: -1/2 dinv_i^3 g_i at i = dst(e), g the gradient of dinv."""
    src, dst = _edges(rowptr, col, eid)
    g = torch.zeros_like(dinv).index_add_(0, dst, dc * dinv[src]).index_add_(0, src, dc * dinv[dst])
    if dc_self is not None:
        g = g + 2 * dc_self * dinv
    dmask = (-0.5 * dinv**3 * g)[dst]
    return dmask if keep is None else torch.where(keep, dmask, torch.zeros_like(dmask))


# Elementwise and linear.

_U32 = 0xFFFFFFFF


def philox(counter: tuple, key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words of 32 random bits, as int64 tensors, for each counter.

    `counter` is four int64 tensors or integers in [0, 2^32), `key` two integers in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64) for c in counter))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps; the low 64 bits are the product's
        hi0, lo0 = (p0 >> 32) & _U32, p0 & _U32
        hi1, lo1 = (p1 >> 32) & _U32, p1 & _U32
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return [c0, c1, c2, c3]


def random_words(first: int, count: int, seed: int, stream: int, device) -> Tensor:
    """Random 32-bit words of elements first .. first+count-1, int64 [count]: element n is word n%4 of
    Philox(counter=(lo(n/4), hi(n/4), lo(stream), hi(stream)), key=(lo(seed), hi(seed)))."""
    start = first // 4
    block = torch.arange(start, (first + count + 3) // 4, dtype=torch.int64, device=device)
    stream_words = stream & _U32, (stream >> 32) & _U32
    words = philox((block & _U32, block >> 32, *stream_words), (seed & _U32, (seed >> 32) & _U32))
    return torch.stack(words, dim=1).reshape(-1)[first - 4 * start :][:count]


def relu_dropout(x, p, seed, step):
    """y = max(x, 0) / (1-p) where the element's random word is at least floor(p 2^32), else 0."""
    if p >= 1.0:
        return torch.zeros_like(x)
    word = random_words(0, x.numel(), seed, step, x.device).reshape(x.shape)
    alive = (x > 0) & (word >= int(p * 2**32))
    scaled = x.to(accumulator(x.dtype)) * torch.tensor(1.0 / (1.0 - p), dtype=accumulator(x.dtype))
    return torch.where(alive, scaled, torch.zeros_like(scaled)).to(x.dtype)


def relu_dropout_bwd(dy, y, p):
    """dx = dy / (1-p) where y > 0, else 0."""
    if p >= 1.0:
        return torch.zeros_like(dy)
    scaled = dy.to(accumulator(dy.dtype)) * torch.tensor(1.0 / (1.0 - p), dtype=accumulator(dy.dtype))
    return torch.where(y > 0, scaled, torch.zeros_like(scaled)).to(dy.dtype)


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

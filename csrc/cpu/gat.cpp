// gat and its backward on the CPU: see csrc/ops.h. Forward goes by destination: the coefficients of a batch of edges,
// then the gather of the source rows. Rows longer than a batch have their softmax statistics made beforehand. Backward
// goes by source in one visit of each edge.
#include <cmath>

#include "cpu/heads_gather.h"
#include "cpu/memory.h"
#include "cpu/slots.h"

namespace acefast {
namespace {

// The arguments that forward and backward share.
template <class A>
struct Attention {
  const A *a_src, *a_dst, *mask;
  bool mask_per_head, on_logit;
  A negative_slope;
  const uint8_t* keep;

  Vec<A> slope(Vec<A> reach) const { return reach < A(0) ? splat(negative_slope) : splat(A(1)); }
};

template <class T>
struct GatBatch : Batch<T, T> {
  using A = acc_t<T>;
  void make(const HeadLanes<A>& lanes, const EdgeDropout<A>& dropout) {
    noise.emplace(dropout);
    for (auto* buffer : {&reach, &masks, &drops, &coefs, &others, &lse, &mean, &alpha}) *buffer = lanes.buffer();
    sum.resize(lanes.H);
    factor.resize(lanes.H);
  }
  std::optional<EdgeDropout<A>> noise;
  // Per entry and head. reach: the gathered one of a_src_j and a_dst_i; others: coefficients of slope_y, <dy_i, z_j>.
  std::vector<A> reach, masks, drops, coefs, others, lse, mean, alpha;
  std::vector<A> sum, factor;  // [H], of one row
};

template <class T, class A = acc_t<T>>
void fill_edges(GatBatch<T>& b, const HeadLanes<A>& lanes, const Attention<A>& a) {
  const int64_t n = b.begin[b.rows];
  if (a.mask && a.mask_per_head) lanes.copy(a.mask, lanes.H, b.id, n, b.masks.data());
  if (a.mask && !a.mask_per_head) lanes.spread(a.mask, b.id, n, b.masks.data());
  if (*b.noise) b.noise->fill(lanes, b.id, n, b.drops.data());
}

// logit of the entries of row r in `block`, whose own term is `own`; calls f(k, place in the buffers, reach, logit).
template <class T, class A, class F>
void for_logits(const GatBatch<T>& b, const HeadLanes<A>& lanes, const Attention<A>& a, int64_t r, int64_t block,
                Vec<A> own, const F& f) {
  for (int64_t k = b.begin[r]; k < b.begin[r + 1]; k += lanes.step) {
    const int64_t at = k * lanes.pitch + block * lanes.L;
    const Vec<A> reach = load(b.reach.data() + at) + own;
    Vec<A> logit = reach * a.slope(reach);
    if (a.on_logit && a.mask) logit *= load(b.masks.data() + at);
    f(k, at, reach, logit);
  }
}

// Softmax statistics of part of a row: the largest logit, the sum of exp(logit - largest) and of slope * mask times it.
template <class A>
struct RowPart {
  std::vector<A> top, sum, slope_sum;  // [H]
  explicit RowPart(int64_t H) : top(H, -std::numeric_limits<A>::infinity()), sum(H), slope_sum(H) {}

  void join(const A* other_top, const A* other_sum, const A* other_slope_sum) {
    for (size_t h = 0; h < top.size(); ++h) {
      const A best = std::max(top[h], other_top[h]), shift = finite_or_zero(best);
      const A mine = std::exp(top[h] - shift), others = std::exp(other_top[h] - shift);
      sum[h] = sum[h] * mine + other_sum[h] * others;
      slope_sum[h] = slope_sum[h] * mine + other_slope_sum[h] * others;
      top[h] = best;
    }
  }
};

// Statistics of row r of a filled batch: top, sum and slope_sum [H]. b.coef is left with exp(logit - top).
template <class T, class A>
void row_statistics(GatBatch<T>& b, const HeadLanes<A>& lanes, const Attention<A>& a, int64_t r, A* top, A* sum,
                    A* slope_sum) {
  const int64_t i = b.row0 + r, end = b.begin[r + 1];
  for (int64_t block = 0; block < lanes.blocks; ++block) {
    const Vec<A> own = lanes.repeat(a.a_dst + i * lanes.H + block * lanes.L, block);
    Vec<A> best = splat(-std::numeric_limits<A>::infinity());
    for_logits(b, lanes, a, r, block, own, [&](int64_t k, int64_t at, Vec<A>, Vec<A> logit) {
      store(b.coefs.data() + at, logit);
      best = vmax<A>(best, lanes.first(logit, end - k, -std::numeric_limits<A>::infinity()));
    });
    lanes.fold_max(best, block, top + block * lanes.L);
    A shift[HeadLanes<A>::L];
    for (int64_t h = 0; h < lanes.heads_of(block); ++h) shift[h] = finite_or_zero(top[block * lanes.L + h]);
    const Vec<A> shifts = lanes.repeat(shift, block);
    Vec<A> total{}, slopes{};
    for_logits(b, lanes, a, r, block, own, [&](int64_t k, int64_t at, Vec<A> reach, Vec<A>) {
      A* c = b.coefs.data() + at;
      const Vec<A> e = vexp<A>(load(c) - shifts);
      store(c, e);
      total += lanes.first(e, end - k, A(0));
      if (!slope_sum) return;
      Vec<A> s = e * a.slope(reach);
      if (a.on_logit && a.mask) s *= load(b.masks.data() + at);
      slopes += lanes.first(s, end - k, A(0));
    });
    lanes.fold_sum(total, block, sum + block * lanes.L);
    if (slope_sum) lanes.fold_sum(slopes, block, slope_sum + block * lanes.L);
  }
}

// lse and, where asked for, slope_sum of the rows with more than lanes.entries() slots.
template <class T, class I, class A = acc_t<T>>
void long_row_statistics(const Side<I>& side, const HeadLanes<A>& lanes, const Attention<A>& a, A* lse, A* slope_sum) {
  const auto pieces = long_row_pieces(side.ptr, side.n, lanes.entries());
  std::vector<RowPart<A>> parts(pieces.size(), RowPart<A>(lanes.H));
  parallel_tasks(int64_t(pieces.size()), [&](int64_t task, int64_t) {
    const Piece& piece = pieces[task];
    auto b = std::make_unique<GatBatch<T>>();
    b->make(lanes, EdgeDropout<A>(0, 0, 0));
    b->row0 = piece.row0;
    b->rows = 1;
    RowPart<A> batch(lanes.H);
    for (int64_t s = piece.slot0; s < piece.slot1; s += lanes.entries()) {
      fill_slots(*b, side, s, std::min(s + lanes.entries(), piece.slot1), 0, a.keep, true);
      fill_edges(*b, lanes, a);
      lanes.copy(a.a_src, lanes.H, b->idx, b->begin[1], b->reach.data());
      row_statistics(*b, lanes, a, 0, batch.top.data(), batch.sum.data(), batch.slope_sum.data());
      parts[task].join(batch.top.data(), batch.sum.data(), batch.slope_sum.data());
    }
  });
  for (size_t p = 0; p < pieces.size();) {
    const int64_t i = pieces[p].row0;
    RowPart<A> row(lanes.H);
    for (; p < pieces.size() && pieces[p].row0 == i; ++p)
      row.join(parts[p].top.data(), parts[p].sum.data(), parts[p].slope_sum.data());
    for (int64_t h = 0; h < lanes.H; ++h) {
      lse[i * lanes.H + h] = row.top[h] + std::log(row.sum[h]);
      if (slope_sum) slope_sum[i * lanes.H + h] = row.sum[h] == 0 ? A(0) : row.slope_sum[h] / row.sum[h];
    }
  }
}

// b.coef = alpha * mask * drop and, with save, b.others = alpha * slope * mask * drop for all entries; lse and
// slope_sum of the rows that lie in the batch as a whole.
template <class T, class A>
void coefficients(GatBatch<T>& b, const HeadLanes<A>& lanes, const Attention<A>& a, A* lse, A* slope_sum) {
  const bool part = b.carry_in || b.carry_out;
  const int64_t H = lanes.H;
  A* coef = b.coefs.data();
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t i = b.row0 + r;
    A* row_lse = lse + i * H;
    if (!part) {
      A* row_slope_sum = slope_sum ? slope_sum + i * H : nullptr;
      row_statistics(b, lanes, a, r, row_lse, b.sum.data(), row_slope_sum);
      for (int64_t h = 0; h < H; h += lanes.L) {
        const int64_t count = std::min(lanes.L, H - h);
        const Vec<A> sum = load_some(b.sum.data() + h, count);
        const Vec<A> factor = sum == A(0) ? Vec<A>{} : A(1) / sum;
        store_some(b.factor.data() + h, factor, count);
        store_some(row_lse + h, load_some(row_lse + h, count) + vlog<A>(sum), count);
        if (slope_sum)
          store_some(row_slope_sum + h, load_some(row_slope_sum + h, count) * factor, count);
      }
    }
    for (int64_t block = 0; block < lanes.blocks; ++block) {
      const Vec<A> own = lanes.repeat(a.a_dst + i * H + block * lanes.L, block);
      const Vec<A> scale = lanes.repeat((part ? row_lse : b.factor.data()) + block * lanes.L, block);
      for_logits(b, lanes, a, r, block, own, [&](int64_t, int64_t at, Vec<A> reach, Vec<A> logit) {
        Vec<A> c = part ? vexp<A>(logit - scale) : load(coef + at) * scale;
        if (*b.noise) c *= load(b.drops.data() + at);
        const Vec<A> m = a.mask ? load(b.masks.data() + at) : splat(A(1));
        store(coef + at, a.on_logit ? c : c * m);
        if (slope_sum) store(b.others.data() + at, c * a.slope(reach) * m);
      });
    }
  }
}

// gather_heads_dots for any number of columns, one head after the other.
template <class T>
void gather_each_head(Batch<T, T>& b, const HeadsGather<T>& w) {
  const int64_t n = b.begin[b.rows];
  for (int64_t h = 0; h < w.H; ++h) {
    b.src = w.src + h * w.F;
    b.center = w.center + h * w.F;
    b.out = w.out + h * w.F;
    for (int64_t k = 0; k < n; ++k) b.coef[k] = w.coef[k * w.pitch + h];
    gather_batch<T, T, true, true>(b);
    for (int64_t k = 0; k < n; ++k) w.dot[k * w.pitch + h] = b.dot[k];
    if (b.carry) b.carry += w.F;
  }
}

template <class T, class I, class A = acc_t<T>>
void gat_fwd(const Side<I>& side, int64_t H, int64_t F, const T* z, const Attention<A>& a, const EdgeDropout<A>& noise,
             T* y, A* lse, T* slope_y, A* slope_sum) {
  const HeadLanes<A> lanes(H);
  const int64_t C = H * F;
  long_row_statistics<T>(side, lanes, a, lse, slope_sum);
  gather_plan<T, T, true, GatBatch<T>>(
      side.ptr, side.n, slope_y ? 2 * C : C,
      [&](GatBatch<T>& b) {
        b.make(lanes, noise);
        b.F = F;
        b.stride = C;
        b.scale = b.self = nullptr;
      },
      [&](GatBatch<T>& b, int64_t s0, int64_t s1) {
        fill_slots(b, side, s0, s1, C, a.keep, true);
        prefetch_slots(side, s0, s1, static_cast<const A*>(nullptr), a.mask, a.keep, a.mask_per_head ? H : 1);
        fill_edges(b, lanes, a);
        lanes.copy(a.a_src, H, b.idx, b.begin[b.rows], b.reach.data());
        coefficients(b, lanes, a, lse, slope_sum);
        gather_heads(b, {z, nullptr, y, slope_y, H, F, lanes.pitch, b.coefs.data(), b.others.data(), nullptr});
      },
      lanes.entries());
}

// Of each destination and head: a_dst, lse and D, side by side.
template <class T, class A = acc_t<T>>
std::vector<A> row_terms(int64_t n, int64_t H, int64_t F, const T* dy, const T* y, const A* lse, const T* slope_y,
                         const A* slope_sum, const A* a_dst, A* da_dst) {
  constexpr int L = kLanesOf<A>;
  std::vector<A> terms(n * 3 * H);
  parallel_range(n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t h = 0; h < H; ++h) {
        const int64_t row = (i * H + h) * F;
        Vec<A> mean{}, reach{};
        int64_t f = 0;
        for (; f + L <= F; f += L) {
          const Vec<A> g = load(dy + row + f);
          mean += g * load(y + row + f);
          reach += g * load(slope_y + row + f);
        }
        if (f < F) {
          const Vec<A> g = load_tail(dy + row + f, int(F - f));
          mean += g * load_tail(y + row + f, int(F - f));
          reach += g * load_tail(slope_y + row + f, int(F - f));
        }
        const A D = hsum<A>(mean);
        A* out = terms.data() + i * 3 * H + h;
        out[0] = a_dst[i * H + h];
        out[H] = lse[i * H + h];
        out[2 * H] = D;
        da_dst[i * H + h] = hsum<A>(reach) - D * slope_sum[i * H + h];
      }
    }
  });
  return terms;
}

template <class T, class I, class A = acc_t<T>>
void gat_backward(const Side<I>& side, int64_t H, int64_t F, const T* dy, const T* z, const std::vector<A>& terms,
                  const Attention<A>& a, const EdgeDropout<A>& noise, T* dz, A* da_src, A* dmask) {
  const HeadLanes<A> lanes(H);
  const int64_t C = H * F;
  gather_plan<T, T, true, GatBatch<T>>(
      side.ptr, side.n, C + H,
      [&](GatBatch<T>& b) {
        b.make(lanes, noise);
        b.F = F;
        b.stride = C;
        b.scale = b.self = nullptr;
      },
      [&](GatBatch<T>& b, int64_t s0, int64_t s1) {
        fill_slots(b, side, s0, s1, C, a.keep, true);
        prefetch_slots(side, s0, s1, static_cast<const A*>(dmask), a.mask, a.keep, a.mask_per_head ? H : 1);
        fill_edges(b, lanes, a);
        const int64_t n = b.begin[b.rows];
        lanes.copy(terms.data(), 3 * H, b.idx, n, b.reach.data());
        lanes.copy(terms.data() + H, 3 * H, b.idx, n, b.lse.data());
        lanes.copy(terms.data() + 2 * H, 3 * H, b.idx, n, b.mean.data());
        A *coef = b.coefs.data(), *product = b.others.data(), *alpha = b.alpha.data();
        for (int64_t r = 0; r < b.rows; ++r)
          for (int64_t block = 0; block < lanes.blocks; ++block) {
            const Vec<A> own = lanes.repeat(a.a_src + (b.row0 + r) * H + block * lanes.L, block);
            for_logits(b, lanes, a, r, block, own, [&](int64_t, int64_t at, Vec<A>, Vec<A> logit) {
              Vec<A> c = vexp<A>(logit - load(b.lse.data() + at));
              store(alpha + at, c);
              if (!a.on_logit && a.mask) c *= load(b.masks.data() + at);
              if (*b.noise) c *= load(b.drops.data() + at);
              store(coef + at, c);
            });
          }
        A* carry = b.carry;
        if (has_heads_dots<T>(F))
          gather_heads_dots(b, {dy, z, dz, nullptr, H, F, lanes.pitch, coef, nullptr, product});
        else
          gather_each_head(b, {dy, z, dz, nullptr, H, F, lanes.pitch, coef, nullptr, product});
        for (int64_t r = 0; r < b.rows; ++r) {
          A* sum = b.carry_out ? carry + C : da_src + (b.row0 + r) * H;
          for (int64_t block = 0; block < lanes.blocks; ++block) {
            const Vec<A> own = lanes.repeat(a.a_src + (b.row0 + r) * H + block * lanes.L, block);
            Vec<A> total{};
            for_logits(b, lanes, a, r, block, own, [&](int64_t k, int64_t at, Vec<A> reach, Vec<A>) {
              const Vec<A> m = a.mask ? load(b.masks.data() + at) : splat(A(1)), weight = load(alpha + at);
              Vec<A> p = load(product + at);
              if (*b.noise) p *= load(b.drops.data() + at);
              const Vec<A> slope = a.slope(reach);
              const Vec<A> dlogit = weight * ((a.on_logit ? p : p * m) - load(b.mean.data() + at));
              const Vec<A> dreach = a.on_logit ? dlogit * slope * m : dlogit * slope;
              total += lanes.first(dreach, b.begin[r + 1] - k, A(0));
              store(coef + at, a.on_logit ? dlogit * slope * reach : weight * p);  // dmask per head
            });
            A here[HeadLanes<A>::L];
            lanes.fold_sum(total, block, here);
            for (int64_t h = 0; h < lanes.heads_of(block); ++h)
              sum[block * lanes.L + h] = here[h] + (b.carry_in ? carry[C + block * lanes.L + h] : A(0));
          }
        }
        if (!dmask) return;
        for (int64_t k = 0; k < n; ++k) {
          const A* p = coef + k * lanes.pitch;
          if (a.mask_per_head) {
            std::copy_n(p, H, dmask + b.id[k] * H);
          } else {
            A total = 0;
            for (int64_t h = 0; h < H; ++h) total += p[h];
            dmask[b.id[k]] = total;
          }
        }
      },
      lanes.entries());
}

// H, F and E of a call, checked.
struct Sizes {
  int64_t H, F, E;
};

Sizes check_gat(const char* op, const GraphArgs& g, const Tensor& col, const Tensor& z, const Tensor& a_src,
                const Tensor& a_dst, const OptTensor& mask, const OptTensor& keep, double dropout) {
  check(z.dim() == 3, op, "z must have three dimensions");
  const Sizes n{z.size(1), z.size(2), edge_count(op, g, {&mask, &keep})};
  const ScalarType acc = acc_type(z.scalar_type());
  check_tensor(op, "z", z, col, {g.n_src, n.H, n.F});
  check_tensor(op, "a_src", a_src, col, {g.n_src, n.H});
  check_dtype(op, "a_src", a_src, acc);
  check_tensor(op, "a_dst", a_dst, col, {g.n_dst, n.H});
  check_dtype(op, "a_dst", a_dst, acc);
  if (mask && mask->dim() == 2)
    check_optional(op, "mask", mask, col, acc, {n.E, n.H});
  else
    check_optional(op, "mask", mask, col, acc, {n.E});
  check_optional(op, "keep", keep, col, ScalarType::Bool, {n.E});
  check(dropout >= 0 && dropout <= 1, op, "dropout must lie in [0, 1]");
  return n;
}

template <class A>
Attention<A> attention(const Tensor& a_src, const Tensor& a_dst, const OptTensor& mask, const OptTensor& keep,
                       bool mask_on_logit, double negative_slope) {
  return {ptr<A>(a_src), ptr<A>(a_dst),     ptr<A>(mask),      mask && mask->dim() == 2,
          mask_on_logit, A(negative_slope), ptr<uint8_t>(keep)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gat(const Tensor& rowptr, const Tensor& col, const OptTensor& eid,
                                               const Tensor& colptr, const Tensor& row, const OptTensor& ceid,
                                               const Tensor& z, const Tensor& a_src, const Tensor& a_dst,
                                               const OptTensor& mask, const OptTensor& keep, bool mask_on_logit,
                                               double negative_slope, double dropout, int64_t seed, int64_t step,
                                               const OptTensor& step_at, bool save) {
  const char* op = "gat";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  const auto [H, F, E] = check_gat(op, g, col, z, a_src, a_dst, mask, keep, dropout);
  check_optional(op, "step_at", step_at, z, ScalarType::Long, {1});
  const uint64_t now = Step{uint64_t(step), ptr<int64_t>(step_at)}.read();
  const ScalarType dtype = z.scalar_type(), acc = acc_type(dtype);
  Tensor y = new_output(z, {g.n_dst, H, F}, dtype), lse = new_tensor(z, {g.n_dst, H}, acc);
  Tensor slope_y = save ? new_output(z, {g.n_dst, H, F}, dtype) : none_tensor(z, dtype);
  Tensor slope_sum = save ? new_tensor(z, {g.n_dst, H}, acc) : none_tensor(z, acc);
  if (H == 0) return {y, lse, slope_y, slope_sum};
  dispatch_float(op, dtype, [&, H = H, F = F](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    dispatch_index(op, g.index_type, [&](auto index) {
      gat_fwd<T>(by_destination<typename decltype(index)::type>(g), H, F, ptr<T>(z),
                 attention<A>(a_src, a_dst, mask, keep, mask_on_logit, negative_slope),
                 EdgeDropout<A>(dropout, uint64_t(seed), now), mutable_ptr<T>(y), mutable_ptr<A>(lse),
                 save ? mutable_ptr<T>(slope_y) : nullptr, save ? mutable_ptr<A>(slope_sum) : nullptr);
    });
  });
  return {y, lse, slope_y, slope_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gat_bwd(
    const Tensor& rowptr, const Tensor& col, const OptTensor& eid, const Tensor& colptr, const Tensor& row,
    const OptTensor& ceid, const Tensor& dy, const Tensor& y, const Tensor& lse, const Tensor& slope_y,
    const Tensor& slope_sum, const Tensor& z, const Tensor& a_src, const Tensor& a_dst, const OptTensor& mask,
    const OptTensor& keep, bool mask_on_logit, double negative_slope, double dropout, int64_t seed, int64_t step,
    const OptTensor& step_at, bool need_dmask) {
  const char* op = "gat_bwd";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  const auto [H, F, E] = check_gat(op, g, col, z, a_src, a_dst, mask, keep, dropout);
  check_optional(op, "step_at", step_at, z, ScalarType::Long, {1});
  const uint64_t now = Step{uint64_t(step), ptr<int64_t>(step_at)}.read();
  const ScalarType dtype = z.scalar_type(), acc = acc_type(dtype);
  using Named = std::pair<const char*, const Tensor*>;
  for (const auto& [name, t] : {Named{"dy", &dy}, Named{"y", &y}, Named{"slope_y", &slope_y}}) {
    check_tensor(op, name, *t, col, {g.n_dst, H, F});
    check_dtype(op, name, *t, dtype);
  }
  for (const auto& [name, t] : {Named{"lse", &lse}, Named{"slope_sum", &slope_sum}}) {
    check_tensor(op, name, *t, col, {g.n_dst, H});
    check_dtype(op, name, *t, acc);
  }
  check(!need_dmask || mask, op, "need_dmask needs a mask");
  const bool per_head = mask && mask->dim() == 2;
  Tensor dz = new_output(z, {g.n_src, H, F}, dtype);
  Tensor da_src = new_tensor(z, {g.n_src, H}, acc), da_dst = new_tensor(z, {g.n_dst, H}, acc);
  Tensor dmask = !need_dmask ? none_tensor(z, acc) : per_head ? new_output(z, {E, H}, acc) : new_output(z, {E}, acc);
  dispatch_float(op, dtype, [&, H = H, F = F, E = E](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    A* mask_grad = need_dmask ? mutable_ptr<A>(dmask) : nullptr;
    if (mask_grad && (keep || E > g.n_edges || H == 0)) parallel_zero(mask_grad, dmask.numel());
    if (H == 0) return;
    const auto terms = row_terms<T>(g.n_dst, H, F, ptr<T>(dy), ptr<T>(y), ptr<A>(lse), ptr<T>(slope_y),
                                    ptr<A>(slope_sum), ptr<A>(a_dst), mutable_ptr<A>(da_dst));
    dispatch_index(op, g.index_type, [&](auto index) {
      gat_backward<T>(by_source<typename decltype(index)::type>(g), H, F, ptr<T>(dy), ptr<T>(z), terms,
                      attention<A>(a_src, a_dst, mask, keep, mask_on_logit, negative_slope),
                      EdgeDropout<A>(dropout, uint64_t(seed), now), mutable_ptr<T>(dz), mutable_ptr<A>(da_src), mask_grad);
    });
  });
  return {dz, da_src, da_dst, dmask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("gat", TORCH_BOX(&gat));
  m.impl("gat_bwd", TORCH_BOX(&gat_bwd));
}

}  // namespace acefast

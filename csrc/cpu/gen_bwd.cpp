// gen_bwd on the CPU: see csrc/ops.h. By source: x_j and the sums of dx_j stay in registers, what an edge needs of its
// destination is gathered. For the softmax that is dy_i, y_i and lse_i; where every |lse| <= kFold it is packed into
// dy_i exp(-lse_i) and y_i, two rows side by side, since exp(t msg) then neither overflows nor loses digits. The power
// mean gathers row_scale_i dy_i and log y_i, packed likewise.
#include "cpu/gen.h"

namespace acefast {
namespace {

inline constexpr int kFold = 40;
inline constexpr int kProducts = 16;  // edges whose gradients are multiplied with their raw features together

enum Rule { kSumRule, kFoldedRule, kSoftmaxRule, kPowerRule, kMaxRule };

inline constexpr bool packed(int rule) {
  return rule == kFoldedRule || rule == kPowerRule;
}

template <class T, class A = acc_t<T>>
struct BackwardArgs : GenArgs<T> {
  const T *dy, *y;
  const A* lse;
  const void* arg;  // max: edge ids, int32 or int64
  bool wide_ids;
  const A* slope;  // [F]: t, or 0 where beta is constant
  const A* pack;   // [n_dst, 2 F], blocks of columns of the first row each followed by those of the second
  T *dx, *dedge;   // nullptr where not needed, as below
  A *dmask, *dparam, *dweight;
  bool removed_dots;  // dmask of removed edges too

  explicit BackwardArgs(GenArgs<T> args) : GenArgs<T>(std::move(args)) {}
};

template <int RULE>
inline constexpr int kVecsOf = RULE == kPowerRule || RULE == kMaxRule ? 1 : kGenVecs;

// Which of the columns' extremes came from edge id.
template <class A, class I>
inline IntVec<A> hits(const I* arg, int64_t id, int n) {
  IntVec<A> hit{};
  for (int l = 0; l < n; ++l) hit[l] = arg[l] == I(id) ? -1 : 0;
  return hit;
}

// sums[d, f0 ..] += sum over `count` entries from k0 of raw_d * dpre.
template <int NV, class A>
[[gnu::noinline]] void add_products(Entries<A>& b, const Encoder<A>& encoder, int64_t k0, int count, int64_t f0,
                                    const A* dpre) {
  using V = Vec<A>;
  constexpr int L = kLanesOf<A>;
  const int64_t D1 = encoder.D1;
  const auto columns = [&](int64_t d, auto several) {
    constexpr int ND = decltype(several)::value;
    V acc[ND][NV] = {};
    const A* raw = b.raw.data() + k0 * D1 + d;
    for (int k = 0; k < count; ++k, raw += D1) {
      for (int i = 0; i < ND; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] += raw[i] * load(dpre + (k * NV + v) * L);
      }
    }
    for (int i = 0; i < ND; ++i) {
      A* sum = b.products.data() + (d + i) * encoder.stride + f0;
      for (int v = 0; v < NV; ++v) store(sum + v * L, load(sum + v * L) + acc[i][v]);
    }
  };
  int64_t d = 0;
  for (; d + 3 <= D1; d += 3) columns(d, std::integral_constant<int, 3>{});
  for (; d < D1; ++d) columns(d, std::integral_constant<int, 1>{});
}

// One block of columns of a batch. `removed`: entries of removed edges, of which only the dots are wanted.
template <class T, int RULE, int FEATURES, int NV, bool NARROW>
[[gnu::noinline]] void backward_block(const BackwardArgs<T>& a, Entries<acc_t<T>>& b, int64_t f0, int n, bool removed,
                                      acc_t<T>* dparam) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int L = kLanesOf<A>;
  const int64_t width = NARROW ? n : NV * L;
  constexpr bool maybe_rows = FEATURES == kRows || FEATURES == kAnyFeatures;
  constexpr bool maybe_encoded = FEATURES == kEncoded || FEATURES == kAnyFeatures;
  const bool write_edges = maybe_rows && a.dedge && !removed;
  const bool products = maybe_encoded && a.dweight && !removed;
  V param[NV], slope[NV], dt[NV];
  for (int v = 0; v < NV; ++v) {
    param[v] = a.param ? get<NARROW>(a.param + f0 + v * L, n) : V{};
    slope[v] = a.slope ? get<NARROW>(a.slope + f0 + v * L, n) : V{};
    dt[v] = V{};
  }
  A dpre[maybe_encoded ? kProducts * NV * L : 1];
  int waiting = 0;  // entries whose dpre are not multiplied yet
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t at = (b.row0 + r) * a.F + f0;
    V x[NV], ready[NV], acc[NV];
    for (int v = 0; v < NV; ++v) {
      x[v] = get<NARROW>(a.x + at + v * L, n);
      ready[v] = vmax<A>(V{}, x[v]) + a.eps;
      acc[v] = b.carry_in && !removed ? get<NARROW>(b.carry + f0 + v * L, n) : V{};
    }
    for (int64_t k = b.begin[r]; k < b.begin[r + 1]; ++k) {
      const int64_t next = b.off[k + kAhead], off = b.off[k];
      if (packed(RULE)) {
        prefetch_row<2 * NV>(a.pack + next + 2 * f0);
      } else {
        prefetch_row<NV>(a.dy + next + f0);
        if (RULE == kSoftmaxRule) prefetch_row<NV>(a.y + next + f0);
        if (RULE == kSoftmaxRule) prefetch_row<NV>(a.lse + next + f0);
        if (RULE == kMaxRule) __builtin_prefetch(static_cast<const char*>(a.arg) + (next + f0) * (a.wide_ids ? 8 : 4));
      }
      if (maybe_rows && a.edge && !a.encoder.D1) prefetch_row<NV>(a.edge + b.id[k + kAhead] * a.F + f0);
      V pre[NV];
      if (FEATURES != kNoFeatures) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) pre[v] = x[v];
        add_features<FEATURES, NV, NARROW>(pre, b, k, a.edge, a.encoder, a.F, f0, n);
      }
      const A m = b.coef[k];
      V dot = V{};
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V ready_e = FEATURES == kNoFeatures ? ready[v] : vmax<A>(V{}, pre[v]) + a.eps;
        const V msg = ready_e * m;
        const int64_t column = f0 + v * L;
        V dmsg;
        if constexpr (RULE == kSumRule) dmsg = get<NARROW>(a.dy + off + column, n) * b.scale[k];
        if constexpr (RULE == kFoldedRule || RULE == kSoftmaxRule) {
          V weighted, mean;
          if constexpr (RULE == kFoldedRule) {
            const A* p = a.pack + off + 2 * f0 + v * L;
            weighted = vexp<A>(param[v] * msg) * get<NARROW>(p, n);
            mean = get<NARROW>(p + width, n);
          } else {
            const V beta = vexp<A>(param[v] * msg - get<NARROW>(a.lse + off + column, n));
            weighted = beta * get<NARROW>(a.dy + off + column, n);
            mean = get<NARROW>(a.y + off + column, n);
          }
          const V above = msg - mean;
          dmsg = weighted * (slope[v] * above + A(1));
          dt[v] += (weighted * above) * msg;
        }
        if constexpr (RULE == kPowerRule) {
          const A* p = a.pack + off + 2 * f0 + v * L;
          const V c = vmin<A>(splat(A(kPowerHigh)), vmax<A>(splat(A(kPowerLow)), msg)), logc = vlog<A>(c);
          const V d = get<NARROW>(p, n) * vexp<A>((param[v] - A(1)) * (logc - get<NARROW>(p + width, n)));
          dmsg = c == msg ? d : V{};
          dt[v] += d * c * logc;
        }
        if constexpr (RULE == kMaxRule) {
          const int lanes = NARROW ? n : L;
          const IntVec<A> hit = a.wide_ids ? hits<A>(static_cast<const int64_t*>(a.arg) + off + column, b.id[k], lanes)
                                           : hits<A>(static_cast<const int32_t*>(a.arg) + off + column, b.id[k], lanes);
          dmsg = hit != 0 ? get<NARROW>(a.dy + off + column, n) : V{};
        }
        dot += dmsg * ready_e;
        V d = dmsg * m;
        if constexpr (FEATURES != kNoFeatures) d = pre[v] > A(0) ? d : V{};
        if (write_edges) put<NARROW>(a.dedge + b.id[k] * a.F + column, d, n);
        if (products) store(dpre + (waiting * NV + v) * L, d);
        acc[v] += d;
      }
      b.dot[k] += hsum<A>(dot);
      if (products && ++waiting == kProducts) {
        add_products<NV>(b, a.encoder, k + 1 - waiting, waiting, f0, dpre);
        waiting = 0;
      }
    }
    if (removed) continue;
    for (int v = 0; v < NV; ++v) {
      if (FEATURES == kNoFeatures) acc[v] = x[v] > A(0) ? acc[v] : V{};
      if (b.carry_out)
        put<NARROW>(b.carry + f0 + v * L, acc[v], n);
      else if (a.dx)
        put<NARROW>(a.dx + at + v * L, acc[v], n);
    }
  }
  if (waiting) add_products<NV>(b, a.encoder, b.begin[b.rows] - waiting, waiting, f0, dpre);
  if (dparam && !removed)
    for (int v = 0; v < NV; ++v) store(dparam + f0 + v * L, load(dparam + f0 + v * L) + dt[v]);
}

template <class T, int RULE, int FEATURES>
void backward(const BackwardArgs<T>& a, const AnySide& side) {
  using A = acc_t<T>;
  constexpr int L = kLanesOf<A>, NV = kVecsOf<RULE>;
  const int64_t F = a.F, D1 = a.encoder.D1, padded = (F + L - 1) / L * L;
  const Plan plan = plan_rows(side.ptr, side.n);
  const int64_t groups = std::min<int64_t>(plan.pieces.size(), kGroups);
  std::vector<A> partial, dparam(a.dparam ? groups * padded : 0), dweight(a.dweight ? groups * D1 * padded : 0);
  walk_plan<A>(plan, F, partial, [&](Entries<A>& b, A* carry, const Piece& piece, int64_t group) {
    A* dt = a.dparam ? dparam.data() + group * padded : nullptr;
    const auto run = [&](bool removed) {
      const int64_t entries = b.begin[b.rows];
      if (RULE == kSumRule) {
        for (int64_t k = 0; k < entries; ++k) b.scale[k] = a.row_scale ? a.row_scale[b.idx[k]] : A(1);
      }
      std::fill(b.dot, b.dot + entries, A(0));
      column_blocks<NV, L>(
          F, [&](auto f0) { backward_block<T, RULE, FEATURES, NV, false>(a, b, f0, L, removed, dt); },
          [&](int64_t f0, int n) { backward_block<T, RULE, FEATURES, 1, true>(a, b, f0, n, removed, dt); });
      if (a.dmask)
        for (int64_t k = 0; k < entries; ++k) a.dmask[b.id[k]] = b.dot[k];
    };
    walk_piece(b, side.ptr, piece, batch_entries(D1), carry, [&](int64_t s0, int64_t s1) {
      constexpr int64_t rows = packed(RULE) ? 2 : 1;
      if (a.keep && (a.dmask || a.dedge)) {
        fill_any(b, side, s0, s1, rows * F, a.keep, false, false);
        const int64_t entries = b.begin[b.rows];
        if (a.removed_dots && a.dmask) {
          fill_edges<T, A>(b, nullptr, a.edge, D1);
          std::fill(b.coef, b.coef + entries, A(0));
          run(true);
        } else if (a.dmask) {
          for (int64_t k = 0; k < entries; ++k) a.dmask[b.id[k]] = 0;
        }
        if (a.dedge)
          for (int64_t k = 0; k < entries; ++k) std::fill_n(a.dedge + b.id[k] * F, F, T(0));
      }
      fill_any(b, side, s0, s1, rows * F, a.keep, true, false);
      fill_edges<T, A>(b, a.mask, a.edge, D1);
      prefetch_any(side, s0, s1, a.mask, a.keep);
      if (a.dweight) b.products.assign(D1 * padded, A(0));
      run(false);
      if (a.dweight) {
        A* sum = dweight.data() + group * D1 * padded;
        for (int64_t i = 0; i < D1 * padded; ++i) sum[i] += b.products[i];
      }
    });
  });
  if (a.dx) {
    for (const Plan::Hub& hub : plan.hubs) {
      A* sum = partial.data() + hub.first * F;
      for (int64_t p = 1; p < hub.count; ++p)
        for (int64_t f = 0; f < F; ++f) sum[f] += sum[p * F + f];
      for (int64_t f = 0; f < F; ++f) a.dx[hub.row * F + f] = T(sum[f]);
    }
  }
  if (a.dparam)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t f = 0; f < F; ++f) a.dparam[f] += dparam[g * padded + f];
  if (a.dweight)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < D1 * padded; ++i) a.dweight[i] += dweight[g * D1 * padded + i];
}

// Writes pack [n, 2 F]: per row and block of columns first(row, column, lanes) and then second.
template <class A, int NV, class Row>
void pack_rows(A* pack, int64_t begin, int64_t end, int64_t F, const Row& values) {
  constexpr int L = kLanesOf<A>;
  const auto pair = [&](int64_t i, int64_t f, int n, A* first, A* second) {
    Vec<A> one, two;
    values(i, f, n, one, two);
    put<true>(first, one, n);
    put<true>(second, two, n);
  };
  for (int64_t i = begin; i < end; ++i) {
    A* row = pack + i * 2 * F;
    column_blocks<NV, L>(
        F,
        [&](auto f0) {
          for (int v = 0; v < NV; ++v) pair(i, f0 + v * L, L, row + 2 * f0 + v * L, row + 2 * f0 + (NV + v) * L);
        },
        [&](int64_t f0, int n) { pair(i, f0, n, row + 2 * f0, row + 2 * f0 + n); });
  }
}

// The packed rows of the folded softmax. False where an |lse| is above kFold: pack is of no use then.
template <class T, class A = acc_t<T>>
bool pack_folded(const BackwardArgs<T>& a, A* pack, int64_t n_dst) {
  std::atomic<bool> fits{true};
  parallel_range(n_dst, 256, [&](int64_t begin, int64_t end) {
    if (!fits) return;
    Vec<A> largest{};
    pack_rows<A, kVecsOf<kFoldedRule>>(pack, begin, end, a.F, [&](int64_t i, int64_t f, int n, Vec<A>& g, Vec<A>& y) {
      const int64_t at = i * a.F + f;
      const Vec<A> lse = get<true>(a.lse + at, n);
      // a row without edges (-inf) is not gathered
      largest = vmax<A>(largest, lse == -std::numeric_limits<A>::infinity() ? Vec<A>{} : vmax<A>(lse, -lse));
      g = get<true>(a.dy + at, n) * vexp<A>(-lse);
      y = get<true>(a.y + at, n);
    });
    for (int l = 0; l < kLanesOf<A>; ++l)
      if (!(largest[l] <= A(kFold))) fits = false;
  });
  return fits;
}

// The packed rows of the power mean, and dparam's terms that belong to rows and not to edges, times p.
template <class T, class A = acc_t<T>>
void pack_power(const BackwardArgs<T>& a, A* pack, int64_t n_dst) {
  using V = Vec<A>;
  constexpr int L = kLanesOf<A>;
  const int64_t F = a.F, padded = (F + L - 1) / L * L;
  const int64_t piece = std::max<int64_t>(256, (n_dst + kGroups - 1) / kGroups), pieces = (n_dst + piece - 1) / piece;
  std::vector<A> partial(a.dparam ? pieces * padded : 0);
  const A log_low = std::log(A(kPowerLow));
  parallel_range(n_dst, piece, [&](int64_t begin, int64_t end) {
    A* sum = partial.data() + begin / piece * padded;
    pack_rows<A, kVecsOf<kPowerRule>>(pack, begin, end, F, [&](int64_t i, int64_t f, int n, V& g, V& logy) {
      const A scale = a.row_scale ? a.row_scale[i] : A(1);
      const V y = get<true>(a.y + i * F + f, n), dy = get<true>(a.dy + i * F + f, n);
      const auto any = y > A(0);
      logy = any ? vlog<A>(y) : V{};
      g = any ? dy * scale : V{};
      if (!a.dparam) return;
      V term = -logy;
      if (a.removed) term += A(a.removed[i]) * scale * log_low * vexp<A>(get<true>(a.param + f, n) * (log_low - logy));
      store(sum + f, load(sum + f) + (any ? dy * y * term : V{}));
    });
  });
  if (a.dparam)
    for (int64_t p = 0; p < pieces; ++p)
      for (int64_t f = 0; f < F; ++f) a.dparam[f] += partial[p * padded + f];
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gen_bwd(
    const Tensor& rowptr, const Tensor& col, const OptTensor& eid, const Tensor& colptr, const Tensor& row,
    const OptTensor& ceid, const Tensor& dy, const Tensor& y, const Tensor& stat, const Tensor& x,
    const OptTensor& edge, const OptTensor& weight, const OptTensor& bias, const OptTensor& mask, const OptTensor& keep,
    const OptTensor& param, const OptTensor& row_scale, const OptTensor& removed, int64_t aggr, double eps,
    bool need_dx, bool need_dmask, bool need_dedge, bool need_dparam, bool all_edges) {
  const char* op = "gen_bwd";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  const GenSizes sizes = check_gen(op, g, col, x, edge, weight, bias, mask, keep, param, row_scale, removed, aggr);
  const int64_t F = sizes.F, E = sizes.E, D = sizes.D;
  const ScalarType dtype = x.scalar_type(), acc = acc_type(dtype);
  const bool softmax = aggr == kSoftmax || aggr == kSoftmaxSg, encoded = weight.has_value();
  check_tensor(op, "dy", dy, col, {g.n_dst, F});
  check_dtype(op, "dy", dy, dtype);
  check_tensor(op, "y", y, col, {g.n_dst, F});
  check_dtype(op, "y", y, dtype);
  if (softmax || aggr == kMax) {
    check_tensor(op, "stat", stat, col, {g.n_dst, F});
    check_dtype(op, "stat", stat, softmax ? acc : g.index_type);
  }
  check(!need_dmask || mask, op, "need_dmask needs mask");
  check(!need_dedge || edge, op, "need_dedge needs edge");
  Tensor dx = need_dx ? new_output(x, {g.n_src, F}, dtype) : none_tensor(x, dtype);
  Tensor dmask = need_dmask ? new_output(x, {E}, acc) : none_tensor(x, acc);
  Tensor dedge = !need_dedge ? none_tensor(x, encoded ? acc : dtype)
                 : encoded   ? new_tensor(x, {F, D}, acc)
                             : new_output(x, {E, F}, dtype);
  Tensor dbias = new_tensor(x, {need_dedge && bias ? F : 0}, acc);
  Tensor dparam = new_tensor(x, {need_dparam ? F : 0}, acc);
  dispatch_float(op, dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    BackwardArgs<T> a(gen_args<T>(sizes, x, edge, weight, bias, mask, keep, param, row_scale, removed, eps));
    a.dy = ptr<T>(dy);
    a.y = ptr<T>(y);
    a.lse = softmax ? ptr<A>(stat) : nullptr;
    a.arg = aggr == kMax ? stat.const_data_ptr() : nullptr;
    a.wide_ids = g.index_type == ScalarType::Long;
    a.slope = aggr == kSoftmax ? a.param : nullptr;
    a.dx = need_dx ? mutable_ptr<T>(dx) : nullptr;
    a.dmask = need_dmask ? mutable_ptr<A>(dmask) : nullptr;
    a.dedge = need_dedge && !encoded ? mutable_ptr<T>(dedge) : nullptr;
    a.dparam = need_dparam && (aggr == kSoftmax || aggr == kPower) ? mutable_ptr<A>(dparam) : nullptr;
    std::vector<A> products(need_dedge && encoded ? a.encoder.D1 * a.encoder.stride : 0);
    a.dweight = need_dedge && encoded ? products.data() : nullptr;
    a.removed_dots = all_edges && (aggr == kSum || (softmax && removed));
    if (need_dparam) std::fill_n(mutable_ptr<A>(dparam), F, A(0));
    if (E > g.n_edges) {  // edges that no slot names
      if (a.dmask) parallel_zero(a.dmask, E);
      if (a.dedge) parallel_zero(a.dedge, E * F);
    }
    Tensor pack = none_tensor(x, acc);
    bool fold = false;
    if (softmax || aggr == kPower) {
      pack = new_output(x, {g.n_dst, 2 * F}, acc);
      a.pack = mutable_ptr<A>(pack);
      if (softmax)
        fold = pack_folded(a, mutable_ptr<A>(pack), g.n_dst);
      else
        pack_power(a, mutable_ptr<A>(pack), g.n_dst);
    }
    const AnySide side{g.colptr, g.row, g.ceid, g.n_src, a.wide_ids};
    if (aggr == kPower) {
      backward<T, kPowerRule, kAnyFeatures>(a, side);
    } else if (aggr == kMax) {
      backward<T, kMaxRule, kAnyFeatures>(a, side);
    } else {
      dispatch_features(edge.has_value(), encoded, [&](auto features) {
        constexpr int FEATURES = decltype(features)::value;
        if (aggr == kSum) return backward<T, kSumRule, FEATURES>(a, side);
        fold ? backward<T, kFoldedRule, FEATURES>(a, side) : backward<T, kSoftmaxRule, FEATURES>(a, side);
      });
    }
    if (a.dparam && aggr == kPower)
      for (int64_t f = 0; f < F; ++f) a.dparam[f] /= a.param[f];
    if (a.dweight) {
      const int64_t stride = a.encoder.stride;
      A* dw = mutable_ptr<A>(dedge);
      for (int64_t f = 0; f < F; ++f)
        for (int64_t d = 0; d < D; ++d) dw[f * D + d] = products[(d + 1) * stride + f];
      if (bias) std::copy_n(products.data(), F, mutable_ptr<A>(dbias));
    }
  });
  return {dx, dmask, dedge, dbias, dparam};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("gen_bwd", TORCH_BOX(&gen_bwd));
}

}  // namespace acefast

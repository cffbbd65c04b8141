// gen on the CPU: see csrc/ops.h. By destination; per column a row's state is its sum (sum, power), its largest message
// and that one's slot (max), or for the softmax a reference value m0 with the sums of exp(t msg - m0) and of that times
// msg. m0 follows the largest logit only when it is exceeded by kMargin, so that most elements cost one exp.
#include "cpu/gen.h"

namespace acefast {
namespace {

inline constexpr int kMargin = 16;

template <class A>
inline bool any_greater(Vec<A> v, A bound) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>)
    return _mm512_cmp_ps_mask(bits<__m512>(v), _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
  else
    return _mm512_cmp_pd_mask(bits<__m512d>(v), _mm512_set1_pd(bound), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(bits<__m256>(v > bound)) != 0;
#else
  const auto greater = v > bound;
  bool any = false;
  for (int l = 0; l < kLanesOf<A>; ++l) any |= greater[l] != 0;
  return any;
#endif
}

template <class T, class A = acc_t<T>>
struct ForwardArgs : GenArgs<T> {
  T* y;
  A* lse;                        // softmax
  void* arg;                     // max: int32 or int64 like eid
  const void* eid;               // nullptr: a slot's number is its edge id
  bool wide_ids;

  explicit ForwardArgs(GenArgs<T> args) : GenArgs<T>(std::move(args)) {}

  void put_arg(int64_t element, int64_t slot) const {
    if (wide_ids)
      static_cast<int64_t*>(arg)[element] = slot >= 0 && eid ? static_cast<const int64_t*>(eid)[slot] : slot;
    else
      static_cast<int32_t*>(arg)[element] = slot >= 0 && eid ? static_cast<const int32_t*>(eid)[slot] : int32_t(slot);
  }
};

// The values per column that a row's state consists of.
template <int AGGR>
inline constexpr int kState = AGGR == kSoftmax ? 3 : AGGR == kMax ? 2 : 1;

// The state of a row without edges.
template <int AGGR, class A>
inline void clear_state(Vec<A>* state) {
  for (int s = 0; s < kState<AGGR>; ++s) state[s] = Vec<A>{};
  if (AGGR == kSoftmax) state[2] = splat(std::numeric_limits<A>::lowest() / 4);
  if (AGGR == kMax) {
    state[0] = splat(-std::numeric_limits<A>::infinity());
    state[1] = bits<Vec<A>>(IntVec<A>{} - 1);
  }
}

// Adds the state of a later part of the same row. (max: with slots counted from the same one.)
template <int AGGR, class A>
inline void join_state(Vec<A>* state, const Vec<A>* later) {
  if constexpr (AGGR == kSoftmax) {
    const Vec<A> m = vmax<A>(state[2], later[2]), a = vexp<A>(state[2] - m), b = vexp<A>(later[2] - m);
    state[0] = state[0] * a + later[0] * b;
    state[1] = state[1] * a + later[1] * b;
    state[2] = m;
  } else if constexpr (AGGR == kMax) {
    const auto larger = later[0] > state[0];
    for (int s = 0; s < 2; ++s) state[s] = larger ? later[s] : state[s];
  } else {
    state[0] += later[0];
  }
}

// Writes y and stat of a row in the columns [f, f + n).
template <int AGGR, bool NARROW, class T, class A = acc_t<T>>
inline void finish(const ForwardArgs<T>& a, int64_t row, int64_t f, int n, const Vec<A>* state, int64_t piece_slot) {
  using V = Vec<A>;
  T* out = a.y + row * a.F + f;
  const A removed = a.removed ? A(a.removed[row]) : A(0);
  const A scale = a.row_scale ? a.row_scale[row] : A(1);
  if constexpr (AGGR == kSum) put<NARROW>(out, state[0] * scale, n);
  if constexpr (AGGR == kSoftmax) {
    V sum = state[0], weighted = state[1], m = state[2];
    if (removed > 0) {
      const V raised = vmax<A>(m, V{}), change = vexp<A>(m - raised);
      sum = sum * change + removed * vexp<A>(-raised);
      weighted *= change;
      m = raised;
    }
    const auto any = sum != A(0);
    put<NARROW>(out, any ? weighted / sum : V{}, n);
    put<NARROW>(a.lse + row * a.F + f, any ? m + vlog<A>(sum) : splat(-std::numeric_limits<A>::infinity()), n);
  }
  if constexpr (AGGR == kPower) {
    const V p = get<NARROW>(a.param + f, n);
    V mean = state[0];
    if (removed > 0) mean += removed * vexp<A>(p * std::log(A(kPowerLow)));
    mean *= scale;
    put<NARROW>(out, mean > A(0) ? vexp<A>(vlog<A>(mean) / p) : V{}, n);
  }
  if constexpr (AGGR == kMax) {
    const IntVec<A> slot = bits<IntVec<A>>(state[1]);
    V best = slot < 0 ? V{} : state[0];
    const bool floor = removed > 0;
    put<NARROW>(out, floor ? vmax<A>(V{}, best) : best, n);
    for (int l = 0; l < n; ++l)
      a.put_arg(row * a.F + f + l, slot[l] < 0 || (floor && best[l] < 0) ? -1 : piece_slot + slot[l]);
  }
}

template <class T, int AGGR, int FEATURES, int NV, bool NARROW>
[[gnu::noinline]] void forward_block(const ForwardArgs<T>& a, Entries<acc_t<T>>& b, int64_t f0, int n) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int L = kLanesOf<A>, K = kState<AGGR>;
  const T* __restrict x = a.x + f0;
  V param[NV];
  for (int v = 0; v < NV; ++v) param[v] = a.param ? get<NARROW>(a.param + f0 + v * L, n) : V{};
  const auto message = [&](int64_t k, V(&msg)[NV]) __attribute__((always_inline)) {
    const T* p = x + b.off[k];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) msg[v] = get<NARROW>(p + v * L, n);
    add_features<FEATURES, NV, NARROW>(msg, b, k, a.edge, a.encoder, a.F, f0, n);
    const V m = splat(b.coef[k]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) msg[v] = (vmax<A>(V{}, msg[v]) + a.eps) * m;
  };
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t begin = b.begin[r], end = b.begin[r + 1];
    V state[NV][K], msg[NV];
    for (int v = 0; v < NV; ++v) {
      if (b.carry_in) {
        for (int s = 0; s < K; ++s) state[v][s] = get<NARROW>(b.carry + s * a.F + f0 + v * L, n);
      } else {
        clear_state<AGGR, A>(state[v]);
      }
    }
    if (AGGR == kSoftmax && !b.carry_in && begin < end) {  // m0: the first edge's logit
      message(begin, msg);
      for (int v = 0; v < NV; ++v) state[v][2] = param[v] * msg[v];
    }
    for (int64_t k = begin; k < end; ++k) {
      prefetch_row<NV>(x + b.off[k + kAhead]);
      if (FEATURES == kRows || (FEATURES == kAnyFeatures && a.edge && !a.encoder.D1))
        prefetch_row<NV>(a.edge + b.id[k + kAhead] * a.F + f0);
      message(k, msg);
      if constexpr (AGGR == kSum) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) state[v][0] += msg[v];
      }
      if constexpr (AGGR == kSoftmax) {
        V above[NV], top;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          above[v] = param[v] * msg[v] - state[v][2];
          top = v ? vmax<A>(top, above[v]) : above[v];
        }
        if (__builtin_expect(any_greater<A>(top, kMargin), 0)) {
          for (int v = 0; v < NV; ++v) {
            const V up = vmax<A>(V{}, above[v]), change = vexp<A>(-up);
            state[v][0] *= change;
            state[v][1] *= change;
            state[v][2] += up;
            above[v] = param[v] * msg[v] - state[v][2];
          }
        }
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const V e = vexp<A>(above[v]);
          state[v][0] += e;
          state[v][1] += e * msg[v];
        }
      }
      if constexpr (AGGR == kPower) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const V c = vmin<A>(splat(A(kPowerHigh)), vmax<A>(splat(A(kPowerLow)), msg[v]));
          state[v][0] += vexp<A>(param[v] * vlog<A>(c));
        }
      }
      if constexpr (AGGR == kMax) {
        const V slot = bits<V>(IntVec<A>{} + b.slot[k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const auto larger = msg[v] > state[v][0];
          state[v][0] = larger ? msg[v] : state[v][0];
          state[v][1] = larger ? slot : state[v][1];
        }
      }
    }
    for (int v = 0; v < NV; ++v) {
      if (b.carry_out) {
        for (int s = 0; s < K; ++s) put<NARROW>(b.carry + s * a.F + f0 + v * L, state[v][s], n);
      } else {
        finish<AGGR, NARROW>(a, b.row0 + r, f0 + v * L, NARROW ? n : L, state[v], b.piece_slot);
      }
    }
  }
}

// The states of a hub's pieces, joined in order, and the row's output.
template <class T, int AGGR, class A = acc_t<T>>
void finish_hub(const ForwardArgs<T>& a, const Plan::Hub& hub, const A* partial, int64_t first_slot) {
  constexpr int L = kLanesOf<A>, K = kState<AGGR>;
  const auto load_state = [&](int64_t p, int64_t f, int n, Vec<A>* state) {
    for (int s = 0; s < K; ++s) state[s] = get<true>(partial + ((hub.first + p) * K + s) * a.F + f, n);
    if constexpr (AGGR == kMax) {  // count the slots from the row's first
      const IntVec<A> slot = bits<IntVec<A>>(state[1]);
      state[1] = bits<Vec<A>>(slot < 0 ? slot : slot + int32_t(p * kHubPiece));
    }
  };
  for (int64_t f = 0; f < a.F; f += L) {
    const int n = int(std::min<int64_t>(L, a.F - f));
    Vec<A> state[K], later[K];
    load_state(0, f, n, state);
    for (int64_t p = 1; p < hub.count; ++p) {
      load_state(p, f, n, later);
      join_state<AGGR, A>(state, later);
    }
    finish<AGGR, true>(a, hub.row, f, n, state, first_slot);
  }
}

template <class T, int AGGR, int FEATURES>
void forward(const ForwardArgs<T>& a, const AnySide& side) {
  using A = acc_t<T>;
  constexpr int L = kLanesOf<A>, NV = FEATURES == kAnyFeatures ? 1 : kGenVecs;
  const int64_t D1 = a.encoder.D1;
  const Plan plan = plan_rows(side.ptr, side.n);
  std::vector<A> partial;
  walk_plan<A>(plan, kState<AGGR> * a.F, partial, [&](Entries<A>& b, A* carry, const Piece& piece, int64_t) {
    walk_piece(b, side.ptr, piece, batch_entries(D1), carry, [&](int64_t s0, int64_t s1) {
      fill_any(b, side, s0, s1, a.F, a.keep, true, AGGR == kMax);
      fill_edges<T>(b, a.mask, a.edge, D1);
      prefetch_any(side, s0, s1, a.mask, a.keep);
      column_blocks<NV, L>(
          a.F, [&](auto f0) { forward_block<T, AGGR, FEATURES, NV, false>(a, b, f0, L); },
          [&](int64_t f0, int n) { forward_block<T, AGGR, FEATURES, 1, true>(a, b, f0, n); });
    });
  });
  for (const Plan::Hub& hub : plan.hubs) finish_hub<T, AGGR>(a, hub, partial.data(), side.ptr[hub.row]);
}

std::tuple<Tensor, Tensor> gen(const Tensor& rowptr, const Tensor& col, const OptTensor& eid, const Tensor& colptr,
                               const Tensor& row, const OptTensor& ceid, const Tensor& x, const OptTensor& edge,
                               const OptTensor& weight, const OptTensor& bias, const OptTensor& mask,
                               const OptTensor& keep, const OptTensor& param, const OptTensor& row_scale,
                               const OptTensor& removed, int64_t aggr, double eps,
                               bool /*all_edges: of the backward*/) {
  const char* op = "gen";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  const GenSizes sizes = check_gen(op, g, col, x, edge, weight, bias, mask, keep, param, row_scale, removed, aggr);
  const ScalarType dtype = x.scalar_type(), acc = acc_type(dtype);
  const bool softmax = aggr == kSoftmax || aggr == kSoftmaxSg;
  Tensor y = new_output(x, {g.n_dst, sizes.F}, dtype);
  Tensor stat = softmax        ? new_output(x, {g.n_dst, sizes.F}, acc)
                : aggr == kMax ? new_output(x, {g.n_dst, sizes.F}, g.index_type)
                               : none_tensor(x, acc);
  dispatch_float(op, dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    ForwardArgs<T> a(gen_args<T>(sizes, x, edge, weight, bias, mask, keep, param, row_scale, removed, eps));
    a.y = mutable_ptr<T>(y);
    a.lse = softmax ? mutable_ptr<A>(stat) : nullptr;
    a.arg = aggr == kMax ? stat.mutable_data_ptr() : nullptr;
    a.eid = g.eid;
    a.wide_ids = g.index_type == ScalarType::Long;
    const AnySide side{g.rowptr, g.col, g.eid, g.n_dst, a.wide_ids};
    if (aggr == kPower) return forward<T, kPower, kAnyFeatures>(a, side);
    if (aggr == kMax) return forward<T, kMax, kAnyFeatures>(a, side);
    dispatch_features(edge.has_value(), weight.has_value(), [&](auto features) {
      constexpr int FEATURES = decltype(features)::value;
      if (aggr == kSum) return forward<T, kSum, FEATURES>(a, side);
      forward<T, kSoftmax, FEATURES>(a, side);
    });
  });
  return {y, stat};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("gen", TORCH_BOX(&gen));
}

}  // namespace acefast

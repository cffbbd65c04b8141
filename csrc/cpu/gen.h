// What gen and gen_bwd share: the entries of a batch, the walk over a plan's pieces, the messages of an edge.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "cpu/exp.h"
#include "cpu/memory.h"
#include "cpu/slots.h"

namespace acefast {

enum Aggr : int64_t { kSum, kSoftmax, kSoftmaxSg, kPower, kMax };
// edge_e: absent, given [E, F], weight * raw + bias; kAnyFeatures: known at run time only.
enum Features { kNoFeatures, kRows, kEncoded, kAnyFeatures };

inline constexpr double kPowerLow = 1e-7, kPowerHigh = 10;

#if defined(__AVX512F__)
inline constexpr int kGenVecs = 4;  // vectors of columns that one visit of an edge handles
#else
inline constexpr int kGenVecs = 2;
#endif

// Calls wide(f0) for blocks of NV vectors of columns and narrow(f0, n) for the rest, n <= L columns each. With NV = 1
// all are narrow.
template <int NV, int L, class Wide, class Narrow>
void column_blocks(int64_t F, const Wide& wide, const Narrow& narrow) {
  int64_t f0 = 0;
  if constexpr (NV > 1)
    for (; f0 + NV * L <= F; f0 += NV * L) wide(f0);
  for (; f0 < F; f0 += L) narrow(f0, int(std::min<int64_t>(L, F - f0)));
}

// Loads and stores of a block's vectors: whole ones, or in a narrow block the first `n` lanes.
template <bool NARROW, class T>
inline Vec<acc_t<T>> get(const T* p, int n) {
  return NARROW && n < kLanesOf<acc_t<T>> ? load_tail(p, n) : load(p);
}
template <bool NARROW, class T>
inline void put(T* p, Vec<acc_t<T>> v, int n) {
  NARROW && n < kLanesOf<acc_t<T>> ? store_tail(p, v, n) : store(p, v);
}

// The edges of one batch: whole rows, or a part of one row whose state is then carried.
template <class A>
struct Entries {
  int64_t off[kBatch + kAhead];  // element offset of the gathered row of each entry
  int64_t idx[kBatch];           // its number
  int64_t id[kBatch + kAhead];   // the caller's edge id
  A coef[kBatch];                // mask
  A scale[kBatch];               // row_scale of the destination
  A dot[kBatch];
  int32_t slot[kBatch];           // slot of each entry, counted from the piece's first
  int64_t begin[kBatchRows + 1];  // entries of row r of the batch: [begin[r], begin[r + 1])
  int64_t row0, rows;
  int64_t piece_slot;                        // the piece's first slot
  A* carry = nullptr;                        // state of the row at the batch's ends
  bool carry_in = false, carry_out = false;  // go on from carry's state; leave the state there, not in the output
  std::vector<A> raw;                        // kEncoded: [entries, D + 1], a leading 1 for the bias
  std::vector<A> products;                   // kEncoded: sums of raw feature times gradient, [D + 1, padded F]
};

// weight and bias as the rows of a padded [D + 1, stride]: the bias (or 0), then each raw feature's column.
template <class A>
struct Encoder {
  int64_t D1 = 0, stride = 0;
  std::vector<A> rows;

  Encoder(const A* weight, const A* bias, bool given, int64_t F, int64_t D) {  // with D = 0 weight may be nullptr
    if (!given) return;
    D1 = D + 1;
    stride = (F + kLanesOf<A> - 1) / kLanesOf<A> * kLanesOf<A>;
    rows.assign(D1 * stride, A(0));
    for (int64_t f = 0; f < F; ++f) {
      if (bias) rows[f] = bias[f];
      for (int64_t d = 0; d < D; ++d) rows[(d + 1) * stride + f] = weight[f * D + d];
    }
  }
};

// Entries that a batch may hold: fewer where each brings many raw features.
inline int64_t batch_entries(int64_t D1) {
  return D1 ? std::min(kBatch, std::max<int64_t>(32, 16384 / D1)) : kBatch;
}

// A graph's CSR or CSC whose index type is known at run time.
struct AnySide {
  const int64_t* ptr;
  const void *idx, *eid;
  int64_t n;
  bool wide;

  template <class F>
  void typed(F&& f) const {
    if (wide)
      f(Side<int64_t>{ptr, static_cast<const int64_t*>(idx), static_cast<const int64_t*>(eid), n});
    else
      f(Side<int32_t>{ptr, static_cast<const int32_t*>(idx), static_cast<const int32_t*>(eid), n});
  }
};

// Entries for slots [s0, s1), see fill_slots; with `slots` also each one's slot.
template <class A>
[[gnu::noinline]] void fill_any(Entries<A>& b, const AnySide& any, int64_t s0, int64_t s1, int64_t stride,
                                const uint8_t* keep, bool want, bool slots) {
  any.typed([&](const auto& side) {
    fill_slots(b, side, s0, s1, stride, keep, want);
    for (int64_t s = s0, k = 0; slots && s < s1; ++s) {  // one that is not wanted is overwritten by the next
      b.slot[k] = int32_t(s - b.piece_slot);
      k += !keep || (keep[side.eid ? int64_t(side.eid[s]) : s] != 0) == want;
    }
  });
  const int64_t n = b.begin[b.rows];
  for (int64_t k = 0; k < kAhead; ++k) {  // past the end: prefetched only
    b.off[n + k] = n ? b.off[n - 1] : 0;
    b.id[n + k] = n ? b.id[n - 1] : 0;
  }
}

template <class A>
void prefetch_any(const AnySide& any, int64_t s0, int64_t s1, const A* mask, const uint8_t* keep) {
  any.typed([&](const auto& side) { prefetch_slots(side, s0, s1, static_cast<const A*>(nullptr), mask, keep, 1); });
}

// Sets the masks (1 where absent) and the raw features.
template <class T, class A = acc_t<T>>
[[gnu::noinline]] void fill_edges(Entries<A>& b, const A* mask, const T* raw, int64_t D1) {
  const int64_t n = b.begin[b.rows];
  if (mask) {
    for (int64_t k = 0; k < n; ++k) b.coef[k] = mask[b.id[k]];
  } else {
    std::fill(b.coef, b.coef + n, A(1));
  }
  if (D1 == 0) return;
  b.raw.resize(batch_entries(D1) * D1);
  A* out = b.raw.data();
  for (int64_t k = 0; k < n; ++k) {
    const T* p = raw + b.id[k] * (D1 - 1);
    *out++ = A(1);
    for (int64_t d = 0; d + 1 < D1; ++d) *out++ = A(p[d]);
  }
}

// edge_e of entry k added to pre [NV vectors of columns from f0].
template <int FEATURES, int NV, bool NARROW, class T, class A = acc_t<T>>
[[gnu::always_inline]] inline void add_features(Vec<A> (&pre)[NV], const Entries<A>& b, int64_t k, const T* edge,
                                                const Encoder<A>& encoder, int64_t F, int64_t f0, int n) {
  constexpr int L = kLanesOf<A>;
  if (FEATURES == kRows || (FEATURES == kAnyFeatures && edge && !encoder.D1)) {
    const T* p = edge + b.id[k] * F + f0;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) pre[v] += get<NARROW>(p + v * L, n);
  }
  if (FEATURES == kEncoded || (FEATURES == kAnyFeatures && encoder.D1)) {
    const A* raw = b.raw.data() + k * encoder.D1;
    const A* column = encoder.rows.data() + f0;
    for (int64_t d = 0; d < encoder.D1; ++d, column += encoder.stride) {
      const Vec<A> value = splat(raw[d]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) pre[v] += value * load(column + v * L);
    }
  }
}

template <int NV, class T>
[[gnu::always_inline]] inline void prefetch_row(const T* p) {
  constexpr int lines = (NV * kLanesOf<acc_t<T>> * int(sizeof(T)) + 63) / 64;
  for (int line = 0; line < lines; ++line) __builtin_prefetch(reinterpret_cast<const char*>(p) + 64 * line);
}

// Walks one piece in batches of at most `entries` slots: sets rows and carry flags and calls run(slot0, slot1). `carry`
// is the state of a row that spans batches; of a hub's piece the state is left there.
template <class A, class Run>
void walk_piece(Entries<A>& b, const int64_t* ptr, const Piece& piece, int64_t entries, A* carry, const Run& run) {
  const bool hub = piece.hub >= 0;
  int64_t row = piece.row0, slot = piece.slot0;
  b.piece_slot = piece.slot0;
  b.carry = carry;
  while (row < piece.row1) {
    b.row0 = row;
    b.rows = 1;
    b.carry_in = slot > (hub ? piece.slot0 : ptr[row]);
    const int64_t row_end = std::min(ptr[row + 1], piece.slot1);
    int64_t end = std::min(slot + entries, row_end);
    b.carry_out = hub || end < row_end;
    if (!b.carry_in && !b.carry_out) {
      while (row + b.rows < piece.row1 && b.rows < kBatchRows && ptr[row + b.rows + 1] - slot <= entries) ++b.rows;
      end = ptr[row + b.rows];
    }
    run(slot, end);
    slot = end;
    if (end >= row_end) row += b.rows;
  }
}

// The same result for any number of threads: at most kGroups sums over the edges, each over pieces fixed by the data.
inline constexpr int64_t kGroups = 256;

// Calls work(entries, carry, piece, group) for every piece of the plan; those of one group run in order, on one thread.
// The carried state has `state` elements; a hub's piece leaves its own in partial[piece.hub * state].
template <class A, class Work>
void walk_plan(const Plan& plan, int64_t state, std::vector<A>& partial, const Work& work) {
  const int64_t pieces = int64_t(plan.pieces.size()), groups = std::min(pieces, kGroups);
  partial.resize(plan.partials * state);
  const int64_t workers = torch::stable::get_num_threads();
  std::vector<std::unique_ptr<Entries<A>>> batches(workers);
  std::vector<std::vector<A>> carries(workers);
  parallel_tasks(groups, [&](int64_t group, int64_t worker) {
    if (!batches[worker]) {
      batches[worker] = std::make_unique<Entries<A>>();
      carries[worker].resize(state);
    }
    for (int64_t p = pieces * group / groups; p < pieces * (group + 1) / groups; ++p) {
      const Piece& piece = plan.pieces[p];
      A* carry = piece.hub >= 0 ? partial.data() + piece.hub * state : carries[worker].data();
      work(*batches[worker], carry, piece, group);
    }
  });
}

// What both ops are given; pointers are nullptr where absent.
struct GenSizes {
  int64_t F, E, D;
};
template <class T>
struct GenArgs {
  using A = acc_t<T>;
  const T *x, *edge;
  const A *mask, *param, *row_scale;
  const uint8_t* keep;
  const int64_t* removed;
  int64_t F, E;
  A eps;
  Encoder<A> encoder;
};

inline GenSizes check_gen(const char* op, const GraphArgs& g, const Tensor& like, const Tensor& x,
                          const OptTensor& edge, const OptTensor& weight, const OptTensor& bias, const OptTensor& mask,
                          const OptTensor& keep, const OptTensor& param, const OptTensor& row_scale,
                          const OptTensor& removed, int64_t aggr) {
  check(aggr >= kSum && aggr <= kMax, op, "aggr must be in 0 .. 4");
  check(x.dim() == 2, op, "x must have two dimensions");
  const int64_t F = x.size(1);
  const ScalarType acc = acc_type(x.scalar_type());
  check_tensor(op, "x", x, like, {g.n_src, F});
  check(!edge || edge->dim() == 2, op, "edge must have two dimensions");
  const int64_t E = edge_count(op, g, {&edge, &mask, &keep});
  const int64_t D = edge ? edge->size(1) : 0;
  check(!weight || edge, op, "weight needs edge");
  check(!bias || weight, op, "bias needs weight");
  check_optional(op, "edge", edge, like, x.scalar_type(), {E, weight ? D : F});
  check_optional(op, "weight", weight, like, acc, {F, D});
  check_optional(op, "bias", bias, like, acc, {F});
  check_optional(op, "mask", mask, like, acc, {E});
  check_optional(op, "keep", keep, like, ScalarType::Bool, {E});
  check(param || aggr == kSum || aggr == kMax, op, "param is missing");
  check_optional(op, "param", param, like, acc, {F});
  check_optional(op, "row_scale", row_scale, like, acc, {g.n_dst});
  check_optional(op, "removed", removed, like, ScalarType::Long, {g.n_dst});
  return {F, E, D};
}

template <class T, class A = acc_t<T>>
GenArgs<T> gen_args(const GenSizes& sizes, const Tensor& x, const OptTensor& edge, const OptTensor& weight,
                    const OptTensor& bias, const OptTensor& mask, const OptTensor& keep, const OptTensor& param,
                    const OptTensor& row_scale, const OptTensor& removed, double eps) {
  return {ptr<T>(x),
          ptr<T>(edge),
          ptr<A>(mask),
          ptr<A>(param),
          ptr<A>(row_scale),
          ptr<uint8_t>(keep),
          ptr<int64_t>(removed),
          sizes.F,
          sizes.E,
          A(eps),
          Encoder<A>(ptr<A>(weight), ptr<A>(bias), weight.has_value(), sizes.F, sizes.D)};
}

// Calls f(std::integral_constant<int, features>{}).
template <class F>
decltype(auto) dispatch_features(bool edge, bool weight, F&& f) {
  if (!edge) return f(std::integral_constant<int, kNoFeatures>{});
  return weight ? f(std::integral_constant<int, kEncoded>{}) : f(std::integral_constant<int, kRows>{});
}

}  // namespace acefast

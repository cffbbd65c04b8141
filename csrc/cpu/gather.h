// The gather kernel behind spmm, spmm_bwd, sddmm and masked_linear_csr. A row r (a "center") has a list of entries k,
// each with a source row src[off_k] and a coefficient:
//   ACC: out_r = scale_r * sum_k coef_k * src[off_k] + self_r * selfrow_r + bias
//   DOT: dot_k = <src[off_k], center_r>
// One visit of a source row serves both. Columns are taken in blocks whose accumulators stay in registers, the source
// rows of the next entries are prefetched, across rows too.
#pragma once

#include <memory>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace acefast {

inline constexpr int64_t kBatch = 1024;     // entries handled together: their lists stay in the L1 cache
inline constexpr int64_t kBatchRows = 256;  // rows handled together
inline constexpr int64_t kAhead = 8;        // entries between prefetch and use
inline constexpr int64_t kHub = 16384;      // rows with more slots are cut ...
inline constexpr int64_t kHubPiece = 8192;  // ... into pieces of this many, joined in order

// The work of one batch. S: storage of source rows, T: storage of centers and outputs.
template <class S, class T>
struct Batch {
  using A = acc_t<T>;
  int64_t off[kBatch + kAhead];  // element offset of the source row of each entry
  int64_t idx[kBatch];           // its number
  int64_t id[kBatch];            // the caller's edge id
  A coef[kBatch];
  A dot[kBatch];
  int64_t begin[kBatchRows + 1];  // entries of row r of the batch: [begin[r], begin[r + 1])
  int64_t row0, rows;
  const S* src;
  const T* center;                           // [rows of all batches, F], DOT only
  int64_t F;                                 // columns
  int64_t stride;                            // elements between centers, and between outputs
  T* out;                                    // ACC only
  const A* scale;                            // [row] or nullptr
  const A* self;                             // [row] or nullptr
  const T* selfrow;                          // [row, F]
  const A* bias = nullptr;                   // [F], added to every row
  int64_t hub = -1;                          // the batch's hub piece, numbered as in the plan
  A* carry = nullptr;                        // [F], a batch that holds part of one row only:
  bool carry_in = false, carry_out = false;  // add to carry's sum; leave the sum there and not in out
};

template <class S, class T, bool ACC, bool DOT, int NV, bool TAIL>
void gather_block(Batch<S, T>& b, int64_t f0, int tail) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int L = kLanesOf<A>;
  constexpr int lines = (NV * L * int(sizeof(S)) + 63) / 64;
  const S* __restrict src = b.src + f0;
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t row = b.row0 + r;
    V acc[NV], center[NV];
    for (int v = 0; v < NV; ++v) {
      const bool last = TAIL && v == NV - 1;
      acc[v] = V{};
      if (ACC && b.carry_in) acc[v] = last ? load_tail(b.carry + f0 + v * L, tail) : load(b.carry + f0 + v * L);
      if (DOT) {
        const T* p = b.center + row * b.stride + f0 + v * L;
        center[v] = last ? load_tail(p, tail) : load(p);
      }
    }
    for (int64_t k = b.begin[r]; k < b.begin[r + 1]; ++k) {
      const S* next = src + b.off[k + kAhead];
      for (int line = 0; line < lines; ++line) __builtin_prefetch(reinterpret_cast<const char*>(next) + 64 * line);
      const S* p = src + b.off[k];
      const V c = splat(b.coef[k]);
      V dot0 = V{}, dot1 = V{};
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const V s = TAIL && v == NV - 1 ? load_tail(p + v * L, tail) : load(p + v * L);
        if (ACC) acc[v] += c * s;
        if (DOT) (v % 2 ? dot1 : dot0) += s * center[v];
      }
      if (DOT) b.dot[k] += hsum<A>(dot0 + dot1);
    }
    if (!ACC) continue;
    for (int v = 0; v < NV; ++v) {
      const bool last = TAIL && v == NV - 1;
      if (b.carry_out) {
        last ? store_tail(b.carry + f0 + v * L, acc[v], tail) : store(b.carry + f0 + v * L, acc[v]);
        continue;
      }
      V y = acc[v];
      if (b.scale) y *= b.scale[row];
      if (b.self) {
        const T* p = b.selfrow + row * b.stride + f0 + v * L;
        y += b.self[row] * (last ? load_tail(p, tail) : load(p));
      }
      if (b.bias) y += last ? load_tail(b.bias + f0 + v * L, tail) : load(b.bias + f0 + v * L);
      T* out = b.out + row * b.stride + f0 + v * L;
      last ? store_tail(out, y, tail) : store(out, y);
    }
  }
}

template <class S, class T, bool ACC, bool DOT, int NV>
void gather_columns(Batch<S, T>& b, int64_t f0, int64_t columns) {
  constexpr int L = kLanesOf<acc_t<T>>;
  if constexpr (NV > 1) {
    if (columns <= (NV - 1) * L) return gather_columns<S, T, ACC, DOT, NV - 1>(b, f0, columns);
  }
  const int tail = int(columns - (NV - 1) * L);
  if (tail == L)
    gather_block<S, T, ACC, DOT, NV, false>(b, f0, 0);
  else
    gather_block<S, T, ACC, DOT, NV, true>(b, f0, tail);
}

// Runs a filled batch over all columns. `entries` = begin[rows].
template <class S, class T, bool ACC, bool DOT>
void gather_batch(Batch<S, T>& b) {
  using A = acc_t<T>;
  constexpr int64_t width = int64_t(kLanesOf<A>) * kMaxVecs;
  const int64_t n = b.begin[b.rows];
  for (int64_t k = 0; k < kAhead; ++k) b.off[n + k] = n ? b.off[n - 1] : 0;
  if (DOT) std::fill(b.dot, b.dot + n, A(0));
  for (int64_t f0 = 0; f0 < b.F; f0 += width)
    gather_columns<S, T, ACC, DOT, kMaxVecs>(b, f0, std::min(width, b.F - f0));
}

// A piece of work: rows [row0, row1), or slots [slot0, slot1) of the one hub row row0 whose sum goes to partial `hub`.
struct Piece {
  int64_t row0, row1, slot0, slot1, hub;
};

// Cuts rows into pieces of about equal work, hub rows into several. hubs: first partial of each hub row and the row.
struct Plan {
  std::vector<Piece> pieces;
  struct Hub {
    int64_t row, first, count;
  };
  std::vector<Hub> hubs;
  int64_t partials = 0;
};

// The pieces of all rows with more than `entries` slots, in order.
inline std::vector<Piece> long_row_pieces(const int64_t* ptr, int64_t n, int64_t entries) {
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < n; ++i) {
    if (ptr[i + 1] - ptr[i] <= entries) continue;
    for (int64_t s = ptr[i]; s < ptr[i + 1]; s += kHubPiece)
      pieces.push_back({i, i + 1, s, std::min(s + kHubPiece, ptr[i + 1]), -1});
  }
  return pieces;
}

inline Plan plan_rows(const int64_t* ptr, int64_t n) {
  Plan plan;
  if (n == 0) return plan;
  const int64_t work = ptr[n] - ptr[0] + 2 * n;
  const auto bounds = split_rows(ptr, n, std::min<int64_t>(8192, std::max<int64_t>(512, work / 64)), 2);
  for (size_t p = 0; p + 1 < bounds.size(); ++p) {
    const int64_t row0 = bounds[p], row1 = bounds[p + 1];
    if (row0 == row1) continue;
    const int64_t last = row1 - 1;  // only the last row of a piece can be longer than a piece
    const bool hub = ptr[row1] - ptr[last] > kHub;
    if (row0 < row1 - hub) plan.pieces.push_back({row0, row1 - hub, ptr[row0], ptr[row1 - hub], -1});
    if (!hub) continue;
    plan.hubs.push_back({last, plan.partials, 0});
    for (int64_t s = ptr[last]; s < ptr[row1]; s += kHubPiece) {
      plan.pieces.push_back({last, row1, s, std::min(s + kHubPiece, ptr[row1]), plan.partials++});
      ++plan.hubs.back().count;
    }
  }
  return plan;
}

// Walks the plan. For each batch it sets row0, rows, carry flags and calls run(batch, slot0, slot1), which fills the
// entries of slots [slot0, slot1) (begin[] too) and calls gather_batch. `setup(batch)` sets pointers once per worker.
// F: columns of carry. The joined sum of a hub row runs through a batch without slots. B: the batch and what its worker
// needs besides. entries <= kBatch: slots handled together.
template <class S, class T, bool ACC, class B = Batch<S, T>, class Setup, class Run>
void gather_plan(const int64_t* ptr, int64_t n, int64_t F, const Setup& setup, const Run& run,
                 int64_t entries = kBatch) {
  using A = acc_t<T>;
  const Plan plan = plan_rows(ptr, n);
  std::vector<A> partial(ACC ? plan.partials * F : 0);
  const int64_t workers = torch::stable::get_num_threads();
  std::vector<std::unique_ptr<B>> batches(workers);
  std::vector<std::vector<A>> carries(workers);
  parallel_tasks(int64_t(plan.pieces.size()), [&](int64_t task, int64_t worker) {
    if (!batches[worker]) {
      batches[worker] = std::make_unique<B>();
      carries[worker].resize(ACC ? F : 0);
      setup(*batches[worker]);
    }
    B& b = *batches[worker];
    const Piece& piece = plan.pieces[task];
    int64_t row = piece.row0, slot = piece.slot0;
    while (row < piece.row1) {
      b.row0 = row;
      b.hub = piece.hub;
      b.carry = nullptr;
      b.carry_in = b.carry_out = false;
      const int64_t row_end = std::min(ptr[row + 1], piece.slot1);
      if (row_end - slot > entries || piece.hub >= 0) {  // part of one row
        b.rows = 1;
        b.carry = piece.hub >= 0 && ACC ? partial.data() + piece.hub * F : carries[worker].data();
        b.carry_in = slot > (piece.hub >= 0 ? piece.slot0 : ptr[row]);
        const int64_t end = std::min(slot + entries, row_end);
        b.carry_out = piece.hub >= 0 || end < row_end;
        run(b, slot, end);
        slot = end;
        if (end == row_end) ++row;
        continue;
      }
      if (slot > ptr[row]) {  // the rest of a long row
        b.rows = 1;
        b.carry = carries[worker].data();
        b.carry_in = true;
        run(b, slot, row_end);
        slot = row_end;
        ++row;
        continue;
      }
      int64_t end_row = row + 1;
      while (end_row < piece.row1 && end_row - row < kBatchRows && ptr[end_row + 1] - slot <= entries) ++end_row;
      b.rows = end_row - row;
      run(b, slot, ptr[end_row]);
      slot = ptr[end_row];
      row = end_row;
    }
  });
  if (!ACC) return;
  for (const Plan::Hub& hub : plan.hubs) {
    A* sum = partial.data() + hub.first * F;
    for (int64_t p = 1; p < hub.count; ++p)
      for (int64_t f = 0; f < F; ++f) sum[f] += sum[p * F + f];
    auto b = std::make_unique<B>();
    setup(*b);
    b->row0 = hub.row;
    b->rows = 1;
    b->carry = sum;
    b->carry_in = true;
    run(*b, ptr[hub.row + 1], ptr[hub.row + 1]);
  }
}

}  // namespace acefast

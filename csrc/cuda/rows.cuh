// What gat, edge_softmax and spmm_max share: the kept edges of a warp's slots, reductions over strided lanes and the
// dropout of attention coefficients.
#pragma once

#include "common.cuh"
#include "common/philox.h"

#include <initializer_list>
#include <limits>
#include <type_traits>

namespace acefast {

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// The largest over the lanes whose number is equal modulo `step` (a power of two), in every lane. All 32 lanes call.
template <typename A>
__device__ __forceinline__ A strided_max(A v, int step) {
  for (int offset = step; offset < kWarp; offset *= 2) v = max(v, __shfl_xor_sync(kFullMask, v, offset));
  return v;
}
// Their sum.
template <typename A>
__device__ __forceinline__ A strided_sum(A v, int step) {
  for (int offset = step; offset < kWarp; offset *= 2) v += __shfl_xor_sync(kFullMask, v, offset);
  return v;
}

inline int power_of_two(int64_t at_least, int at_most) {
  int n = 1;
  while (n < at_least && n < at_most) n *= 2;
  return n;
}

// Packs the kept edges of 32 slots, one per lane, into index and id, in order, and returns their number.
// removed(e) is called for each of the others. All 32 lanes call.
template <typename I, typename Removed>
__device__ __forceinline__ int pack_edges(const I* idx, const I* eid, const bool* keep, int64_t slot, int64_t end, I* index,
                                          I* id, int lane, Removed removed) {
  bool live = slot < end;
  int64_t e = 0;
  if (live) {
    e = eid ? static_cast<int64_t>(eid[slot]) : slot;
    live = !keep || keep[e];
    if (!live) removed(e);
  }
  const unsigned alive = __ballot_sync(kFullMask, live);
  if (live) {
    const int rank = __popc(alive & lanes_below(lane));
    index[rank] = idx[slot];
    id[rank] = static_cast<I>(e);
  }
  __syncwarp();
  return __popc(alive);
}

// Calls join(row, column, first, second, last) once for every long row and column: the row's partial sums are first, and then
// every second one from second to last. A warp looks at 32 rows and takes 32 columns.
template <typename Join>
__device__ __forceinline__ void join_long_rows(const int64_t* ptr, int64_t rows, int64_t columns, Pieces pieces, Join join) {
  const int lane = lane_index();
  const int64_t blocks = (columns + kWarp - 1) / kWarp, items = (rows + kWarp - 1) / kWarp * blocks;
  for (int64_t item = int64_t{blockIdx.x} * kRowWarps + warp_index(); item < items;
       item += int64_t{gridDim.x} * kRowWarps) {
    const int64_t first_row = item / blocks * kWarp, column = item % blocks * kWarp + lane, mine = first_row + lane;
    unsigned long_rows = __ballot_sync(kFullMask, mine < rows && ptr[min(mine + 1, rows)] - ptr[min(mine, rows)] > pieces.size());
    for (; long_rows; long_rows &= long_rows - 1) {
      const int64_t row = first_row + __ffs(static_cast<int>(long_rows)) - 1, first = first_partial(ptr[row], pieces);
      if (column < columns) join(row, column, first, first / 2 * 2 + 2, last_partial(ptr[row + 1], pieces));
    }
  }
}

// Its grid.
inline dim3 join_grid(int64_t rows, int64_t columns) {
  return grid_of(ceil_div(rows, kWarp) * ceil_div(columns, kWarp), kRowWarps);
}

// What exp2 takes the exponents relative to: the largest one, or 0 where all are -inf.
template <typename A>
__device__ __forceinline__ A exponent_base(A top) {
  return top == -kInfinity<A> ? A(0) : top;
}

template <typename A>
struct Dropout {
  bool active;         // dropout > 0
  uint64_t threshold;  // floor(p * 2^32), 33 bits: at p = 1 no word reaches it
  uint64_t seed;
  Step step;
  A scale;
};

template <typename A>
Dropout<A> make_dropout(double p, int64_t seed, int64_t step, const OptTensor& step_at) {
  return {p > 0, static_cast<uint64_t>(p * 4294967296.0), static_cast<uint64_t>(seed),
          {static_cast<uint64_t>(step), ptr<int64_t>(step_at)}, static_cast<A>(p < 1 ? 1.0 / (1.0 - p) : 0.0)};
}

// drop[k * slots + h] = the factor of edge id[k] and head first_head + h, for k < count and h < heads <= slots; all lanes of a
// warp share the work. Four heads share one Philox block where the number of heads allows it.
template <typename A, typename I>
__device__ __forceinline__ void fill_drop(const Dropout<A>& d, A* drop, const I* id, int count, int slots, int64_t all_heads,
                                          int64_t first_head, int heads, int lane) {
  const uint64_t step = d.step.read();
  if (all_heads % 4 == 0 && first_head % 4 == 0 && heads % 4 == 0) {
    const int quads = slots / 4;
    for (int k = lane; k < count * quads; k += kWarp) {
      const int edge = k / quads, quad = k % quads;
      if (quad * 4 >= heads) continue;
      const auto n = static_cast<uint64_t>(static_cast<int64_t>(id[edge]) * all_heads + first_head);
      const Philox4 words = philox4x32_10(d.seed, step, n / 4 + quad);
#pragma unroll
      for (int i = 0; i < 4; ++i) drop[edge * slots + quad * 4 + i] = words.w[i] >= d.threshold ? d.scale : A(0);
    }
    return;
  }
  for (int k = lane; k < count * slots; k += kWarp) {
    const int edge = k / slots, head = k % slots;
    if (head >= heads) continue;
    const auto n = static_cast<uint64_t>(static_cast<int64_t>(id[edge]) * all_heads + first_head + head);
    const Philox4 words = philox4x32_10(d.seed, step, n / 4);
    const int i = static_cast<int>(n % 4);
    const uint32_t low = i & 1 ? words.w[1] : words.w[0], high = i & 1 ? words.w[3] : words.w[2];
    drop[k] = (i & 2 ? high : low) >= d.threshold ? d.scale : A(0);
  }
}

// Calls run(std::integral_constant<int, VEC>) with 16-byte vectors where whole ones make up the `features` and all pointers
// are aligned, else with VEC = 1.
template <typename T, typename Run>
void dispatch_vector(int64_t features, std::initializer_list<const void*> pointers, Run&& run) {
  constexpr int kVec = 16 / sizeof(T);
  bool vector = features % kVec == 0;
  for (const void* p : pointers) vector = vector && aligned16(p);
  if (vector) {
    run(std::integral_constant<int, kVec>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

}  // namespace acefast

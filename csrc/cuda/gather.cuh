// The sparse gather that spmm (forward, and backward to x alone) and masked_linear_csr share:
//   out_i = out_scale_i * sum over kept slots s of row i of weight_e mask_e slot_scale_j in_j  +  self_weight_i in_i
// with j = idx[s], e = eid[s], and weight and mask per head where rows have heads. A warp takes one segment of a row and one
// block of a head's columns: its lanes read 32 indices and coefficients at once, pack the kept ones in shared memory, and then
// split into groups that take one edge each, every lane of a group holding VEC x REPEAT columns.
#pragma once

#include "common.cuh"

namespace acefast {

template <typename TIn, typename TOut, typename A, typename I>
struct GatherArgs {
  const int64_t* ptr;      // [rows + 1]
  const I* idx;            // [slots]
  const I* eid;            // [slots] or nullptr
  const TIn* in;           // [*, heads, features]
  TOut* out;               // [rows, heads, features]
  const A* weight;         // [., heads] or nullptr, by edge id
  const A* mask;           // [., heads] or nullptr, by edge id
  const bool* keep;        // by edge id, or nullptr
  const A* slot_scale;     // by idx, or nullptr
  const A* out_scale;      // [rows] or nullptr
  const A* self_weight;    // [rows] or nullptr
  A* partial;              // [partials, heads, features]
  int64_t rows, slots, features;
  Pieces pieces;
  int64_t column_blocks;   // of a head
  int64_t heads = 1;
  int group;               // lanes that share an edge: a power of two up to 32
};

constexpr int kUnroll = 4;

// Columns of one block: group lanes x REPEAT x VEC; repeat r of lane l starts at column(block, r, l).
template <int VEC>
constexpr int kRepeat = VEC == 1 ? 4 : 1;

template <int VEC>
__device__ __forceinline__ int64_t column_of(int64_t block, int repeat, int lane_in_group, int group) {
  return ((block * kRepeat<VEC> + repeat) * group + lane_in_group) * VEC;
}

inline int group_lanes(int64_t features, int vec) {
  int group = 1;
  while (group < kWarp && int64_t{group} * vec < features) group *= 2;
  return group;
}

inline int64_t column_blocks(int64_t features, int group, int vec) {
  return ceil_div(features, int64_t{group} * vec * (vec == 1 ? 4 : 1));
}

// Sums U values, one per edge, over a group's lanes by a fixed tree and hands each total to write(u, total) in one lane: the
// lanes halve the set of values at the first steps, so four sums of 32 lanes cost six shuffles and not twenty.
template <typename A, int U, typename Write>
__device__ __forceinline__ void sum_edges(const A (&dot)[U], int group, int in_group, Write write) {
  static_assert(U == 2 || U == 4);
  if (group < U) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const A total = group_sum(dot[u], group);
      if (in_group == 0) write(u, total);
    }
    return;
  }
  const int half = group / 2, quarter = group / 4;
  const bool upper = in_group & half, odd = in_group & quarter;
  const auto halved = [&](A a, A b, bool second, int lanes) {
    return (second ? b : a) + __shfl_xor_sync(kFullMask, second ? a : b, lanes);
  };
  if constexpr (U == 2) {
    const A total = group_sum(halved(dot[0], dot[1], upper, half), half);
    if (in_group % half == 0) write(upper, total);
  } else {
    const A mine = halved(halved(dot[0], dot[2], upper, half), halved(dot[1], dot[3], upper, half), odd, quarter);
    const A total = group_sum(mine, quarter);
    if (in_group % quarter == 0) write(2 * upper + odd, total);
  }
}

template <typename TIn, typename TOut, typename A, int VEC>
__device__ __forceinline__ void finish_columns(const TIn* self_in, TOut* out, int64_t c, const A* acc, A scale, A self_weight) {
  Pack<TOut, VEC> result;
  if (self_in) {
    const Pack<TIn, VEC> own = load_pack<VEC>(self_in + c);
#pragma unroll
    for (int v = 0; v < VEC; ++v) result.v[v] = static_cast<TOut>(scale * acc[v] + self_weight * to_acc(own.v[v]));
  } else {
#pragma unroll
    for (int v = 0; v < VEC; ++v) result.v[v] = static_cast<TOut>(scale * acc[v]);
  }
  store_pack(out + c, result);
}

template <typename TIn, typename TOut, typename A, typename I, int VEC>
__global__ void __launch_bounds__(kRowThreads) spmm_fwd_kernel(const GatherArgs<TIn, TOut, A, I> a) {
  constexpr int R = kRepeat<VEC>;
  ACEFAST_SHARED(shared_start, int64_t, [kRowWarps][kWarp]);  // where the source's columns of the head begin
  ACEFAST_SHARED(shared_coef, A, [kRowWarps][kWarp]);
  const int lane = lane_index(), warp = warp_index();
  const int group = a.group, groups = kWarp / group, my_group = lane / group, in_group = lane % group;
  const int64_t width = a.heads * a.features, blocks = a.heads * a.column_blocks, items = a.pieces.partials() + a.rows;
  const int64_t step = int64_t{gridDim.x} * kRowWarps;
  for (int64_t of_heads = blockIdx.y; of_heads < blocks; of_heads += gridDim.y) {
    const int64_t head = of_heads / a.column_blocks, block = of_heads % a.column_blocks;
    for (int64_t item = int64_t{blockIdx.x} * kRowWarps + warp; item < items; item += step) {
      const Segment seg = segment_of(item, a.ptr, a.rows, a.slots, a.pieces);
      if (seg.partial >= 0 && seg.begin == seg.end) continue;
      A acc[R * VEC] = {};
      for (int64_t base = seg.begin; base < seg.end; base += kWarp) {
        const int64_t slot = base + lane;
        bool live = slot < seg.end;
        I j = 0;
        A coef = 1;
        if (live) {
          const int64_t e = a.eid ? static_cast<int64_t>(a.eid[slot]) : slot;
          live = !a.keep || a.keep[e];
          if (live) {
            j = a.idx[slot];
            if (a.weight) coef *= a.weight[e * a.heads + head];
            if (a.mask) coef *= a.mask[e * a.heads + head];
            if (a.slot_scale) coef *= a.slot_scale[j];
          }
        }
        const unsigned alive = __ballot_sync(kFullMask, live);
        if (live) {
          const int rank = __popc(alive & lanes_below(lane));
          shared_start[warp][rank] = static_cast<int64_t>(j) * width + head * a.features;
          shared_coef[warp][rank] = coef;
        }
        __syncwarp();
        const int count = __popc(alive);
        for (int k = my_group; k < count; k += groups * kUnroll) {
          Pack<TIn, VEC> value[kUnroll][R];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int edge = k + u * groups;
            if (edge < count) {
              const TIn* source = a.in + shared_start[warp][edge];
#pragma unroll
              for (int r = 0; r < R; ++r) {
                const int64_t c = column_of<VEC>(block, r, in_group, group);
                if (c < a.features) value[u][r] = load_pack<VEC>(source + c);
              }
            }
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int edge = k + u * groups;
            if (edge < count) {
              const A weight = shared_coef[warp][edge];
#pragma unroll
              for (int r = 0; r < R; ++r) {
                if (column_of<VEC>(block, r, in_group, group) < a.features) {
#pragma unroll
                  for (int v = 0; v < VEC; ++v) acc[r * VEC + v] += weight * to_acc(value[u][r].v[v]);
                }
              }
            }
          }
        }
        __syncwarp();
      }
      for (int offset = group; offset < kWarp; offset *= 2) {
#pragma unroll
        for (int v = 0; v < R * VEC; ++v) acc[v] += __shfl_xor_sync(kFullMask, acc[v], offset);
      }
      if (my_group != 0) continue;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t c = column_of<VEC>(block, r, in_group, group);
        if (c >= a.features) continue;
        const int64_t at = head * a.features + c;
        if (seg.partial >= 0) {
          store_values<VEC>(a.partial + seg.partial * width + at, acc + r * VEC);
        } else {
          finish_columns<TIn, TOut, A, VEC>(a.self_weight ? a.in + seg.row * width : nullptr, a.out + seg.row * width, at,
                                            acc + r * VEC, a.out_scale ? a.out_scale[seg.row] : A(1),
                                            a.self_weight ? a.self_weight[seg.row] : A(0));
        }
      }
    }
  }
}

// Adds the pieces of every long row in the order of its slots. A warp looks at 32 rows and takes 32 columns.
template <typename TIn, typename TOut, typename A>
__global__ void __launch_bounds__(kRowThreads)
    spmm_join_kernel(const int64_t* ptr, int64_t rows, int64_t features, Pieces pieces, const A* partial, const TIn* in, TOut* out,
                     const A* out_scale, const A* self_weight) {
  const int lane = lane_index();
  const int64_t blocks = (features + kWarp - 1) / kWarp, items = (rows + kWarp - 1) / kWarp * blocks;
  for (int64_t item = int64_t{blockIdx.x} * kRowWarps + warp_index(); item < items;
       item += int64_t{gridDim.x} * kRowWarps) {
    const int64_t first_row = item / blocks * kWarp, c = item % blocks * kWarp + lane;
    const int64_t mine = first_row + lane;
    unsigned long_rows = __ballot_sync(kFullMask, mine < rows && ptr[min(mine + 1, rows)] - ptr[min(mine, rows)] > pieces.size());
    for (; long_rows; long_rows &= long_rows - 1) {
      const int64_t row = first_row + __ffs(static_cast<int>(long_rows)) - 1;
      if (c >= features) continue;
      const int64_t first = first_partial(ptr[row], pieces), last = last_partial(ptr[row + 1], pieces);
      A sum = partial[first * features + c];
#pragma unroll 8
      for (int64_t p = first / 2 * 2 + 2; p <= last; p += 2) sum += partial[p * features + c];
      finish_columns<TIn, TOut, A, 1>(self_weight ? in + row * features : nullptr, out + row * features, c, &sum,
                                      out_scale ? out_scale[row] : A(1), self_weight ? self_weight[row] : A(0));
    }
  }
}

// Launches the gather and, where rows can be long, the join. `like` gives the device of the partial sums.
template <typename TIn, typename TOut, typename A, typename I>
void launch_gather(GatherArgs<TIn, TOut, A, I> a, const Tensor& like, const DeviceScope& scope) {
  if (a.rows == 0 || a.heads * a.features == 0) return;
  a.pieces = pieces_of(a.slots);
  const int64_t width = a.heads * a.features;
  const Tensor partial = new_tensor(like, {a.pieces.partials(), width}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  a.partial = mutable_ptr<A>(partial);
  const auto run = [&](auto vec) {
    constexpr int VEC = decltype(vec)::value;
    a.group = group_lanes(a.features, VEC);
    a.column_blocks = column_blocks(a.features, a.group, VEC);
    dim3 grid = grid_of(a.pieces.partials() + a.rows, kRowWarps);
    grid.y = static_cast<unsigned>(std::min<int64_t>({a.heads * a.column_blocks, 65535, kMostBlocks}));
    ACEFAST_LAUNCH((spmm_fwd_kernel<TIn, TOut, A, I, VEC>), grid, kRowThreads, 0, scope.stream(), a);
  };
  constexpr int kVec = 16 / sizeof(TIn);
  if (a.features % kVec == 0 && aligned16(a.in) && aligned16(a.out)) {
    run(std::integral_constant<int, kVec>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
  if (a.pieces.count > 0) {
    const int64_t items = ceil_div(a.rows, kWarp) * ceil_div(width, kWarp);
    ACEFAST_LAUNCH((spmm_join_kernel<TIn, TOut, A>), grid_of(items, kRowWarps), kRowThreads, 0, scope.stream(), a.ptr, a.rows,
                   width, a.pieces, a.partial, a.in, a.out, a.out_scale, a.self_weight);
  }
}

}  // namespace acefast

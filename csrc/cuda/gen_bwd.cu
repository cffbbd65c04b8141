// gen on CUDA, backward by source in one visit of each edge: see csrc/ops.h and gen.cuh. A warp takes one segment of a
// source's edges: x_j and dx_j stay in registers, and dmask is summed across the lanes of an edge. The gradients of param, of
// the encoder's weight and of its bias are summed per lane over all segments of a warp, then over a block, and then over the
// blocks, in order; the number of blocks follows from the data alone. Wide rows, and encoders of more than kDepthTile raw
// features whose gradient is asked for, take several passes over the segments.
#include "gen.cuh"

namespace acefast {
namespace {

// Of kernels. kSum serves the maximum as well: dy where the edge gave it, else 0. kShare is the softmax whose weights are constant,
// where param has no gradient: it needs no y.
enum Kind { kSum, kSoftmax, kShare, kPower };

constexpr int64_t kSumBlocks = std::min<int64_t>(4096, kMostBlocks);  // blocks where sums over all edges are asked for
constexpr int kDepthTile = 8;                                         // raw features of a pass with the weight's gradient
enum { kParamSum, kBiasSum, kWeightSum };                             // rows of the sums: param, bias, weight [depth]

template <typename T>
struct GenBwdArgs : GenArgs<T> {
  using A = acc_t<T>;
  const T* dy;   // [n_dst, features]
  const T* y;    // [n_dst, features], softmax and power
  const A* lse;  // [n_dst, features], softmax
  Indices arg;   // [n_dst, features], max
  T* dx;         // [n_src, features] or nullptr
  A* dmask;      // [E] or nullptr
  T* dedge;      // [E, features] or nullptr
  A* partial;    // [partials, features], with dx
  A* sums;       // [blocks, sum_rows, features] or nullptr
  int64_t sum_rows;
  bool constant_beta, need_dweight, need_dparam, all_edges;
};

// What the gradient of a message takes from its destination's rows.
template <typename T, int KIND, int VEC>
struct Destination {
  Pack<T, VEC> dy, y;
  Pack<acc_t<T>, VEC> lse;
};

template <typename T, int KIND, int VEC>
__device__ __forceinline__ void load_destination(const GenBwdArgs<T>& a, int64_t at, Destination<T, KIND, VEC>& d) {
  d.dy = load_pack<VEC>(a.dy + at);
  if constexpr (KIND == kSoftmax || KIND == kPower) d.y = load_pack<VEC>(a.y + at);
  if constexpr (KIND == kSoftmax || KIND == kShare) d.lse = load_pack<VEC>(a.lse + at);
}

// The gradient of a message, and its share in that of param (to be multiplied by ln 2 / p for the power mean). A removed
// edge is given message 0, which makes the result what its unmasked message is multiplied by in its mask's gradient.
template <typename T, int KIND, int VEC>
__device__ __forceinline__ acc_t<T> message_gradient(const GenBwdArgs<T>& a, const Destination<T, KIND, VEC>& d, int v,
                                                     acc_t<T> message, acc_t<T> param, acc_t<T> scale,
                                                     acc_t<T>& dparam) {
  using A = acc_t<T>;
  const A g = to_acc(d.dy.v[v]);
  if constexpr (KIND == kSum) {
    return scale * g;
  } else if constexpr (KIND == kShare) {
    return g * exp_2(A(kLog2e) * (param * message - d.lse.v[v]));
  } else if constexpr (KIND == kSoftmax) {
    const A share = g * exp_2(A(kLog2e) * (param * message - d.lse.v[v]));
    const A beyond = message - to_acc(d.y.v[v]);
    dparam = share * message * beyond;
    return a.constant_beta ? share : share * (1 + param * beyond);
  } else {
    const A y = to_acc(d.y.v[v]);
    dparam = 0;
    if (!(y > 0)) return 0;
    const A c = power_clamp(message), log_c = log_2(c);
    const A slope = g * scale * exp_2((param - 1) * (log_c - log_2(y)));
    dparam = slope * c * log_c;
    return message >= A(kPowerLow) && message <= A(kPowerHigh) ? slope : A(0);
  }
}

// The lanes' values of one row of the sums, summed over the block, to global memory. The whole block calls.
template <typename T, int VEC>
__device__ __forceinline__ void store_block_sum(const GenBwdArgs<T>& a, int64_t block, int64_t row, acc_t<T> (&value)[VEC],
                                                acc_t<T> (*shared)[kWarp * VEC]) {
  using A = acc_t<T>;
  const int group = a.group, lane = lane_index(), columns = group * VEC;
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    for (int offset = group; offset < kWarp; offset *= 2) value[v] += __shfl_xor_sync(kFullMask, value[v], offset);
    if (lane < group) shared[warp_index()][lane * VEC + v] = value[v];
  }
  __syncthreads();
  for (int n = threadIdx.x; n < columns; n += kRowThreads) {
    const int64_t c = block * columns + n;
    if (c >= a.features) continue;
    A sum = 0;
    for (int warp = 0; warp < kRowWarps; ++warp) sum += shared[warp][n];
    a.sums[(blockIdx.x * a.sum_rows + row) * a.features + c] = sum;
  }
  __syncthreads();
}

// An edge of a warp: where its destination's row begins.
template <typename A>
struct Slot {
  int64_t start;
  A mask;
  bool kept;
};

// Edges that a group of lanes has in flight.
template <int KIND, int EDGE>
constexpr int kEdges = EDGE == kNoEdge && KIND != kSoftmax ? 4 : 2;

template <typename T, int KIND, int EDGE, int VEC>
__global__ void __launch_bounds__(kRowThreads, EDGE != kNoEdge ? 6 : KIND == kPower ? 8 : 10) gen_bwd_kernel(const GenBwdArgs<T> a) {
  using A = acc_t<T>;
  using Mine = Slot<A>;
  constexpr int U = kEdges<KIND, EDGE>;
  constexpr bool ENCODED = EDGE == kEncoded;
  constexpr bool kHasParam = KIND == kSoftmax || KIND == kPower;
  constexpr int kTile = ENCODED ? kDepthTile : 1;
  ACEFAST_SHARED(shared_slot, Mine, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_id, int64_t, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_scale, A, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_sum, A, [kRowWarps][kWarp * VEC]);
  using Four = Quad<A>;
  ACEFAST_SHARED(shared_weight, Four, [kWeightQuads<A, VEC, ENCODED>]);
  ACEFAST_SHARED(shared_raw, Four, [kRowWarps][kRawQuads<A, ENCODED>]);
  const bool encoded = ENCODED && (VEC > 1 || a.encoded), widened = EDGE == kEdge || (ENCODED && VEC == 1 && !a.encoded && a.edge);
  const int lane = lane_index(), warp = warp_index();
  const int group = a.group, groups = kWarp / group, my_group = lane / group, in_group = lane % group;
  A* tile = reinterpret_cast<A*>(shared_weight);
  A* raw = reinterpret_cast<A*>(shared_raw[warp]);
  const int64_t items = a.pieces.partials() + a.rows;
  const int64_t tiles = encoded && a.need_dweight ? max((a.depth + kTile - 1) / kTile, int64_t{1}) : 1;
  for (int64_t pass = 0; pass < a.column_blocks * tiles; ++pass) {
    const int64_t block = pass / tiles, first_raw = pass % tiles * kTile;
    const bool first = first_raw == 0;  // later passes of a block of columns are for the weight's gradient alone
    if (encoded) {
      load_weight(a, block, group * VEC, tile);
      __syncthreads();
    }
    const int64_t c = (block * group + in_group) * VEC;  // the lane's columns: c to c + VEC - 1
    const bool inside = c < a.features;
    const int64_t column = inside ? c : 0;  // lanes outside read what the first one does
    A param[VEC], bias[VEC], dparam[VEC] = {}, dbias[VEC] = {}, dweight[kTile][VEC] = {};
    load_columns<VEC>(a.param, c, a.features, param);
    load_columns<VEC>(a.bias, c, a.features, bias);
    for (int64_t item = int64_t{blockIdx.x} * kRowWarps + warp; item < items; item += int64_t{gridDim.x} * kRowWarps) {
      const Segment seg = segment_of(item, a.ptr, a.rows, a.slots, a.pieces);
      if (seg.partial >= 0 && seg.begin == seg.end) continue;
      A mine[VEC], acc[VEC] = {};  // x_j and the bias; dx_j
      Pack<T, VEC> own = {};
      if (inside) own = load_pack<VEC>(a.x + seg.row * a.features + c);
#pragma unroll
      for (int v = 0; v < VEC; ++v) mine[v] = to_acc(own.v[v]) + bias[v];
      for (int64_t base = seg.begin; base < seg.end; base += kWarp) {
        const int64_t slot = base + lane;
        bool visit = slot < seg.end, kept = false;
        int64_t e = slot;
        if (visit) {
          if (a.eid.data) e = a.eid[slot];
          kept = !a.keep || a.keep[e];
          visit = kept || a.all_edges;
          if (!visit && a.dmask && pass == 0) a.dmask[e] = 0;
        }
        const unsigned visited = __ballot_sync(kFullMask, visit);
        if (visit) {
          const int rank = __popc(visited & lanes_below(lane));
          const int64_t i = a.idx[slot];
          shared_slot[warp][rank] = {i * a.features, kept && a.mask ? a.mask[e] : A(1), kept};
          shared_id[warp][rank] = e;
          shared_scale[warp][rank] = a.row_scale ? a.row_scale[i] : A(1);
        }
        __syncwarp();
        const int count = __popc(visited);
        if (encoded) {
          load_raw(a, shared_id[warp], count, raw);
          __syncwarp();
        }
        // Every lane makes every turn: the mask's gradient is summed across the group.
        for (int turn = 0; turn < count; turn += groups * U) {
          int edge[U];
          Mine slots[U];
          Destination<T, KIND, VEC> there[U];
          Pack<T, VEC> extra[U];
          A pre[U][VEC], dot[U];
#pragma unroll
          for (int u = 0; u < U; ++u) {
            edge[u] = min(turn + my_group + u * groups, count - 1);
            slots[u] = shared_slot[warp][edge[u]];
            load_destination<T, KIND, VEC>(a, slots[u].start + column, there[u]);
            extra[u] = {};
            if (widened && inside) extra[u] = load_pack<VEC>(a.edge + shared_id[warp][edge[u]] * a.features + c);
          }
          if (KIND == kSum && a.arg.data && inside) {
#pragma unroll
            for (int u = 0; u < U; ++u) {
#pragma unroll
              for (int v = 0; v < VEC; ++v) {
                const int64_t arg = a.arg[slots[u].start + c + v];
                if (arg != shared_id[warp][edge[u]]) there[u].dy.v[v] = T(0);
              }
            }
          }
#pragma unroll
          for (int u = 0; u < U; ++u) {
#pragma unroll
            for (int v = 0; v < VEC; ++v) pre[u][v] = widened ? mine[v] + to_acc(extra[u].v[v]) : mine[v];
          }
          if (encoded) encode<T, VEC>(a, c, in_group, tile, raw, shared_id[warp], edge, pre);
#pragma unroll
          for (int u = 0; u < U; ++u) {
            dot[u] = 0;
            if (!inside || turn + my_group + u * groups >= count) continue;
            const A mask = slots[u].mask, scale = shared_scale[warp][edge[u]];
            const bool kept = slots[u].kept;
            const int64_t id = shared_id[warp][edge[u]];
            A dpre[VEC];
            Pack<T, VEC> result;
#pragma unroll
            for (int v = 0; v < VEC; ++v) {
              const A r = relu(pre[u][v]) + a.eps;
              A share = 0;
              const A dmessage =
                  message_gradient<T, KIND, VEC>(a, there[u], v, kept ? r * mask : A(0), param[v], scale, share);
              dot[u] += dmessage * r;
              dpre[v] = kept && pre[u][v] > 0 ? dmessage * mask : A(0);
              acc[v] += dpre[v];
              if (kHasParam && kept) dparam[v] += share;
              if (encoded) dbias[v] += dpre[v];
              result.v[v] = static_cast<T>(dpre[v]);
            }
            if (widened && a.dedge && kept) store_pack(a.dedge + id * a.features + c, result);
            if (encoded && a.need_dweight && kept) {
#pragma unroll
              for (int d = 0; d < kTile; ++d) {
                if (first_raw + d >= a.depth) break;
                const A f = a.depth <= kDepth<A> ? raw[edge[u] * padded_depth(a.depth) + static_cast<int>(first_raw) + d]
                                                 : to_acc(a.edge[id * a.depth + first_raw + d]);
#pragma unroll
                for (int v = 0; v < VEC; ++v) dweight[d][v] += dpre[v] * f;
              }
            }
          }
          if (!a.dmask || !first) continue;
          sum_edges(dot, group, in_group, [&](int u, A total) {
            const int at = turn + my_group + u * groups;
            if (at >= count) return;
            A* target = a.dmask + shared_id[warp][at];
            *target = pass == 0 ? total : *target + total;
          });
        }
        __syncwarp();
      }
      if (!a.dx || !first) continue;
      for (int offset = group; offset < kWarp; offset *= 2) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) acc[v] += __shfl_xor_sync(kFullMask, acc[v], offset);
      }
      if (my_group != 0 || !inside) continue;
      if (seg.partial < 0) {
        finish_columns<T, T, A, VEC>(nullptr, a.dx + seg.row * a.features, c, acc, A(1), A(0));
      } else {
        store_values<VEC>(a.partial + seg.partial * a.features + c, acc);
      }
    }
    if (a.sums) {
      if (kHasParam && a.need_dparam && first) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) dparam[v] = KIND == kPower ? dparam[v] * A(kLn2) / param[v] : dparam[v];
        store_block_sum<T, VEC>(a, block, kParamSum, dparam, shared_sum);
      }
      if (encoded) {
        if (a.need_dweight) {
          if (first) store_block_sum<T, VEC>(a, block, kBiasSum, dbias, shared_sum);
#pragma unroll
          for (int d = 0; d < kTile; ++d) {
            if (first_raw + d >= a.depth) break;
            store_block_sum<T, VEC>(a, block, kWeightSum + first_raw + d, dweight[d], shared_sum);
          }
        }
      }
    }
    if (encoded) __syncthreads();
  }
}

// What the rows themselves add to the power mean's dparam:
//   sum over i of g y_i / p (removed_i row_scale_i (1e-7 / y_i)^p log 1e-7 - log y_i), one row of `sums` per block.
template <typename T>
__global__ void __launch_bounds__(kThreads) gen_power_rows_kernel(const GenBwdArgs<T> a, int64_t rows, acc_t<T>* sums) {
  using A = acc_t<T>;
  ACEFAST_SHARED(shared, A, [kWarpsPerBlock][kWarp]);
  const int lane = lane_index(), warp = warp_index();
  const A log_low = log_2(A(kPowerLow));
  for (int64_t first = 0; first < a.features; first += kWarp) {
    const int64_t c = first + lane;
    A sum = 0;
    if (c < a.features) {
      const A p = a.param[c];
      for (int64_t i = int64_t{blockIdx.x} * kWarpsPerBlock + warp; i < rows; i += int64_t{gridDim.x} * kWarpsPerBlock) {
        const A y = to_acc(a.y[i * a.features + c]);
        if (!(y > 0)) continue;
        const A log_y = log_2(y);
        A logs = -log_y;
        if (a.removed && a.removed[i] > 0) {
          const A scale = a.row_scale ? a.row_scale[i] : A(1);
          logs += static_cast<A>(a.removed[i]) * scale * exp_2(p * (log_low - log_y)) * log_low;
        }
        sum += to_acc(a.dy[i * a.features + c]) * y / p * A(kLn2) * logs;
      }
    }
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && c < a.features) {
      for (int w = 1; w < kWarpsPerBlock; ++w) sum += shared[w][lane];
      sums[blockIdx.x * a.features + c] = sum;
    }
    __syncthreads();
  }
}

// dparam, dbias and dweight: row by row, sums[block, row, c] summed over the blocks; dparam with the rows' own sums, where
// there are any. A block takes one row and 32 columns; its warps share out the blocks in runs.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    gen_sum_blocks_kernel(const A* sums, int64_t blocks, int64_t sum_rows, const A* row_sums, int64_t row_blocks, int64_t features,
                          int64_t depth, A* dparam, A* dbias, A* dweight) {
  ACEFAST_SHARED(shared, double, [kWarpsPerBlock][kWarp]);
  const int lane = lane_index(), warp = warp_index();
  const int64_t across = (features + kWarp - 1) / kWarp;
  for (int64_t item = blockIdx.x; item < sum_rows * across; item += gridDim.x) {
    const int64_t row = item / across, c = item % across * kWarp + lane;
    double sum = 0;
    if (c < features) {
      const int64_t run = (blocks + kWarpsPerBlock - 1) / kWarpsPerBlock;
#pragma unroll 8
      for (int64_t b = warp * run; b < min((warp + 1) * run, blocks); ++b)
        sum += static_cast<double>(sums[(b * sum_rows + row) * features + c]);
      if (row == kParamSum && row_sums) {
        for (int64_t b = warp; b < row_blocks; b += kWarpsPerBlock) sum += static_cast<double>(row_sums[b * features + c]);
      }
    }
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && c < features) {
      for (int w = 1; w < kWarpsPerBlock; ++w) sum += shared[w][lane];
      if (row == kParamSum) {
        if (dparam) dparam[c] = static_cast<A>(sum);
      } else if (row == kBiasSum) {
        if (dbias) dbias[c] = static_cast<A>(sum);
      } else {
        dweight[c * depth + row - kWeightSum] = static_cast<A>(sum);
      }
    }
    __syncthreads();
  }
}

template <typename T, int KIND>
void launch_gen_bwd(GenBwdArgs<T> a, int64_t n_dst, const Tensor& x, const Tensor& dparam, const Tensor& dedge, const Tensor& dbias,
                    const DeviceScope& scope) {
  using A = acc_t<T>;
  const ScalarType acc = acc_type(x.scalar_type());
  a.pieces = pieces_of(a.slots);
  const Tensor partial = new_tensor(x, {a.dx ? a.pieces.partials() : 0, a.features}, acc);
  a.partial = mutable_ptr<A>(partial);
  const int64_t items = a.pieces.partials() + a.rows;
  dim3 grid = grid_of(items, kRowWarps);
  if (a.need_dparam || a.need_dweight) grid.x = static_cast<unsigned>(std::min<int64_t>(grid.x, kSumBlocks));
  a.sum_rows = a.need_dweight ? kWeightSum + a.depth : a.need_dparam ? 1 : 0;
  const Tensor sums = new_tensor(x, {a.sum_rows > 0 ? int64_t{grid.x} : 0, a.sum_rows, a.features}, acc);
  a.sums = a.sum_rows > 0 ? mutable_ptr<A>(sums) : nullptr;
  constexpr int kVec = kGenVec<A>;
  const bool whole = a.features % kVec == 0 && aligned16(a.dy) && aligned16(a.y) && aligned16(a.lse) && aligned16(a.x) &&
                     aligned16(a.dx) && (a.encoded || (aligned16(a.edge) && aligned16(a.dedge)));
  const auto run = [&](auto edge, auto vec) {
    constexpr int EDGE = decltype(edge)::value;
    constexpr int VEC = decltype(vec)::value;
    a.group = group_lanes(a.features, VEC);
    a.column_blocks = ceil_div(a.features, int64_t{a.group} * VEC);
    ACEFAST_LAUNCH((gen_bwd_kernel<T, KIND, EDGE, VEC>), grid, kRowThreads, 0, scope.stream(), a);
  };
  using Whole = std::integral_constant<int, kVec>;
  if (!whole || kVec == 1) {
    run(std::integral_constant<int, kEncoded>{}, std::integral_constant<int, 1>{});
  } else if constexpr (kVec > 1) {
    dispatch_edge(a, [&](auto edge) { run(edge, Whole{}); });
  }
  if (a.dx && a.pieces.count > 0) {
    const int64_t tasks = ceil_div(a.rows, kWarp) * ceil_div(a.features, kWarp);
    ACEFAST_LAUNCH((spmm_join_kernel<T, T, A>), grid_of(tasks, kRowWarps), kRowThreads, 0, scope.stream(), a.ptr, a.rows,
                   a.features, a.pieces, a.partial, static_cast<const T*>(nullptr), a.dx, static_cast<const A*>(nullptr),
                   static_cast<const A*>(nullptr));
  }
  if (!a.sums) return;
  const int64_t row_blocks = KIND == kPower && a.need_dparam ? std::min<int64_t>(grid_of(n_dst, 8 * kWarpsPerBlock).x, 256) : 0;
  const Tensor row_sums = new_tensor(x, {row_blocks, a.features}, acc);
  if constexpr (KIND == kPower) {
    if (row_blocks > 0)
      ACEFAST_LAUNCH((gen_power_rows_kernel<T>), dim3(static_cast<unsigned>(row_blocks)), kThreads, 0, scope.stream(), a, n_dst,
                     mutable_ptr<A>(row_sums));
  }
  const int64_t tasks = a.sum_rows * ceil_div(a.features, kWarp);
  ACEFAST_LAUNCH((gen_sum_blocks_kernel<A>), grid_of(tasks, 1), kThreads, 0, scope.stream(), a.sums, int64_t{grid.x},
                 a.sum_rows, row_blocks > 0 ? ptr<A>(row_sums) : nullptr, row_blocks, a.features, a.depth,
                 a.need_dparam ? mutable_ptr<A>(dparam) : nullptr, dbias.numel() > 0 ? mutable_ptr<A>(dbias) : nullptr,
                 a.need_dweight ? mutable_ptr<A>(dedge) : nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gen_bwd(
    Tensor rowptr, Tensor col, OptTensor eid, Tensor colptr, Tensor row, OptTensor ceid, Tensor dy, Tensor y, Tensor stat, Tensor x,
    OptTensor edge, OptTensor weight, OptTensor bias, OptTensor mask, OptTensor keep, OptTensor param, OptTensor row_scale,
    OptTensor removed, int64_t aggr, double eps, bool need_dx, bool need_dmask, bool need_dedge, bool need_dparam, bool all_edges) {
  const char* op = "gen_bwd";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  const int64_t edges = check_gen(op, g, col, x, edge, weight, bias, mask, keep, param, row_scale, removed, aggr);
  const int64_t features = x.size(1);
  const ScalarType acc = acc_type(x.scalar_type());
  const bool softmax = aggr == kAggrSoftmax || aggr == kAggrSoftmaxSg, largest = aggr == kAggrMax;
  check_tensor(op, "dy", dy, x, {g.n_dst, features});
  check_dtype(op, "dy", dy, x.scalar_type());
  check_tensor(op, "y", y, x, {g.n_dst, features});
  check_dtype(op, "y", y, x.scalar_type());
  if (softmax || largest) {
    check_tensor(op, "stat", stat, x, {g.n_dst, features});
    check_dtype(op, "stat", stat, largest ? g.index_type : acc);
  }
  check(!need_dmask || mask, op, "the mask's gradient needs mask");
  check(!need_dedge || edge, op, "the edges' gradient needs edge");
  const DeviceScope scope(x);
  const Tensor dx = need_dx ? new_tensor(x, {g.n_src, features}, x.scalar_type()) : none_tensor(x, x.scalar_type());
  const Tensor dmask = new_tensor(x, {need_dmask ? edges : 0}, acc);
  const ScalarType edge_type = weight ? acc : x.scalar_type();
  const Tensor dedge = !need_dedge ? none_tensor(x, edge_type)
                                   : new_tensor(x, {weight ? features : edges, weight ? edge->size(1) : features}, edge_type);
  const Tensor dbias = new_tensor(x, {need_dedge && bias ? features : 0}, acc);
  const Tensor dparam = new_tensor(x, {need_dparam ? features : 0}, acc);
  const bool empty = features == 0 || g.n_src == 0 || g.n_dst == 0;
  // What no visit writes: edges that no slot names, edges that are removed, the param of other aggregations.
  if (empty || edges > g.n_edges) zero(dmask);
  if (empty || (!weight && (keep || edges > g.n_edges))) zero(dedge);
  if (empty) zero(dbias);
  const bool has_dparam = need_dparam && (aggr == kAggrSoftmax || aggr == kAggrPower);
  if (empty || !has_dparam) zero(dparam);
  if (empty) {
    zero(dx);
    return {dx, dmask, dedge, dbias, dparam};
  }
  if (!(need_dx || need_dmask || need_dedge || has_dparam)) return {dx, dmask, dedge, dbias, dparam};
  dispatch_float(op, x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    GenBwdArgs<T> a{};
    static_cast<GenArgs<T>&>(a) = gen_args<T>(x, edge, weight, bias, mask, keep, param, row_scale, removed, eps);
    a.ptr = g.colptr;
    a.idx = indices(g.row, g.index_type);
    a.eid = indices(g.ceid, g.index_type);
    a.rows = g.n_src;
    a.slots = g.n_edges;
    a.dy = ptr<T>(dy);
    a.y = ptr<T>(y);
    a.lse = softmax ? ptr<A>(stat) : nullptr;
    a.arg = indices(largest ? ptr<void>(stat) : nullptr, g.index_type);
    a.dx = need_dx ? mutable_ptr<T>(dx) : nullptr;
    a.dmask = need_dmask ? mutable_ptr<A>(dmask) : nullptr;
    a.dedge = need_dedge && !weight ? mutable_ptr<T>(dedge) : nullptr;
    a.constant_beta = aggr == kAggrSoftmaxSg;
    a.need_dweight = need_dedge && weight.has_value();
    a.need_dparam = has_dparam;
    a.all_edges = all_edges && need_dmask && (aggr == kAggrSum || (softmax && removed));
    if (largest) a.row_scale = nullptr;
    if (softmax && a.constant_beta && !has_dparam) {
      launch_gen_bwd<T, kShare>(a, g.n_dst, x, dparam, dedge, dbias, scope);
    } else if (softmax) {
      launch_gen_bwd<T, kSoftmax>(a, g.n_dst, x, dparam, dedge, dbias, scope);
    } else if (aggr == kAggrPower) {
      launch_gen_bwd<T, kPower>(a, g.n_dst, x, dparam, dedge, dbias, scope);
    } else {
      launch_gen_bwd<T, kSum>(a, g.n_dst, x, dparam, dedge, dbias, scope);
    }
  });
  return {dx, dmask, dedge, dbias, dparam};
}

ACEFAST_REGISTER_CUDA(m) { m.impl("gen_bwd", TORCH_BOX(&gen_bwd)); }

}  // namespace
}  // namespace acefast

// gen on CUDA, forward: see csrc/ops.h and gen.cuh. A warp takes one segment of a destination's edges and one block of
// columns; groups of its lanes take one edge each and merge at the end. The softmax is summed online: each column keeps a
// reference exponent that follows the largest one only when that is far ahead, so sums are rarely rescaled.
#include <limits>

#include "gen.cuh"

namespace acefast {
namespace {

constexpr int kAtOnce = 8;  // pieces of a long row whose sums are read at once
constexpr int kAhead = 8;  // powers of two by which an exponent may exceed the reference before sums are rescaled

enum Kind { kSum, kSoftmax, kMax };  // of kernels; kSum serves the power mean as well

// The aggregation of some edges' messages in one column.
template <int KIND, typename A>
struct Column {
  static constexpr int kValues = KIND == kSoftmax ? 3 : 1;  // rows of the partial results of a piece
  static constexpr A kNone = -std::numeric_limits<A>::infinity();

  A top = kNone;      // softmax: reference exponent, base 2; max: the largest message
  A sum = 0;          // sum, power: of the messages; softmax: of exp2(exponent - top)
  A weighted = 0;     // softmax: of exp2(exponent - top) * message
  int64_t arg = -1;   // max: edge of the largest message

  __device__ __forceinline__ bool behind(A exponent) const { return exponent > top + A(kAhead); }

  __device__ __forceinline__ void raise(A exponent) {
    if (behind(exponent)) {
      const A scale = exp_2(top - exponent);
      sum *= scale;
      weighted *= scale;
      top = exponent;
    }
  }

  // factor: t log2(e) of the softmax, p of the power mean. The softmax is raised to the exponent before.
  __device__ __forceinline__ void add(A message, A factor, bool power, int64_t id) {
    if constexpr (KIND == kSoftmax) {
      const A p = exp_2(factor * message - top);
      sum += p;
      weighted += p * message;
    } else if constexpr (KIND == kSum) {
      sum += power ? exp_2(factor * log_2(power_clamp(message))) : message;
    } else if (arg < 0 || message > top) {  // ids ascend
      top = message;
      arg = id;
    }
  }

  __device__ __forceinline__ void merge(const Column& other) {
    if constexpr (KIND == kSoftmax) {
      if (other.sum == 0) return;
      raise(other.top);
      const A scale = exp_2(other.top - top);
      sum += scale * other.sum;
      weighted += scale * other.weighted;
    } else if constexpr (KIND == kMax) {
      if (other.arg >= 0 && (arg < 0 || other.top > top || (other.top == top && other.arg < arg))) *this = other;
    } else {
      sum += other.sum;
    }
  }

  __device__ __forceinline__ Column across(int offset) const {
    Column other;
    if constexpr (KIND == kSoftmax || KIND == kMax) other.top = __shfl_xor_sync(kFullMask, top, offset);
    if constexpr (KIND != kMax) other.sum = __shfl_xor_sync(kFullMask, sum, offset);
    if constexpr (KIND == kSoftmax) other.weighted = __shfl_xor_sync(kFullMask, weighted, offset);
    if constexpr (KIND == kMax) other.arg = __shfl_xor_sync(kFullMask, arg, offset);
    return other;
  }

  // Partial results: kValues values, `step` apart.
  __device__ __forceinline__ void store(A* to, int64_t* to_arg, int64_t step) const {
    if constexpr (KIND == kSoftmax) {
      to[0] = top;
      to[step] = sum;
      to[2 * step] = weighted;
    } else if constexpr (KIND == kMax) {
      *to = top;
      *to_arg = arg;
    } else {
      *to = sum;
    }
  }
  __device__ __forceinline__ static Column load(const A* from, const int64_t* from_arg, int64_t step) {
    Column c;
    if constexpr (KIND == kSoftmax) {
      c.top = from[0];
      c.sum = from[step];
      c.weighted = from[2 * step];
    } else if constexpr (KIND == kMax) {
      c.top = *from;
      c.arg = *from_arg;
    } else {
      c.sum = *from;
    }
    return c;
  }
};

template <typename T>
struct GenFwdArgs : GenArgs<T> {
  using A = acc_t<T>;
  T* y;                  // [rows, features]
  A* lse;                // [rows, features], softmax
  void* arg;             // [rows, features], max
  A* partial;            // [partials, kValues, features]
  int64_t* partial_arg;  // [partials, features], max
  bool power;
};

// y and stat of VEC columns of a row, from the aggregation of its kept edges.
template <typename T, int KIND, int VEC>
__device__ __forceinline__ void finish_gen(const GenFwdArgs<T>& a, int64_t row, int64_t c, Column<KIND, acc_t<T>>* column) {
  using A = acc_t<T>;
  const A scale = a.row_scale ? a.row_scale[row] : A(1);
  const A absent = a.removed ? static_cast<A>(a.removed[row]) : A(0);
  Pack<T, VEC> y;
  Pack<A, VEC> lse;
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    Column<KIND, A>& state = column[v];
    A result = 0;
    if constexpr (KIND == kSoftmax) {
      if (absent > 0) {
        state.raise(0);
        state.sum += absent * exp_2(-state.top);
      }
      result = state.sum == 0 ? A(0) : quotient(state.weighted, state.sum);
      lse.v[v] = A(kLn2) * (state.top + log_2(state.sum));
    } else if constexpr (KIND == kSum) {
      if (a.power) {
        const A p = a.param[c + v];
        const A mean = scale * (absent > 0 ? state.sum + absent * exp_2(p * log_2(A(kPowerLow))) : state.sum);
        result = mean <= 0 ? A(0) : exp_2(log_2(mean) / p);
      } else {
        result = scale * state.sum;
      }
    } else {
      const bool beaten = absent > 0 && state.top < 0;
      const int64_t arg = beaten ? -1 : state.arg;
      result = arg < 0 ? A(0) : state.top;
      const int64_t at = row * a.features + c + v;
      if (a.idx.wide) {
        static_cast<int64_t*>(a.arg)[at] = arg;
      } else {
        static_cast<int32_t*>(a.arg)[at] = static_cast<int32_t>(arg);
      }
    }
    y.v[v] = static_cast<T>(result);
  }
  store_pack(a.y + row * a.features + c, y);
  if constexpr (KIND == kSoftmax) store_pack(a.lse + row * a.features + c, lse);
}

// A kept edge of a warp: where its source's row begins.
template <typename A>
struct Slot {
  int64_t start;
  A mask;
};

// Blocks that a multiprocessor has registers for: as many as fit without spilling.
template <int KIND, int EDGE, int VEC>
constexpr int kResident = EDGE != kNoEdge ? 8 : VEC == 8 ? (KIND == kSoftmax ? 7 : 10) : KIND == kSoftmax ? 12 : 16;

template <typename T, int KIND, int EDGE, int VEC>
__global__ void __launch_bounds__(kRowThreads, kResident<KIND, EDGE, VEC>) gen_fwd_kernel(const GenFwdArgs<T> a) {
  using A = acc_t<T>;
  using Mine = Slot<A>;
  constexpr bool ENCODED = EDGE == kEncoded;
  ACEFAST_SHARED(shared_slot, Mine, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_id, int64_t, [kRowWarps][kWarp]);
  using Four = Quad<A>;
  ACEFAST_SHARED(shared_weight, Four, [kWeightQuads<A, VEC, ENCODED>]);
  ACEFAST_SHARED(shared_raw, Four, [kRowWarps][kRawQuads<A, ENCODED>]);
  const bool encoded = ENCODED && (VEC > 1 || a.encoded), widened = EDGE == kEdge || (ENCODED && VEC == 1 && !a.encoded && a.edge);
  const int lane = lane_index(), warp = warp_index();
  const int group = a.group, groups = kWarp / group, my_group = lane / group, in_group = lane % group;
  A* tile = reinterpret_cast<A*>(shared_weight);
  A* raw = reinterpret_cast<A*>(shared_raw[warp]);
  const int64_t items = a.pieces.partials() + a.rows;
  for (int64_t block = blockIdx.y; block < a.column_blocks; block += gridDim.y) {
    if (encoded) {
      load_weight(a, block, group * VEC, tile);
      __syncthreads();
    }
    const int64_t c = (block * group + in_group) * VEC;  // the lane's columns: c to c + VEC - 1
    const bool inside = c < a.features;
    const T* x = a.x + (inside ? c : 0);  // lanes outside follow the first one
    A factor[VEC], bias[VEC];
    load_columns<VEC>(a.param, c, a.features, factor);
    load_columns<VEC>(a.bias, c, a.features, bias);
    if constexpr (KIND == kSoftmax) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) factor[v] *= A(kLog2e);
    }
    for (int64_t item = int64_t{blockIdx.x} * kRowWarps + warp; item < items; item += int64_t{gridDim.x} * kRowWarps) {
      const Segment seg = segment_of(item, a.ptr, a.rows, a.slots, a.pieces);
      if (seg.partial >= 0 && seg.begin == seg.end) continue;
      Column<KIND, A> state[VEC];
      for (int64_t base = seg.begin; base < seg.end; base += kWarp) {
        const int64_t slot = base + lane;
        bool live = slot < seg.end;
        int64_t e = slot;
        if (live) {
          if (a.eid.data) e = a.eid[slot];
          live = !a.keep || a.keep[e];
        }
        const unsigned alive = __ballot_sync(kFullMask, live);
        if (live) {
          const int rank = __popc(alive & lanes_below(lane));
          shared_slot[warp][rank] = {a.idx[slot] * a.features, a.mask ? a.mask[e] : A(1)};
          shared_id[warp][rank] = e;
        }
        __syncwarp();
        const int count = __popc(alive);
        if (encoded) {
          load_raw(a, shared_id[warp], count, raw);
          __syncwarp();
        }
        for (int turn = my_group; turn < count; turn += groups * kUnroll) {
          int edge[kUnroll];
          A message[kUnroll][VEC], mask[kUnroll];
          Pack<T, VEC> value[kUnroll], extra[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            edge[u] = turn + u * groups < count ? turn + u * groups : turn;
            const Mine mine = shared_slot[warp][edge[u]];
            mask[u] = mine.mask;
            value[u] = load_pack<VEC>(x + mine.start);
            extra[u] = {};
            if (widened && inside) extra[u] = load_pack<VEC>(a.edge + shared_id[warp][edge[u]] * a.features + c);
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
            for (int v = 0; v < VEC; ++v) {
              message[u][v] = to_acc(value[u].v[v]);
              if (encoded) message[u][v] += bias[v];
              if (widened) message[u][v] += to_acc(extra[u].v[v]);
            }
          }
          if (encoded) encode<T, VEC>(a, c, in_group, tile, raw, shared_id[warp], edge, message);
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
            for (int v = 0; v < VEC; ++v) message[u][v] = (relu(message[u][v]) + a.eps) * mask[u];
          }
          if constexpr (KIND == kSoftmax) {  // absent edges repeat the first one
            A exponent[VEC];
            bool ahead = false;
#pragma unroll
            for (int v = 0; v < VEC; ++v) {
              exponent[v] = factor[v] * message[0][v];
#pragma unroll
              for (int u = 1; u < kUnroll; ++u) exponent[v] = max(exponent[v], factor[v] * message[u][v]);
              ahead |= state[v].behind(exponent[v]);
            }
            if (ahead) {
#pragma unroll
              for (int v = 0; v < VEC; ++v) state[v].raise(exponent[v]);
            }
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (turn + u * groups < count) {
              const int64_t id = KIND == kMax ? shared_id[warp][edge[u]] : 0;
#pragma unroll
              for (int v = 0; v < VEC; ++v) state[v].add(message[u][v], factor[v], a.power, id);
            }
          }
        }
        __syncwarp();
      }
      for (int offset = group; offset < kWarp; offset *= 2) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) state[v].merge(state[v].across(offset));
      }
      if (my_group != 0 || !inside) continue;
      if (seg.partial < 0) {
        finish_gen<T, KIND, VEC>(a, seg.row, c, state);
      } else {
#pragma unroll
        for (int v = 0; v < VEC; ++v)
          state[v].store(a.partial + seg.partial * Column<KIND, A>::kValues * a.features + c + v,
                         a.partial_arg + seg.partial * a.features + c + v, a.features);
      }
    }
    if (encoded) __syncthreads();
  }
}

// Merges the pieces of every long row in the order of its slots. A warp looks at 32 rows and takes 32 columns.
template <typename T, int KIND>
__global__ void __launch_bounds__(kRowThreads) gen_join_kernel(const GenFwdArgs<T> a) {
  using State = Column<KIND, acc_t<T>>;
  const int lane = lane_index();
  const int64_t blocks = (a.features + kWarp - 1) / kWarp, items = (a.rows + kWarp - 1) / kWarp * blocks;
  for (int64_t item = int64_t{blockIdx.x} * kRowWarps + warp_index(); item < items;
       item += int64_t{gridDim.x} * kRowWarps) {
    const int64_t first_row = item / blocks * kWarp, c = item % blocks * kWarp + lane;
    const int64_t mine = first_row + lane;
    const int64_t slots = a.ptr[min(mine + 1, a.rows)] - a.ptr[min(mine, a.rows)];
    unsigned long_rows = __ballot_sync(kFullMask, mine < a.rows && slots > a.pieces.size());
    for (; long_rows; long_rows &= long_rows - 1) {
      const int64_t row = first_row + __ffs(static_cast<int>(long_rows)) - 1;
      if (c >= a.features) continue;
      const int64_t first = first_partial(a.ptr[row], a.pieces), last = last_partial(a.ptr[row + 1], a.pieces);
      const auto piece = [&](int64_t p) {
        return State::load(a.partial + p * State::kValues * a.features + c, a.partial_arg + p * a.features + c, a.features);
      };
      State state = piece(first);
      for (int64_t p = first / 2 * 2 + 2; p <= last; p += 2 * kAtOnce) {
        State next[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          if (p + 2 * n <= last) next[n] = piece(p + 2 * n);
        }
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          if (p + 2 * n <= last) state.merge(next[n]);
        }
      }
      finish_gen<T, KIND, 1>(a, row, c, &state);
    }
  }
}

template <typename T, int KIND>
void launch_gen_fwd(GenFwdArgs<T> a, const Tensor& x, const DeviceScope& scope) {
  using A = acc_t<T>;
  a.pieces = pieces_of(a.slots);
  const Tensor partial = new_tensor(x, {a.pieces.partials(), Column<KIND, A>::kValues, a.features}, acc_type(x.scalar_type()));
  const Tensor partial_arg = new_tensor(x, {KIND == kMax ? a.pieces.partials() : 0, a.features}, ScalarType::Long);
  a.partial = mutable_ptr<A>(partial);
  a.partial_arg = mutable_ptr<int64_t>(partial_arg);
  constexpr int kVec = kGenVec<T>;
  const bool whole = a.features % kVec == 0 && aligned16(a.x) && aligned16(a.y) && aligned16(a.lse) &&
                     (a.encoded || aligned16(a.edge));
  const auto run = [&](auto edge, auto vec) {
    constexpr int EDGE = decltype(edge)::value;
    constexpr int VEC = decltype(vec)::value;
    a.group = group_lanes(a.features, VEC);
    a.column_blocks = ceil_div(a.features, int64_t{a.group} * VEC);
    dim3 grid = grid_of(a.pieces.partials() + a.rows, kRowWarps);
    grid.y = static_cast<unsigned>(std::min<int64_t>({a.column_blocks, 65535, kMostBlocks}));
    ACEFAST_LAUNCH((gen_fwd_kernel<T, KIND, EDGE, VEC>), grid, kRowThreads, 0, scope.stream(), a);
  };
  using Whole = std::integral_constant<int, kVec>;
  if (!whole || kVec == 1) {
    run(std::integral_constant<int, kEncoded>{}, std::integral_constant<int, 1>{});
  } else if constexpr (kVec > 1) {
    dispatch_edge(a, [&](auto edge) { run(edge, Whole{}); });
  }
  if (a.pieces.count > 0) {
    const int64_t items = ceil_div(a.rows, kWarp) * ceil_div(a.features, kWarp);
    ACEFAST_LAUNCH((gen_join_kernel<T, KIND>), grid_of(items, kRowWarps), kRowThreads, 0, scope.stream(), a);
  }
}

std::tuple<Tensor, Tensor> gen(Tensor rowptr, Tensor col, OptTensor eid, Tensor colptr, Tensor row, OptTensor ceid, Tensor x,
                               OptTensor edge, OptTensor weight, OptTensor bias, OptTensor mask, OptTensor keep, OptTensor param,
                               OptTensor row_scale, OptTensor removed, int64_t aggr, double eps, bool) {
  const GraphArgs g = graph_args("gen", rowptr, col, eid, colptr, row, ceid);
  check_gen("gen", g, col, x, edge, weight, bias, mask, keep, param, row_scale, removed, aggr);
  const DeviceScope scope(x);
  const bool softmax = aggr == kAggrSoftmax || aggr == kAggrSoftmaxSg, largest = aggr == kAggrMax;
  const ScalarType stat_type = largest ? g.index_type : acc_type(x.scalar_type());
  const Tensor y = new_tensor(x, {g.n_dst, x.size(1)}, x.scalar_type());
  const Tensor stat = softmax || largest ? new_tensor(x, {g.n_dst, x.size(1)}, stat_type) : none_tensor(x, stat_type);
  if (y.numel() == 0) return {y, stat};
  dispatch_float("gen", x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    GenFwdArgs<T> a{};
    static_cast<GenArgs<T>&>(a) = gen_args<T>(x, edge, weight, bias, mask, keep, param, row_scale, removed, eps);
    a.ptr = g.rowptr;
    a.idx = indices(g.col, g.index_type);
    a.eid = indices(g.eid, g.index_type);
    a.rows = g.n_dst;
    a.slots = g.n_edges;
    a.y = mutable_ptr<T>(y);
    a.lse = softmax ? mutable_ptr<acc_t<T>>(stat) : nullptr;
    a.arg = largest ? mutable_ptr<void>(stat) : nullptr;
    a.power = aggr == kAggrPower;
    if (softmax) {
      launch_gen_fwd<T, kSoftmax>(a, x, scope);
    } else if (largest) {
      launch_gen_fwd<T, kMax>(a, x, scope);
    } else {
      launch_gen_fwd<T, kSum>(a, x, scope);
    }
  });
  return {y, stat};
}

ACEFAST_REGISTER_CUDA(m) { m.impl("gen", TORCH_BOX(&gen)); }

}  // namespace
}  // namespace acefast

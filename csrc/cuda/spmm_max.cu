// spmm_max on CUDA: the largest (smallest) message of each row and column with its edge id, and the gradient, which goes by
// source to the edges that gave the extremes, see csrc/ops.h. Work is split as in spmm.cu; all comparisons are for a maximum,
// the messages of a minimum change their sign.
#include "gather.cuh"
#include "rows.cuh"

namespace acefast {
namespace {

template <typename T, typename A, typename I>
struct MaxArgs {
  const int64_t* ptr;     // forward: rowptr [rows + 1]; backward: colptr
  const I* idx;           // [slots]
  const I* eid;           // [slots] or nullptr
  const A* weight;        // [E] or nullptr
  const A* mask;          // [E] or nullptr
  const bool* keep;       // [E] or nullptr
  const T* x;             // [n_src, features]
  T* y;                   // forward: [rows, features]
  I* arg;                 // forward: [rows, features]
  const T* dy;            // backward: [n_dst, features]
  const I* chosen;        // backward: arg
  T* dx;                  // backward: [rows, features] or nullptr
  A* dcoef;               // backward: [E] or nullptr
  A* partial;             // [partials, features]
  I* partial_arg;         // forward: [partials, features]
  A sign;                 // forward: 1 or -1
  int64_t rows, slots, features, column_blocks;
  Pieces pieces;
  int group;
};

// Whether a maximum moves from (best, arg) to a message of value v; NaN is the largest. Equal messages keep the earlier one.
template <typename A, typename I>
__device__ __forceinline__ bool exceeds(A v, A best, I arg) {
  return arg < 0 || v > best || (v != v && best == best);
}

template <typename T, typename A, typename I>
__device__ __forceinline__ A coefficient(const MaxArgs<T, A, I>& a, int64_t e) {
  return (a.weight ? a.weight[e] : A(1)) * (a.mask ? a.mask[e] : A(1));
}

template <typename T, typename A, typename I, int VEC>
__global__ void __launch_bounds__(kRowThreads) spmm_max_fwd_kernel(const MaxArgs<T, A, I> a) {
  constexpr int R = kRepeat<VEC>;
  ACEFAST_SHARED(shared_index, I, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_id, I, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_coef, A, [kRowWarps][kWarp]);
  const int lane = lane_index(), warp = warp_index();
  I *index = shared_index[warp], *id = shared_id[warp];
  A* coef = shared_coef[warp];
  const int group = a.group, groups = kWarp / group, my_group = lane / group, in_group = lane % group;
  const int64_t items = (a.pieces.partials() + a.rows) * a.column_blocks;
  for (int64_t item = int64_t{blockIdx.x} * kRowWarps + warp; item < items; item += int64_t{gridDim.x} * kRowWarps) {
    const int64_t block = item % a.column_blocks;
    const Segment seg = segment_of(item / a.column_blocks, a.ptr, a.rows, a.slots, a.pieces);
    if (seg.partial >= 0 && seg.begin == seg.end) continue;
    A best[R * VEC] = {};
    I arg[R * VEC];
#pragma unroll
    for (int v = 0; v < R * VEC; ++v) arg[v] = -1;
    for (int64_t base = seg.begin; base < seg.end; base += kWarp) {
      const int count = pack_edges(a.idx, a.eid, a.keep, base + lane, seg.end, index, id, lane, [](int64_t) {});
      if (lane < count) coef[lane] = a.sign * coefficient(a, static_cast<int64_t>(id[lane]));
      __syncwarp();
      for (int turn = my_group; turn < count; turn += groups * kUnroll) {
        Pack<T, VEC> value[kUnroll][R];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int edge = turn + u * groups;
          if (edge < count) {
            const T* source = a.x + static_cast<int64_t>(index[edge]) * a.features;
#pragma unroll
            for (int r = 0; r < R; ++r) {
              const int64_t c = column_of<VEC>(block, r, in_group, group);
              if (c < a.features) value[u][r] = load_pack<VEC>(source + c);
            }
          }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int edge = turn + u * groups;
          if (edge < count) {
            const A factor = coef[edge];
            const I e = id[edge];
#pragma unroll
            for (int r = 0; r < R; ++r) {
              if (column_of<VEC>(block, r, in_group, group) < a.features) {
#pragma unroll
                for (int v = 0; v < VEC; ++v) {
                  const int at = r * VEC + v;
                  const A message = factor * to_acc(value[u][r].v[v]);
                  if (exceeds(message, best[at], arg[at])) {
                    best[at] = message;
                    arg[at] = e;
                  }
                }
              }
            }
          }
        }
      }
      __syncwarp();
    }
    for (int offset = group; offset < kWarp; offset *= 2) {
#pragma unroll
      for (int v = 0; v < R * VEC; ++v) {
        const A other = __shfl_xor_sync(kFullMask, best[v], offset);
        const I other_arg = __shfl_xor_sync(kFullMask, arg[v], offset);
        const bool earlier = other_arg < arg[v] && !exceeds(best[v], other, other_arg);  // the first of equal ones
        if (other_arg >= 0 && (exceeds(other, best[v], arg[v]) || earlier)) {
          best[v] = other;
          arg[v] = other_arg;
        }
      }
    }
    if (my_group != 0) continue;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t c = column_of<VEC>(block, r, in_group, group);
      if (c >= a.features) continue;
      Pack<T, VEC> extreme;
      Pack<A, VEC> value;
      Pack<I, VEC> winner;
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        winner.v[v] = arg[r * VEC + v];
        value.v[v] = best[r * VEC + v];
        extreme.v[v] = static_cast<T>(winner.v[v] < 0 ? A(0) : a.sign * value.v[v]);
      }
      if (seg.partial >= 0) {
        store_pack(a.partial + seg.partial * a.features + c, value);
        store_pack(a.partial_arg + seg.partial * a.features + c, winner);
      } else {
        store_pack(a.y + seg.row * a.features + c, extreme);
        store_pack(a.arg + seg.row * a.features + c, winner);
      }
    }
  }
}

// Joins the pieces of every long row in the order of its slots.
template <typename T, typename A, typename I>
__global__ void __launch_bounds__(kRowThreads) spmm_max_join_kernel(const MaxArgs<T, A, I> a) {
  join_long_rows(a.ptr, a.rows, a.features, a.pieces, [&](int64_t row, int64_t c, int64_t first, int64_t second, int64_t last) {
    A best = a.partial[first * a.features + c];
    I arg = a.partial_arg[first * a.features + c];
    for (int64_t p = second; p <= last; p += 2) {
      const A other = a.partial[p * a.features + c];
      const I other_arg = a.partial_arg[p * a.features + c];
      if (other_arg >= 0 && exceeds(other, best, arg)) {
        best = other;
        arg = other_arg;
      }
    }
    a.y[row * a.features + c] = static_cast<T>(arg < 0 ? A(0) : a.sign * best);
    a.arg[row * a.features + c] = arg;
  });
}

// dx_j and dcoef_e: one warp per segment of a source's edges reads the winners of each destination's columns and dy only where
// the edge is among them. Blocks of columns come one after the other in the same warp, which adds up an edge's dcoef in the
// lane that owns it.
template <typename T, typename A, typename I, int VEC>
__global__ void __launch_bounds__(kRowThreads, 8) spmm_max_bwd_kernel(const MaxArgs<T, A, I> a) {
  constexpr int R = kRepeat<VEC>;
  ACEFAST_SHARED(shared_index, I, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_id, I, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_coef, A, [kRowWarps][kWarp]);
  const int lane = lane_index(), warp = warp_index();
  I *index = shared_index[warp], *id = shared_id[warp];
  A* coef = shared_coef[warp];
  const int group = a.group, groups = kWarp / group, my_group = lane / group, in_group = lane % group;
  const int64_t items = a.pieces.partials() + a.rows;
  for (int64_t item = int64_t{blockIdx.x} * kRowWarps + warp; item < items; item += int64_t{gridDim.x} * kRowWarps) {
    const Segment seg = segment_of(item, a.ptr, a.rows, a.slots, a.pieces);
    if (seg.partial >= 0 && seg.begin == seg.end) continue;
    for (int64_t block = 0; block < a.column_blocks; ++block) {
      A acc[R * VEC] = {}, mine[R * VEC] = {};  // mine: this lane's columns of x_j
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t c = column_of<VEC>(block, r, in_group, group);
        if (a.dcoef && c < a.features) {
          const Pack<T, VEC> pack = load_pack<VEC>(a.x + seg.row * a.features + c);
#pragma unroll
          for (int v = 0; v < VEC; ++v) mine[r * VEC + v] = to_acc(pack.v[v]);
        }
      }
      for (int64_t base = seg.begin; base < seg.end; base += kWarp) {
        const int count = pack_edges(a.idx, a.eid, a.keep, base + lane, seg.end, index, id, lane, [&](int64_t e) {
          if (a.dcoef && block == 0) a.dcoef[e] = 0;
        });
        if (lane < count && a.dx) coef[lane] = coefficient(a, static_cast<int64_t>(id[lane]));
        __syncwarp();
        // Every lane makes every turn: dcoef is summed across the group.
        for (int turn = 0; turn < count; turn += groups * kUnroll) {
          A dot[kUnroll] = {};
          unsigned hits[kUnroll] = {};  // bit at: this edge won the lane's column `at`
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int edge = turn + my_group + u * groups;
            if (edge < count) {
              const I* winners = a.chosen + static_cast<int64_t>(index[edge]) * a.features;
              const I e = id[edge];
#pragma unroll
              for (int r = 0; r < R; ++r) {
                const int64_t c = column_of<VEC>(block, r, in_group, group);
                if (c < a.features) {
                  const Pack<I, VEC> winner = load_pack<VEC>(winners + c);
#pragma unroll
                  for (int v = 0; v < VEC; ++v) hits[u] |= static_cast<unsigned>(winner.v[v] == e) << (r * VEC + v);
                }
              }
            }
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (hits[u] == 0) continue;
            const int edge = turn + my_group + u * groups;
            const T* source = a.dy + static_cast<int64_t>(index[edge]) * a.features;
            const A factor = a.dx ? coef[edge] : A(0);
#pragma unroll
            for (int r = 0; r < R; ++r) {
              if ((hits[u] >> (r * VEC) & ((1u << VEC) - 1)) == 0) continue;
              const Pack<T, VEC> value = load_pack<VEC>(source + column_of<VEC>(block, r, in_group, group));
#pragma unroll
              for (int v = 0; v < VEC; ++v) {
                const int at = r * VEC + v;
                const A d = hits[u] >> at & 1 ? to_acc(value.v[v]) : A(0);
                dot[u] += d * mine[at];
                acc[at] += factor * d;
              }
            }
          }
          if (!a.dcoef) continue;
          sum_edges(dot, group, in_group, [&](int u, A total) {
            const int edge = turn + my_group + u * groups;
            if (edge >= count) return;
            A* target = a.dcoef + static_cast<int64_t>(id[edge]);
            *target = block == 0 ? total : *target + total;
          });
        }
        __syncwarp();
      }
      if (!a.dx) continue;
      for (int offset = group; offset < kWarp; offset *= 2) {
#pragma unroll
        for (int v = 0; v < R * VEC; ++v) acc[v] += __shfl_xor_sync(kFullMask, acc[v], offset);
      }
      if (my_group != 0) continue;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t c = column_of<VEC>(block, r, in_group, group);
        if (c >= a.features) continue;
        if (seg.partial < 0) {
          finish_columns<T, T, A, VEC>(nullptr, a.dx + seg.row * a.features, c, acc + r * VEC, A(1), A(0));
        } else {
          for (int v = 0; v < VEC; ++v) a.partial[seg.partial * a.features + c + v] = acc[r * VEC + v];
        }
      }
    }
  }
}

template <typename T, typename A, typename I>
MaxArgs<T, A, I> max_args(const GraphArgs& g, const Tensor& x, const OptTensor& weight, const OptTensor& mask,
                          const OptTensor& keep) {
  MaxArgs<T, A, I> a{};
  a.x = ptr<T>(x);
  a.weight = ptr<A>(weight);
  a.mask = ptr<A>(mask);
  a.keep = ptr<bool>(keep);
  a.slots = g.n_edges;
  a.features = x.size(1);
  a.pieces = pieces_of(a.slots);
  return a;
}

template <typename T, typename A, typename I>
void launch_spmm_max_fwd(const GraphArgs& g, MaxArgs<T, A, I> a, const Tensor& y, const Tensor& arg, bool largest,
                         const DeviceScope& scope) {
  a.ptr = g.rowptr;
  a.idx = static_cast<const I*>(g.col);
  a.eid = static_cast<const I*>(g.eid);
  a.rows = g.n_dst;
  a.y = mutable_ptr<T>(y);
  a.arg = mutable_ptr<I>(arg);
  a.sign = largest ? A(1) : A(-1);
  const Tensor partial = new_tensor(y, {a.pieces.partials(), a.features}, acc_type(y.scalar_type()));
  const Tensor partial_arg = new_tensor(y, {a.pieces.partials(), a.features}, arg.scalar_type());
  a.partial = mutable_ptr<A>(partial);
  a.partial_arg = mutable_ptr<I>(partial_arg);
  dispatch_vector<T>(a.features, {a.x, a.y, a.arg}, [&](auto vec) {
    constexpr int VEC = decltype(vec)::value;
    a.group = group_lanes(a.features, VEC);
    a.column_blocks = column_blocks(a.features, a.group, VEC);
    ACEFAST_LAUNCH((spmm_max_fwd_kernel<T, A, I, VEC>), grid_of((a.pieces.partials() + a.rows) * a.column_blocks, kRowWarps),
                   kRowThreads, 0, scope.stream(), a);
  });
  if (a.pieces.count == 0) return;
  ACEFAST_LAUNCH((spmm_max_join_kernel<T, A, I>), join_grid(a.rows, a.features), kRowThreads, 0, scope.stream(), a);
}

template <typename T, typename A, typename I>
void launch_spmm_max_bwd(const GraphArgs& g, MaxArgs<T, A, I> a, const Tensor& dy, const Tensor& arg, const Tensor& dx,
                         const Tensor& dcoef, bool need_dx, bool need_dcoef, const DeviceScope& scope) {
  a.ptr = g.colptr;
  a.idx = static_cast<const I*>(g.row);
  a.eid = static_cast<const I*>(g.ceid);
  a.rows = g.n_src;
  a.dy = ptr<T>(dy);
  a.chosen = ptr<I>(arg);
  a.dx = need_dx ? mutable_ptr<T>(dx) : nullptr;
  a.dcoef = need_dcoef ? mutable_ptr<A>(dcoef) : nullptr;
  const Tensor partial = new_tensor(dy, {need_dx ? a.pieces.partials() : 0, a.features}, dcoef.scalar_type());
  a.partial = mutable_ptr<A>(partial);
  dispatch_vector<T>(a.features, {a.x, a.dy, a.chosen, a.dx}, [&](auto vec) {
    constexpr int VEC = decltype(vec)::value;
    a.group = group_lanes(a.features, VEC);
    a.column_blocks = column_blocks(a.features, a.group, VEC);
    ACEFAST_LAUNCH((spmm_max_bwd_kernel<T, A, I, VEC>), grid_of(a.pieces.partials() + a.rows, kRowWarps), kRowThreads, 0,
                   scope.stream(), a);
  });
  if (a.pieces.count == 0 || !need_dx) return;
  ACEFAST_LAUNCH((spmm_join_kernel<T, T, A>), join_grid(a.rows, a.features), kRowThreads, 0, scope.stream(), a.ptr, a.rows,
                 a.features, a.pieces, static_cast<const A*>(a.partial), static_cast<const T*>(nullptr), a.dx, static_cast<const A*>(nullptr),
                 static_cast<const A*>(nullptr));
}

// Returns E.
int64_t check_spmm_max(const char* op, const GraphArgs& g, const Tensor& col, const Tensor& x, const OptTensor& weight,
                       const OptTensor& mask, const OptTensor& keep) {
  check(x.dim() == 2, op, "x must have two dimensions");
  const ScalarType acc = acc_type(x.scalar_type());
  const int64_t edges = edge_count(op, g, {&weight, &mask, &keep});
  check_tensor(op, "col", col, x, {g.n_edges});
  check_tensor(op, "x", x, x, {g.n_src, x.size(1)});
  check_optional(op, "weight", weight, x, acc, {edges});
  check_optional(op, "mask", mask, x, acc, {edges});
  check_optional(op, "keep", keep, x, ScalarType::Bool, {edges});
  return edges;
}

std::tuple<Tensor, Tensor> spmm_max(Tensor rowptr, Tensor col, OptTensor eid, Tensor colptr, Tensor row, OptTensor ceid, Tensor x,
                                    OptTensor weight, OptTensor mask, OptTensor keep, bool largest) {
  const GraphArgs g = graph_args("spmm_max", rowptr, col, eid, colptr, row, ceid);
  check_spmm_max("spmm_max", g, col, x, weight, mask, keep);
  const DeviceScope scope(x);
  const Tensor y = new_tensor(x, {g.n_dst, x.size(1)}, x.scalar_type()), arg = new_tensor(x, {g.n_dst, x.size(1)}, g.index_type);
  if (y.numel() == 0) return {y, arg};
  dispatch_float("spmm_max", x.scalar_type(), [&](auto t) {
    dispatch_index("spmm_max", g.index_type, [&](auto i) {
      using T = typename decltype(t)::type;
      launch_spmm_max_fwd(g, max_args<T, acc_t<T>, typename decltype(i)::type>(g, x, weight, mask, keep), y, arg, largest, scope);
    });
  });
  return {y, arg};
}

std::tuple<Tensor, Tensor> spmm_max_bwd(Tensor rowptr, Tensor col, OptTensor eid, Tensor colptr, Tensor row, OptTensor ceid,
                                        Tensor dy, Tensor arg, Tensor x, OptTensor weight, OptTensor mask, OptTensor keep,
                                        bool need_dx, bool need_dcoef) {
  const GraphArgs g = graph_args("spmm_max_bwd", rowptr, col, eid, colptr, row, ceid);
  const int64_t edges = check_spmm_max("spmm_max_bwd", g, col, x, weight, mask, keep);
  check_tensor("spmm_max_bwd", "dy", dy, x, {g.n_dst, x.size(1)});
  check_dtype("spmm_max_bwd", "dy", dy, x.scalar_type());
  check_tensor("spmm_max_bwd", "arg", arg, x, {g.n_dst, x.size(1)});
  check_dtype("spmm_max_bwd", "arg", arg, g.index_type);
  const DeviceScope scope(x);
  const ScalarType dtype = x.scalar_type(), acc = acc_type(dtype);
  const Tensor dx = need_dx ? new_tensor(x, {g.n_src, x.size(1)}, dtype) : none_tensor(x, dtype);
  const Tensor dcoef = new_tensor(x, {need_dcoef ? edges : 0}, acc);
  if (edges > g.n_edges || x.size(1) == 0) zero(dcoef);
  if (g.n_src == 0 || x.size(1) == 0 || !(need_dx || need_dcoef)) return {dx, dcoef};
  dispatch_float("spmm_max_bwd", dtype, [&](auto t) {
    dispatch_index("spmm_max_bwd", g.index_type, [&](auto i) {
      using T = typename decltype(t)::type;
      using I = typename decltype(i)::type;
      launch_spmm_max_bwd(g, max_args<T, acc_t<T>, I>(g, x, weight, mask, keep), dy, arg, dx, dcoef, need_dx, need_dcoef, scope);
    });
  });
  return {dx, dcoef};
}

ACEFAST_REGISTER_CUDA(m) {
  m.impl("spmm_max", TORCH_BOX(&spmm_max));
  m.impl("spmm_max_bwd", TORCH_BOX(&spmm_max_bwd));
}

}  // namespace
}  // namespace acefast

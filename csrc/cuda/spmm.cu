// spmm on CUDA: forward, backward in one visit of each edge by source, see csrc/ops.h and gather.cuh.
#include "gather.cuh"

namespace acefast {
namespace {

int64_t heads_of(const Tensor& x) { return x.dim() == 3 ? x.size(1) : 1; }

// An uninitialised tensor of x's shape with another number of rows.
Tensor new_rows(const Tensor& x, int64_t rows) {
  if (x.dim() == 3) return new_tensor(x, {rows, x.size(1), x.size(2)}, x.scalar_type());
  return new_tensor(x, {rows, x.size(1)}, x.scalar_type());
}

template <typename T, typename I>
void launch_spmm_fwd(const GraphArgs& g, const Tensor& x, const OptTensor& weight, const OptTensor& mask, const OptTensor& keep,
                     const OptTensor& self_weight, const OptTensor& row_scale, const Tensor& y, const DeviceScope& scope) {
  using A = acc_t<T>;
  GatherArgs<T, T, A, I> a{};
  a.ptr = g.rowptr;
  a.idx = static_cast<const I*>(g.col);
  a.eid = static_cast<const I*>(g.eid);
  a.in = ptr<T>(x);
  a.out = mutable_ptr<T>(y);
  a.weight = ptr<A>(weight);
  a.mask = ptr<A>(mask);
  a.keep = ptr<bool>(keep);
  a.out_scale = ptr<A>(row_scale);
  a.self_weight = ptr<A>(self_weight);
  a.rows = g.n_dst;
  a.slots = g.n_edges;
  a.heads = heads_of(x);
  a.features = x.size(x.dim() - 1);
  launch_gather(a, x, scope);
}

// Checks the tensors of a call and returns E, the length of the per-edge ones.
int64_t check_spmm(const char* op, const GraphArgs& g, const Tensor& col, const Tensor& x, const OptTensor& weight,
                   const OptTensor& mask, const OptTensor& keep, const OptTensor& self_weight, const OptTensor& row_scale) {
  const ScalarType acc = acc_type(x.scalar_type());
  check_tensor(op, "col", col, x, {g.n_edges});
  const int64_t edges = edge_count(op, g, {&weight, &mask, &keep});
  if (x.dim() == 3) {
    check_tensor(op, "x", x, x, {g.n_src, x.size(1), x.size(2)});
    check_optional(op, "weight", weight, x, acc, {edges, x.size(1)});
    check_optional(op, "mask", mask, x, acc, {edges, x.size(1)});
  } else {
    check(x.dim() == 2, op, "x must have two or three dimensions");
    check_tensor(op, "x", x, x, {g.n_src, x.size(1)});
    check_optional(op, "weight", weight, x, acc, {edges});
    check_optional(op, "mask", mask, x, acc, {edges});
  }
  check_optional(op, "keep", keep, x, ScalarType::Bool, {edges});
  check_optional(op, "self_weight", self_weight, x, acc, {g.n_dst});
  check_optional(op, "row_scale", row_scale, x, acc, {g.n_dst});
  check(!self_weight || g.n_dst == g.n_src, op, "self_weight needs a square graph");
  return edges;
}

Tensor spmm(Tensor rowptr, Tensor col, OptTensor eid, Tensor colptr, Tensor row, OptTensor ceid, Tensor x, OptTensor weight,
            OptTensor mask, OptTensor keep, OptTensor self_weight, OptTensor row_scale, bool) {
  const GraphArgs g = graph_args("spmm", rowptr, col, eid, colptr, row, ceid);
  check_spmm("spmm", g, col, x, weight, mask, keep, self_weight, row_scale);
  const DeviceScope scope(x);
  const Tensor y = new_rows(x, g.n_dst);
  dispatch_float("spmm", x.scalar_type(), [&](auto t) {
    dispatch_index("spmm", g.index_type, [&](auto i) {
      launch_spmm_fwd<typename decltype(t)::type, typename decltype(i)::type>(g, x, weight, mask, keep, self_weight, row_scale, y,
                                                                              scope);
    });
  });
  return y;
}

template <typename T, typename A, typename I>
struct SpmmBwdArgs {
  const int64_t* ptr;  // colptr [n_src + 1]
  const I* row;        // [slots] destination of each CSC slot
  const I* ceid;       // [slots] or nullptr
  const T* dy;         // [n_dst, heads, features]
  const T* x;          // [n_src, heads, features]
  T* dx;               // [n_src, heads, features] or nullptr
  A* dcoef;            // [E, heads], caller's order
  A* dself;            // [n_src] or nullptr
  const A* weight;     // [E, heads]
  const A* mask;       // [E, heads]
  const bool* keep;
  const A* self_weight;
  const A* row_scale;
  A* partial;  // [partials, heads, features], with dx
  int64_t columns, slots, heads, features;
  Pieces pieces;
  int group;
  bool all_edges;
};

// dcoef_e = row_scale_i <dy_i, x_j> and, where dx is asked for, dx_j: one warp per segment of a source's edges. Heads
// and blocks of columns come one after the other in the same warp, which adds up an edge's dcoef in the lane that owns it.
template <typename T, typename A, typename I, int VEC>
__global__ void __launch_bounds__(kRowThreads) spmm_bwd_edges_kernel(const SpmmBwdArgs<T, A, I> a) {
  constexpr int R = kRepeat<VEC>;
  ACEFAST_SHARED(shared_start, int64_t, [kRowWarps][kWarp]);  // where the destination's columns of the head begin
  ACEFAST_SHARED(shared_id, I, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_coef, A, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_scale, A, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_kept, bool, [kRowWarps][kWarp]);
  const int lane = lane_index(), warp = warp_index();
  const int group = a.group, groups = kWarp / group, my_group = lane / group, in_group = lane % group;
  const int64_t blocks = (a.features + group * R * VEC - 1) / (group * R * VEC), width = a.heads * a.features;
  const int64_t items = a.pieces.partials() + a.columns;
  for (int64_t item = int64_t{blockIdx.x} * kRowWarps + warp; item < items; item += int64_t{gridDim.x} * kRowWarps) {
    const Segment seg = segment_of(item, a.ptr, a.columns, a.slots, a.pieces);
    const bool own_row = item >= a.pieces.partials();
    if (!own_row && seg.begin == seg.end) continue;
    A self_dot = 0;
    for (int64_t head_block = 0; head_block < a.heads * blocks; ++head_block) {
      const int64_t head = a.heads == 1 ? 0 : head_block / blocks, block = head_block - head * blocks;
      A acc[R * VEC] = {};
      A mine[R * VEC] = {};  // this lane's columns of x_j
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t c = column_of<VEC>(block, r, in_group, group);
        if (c < a.features) {
          const Pack<T, VEC> pack = load_pack<VEC>(a.x + seg.row * width + head * a.features + c);
#pragma unroll
          for (int v = 0; v < VEC; ++v) mine[r * VEC + v] = to_acc(pack.v[v]);
        }
      }
      for (int64_t base = seg.begin; base < seg.end; base += kWarp) {
        const int64_t slot = base + lane;
        bool visit = slot < seg.end;
        bool kept = false;
        int64_t e = 0;
        I i = 0;
        if (visit) {
          e = a.ceid ? static_cast<int64_t>(a.ceid[slot]) : slot;
          kept = !a.keep || a.keep[e];
          visit = kept || a.all_edges;
          if (!visit && block == 0) a.dcoef[e * a.heads + head] = 0;
        }
        const unsigned visited = __ballot_sync(kFullMask, visit);
        if (visit) {
          i = a.row[slot];
          const A scale = a.row_scale ? a.row_scale[i] : A(1);
          A coef = scale;
          if (a.dx && a.weight) coef *= a.weight[e * a.heads + head];
          if (a.dx && a.mask) coef *= a.mask[e * a.heads + head];
          const int rank = __popc(visited & lanes_below(lane));
          shared_start[warp][rank] = static_cast<int64_t>(i) * width + head * a.features;
          shared_id[warp][rank] = static_cast<I>(e);
          shared_scale[warp][rank] = scale;
          shared_coef[warp][rank] = coef;
          shared_kept[warp][rank] = kept;
        }
        __syncwarp();
        const int count = __popc(visited);
        // Every lane makes every turn: the dot products are summed across the group.
        for (int turn = 0; turn < count; turn += groups * kUnroll) {
          Pack<T, VEC> value[kUnroll][R];
          A dot[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int edge = turn + my_group + u * groups;
            if (edge < count) {
              const T* source = a.dy + shared_start[warp][edge];
#pragma unroll
              for (int r = 0; r < R; ++r) {
                const int64_t c = column_of<VEC>(block, r, in_group, group);
                if (c < a.features) value[u][r] = load_pack<VEC>(source + c);
              }
            }
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int edge = turn + my_group + u * groups;
            dot[u] = 0;
            if (edge < count) {
              const A coef = shared_coef[warp][edge];
              const bool adds = a.dx && shared_kept[warp][edge];
#pragma unroll
              for (int r = 0; r < R; ++r) {
                if (column_of<VEC>(block, r, in_group, group) < a.features) {
#pragma unroll
                  for (int v = 0; v < VEC; ++v) {
                    const A d = to_acc(value[u][r].v[v]);
                    dot[u] += d * mine[r * VEC + v];
                    if (adds) acc[r * VEC + v] += coef * d;
                  }
                }
              }
            }
          }
          sum_edges(dot, group, in_group, [&](int u, A total) {
            const int edge = turn + my_group + u * groups;
            if (edge >= count) return;
            A* target = a.dcoef + static_cast<int64_t>(shared_id[warp][edge]) * a.heads + head;
            const A part = shared_scale[warp][edge] * total;
            *target = block == 0 ? part : *target + part;
          });
        }
        __syncwarp();
      }
      if (a.dx) {
        for (int offset = group; offset < kWarp; offset *= 2) {
#pragma unroll
          for (int v = 0; v < R * VEC; ++v) acc[v] += __shfl_xor_sync(kFullMask, acc[v], offset);
        }
      }
      if (my_group != 0) continue;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t c = column_of<VEC>(block, r, in_group, group);
        if (c >= a.features) continue;
        const int64_t at = head * a.features + c;
        const T* own_dy = a.self_weight ? a.dy + seg.row * width : nullptr;
        if (own_row && a.dself) {
          const Pack<T, VEC> pack = load_pack<VEC>(own_dy + at);
#pragma unroll
          for (int v = 0; v < VEC; ++v) self_dot += to_acc(pack.v[v]) * mine[r * VEC + v];
        }
        if (!a.dx) continue;
        if (seg.partial < 0) {
          finish_columns<T, T, A, VEC>(own_dy, a.dx + seg.row * width, at, acc + r * VEC, A(1),
                                       a.self_weight ? a.self_weight[seg.row] : A(0));
        } else if (!own_row) {
          store_values<VEC>(a.partial + seg.partial * width + at, acc + r * VEC);
        }
      }
    }
    if (own_row && a.dself) {
      self_dot = group_sum(self_dot, group);  // groups other than the first hold 0 and are not read
      if (lane == 0) a.dself[seg.row] = self_dot;
    }
  }
}

template <typename T, typename I>
void launch_spmm_bwd_edges(const GraphArgs& g, const Tensor& dy, const Tensor& x, const OptTensor& weight, const OptTensor& mask,
                           const OptTensor& keep, const OptTensor& self_weight, const OptTensor& row_scale, bool need_dx,
                           bool all_edges, const Tensor& dx, const Tensor& dcoef, const Tensor& dself, const DeviceScope& scope) {
  using A = acc_t<T>;
  SpmmBwdArgs<T, A, I> a{};
  a.ptr = g.colptr;
  a.row = static_cast<const I*>(g.row);
  a.ceid = static_cast<const I*>(g.ceid);
  a.dy = ptr<T>(dy);
  a.x = ptr<T>(x);
  a.dx = need_dx ? mutable_ptr<T>(dx) : nullptr;
  a.dcoef = mutable_ptr<A>(dcoef);
  a.dself = self_weight ? mutable_ptr<A>(dself) : nullptr;
  a.weight = ptr<A>(weight);
  a.mask = ptr<A>(mask);
  a.keep = ptr<bool>(keep);
  a.self_weight = ptr<A>(self_weight);
  a.row_scale = ptr<A>(row_scale);
  a.columns = g.n_src;
  a.slots = g.n_edges;
  a.heads = heads_of(x);
  a.features = x.size(x.dim() - 1);
  a.pieces = pieces_of(a.slots);
  a.all_edges = all_edges;
  const Tensor partial = new_tensor(x, {a.dx ? a.pieces.partials() : 0, a.heads * a.features}, dcoef.scalar_type());
  a.partial = mutable_ptr<A>(partial);
  const auto run = [&](auto vec) {
    constexpr int VEC = decltype(vec)::value;
    a.group = group_lanes(a.features, VEC);
    ACEFAST_LAUNCH((spmm_bwd_edges_kernel<T, A, I, VEC>), grid_of(a.pieces.partials() + a.columns, kRowWarps), kRowThreads, 0,
                   scope.stream(), a);
  };
  constexpr int kVec = 16 / sizeof(T);
  if (a.features % kVec == 0 && aligned16(a.dy) && aligned16(a.x) && aligned16(a.dx)) {
    run(std::integral_constant<int, kVec>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
  if (a.dx && a.pieces.count > 0) {
    const int64_t items = ceil_div(a.columns, kWarp) * ceil_div(a.heads * a.features, kWarp);
    ACEFAST_LAUNCH((spmm_join_kernel<T, T, A>), grid_of(items, kRowWarps), kRowThreads, 0, scope.stream(), a.ptr, a.columns,
                   a.heads * a.features, a.pieces, a.partial, a.dy, a.dx, static_cast<const A*>(nullptr), a.self_weight);
  }
}

// dx alone is the forward gather over the CSC, the row scale taken per edge.
template <typename T, typename I>
void launch_spmm_bwd_dx(const GraphArgs& g, const Tensor& dy, const OptTensor& weight, const OptTensor& mask,
                        const OptTensor& keep, const OptTensor& self_weight, const OptTensor& row_scale, const Tensor& dx,
                        const DeviceScope& scope) {
  using A = acc_t<T>;
  GatherArgs<T, T, A, I> a{};
  a.ptr = g.colptr;
  a.idx = static_cast<const I*>(g.row);
  a.eid = static_cast<const I*>(g.ceid);
  a.in = ptr<T>(dy);
  a.out = mutable_ptr<T>(dx);
  a.weight = ptr<A>(weight);
  a.mask = ptr<A>(mask);
  a.keep = ptr<bool>(keep);
  a.slot_scale = ptr<A>(row_scale);
  a.self_weight = ptr<A>(self_weight);
  a.rows = g.n_src;
  a.slots = g.n_edges;
  a.heads = heads_of(dy);
  a.features = dy.size(dy.dim() - 1);
  launch_gather(a, dy, scope);
}

std::tuple<Tensor, Tensor, Tensor> spmm_bwd(Tensor rowptr, Tensor col, OptTensor eid, Tensor colptr, Tensor row, OptTensor ceid,
                                            Tensor dy, Tensor x, OptTensor weight, OptTensor mask, OptTensor keep,
                                            OptTensor self_weight, OptTensor row_scale, bool need_dx, bool need_dcoef,
                                            bool all_edges) {
  const GraphArgs g = graph_args("spmm_bwd", rowptr, col, eid, colptr, row, ceid);
  const int64_t edges = check_spmm("spmm_bwd", g, col, x, weight, mask, keep, self_weight, row_scale);
  const bool many = x.dim() == 3;
  if (many) {
    check_tensor("spmm_bwd", "dy", dy, x, {g.n_dst, x.size(1), x.size(2)});
  } else {
    check_tensor("spmm_bwd", "dy", dy, x, {g.n_dst, x.size(1)});
  }
  check_dtype("spmm_bwd", "dy", dy, x.scalar_type());
  const DeviceScope scope(x);
  const ScalarType acc = acc_type(x.scalar_type());
  const Tensor dx = need_dx ? new_rows(x, g.n_src) : none_tensor(x, x.scalar_type());
  const Tensor dcoef = !need_dcoef ? none_tensor(x, acc)
                       : many      ? new_tensor(x, {edges, x.size(1)}, acc)
                                   : new_tensor(x, {edges}, acc);
  const Tensor dself = new_tensor(x, {need_dcoef && self_weight ? g.n_src : 0}, acc);
  const bool empty = heads_of(x) * x.size(x.dim() - 1) == 0;
  if (empty || edges > g.n_edges) zero(dcoef);  // edges that no slot names are not visited
  if (empty) {
    zero(dself);
    return {dx, dcoef, dself};
  }
  if (g.n_src == 0 || !(need_dx || need_dcoef)) return {dx, dcoef, dself};
  dispatch_float("spmm_bwd", x.scalar_type(), [&](auto t) {
    dispatch_index("spmm_bwd", g.index_type, [&](auto i) {
      using T = typename decltype(t)::type;
      using I = typename decltype(i)::type;
      if (need_dcoef) {
        launch_spmm_bwd_edges<T, I>(g, dy, x, weight, mask, keep, self_weight, row_scale, need_dx, all_edges, dx, dcoef,
                                    dself, scope);
      } else {
        launch_spmm_bwd_dx<T, I>(g, dy, weight, mask, keep, self_weight, row_scale, dx, scope);
      }
    });
  });
  return {dx, dcoef, dself};
}

ACEFAST_REGISTER_CUDA(m) {
  m.impl("spmm", TORCH_BOX(&spmm));
  m.impl("spmm_bwd", TORCH_BOX(&spmm_bwd));
}

}  // namespace
}  // namespace acefast

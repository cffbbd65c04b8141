// gcn_norm on CUDA: coefficients d_i^-1/2 d_j^-1/2 and the mask's gradient through the degrees, see csrc/ops.h.
// Eight lanes share a row; long rows are cut into pieces and joined in order as in common.cuh.
#include "common.cuh"

namespace acefast {
namespace {

constexpr int kLanes = 8;  // lanes per segment
constexpr int kSegmentsPerBlock = kThreads / kLanes;

// The calling thread's place: eight neighbouring lanes work on one item. All 32 lanes of a warp make the same turns, so that
// the sums across lanes are warp-wide operations.
__device__ __forceinline__ int64_t first_item() { return int64_t{blockIdx.x} * kSegmentsPerBlock + threadIdx.x / kLanes; }
__device__ __forceinline__ bool warp_has_item(int64_t item, int64_t items) { return item - threadIdx.x % kWarp / kLanes < items; }

// Sum over a row's pieces in the order of its slots.
template <typename A>
__device__ __forceinline__ A join_pieces(const A* partial, int64_t begin, int64_t end, Pieces pieces) {
  const int64_t first = first_partial(begin, pieces), last = last_partial(end, pieces);
  A sum = partial[first];
#pragma unroll 8
  for (int64_t p = first / 2 * 2 + 2; p <= last; p += 2) sum += partial[p];
  return sum;
}

// total[row] = sum over the row's slots of value_e [keep_e] * scale[idx]: one visit of each slot. Absent value counts 1.
template <typename A, typename I>
__global__ void __launch_bounds__(kThreads)
    gcn_norm_sum_kernel(const int64_t* ptr, const I* idx, const I* eid, const A* value, const bool* keep, const A* scale,
                        A* total, A* partial, int64_t rows, int64_t edges, Pieces pieces) {
  const int lane = threadIdx.x % kLanes;
  const int64_t items = pieces.partials() + rows;
  for (int64_t item = first_item(); warp_has_item(item, items); item += int64_t{gridDim.x} * kSegmentsPerBlock) {
    const bool active = item < items;
    const Segment seg = active ? segment_of<false>(item, ptr, rows, edges, pieces) : Segment{0, 0, 0, 0};
    A sum = 0;
    for (int64_t slot = seg.begin + lane; slot < seg.end; slot += kLanes) {
      const int64_t e = eid ? static_cast<int64_t>(eid[slot]) : slot;
      if (keep && !keep[e]) continue;
      A v = value ? value[e] : A(1);
      if (scale) v *= scale[idx[slot]];
      sum += v;
    }
    sum = group_sum(sum, kLanes);
    if (!active || lane != 0) continue;
    if (seg.partial < 0) {
      total[seg.row] = sum;
    } else if (seg.begin < seg.end) {
      partial[seg.partial] = sum;
    }
  }
}

// The row's sum, from its pieces where it is long.
template <typename A>
__device__ __forceinline__ A row_total(const int64_t* ptr, const A* total, const A* partial, int64_t row, Pieces pieces) {
  const int64_t begin = ptr[row], end = ptr[row + 1];
  return partial && end - begin > pieces.size() ? join_pieces(partial, begin, end, pieces) : total[row];
}

// dinv = d^-1/2 where d > 0, else 0; d is the row's sum (total) or its number of slots, plus loops; c_self = dinv^2 loops.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    gcn_norm_dinv_kernel(const int64_t* ptr, const A* total, const A* partial, const A* loops, A* dinv, A* c_self, int64_t rows,
                         Pieces pieces) {
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < rows; row += int64_t{gridDim.x} * kThreads) {
    A degree = total ? row_total(ptr, total, partial, row, pieces) : static_cast<A>(ptr[row + 1] - ptr[row]);
    if (loops) degree += loops[row];
    const A inverse = degree > 0 ? A(1) / sqrt(degree) : A(0);
    dinv[row] = inverse;
    if (loops) c_self[row] = inverse * inverse * loops[row];
  }
}

// out_e = by_row[i] * by_idx[j] for every edge; 0 where keep is False. Absent by_idx counts 1.
template <typename A, typename I>
__global__ void __launch_bounds__(kThreads)
    gcn_norm_edges_kernel(const int64_t* ptr, const I* idx, const I* eid, const A* by_row, const A* by_idx, const bool* keep,
                          A* out, int64_t rows, int64_t edges, Pieces pieces) {
  const int lane = threadIdx.x % kLanes;
  const int64_t items = pieces.partials() + rows;
  for (int64_t item = first_item(); item < items; item += int64_t{gridDim.x} * kSegmentsPerBlock) {
    const Segment seg = segment_of<false>(item, ptr, rows, edges, pieces);
    if (seg.begin == seg.end) continue;
    const A own = by_row[seg.row];
    for (int64_t slot = seg.begin + lane; slot < seg.end; slot += kLanes) {
      const int64_t e = eid ? static_cast<int64_t>(eid[slot]) : slot;
      const A v = by_idx ? own * by_idx[idx[slot]] : own;
      out[e] = keep && !keep[e] ? A(0) : v;
    }
  }
}

// dd_i = -1/2 dinv_i^3 g_i, g_i the sums over the edges into i and out of i and the self term.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    gcn_norm_bwd_degree_kernel(const int64_t* rowptr, const A* into, const A* into_partial, const int64_t* colptr, const A* out_of,
                               const A* out_partial, const A* dinv, const A* dc_self, const A* loops, A* dd, int64_t rows,
                               Pieces pieces) {
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < rows; row += int64_t{gridDim.x} * kThreads) {
    const A inverse = dinv[row];
    A g = row_total(rowptr, into, into_partial, row, pieces) + row_total(colptr, out_of, out_partial, row, pieces);
    if (dc_self) g += A(2) * dc_self[row] * loops[row] * inverse;
    dd[row] = A(-0.5) * inverse * inverse * inverse * g;
  }
}

// A row sum and the partial sums of its long rows.
template <typename A>
struct RowSums {
  Tensor total, partial;
  const A* totals() const { return ptr<A>(total); }
  const A* partials() const { return partial.numel() > 0 ? ptr<A>(partial) : nullptr; }
};

template <typename A, typename I>
RowSums<A> launch_gcn_norm_sum(const int64_t* offsets, const void* idx, const void* eid, const A* value, const bool* keep,
                               const A* scale, int64_t rows, int64_t edges, const Tensor& like, const DeviceScope& scope) {
  const ScalarType dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const Pieces pieces = pieces_of(edges);
  RowSums<A> sums{new_tensor(like, {rows}, dtype), new_tensor(like, {pieces.partials()}, dtype)};
  if (rows == 0) return sums;
  ACEFAST_LAUNCH((gcn_norm_sum_kernel<A, I>), grid_of(pieces.partials() + rows, kSegmentsPerBlock), kThreads, 0, scope.stream(), offsets,
                 static_cast<const I*>(idx), static_cast<const I*>(eid), value, keep, scale, mutable_ptr<A>(sums.total),
                 mutable_ptr<A>(sums.partial), rows, edges, pieces);
  return sums;
}

template <typename A, typename I>
void launch_gcn_norm_edges(const GraphArgs& g, const A* by_row, const A* by_col, const bool* keep, A* out, const DeviceScope& scope) {
  if (g.n_edges == 0) return;
  const Pieces pieces = pieces_of(g.n_edges);
  ACEFAST_LAUNCH((gcn_norm_edges_kernel<A, I>), grid_of(pieces.partials() + g.n_dst, kSegmentsPerBlock), kThreads, 0, scope.stream(), g.rowptr,
                 static_cast<const I*>(g.col), static_cast<const I*>(g.eid), by_row, by_col, keep, out, g.n_dst, g.n_edges, pieces);
}

template <typename A, typename I>
void launch_gcn_norm_fwd(const GraphArgs& g, const OptTensor& mask, const OptTensor& keep, const OptTensor& loops, bool masked,
                         const Tensor& c, const Tensor& c_self, const Tensor& dinv, const DeviceScope& scope) {
  if (g.n_dst == 0) return;
  std::optional<RowSums<A>> sums;
  if (masked && (mask || keep))
    sums = launch_gcn_norm_sum<A, I>(g.rowptr, g.col, g.eid, ptr<A>(mask), ptr<bool>(keep), nullptr, g.n_dst, g.n_edges, c, scope);
  ACEFAST_LAUNCH((gcn_norm_dinv_kernel<A>), grid_of(g.n_dst, kThreads), kThreads, 0, scope.stream(), g.rowptr,
                 sums ? sums->totals() : nullptr, sums ? sums->partials() : nullptr, ptr<A>(loops), mutable_ptr<A>(dinv),
                 mutable_ptr<A>(c_self), g.n_dst, pieces_of(g.n_edges));
  launch_gcn_norm_edges<A, I>(g, ptr<A>(dinv), ptr<A>(dinv), nullptr, mutable_ptr<A>(c), scope);
}

template <typename A, typename I>
void launch_gcn_norm_bwd(const GraphArgs& g, const Tensor& dinv, const Tensor& dc, const OptTensor& dc_self,
                         const OptTensor& loops, const OptTensor& keep, const Tensor& dmask, const DeviceScope& scope) {
  if (g.n_edges == 0) return;
  const auto into = launch_gcn_norm_sum<A, I>(g.rowptr, g.col, g.eid, ptr<A>(dc), nullptr, ptr<A>(dinv), g.n_dst, g.n_edges, dc, scope);
  const auto out_of = launch_gcn_norm_sum<A, I>(g.colptr, g.row, g.ceid, ptr<A>(dc), nullptr, ptr<A>(dinv), g.n_src, g.n_edges, dc, scope);
  const Tensor dd = new_tensor(dc, {g.n_dst}, dc.scalar_type());
  ACEFAST_LAUNCH((gcn_norm_bwd_degree_kernel<A>), grid_of(g.n_dst, kThreads), kThreads, 0, scope.stream(), g.rowptr, into.totals(),
                 into.partials(), g.colptr, out_of.totals(), out_of.partials(), ptr<A>(dinv), ptr<A>(dc_self), ptr<A>(loops),
                 mutable_ptr<A>(dd), g.n_dst, pieces_of(g.n_edges));
  launch_gcn_norm_edges<A, I>(g, ptr<A>(dd), nullptr, ptr<bool>(keep), mutable_ptr<A>(dmask), scope);
}

std::tuple<Tensor, Tensor, Tensor> gcn_norm(Tensor rowptr, Tensor col, OptTensor eid, Tensor colptr, Tensor row, OptTensor ceid,
                                            OptTensor mask, OptTensor keep, OptTensor loops, bool masked) {
  const GraphArgs g = graph_args("gcn_norm", rowptr, col, eid, colptr, row, ceid);
  check(g.n_dst == g.n_src, "gcn_norm", "the graph must be square");
  const ScalarType dtype = mask ? mask->scalar_type() : ScalarType::Float;
  check_optional("gcn_norm", "mask", mask, col, dtype, {g.n_edges});
  check_optional("gcn_norm", "keep", keep, col, ScalarType::Bool, {g.n_edges});
  check_optional("gcn_norm", "loops", loops, col, dtype, {g.n_dst});
  const DeviceScope scope(col);
  const Tensor c = new_tensor(col, {g.n_edges}, dtype), c_self = new_tensor(col, {loops ? g.n_dst : 0}, dtype);
  const Tensor dinv = new_tensor(col, {g.n_dst}, dtype);
  dispatch_acc("gcn_norm", dtype, [&](auto t) {
    dispatch_index("gcn_norm", g.index_type, [&](auto i) {
      launch_gcn_norm_fwd<typename decltype(t)::type, typename decltype(i)::type>(g, mask, keep, loops, masked, c, c_self, dinv,
                                                                                  scope);
    });
  });
  return {c, c_self, dinv};
}

Tensor gcn_norm_bwd(Tensor rowptr, Tensor col, OptTensor eid, Tensor colptr, Tensor row, OptTensor ceid, Tensor dinv, Tensor dc,
                    OptTensor dc_self, OptTensor loops, OptTensor keep) {
  const GraphArgs g = graph_args("gcn_norm_bwd", rowptr, col, eid, colptr, row, ceid);
  check(g.n_dst == g.n_src, "gcn_norm_bwd", "the graph must be square");
  check_tensor("gcn_norm_bwd", "dinv", dinv, col, {g.n_dst});
  check_tensor("gcn_norm_bwd", "dc", dc, col, {g.n_edges});
  check_dtype("gcn_norm_bwd", "dc", dc, dinv.scalar_type());
  check_optional("gcn_norm_bwd", "dc_self", dc_self, col, dinv.scalar_type(), {g.n_dst});
  check_optional("gcn_norm_bwd", "loops", loops, col, dinv.scalar_type(), {g.n_dst});
  check(!dc_self || loops, "gcn_norm_bwd", "dc_self needs loops");
  check_optional("gcn_norm_bwd", "keep", keep, col, ScalarType::Bool, {g.n_edges});
  const DeviceScope scope(col);
  const Tensor dmask = new_tensor(dc, {g.n_edges}, dc.scalar_type());
  dispatch_acc("gcn_norm_bwd", dc.scalar_type(), [&](auto t) {
    dispatch_index("gcn_norm_bwd", g.index_type, [&](auto i) {
      launch_gcn_norm_bwd<typename decltype(t)::type, typename decltype(i)::type>(g, dinv, dc, dc_self, loops, keep, dmask,
                                                                                  scope);
    });
  });
  return dmask;
}

ACEFAST_REGISTER_CUDA(m) {
  m.impl("gcn_norm", TORCH_BOX(&gcn_norm));
  m.impl("gcn_norm_bwd", TORCH_BOX(&gcn_norm_bwd));
}

}  // namespace
}  // namespace acefast

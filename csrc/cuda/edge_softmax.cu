// edge_softmax on CUDA: softmax over the kept edges of each row, per head, and its gradient, see csrc/ops.h.
//
// A few lanes take one segment of a row: each goes over some of its edges for one head and keeps the statistics (maximum and
// sum of exponentials in powers of two; backward: sum of a_e da_e), then the lanes join them and write the row. Pieces of long
// rows leave their statistics, a second kernel joins them in order, and a third launch writes the pieces.
#include "rows.cuh"

namespace acefast {
namespace {

template <typename A, typename I>
struct SoftmaxArgs {
  const int64_t* ptr;  // rowptr [rows + 1]
  const I* eid;        // [slots] or nullptr
  const bool* keep;    // [E] or nullptr
  const A* in;         // [E, heads]: s; backward: a
  const A* grad;       // backward: da [E, heads]
  A* out;              // [E, heads]: a; backward: ds
  A* partial;          // [partials, 2, heads]; the first piece of a row takes the row's statistics
  int64_t rows, slots, heads, head_blocks;
  Pieces pieces;
  int lane_heads;      // heads of a block, a power of two up to 32
  int width;           // lanes of a segment, a multiple of lane_heads
};

// Statistics of one head over some edges.
template <typename A, bool kBackward>
struct Statistics {
  A top = -kInfinity<A>;  // forward only
  A sum = 0;

  __device__ __forceinline__ void add(A v) {
    if constexpr (kBackward) {
      sum += v;
    } else if (v != -kInfinity<A>) {
      const A ratio = exp_2(v > top ? top - v : v - top);
      sum = v > top ? sum * ratio + A(1) : sum + ratio;
      top = max(top, v);
    }
  }
  __device__ __forceinline__ void join(A other_top, A other_sum) {
    if constexpr (kBackward) {
      sum += other_sum;
    } else {
      const A joint = max(top, other_top), reference = exponent_base(joint);
      sum = sum * exp_2(top - reference) + other_sum * exp_2(other_top - reference);
      top = joint;
    }
  }
};

template <typename A, typename I>
__device__ __forceinline__ int64_t softmax_edge(const SoftmaxArgs<A, I>& a, int64_t slot) {
  return a.eid ? static_cast<int64_t>(a.eid[slot]) : slot;
}

// kPieces: only writes the pieces of long rows, whose statistics are joined.
template <typename A, typename I, bool kBackward, bool kPieces>
__global__ void __launch_bounds__(kThreads) edge_softmax_kernel(const SoftmaxArgs<A, I> a) {
  const int in_segment = threadIdx.x % a.width, per_block = kThreads / a.width;
  const int step = a.width / a.lane_heads, first = in_segment / a.lane_heads;
  const int64_t items = (a.pieces.partials() + (kPieces ? 0 : a.rows)) * a.head_blocks;
  // All 32 lanes of a warp make the same turns, so that they can join their statistics.
  for (int64_t base = int64_t{blockIdx.x} * per_block + warp_index() * kWarp / a.width; base < items;
       base += int64_t{gridDim.x} * per_block) {
    const int64_t item = base + lane_index() / a.width;
    const bool active = item < items;
    const Segment seg = active ? segment_of<false>(item / a.head_blocks, a.ptr, a.rows, a.slots, a.pieces) : Segment{0, 0, 0, 0};
    const int64_t head = item % a.head_blocks * a.lane_heads + in_segment % a.lane_heads;
    const int64_t begin = head < a.heads ? seg.begin + first : seg.end;
    Statistics<A, kBackward> total;
    if constexpr (kPieces) {
      if (begin >= seg.end) continue;
      const A* joined = a.partial + first_partial(a.ptr[seg.row], a.pieces) * 2 * a.heads + head;
      total.top = joined[0];
      total.sum = joined[a.heads];
    } else {
      for (int64_t slot = begin; slot < seg.end; slot += step) {
        const int64_t e = softmax_edge(a, slot), at = e * a.heads + head;
        if (a.keep && !a.keep[e]) continue;
        total.add(kBackward ? a.in[at] * a.grad[at] : a.in[at] * A(kLog2e));
      }
      for (int offset = a.lane_heads; offset < a.width; offset *= 2)
        total.join(__shfl_xor_sync(kFullMask, total.top, offset), __shfl_xor_sync(kFullMask, total.sum, offset));
      if (seg.partial >= 0) {
        if (first == 0 && begin < seg.end) {
          a.partial[seg.partial * 2 * a.heads + head] = total.top;
          a.partial[(seg.partial * 2 + 1) * a.heads + head] = total.sum;
        }
        continue;
      }
    }
    const A reference = exponent_base(total.top), scale = total.sum == 0 ? A(0) : A(1) / total.sum;
    for (int64_t slot = begin; slot < seg.end; slot += step) {
      const int64_t e = softmax_edge(a, slot), at = e * a.heads + head;
      if (a.keep && !a.keep[e]) {
        a.out[at] = 0;
      } else if constexpr (kBackward) {
        a.out[at] = a.in[at] * (a.grad[at] - total.sum);
      } else {
        a.out[at] = exp_2(a.in[at] * A(kLog2e) - reference) * scale;
      }
    }
  }
}

// Joins the statistics of every long row's pieces in the order of its slots.
template <typename A, typename I, bool kBackward>
__global__ void __launch_bounds__(kRowThreads) edge_softmax_join_kernel(const SoftmaxArgs<A, I> a) {
  join_long_rows(a.ptr, a.rows, a.heads, a.pieces, [&](int64_t, int64_t head, int64_t first, int64_t second, int64_t last) {
    A* joined = a.partial + first * 2 * a.heads + head;
    Statistics<A, kBackward> total{joined[0], joined[a.heads]};
    for (int64_t p = second; p <= last; p += 2)
      total.join(a.partial[p * 2 * a.heads + head], a.partial[(p * 2 + 1) * a.heads + head]);
    joined[0] = total.top;
    joined[a.heads] = total.sum;
  });
}

template <typename A, typename I, bool kBackward>
void launch_edge_softmax(const GraphArgs& g, const Tensor& in, const A* grad, const OptTensor& keep, const Tensor& out,
                         const DeviceScope& scope) {
  SoftmaxArgs<A, I> a{};
  a.ptr = g.rowptr;
  a.eid = static_cast<const I*>(g.eid);
  a.keep = ptr<bool>(keep);
  a.in = ptr<A>(in);
  a.grad = grad;
  a.out = mutable_ptr<A>(out);
  a.rows = g.n_dst;
  a.slots = g.n_edges;
  a.pieces = pieces_of(a.slots);
  a.heads = in.dim() == 2 ? in.size(1) : 1;
  a.lane_heads = power_of_two(a.heads, kWarp);
  a.head_blocks = ceil_div(a.heads, a.lane_heads);
  a.width = std::min(kWarp, 8 * a.lane_heads);
  const Tensor partial = new_tensor(in, {a.pieces.partials(), 2, a.heads}, in.scalar_type());
  a.partial = mutable_ptr<A>(partial);
  const int per_block = kThreads / a.width;
  ACEFAST_LAUNCH((edge_softmax_kernel<A, I, kBackward, false>), grid_of((a.pieces.partials() + a.rows) * a.head_blocks, per_block),
                 kThreads, 0, scope.stream(), a);
  if (a.pieces.count == 0) return;
  ACEFAST_LAUNCH((edge_softmax_join_kernel<A, I, kBackward>), join_grid(a.rows, a.heads), kRowThreads, 0, scope.stream(), a);
  ACEFAST_LAUNCH((edge_softmax_kernel<A, I, kBackward, true>), grid_of(a.pieces.partials() * a.head_blocks, per_block), kThreads, 0,
                 scope.stream(), a);
}

// The checks and the call that both directions share; `grad` is absent in the forward.
Tensor edge_softmax_of(const char* op, const GraphArgs& g, const Tensor& col, const Tensor& in, const OptTensor& grad,
                       const OptTensor& keep) {
  check(in.dim() == 1 || in.dim() == 2, op, "per-edge values must have one or two dimensions");
  check_tensor(op, "col", col, in, {g.n_edges});
  const OptTensor per_edge = in;
  const int64_t edges = edge_count(op, g, {&per_edge});
  if (in.dim() == 2) {
    check_tensor(op, "values", in, in, {edges, in.size(1)});
    check_optional(op, "gradient", grad, in, in.scalar_type(), {edges, in.size(1)});
  } else {
    check_tensor(op, "values", in, in, {edges});
    check_optional(op, "gradient", grad, in, in.scalar_type(), {edges});
  }
  check_optional(op, "keep", keep, in, ScalarType::Bool, {edges});
  const DeviceScope scope(in);
  const Tensor out = torch::stable::empty_like(in);
  if (edges > g.n_edges) zero(out);
  if (g.n_edges == 0 || in.numel() == 0) return out;
  dispatch_acc(op, in.scalar_type(), [&](auto t) {
    dispatch_index(op, g.index_type, [&](auto i) {
      using A = typename decltype(t)::type;
      using I = typename decltype(i)::type;
      if (grad) {
        launch_edge_softmax<A, I, true>(g, in, ptr<A>(grad), keep, out, scope);
      } else {
        launch_edge_softmax<A, I, false>(g, in, nullptr, keep, out, scope);
      }
    });
  });
  return out;
}

Tensor edge_softmax(Tensor rowptr, Tensor col, OptTensor eid, Tensor colptr, Tensor row, OptTensor ceid, Tensor s,
                    OptTensor keep) {
  const GraphArgs g = graph_args("edge_softmax", rowptr, col, eid, colptr, row, ceid);
  return edge_softmax_of("edge_softmax", g, col, s, std::nullopt, keep);
}

Tensor edge_softmax_bwd(Tensor rowptr, Tensor col, OptTensor eid, Tensor colptr, Tensor row, OptTensor ceid, Tensor a, Tensor da,
                        OptTensor keep) {
  const GraphArgs g = graph_args("edge_softmax_bwd", rowptr, col, eid, colptr, row, ceid);
  return edge_softmax_of("edge_softmax_bwd", g, col, a, da, keep);
}

ACEFAST_REGISTER_CUDA(m) {
  m.impl("edge_softmax", TORCH_BOX(&edge_softmax));
  m.impl("edge_softmax_bwd", TORCH_BOX(&edge_softmax_bwd));
}

}  // namespace
}  // namespace acefast

// sddmm on CUDA: s_e = <p_dst(e), q_src(e)> per head, see csrc/ops.h. A warp takes one segment of a destination's edges.
#include "gather.cuh"

namespace acefast {
namespace {

template <typename T, typename A, typename I>
struct SddmmArgs {
  const int64_t* ptr;  // rowptr [rows + 1]
  const I* col;        // [edges]
  const I* eid;        // [edges] or nullptr
  const T* p;          // [rows, heads, features]
  const T* q;          // [n_src, heads, features]
  A* s;                // [edges, heads], caller's order
  int64_t rows, edges, heads, features;
  Pieces pieces;
  int group;
};

template <typename T, typename A, typename I, int VEC>
__global__ void __launch_bounds__(kRowThreads) sddmm_fwd_kernel(const SddmmArgs<T, A, I> a) {
  constexpr int R = kRepeat<VEC>;
  ACEFAST_SHARED(shared_index, I, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_id, I, [kRowWarps][kWarp]);
  const int lane = lane_index(), warp = warp_index();
  const int group = a.group, groups = kWarp / group, my_group = lane / group, in_group = lane % group;
  const int64_t blocks = (a.features + group * R * VEC - 1) / (group * R * VEC);
  const int64_t items = a.pieces.partials() + a.rows;
  for (int64_t item = int64_t{blockIdx.x} * kRowWarps + warp; item < items; item += int64_t{gridDim.x} * kRowWarps) {
    const Segment seg = segment_of(item, a.ptr, a.rows, a.edges, a.pieces);
    for (int64_t base = seg.begin; base < seg.end; base += kWarp) {
      const int64_t slot = base + lane;
      const int count = static_cast<int>(min(seg.end - base, int64_t{kWarp}));
      if (lane < count) {
        shared_index[warp][lane] = a.col[slot];
        shared_id[warp][lane] = a.eid ? a.eid[slot] : static_cast<I>(slot);
      }
      __syncwarp();
      for (int turn = 0; turn < count; turn += groups * kUnroll) {
        for (int64_t head = 0; head < a.heads; ++head) {
          const T* own = a.p + (seg.row * a.heads + head) * a.features;
          A dot[kUnroll] = {};
          for (int64_t block = 0; block < blocks; ++block) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
              const int64_t c = column_of<VEC>(block, r, in_group, group);
              if (c >= a.features) continue;
              const Pack<T, VEC> left = load_pack<VEC>(own + c);
              Pack<T, VEC> right[kUnroll];
#pragma unroll
              for (int u = 0; u < kUnroll; ++u) {
                const int edge = turn + my_group + u * groups;
                if (edge < count)
                  right[u] = load_pack<VEC>(a.q + (static_cast<int64_t>(shared_index[warp][edge]) * a.heads + head) * a.features + c);
              }
#pragma unroll
              for (int u = 0; u < kUnroll; ++u) {
                if (turn + my_group + u * groups < count) {
#pragma unroll
                  for (int v = 0; v < VEC; ++v) dot[u] += to_acc(left.v[v]) * to_acc(right[u].v[v]);
                }
              }
            }
          }
          sum_edges(dot, group, in_group, [&](int u, A total) {
            const int edge = turn + my_group + u * groups;
            if (edge < count) a.s[static_cast<int64_t>(shared_id[warp][edge]) * a.heads + head] = total;
          });
        }
      }
      __syncwarp();
    }
  }
}

template <typename T, typename I>
void launch_sddmm_fwd(const GraphArgs& g, const Tensor& p, const Tensor& q, int64_t heads, int64_t features, const Tensor& s,
                      const DeviceScope& scope) {
  using A = acc_t<T>;
  SddmmArgs<T, A, I> a{};
  a.ptr = g.rowptr;
  a.col = static_cast<const I*>(g.col);
  a.eid = static_cast<const I*>(g.eid);
  a.p = ptr<T>(p);
  a.q = ptr<T>(q);
  a.s = mutable_ptr<A>(s);
  a.rows = g.n_dst;
  a.edges = g.n_edges;
  a.heads = heads;
  a.features = features;
  a.pieces = pieces_of(a.edges);
  const auto run = [&](auto vec) {
    constexpr int VEC = decltype(vec)::value;
    a.group = group_lanes(features, VEC);
    ACEFAST_LAUNCH((sddmm_fwd_kernel<T, A, I, VEC>), grid_of(a.pieces.partials() + a.rows, kRowWarps), kRowThreads, 0, scope.stream(), a);
  };
  constexpr int kVec = 16 / sizeof(T);
  if (features % kVec == 0 && aligned16(a.p) && aligned16(a.q)) {
    run(std::integral_constant<int, kVec>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

Tensor sddmm(Tensor rowptr, Tensor col, OptTensor eid, Tensor colptr, Tensor row, OptTensor ceid, Tensor p, Tensor q) {
  const GraphArgs g = graph_args("sddmm", rowptr, col, eid, colptr, row, ceid);
  check_tensor("sddmm", "col", col, p, {g.n_edges});
  check_dtype("sddmm", "q", q, p.scalar_type());
  const bool many = p.dim() == 3;
  check(many || p.dim() == 2, "sddmm", "p must have two or three dimensions");
  const int64_t heads = many ? p.size(1) : 1, features = p.size(p.dim() - 1);
  if (many) {
    check_tensor("sddmm", "p", p, p, {g.n_dst, heads, features});
    check_tensor("sddmm", "q", q, p, {g.n_src, heads, features});
  } else {
    check_tensor("sddmm", "p", p, p, {g.n_dst, features});
    check_tensor("sddmm", "q", q, p, {g.n_src, features});
  }
  const DeviceScope scope(p);
  const ScalarType acc = acc_type(p.scalar_type());
  const Tensor s = many ? new_tensor(p, {g.n_edges, heads}, acc) : new_tensor(p, {g.n_edges}, acc);
  if (s.numel() == 0) return s;
  if (features == 0) {
    zero(s);
    return s;
  }
  dispatch_float("sddmm", p.scalar_type(), [&](auto t) {
    dispatch_index("sddmm", g.index_type, [&](auto i) {
      launch_sddmm_fwd<typename decltype(t)::type, typename decltype(i)::type>(g, p, q, heads, features, s, scope);
    });
  });
  return s;
}

ACEFAST_REGISTER_CUDA(m) { m.impl("sddmm", TORCH_BOX(&sddmm)); }

}  // namespace
}  // namespace acefast

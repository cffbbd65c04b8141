// What the forward and the backward of gen share: the arguments that describe a message, and the edge encoder. See
// csrc/ops.h.
#pragma once

#include "gather.cuh"

namespace acefast {

// What a message has of its edge: nothing, features as wide as x, or raw ones through the encoder. Kernels of single columns are
// compiled for the last alone and serve all calls.
enum GenEdge { kNoEdge, kEdge, kEncoded };
enum GenAggr { kAggrSum, kAggrSoftmax, kAggrSoftmaxSg, kAggrPower, kAggrMax };

constexpr double kPowerLow = 1e-7, kPowerHigh = 10;

template <typename A>
__device__ __forceinline__ A power_clamp(A v) {
  return v < A(kPowerLow) ? A(kPowerLow) : v > A(kPowerHigh) ? A(kPowerHigh) : v;
}

// Indices of either width. They are read once per edge and block of columns, so a kernel for each width would buy nothing.
struct Indices {
  const void* data;
  bool wide;
  __device__ __forceinline__ int64_t operator[](int64_t at) const {
    return wide ? static_cast<const int64_t*>(data)[at] : int64_t{static_cast<const int32_t*>(data)[at]};
  }
};

inline Indices indices(const void* data, ScalarType type) { return {data, type == ScalarType::Long}; }

// The graph from one side, and what a message is made of.
template <typename T>
struct GenArgs {
  using A = acc_t<T>;
  const int64_t* ptr;  // [rows + 1]
  Indices idx;         // [slots]
  Indices eid;         // [slots], or no data
  const T* x;          // [n_src, features]
  const T* edge;       // [E, features], or [E, depth] with weight, or nullptr
  const A* weight;     // [features, depth] or nullptr
  const A* bias;       // [features] or nullptr
  const A* mask;       // [E] or nullptr
  const bool* keep;    // [E] or nullptr
  const A* param;      // [features] or nullptr
  const A* row_scale;  // [n_dst] or nullptr
  const int64_t* removed;  // [n_dst] or nullptr
  int64_t rows, slots, features, depth;
  Pieces pieces;
  int64_t column_blocks;
  int group;
  A eps;
  bool encoded;  // with weight, which has no memory where depth is 0
};

// ---- the edge encoder ---------------------------------------------------------------------------------------------------
// Up to kDepth raw features: the block's columns of the weight lie transposed in shared memory, and so do the raw features
// of the edges that a warp is at, both padded with zeros to a multiple of 4. Deeper encoders read both from global memory.

template <typename A>
constexpr int kDepth = sizeof(A) == 8 ? 8 : 16;

template <typename A>
using Quad = Pack<A, 4>;

constexpr int padded_depth(int64_t depth) { return static_cast<int>((depth + 3) / 4 * 4); }

// Quads of shared memory for the weight of a block of columns, and for a warp's raw features.
template <typename A, int VEC, bool ENCODED>
constexpr int kWeightQuads = ENCODED ? kDepth<A> * kWarp * VEC / 4 : 1;
template <typename A, bool ENCODED>
constexpr int kRawQuads = ENCODED ? kDepth<A> * kWarp / 4 : 1;

// The whole block calls; a barrier must follow.
template <typename T>
__device__ __forceinline__ void load_weight(const GenArgs<T>& a, int64_t block, int columns, acc_t<T>* tile) {
  if (a.depth > kDepth<acc_t<T>>) return;
  const int depth = static_cast<int>(a.depth);
  for (int n = threadIdx.x; n < columns * padded_depth(depth); n += kRowThreads) {
    const int d = n / columns;
    const int64_t c = block * columns + n % columns;
    tile[n] = d < depth && c < a.features ? a.weight[c * depth + d] : acc_t<T>(0);
  }
}

// Raw features of the warp's `count` edges; the warp calls, and synchronises afterwards.
template <typename T>
__device__ __forceinline__ void load_raw(const GenArgs<T>& a, const int64_t* id, int count, acc_t<T>* raw) {
  if (a.depth > kDepth<acc_t<T>>) return;
  const int depth = static_cast<int>(a.depth), stride = padded_depth(depth);
  for (int n = lane_index(); n < count * stride; n += kWarp) {
    const int edge = n / stride, d = n % stride;
    raw[n] = d < depth ? to_acc(a.edge[id[edge] * depth + d]) : acc_t<T>(0);
  }
}

// pre[u] += weight raw_u for the lane's columns from c on; edges edge[u] of the warp's list.
template <typename T, int VEC, int U>
__device__ __forceinline__ void encode(const GenArgs<T>& a, int64_t c, int in_group, const acc_t<T>* tile,
                                       const acc_t<T>* raw, const int64_t* id, const int (&edge)[U], acc_t<T> (&pre)[U][VEC]) {
  using A = acc_t<T>;
  if (a.depth <= kDepth<A>) {
    const int columns = a.group * VEC, stride = padded_depth(a.depth);
    for (int d = 0; d < stride; d += 4) {
      Quad<A> f[U];
#pragma unroll
      for (int u = 0; u < U; ++u) f[u] = load_pack<4>(raw + edge[u] * stride + d);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const Pack<A, VEC> w = load_pack<VEC>(tile + (d + n) * columns + in_group * VEC);
#pragma unroll
        for (int u = 0; u < U; ++u) {
#pragma unroll
          for (int v = 0; v < VEC; ++v) pre[u][v] += f[u].v[n] * w.v[v];
        }
      }
    }
    return;
  }
#pragma unroll 1
  for (int64_t d = 0; d < a.depth; ++d) {
    A w[VEC];
#pragma unroll
    for (int v = 0; v < VEC; ++v) w[v] = c < a.features ? a.weight[(c + v) * a.depth + d] : A(0);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const A f = to_acc(a.edge[id[edge[u]] * a.depth + d]);
#pragma unroll
      for (int v = 0; v < VEC; ++v) pre[u][v] += f * w[v];
    }
  }
}

// Calls run(std::integral_constant<int, EDGE>) for a call's edges.
template <typename T, typename Run>
void dispatch_edge(const GenArgs<T>& a, Run&& run) {
  if (a.encoded) {
    run(std::integral_constant<int, kEncoded>{});
  } else if (a.edge) {
    run(std::integral_constant<int, kEdge>{});
  } else {
    run(std::integral_constant<int, kNoEdge>{});
  }
}

// from[c], from[c + 1], ..., or zeros.
template <int VEC, typename A>
__device__ __forceinline__ void load_columns(const A* from, int64_t c, int64_t features, A (&value)[VEC]) {
#pragma unroll
  for (int v = 0; v < VEC; ++v) value[v] = from && c < features ? from[c + v] : A(0);
}

// ---- host ---------------------------------------------------------------------------------------------------------------

// Values of 16 bytes; a lane takes a single double, of which 32 make two whole cache lines.
template <typename T>
constexpr int kGenVec = sizeof(T) == 8 ? 1 : 16 / static_cast<int>(sizeof(T));

// Checks what both directions are given and returns E, the length of the per-edge tensors.
inline int64_t check_gen(const char* op, const GraphArgs& g, const Tensor& col, const Tensor& x, const OptTensor& edge,
                         const OptTensor& weight, const OptTensor& bias, const OptTensor& mask, const OptTensor& keep,
                         const OptTensor& param, const OptTensor& row_scale, const OptTensor& removed, int64_t aggr) {
  const ScalarType acc = acc_type(x.scalar_type());
  check(x.dim() == 2, op, "x must have two dimensions");
  const int64_t features = x.size(1);
  check_tensor(op, "col", col, x, {g.n_edges});
  check_tensor(op, "x", x, x, {g.n_src, features});
  const int64_t edges = edge_count(op, g, {&edge, &mask, &keep});
  check(!weight || edge, op, "weight needs edge");
  check(!bias || weight, op, "bias needs weight");
  if (weight) {
    check(edge->dim() == 2, op, "edge must have two dimensions");
    check_optional(op, "weight", weight, x, acc, {features, edge->size(1)});
    check_optional(op, "edge", edge, x, x.scalar_type(), {edges, edge->size(1)});
  } else {
    check_optional(op, "edge", edge, x, x.scalar_type(), {edges, features});
  }
  check_optional(op, "bias", bias, x, acc, {features});
  check_optional(op, "mask", mask, x, acc, {edges});
  check_optional(op, "keep", keep, x, ScalarType::Bool, {edges});
  check_optional(op, "param", param, x, acc, {features});
  check_optional(op, "row_scale", row_scale, x, acc, {g.n_dst});
  check_optional(op, "removed", removed, x, ScalarType::Long, {g.n_dst});
  check(aggr >= kAggrSum && aggr <= kAggrMax, op, "aggr must lie in [0, 4]");
  check(param || aggr == kAggrSum || aggr == kAggrMax, op, "this aggregation needs param");
  return edges;
}

template <typename T>
GenArgs<T> gen_args(const Tensor& x, const OptTensor& edge, const OptTensor& weight, const OptTensor& bias,
                    const OptTensor& mask, const OptTensor& keep, const OptTensor& param, const OptTensor& row_scale,
                    const OptTensor& removed, double eps) {
  using A = acc_t<T>;
  GenArgs<T> a{};
  a.x = ptr<T>(x);
  a.edge = ptr<T>(edge);
  a.weight = ptr<A>(weight);
  a.bias = ptr<A>(bias);
  a.mask = ptr<A>(mask);
  a.keep = ptr<bool>(keep);
  a.param = ptr<A>(param);
  a.row_scale = ptr<A>(row_scale);
  a.removed = ptr<int64_t>(removed);
  a.features = x.size(1);
  a.depth = weight ? edge->size(1) : 0;
  a.encoded = weight.has_value();
  a.eps = static_cast<A>(eps);
  return a;
}

}  // namespace acefast

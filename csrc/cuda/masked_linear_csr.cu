// masked_linear on CUDA for sparse x [N, K] in CSR: the masked weight is formed transposed, [K, O], once; then y is the gather
// of its rows along x, and dw that of dy's rows along the transpose of x. See csrc/ops.h and gather.cuh.
#include "gather.cuh"

namespace acefast {
namespace {

constexpr int kTile = 32;
constexpr int kTileRows = kThreads / kTile;  // rows of a tile that the block moves at once

// out [columns, rows] = transpose of in [rows, columns]. mask and keep_in have in's layout, keep_out has out's; an entry that
// is not kept becomes 0.
template <typename TIn, typename TOut, typename A>
__global__ void __launch_bounds__(kThreads)
    masked_linear_csr_transpose_kernel(const TIn* in, TOut* out, const A* mask, const bool* keep_in, const bool* keep_out,
                                       int64_t rows, int64_t columns) {
  ACEFAST_SHARED(tile, A, [kTile][kTile + 1]);
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const int64_t across = (columns + kTile - 1) / kTile, tiles = (rows + kTile - 1) / kTile * across;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int64_t row0 = t / across * kTile, column0 = t % across * kTile;
    for (int i = y; i < kTile; i += kTileRows) {
      const int64_t r = row0 + i, c = column0 + x;
      if (r >= rows || c >= columns) continue;
      const int64_t at = r * columns + c;
      A v = static_cast<A>(in[at]);
      if (mask) v *= mask[at];
      tile[i][x] = keep_in && !keep_in[at] ? A(0) : v;
    }
    __syncthreads();
    for (int i = y; i < kTile; i += kTileRows) {
      const int64_t r = column0 + i, c = row0 + x;
      if (r >= columns || c >= rows) continue;
      const int64_t at = r * rows + c;
      out[at] = static_cast<TOut>(keep_out && !keep_out[at] ? A(0) : tile[x][i]);
    }
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    masked_linear_csr_bias_kernel(T* y, const acc_t<T>* bias, int64_t outputs, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads)
    y[i] = static_cast<T>(to_acc(y[i]) + bias[i % outputs]);
}

template <typename TIn, typename TOut, typename A>
void launch_masked_linear_csr_transpose(const TIn* in, TOut* out, const A* mask, const bool* keep_in, const bool* keep_out,
                                        int64_t rows, int64_t columns, const DeviceScope& scope) {
  if (rows == 0 || columns == 0) return;
  ACEFAST_LAUNCH((masked_linear_csr_transpose_kernel<TIn, TOut, A>), grid_of(ceil_div(rows, kTile) * ceil_div(columns, kTile), 1),
                 kThreads, 0, scope.stream(), in, out, mask, keep_in, keep_out, rows, columns);
}

// One direction of the sparse x: offsets, indices and values, the values in the accumulator's dtype.
struct Sparse {
  const int64_t* offsets;
  const void* index;
  Tensor value;
  int64_t rows, entries;
};

Sparse sparse(const Tensor& offsets, const Tensor& index, const Tensor& value) {
  const ScalarType acc = acc_type(value.scalar_type());
  return {ptr<int64_t>(offsets), ptr<void>(index), value.scalar_type() == acc ? value : torch::stable::to(value, acc),
          offsets.size(0) - 1, index.size(0)};
}

template <typename TIn, typename TOut, typename A, typename I>
void launch_sparse_product(const Sparse& x, const TIn* in, TOut* out, int64_t features, const Tensor& like, const DeviceScope& scope) {
  GatherArgs<TIn, TOut, A, I> a{};
  a.ptr = x.offsets;
  a.idx = static_cast<const I*>(x.index);
  a.in = in;
  a.out = out;
  a.weight = ptr<A>(x.value);
  a.rows = x.rows;
  a.slots = x.entries;
  a.features = features;
  launch_gather(a, like, scope);
}

void check_csr(const char* op, const Tensor& rowptr, const Tensor& col, const Tensor& value, const Tensor& colptr, const Tensor& row,
               const Tensor& cvalue, const Tensor& weight, const OptTensor& mask, const OptTensor& keep) {
  graph_args(op, rowptr, col, std::nullopt, colptr, row, std::nullopt);
  check(weight.dim() == 2, op, "weight must have two dimensions");
  check_tensor(op, "weight", weight, col, {weight.size(0), colptr.size(0) - 1});
  check_tensor(op, "value", value, col, {col.size(0)});
  check_tensor(op, "cvalue", cvalue, col, {col.size(0)});
  check_dtype(op, "value", value, weight.scalar_type());
  check_dtype(op, "cvalue", cvalue, weight.scalar_type());
  check_optional(op, "mask", mask, col, acc_type(weight.scalar_type()), {weight.size(0), weight.size(1)});
  check_optional(op, "keep", keep, col, ScalarType::Bool, {weight.size(0), weight.size(1)});
}

Tensor masked_linear_csr(Tensor rowptr, Tensor col, Tensor value, Tensor colptr, Tensor row, Tensor cvalue, Tensor weight,
                         OptTensor mask, OptTensor bias, OptTensor keep, bool) {
  check_csr("masked_linear_csr", rowptr, col, value, colptr, row, cvalue, weight, mask, keep);
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const ScalarType dtype = weight.scalar_type(), acc = acc_type(dtype);
  check_optional("masked_linear_csr", "bias", bias, col, acc, {outputs});
  const DeviceScope scope(weight);
  const Tensor y = new_tensor(weight, {rowptr.size(0) - 1, outputs}, dtype), product = new_tensor(weight, {inputs, outputs}, acc);
  if (y.numel() == 0) return y;
  const Sparse x = sparse(rowptr, col, value);
  dispatch_float("masked_linear_csr", dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    launch_masked_linear_csr_transpose<T, A, A>(ptr<T>(weight), mutable_ptr<A>(product), ptr<A>(mask), ptr<bool>(keep), nullptr, outputs,
                                                inputs, scope);
    dispatch_index("masked_linear_csr", col.scalar_type(), [&](auto i) {
      using I = typename decltype(i)::type;
      launch_sparse_product<A, T, A, I>(x, ptr<A>(product), mutable_ptr<T>(y), outputs, weight, scope);
    });
    if (bias)
      ACEFAST_LAUNCH((masked_linear_csr_bias_kernel<T>), grid_of(y.numel(), kThreads), kThreads, 0, scope.stream(), mutable_ptr<T>(y),
                     ptr<A>(bias), outputs, y.numel());
  });
  return y;
}

Tensor masked_linear_csr_bwd(Tensor rowptr, Tensor col, Tensor value, Tensor colptr, Tensor row, Tensor cvalue, Tensor dy,
                             Tensor weight, OptTensor mask, OptTensor keep, bool all_weights) {
  check_csr("masked_linear_csr_bwd", rowptr, col, value, colptr, row, cvalue, weight, mask, keep);
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const ScalarType dtype = weight.scalar_type(), acc = acc_type(dtype);
  check_tensor("masked_linear_csr_bwd", "dy", dy, col, {rowptr.size(0) - 1, outputs});
  check_dtype("masked_linear_csr_bwd", "dy", dy, dtype);
  const DeviceScope scope(weight);
  const Tensor dw = new_tensor(weight, {outputs, inputs}, dtype), gathered = new_tensor(weight, {inputs, outputs}, acc);
  if (dw.numel() == 0) return dw;
  const Sparse x = sparse(colptr, row, cvalue);
  dispatch_float("masked_linear_csr_bwd", dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    dispatch_index("masked_linear_csr_bwd", col.scalar_type(), [&](auto i) {
      using I = typename decltype(i)::type;
      launch_sparse_product<T, A, A, I>(x, ptr<T>(dy), mutable_ptr<A>(gathered), outputs, weight, scope);
    });
    launch_masked_linear_csr_transpose<A, T, A>(ptr<A>(gathered), mutable_ptr<T>(dw), nullptr, nullptr,
                                                all_weights ? nullptr : ptr<bool>(keep), inputs, outputs, scope);
  });
  return dw;
}

ACEFAST_REGISTER_CUDA(m) {
  m.impl("masked_linear_csr", TORCH_BOX(&masked_linear_csr));
  m.impl("masked_linear_csr_bwd", TORCH_BOX(&masked_linear_csr_bwd));
}

}  // namespace
}  // namespace acefast

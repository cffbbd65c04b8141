// relu_dropout and elu_dropout on CUDA: activation and dropout in one pass with counter-based noise, see csrc/ops.h.
#include "common.cuh"
#include "common/philox.h"

namespace acefast {
namespace {

// Four elements share one Philox block; a thread takes as many whole blocks as fill 16 bytes.
template <typename T>
constexpr int kElements = sizeof(T) == 2 ? 8 : 4;

// What acts before the dropout. `value`: of a kept element, times scale; `gradient`: dy times the derivative of that, from
// the output y, which is 0 where the element was dropped.
struct Relu {
  static constexpr const char* kOp = "relu_dropout";
  template <typename A>
  static __device__ __forceinline__ A value(A x, A scale) {
    return x > 0 ? x * scale : A(0);
  }
  template <typename A>
  static __device__ __forceinline__ A gradient(A dy, A y, A scale) {
    return y > 0 ? dy * scale : A(0);
  }
};

// A kept zero is written as -0, which tells it from a dropped element.
struct Elu {
  static constexpr const char* kOp = "elu_dropout";
  template <typename A>
  static __device__ __forceinline__ A value(A x, A scale) {
    return x > 0 ? x * scale : copysign(expm1(x) * scale, A(-1));
  }
  template <typename A>
  static __device__ __forceinline__ A gradient(A dy, A y, A scale) {
    return y > 0 ? dy * scale : y == 0 && copysign(A(1), y) > 0 ? A(0) : dy * (y + scale);
  }
};

// threshold = floor(p * 2^32) needs 33 bits: at p = 1 no word reaches it.
template <typename Activation, typename T>
__device__ __forceinline__ T dropped(T x, unsigned word, uint64_t threshold, acc_t<T> scale) {
  return static_cast<T>(word >= threshold ? Activation::value(to_acc(x), scale) : acc_t<T>(0));
}

template <typename Activation, typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    dropout_fwd_kernel(const T* x, T* y, int64_t count, uint64_t threshold, acc_t<T> scale, uint64_t seed, Step step) {
  constexpr int N = kElements<T>;
  const int64_t stride = int64_t{gridDim.x} * kThreads * N;
  const uint64_t now = step.read();
  for (int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N; first < count; first += stride) {
    const Pack<T, N> in = load_part<N>(x + first, count - first, kVector);
    Pack<T, N> out;
#pragma unroll
    for (int quad = 0; quad < N / 4; ++quad) {
      const Philox4 words = philox4x32_10(seed, now, static_cast<uint64_t>(first / 4 + quad));
#pragma unroll
      for (int i = 0; i < 4; ++i) out.v[quad * 4 + i] = dropped<Activation>(in.v[quad * 4 + i], words.w[i], threshold, scale);
    }
    store_part(y + first, out, count - first, kVector);
  }
}

// Element c of row r has the number rows[r] * width + c. A thread takes the elements of a row that share a Philox block; a row
// touches at most `blocks` of them. kVector: all of them are whole, and aligned for a Pack.
template <typename Activation, typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    dropout_rows_kernel(const T* x, const int64_t* rows, T* y, int64_t items, int64_t width, int64_t blocks,
                        uint64_t threshold, acc_t<T> scale, uint64_t seed, Step step) {
  const uint64_t now = step.read();
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < items; item += int64_t{gridDim.x} * kThreads) {
    const int64_t r = item / blocks;
    const uint64_t number = static_cast<uint64_t>(rows[r]) * static_cast<uint64_t>(width);
    const uint64_t block = number / 4 + static_cast<uint64_t>(item % blocks);
    const auto c = static_cast<int64_t>(4 * block - number);  // column of the block's first word, -3 or more
    if (c >= width) continue;
    const T* in = x + (r * width + c);
    T* out = y + (r * width + c);
    const Philox4 words = philox4x32_10(seed, now, block);
    if (kVector) {
      Pack<T, 4> pack = load_pack<4>(in);
#pragma unroll
      for (int i = 0; i < 4; ++i) pack.v[i] = dropped<Activation>(pack.v[i], words.w[i], threshold, scale);
      store_pack(out, pack);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (c + i >= 0 && c + i < width) out[i] = dropped<Activation>(in[i], words.w[i], threshold, scale);
    }
  }
}

template <typename Activation, typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    dropout_bwd_kernel(const T* dy, const T* y, T* dx, int64_t count, acc_t<T> scale) {
  constexpr int N = kElements<T>;
  const int64_t stride = int64_t{gridDim.x} * kThreads * N;
  for (int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N; first < count; first += stride) {
    if (kVector && first + N <= count) {
      const Pack<T, N> grad = load_pack<N>(dy + first), kept = load_pack<N>(y + first);
      Pack<T, N> out;
#pragma unroll
      for (int i = 0; i < N; ++i) out.v[i] = static_cast<T>(Activation::gradient(to_acc(grad.v[i]), to_acc(kept.v[i]), scale));
      store_pack(dx + first, out);
    } else {
      for (int64_t i = first; i < first + N && i < count; ++i)
        dx[i] = static_cast<T>(Activation::gradient(to_acc(dy[i]), to_acc(y[i]), scale));
    }
  }
}

template <typename Activation, typename T>
void launch_fwd(const Tensor& x, const OptTensor& rows, const Tensor& y, double p, uint64_t seed, Step step,
                const DeviceScope& scope) {
  const T* in = ptr<T>(x);
  T* out = mutable_ptr<T>(y);
  const auto scale = static_cast<acc_t<T>>(p < 1 ? 1.0 / (1.0 - p) : 0.0);
  const auto threshold = static_cast<uint64_t>(p * 4294967296.0);
  if (rows) {
    const int64_t width = x.numel() / x.size(0);
    const int64_t blocks = width % 4 == 0 ? width / 4 : (width + 6) / 4, items = x.size(0) * blocks;
    const auto addresses = reinterpret_cast<uintptr_t>(in) | reinterpret_cast<uintptr_t>(out);
    dispatch_bool(width % 4 == 0 && addresses % alignof(Pack<T, 4>) == 0, [&](auto vector) {
      ACEFAST_LAUNCH((dropout_rows_kernel<Activation, T, decltype(vector)::value>), grid_of(items, kThreads), kThreads, 0,
                     scope.stream(), in, ptr<int64_t>(*rows), out, items, width, blocks, threshold, scale, seed, step);
    });
    return;
  }
  const auto grid = grid_of(x.numel(), int64_t{kThreads} * kElements<T>);
  dispatch_bool(aligned16(in) && aligned16(out), [&](auto vector) {
    ACEFAST_LAUNCH((dropout_fwd_kernel<Activation, T, decltype(vector)::value>), grid, kThreads, 0, scope.stream(), in, out,
                   x.numel(), threshold, scale, seed, step);
  });
}

template <typename Activation, typename T>
void launch_bwd(const Tensor& dy, const Tensor& y, const Tensor& dx, double p, const DeviceScope& scope) {
  const T* grad = ptr<T>(dy);
  const T* out = ptr<T>(y);
  T* result = mutable_ptr<T>(dx);
  const auto scale = static_cast<acc_t<T>>(p < 1 ? 1.0 / (1.0 - p) : 0.0);
  const auto grid = grid_of(dy.numel(), int64_t{kThreads} * kElements<T>);
  dispatch_bool(aligned16(grad) && aligned16(out) && aligned16(result), [&](auto vector) {
    ACEFAST_LAUNCH((dropout_bwd_kernel<Activation, T, decltype(vector)::value>), grid, kThreads, 0, scope.stream(), grad, out,
                   result, dy.numel(), scale);
  });
}

template <typename Activation>
Tensor activation_dropout(Tensor x, OptTensor rows, double p, int64_t seed, int64_t step, OptTensor step_at) {
  check(x.is_contiguous(), Activation::kOp, "x is not contiguous");
  check(p >= 0 && p <= 1, Activation::kOp, "p must lie in [0, 1]");
  check(!rows || x.dim() >= 1, Activation::kOp, "x must have rows");
  check_optional(Activation::kOp, "rows", rows, x, ScalarType::Long, {x.dim() ? x.size(0) : 1});
  check_optional(Activation::kOp, "step_at", step_at, x, ScalarType::Long, {1});
  const DeviceScope scope(x);
  const Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  dispatch_float(Activation::kOp, x.scalar_type(), [&](auto t) {
    launch_fwd<Activation, typename decltype(t)::type>(x, rows, y, p, static_cast<uint64_t>(seed),
                                                       {static_cast<uint64_t>(step), ptr<int64_t>(step_at)}, scope);
  });
  return y;
}

template <typename Activation>
Tensor activation_dropout_bwd(Tensor dy, Tensor y, double p) {
  check(p >= 0 && p <= 1, Activation::kOp, "p must lie in [0, 1]");
  check(dy.is_contiguous() && y.is_contiguous(), Activation::kOp, "dy and y must be contiguous");
  check(dy.numel() == y.numel() && dy.get_device_index() == y.get_device_index(), Activation::kOp, "dy and y must match");
  check_dtype(Activation::kOp, "y", y, dy.scalar_type());
  const DeviceScope scope(dy);
  const Tensor dx = torch::stable::empty_like(dy);
  if (dy.numel() == 0) return dx;
  dispatch_float(Activation::kOp, dy.scalar_type(), [&](auto t) {
    launch_bwd<Activation, typename decltype(t)::type>(dy, y, dx, p, scope);
  });
  return dx;
}

ACEFAST_REGISTER_CUDA(m) {
  m.impl("relu_dropout", TORCH_BOX(&activation_dropout<Relu>));
  m.impl("relu_dropout_bwd", TORCH_BOX(&activation_dropout_bwd<Relu>));
  m.impl("elu_dropout", TORCH_BOX(&activation_dropout<Elu>));
  m.impl("elu_dropout_bwd", TORCH_BOX(&activation_dropout_bwd<Elu>));
}

}  // namespace
}  // namespace acefast

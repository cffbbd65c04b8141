// relu_dropout on the CPU: see csrc/ops.h.
#include "cpu/parallel.h"
#include "common/philox.h"
#include "common/tensor.h"

namespace acefast {
namespace {

constexpr int64_t kPiece = 1 << 14;  // elements per task, a multiple of every block length used here
constexpr int kLanes = 32;           // Philox blocks in flight: 128 elements

// Words of kLanes consecutive blocks, element-major: words[4 * lane + w].
inline void philox_lanes(uint64_t seed, uint64_t step, uint64_t block, uint32_t* __restrict words) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    c0[l] = uint32_t(block + l);
    c1[l] = uint32_t((block + l) >> 32);
    c2[l] = uint32_t(step);
    c3[l] = uint32_t(step >> 32);
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * c0[l], p1 = uint64_t(0xCD9E8D57u) * c2[l];
      const uint32_t n0 = uint32_t(p1 >> 32) ^ c1[l] ^ k0, n2 = uint32_t(p0 >> 32) ^ c3[l] ^ k1;
      c1[l] = uint32_t(p1);
      c3[l] = uint32_t(p0);
      c0[l] = n0;
      c2[l] = n2;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    words[4 * l] = c0[l];
    words[4 * l + 1] = c1[l];
    words[4 * l + 2] = c2[l];
    words[4 * l + 3] = c3[l];
  }
}

template <class T>
void forward(const T* x, T* y, int64_t n, double p, uint64_t seed, uint64_t step) {
  using A = acc_t<T>;
  const A scale = p < 1 ? A(1.0 / (1.0 - p)) : A(0);
  const uint32_t threshold = p < 1 ? drop_threshold(p) : 0;
  const A zero = 0;
  parallel_range(n, kPiece, [&](int64_t begin, int64_t end) {
    if (p >= 1) {
      std::fill(y + begin, y + end, T(0.f));
      return;
    }
    uint32_t words[4 * kLanes] = {};
    for (int64_t i = begin; i < end; i += 4 * kLanes) {
      if (threshold) philox_lanes(seed, step, uint64_t(i) / 4, words);
      const int64_t m = std::min<int64_t>(4 * kLanes, end - i);
#pragma omp simd
      for (int64_t k = 0; k < m; ++k) {
        const A v = A(x[i + k]);
        y[i + k] = T((v > zero) & (words[k] >= threshold) ? v * scale : zero);
      }
    }
  });
}

template <class T>
void backward(const T* dy, const T* y, T* dx, int64_t n, double p) {
  using A = acc_t<T>;
  const A scale = p < 1 ? A(1.0 / (1.0 - p)) : A(0);
  parallel_range(n, kPiece, [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) dx[i] = T(A(y[i]) > A(0) ? A(dy[i]) * scale : A(0));
  });
}

Tensor relu_dropout(const Tensor& x, double p, int64_t seed, int64_t step) {
  const char* op = "relu_dropout";
  check(x.is_contiguous(), op, "x is not contiguous");
  check(p >= 0 && p <= 1, op, "p must lie in [0, 1]");
  Tensor y = torch::stable::empty_like(x);
  dispatch_float(op, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    forward(ptr<T>(x), mutable_ptr<T>(y), x.numel(), p, uint64_t(seed), uint64_t(step));
  });
  return y;
}

Tensor relu_dropout_bwd(const Tensor& dy, const Tensor& y, double p) {
  const char* op = "relu_dropout_bwd";
  check(dy.is_contiguous() && y.is_contiguous(), op, "dy and y must be contiguous");
  check(dy.numel() == y.numel() && dy.scalar_type() == y.scalar_type(), op, "dy must have y's shape and dtype");
  check(p >= 0 && p <= 1, op, "p must lie in [0, 1]");
  Tensor dx = torch::stable::empty_like(dy);
  dispatch_float(op, y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    backward(ptr<T>(dy), ptr<T>(y), mutable_ptr<T>(dx), y.numel(), p);
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("relu_dropout", TORCH_BOX(&relu_dropout));
  m.impl("relu_dropout_bwd", TORCH_BOX(&relu_dropout_bwd));
}

}  // namespace acefast

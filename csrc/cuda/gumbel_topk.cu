// gumbel_topk on CUDA: selection by scores with Gumbel noise, see csrc/ops.h. The noise is the reference's to the bit: Philox
// words and one fixed polynomial for the logarithm, its products and sums rounded one by one.
#include "common/philox.h"
#include "list.cuh"
#include "selection.cuh"

namespace acefast {
namespace {

// log(2^exponent (1 + t)) for t in [-0.293, 0.4143] (the coefficients of Cephes' logf).
__device__ __forceinline__ float log1p_fixed(float t, float exponent) {
  constexpr float coefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                                    -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  const float z = __fmul_rn(t, t);
  float y = 7.0376836292e-2f;
#pragma unroll
  for (const float coefficient : coefficients) y = __fadd_rn(__fmul_rn(y, t), coefficient);
  y = __fmul_rn(__fmul_rn(y, t), z);
  y = __fadd_rn(y, __fmul_rn(exponent, -2.12194440e-4f));
  y = __fadd_rn(y, __fmul_rn(z, -0.5f));
  return __fadd_rn(__fadd_rn(t, y), __fmul_rn(exponent, 0.693359375f));
}

// log(x) of positive normal x.
__device__ __forceinline__ float log_fixed(float x) {
  const unsigned bits = __float_as_uint(x);
  const float fraction = __uint_as_float((bits & 0x007fffffu) | 0x3f000000u);  // in [1/2, 1)
  const bool low = fraction < 0.70710678f;
  const int exponent = static_cast<int>(bits >> 23 & 0xffu) - 126 - low;
  return log1p_fixed(__fadd_rn(low ? fraction + fraction : fraction, -1.0f), static_cast<float>(exponent));
}

// -log(-log u), u = (word + 1/2) / 2^32; above sqrt(1/2) by log1p of the exact complement.
__device__ __forceinline__ float gumbel_noise(unsigned word) {
  constexpr float scale = 1.0f / 4294967296.0f;
  const bool upper = word >= 0xb504f334u;
  const float share = __fmul_rn(__fadd_rn(static_cast<float>(upper ? ~word : word), 0.5f), scale);
  return -log_fixed(-(upper ? log1p_fixed(-share, 0.0f) : log_fixed(share)));
}

// The noise comes in blocks of four words, cut where the concatenation has them: the tensor's elements are numbered from the
// start of the block `block` that holds the first one, so that the first one has the number `skip`.
template <typename T>
struct Perturbed {
  const T* score;
  float* key;
  uint64_t block;
  int skip;
  int64_t count;  // skip + number of elements
  bool vector;
};

// key = score * factor + noise of the score or, unless largest, of its negative; without noise where not `noisy`.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gumbel_keys_kernel(const __grid_constant__ Batch<Perturbed<T>> batch, bool noisy, float factor, bool largest, uint64_t seed,
                       uint64_t stream) {
  each_element<4>(batch, [&](const Perturbed<T>& part, int64_t n) {
    Pack<T, 4> score{};
    Pack<float, 4> key;
    const int from = n == 0 ? part.skip : 0, to = static_cast<int>(min(part.count - n, int64_t{4}));
    const bool whole = part.vector && to == 4;
    const T* in = part.score + n - part.skip;
    float* out = part.key + n - part.skip;
    if (whole) {
      score = load_pack<4>(in);
    } else {
#pragma unroll
      for (int v = 0; v < 4; ++v)
        if (v >= from && v < to) score.v[v] = in[v];
    }
    Philox4 words{};
    if (noisy) words = philox4x32_10(seed, stream, part.block + static_cast<uint64_t>(n) / 4);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float wide = static_cast<float>(score.v[v]), value = largest ? wide : -wide;
      key.v[v] = noisy ? __fadd_rn(__fmul_rn(value, factor), gumbel_noise(words.w[v])) : value;
    }
    if (whole) {
      store_pack(out, key);
    } else {
#pragma unroll
      for (int v = 0; v < 4; ++v)
        if (v >= from && v < to) out[v] = key.v[v];
    }
  });
}

std::tuple<Tensors, Tensor> gumbel_topk(Tensors scores, int64_t k, double tau, int64_t seed, std::optional<Tensors> alive,
                                        bool largest) {
  check_selection("gumbel_topk", scores, alive);
  const DeviceScope scope(scores[0]);
  const Tensors keys = gumbel_keys(scores, tau, seed, 0, largest, scope), keep = new_masks(scores);
  const Tensor status = new_status(scores[0]);
  select(keys, k, alive, true, true, false, keep, mutable_ptr<int>(status), scope);
  return {keep, status};
}

ACEFAST_REGISTER_CUDA(m) { m.impl("gumbel_topk", TORCH_BOX(&gumbel_topk)); }

}  // namespace

Tensors gumbel_keys(const Tensors& scores, double tau, int64_t seed, int64_t stream, bool largest, const DeviceScope& scope) {
  Tensors keys;
  for (const Tensor& t : scores) keys.push_back(torch::stable::new_empty(t, t.sizes(), ScalarType::Float));
  const float factor = tau > 0 ? static_cast<float>(1.0 / tau) : 1.0f;
  dispatch_float("gumbel_topk", scores[0].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    uint64_t first = 0;  // number of the tensor's first element in the concatenation
    const auto batches = make_batches(scores.size(), [&](size_t i) {
      const T* score = ptr<T>(scores[i]);
      const int skip = static_cast<int>(first % 4);
      const int64_t count = scores[i].numel();
      const bool vector = skip == 0 && reinterpret_cast<uintptr_t>(score) % alignof(Pack<T, 4>) == 0;
      const Perturbed<T> part{score, mutable_ptr<float>(keys[i]), first / 4, skip, count > 0 ? skip + count : 0, vector};
      first += static_cast<uint64_t>(count);
      return part;
    });
    for (const auto& b : batches)
      ACEFAST_LAUNCH((gumbel_keys_kernel<T>), tile_grid(b, scope), kThreads, 0, scope.stream(), b, tau > 0, factor, largest,
                     static_cast<uint64_t>(seed), static_cast<uint64_t>(stream));
  });
  return keys;
}

}  // namespace acefast

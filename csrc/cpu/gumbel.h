// Scores perturbed by Gumbel noise: the keys of gumbel_topk and exchange. The noise is the reference's to the bit: Philox
// words and one fixed polynomial for the logarithm in separate float32 multiplies and adds, so files that include this are
// compiled without contraction (setup.py).
#pragma once

#include <vector>

#include "cpu/parallel.h"
#include "cpu/random.h"

namespace acefast {

typedef int32_t VecI32 __attribute__((vector_size(kVecBytes)));

inline Vec<float> choose(VecI32 condition, Vec<float> yes, Vec<float> no) {
  return bits<Vec<float>>((bits<VecI32>(yes) & condition) | (bits<VecI32>(no) & ~condition));
}

// log(2^exponent (1 + t)) for t in [-0.293, 0.4143] (the coefficients of Cephes' logf).
inline Vec<float> log1p_fixed(Vec<float> t, Vec<float> exponent) {
  constexpr float coefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                                    -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  const Vec<float> z = t * t;
  Vec<float> y = splat(7.0376836292e-2f);
  for (const float coefficient : coefficients) {
    y = y * t;
    y = y + coefficient;
  }
  y = (y * t) * z;
  y = y + exponent * -2.12194440e-4f;
  y = y - z * 0.5f;
  return (t + y) + exponent * 0.693359375f;
}

// log(x) of positive normal x.
inline Vec<float> log_fixed(Vec<float> x) {
  const VecU32 u = bits<VecU32>(x);
  const Vec<float> fraction = bits<Vec<float>>((u & 0x007FFFFFu) | 0x3F000000u);  // in [1/2, 1)
  const VecI32 low = fraction < 0.70710678f;                                      // -1 where true
  const VecI32 exponent = bits<VecI32>((u >> 23) & 0xFFu) - 126 + low;
  return log1p_fixed(choose(low, fraction + fraction, fraction) - 1.0f, __builtin_convertvector(exponent, Vec<float>));
}

// -log(-log u), u = (word + 1/2) / 2^32; above sqrt(1/2) by log1p of the exact complement.
inline Vec<float> gumbel_noise(VecU32 word) {
  constexpr float scale = 0x1p-32f;
  const VecI32 upper = word >= 0xB504F334u;
  const Vec<float> below_one = (__builtin_convertvector(~word, Vec<float>) + 0.5f) * scale;
  const Vec<float> u = (__builtin_convertvector(word, Vec<float>) + 0.5f) * scale;
  const Vec<float> log_u = choose(upper, log1p_fixed(-below_one, Vec<float>{}), log_fixed(choose(upper, splat(0.5f), u)));
  return -log_fixed(-log_u);
}

// keys = +-score * float32(1 / tau) + noise (+-score for tau = 0), float32, of the concatenation of the scores; the noise of
// element n is word n % 4 of Philox block n / 4 in stream `stream`.
template <class T>
void perturb(const std::vector<Tensor>& scores, const std::vector<Tensor>& keys, double tau, uint64_t seed, uint64_t stream,
             bool largest) {
  constexpr int64_t words = 4 * kPhiloxBlocks;
  const float factor = tau > 0 ? float(1.0 / tau) : 1.0f;
  int64_t first = 0;
  for (size_t t = 0; t < scores.size(); ++t) {
    const T* score = ptr<T>(scores[t]);
    float* key = mutable_ptr<float>(keys[t]);
    const int64_t end = first + scores[t].numel();
    const int64_t start = first / words * words;  // blocks of words are cut where the concatenation has them
    parallel_range(end - start, 64 * words, [&](int64_t begin, int64_t stop) {
      uint32_t word[words];
      float noise[words];
      for (int64_t n0 = start + begin; n0 < start + stop; n0 += words) {
        if (tau > 0) {
          philox_words(seed, stream, [&](int b) { return uint64_t(n0) / 4 + b; }, word);
          for (int64_t i = 0; i < words; i += kLanesOf<float>) {
            VecU32 w;
            std::memcpy(&w, word + i, sizeof w);
            store(noise + i, gumbel_noise(w));
          }
        }
        const int64_t low = std::max(n0, first), high = std::min(n0 + words, end);
        for (int64_t n = low; n < high; ++n) {
          const float wide = float(score[n - first]), signed_score = largest ? wide : -wide;
          key[n - first] = tau > 0 ? signed_score * factor + noise[n - n0] : signed_score;
        }
      }
    });
    first = end;
  }
}

// The keys as new float32 tensors of the scores' shapes.
inline std::vector<Tensor> gumbel_keys(const char* op, const std::vector<Tensor>& scores, double tau, int64_t seed,
                                       int64_t stream, bool largest) {
  std::vector<Tensor> keys;
  for (const Tensor& t : scores) keys.push_back(torch::stable::new_empty(t, t.sizes(), ScalarType::Float));
  dispatch_float(op, scores[0].scalar_type(), [&](auto type) {
    perturb<typename decltype(type)::type>(scores, keys, tau, uint64_t(seed), uint64_t(stream), largest);
  });
  return keys;
}

}  // namespace acefast

// Vectors of the accumulator type, as wide as the instruction set this file is compiled for, with loads and stores that
// convert from and to the storage type. Everything has internal linkage: each instruction set has a library of its own.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/tensor.h"

namespace acefast {

#if defined(__AVX512F__)
inline constexpr int kVecBytes = 64;
inline constexpr int kMaxVecs = 8;  // vectors of accumulators that a gather kernel keeps in registers
#elif defined(__AVX2__)
inline constexpr int kVecBytes = 32;
inline constexpr int kMaxVecs = 8;
#else
inline constexpr int kVecBytes = 16;
inline constexpr int kMaxVecs = 4;
#endif

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVecBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
inline constexpr int kLanesOf = kVecBytes / int(sizeof(A));

template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- full loads and stores ----

inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec<float> v) {
  std::memcpy(p, &v, sizeof v);
}
inline void store(double* p, Vec<double> v) {
  std::memcpy(p, &v, sizeof v);
}

typedef uint32_t VecU32 __attribute__((vector_size(kVecBytes)));
typedef uint16_t HalfVecU16 __attribute__((vector_size(kVecBytes / 2)));

inline Vec<float> load(const BFloat16* p) {
  HalfVecU16 h;
  std::memcpy(&h, p, sizeof h);
  return bits<Vec<float>>(__builtin_convertvector(h, VecU32) << 16);
}
// Round to nearest even; a NaN stays a quiet NaN.
inline void store(BFloat16* p, Vec<float> v) {
  const VecU32 u = bits<VecU32>(v);
  const VecU32 rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const VecU32 nan = bits<VecU32>(v != v);
  const HalfVecU16 h = __builtin_convertvector((rounded & ~nan) | (((u >> 16) | 0x40u) & nan), HalfVecU16);
  std::memcpy(static_cast<void*>(p), &h, sizeof h);
}

inline Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  return bits<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return bits<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> v;
  for (int l = 0; l < kLanesOf<float>; ++l) v[l] = float(p[l]);
  return v;
#endif
}
inline void store(Half* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int l = 0; l < kLanesOf<float>; ++l) p[l] = Half(v[l]);
#endif
}

// ---- the first n < lanes elements: other lanes load as 0 and are not stored ----

template <class T>
inline Vec<acc_t<T>> load_tail(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return bits<Vec<float>>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
  if constexpr (std::is_same_v<T, double>) return bits<Vec<double>>(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return bits<Vec<float>>(_mm256_maskload_ps(p, mask));
  }
#endif
  T full[kLanesOf<acc_t<T>>];
  std::memset(static_cast<void*>(full), 0, sizeof full);
  for (int l = 0; l < n; ++l) full[l] = p[l];
  return load(full);
}
template <class T>
inline void store_tail(T* p, Vec<acc_t<T>> v, int n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), bits<__m512>(v));
  if constexpr (std::is_same_v<T, double>) return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), bits<__m512d>(v));
#endif
  T full[kLanesOf<acc_t<T>>];
  store(full, v);
  for (int l = 0; l < n; ++l) p[l] = full[l];
}

// ---- arithmetic ----

template <class A>
inline Vec<A> splat(A a) {
  return Vec<A>{} + a;
}

template <class A>
inline A hsum(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>)
    return _mm512_reduce_add_ps(bits<__m512>(v));
  else
    return _mm512_reduce_add_pd(bits<__m512d>(v));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>) {
    const __m256 w = bits<__m256>(v);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  } else {
    const __m256d w = bits<__m256d>(v);
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(w), _mm256_extractf128_pd(w, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
#else
  A s = v[0];
  for (int l = 1; l < kLanesOf<A>; ++l) s += v[l];
  return s;
#endif
}

}  // namespace acefast

// exp and log on vectors of the accumulator type. Over all finite arguments whose result is a normal number the error
// is at most 1.5 ulp (float and double; tests/native/test_gen.py measures it), on every instruction set.
#pragma once

#include <limits>

#include "cpu/vec.h"

namespace acefast {

template <class A>
struct IntVecOf {
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> type __attribute__((vector_size(kVecBytes)));
};
template <class A>
using IntVec = typename IntVecOf<A>::type;  // lanes of the same width, and what comparisons of Vec<A> give

// The larger and the smaller per lane; b where either is NaN.
template <class A>
inline Vec<A> vmax(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return bits<Vec<A>>(_mm512_max_ps(bits<__m512>(a), bits<__m512>(b)));
  if constexpr (std::is_same_v<A, double>) return bits<Vec<A>>(_mm512_max_pd(bits<__m512d>(a), bits<__m512d>(b)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>) return bits<Vec<A>>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b)));
  if constexpr (std::is_same_v<A, double>) return bits<Vec<A>>(_mm256_max_pd(bits<__m256d>(a), bits<__m256d>(b)));
#endif
  return a > b ? a : b;
}
template <class A>
inline Vec<A> vmin(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return bits<Vec<A>>(_mm512_min_ps(bits<__m512>(a), bits<__m512>(b)));
  if constexpr (std::is_same_v<A, double>) return bits<Vec<A>>(_mm512_min_pd(bits<__m512d>(a), bits<__m512d>(b)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>) return bits<Vec<A>>(_mm256_min_ps(bits<__m256>(a), bits<__m256>(b)));
  if constexpr (std::is_same_v<A, double>) return bits<Vec<A>>(_mm256_min_pd(bits<__m256d>(a), bits<__m256d>(b)));
#endif
  return a < b ? a : b;
}

template <class A>
struct Consts;
template <>
struct Consts<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kExpLow = -104.f, kExpHigh = 89.f;  // beyond them the result is 0 or inf
  static constexpr float kRound = 0x1.8p23f;                 // n + kRound - kRound rounds n to an integer
  static constexpr float kLn2Hi = 0x1.62e3p-1f, kLn2Lo = 0x1.2fefa2p-17f;
  // (exp(r) - 1 - r) / r^2 on |r| <= ln2 / 2, highest power first
  static constexpr float kExp[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                   4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  // (log((1 + s) / (1 - s)) - 2 s) / s in powers of s^2, |s| <= 0.1716, highest power first
  static constexpr float kLog[] = {0.24279078841f, 0.28498786688f, 0.40000972152f, 0.66666662693f};
};
template <>
struct Consts<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kExpLow = -746., kExpHigh = 710.;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kExp[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800,
                                    1. / 362880,     1. / 40320,     1. / 5040,     1. / 720,
                                    1. / 120,        1. / 24,        1. / 6,        1. / 2};
  static constexpr double kLog[] = {1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01,
                                    2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                                    6.666666666666735130e-01};
};

template <class V, class A, int N>
inline V horner(V x, const A (&coefficients)[N]) {
  V p = V{} + coefficients[0];
  for (int i = 1; i < N; ++i) p = p * x + coefficients[i];
  return p;
}

// 0 for -inf and where the result underflows (subnormal results are kept), inf where it overflows, NaN for NaN.
template <class A>
inline Vec<A> vexp(Vec<A> x) {
  using C = Consts<A>;
  using V = Vec<A>;
  x = vmin<A>(splat(C::kExpHigh), vmax<A>(splat(C::kExpLow), x));  // of a NaN and a number, the second
  const V shifted = x * A(1.442695040888963407) + C::kRound;
  const V n = shifted - C::kRound;
  V r = x - n * C::kLn2Hi;
  r = r - n * C::kLn2Lo;
  const V p = (horner(r, C::kExp) * r) * r + r + A(1);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>)
    return bits<V>(_mm512_scalef_ps(bits<__m512>(p), bits<__m512>(n)));
  else
    return bits<V>(_mm512_scalef_pd(bits<__m512d>(p), bits<__m512d>(n)));
#else
  // 2^n as the product of two powers, each a normal number
  const IntVec<A> k = bits<IntVec<A>>(shifted) - bits<IntVec<A>>(splat(C::kRound)), half = k >> 1;
  return p * bits<V>((half + C::kBias) << C::kMantissa) * bits<V>((k - half + C::kBias) << C::kMantissa);
#endif
}

// exp(x) - 1 for x <= 0, without its loss of digits near 0; -1 from -64 down, NaN for NaN.
template <class A>
inline Vec<A> vexpm1_negative(Vec<A> x) {
  using C = Consts<A>;
  using V = Vec<A>;
  x = vmax<A>(splat(A(-64)), x);
  const V shifted = x * A(1.442695040888963407) + C::kRound;
  const V n = shifted - C::kRound;
  V r = x - n * C::kLn2Hi;
  r = r - n * C::kLn2Lo;
  const IntVec<A> k = bits<IntVec<A>>(shifted) - bits<IntVec<A>>(splat(C::kRound));
  const V power = bits<V>((k + C::kBias) << C::kMantissa);
  return ((horner(r, C::kExp) * r) * r + r) * power + (power - A(1));
}

// -inf for 0, inf for inf, NaN below 0. Subnormal arguments count as they are.
template <class A>
inline Vec<A> vlog(Vec<A> x) {
  using C = Consts<A>;
  using V = Vec<A>;
  using I = IntVec<A>;
  const auto tiny = x < std::numeric_limits<A>::min();
  const V scaled = tiny ? x * A(int64_t(1) << 54) : x;
  // x = m * 2^k with m in [sqrt(1/2), sqrt(2))
  const I offset = bits<I>(splat(A(0.70710678118654752440)));
  const I above = bits<I>(scaled) - offset;
  const V k = __builtin_convertvector((above >> C::kMantissa) - (tiny ? I{} + 54 : I{}), V);
  const V m = bits<V>((above & (((I{} + 1) << C::kMantissa) - 1)) + offset);
  const V f = m - A(1), s = f / (A(2) + f), z = s * s, half = f * f * A(0.5);
  const V tail = s * (half + z * horner(z, C::kLog)) + k * C::kLn2Lo;
  V y = k * C::kLn2Hi - ((half - tail) - f);
  y = x == std::numeric_limits<A>::infinity() ? x : y;
  y = x == A(0) ? splat(-std::numeric_limits<A>::infinity()) : y;
  return x < A(0) ? splat(std::numeric_limits<A>::quiet_NaN()) : y;
}

}  // namespace acefast

// Philox words (common/philox.h) on vectors: a lane per block.
#pragma once

#include "common/philox.h"
#include "cpu/vec.h"

namespace acefast {

inline constexpr int kPhiloxLanes = kVecBytes / 4;                // blocks per vector
inline constexpr int kPhiloxGroups = 4;                           // vectors in flight
inline constexpr int kPhiloxBlocks = kPhiloxLanes * kPhiloxGroups;  // blocks made at once

typedef uint64_t VecU64 __attribute__((vector_size(kVecBytes)));

// The 64-bit products of m and the even 32-bit lanes of a.
inline VecU64 even_product(uint32_t m, VecU64 a) {
#if defined(__AVX512F__)
  return bits<VecU64>(_mm512_mul_epu32(bits<__m512i>(a), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
  return bits<VecU64>(_mm256_mul_epu32(bits<__m256i>(a), _mm256_set1_epi64x(m)));
#else
  return (a & 0xFFFFFFFFull) * uint64_t(m);
#endif
}

// The high and the low halves of the products of m and each 32-bit lane.
inline void wide_product(uint32_t m, VecU32 a, VecU32& high, VecU32& low) {
  const VecU64 low_half = VecU64{} + 0xFFFFFFFFull;
  const VecU64 even = even_product(m, bits<VecU64>(a)), odd = even_product(m, bits<VecU64>(a) >> 32);
  high = bits<VecU32>((even >> 32) | (odd & ~low_half));
  low = bits<VecU32>((even & low_half) | (odd << 32));
}

// words[4 * b + w] = word w of the block counted block(b), for b < kPhiloxBlocks.
template <class Block>
inline void philox_words(uint64_t seed, uint64_t step, const Block& block, uint32_t* __restrict words) {
  VecU32 c0[kPhiloxGroups], c1[kPhiloxGroups], c2[kPhiloxGroups], c3[kPhiloxGroups];
  for (int g = 0; g < kPhiloxGroups; ++g) {
    for (int l = 0; l < kPhiloxLanes; ++l) {
      const uint64_t counter = block(g * kPhiloxLanes + l);
      c0[g][l] = uint32_t(counter);
      c1[g][l] = uint32_t(counter >> 32);
    }
    c2[g] = VecU32{} + uint32_t(step);
    c3[g] = VecU32{} + uint32_t(step >> 32);
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int g = 0; g < kPhiloxGroups; ++g) {
      VecU32 hi0, lo0, hi1, lo1;
      wide_product(0xD2511F53u, c0[g], hi0, lo0);
      wide_product(0xCD9E8D57u, c2[g], hi1, lo1);
      c0[g] = hi1 ^ c1[g] ^ k0;
      c1[g] = lo1;
      c2[g] = hi0 ^ c3[g] ^ k1;
      c3[g] = lo0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int g = 0; g < kPhiloxGroups; ++g) {
    uint32_t word[4][kPhiloxLanes];
    std::memcpy(word[0], &c0[g], sizeof word[0]);
    std::memcpy(word[1], &c1[g], sizeof word[0]);
    std::memcpy(word[2], &c2[g], sizeof word[0]);
    std::memcpy(word[3], &c3[g], sizeof word[0]);
    for (int l = 0; l < kPhiloxLanes; ++l)
      for (int w = 0; w < 4; ++w) words[4 * (g * kPhiloxLanes + l) + w] = word[w][l];
  }
}

}  // namespace acefast

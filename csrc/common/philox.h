// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): counter-based
// random words, the same on host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ACEFAST_HD __host__ __device__ __forceinline__
#else
#define ACEFAST_HD inline
#endif

namespace acefast {

struct Philox4 {
  uint32_t w[4];
};

// One block of four words: counter = (block, step), key = seed, each split into its low and high 32 bits.
ACEFAST_HD Philox4 philox4x32_10(uint64_t seed, uint64_t step, uint64_t block) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = uint32_t(step), c3 = uint32_t(step >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t hi0 = uint32_t(p0 >> 32), lo0 = uint32_t(p0), hi1 = uint32_t(p1 >> 32), lo1 = uint32_t(p1);
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// The step of a counter: `value`, or where `at` is given what lies there when the kernel runs.
struct Step {
  uint64_t value;
  const int64_t* at;

  ACEFAST_HD uint64_t read() const { return at ? static_cast<uint64_t>(*at) : value; }
};

// The word of element n: word n % 4 of block n / 4.
ACEFAST_HD uint32_t philox_word(uint64_t seed, uint64_t step, uint64_t n) {
  return philox4x32_10(seed, step, n / 4).w[n % 4];
}

// Element n is dropped with probability p iff its word is below floor(p * 2^32); p = 1 is handled by the caller.
ACEFAST_HD uint32_t drop_threshold(double p) {
  return uint32_t(uint64_t(p * 4294967296.0));
}

}  // namespace acefast

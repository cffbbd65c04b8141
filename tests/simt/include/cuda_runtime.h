// The part of the CUDA language and runtime that acefast's kernels use, on the emulator of simt.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

#define ACEFAST_SHARED(name, type, ...)                                                       \
  static_assert(sizeof(type __VA_ARGS__) <= 48 * 1024, "static shared memory is limited to 48 KB"); \
  auto& name = *static_cast<type(*) __VA_ARGS__>(                                             \
      simt::shared_memory({__FILE__, __LINE__, #name}, sizeof(type __VA_ARGS__)))
#define ACEFAST_DYNAMIC_SHARED(name, type) type* name = static_cast<type*>(simt::dynamic_shared_memory())
#define ACEFAST_LAUNCH(kernel, grid, block, shared, stream, ...) \
  simt::launch(#kernel, grid, block, shared, [=] { (kernel)(__VA_ARGS__); })

using dim3 = simt::Dim3;
using cudaStream_t = void*;
#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_dim())
#define gridDim (simt::grid_dim())
constexpr int warpSize = 32;
using std::max;
using std::min;

#define SIMT_SITE(what) (simt::Site{__FILE__, __LINE__, what})
#define __syncthreads() simt::sync_block(SIMT_SITE("__syncthreads"))
#define SIMT_SYNCWARP_MASK(mask, ...) mask
#define __syncwarp(...) simt::sync_warp(SIMT_SITE("__syncwarp"), SIMT_SYNCWARP_MASK(__VA_ARGS__ __VA_OPT__(, ) 0xffffffffu))
#define SIMT_WIDTH(a, b, c, width, ...) width
#define SIMT_SHUFFLE(what, source, mask, value, lane, ...) \
  simt::shuffle_value(SIMT_SITE(what), mask, value, simt::source(lane, SIMT_WIDTH(0, 0, 0 __VA_OPT__(, ) __VA_ARGS__, 32)))
#define __shfl_sync(...) SIMT_SHUFFLE("__shfl_sync", shuffle_index, __VA_ARGS__)
#define __shfl_up_sync(...) SIMT_SHUFFLE("__shfl_up_sync", shuffle_up, __VA_ARGS__)
#define __shfl_down_sync(...) SIMT_SHUFFLE("__shfl_down_sync", shuffle_down, __VA_ARGS__)
#define __shfl_xor_sync(...) SIMT_SHUFFLE("__shfl_xor_sync", shuffle_xor, __VA_ARGS__)
#define __ballot_sync(mask, predicate) simt::ballot(SIMT_SITE("__ballot_sync"), mask, (predicate) != 0)
#define __any_sync(mask, predicate) (simt::ballot(SIMT_SITE("__any_sync"), mask, (predicate) != 0) != 0)
#define __all_sync(mask, predicate) (simt::ballot(SIMT_SITE("__all_sync"), mask, (predicate) != 0) == (mask))

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

// Fibers run one at a time and are not preempted, so plain code is atomic.
template <typename T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  static_assert(std::is_integral_v<T>, "float atomics are not deterministic");
  T old = *p;
  *p = old + v;
  return old;
}
template <typename T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  T old = *p;
  *p = std::min(old, v);
  return old;
}
template <typename T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  T old = *p;
  *p = std::max(old, v);
  return old;
}
template <typename T>
T atomicOr(T* p, std::type_identity_t<T> v) {
  T old = *p;
  *p = old | v;
  return old;
}
template <typename T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  T old = *p;
  *p = v;
  return old;
}
template <typename T>
T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> v) {
  T old = *p;
  if (old == compare) *p = v;
  return old;
}

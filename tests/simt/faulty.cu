// Kernels with one fault each, and right ones beside them: what the emulator must catch and what it must accept.
// usage: faulty CASE SEED; prints the result of the kernel.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

constexpr int kThreads = 64;

// Thread i publishes i and reads its neighbour's value; right only with the barrier between.
template <bool kBarrier>
__global__ void neighbour_kernel(float* out) {
  ACEFAST_SHARED(values, float, [kThreads]);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

// Two rounds through the same shared memory; right only with the barrier after the reads.
template <bool kBarrier>
__global__ void reuse_kernel(float* out) {
  ACEFAST_SHARED(values, float, [kThreads]);
  float sum = 0;
  for (int round = 0; round < 4; ++round) {
    values[threadIdx.x] = static_cast<float>(round);
    __syncthreads();
    sum += values[(threadIdx.x + 32) % kThreads];
    if (kBarrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// Every block adds its part to out[0] with plain loads and stores of what it read before; order of blocks matters.
__global__ void block_order_kernel(float* out) {
  if (threadIdx.x == 0) out[0] = out[0] * 3.0f + static_cast<float>(blockIdx.x);
}

__global__ void shared_overrun_kernel(float* out, int index) {
  ACEFAST_SHARED(values, float, [kThreads]);
  float* p = values;
  p[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = p[threadIdx.x + index];
}

__global__ void dynamic_overrun_kernel(float* out, int index) {
  ACEFAST_DYNAMIC_SHARED(values, float);
  values[threadIdx.x + index] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void global_overrun_kernel(float* out, int count) { out[threadIdx.x % count + 1] = 1.0f; }

__global__ void unaligned_kernel(float* out) {
  struct alignas(16) Four {
    float v[4];
  };
  *reinterpret_cast<Four*>(out + 1 + threadIdx.x % 2) = Four{};
}

__global__ void divergent_barrier_kernel(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void two_barriers_kernel(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}

__global__ void divergent_shuffle_kernel(float* out) {
  float v = static_cast<float>(threadIdx.x);
  if (threadIdx.x % 2) v = __shfl_xor_sync(0xffffffffu, v, 1);
  out[threadIdx.x] = v;
}

__global__ void mixed_masks_kernel(float* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0xffffffffu : 0xffff0000u;
  out[threadIdx.x] = __shfl_sync(mask, 1.0f, 16);
}

__global__ void outside_mask_kernel(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 20);
}

// Sum of a warp through shuffles, ballots and half-warp masks, and of a block through shared memory and atomics.
__global__ void reductions_kernel(float* out) {
  ACEFAST_SHARED(total, int, [1]);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  int v = threadIdx.x;
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xffffffffu, v, offset);
  if (lane == 0) atomicAdd(&total[0], v);
  const unsigned odd = __ballot_sync(0xffffffffu, threadIdx.x % 2);
  int half = 0;
  if (lane < 16) {
    half = __shfl_sync(0x0000ffffu, lane, 3);
    __syncwarp(0x0000ffffu);
  } else {
    half = __shfl_xor_sync(0xffff0000u, lane, 1, 16);
  }
  int scanned = 1;
  for (int offset = 1; offset < 8; offset *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, scanned, offset, 8);
    if (lane % 8 >= offset) scanned += below;
  }
  __syncthreads();
  const bool ok = total[0] == kThreads * (kThreads - 1) / 2 && odd == 0xaaaaaaaau && half == (lane < 16 ? 3 : lane ^ 1) &&
                  scanned == lane % 8 + 1 && __all_sync(0xffffffffu, true) && !__any_sync(0xffffffffu, lane > 31);
  out[threadIdx.x] = ok ? 1.0f : 0.0f;
}

int main(int argc, char** argv) {
  if (argc != 3) return 64;
  const std::string name = argv[1];
  simt::set_seed(std::strtoull(argv[2], nullptr, 10));
  std::vector<float> out(kThreads, 0.0f);
  out.shrink_to_fit();
  float* p = out.data();
  const simt::Dim3 one(1);
  try {
    if (name == "barrier") ACEFAST_LAUNCH((neighbour_kernel<true>), one, kThreads, 0, nullptr, p);
    if (name == "missing_barrier") ACEFAST_LAUNCH((neighbour_kernel<false>), one, kThreads, 0, nullptr, p);
    if (name == "reuse") ACEFAST_LAUNCH((reuse_kernel<true>), one, kThreads, 0, nullptr, p);
    if (name == "reuse_without_barrier") ACEFAST_LAUNCH((reuse_kernel<false>), one, kThreads, 0, nullptr, p);
    if (name == "block_order") ACEFAST_LAUNCH((block_order_kernel), simt::Dim3(8), kThreads, 0, nullptr, p);
    if (name == "shared_inside") ACEFAST_LAUNCH((shared_overrun_kernel), one, kThreads, 0, nullptr, p, 0);
    if (name == "shared_overrun") ACEFAST_LAUNCH((shared_overrun_kernel), one, kThreads, 0, nullptr, p, 1);
    if (name == "dynamic_inside") ACEFAST_LAUNCH((dynamic_overrun_kernel), one, kThreads, kThreads * 4, nullptr, p, 0);
    if (name == "dynamic_overrun") ACEFAST_LAUNCH((dynamic_overrun_kernel), one, kThreads, kThreads * 4, nullptr, p, 1);
    if (name == "global_overrun") ACEFAST_LAUNCH((global_overrun_kernel), one, kThreads, 0, nullptr, p, kThreads);
    if (name == "unaligned") ACEFAST_LAUNCH((unaligned_kernel), one, kThreads, 0, nullptr, p);
    if (name == "divergent_barrier") ACEFAST_LAUNCH((divergent_barrier_kernel), one, kThreads, 0, nullptr, p);
    if (name == "two_barriers") ACEFAST_LAUNCH((two_barriers_kernel), one, kThreads, 0, nullptr, p);
    if (name == "divergent_shuffle") ACEFAST_LAUNCH((divergent_shuffle_kernel), one, kThreads, 0, nullptr, p);
    if (name == "mixed_masks") ACEFAST_LAUNCH((mixed_masks_kernel), one, kThreads, 0, nullptr, p);
    if (name == "outside_mask") ACEFAST_LAUNCH((outside_mask_kernel), one, kThreads, 0, nullptr, p);
    if (name == "reductions") ACEFAST_LAUNCH((reductions_kernel), one, kThreads, 0, nullptr, p);
    if (name == "large_block") ACEFAST_LAUNCH((reductions_kernel), one, 2048, 0, nullptr, p);
    if (name == "empty_grid") ACEFAST_LAUNCH((reductions_kernel), simt::Dim3(0), kThreads, 0, nullptr, p);
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  for (float v : out) std::printf("%g ", v);
  std::printf("\n");
  return 0;
}

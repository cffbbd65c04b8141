// What the CUDA ops share: the launch macro, the current stream, vector loads, warp reductions and the split of rows into
// segments. Kernels are written for 32-lane warps and compile for the host as well, under the SIMT emulator of
// tests/simt, which defines ACEFAST_SIMT and its own ACEFAST_LAUNCH, ACEFAST_SHARED and ACEFAST_DYNAMIC_SHARED.
#pragma once

#include <cuda_runtime.h>

#include "common/tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>

#ifndef ACEFAST_LAUNCH
// Launches on the given stream and throws if the launch was refused.
#define ACEFAST_LAUNCH(kernel, grid, block, shared, stream, ...)            \
  do {                                                                      \
    const auto acefast_kernel = kernel;                                     \
    acefast_kernel<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__);   \
    ::acefast::check_cuda(cudaGetLastError(), #kernel);                     \
  } while (0)
// Shared memory: type name dims, for instance ACEFAST_SHARED(tile, float, [32][33]).
#define ACEFAST_SHARED(name, type, ...) __shared__ type name __VA_ARGS__
#endif

#ifndef ACEFAST_LIBRARY
#define ACEFAST_LIBRARY acefast_native
#define ACEFAST_KEY CUDA
#endif
#define ACEFAST_REGISTER_EXPANDED(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
#define ACEFAST_REGISTER_CUDA(m) ACEFAST_REGISTER_EXPANDED(ACEFAST_LIBRARY, ACEFAST_KEY, m)

namespace acefast {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = kWarp * kWarpsPerBlock;
// Blocks of kernels whose warps take rows: few warps, since a block's slots stay taken until its longest row is done.
constexpr int kRowWarps = 2;
constexpr int kRowThreads = kWarp * kRowWarps;

// ---- host ---------------------------------------------------------------------------------------------------------------

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef ACEFAST_SIMT
constexpr int64_t kMostBlocks = 3;  // so that the tests see every grid folded
// The emulator's tensors live on the CPU: no device to set, no stream.
struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  int multiprocessors() const { return 2; }
};
#else
constexpr int64_t kMostBlocks = 0x7fffffff;

inline void check_cuda(cudaError_t error, const char* what) {
  if (__builtin_expect(error != cudaSuccess, 0))
    throw std::runtime_error(std::string("acefast: CUDA error in ") + what + ": " + cudaGetErrorString(error));
}

// Makes the tensor's device current while it lives; stream() is torch's current stream there.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(index_, &stream) != 0)
      throw std::runtime_error("acefast: torch gave no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_), "cudaDeviceGetAttribute");
    return count;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};
#endif

// One-dimensional grid for `items` work items; the kernels' stride loops fold what exceeds the largest grid.
inline dim3 grid_of(int64_t items, int64_t per_block) {
  return dim3(static_cast<unsigned>(std::clamp<int64_t>(ceil_div(items, per_block), 1, kMostBlocks)));
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline void zero(Tensor t) {
  if (t.numel() > 0) torch::stable::zero_(t);
}

// ---- device -------------------------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ acc_t<T> to_acc(T v) {
  return static_cast<acc_t<T>>(v);
}

// N consecutive values moved with the widest aligned accesses (16 bytes where N values fill them).
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <int N, typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& pack) {
#ifndef ACEFAST_SIMT
  if constexpr (sizeof(pack) % 16 == 0) {  // else the compiler makes single stores of it
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i)
      reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&pack)[i];
    return;
  }
#endif
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}
template <int N, typename T>
__device__ __forceinline__ void store_values(T* p, const T* values) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = values[i];
  store_pack(p, pack);
}

// The same for up to N values of which `left` exist; by single values unless `vector` says that p is aligned for a Pack.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_part(const T* p, int64_t left, bool vector) {
  if (vector && left >= N) return load_pack<N>(p);
  Pack<T, N> pack{};
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < left) pack.v[i] = p[i];
  return pack;
}
template <int N, typename T>
__device__ __forceinline__ void store_part(T* p, const Pack<T, N>& pack, int64_t left, bool vector) {
  if (vector && left >= N) return store_pack(p, pack);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < left) p[i] = pack.v[i];
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

#ifdef ACEFAST_SIMT
__device__ __forceinline__ float exp_2(float v) { return exp2f(v); }
__device__ __forceinline__ float log_2(float v) { return log2f(v); }
__device__ __forceinline__ float quotient(float a, float b) { return a / b; }
__device__ __forceinline__ float relu(float v) { return v < 0 ? 0.0f : v; }
#else
// To 2 units in the last place (the logarithm: to 2^-22 near 1); what lies below 2^-126 counts as 0.
__device__ __forceinline__ float exp_2(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
__device__ __forceinline__ float log_2(float v) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
// A NaN stays one.
__device__ __forceinline__ float relu(float v) {
  float result;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(v));
  return result;
}
#endif
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }
__device__ __forceinline__ double relu(double v) { return v < 0 ? 0.0 : v; }
// Not inlined: unrolled copies of the double functions are most of the compiler's time.
__attribute__((noinline)) __device__ inline double exp_2(double v) { return exp2(v); }
__attribute__((noinline)) __device__ inline double log_2(double v) { return log2(v); }

// ---- warps ----------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / kWarp; }
__device__ __forceinline__ unsigned lanes_below(int lane) { return (1u << lane) - 1u; }

// The sum over aligned groups of `width` lanes (a power of two), in every lane, by a fixed tree. All 32 lanes call.
template <typename A>
__device__ __forceinline__ A group_sum(A v, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullMask, v, offset);
  return v;
}

// ---- rows in segments ---------------------------------------------------------------------------------------------------
// A compressed row of at most a piece's slots is one segment. The slots of a longer row are cut where a grid of pieces over the
// whole array cuts them; each piece is summed by itself into partial [pieces.partials(), F], and a second kernel adds a row's
// pieces in order. The split follows from the number of slots alone.

struct Pieces {
  int64_t count;  // 0 where no row can be long
  int shift;      // a piece has 1 << shift slots
  __host__ __device__ int64_t partials() const { return 2 * count; }
  __device__ int64_t size() const { return int64_t{1} << shift; }
};

// As many as fill a GPU, and so long that the partial sums stay few: 32 to 512 slots.
inline Pieces pieces_of(int64_t edges) {
  int shift = 5;
  while (shift < 9 && edges >> shift > 32768) ++shift;
  return {edges >> shift > 0 ? ceil_div(edges, int64_t{1} << shift) : 0, shift};
}

struct Segment {
  int64_t row;
  int64_t begin, end;
  int64_t partial;  // row of the partial sums, or -1: the segment is a whole row
};

// The last row that starts at or before slot; the row that holds it. By one lane, and by all 32 of a warp for the same slot.
__device__ __forceinline__ int64_t row_of_slot(const int64_t* ptr, int64_t rows, int64_t slot) {
  int64_t low = 0, high = rows;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (ptr[middle] <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}
__device__ __forceinline__ int64_t row_of_slot_by_warp(const int64_t* ptr, int64_t rows, int64_t slot) {
  int64_t low = 0, high = rows;  // ptr[low] <= slot < ptr[high]
  while (high - low > 1) {
    const int64_t step = (high - low + kWarp - 1) / kWarp, probe = low + (lane_index() + 1) * step;
    const unsigned before = __ballot_sync(kFullMask, probe < high && ptr[min(probe, rows)] <= slot);
    low += __popc(before) * step;
    high = min(low + step, high);
  }
  return low;
}

// Segment of work item `item` in [0, partials + rows): first the pieces of long rows (a piece of the grid touches at most
// two of them: the row of its first slot and the row of its last), then the rows. Empty (end = begin) where there is
// nothing to do; a long row's own item comes back empty with partial = 0 so that the caller can tell. WARP: all 32 lanes
// call for the same item.
template <bool WARP = true>
__device__ __forceinline__ Segment segment_of(int64_t item, const int64_t* ptr, int64_t rows, int64_t edges, Pieces pieces) {
  if (item >= pieces.partials()) {
    const int64_t row = item - pieces.partials(), begin = ptr[row], end = ptr[row + 1];
    if (pieces.count > 0 && end - begin > pieces.size()) return {row, begin, begin, 0};
    return {row, begin, end, -1};
  }
  const int64_t first = item / 2 << pieces.shift, last = min(first + pieces.size(), edges);
  const bool tail = item % 2 != 0;
  const int64_t slot = tail ? last - 1 : first;
  const int64_t row = WARP ? row_of_slot_by_warp(ptr, rows, slot) : row_of_slot(ptr, rows, slot);
  const int64_t begin = ptr[row], end = ptr[row + 1];
  if (end - begin <= pieces.size() || (tail && begin <= first)) return {row, first, first, item};
  return {row, max(begin, first), min(end, last), item};
}

// Rows of the partial sums of a long row's pieces: first_partial, then every second one up to last_partial.
__device__ __forceinline__ int64_t first_partial(int64_t begin, Pieces pieces) {
  return 2 * (begin >> pieces.shift) + ((begin & (pieces.size() - 1)) != 0);
}
__device__ __forceinline__ int64_t last_partial(int64_t end, Pieces pieces) { return 2 * ((end - 1) >> pieces.shift); }

}  // namespace acefast

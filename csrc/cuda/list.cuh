// Lists of tensors in one launch: each tensor is cut into tiles, the tiles are numbered over the whole list, and the blocks
// of a launch share them. A batch holds as many tensors as a kernel's parameters hold.
#pragma once

#include "common.cuh"

#include <vector>

namespace acefast {

constexpr int kTile = 4096;  // elements of one tile; a tile never crosses tensors
constexpr int kBlocksPerProcessor = 8;

// Part: what a kernel needs of one tensor, its number of elements `count` among it. Tensor i's first tile is first_tile[i].
// A kernel's parameters are limited to 4 KB.
template <typename Part>
constexpr int kBatch = (3840 - 16) / (sizeof(Part) + sizeof(int64_t));

template <typename Part>
struct Batch {
  Part part[kBatch<Part>];
  int64_t first_tile[kBatch<Part> + 1];
  int parts;
  int64_t tiles() const { return first_tile[parts] - first_tile[0]; }
};

// The list cut into batches, by make(i), the Part of tensor i of n; empty ones have no tile.
template <typename Make>
auto make_batches(size_t n, const Make& make) {
  using Part = decltype(make(size_t{0}));
  std::vector<Batch<Part>> batches;
  int64_t tile = 0;
  for (size_t i = 0; i < n; ++i) {
    const Part part = make(i);
    if (part.count == 0) continue;
    if (batches.empty() || batches.back().parts == kBatch<Part>) {
      batches.emplace_back();
      batches.back().first_tile[0] = tile;
    }
    Batch<Part>& b = batches.back();
    b.part[b.parts++] = part;
    tile += ceil_div(part.count, kTile);
    b.first_tile[b.parts] = tile;
  }
  return batches;
}

template <typename Part>
dim3 tile_grid(const Batch<Part>& b, const DeviceScope& scope) {
  return grid_of(std::min(b.tiles(), int64_t{kBlocksPerProcessor} * scope.multiprocessors()), 1);
}

// The tensor that holds the tile.
template <typename Part>
__device__ __forceinline__ int part_of(const Batch<Part>& b, int64_t tile) {
  int low = 0, high = b.parts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (b.first_tile[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls f(part, i) for every kStep-th element i of this block's tiles, i below the part's count; the threads divide them.
template <int kStep, typename Part, typename F>
__device__ __forceinline__ void each_element(const Batch<Part>& b, const F& f) {
  for (int64_t t = b.first_tile[0] + blockIdx.x; t < b.first_tile[b.parts]; t += gridDim.x) {
    const int n = part_of(b, t);
    const Part& part = b.part[n];
    const int64_t first = (t - b.first_tile[n]) * kTile, end = min(first + kTile, part.count);
    for (int64_t i = first + int64_t{threadIdx.x} * kStep; i < end; i += kThreads * kStep) f(part, i);
  }
}

}  // namespace acefast

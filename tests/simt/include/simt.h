// A small SIMT emulator: CUDA sources compiled by the host compiler, one fiber per thread, one block at a time.
//
// What it checks while a kernel runs:
//   * fibers and blocks run in an order permuted by a seed, under odd seeds one warp far ahead of the others, so a result that
//     depends on a missing barrier changes;
//   * shared memory is a fresh heap block per CUDA block, filled with a NaN pattern, so that reads before writes show
//     and the address sanitiser sees every access outside it;
//   * a barrier or a warp operation that only a part of the named threads reaches is an error that says who waits where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct Site {
  const char* file = "";
  int line = 0;
  const char* what = "";
};

// Order of fibers and blocks of the launches to come.
void set_seed(uint64_t seed);

// Runs body once per thread of the grid; throws std::runtime_error on a launch or synchronisation error.
void launch(const char* name, Dim3 grid, Dim3 block, size_t dynamic_shared, const std::function<void()>& body);

const Dim3& thread_index();
const Dim3& block_index();
const Dim3& block_dim();
const Dim3& grid_dim();
unsigned lane_id();

void* shared_memory(const Site& site, size_t bytes);
void* dynamic_shared_memory();

void sync_block(const Site& site);
void sync_warp(const Site& site, unsigned mask);
unsigned ballot(const Site& site, unsigned mask, bool predicate);
uint64_t shuffle(const Site& site, unsigned mask, uint64_t value, int source_lane);

template <typename T>
T shuffle_value(const Site& site, unsigned mask, T value, int source_lane) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = shuffle(site, mask, word, source_lane);
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

// The lane that a shuffle within segments of `width` lanes reads from; its own where the source falls outside.
inline int shuffle_index(int source, int width) {
  int lane = static_cast<int>(lane_id());
  return (lane & ~(width - 1)) | (source & (width - 1));
}
inline int shuffle_up(int delta, int width) {
  int lane = static_cast<int>(lane_id());
  return (lane & (width - 1)) < delta ? lane : lane - delta;
}
inline int shuffle_down(int delta, int width) {
  int lane = static_cast<int>(lane_id());
  return (lane & (width - 1)) + delta >= width ? lane : lane + delta;
}
inline int shuffle_xor(int bits, int width) {
  int lane = static_cast<int>(lane_id());
  int source = lane ^ bits;
  return (source & ~(width - 1)) > (lane & ~(width - 1)) ? lane : source;
}

}  // namespace simt

// topk_mask on CUDA: exact selection of k elements of a list of tensors by radix histograms, see csrc/ops.h.
//
// Scores become unsigned keys that order as they do. A first pass takes the smallest and the largest key among the alive
// elements; u, the distance of a key from the better end, then needs only as many bits as that range has, and the k smallest u
// are wanted. Each histogram pass looks at the next kDigit bits of u among the elements that share the digits found so far.
// A fixed number of passes is launched; those that have nothing left to do return at once, so no value comes to the host.
// Equal u at the end are taken by position: ties are counted per tile, the counts scanned, the tiles written in order.
#include "common.cuh"

namespace acefast {
namespace {

using Word = unsigned long long;

constexpr int kDigit = 12;
constexpr int kBins = 1 << kDigit;
constexpr int kTile = 4096;        // elements of one tile; a tile never crosses tensors
constexpr int kBatch = 64;         // tensors of one launch
constexpr int kPickThreads = 1024;
constexpr int kBlocksPerProcessor = 8;
constexpr int kNanScore = 1, kBadK = 2;  // bits of the status

enum Mode : int { kNone = 0, kAll = 1, kThreshold = 2 };

struct State {
  Word min_key, max_key, alive;
  Word prefix;  // digits of u found so far: u >> shift
  Word wanted;  // still to be taken among the elements with that prefix, at least 1
  Word tied;    // elements with that prefix
  int shift;
  int nan;
  int mode;
  int done;     // no further digit is needed
};

// What the kernels read: a part of the list of tensors. Tiles are numbered over the whole list; first_tile[i] is the number
// of tensor i's first one.
template <typename T>
struct Batch {
  const T* score[kBatch];
  const bool* alive[kBatch];
  bool* keep[kBatch];
  int64_t count[kBatch];
  int64_t first_tile[kBatch + 1];
  bool vector[kBatch];
  int tensors;
};

template <typename T>
using key_t = std::conditional_t<sizeof(T) == 8, Word, unsigned>;

template <typename T>
using bits_t = std::conditional_t<sizeof(T) == 8, Word, std::conditional_t<sizeof(T) == 4, unsigned, unsigned short>>;

template <typename T>
__device__ constexpr Word infinity_bits() {
  if (sizeof(T) == 8) return 0x7ff0000000000000ull;
  if (sizeof(T) == 4) return 0x7f800000u;
  return std::is_same_v<T, Half> ? 0x7c00u : 0x7f80u;
}

// A key that orders as |score| or as score; -0 and +0 share one. Sets nan where the score is NaN.
template <typename T>
__device__ __forceinline__ key_t<T> key_of(T score, bool magnitude, bool& nan) {
  using K = key_t<T>;
  union {
    T value;
    bits_t<T> bits;
  } pun;
  pun.value = score;
  constexpr K sign = K{1} << (8 * sizeof(T) - 1);
  const K bits = pun.bits, absolute = bits & (sign - 1);
  if (absolute > infinity_bits<T>()) nan = true;
  if (magnitude) return absolute;
  return absolute != 0 && (bits & sign) ? sign - absolute : sign + absolute;
}

template <typename K>
__device__ __forceinline__ K high_bits(K u, int shift) {
  return shift >= 8 * static_cast<int>(sizeof(K)) ? K{0} : u >> shift;
}

template <typename T>
constexpr int kVec = 16 / sizeof(T);
template <typename T>
constexpr int kRounds = kTile / (kThreads * kVec<T>);  // a thread's chunks of one tile

template <typename T>
struct Tile {
  const T* score;
  const bool* alive;
  bool* keep;
  int64_t count;  // elements of the tensor from the tile's first one on
  bool vector;
};

template <typename T>
__device__ __forceinline__ Tile<T> tile_of(const Batch<T>& b, int64_t tile) {
  int low = 0, high = b.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (b.first_tile[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t first = (tile - b.first_tile[low]) * kTile;
  return {b.score[low] + first, b.alive[low] ? b.alive[low] + first : nullptr, b.keep[low] + first, b.count[low] - first,
          b.vector[low]};
}

// kVec consecutive elements of a tile; bit v of `alive` says that element v exists and is alive.
template <typename T>
struct Chunk {
  Pack<T, kVec<T>> score;
  unsigned alive;
};

template <typename T>
__device__ __forceinline__ int chunk_start(int round) {
  return (round * kThreads + static_cast<int>(threadIdx.x)) * kVec<T>;
}

template <typename T>
__device__ __forceinline__ Chunk<T> load_chunk(const Tile<T>& tile, int round) {
  constexpr int V = kVec<T>;
  const int first = chunk_start<T>(round);
  Chunk<T> chunk{};
  if (tile.vector && first + V <= tile.count) {
    chunk.score = load_pack<V>(tile.score + first);
    chunk.alive = (1u << V) - 1;
    if (tile.alive) {
      const Pack<bool, V> flags = load_pack<V>(tile.alive + first);
#pragma unroll
      for (int v = 0; v < V; ++v) chunk.alive &= ~(unsigned{!flags.v[v]} << v);
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (first + v >= tile.count) continue;
      chunk.score.v[v] = tile.score[first + v];
      if (!tile.alive || tile.alive[first + v]) chunk.alive |= 1u << v;
    }
  }
  return chunk;
}

template <typename T>
__device__ __forceinline__ void load_tile(const Tile<T>& tile, Chunk<T>* chunks) {
#pragma unroll
  for (int round = 0; round < kRounds<T>; ++round) chunks[round] = load_chunk(tile, round);
}

// Distance of a score from the better end of the keys' range.
template <typename T>
__device__ __forceinline__ key_t<T> distance(T score, const State& state, bool largest, bool magnitude) {
  using K = key_t<T>;
  bool nan = false;
  const K key = key_of(score, magnitude, nan);
  return largest ? static_cast<K>(state.max_key) - key : key - static_cast<K>(state.min_key);
}

__global__ void __launch_bounds__(kPickThreads) topk_mask_init_kernel(State* state, Word* histogram) {
  for (int bin = threadIdx.x; bin < kBins; bin += kPickThreads) histogram[bin] = 0;
  if (threadIdx.x == 0) *state = State{~Word{0}, 0, 0, 0, 0, 0, 0, 0, kNone, 1};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    topk_mask_range_kernel(const __grid_constant__ Batch<T> batch, State* state, bool magnitude) {
  ACEFAST_SHARED(shared_min, Word, [kWarpsPerBlock]);
  ACEFAST_SHARED(shared_max, Word, [kWarpsPerBlock]);
  ACEFAST_SHARED(shared_alive, Word, [kWarpsPerBlock]);
  key_t<T> least = ~key_t<T>{0}, most = 0;
  Word alive = 0;
  bool nan = false;
  const int64_t tiles = batch.first_tile[batch.tensors];
  for (int64_t t = batch.first_tile[0] + blockIdx.x; t < tiles; t += gridDim.x) {
    const Tile<T> tile = tile_of(batch, t);
    Chunk<T> chunks[kRounds<T>];
    load_tile(tile, chunks);
#pragma unroll
    for (int round = 0; round < kRounds<T>; ++round) {
#pragma unroll
      for (int v = 0; v < kVec<T>; ++v) {
        if (!(chunks[round].alive >> v & 1)) continue;
        const key_t<T> key = key_of(chunks[round].score.v[v], magnitude, nan);
        least = min(least, key);
        most = max(most, key);
        ++alive;
      }
    }
  }
  Word smallest = least, greatest = most;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    smallest = min(smallest, __shfl_xor_sync(kFullMask, smallest, offset));
    greatest = max(greatest, __shfl_xor_sync(kFullMask, greatest, offset));
    alive += __shfl_xor_sync(kFullMask, alive, offset);
  }
  if (lane_index() == 0) {
    shared_min[warp_index()] = smallest;
    shared_max[warp_index()] = greatest;
    shared_alive[warp_index()] = alive;
  }
  if (nan) atomicOr(&state->nan, 1);
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarpsPerBlock; ++w) {
    smallest = min(smallest, shared_min[w]);
    greatest = max(greatest, shared_max[w]);
    alive += shared_alive[w];
  }
  if (alive == 0) return;
  atomicMin(&state->min_key, smallest);
  atomicMax(&state->max_key, greatest);
  atomicAdd(&state->alive, alive);
}

__global__ void topk_mask_start_kernel(State* state, int64_t k, int* status) {
  State s = *state;
  const bool bad_k = k < 0 || static_cast<Word>(k) > s.alive;
  *status = (s.nan ? kNanScore : 0) | (bad_k ? kBadK : 0);
  s.prefix = 0;
  s.wanted = bad_k ? 0 : static_cast<Word>(k);
  s.tied = s.alive;
  s.mode = bad_k || s.nan || k == 0 ? kNone : s.wanted == s.alive ? kAll : kThreshold;
  const Word range = s.mode == kThreshold ? s.max_key - s.min_key : 0;
  s.shift = range == 0 ? 0 : 64 - __clzll(static_cast<long long>(range));
  s.done = s.mode != kThreshold || s.shift == 0;
  *state = s;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    topk_mask_histogram_kernel(const __grid_constant__ Batch<T> batch, const State* state_in, Word* histogram, bool largest,
                               bool magnitude) {
  const State state = *state_in;
  if (state.done) return;
  ACEFAST_SHARED(bins, unsigned, [kBins]);
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) bins[bin] = 0;
  __syncthreads();
  const int shift = max(0, state.shift - kDigit);
  const unsigned digit_mask = (1u << (state.shift - shift)) - 1;
  const auto prefix = static_cast<key_t<T>>(state.prefix);
  const int64_t tiles = batch.first_tile[batch.tensors];
  for (int64_t t = batch.first_tile[0] + blockIdx.x; t < tiles; t += gridDim.x) {
    const Tile<T> tile = tile_of(batch, t);
    Chunk<T> chunks[kRounds<T>];
    load_tile(tile, chunks);
#pragma unroll
    for (int round = 0; round < kRounds<T>; ++round) {
#pragma unroll
      for (int v = 0; v < kVec<T>; ++v) {
        if (!(chunks[round].alive >> v & 1)) continue;
        const key_t<T> u = distance(chunks[round].score.v[v], state, largest, magnitude);
        if (high_bits(u, state.shift) == prefix) atomicAdd(&bins[static_cast<unsigned>(u >> shift) & digit_mask], 1u);
      }
    }
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads)
    if (bins[bin] != 0) atomicAdd(&histogram[bin], Word{bins[bin]});
}

// Sum of `value` over the threads before this one, and over all of them. kCount warps; `scratch` has kCount entries.
template <int kCount>
__device__ __forceinline__ Word block_scan(Word value, Word* scratch, Word& total) {
  const int lane = lane_index(), warp = warp_index();
  Word inclusive = value;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const Word below = __shfl_up_sync(kFullMask, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  if (lane == kWarp - 1) scratch[warp] = inclusive;
  __syncthreads();
  Word before = 0;
  total = 0;
  for (int w = 0; w < kCount; ++w) {
    if (w < warp) before += scratch[w];
    total += scratch[w];
  }
  __syncthreads();
  return before + inclusive - value;
}

// The bin in which the wanted elements run out becomes the next digit; the histogram is cleared for the next pass.
__global__ void __launch_bounds__(kPickThreads) topk_mask_pick_kernel(State* state_out, Word* histogram) {
  constexpr int kPer = kBins / kPickThreads;
  ACEFAST_SHARED(scratch, Word, [kPickThreads / kWarp]);
  State state = *state_out;
  if (state.done) return;
  Word counts[kPer], mine = 0;
  for (int i = 0; i < kPer; ++i) {
    counts[i] = histogram[threadIdx.x * kPer + i];
    histogram[threadIdx.x * kPer + i] = 0;
    mine += counts[i];
  }
  Word total;
  Word before = block_scan<kPickThreads / kWarp>(mine, scratch, total);
  for (int i = 0; i < kPer; ++i) {
    if (before < state.wanted && state.wanted <= before + counts[i]) {
      const int shift = max(0, state.shift - kDigit);
      state.prefix = (state.prefix << (state.shift - shift)) | static_cast<Word>(threadIdx.x * kPer + i);
      state.wanted -= before;
      state.tied = counts[i];
      state.shift = shift;
      state.done = shift == 0 || state.tied == state.wanted;
      *state_out = state;
      return;
    }
    before += counts[i];
  }
}

__device__ __forceinline__ bool ties_are_split(const State& s) { return s.mode == kThreshold && s.tied != s.wanted; }

// Bits of a chunk's elements that come before the threshold, and of those at it.
template <typename T>
__device__ __forceinline__ void compare(const Chunk<T>& chunk, const State& state, bool largest, bool magnitude, unsigned& below,
                                        unsigned& tied) {
  const auto prefix = static_cast<key_t<T>>(state.prefix);
  below = tied = 0;
#pragma unroll
  for (int v = 0; v < kVec<T>; ++v) {
    if (!(chunk.alive >> v & 1)) continue;
    const key_t<T> u = high_bits(distance(chunk.score.v[v], state, largest, magnitude), state.shift);
    below |= unsigned{u < prefix} << v;
    tied |= unsigned{u == prefix} << v;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    topk_mask_ties_kernel(const __grid_constant__ Batch<T> batch, const State* state_in, int64_t* ties, bool largest, bool magnitude) {
  const State state = *state_in;
  if (!ties_are_split(state)) return;
  ACEFAST_SHARED(shared_ties, int, [kWarpsPerBlock]);
  const int64_t tiles = batch.first_tile[batch.tensors];
  for (int64_t t = batch.first_tile[0] + blockIdx.x; t < tiles; t += gridDim.x) {
    const Tile<T> tile = tile_of(batch, t);
    Chunk<T> chunks[kRounds<T>];
    load_tile(tile, chunks);
    int count = 0;
#pragma unroll
    for (int round = 0; round < kRounds<T>; ++round) {
      unsigned below, tied;
      compare(chunks[round], state, largest, magnitude, below, tied);
      count += __popc(tied);
    }
    count = group_sum(count, kWarp);
    if (lane_index() == 0) shared_ties[warp_index()] = count;
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t sum = 0;
      for (int w = 0; w < kWarpsPerBlock; ++w) sum += shared_ties[w];
      ties[t] = sum;
    }
    __syncthreads();
  }
}

// Turns the tiles' counts into the number of ties before each tile; ties[tiles] becomes their sum.
__global__ void __launch_bounds__(kPickThreads) topk_mask_scan_kernel(const State* state, int64_t* ties, int64_t tiles) {
  ACEFAST_SHARED(scratch, Word, [kPickThreads / kWarp]);
  if (!ties_are_split(*state)) return;
  Word before = 0;
  for (int64_t first = 0; first < tiles; first += kPickThreads) {
    const int64_t t = first + threadIdx.x;
    Word total;
    const Word exclusive = block_scan<kPickThreads / kWarp>(t < tiles ? static_cast<Word>(ties[t]) : 0, scratch, total);
    if (t < tiles) ties[t] = static_cast<int64_t>(before + exclusive);
    before += total;
  }
  if (threadIdx.x == 0) ties[tiles] = static_cast<int64_t>(before);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    topk_mask_write_kernel(const __grid_constant__ Batch<T> batch, const State* state_in, const int64_t* ties, bool largest,
                           bool magnitude) {
  constexpr int V = kVec<T>;
  ACEFAST_SHARED(scratch, Word, [kWarpsPerBlock]);
  const State state = *state_in;
  const int64_t tiles = batch.first_tile[batch.tensors];
  for (int64_t t = batch.first_tile[0] + blockIdx.x; t < tiles; t += gridDim.x) {
    const Tile<T> tile = tile_of(batch, t);
    // How many of this tile's ties are taken: none, all, or the first `left` of them.
    Word left = ~Word{0};
    bool split = false;
    if (ties_are_split(state)) {
      const Word before = static_cast<Word>(ties[t]), after = static_cast<Word>(ties[t + 1]);
      left = before < state.wanted ? state.wanted - before : 0;
      split = left > 0 && after > state.wanted;
    }
    Chunk<T> chunks[kRounds<T>];
    load_tile(tile, chunks);
#pragma unroll
    for (int round = 0; round < kRounds<T>; ++round) {
      unsigned taken = 0;
      if (state.mode == kAll) taken = chunks[round].alive;
      if (state.mode == kThreshold) {
        unsigned tied;
        compare(chunks[round], state, largest, magnitude, taken, tied);
        if (split) {  // the same in all threads of the block
          Word total;
          Word rank = block_scan<kWarpsPerBlock>(static_cast<Word>(__popc(tied)), scratch, total);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            if (!(tied >> v & 1)) continue;
            if (rank < left) taken |= 1u << v;
            ++rank;
          }
          left -= min(left, total);
        } else if (left > 0) {
          taken |= tied;
        }
      }
      const int first = chunk_start<T>(round);
      if (tile.vector && first + V <= tile.count) {
        Pack<bool, V> flags;
#pragma unroll
        for (int v = 0; v < V; ++v) flags.v[v] = taken >> v & 1;
        store_pack(tile.keep + first, flags);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v)
          if (first + v < tile.count) tile.keep[first + v] = taken >> v & 1;
      }
    }
  }
}

// The list cut into batches of at most kBatch tensors; empty tensors have no tile.
template <typename T>
std::vector<Batch<T>> make_batches(const std::vector<Tensor>& scores, const std::optional<std::vector<Tensor>>& alive,
                                   const std::vector<Tensor>& keep) {
  std::vector<Batch<T>> batches;
  int64_t tile = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    const int64_t count = scores[i].numel();
    if (count == 0) continue;
    if (batches.empty() || batches.back().tensors == kBatch) {
      batches.emplace_back();
      batches.back().first_tile[0] = tile;
    }
    Batch<T>& b = batches.back();
    const int n = b.tensors++;
    b.score[n] = ptr<T>(scores[i]);
    b.alive[n] = alive ? ptr<bool>((*alive)[i]) : nullptr;
    b.keep[n] = mutable_ptr<bool>(keep[i]);
    b.count[n] = count;
    tile += ceil_div(count, kTile);
    b.first_tile[n + 1] = tile;
    const auto flags = reinterpret_cast<uintptr_t>(b.alive[n]) | reinterpret_cast<uintptr_t>(b.keep[n]);
    b.vector[n] = aligned16(b.score[n]) && flags % kVec<T> == 0;
  }
  return batches;
}

template <typename T>
void launch_topk_mask_fwd(const std::vector<Tensor>& scores, const std::optional<std::vector<Tensor>>& alive, int64_t k, bool largest,
                          bool magnitude, const std::vector<Tensor>& keep, const Tensor& status, const DeviceScope& scope) {
  constexpr int kPasses = (8 * static_cast<int>(sizeof(T)) + kDigit - 1) / kDigit;
  const auto batches = make_batches<T>(scores, alive, keep);
  const int64_t tiles = batches.empty() ? 0 : batches.back().first_tile[batches.back().tensors];
  const Tensor state_memory = new_tensor(status, {static_cast<int64_t>(ceil_div(sizeof(State), 8))}, ScalarType::Long);
  const Tensor histogram_memory = new_tensor(status, {kBins}, ScalarType::Long);
  const Tensor ties_memory = new_tensor(status, {tiles + 1}, ScalarType::Long);
  State* state = static_cast<State*>(state_memory.mutable_data_ptr());
  Word* histogram = static_cast<Word*>(histogram_memory.mutable_data_ptr());
  int64_t* ties = mutable_ptr<int64_t>(ties_memory);
  const cudaStream_t stream = scope.stream();
  const int64_t most_blocks = int64_t{kBlocksPerProcessor} * scope.multiprocessors();
  const auto grid = [&](const Batch<T>& b) { return grid_of(std::min(b.first_tile[b.tensors] - b.first_tile[0], most_blocks), 1); };

  ACEFAST_LAUNCH((topk_mask_init_kernel), dim3(1), kPickThreads, 0, stream, state, histogram);
  for (const Batch<T>& b : batches)
    ACEFAST_LAUNCH((topk_mask_range_kernel<T>), grid(b), kThreads, 0, stream, b, state, magnitude);
  ACEFAST_LAUNCH((topk_mask_start_kernel), dim3(1), 1, 0, stream, state, k, mutable_ptr<int>(status));
  for (int pass = 0; pass < kPasses; ++pass) {
    for (const Batch<T>& b : batches)
      ACEFAST_LAUNCH((topk_mask_histogram_kernel<T>), grid(b), kThreads, 0, stream, b, state, histogram, largest, magnitude);
    ACEFAST_LAUNCH((topk_mask_pick_kernel), dim3(1), kPickThreads, 0, stream, state, histogram);
  }
  for (const Batch<T>& b : batches)
    ACEFAST_LAUNCH((topk_mask_ties_kernel<T>), grid(b), kThreads, 0, stream, b, state, ties, largest, magnitude);
  ACEFAST_LAUNCH((topk_mask_scan_kernel), dim3(1), kPickThreads, 0, stream, state, ties, tiles);
  for (const Batch<T>& b : batches)
    ACEFAST_LAUNCH((topk_mask_write_kernel<T>), grid(b), kThreads, 0, stream, b, state, ties, largest, magnitude);
}

std::tuple<std::vector<Tensor>, Tensor> topk_mask(std::vector<Tensor> scores, int64_t k, std::optional<std::vector<Tensor>> alive,
                                                  bool largest, bool magnitude) {
  check(!scores.empty(), "topk_mask", "scores must not be empty");
  check(!alive || alive->size() == scores.size(), "topk_mask", "alive must have one tensor per score tensor");
  const Tensor& first = scores[0];
  std::vector<Tensor> keep;
  for (size_t i = 0; i < scores.size(); ++i) {
    const Tensor& s = scores[i];
    check(s.is_contiguous() && s.get_device_index() == first.get_device_index() && s.is_cuda() == first.is_cuda(), "topk_mask",
          "scores must be contiguous and on one device");
    check_dtype("topk_mask", "scores", s, first.scalar_type());
    if (alive) {
      const Tensor& a = (*alive)[i];
      check(a.is_contiguous() && a.get_device_index() == first.get_device_index() && a.numel() == s.numel() &&
                a.scalar_type() == ScalarType::Bool,
            "topk_mask", "alive must be contiguous bool tensors shaped like scores");
    }
    keep.push_back(torch::stable::new_empty(s, s.sizes(), ScalarType::Bool));
  }
  const DeviceScope scope(first);
  const Tensor status = new_tensor(first, {1}, ScalarType::Int);
  dispatch_float("topk_mask", first.scalar_type(), [&](auto t) {
    launch_topk_mask_fwd<typename decltype(t)::type>(scores, alive, k, largest, magnitude, keep, status, scope);
  });
  return {keep, status};
}

ACEFAST_REGISTER_CUDA(m) { m.impl("topk_mask", TORCH_BOX(&topk_mask)); }

}  // namespace
}  // namespace acefast

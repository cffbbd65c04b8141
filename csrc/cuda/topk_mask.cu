// topk_mask and topk_mask_out on CUDA: exact selection of k elements of a list of tensors by radix histograms, see csrc/ops.h.
//
// Scores become unsigned keys that order as they do. A first pass takes the smallest and the largest key among the alive
// elements; u, the distance of a key from the better end, then needs only as many bits as that range has, and the k smallest u
// are wanted. Each histogram pass looks at the next kDigit bits of u among the elements that share the digits found so far.
// A fixed number of passes is launched; those that have nothing left to do return at once, so no value comes to the host.
// Equal u at the end are taken by position: ties are counted per tile, the counts scanned, the tiles written in order.
#include "list.cuh"
#include "selection.cuh"

namespace acefast {
namespace {

using Word = unsigned long long;

constexpr int kDigit = 12;
constexpr int kBins = 1 << kDigit;
constexpr int kPickThreads = 1024;
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

// An element is alive where its flag, if there are flags, equals `living`.
template <typename T>
struct Part {
  const T* score;
  const bool* flags;
  bool* keep;
  int64_t count;
  bool living;
  bool vector;
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

// The part of a tensor from a tile's first element on.
template <typename T>
__device__ __forceinline__ Part<T> tile_of(const Batch<Part<T>>& b, int64_t tile) {
  const int n = part_of(b, tile);
  const int64_t first = (tile - b.first_tile[n]) * kTile;
  Part<T> part = b.part[n];
  part.score += first;
  if (part.flags) part.flags += first;
  part.keep += first;
  part.count -= first;
  return part;
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
__device__ __forceinline__ Chunk<T> load_chunk(const Part<T>& tile, int round) {
  constexpr int V = kVec<T>;
  const int first = chunk_start<T>(round);
  Chunk<T> chunk{};
  if (tile.vector && first + V <= tile.count) {
    chunk.score = load_pack<V>(tile.score + first);
    chunk.alive = (1u << V) - 1;
    if (tile.flags) {
      const Pack<bool, V> flags = load_pack<V>(tile.flags + first);
#pragma unroll
      for (int v = 0; v < V; ++v) chunk.alive &= ~(unsigned{flags.v[v] != tile.living} << v);
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (first + v >= tile.count) continue;
      chunk.score.v[v] = tile.score[first + v];
      if (!tile.flags || tile.flags[first + v] == tile.living) chunk.alive |= 1u << v;
    }
  }
  return chunk;
}

template <typename T>
__device__ __forceinline__ void load_tile(const Part<T>& tile, Chunk<T>* chunks) {
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
    topk_mask_range_kernel(const __grid_constant__ Batch<Part<T>> batch, State* state, bool magnitude) {
  ACEFAST_SHARED(shared_min, Word, [kWarpsPerBlock]);
  ACEFAST_SHARED(shared_max, Word, [kWarpsPerBlock]);
  ACEFAST_SHARED(shared_alive, Word, [kWarpsPerBlock]);
  key_t<T> least = ~key_t<T>{0}, most = 0;
  Word alive = 0;
  bool nan = false;
  const int64_t tiles = batch.first_tile[batch.parts];
  for (int64_t t = batch.first_tile[0] + blockIdx.x; t < tiles; t += gridDim.x) {
    const Part<T> tile = tile_of(batch, t);
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
  *status |= (s.nan ? kNanScore : 0) | (bad_k ? kBadK : 0);
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
    topk_mask_histogram_kernel(const __grid_constant__ Batch<Part<T>> batch, const State* state_in, Word* histogram, bool largest,
                               bool magnitude) {
  const State state = *state_in;
  if (state.done) return;
  ACEFAST_SHARED(bins, unsigned, [kBins]);
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) bins[bin] = 0;
  __syncthreads();
  const int shift = max(0, state.shift - kDigit);
  const unsigned digit_mask = (1u << (state.shift - shift)) - 1;
  const auto prefix = static_cast<key_t<T>>(state.prefix);
  const int64_t tiles = batch.first_tile[batch.parts];
  for (int64_t t = batch.first_tile[0] + blockIdx.x; t < tiles; t += gridDim.x) {
    const Part<T> tile = tile_of(batch, t);
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
    topk_mask_ties_kernel(const __grid_constant__ Batch<Part<T>> batch, const State* state_in, int64_t* ties, bool largest,
                          bool magnitude) {
  const State state = *state_in;
  if (!ties_are_split(state)) return;
  ACEFAST_SHARED(shared_ties, int, [kWarpsPerBlock]);
  const int64_t tiles = batch.first_tile[batch.parts];
  for (int64_t t = batch.first_tile[0] + blockIdx.x; t < tiles; t += gridDim.x) {
    const Part<T> tile = tile_of(batch, t);
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
    topk_mask_write_kernel(const __grid_constant__ Batch<Part<T>> batch, const State* state_in, const int64_t* ties, bool largest,
                           bool magnitude) {
  constexpr int V = kVec<T>;
  ACEFAST_SHARED(scratch, Word, [kWarpsPerBlock]);
  const State state = *state_in;
  const int64_t tiles = batch.first_tile[batch.parts];
  for (int64_t t = batch.first_tile[0] + blockIdx.x; t < tiles; t += gridDim.x) {
    const Part<T> tile = tile_of(batch, t);
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

template <typename T>
void launch_topk_mask(const Tensors& scores, const std::optional<Tensors>& flags, bool living, int64_t k, bool largest,
                      bool magnitude, const Tensors& keep, int* status, const DeviceScope& scope) {
  constexpr int kPasses = (8 * static_cast<int>(sizeof(T)) + kDigit - 1) / kDigit;
  const auto batches = make_batches(scores.size(), [&](size_t i) {
    const T* score = ptr<T>(scores[i]);
    const bool* flag = flags ? ptr<bool>((*flags)[i]) : nullptr;
    bool* out = mutable_ptr<bool>(keep[i]);
    const auto bytes = reinterpret_cast<uintptr_t>(flag) | reinterpret_cast<uintptr_t>(out);
    return Part<T>{score, flag, out, scores[i].numel(), living, aligned16(score) && bytes % kVec<T> == 0};
  });
  const int64_t tiles = batches.empty() ? 0 : batches.back().first_tile[batches.back().parts];
  const Tensor state_memory = new_tensor(scores[0], {ceil_div(sizeof(State), 8)}, ScalarType::Long);
  const Tensor histogram_memory = new_tensor(scores[0], {kBins}, ScalarType::Long);
  const Tensor ties_memory = new_tensor(scores[0], {tiles + 1}, ScalarType::Long);
  State* state = static_cast<State*>(state_memory.mutable_data_ptr());
  Word* histogram = static_cast<Word*>(histogram_memory.mutable_data_ptr());
  int64_t* ties = mutable_ptr<int64_t>(ties_memory);

  ACEFAST_LAUNCH((topk_mask_init_kernel), dim3(1), kPickThreads, 0, scope.stream(), state, histogram);
  for (const auto& b : batches)
    ACEFAST_LAUNCH((topk_mask_range_kernel<T>), tile_grid(b, scope), kThreads, 0, scope.stream(), b, state, magnitude);
  ACEFAST_LAUNCH((topk_mask_start_kernel), dim3(1), 1, 0, scope.stream(), state, k, status);
  for (int pass = 0; pass < kPasses; ++pass) {
    for (const auto& b : batches)
      ACEFAST_LAUNCH((topk_mask_histogram_kernel<T>), tile_grid(b, scope), kThreads, 0, scope.stream(), b, state, histogram,
                     largest, magnitude);
    ACEFAST_LAUNCH((topk_mask_pick_kernel), dim3(1), kPickThreads, 0, scope.stream(), state, histogram);
  }
  for (const auto& b : batches)
    ACEFAST_LAUNCH((topk_mask_ties_kernel<T>), tile_grid(b, scope), kThreads, 0, scope.stream(), b, state, ties, largest,
                   magnitude);
  ACEFAST_LAUNCH((topk_mask_scan_kernel), dim3(1), kPickThreads, 0, scope.stream(), state, ties, tiles);
  for (const auto& b : batches)
    ACEFAST_LAUNCH((topk_mask_write_kernel<T>), tile_grid(b, scope), kThreads, 0, scope.stream(), b, state, ties, largest,
                   magnitude);
}

Tensor topk_mask_out(Tensors scores, int64_t k, std::optional<Tensors> alive, bool largest, bool magnitude, Tensors out) {
  check_selection("topk_mask", scores, alive);
  check_list("topk_mask", "out", out, scores, ScalarType::Bool);
  const DeviceScope scope(scores[0]);
  const Tensor status = new_status(scores[0]);
  select(scores, k, alive, true, largest, magnitude, out, mutable_ptr<int>(status), scope);
  return status;
}

std::tuple<Tensors, Tensor> topk_mask(Tensors scores, int64_t k, std::optional<Tensors> alive, bool largest, bool magnitude) {
  const Tensors keep = new_masks(scores);
  return {keep, topk_mask_out(scores, k, alive, largest, magnitude, keep)};
}

ACEFAST_REGISTER_CUDA(m) {
  m.impl("topk_mask", TORCH_BOX(&topk_mask));
  m.impl("topk_mask_out", TORCH_BOX(&topk_mask_out));
}

}  // namespace

void select(const Tensors& scores, int64_t k, const std::optional<Tensors>& flags, bool living, bool largest, bool magnitude,
            const Tensors& keep, int* status, const DeviceScope& scope) {
  dispatch_float("topk_mask", scores[0].scalar_type(), [&](auto type) {
    launch_topk_mask<typename decltype(type)::type>(scores, flags, living, k, largest, magnitude, keep, status, scope);
  });
}

}  // namespace acefast

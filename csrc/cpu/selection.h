// Exact selection of k elements of a list of tensors, behind topk_mask, gumbel_topk and exchange.
//
// Scores become unsigned keys whose order is the order of selection, so "the largest k keys" is all that is left; it is
// found without a sort. A sample of the keys brackets the k-th one. Where few keys lie in the bracket, one pass marks all
// keys above it and collects those inside, which are then settled by (key, index). Where many do, a pass counts them in
// bins placed on the bracket, and the search goes on in the bin that holds the k-th key, until few are left, or one key,
// whose first elements are taken. Every pass counts exactly what lies above and inside, so a bracket that missed is seen
// and replaced by the side where the k-th key is; a miss costs time only. All decisions are made on integers of the data,
// so every thread count gives the same masks.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/random.h"

namespace acefast {

inline constexpr int kChunkBits = 14;
inline constexpr int64_t kChunk = int64_t(1) << kChunkBits;  // elements per task
inline constexpr int64_t kBlock = 1024;                      // elements per inner loop
inline constexpr int kDigitBits = 16;
inline constexpr int64_t kMinCandidates = 1 << 18, kMaxCandidates = 1 << 20;
inline constexpr int64_t kFewBins = 32;          // up to so many bins are counted chunk by chunk

template <class T>
using Key = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <class T, bool MAGNITUDE>
struct KeyOf {
  using U = Key<T>;
  static constexpr U sign = U(U(1) << (8 * sizeof(U) - 1));
  static constexpr U infinity = std::is_same_v<T, double>     ? U(0x7FF0000000000000ull)
                                : std::is_same_v<T, float>    ? U(0x7F800000u)
                                : std::is_same_v<T, BFloat16> ? U(0x7F80u)
                                                              : U(0x7C00u);
  U flip;  // all ones where the smallest are asked for
  // Larger key = picked earlier; -0 and +0 have one key.
  U operator()(U bits) const {
    const U abs = bits & U(~sign);
    U key = abs;
    if (!MAGNITUDE) key = U(bits & sign ? sign - abs : sign + abs);
    return key ^ flip;
  }
  static bool nan(U bits) { return U(bits & U(~sign)) > infinity; }
};

struct Chunk {
  int64_t tensor, begin, end;
  int64_t first;  // index of its first element in the concatenation
};

template <class T, bool MAGNITUDE>
class Selection {
  using U = Key<T>;
  static constexpr U kMaxKey = std::numeric_limits<U>::max();

 public:
  Selection(const std::vector<Tensor>& scores, const std::optional<std::vector<Tensor>>& alive,
            const std::vector<Tensor>& keep, bool largest)
      : key_{largest ? U(0) : kMaxKey} {
    for (size_t t = 0; t < scores.size(); ++t) {
      score_.push_back(ptr<U>(scores[t]));
      alive_.push_back(alive ? ptr<uint8_t>((*alive)[t]) : nullptr);
      keep_.push_back(mutable_ptr<uint8_t>(keep[t]));
      const int64_t n = scores[t].numel();
      for (int64_t b = 0; b < n; b += kChunk) chunks_.push_back({int64_t(t), b, std::min(n, b + kChunk), total_ + b});
      total_ += n;
    }
    most_ = std::clamp(total_ / 32, kMinCandidates, kMaxCandidates);
  }

  // Writes the masks; returns the status bits.
  int32_t run(int64_t k) {
    Span span = sampled(k);
    for (;;) {
      const bool collects = span.inside <= most_;
      const Found found = collects ? collect(span) : count(span);
      const int32_t status = int32_t(found.nan) | (k < 0 || k > found.alive ? 2 : 0);
      if (status || k == 0) {
        each([&](int64_t c, int64_t, const U*, const uint8_t*, int64_t n) { std::fill_n(out(c), n, uint8_t(0)); });
        return status;
      }
      if (k <= found.above) {
        span = {U(span.high + 1), kMaxKey, found.above};
      } else if (k > found.above + found.inside) {
        span = {U(0), U(span.low - 1), found.alive - found.above - found.inside};
      } else if (k == found.above + found.inside) {
        each([&](int64_t c, int64_t, const U* score, const uint8_t* alive, int64_t n) {
          write_chunk(out(c), score, alive, n, span.low);
        });
        return 0;
      } else if (collects) {
        if (found.inside <= most_) {
          settle(span, k - found.above, found.inside);
          return 0;
        }
        span.inside = found.inside;
      } else {
        int64_t above = found.above;
        const int64_t bin = narrow(span, k, above);
        if (span.low == span.high) {
          write_ties(span.low, k - above, bin);
          return 0;
        }
      }
    }
  }

 private:
  // Keys from low to high; inside: how many there are (after sampling, about how many).
  struct Span {
    U low, high;
    int64_t inside;
    U range() const { return U(high - low); }
    int shift() const {  // of a bin's number
      int bits = 0;
      while (uint64_t(range() >> bits) >> kDigitBits) ++bits;
      return bits;
    }
    int64_t bins() const { return int64_t(range() >> shift()) + 1; }
  };

  // What a pass over all elements counts; alive ones only.
  struct Found {
    bool nan = false;
    int64_t alive = 0, above = 0, inside = 0;
  };

  struct Candidate {
    U key;
    uint64_t place;  // chunk, then element of the chunk: ascends as the index in the concatenation does
    bool operator<(const Candidate& other) const { return key != other.key ? key > other.key : place < other.place; }
  };

  // Calls f(chunk, worker, scores, alive or nullptr, n) for each chunk in parallel.
  template <class F>
  void each(const F& f) const {
    parallel_tasks(int64_t(chunks_.size()), [&](int64_t c, int64_t worker) {
      const Chunk& chunk = chunks_[c];
      const uint8_t* alive = alive_[chunk.tensor];
      f(c, worker, score_[chunk.tensor] + chunk.begin, alive ? alive + chunk.begin : nullptr, chunk.end - chunk.begin);
    });
  }

  uint8_t* out(int64_t c) const { return keep_[chunks_[c].tensor] + chunks_[c].begin; }

  // A span that holds the k-th key unless luck is bad: three standard deviations around the k-th key's rank in a sample of
  // about n^(2/3) / 2 elements, one at a hashed place of each of as many strata.
  Span sampled(int64_t k) const {
    if (total_ < kChunk) return {U(0), kMaxKey, total_};
    const int64_t strata = int64_t(std::pow(double(total_), 2.0 / 3) / 2);
    std::vector<U> keys(strata);
    std::vector<uint8_t> living(strata);
    constexpr int64_t piece = 4 * kPhiloxBlocks;
    parallel_range(strata, piece, [&](int64_t begin, int64_t end) {
      uint32_t word[piece];
      philox_words(0, 0, [&](int b) { return uint64_t(begin) / 4 + b; }, word);
      const auto place = [&](int64_t s) {
        const double jitter = double(word[s - begin]) * 0x1p-32;
        return std::min(total_ - 1, int64_t((double(s) + jitter) * (double(total_) / double(strata))));
      };
      const auto starts_after = [](int64_t n, const Chunk& chunk) { return n < chunk.first; };
      auto chunk = std::upper_bound(chunks_.begin(), chunks_.end(), place(begin), starts_after) - 1;
      const U* score[piece];
      for (int64_t s = begin; s < end; ++s) {
        const int64_t n = place(s);
        while (n - chunk->first >= chunk->end - chunk->begin) ++chunk;
        const int64_t i = chunk->begin + n - chunk->first;
        score[s - begin] = score_[chunk->tensor] + i;
        living[s] = !alive_[chunk->tensor] || alive_[chunk->tensor][i];
      }
      for (int64_t s = begin; s < end; ++s) keys[s] = key_(*score[s - begin]);  // by itself: many cache misses at once
    });
    int64_t size = 0;  // of those alive
    for (int64_t s = 0; s < strata; ++s) {
      keys[size] = keys[s];
      size += living[s];
    }
    if (!size) return {U(0), kMaxKey, total_};
    const double share = std::clamp(double(k) / double(total_), 0.0, 1.0), rank = share * double(strata);
    const double spread = 3 * std::sqrt(rank * (1 - share)) + 3;
    const int64_t first = std::min(int64_t(rank - spread), size - 1), last = int64_t(rank + spread);
    const auto from = keys.begin(), to = from + size;
    const auto descending = std::greater<U>();
    Span span{U(0), kMaxKey, 0};
    if (last < size) {
      std::nth_element(from, from + last, to, descending);
      span.low = keys[last];
    }
    if (first >= 0) {
      std::nth_element(from, from + first, from + std::min(last, size), descending);
      span.high = keys[first];
    }
    const int64_t inside = std::count_if(from, to, [&](U key) { return U(key - span.low) <= span.range(); });
    span.inside = int64_t(double(inside) / double(strata) * double(total_));
    return span;
  }

  // Counts a block of at most kBlock elements into `found` and flags those inside; calls mark(i, above) for each.
  template <class Mark>
  void classify(const U* score, const uint8_t* alive, int64_t n, const Span& span, Found& found, uint8_t* inside,
                const Mark& mark) const {
    const auto key_of = key_;
    const U low = span.low, high = span.high, range = span.range();
    U above = 0, in_span = 0, living = 0, nan = 0;  // a block's counts fit the narrowest key
    if (alive) {
#pragma omp simd reduction(+ : above, in_span, living) reduction(| : nan)
      for (int64_t i = 0; i < n; ++i) {
        const U key = key_of(score[i]), one = U(alive[i]);  // bool storage is 0 or 1
        const U over = U(key > high) & one, in = U(U(key - low) <= range) & one;
        mark(i, uint8_t(over));
        inside[i] = uint8_t(in);
        above += over;
        in_span += in;
        living += one;
        nan |= U(key_.nan(score[i])) & one;
      }
    } else {
#pragma omp simd reduction(+ : above, in_span) reduction(| : nan)
      for (int64_t i = 0; i < n; ++i) {
        const U key = key_of(score[i]);
        const U over = U(key > high), in = U(U(key - low) <= range);
        mark(i, uint8_t(over));
        inside[i] = uint8_t(in);
        above += over;
        in_span += in;
        nan |= U(key_.nan(score[i]));
      }
      living = U(n);
    }
    found.nan |= nan != 0;
    found.alive += living;
    found.above += above;
    found.inside += in_span;
  }

  // Calls f(i) for each flag that is set, in order. `flags` holds kBlock bytes, the first n 0 or 1.
  template <class F>
  static void each_set(const uint8_t* flags, int64_t n, const F& f) {
    for (int64_t i0 = 0; i0 < n; i0 += 64) {
      uint64_t set = 0;  // bit i: flag i0 + i
      for (int64_t byte = 0; byte < 8; ++byte) {
        uint64_t word;
        std::memcpy(&word, flags + i0 + 8 * byte, 8);
        set |= ((word & 0x0101010101010101u) * 0x0102040810204080u >> 56) << (8 * byte);  // bytes from n on may hold anything
      }
      if (n - i0 < 64) set &= (uint64_t(1) << (n - i0)) - 1;
      for (; set; set &= set - 1) f(i0 + __builtin_ctzll(set));
    }
  }

  Found sum(const std::vector<Found>& parts) const {
    Found all;
    for (const Found& f : parts) {
      all.nan |= f.nan;
      all.alive += f.alive;
      all.above += f.above;
      all.inside += f.inside;
    }
    return all;
  }

  // keep = key above the span; the elements inside become candidates, as far as there is room.
  Found collect(const Span& span) {
    candidates_.reset(new Candidate[std::min(most_, total_)]);
    std::atomic<int64_t> used{0};
    std::vector<Found> parts(chunks_.size());
    each([&](int64_t c, int64_t, const U* score, const uint8_t* alive, int64_t n) {
      uint8_t inside[kBlock];
      uint8_t* keep = out(c);
      Found found;
      for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
        const int64_t m = std::min(kBlock, n - i0), before = found.inside;
        classify(score + i0, alive ? alive + i0 : nullptr, m, span, found, inside,
                 [&](int64_t i, uint8_t above) { keep[i0 + i] = above; });
        const int64_t here = found.inside - before;
        if (!here) continue;
        const int64_t first = used.fetch_add(here, std::memory_order_relaxed);
        if (first + here > most_) continue;
        Candidate* next = candidates_.get() + first;
        each_set(inside, m, [&](int64_t i) {
          *next++ = {key_(score[i0 + i]), uint64_t(c) << kChunkBits | uint64_t(i0 + i)};
        });
      }
      parts[c] = found;
    });
    return sum(parts);
  }

  // Takes the first `quota` of the `count` candidates of the span by (key, index): those of the bins above the one in which
  // the quota runs out, and the best of that one.
  void settle(const Span& span, int64_t quota, int64_t count) {
    constexpr int kBits = 11;
    int shift = 0;
    while (uint64_t(span.range() >> shift) >> kBits) ++shift;
    const auto bin_of = [&](const Candidate& candidate) { return int64_t(U(candidate.key - span.low) >> shift); };
    const auto flag = [&](const Candidate& candidate) -> uint8_t& {
      return out(int64_t(candidate.place >> kChunkBits))[candidate.place & (kChunk - 1)];
    };
    std::vector<int64_t> bins(size_t(1) << kBits);
    for (int64_t n = 0; n < count; ++n) ++bins[bin_of(candidates_[n])];
    int64_t last = int64_t(bins.size()) - 1;
    while (bins[last] < quota) quota -= bins[last--];
    Candidate* rest = candidates_.get();  // those of the last bin, moved to the front
    for (int64_t n = 0; n < count; ++n) {
      const Candidate candidate = candidates_[n];
      const int64_t bin = bin_of(candidate);
      flag(candidate) = bin > last;
      *rest = candidate;
      rest += bin == last;
    }
    std::nth_element(candidates_.get(), candidates_.get() + (quota - 1), rest);
    std::for_each(candidates_.get(), candidates_.get() + quota, [&](const Candidate& candidate) { flag(candidate) = 1; });
  }

  // Counts the keys inside the span by bins of equal width, into totals_; by chunk as well where the bins are few.
  Found count(const Span& span) {
    const int64_t bins = span.bins();
    const int shift = span.shift();
    const bool few = bins <= kFewBins;
    const int64_t workers = torch::stable::get_num_threads();
    std::vector<std::vector<uint32_t>> counts(few ? 0 : workers);
    std::vector<int64_t> seen(workers);
    std::vector<Found> parts(chunks_.size());
    std::mutex lock;
    totals_.assign(bins, 0);
    by_chunk_.assign(few ? bins * chunks_.size() : 0, 0);
    const auto flush = [&](int64_t w) {
      const std::lock_guard<std::mutex> guard(lock);
      for (int64_t b = 0; b < bins; ++b) totals_[b] += std::exchange(counts[w][b], 0);
      seen[w] = 0;
    };
    each([&](int64_t c, int64_t w, const U* score, const uint8_t* alive, int64_t n) {
      uint8_t inside[kBlock];
      if (!few && counts[w].empty()) counts[w].resize(bins);
      if (!few && seen[w] > int64_t(1) << 31) flush(w);
      seen[w] += n;
      uint16_t* mine = few ? by_chunk_.data() + c * bins : nullptr;
      Found found;
      for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
        const int64_t m = std::min(kBlock, n - i0);
        classify(score + i0, alive ? alive + i0 : nullptr, m, span, found, inside, [](int64_t, uint8_t) {});
        if (bins == 1)
          *mine = uint16_t(found.inside);
        else if (few)
          each_set(inside, m, [&](int64_t i) { ++mine[U(key_(score[i0 + i]) - span.low) >> shift]; });
        else
          each_set(inside, m, [&](int64_t i) { ++counts[w][U(key_(score[i0 + i]) - span.low) >> shift]; });
      }
      parts[c] = found;
    });
    for (size_t w = 0; w < counts.size(); ++w)
      if (!counts[w].empty()) flush(w);
    for (size_t n = 0; n < by_chunk_.size(); ++n) totals_[n % bins] += by_chunk_[n];
    return sum(parts);
  }

  // Replaces the span by the bin that holds the k-th key, and `above` by the number of keys above that bin; returns the bin.
  int64_t narrow(Span& span, int64_t k, int64_t& above) const {
    const int shift = span.shift();
    const int64_t last = int64_t(totals_.size()) - 1;
    int64_t bin = last;
    while (above + totals_[bin] < k) above += totals_[bin--];
    const U first = U(span.low + (U(bin) << shift));
    span = {first, bin == last ? span.high : U(first + ((U(1) << shift) - 1)), totals_[bin]};
    return bin;
  }

  // keep = alive and key >= from
  void write_chunk(uint8_t* keep, const U* score, const uint8_t* alive, int64_t n, U from) const {
    const auto key_of = key_;
    if (alive) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) keep[i] = (key_of(score[i]) >= from) & (alive[i] != 0);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) keep[i] = key_of(score[i]) >= from;
    }
  }

  // All keys above `tie`, and the first `quota` elements equal to it; `bin` is the one that held it in the last count.
  void write_ties(U tie, int64_t quota, int64_t bin) const {
    const int64_t bins = int64_t(totals_.size());
    std::vector<int64_t> before(chunks_.size() + 1);
    if (by_chunk_.empty())
      each([&](int64_t c, int64_t, const U* score, const uint8_t* alive, int64_t n) {
        int64_t equal = 0;
#pragma omp simd reduction(+ : equal)
        for (int64_t i = 0; i < n; ++i) equal += (key_(score[i]) == tie) & (!alive || alive[i]);
        before[c + 1] = equal;
      });
    else
      for (size_t c = 0; c < chunks_.size(); ++c) before[c + 1] = by_chunk_[c * bins + bin];
    for (size_t c = 0; c < chunks_.size(); ++c) before[c + 1] += before[c];
    each([&](int64_t c, int64_t, const U* score, const uint8_t* alive, int64_t n) {
      uint8_t* keep = out(c);
      int64_t left = quota - before[c];
      if (left >= before[c + 1] - before[c]) return write_chunk(keep, score, alive, n, tie);
      if (left <= 0) {
        if (tie == kMaxKey)
          std::fill_n(keep, n, uint8_t(0));
        else
          write_chunk(keep, score, alive, n, U(tie + 1));
        return;
      }
      for (int64_t i = 0; i < n; ++i) {
        const U key = key_(score[i]);
        const bool here = !alive || alive[i];
        keep[i] = here && (key > tie || (key == tie && left-- > 0));
      }
    });
  }

  KeyOf<T, MAGNITUDE> key_;
  std::vector<const U*> score_;
  std::vector<const uint8_t*> alive_;
  std::vector<uint8_t*> keep_;
  std::vector<Chunk> chunks_;
  int64_t total_ = 0;
  int64_t most_;  // candidates that are settled without another pass
  std::unique_ptr<Candidate[]> candidates_;
  std::vector<int64_t> totals_;      // keys in each bin of the last count
  std::vector<uint16_t> by_chunk_;  // the same [chunks, bins] where the bins are few
};

// Contiguous bool tensors of the shapes of `like`.
inline std::vector<Tensor> new_masks(const std::vector<Tensor>& like) {
  std::vector<Tensor> masks;
  for (const Tensor& t : like) masks.push_back(on_huge_pages(torch::stable::new_empty(t, t.sizes(), ScalarType::Bool)));
  return masks;
}

// Scores of one dtype and, where given, flags of their sizes; all contiguous.
inline void check_lists(const char* op, const std::vector<Tensor>& scores, const std::vector<Tensor>* flags) {
  check(!scores.empty(), op, "scores is empty");
  check_list(op, "scores", scores, scores, scores[0].scalar_type());
  if (flags) check_list(op, "the flags", *flags, scores, ScalarType::Bool);
}

}  // namespace acefast

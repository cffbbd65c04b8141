// Exact selection of k elements of a list of tensors, behind topk_mask, gumbel_topk and exchange.
//
// Scores become unsigned keys whose order is the order of selection, so "the largest k keys" is all that is left; it is
// found by radix digits without a sort. Pass 1 finds the smallest and the largest key, the alive count and NaN. A
// histogram pass over [low, high] with 2^16 bins, placed on that range and not on fixed bits, finds the bin that holds
// the k-th key; it is repeated inside that bin while the bin is large and holds several keys. Then one pass writes the
// masks and collects the bin's few elements, which are settled by (key, index); or, where the bin is one key, ties are
// counted per chunk and the first ones taken. All decisions are made on integers, so every thread count gives the same
// masks.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace acefast {

inline constexpr int64_t kChunk = 1 << 14;  // elements per task
inline constexpr int64_t kBlock = 256;      // elements per inner loop
inline constexpr int kDigitBits = 16;
inline constexpr int64_t kCandidates = 1 << 16;  // a bin up to this size is settled by comparison

template <class T>
using Key = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <class T>
struct KeyOf {
  using U = Key<T>;
  static constexpr U sign = U(U(1) << (8 * sizeof(U) - 1));
  static constexpr U infinity = std::is_same_v<T, double>     ? U(0x7FF0000000000000ull)
                                : std::is_same_v<T, float>    ? U(0x7F800000u)
                                : std::is_same_v<T, BFloat16> ? U(0x7F80u)
                                                              : U(0x7C00u);
  bool magnitude, largest;
  U flip = largest ? U(0) : U(~U(0));
  // Larger key = picked earlier; -0 and +0 have one key.
  U operator()(U bits) const {
    const U abs = bits & U(~sign);
    U key = abs;
    if (!magnitude) key = U(bits & sign ? sign - abs : sign + abs);
    return key ^ flip;
  }
  static bool nan(U bits) { return U(bits & U(~sign)) > infinity; }
};

struct Chunk {
  int64_t tensor, begin, end, first;  // first: index of its first element in the concatenation
};

template <class T, bool MAGNITUDE>
class Selection {
  using U = Key<T>;

 public:
  Selection(const std::vector<Tensor>& scores, const std::optional<std::vector<Tensor>>& alive,
            const std::vector<Tensor>& keep, bool largest)
      : key_{MAGNITUDE, largest} {
    int64_t first = 0;
    for (size_t t = 0; t < scores.size(); ++t) {
      score_.push_back(ptr<U>(scores[t]));
      alive_.push_back(alive ? ptr<uint8_t>((*alive)[t]) : nullptr);
      keep_.push_back(mutable_ptr<uint8_t>(keep[t]));
      const int64_t n = scores[t].numel();
      for (int64_t b = 0; b < n; b += kChunk) chunks_.push_back({int64_t(t), b, std::min(n, b + kChunk), first + b});
      first += n;
    }
  }

  // Writes the masks; returns the status bits.
  int32_t run(int64_t k) {
    bool nan = false;
    int64_t count = 0;
    U low = std::numeric_limits<U>::max(), high = 0;
    survey(nan, count, low, high);
    const int32_t status = int32_t(nan) | (k < 0 || k > count ? 2 : 0);
    if (status || k == 0) {
      fill_false();
      return status;
    }
    // Invariant: `above` keys exceed high, `inside` lie in [low, high], above < k <= above + inside.
    int64_t above = 0, inside = count;
    while (inside > k - above && low != high && (inside > kCandidates || inside == count))
      narrow(k, low, high, above, inside);
    if (inside == k - above)
      write_from(low);
    else if (low == high)
      write_ties(low, k - above);
    else
      write_candidates(low, high, k - above, inside);
    return 0;
  }

 private:
  // Calls f(chunk, scores, alive or nullptr, n) for each chunk in parallel.
  template <class F>
  void each(const F& f) const {
    parallel_tasks(int64_t(chunks_.size()), [&](int64_t c, int64_t worker) {
      const Chunk& chunk = chunks_[c];
      const uint8_t* alive = alive_[chunk.tensor];
      f(c, worker, score_[chunk.tensor] + chunk.begin, alive ? alive + chunk.begin : nullptr, chunk.end - chunk.begin);
    });
  }

  void survey(bool& nan, int64_t& count, U& low, U& high) const {
    struct Found {
      bool nan;
      int64_t count;
      U low, high;
    };
    std::vector<Found> found(chunks_.size());
    each([&](int64_t c, int64_t, const U* score, const uint8_t* alive, int64_t n) {
      U lo = std::numeric_limits<U>::max(), hi = 0, bad = 0;
      int64_t alive_count = n;
      if (alive) {
        U living = 0;  // a chunk's count fits the narrowest key
#pragma omp simd reduction(min : lo) reduction(max : hi) reduction(| : bad) reduction(+ : living)
        for (int64_t i = 0; i < n; ++i) {
          const U one = U(alive[i]), here = U(U(0) - one), key = key_(score[i]);  // bool storage is 0 or 1
          lo = std::min<U>(lo, U(key | U(~here)));
          hi = std::max<U>(hi, U(key & here));
          bad |= U(KeyOf<T>::nan(score[i])) & one;
          living += one;
        }
        alive_count = int64_t(living);
      } else {
#pragma omp simd reduction(min : lo) reduction(max : hi) reduction(| : bad)
        for (int64_t i = 0; i < n; ++i) {
          const U key = key_(score[i]);
          lo = std::min<U>(lo, key);
          hi = std::max<U>(hi, key);
          bad |= U(KeyOf<T>::nan(score[i]));
        }
      }
      found[c] = {bad != 0, alive_count, lo, hi};
    });
    for (const Found& f : found) {
      nan |= f.nan;
      count += f.count;
      low = std::min(low, f.low);
      high = std::max(high, f.high);
    }
  }

  // One digit: replaces [low, high] by the bin that holds the k-th key.
  void narrow(int64_t k, U& low, U& high, int64_t& above, int64_t& inside) const {
    const U range = high - low;
    int shift = 0;
    while (uint64_t(range >> shift) >> kDigitBits) ++shift;
    const uint32_t bins = uint32_t(range >> shift) + 1;
    const int64_t workers = torch::stable::get_num_threads();
    std::vector<std::vector<uint32_t>> counts(workers);
    std::vector<std::vector<int64_t>> totals(workers);
    std::vector<int64_t> seen(workers);
    auto flush = [&](int64_t w) {
      if (totals[w].empty()) totals[w].resize(bins);
      for (uint32_t b = 0; b < bins; ++b) totals[w][b] += counts[w][b];
      std::fill(counts[w].begin(), counts[w].end(), 0);
      seen[w] = 0;
    };
    each([&](int64_t, int64_t w, const U* score, const uint8_t* alive, int64_t n) {
      if (counts[w].empty()) counts[w].resize(bins + 1);  // the last bin takes what lies outside
      if (seen[w] > int64_t(1) << 31) flush(w);
      seen[w] += n;
      uint32_t* h = counts[w].data();
      uint32_t bin[kBlock];
      for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
        const int64_t m = std::min(kBlock, n - i0);
        if (alive) {
#pragma omp simd
          for (int64_t i = 0; i < m; ++i) {
            const U at = U(key_(score[i0 + i]) - low);
            bin[i] = (at <= range) & bool(alive[i0 + i]) ? uint32_t(at >> shift) : bins;
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < m; ++i) {
            const U at = U(key_(score[i0 + i]) - low);
            bin[i] = at <= range ? uint32_t(at >> shift) : bins;
          }
        }
        for (int64_t i = 0; i < m; ++i) ++h[bin[i]];
      }
    });
    for (int64_t w = 0; w < workers; ++w)
      if (!counts[w].empty()) flush(w);
    for (int64_t b = int64_t(bins) - 1; b >= 0; --b) {
      int64_t in_bin = 0;
      for (const auto& t : totals) in_bin += t.empty() ? 0 : t[b];
      if (above + in_bin >= k) {
        inside = in_bin;
        const U first = U(low + (U(b) << shift));
        high = b == int64_t(bins) - 1 ? high : U(first + ((U(1) << shift) - 1));
        low = first;
        return;
      }
      above += in_bin;
    }
  }

  void fill_false() const {
    each([&](int64_t c, int64_t, const U*, const uint8_t*, int64_t n) { std::fill_n(out(c), n, uint8_t(0)); });
  }

  uint8_t* out(int64_t c) const { return keep_[chunks_[c].tensor] + chunks_[c].begin; }

  // keep = alive and key >= from
  void write_chunk(uint8_t* keep, const U* score, const uint8_t* alive, int64_t n, U from) const {
    if (alive) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) keep[i] = (key_(score[i]) >= from) & (alive[i] != 0);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) keep[i] = key_(score[i]) >= from;
    }
  }

  void write_from(U from) const {
    each([&](int64_t c, int64_t, const U* score, const uint8_t* alive, int64_t n) {
      write_chunk(out(c), score, alive, n, from);
    });
  }

  // Elements in [low, high] of a block, alive ones only.
  int64_t count_inside(const U* score, const uint8_t* alive, int64_t n, U low, U range) const {
    U in = 0;
    if (alive) {
      int64_t total = 0;
      for (int64_t i = 0; i < n; ++i) total += (U(key_(score[i]) - low) <= range) & (alive[i] != 0);
      return total;
    }
#pragma omp simd reduction(+ : in)
    for (int64_t i = 0; i < n; ++i) in += U(U(key_(score[i]) - low) <= range);
    return int64_t(in);
  }

  // All keys above `tie`, and the first `quota` elements equal to it.
  void write_ties(U tie, int64_t quota) const {
    std::vector<int64_t> before(chunks_.size() + 1);
    each([&](int64_t c, int64_t, const U* score, const uint8_t* alive, int64_t n) {
      before[c + 1] = count_inside(score, alive, n, tie, 0);
    });
    for (size_t c = 0; c < chunks_.size(); ++c) before[c + 1] += before[c];
    each([&](int64_t c, int64_t, const U* score, const uint8_t* alive, int64_t n) {
      uint8_t* keep = out(c);
      int64_t left = quota - before[c];
      if (left >= before[c + 1] - before[c]) return write_chunk(keep, score, alive, n, tie);
      if (left <= 0) {
        if (tie == std::numeric_limits<U>::max())
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

  // All keys above `high`, and `quota` of the `inside` elements in [low, high], by key and then by index.
  void write_candidates(U low, U high, int64_t quota, int64_t inside) const {
    struct Candidate {
      U key;
      int64_t chunk, at;
    };
    const U range = high - low;
    std::vector<std::vector<Candidate>> found(torch::stable::get_num_threads());
    each([&](int64_t c, int64_t w, const U* score, const uint8_t* alive, int64_t n) {
      uint8_t* keep = out(c);
      if (high == std::numeric_limits<U>::max())
        std::fill_n(keep, n, uint8_t(0));
      else
        write_chunk(keep, score, alive, n, U(high + 1));
      for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
        const int64_t m = std::min(kBlock, n - i0);
        if (!count_inside(score + i0, nullptr, m, low, range)) continue;
        for (int64_t i = i0; i < i0 + m; ++i) {
          const U key = key_(score[i]);
          if (U(key - low) <= range && (!alive || alive[i])) found[w].push_back({key, c, i});
        }
      }
    });
    std::vector<Candidate> all;
    all.reserve(inside);
    for (const auto& list : found) all.insert(all.end(), list.begin(), list.end());
    std::nth_element(all.begin(), all.begin() + quota, all.end(), [](const Candidate& a, const Candidate& b) {
      if (a.key != b.key) return a.key > b.key;
      return a.chunk != b.chunk ? a.chunk < b.chunk : a.at < b.at;
    });
    for (int64_t q = 0; q < quota; ++q) out(all[q].chunk)[all[q].at] = 1;
  }

  KeyOf<T> key_;
  std::vector<const U*> score_;
  std::vector<const uint8_t*> alive_;
  std::vector<uint8_t*> keep_;
  std::vector<Chunk> chunks_;
};

// Contiguous bool tensors of the shapes of `like`.
inline std::vector<Tensor> new_masks(const std::vector<Tensor>& like) {
  std::vector<Tensor> masks;
  for (const Tensor& t : like) masks.push_back(torch::stable::new_empty(t, t.sizes(), ScalarType::Bool));
  return masks;
}

// Scores of one dtype and, where given, flags of their sizes; all contiguous.
inline void check_lists(const char* op, const std::vector<Tensor>& scores, const std::vector<Tensor>* flags) {
  check(!scores.empty(), op, "scores is empty");
  check(!flags || flags->size() == scores.size(), op, "the flags must have as many tensors as the scores");
  for (size_t t = 0; t < scores.size(); ++t) {
    check_dtype(op, "every score", scores[t], scores[0].scalar_type());
    check(scores[t].is_contiguous(), op, "every score must be contiguous");
    if (!flags) continue;
    check_dtype(op, "every flag", (*flags)[t], ScalarType::Bool);
    check((*flags)[t].is_contiguous() && (*flags)[t].numel() == scores[t].numel(), op,
          "the flags must have the scores' shapes");
  }
}

}  // namespace acefast

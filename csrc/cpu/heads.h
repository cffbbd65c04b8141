// Per-edge values with heads, in vectors: the entries of a batch lie one after the other in a buffer, `pitch` elements
// apart, so that a vector covers the heads of `step` entries, or `blocks` vectors cover the heads of one.
#pragma once

#include <cmath>

#include "cpu/exp.h"
#include "cpu/gather.h"
#include "cpu/random.h"

namespace acefast {

// What a row's logits are lowered by: their largest, 0 where there is none.
template <class A>
A finite_or_zero(A top) {
  return std::isfinite(top) ? top : A(0);
}

// Loads and stores of `n` elements, 1 to a whole vector.
template <class A>
Vec<A> load_some(const A* p, int64_t n) {
  return n == kLanesOf<A> ? load(p) : load_tail(p, int(n));
}
template <class A>
void store_some(A* p, Vec<A> v, int64_t n) {
  n == kLanesOf<A> ? store(p, v) : store_tail(p, v, int(n));
}

template <class A>
struct HeadLanes {
  static constexpr int64_t L = kLanesOf<A>;
  int64_t H = 0;  // heads, at least 1
  int64_t pitch = 0, step = 0, blocks = 0;
  IntVec<A> lane, entry, head;  // of each lane: its number, and the entry and the head that lie there

  explicit HeadLanes(int64_t heads) : H(heads) {
    pitch = 1;
    while (pitch < H && pitch < L) pitch *= 2;
    if (pitch < H) pitch = (H + L - 1) / L * L;
    step = std::max<int64_t>(1, L / pitch);
    blocks = std::max<int64_t>(1, pitch / L);
    for (int l = 0; l < int(L); ++l) lane[l] = l;
    entry = lane / int(pitch);
    head = lane % int(pitch);
  }

  // Entries of a batch whose buffers stay in the L2 cache.
  int64_t entries() const { return std::clamp<int64_t>(8192 / pitch, 64, kBatch); }
  std::vector<A> buffer() const { return std::vector<A>(entries() * pitch + L); }

  int64_t heads_of(int64_t block) const { return std::min(L, H - block * L); }

  // The heads of `block`, p their first, once for every entry of a vector.
  Vec<A> repeat(const A* p, int64_t block) const {
    const Vec<A> v = load_some(p, heads_of(block));
    return step == 1 ? v : __builtin_shuffle(v, head);
  }

  // v with `other` in the lanes of entries from `count` on.
  Vec<A> first(Vec<A> v, int64_t count, A other) const {
    return entry < int(std::min(count, step)) ? v : splat(other);
  }

  // The entries of a vector joined; out: the first head of `block`.
  template <class Join>
  void fold(Vec<A> v, int64_t block, A* out, const Join& join) const {
    for (int64_t s = step / 2; s >= 1; s /= 2) v = join(v, __builtin_shuffle(v, lane + int(s * pitch)));
    store_some(out, v, heads_of(block));
  }
  void fold_sum(Vec<A> v, int64_t block, A* out) const {
    fold(v, block, out, [](Vec<A> a, Vec<A> b) { return a + b; });
  }
  void fold_max(Vec<A> v, int64_t block, A* out) const {
    fold(v, block, out, [](Vec<A> a, Vec<A> b) { return vmax<A>(a, b); });
  }

  // out <- the rows `idx` of table, `stride` elements apart. Lanes after the last head are 0.
  void copy(const A* table, int64_t stride, const int64_t* idx, int64_t n, A* out) const {
    for (int64_t k = 0; k < n; ++k) {
      const A* p = table + idx[k] * stride;
      for (int64_t block = 0; block < blocks; ++block)
        store(out + k * pitch + block * L, load_some(p + block * L, heads_of(block)));
    }
  }

  // out <- value[id] in every head.
  void spread(const A* value, const int64_t* id, int64_t n, A* out) const {
    for (int64_t k = 0; k < n; ++k)
      for (int64_t block = 0; block < blocks; ++block) store(out + k * pitch + block * L, splat(value[id[k]]));
  }
};

// Dropout of element (e, h): word e * H + h of the Philox stream (seed, step).
template <class A>
class EdgeDropout {
 public:
  EdgeDropout(double p, uint64_t seed, uint64_t step)
      : p_(p), seed_(seed), step_(step), threshold_(p < 1 ? drop_threshold(p) : 0) {}

  explicit operator bool() const { return p_ > 0; }

  // out <- 1 / (1 - p) where the element is kept, else 0.
  void fill(const HeadLanes<A>& lanes, const int64_t* id, int64_t n, A* out) {
    const int64_t H = lanes.H;
    const A scale = p_ < 1 ? A(1.0 / (1.0 - p_)) : A(0);
    block_.resize(kEdges * (H / 4 + 2) + kPhiloxBlocks);
    word_.resize(4 * block_.size());
    for (int64_t k0 = 0; k0 < n; k0 += kEdges) {
      const int64_t k1 = std::min(k0 + kEdges, n);
      int64_t first[kEdges], count = 0;  // of the words of each edge; blocks so far
      for (int64_t k = k0; k < k1; ++k) {
        const uint64_t begin = uint64_t(id[k]) * H, last = (begin + H - 1) / 4;
        uint64_t block = begin / 4;
        if (count && block_[count - 1] == block) --count;
        first[k - k0] = 4 * count + int64_t(begin % 4);
        for (; block <= last; ++block) block_[count++] = block;
      }
      for (int64_t c = 0; c < count; c += kPhiloxBlocks)
        philox_words(seed_, step_, [&](int b) { return block_[c + b]; }, word_.data() + 4 * c);
      for (int64_t k = k0; k < k1; ++k) {
        const uint32_t* w = word_.data() + first[k - k0];
        for (int64_t h = 0; h < H; ++h) out[k * lanes.pitch + h] = w[h] >= threshold_ ? scale : A(0);
      }
    }
  }

 private:
  static constexpr int64_t kEdges = 64;
  double p_;
  uint64_t seed_, step_;
  uint32_t threshold_;
  std::vector<uint64_t> block_;
  std::vector<uint32_t> word_;
};

}  // namespace acefast

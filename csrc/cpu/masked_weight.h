// What masked_linear and masked_linear_csr share: the masked weight W * m * keep [O, K], dense or as lists of its kept
// entries, and conversions between storage and accumulator types.
#pragma once

#include <memory>
#include <vector>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace acefast {

template <class T>
struct MaskedWeight {
  using A = acc_t<T>;
  const T* weight;
  const A* mask;        // or nullptr
  const uint8_t* keep;  // or nullptr
  int64_t O, K;

  A kept(int64_t at) const { return A(weight[at]) * (mask ? mask[at] : A(1)); }  // of an entry that is kept

  // out[k] = entry (o, k0 + k) for k < n
  void row(int64_t o, int64_t k0, int64_t n, A* __restrict out) const {
    const int64_t at = o * K + k0;
    for (int64_t k = 0; k < n; ++k) out[k] = A(weight[at + k]);
    if (mask)
      for (int64_t k = 0; k < n; ++k) out[k] *= mask[at + k];
    if (keep)
      for (int64_t k = 0; k < n; ++k) out[k] = keep[at + k] ? out[k] : A(0);
  }

  // The share of kept entries.
  double density() const {
    if (!keep || O * K == 0) return 1;
    std::vector<int64_t> kept(O);
    parallel_range(O, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(K, 1)), [&](int64_t o0, int64_t o1) {
      for (int64_t o = o0; o < o1; ++o) {
        int64_t n = 0;
        for (int64_t k = 0; k < K; ++k) n += keep[o * K + k] != 0;
        kept[o] = n;
      }
    });
    int64_t total = 0;
    for (const int64_t n : kept) total += n;
    return double(total) / double(O * K);
  }

  // [O, K] as it lies.
  void dense(A* out) const {
    parallel_range(O, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(K, 1)), [&](int64_t o0, int64_t o1) {
      for (int64_t o = o0; o < o1; ++o) row(o, 0, K, out + o * K);
    });
  }

  // Transposed, in panels of `width` columns: out[panel][k][w] = entry (panel * width + w, k); the last panel is
  // narrower.
  void transposed(A* out, int64_t width) const {
    constexpr int64_t B = 64;
    const int64_t k_blocks = (K + B - 1) / B, o_blocks = (O + B - 1) / B;
    parallel_tasks(k_blocks * o_blocks, [&](int64_t task, int64_t) {
      const int64_t k0 = task / o_blocks * B, o0 = task % o_blocks * B, kn = std::min(B, K - k0),
                    on = std::min(B, O - o0);
      A tile[B][B + 1];
      for (int64_t o = 0; o < on; ++o) row(o0 + o, k0, kn, tile[o]);
      for (int64_t k = 0; k < kn; ++k) {
        for (int64_t o = 0; o < on;) {
          const int64_t panel = (o0 + o) / width, w = (o0 + o) % width, wide = std::min(width, O - panel * width);
          A* to = out + panel * width * K + (k0 + k) * wide + w;
          const int64_t n = std::min(on - o, wide - w);
          for (int64_t i = 0; i < n; ++i) to[i] = tile[o + i][k];
          o += n;
        }
      }
    });
  }
};

// Calls f(i) for each i < n with keep[i], ascending; eight removed ones cost one comparison.
template <class F>
void for_kept(const uint8_t* keep, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t word;
    std::memcpy(&word, keep + i, 8);
    if (!word) continue;
    for (int64_t j = i; j < i + 8; ++j)
      if (keep[j]) f(j);
  }
  for (; i < n; ++i)
    if (keep[i]) f(i);
}

// A kept entry of a row or column of the masked weight: the other index, and its value.
template <class A>
struct Entry {
  int32_t at;
  A value;
};

template <class A>
struct EntryList {
  const Entry<A>*begin, *end;
};

// Kept entries of the masked weight, listed by column k (BY_COLUMN: (o, value)) or by row o ((k, value)), ascending.
template <class A>
struct KeptLists {
  std::vector<const Entry<A>*> begin, end;
  std::vector<std::vector<Entry<A>>> storage;

  template <class T>
  static KeptLists by_row(const MaskedWeight<T>& w) {
    KeptLists lists(w.O, w.O);
    parallel_tasks(w.O, [&](int64_t o, int64_t) {
      auto& list = lists.storage[o];
      for_kept(w.keep + o * w.K, w.K, [&](int64_t k) { list.push_back({int32_t(k), w.kept(o * w.K + k)}); });
      lists.begin[o] = list.data();
      lists.end[o] = list.data() + list.size();
    });
    return lists;
  }

  template <class T>
  static KeptLists by_column(const MaskedWeight<T>& w) {
    constexpr int64_t B = 64;
    const int64_t blocks = (w.K + B - 1) / B;
    KeptLists lists(w.K, blocks);
    parallel_tasks(blocks, [&](int64_t block, int64_t) {
      const int64_t k0 = block * B, n = std::min(B, w.K - k0);
      int64_t at[B + 1] = {};
      for (int64_t o = 0; o < w.O; ++o) for_kept(w.keep + o * w.K + k0, n, [&](int64_t k) { ++at[k + 1]; });
      for (int64_t k = 0; k < n; ++k) at[k + 1] += at[k];
      auto& list = lists.storage[block];
      list.resize(at[n]);
      for (int64_t k = 0; k < n; ++k) {
        lists.begin[k0 + k] = list.data() + at[k];
        lists.end[k0 + k] = list.data() + at[k + 1];
      }
      for (int64_t o = 0; o < w.O; ++o)
        for_kept(w.keep + o * w.K + k0, n, [&](int64_t k) { list[at[k]++] = {int32_t(o), w.kept(o * w.K + k0 + k)}; });
    });
    return lists;
  }

 private:
  KeptLists(int64_t lists, int64_t parts) : begin(lists), end(lists), storage(parts) {}
};

// y_n = sum over the entries (k, v) of row n of x of v * column k of the weight (+ bias); list(k) gives the kept entries of
// column k. x [N rows] as ptr, idx, value.
template <class A, class T, class I, class List>
void kept_product(const int64_t* ptr, const I* idx, const T* value, int64_t N, int64_t O, const A* bias, T* y,
                  const List& list) {
  const auto bounds = split_rows(ptr, N, 512, 4);
  parallel_tasks(int64_t(bounds.size()) - 1, [&](int64_t t, int64_t) {
    std::vector<A> sums(O);
    A* sum = sums.data();
    for (int64_t n = bounds[t]; n < bounds[t + 1]; ++n) {
      if (bias)
        std::copy_n(bias, O, sum);
      else
        std::fill_n(sum, O, A(0));
      for (int64_t s = ptr[n]; s < ptr[n + 1]; ++s) {
        const A x = A(value[s]);
        const EntryList<A> entries = list(idx[s]);
#pragma GCC unroll 4
        for (const Entry<A>* e = entries.begin; e < entries.end; ++e) sum[uint32_t(e->at)] += x * e->value;
      }
      for (int64_t o = 0; o < O; ++o) y[n * O + o] = T(sum[o]);
    }
  });
}

// Calls put(k, number in the list, entry, sum over the entries (n, v) of column k of x of v * dy[n, at]) for every kept entry
// of every column. x by columns as ptr, idx, value; dy [., O].
template <class A, class T, class I, class List, class Put>
void kept_gradient(const int64_t* ptr, const I* idx, const T* value, int64_t K, int64_t O, const T* dy, const List& list,
                   const Put& put) {
  const auto bounds = split_rows(ptr, K, 512, 4);
  parallel_tasks(int64_t(bounds.size()) - 1, [&](int64_t t, int64_t) {
    std::vector<A> sums(O);
    for (int64_t k = bounds[t]; k < bounds[t + 1]; ++k) {
      const EntryList<A> entries = list(k);
      const int64_t n = entries.end - entries.begin;
      sums.assign(std::max(n, O), A(0));
      A* sum = sums.data();
      for (int64_t s = ptr[k]; s < ptr[k + 1]; ++s) {
        const A x = A(value[s]);
        const T* g = dy + int64_t(idx[s]) * O;
#pragma omp simd
        for (int64_t e = 0; e < n; ++e) sum[e] += x * A(g[uint32_t(entries.begin[e].at)]);
      }
      for (int64_t e = 0; e < n; ++e) put(k, e, entries.begin[e], sum[e]);
    }
  });
}

// out[i] = A(in[i])
template <class T, class A>
void widen(const T* in, A* out, int64_t n) {
  constexpr int L = kLanesOf<A>;
  parallel_range(n, 1 << 15, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + L <= end; i += L) store(out + i, load(in + i));
    for (; i < end; ++i) out[i] = A(in[i]);
  });
}

// out[i] = T(in[i])
template <class T, class A>
void narrow_to(const A* in, T* out, int64_t n) {
  constexpr int L = kLanesOf<A>;
  parallel_range(n, 1 << 15, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + L <= end; i += L) store(out + i, load(in + i));
    for (; i < end; ++i) out[i] = T(in[i]);
  });
}

// p itself where T = A, else a widened copy held by `held`.
template <class T, class A>
const A* as_acc(const T* p, int64_t n, std::unique_ptr<Scratch<A>>& held) {
  if constexpr (std::is_same_v<T, A>) {
    return p;
  } else {
    held = std::make_unique<Scratch<A>>(n);
    widen(p, held->get(), n);
    return held->get();
  }
}

// An output of type T that is computed in the accumulator type: the tensor's own memory where they are one type, else
// scratch that finish() rounds into it.
template <class T>
class AccOutput {
  using A = acc_t<T>;

 public:
  explicit AccOutput(const Tensor& t) : out_(mutable_ptr<T>(t)), n_(t.numel()) {
    if (!std::is_same_v<T, A>) scratch_ = std::make_unique<Scratch<A>>(n_);
  }
  A* get() const {
    if constexpr (std::is_same_v<T, A>)
      return out_;
    else
      return scratch_->get();
  }
  void finish() const {
    if constexpr (!std::is_same_v<T, A>) narrow_to(scratch_->get(), out_, n_);
  }

 private:
  T* out_;
  int64_t n_;
  std::unique_ptr<Scratch<A>> scratch_;
};

}  // namespace acefast

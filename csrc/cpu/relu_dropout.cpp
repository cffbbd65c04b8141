// relu_dropout and elu_dropout on the CPU: see csrc/ops.h.
#include <cmath>

#include "cpu/exp.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/random.h"

namespace acefast {
namespace {

constexpr int64_t kPiece = 1 << 14;        // elements per task, a multiple of kWords
constexpr int kWords = 4 * kPhiloxBlocks;  // words made at once

template <class A>
struct WordsOf {
  typedef uint32_t type __attribute__((vector_size(4 * kLanesOf<A>)));
};
template <class A>
using Words = typename WordsOf<A>::type;  // a word per lane of Vec<A>

// What acts before the dropout. `value`: of a kept element, times scale; `gradient`: dy times the derivative of that, from
// the output y, which is 0 where the element was dropped.
struct Relu {
  static constexpr const char* kOp = "relu_dropout";
  template <class A>
  static Vec<A> value(Vec<A> x, A scale) {
    return x > A(0) ? x * scale : Vec<A>{};
  }
  template <class A>
  static Vec<A> gradient(Vec<A> dy, Vec<A> y, A scale) {
    return y > A(0) ? dy * scale : Vec<A>{};
  }
};

// A kept zero is written as -0, which tells it from a dropped element.
struct Elu {
  static constexpr const char* kOp = "elu_dropout";
  template <class A>
  static Vec<A> value(Vec<A> x, A scale) {
    const Vec<A> below = vexpm1_negative<A>(vmin<A>(Vec<A>{}, x)) * scale;
    const IntVec<A> sign = (IntVec<A>{} + 1) << (8 * int(sizeof(A)) - 1);
    return x > A(0) ? x * scale : bits<Vec<A>>(bits<IntVec<A>>(below) | sign);
  }
  template <class A>
  static Vec<A> gradient(Vec<A> dy, Vec<A> y, A scale) {
    return y > A(0) ? dy * scale : (bits<IntVec<A>>(y) == 0 ? Vec<A>{} : dy * (y + scale));
  }
};

// y = words >= threshold ? the activation's value : 0 for m <= kWords elements.
template <class Activation, class T, class A>
void forward_block(const T* x, T* y, int64_t m, const uint32_t* words, uint32_t threshold, A scale) {
  constexpr int L = kLanesOf<A>;
  for (int64_t i = 0; i < m; i += L) {
    const int n = int(std::min<int64_t>(L, m - i));
    Words<A> w;
    std::memcpy(&w, words + i, sizeof w);
    const Vec<A> v = Activation::template value<A>(n == L ? load(x + i) : load_tail(x + i, n), scale);
    const Vec<A> out = bits<Vec<A>>(bits<IntVec<A>>(v) & __builtin_convertvector(w >= threshold, IntVec<A>));
    n == L ? store(y + i, out) : store_tail(y + i, out, n);
  }
}

// rows of F elements, the first one of row r with the number first(r). Words are made for whole batches of blocks, which
// may span many short rows.
template <class Activation, class T, class First>
void forward(const T* x, T* y, int64_t rows, int64_t F, const First& first, double p, uint64_t seed, uint64_t step) {
  using A = acc_t<T>;
  if (p >= 1) {
    std::memset(static_cast<void*>(y), 0, size_t(rows * F) * sizeof(T));
    return;
  }
  const A scale = A(1.0 / (1.0 - p));
  const uint32_t threshold = drop_threshold(p);
  uint32_t words[kWords + kLanesOf<A>] = {};  // the last lanes' may lie beyond
  uint64_t counters[kPhiloxBlocks] = {};
  struct {
    int64_t at, m;
    int word;
  } parts[kPhiloxBlocks];  // m elements from x[at] on, whose words begin at words[word]
  int blocks = 0, count = 0;
  const auto flush = [&] {
    if (threshold) philox_words(seed, step, [&](int b) { return counters[b]; }, words);
    for (int k = 0; k < count; ++k)
      forward_block<Activation, T, A>(x + parts[k].at, y + parts[k].at, parts[k].m, words + parts[k].word, threshold, scale);
    blocks = count = 0;
  };
  for (int64_t r = 0; r < rows; ++r) {
    const uint64_t number = first(r);
    for (int64_t i = 0; i < F;) {
      const uint64_t block = (number + uint64_t(i)) / 4;
      const int skip = int((number + uint64_t(i)) % 4);  // words of the first block that are other elements'
      const int64_t m = std::min<int64_t>(4 * (kPhiloxBlocks - blocks) - skip, F - i);
      parts[count++] = {r * F + i, m, 4 * blocks + skip};
      const int more = int((skip + m + 3) / 4);
      for (int b = 0; b < more; ++b) counters[blocks + b] = block + uint64_t(b);
      blocks += more;
      i += m;
      if (blocks == kPhiloxBlocks) flush();
    }
  }
  flush();
}

template <class Activation, class T>
void backward(const T* dy, const T* y, T* dx, int64_t n, double p) {
  using A = acc_t<T>;
  constexpr int L = kLanesOf<A>;
  const A scale = p < 1 ? A(1.0 / (1.0 - p)) : A(0);
  parallel_range(n, kPiece, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + L <= end; i += L) store(dx + i, Activation::template gradient<A>(load(dy + i), load(y + i), scale));
    if (i == end) return;
    const int rest = int(end - i);
    const Vec<A> out = Activation::template gradient<A>(load_tail(dy + i, rest), load_tail(y + i, rest), scale);
    store_tail(dx + i, out, rest);
  });
}

template <class Activation>
Tensor activation_dropout(const Tensor& x, const OptTensor& rows, double p, int64_t seed, int64_t step,
                          const OptTensor& step_at) {
  const char* op = Activation::kOp;
  check(x.is_contiguous(), op, "x is not contiguous");
  check(p >= 0 && p <= 1, op, "p must lie in [0, 1]");
  check(!rows || x.dim() >= 1, op, "x must have rows");
  check_optional(op, "rows", rows, x, ScalarType::Long, {x.dim() ? x.size(0) : 1});
  check_optional(op, "step_at", step_at, x, ScalarType::Long, {1});
  Tensor y = torch::stable::empty_like(x);
  advise_huge(y.mutable_data_ptr(), x.numel() * int64_t(x.element_size()));
  if (x.numel() == 0) return y;
  const uint64_t now = Step{uint64_t(step), ptr<int64_t>(step_at)}.read();
  dispatch_float(op, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* in = ptr<T>(x);
    T* out = mutable_ptr<T>(y);
    const auto run = [&](int64_t begin, int64_t rows, int64_t F, const auto& first) {
      forward<Activation>(in + begin, out + begin, rows, F, first, p, uint64_t(seed), now);
    };
    if (!rows) {
      parallel_range(x.numel(), kPiece, [&](int64_t begin, int64_t end) {
        run(begin, 1, end - begin, [&](int64_t) { return uint64_t(begin); });
      });
      return;
    }
    const int64_t N = x.size(0), F = x.numel() / N;
    const int64_t* number = ptr<int64_t>(*rows);
    parallel_range(N, std::max<int64_t>(1, kPiece / F), [&](int64_t begin, int64_t end) {
      run(begin * F, end - begin, F, [&](int64_t r) { return uint64_t(number[begin + r] * F); });
    });
  });
  return y;
}

template <class Activation>
Tensor activation_dropout_bwd(const Tensor& dy, const Tensor& y, double p) {
  const char* op = Activation::kOp;
  check(dy.is_contiguous() && y.is_contiguous(), op, "dy and y must be contiguous");
  check(dy.numel() == y.numel() && dy.scalar_type() == y.scalar_type(), op, "dy must have y's shape and dtype");
  check(p >= 0 && p <= 1, op, "p must lie in [0, 1]");
  Tensor dx = torch::stable::empty_like(dy);
  advise_huge(dx.mutable_data_ptr(), dy.numel() * int64_t(dy.element_size()));
  dispatch_float(op, y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    backward<Activation>(ptr<T>(dy), ptr<T>(y), mutable_ptr<T>(dx), y.numel(), p);
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("relu_dropout", TORCH_BOX(&activation_dropout<Relu>));
  m.impl("relu_dropout_bwd", TORCH_BOX(&activation_dropout_bwd<Relu>));
  m.impl("elu_dropout", TORCH_BOX(&activation_dropout<Elu>));
  m.impl("elu_dropout_bwd", TORCH_BOX(&activation_dropout_bwd<Elu>));
}

}  // namespace acefast

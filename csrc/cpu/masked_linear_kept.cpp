// masked_linear_kept on the CPU: see csrc/ops.h. Each entry of x adds its value times the kept entries of its column; or, tiled,
// as many rows as a vector has lanes lie side by side, and each kept weight adds its column of them to its output's.
#include <algorithm>
#include <numeric>
#include <utility>

#include "cpu/masked_weight.h"

namespace acefast {
namespace {

struct KeptArgs {
  int64_t N, K, P;
};

KeptArgs check_kept(const char* op, const Tensor& rowptr, const Tensor& col, const Tensor& value, const Tensor& colptr,
                    const Tensor& row, const Tensor& cvalue, const Tensor& weight, const Tensor& ptr, const Tensor& out,
                    const Tensor& place) {
  check(rowptr.dim() == 1 && rowptr.size(0) >= 1 && ptr.dim() == 1 && ptr.size(0) >= 1, op,
        "rowptr and ptr must have one dimension and at least one entry");
  check(col.dim() == 1 && out.dim() == 1 && weight.dim() == 1, op, "col, out and weight must have one dimension");
  const KeptArgs n{rowptr.size(0) - 1, ptr.size(0) - 1, out.size(0)};
  for (const auto& [name, t, dtype, size] : {
           std::tuple("rowptr", &rowptr, ScalarType::Long, n.N + 1), std::tuple("colptr", &colptr, ScalarType::Long, n.K + 1),
           std::tuple("ptr", &ptr, ScalarType::Long, n.K + 1), std::tuple("row", &row, col.scalar_type(), col.size(0)),
           std::tuple("value", &value, weight.scalar_type(), col.size(0)),
           std::tuple("cvalue", &cvalue, weight.scalar_type(), col.size(0)),
           std::tuple("out", &out, ScalarType::Int, n.P), std::tuple("place", &place, ScalarType::Long, n.P)}) {
    check_tensor(op, name, *t, col, {size});
    check_dtype(op, name, *t, dtype);
  }
  check_tensor(op, "weight", weight, col, {weight.size(0)});
  return n;
}

template <class T, class A = acc_t<T>>
class Entries {
 public:
  Entries(const T* weight, const int64_t* ptr, const int32_t* out, const int64_t* place, int64_t P)
      : entries_(P), ptr_(ptr) {
    parallel_range(P, 1 << 13, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) entries_.get()[e] = {out[e], A(weight[place[e]])};
    });
  }
  EntryList<A> operator()(int64_t k) const { return {entries_.get() + ptr_[k], entries_.get() + ptr_[k + 1]}; }

 private:
  Scratch<Entry<A>> entries_;
  const int64_t* ptr_;
};

// The kept entries (k, value) of each output, ascending. Outputs come in the order of how many they have: loops of equal length
// follow each other, which branch prediction wants.
template <class A>
struct ByOutput {
  std::vector<int32_t> output;       // [O]
  std::vector<int64_t> begin;        // [O + 1], by place in `output`
  std::vector<Entry<A>> entries;

  template <class T>
  ByOutput(const T* weight, const int64_t* ptr, const int32_t* out, const int64_t* place, int64_t K, int64_t O)
      : output(O), begin(O + 1), entries(ptr[K]) {
    std::vector<int64_t> count(O), at(O);
    for (int64_t e = 0; e < ptr[K]; ++e) ++count[out[e]];
    std::iota(output.begin(), output.end(), 0);
    std::stable_sort(output.begin(), output.end(), [&](int32_t a, int32_t b) { return count[a] < count[b]; });
    for (int64_t j = 0; j < O; ++j) begin[j + 1] = (at[output[j]] = begin[j]) + count[output[j]];
    for (int64_t k = 0; k < K; ++k)
      for (int64_t e = ptr[k]; e < ptr[k + 1]; ++e) entries[at[out[e]]++] = {int32_t(k), A(weight[place[e]])};
  }
};

// Lane l of the result: a's where l has not the bit `step`, else that of b which lies `step` before; and the other half.
template <int step, class V, int... l>
V low_parts(V a, V b, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(a, b, (l & step ? int(sizeof...(l)) + l - step : l)...);
}
template <int step, class V, int... l>
V high_parts(V a, V b, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(a, b, (l & step ? int(sizeof...(l)) + l : l + step)...);
}

// v[i] lane j <-> v[j] lane i
template <class A, int step = kLanesOf<A> / 2>
inline void transpose(Vec<A>* v) {
  if constexpr (step > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanesOf<A>>{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanesOf<A>; ++i) {
      if (i & step) continue;
      const Vec<A> a = v[i], b = v[i + step];
      v[i] = low_parts<step>(a, b, lanes);
      v[i + step] = high_parts<step>(a, b, lanes);
    }
    transpose<A, step / 2>(v);
  }
}

constexpr int64_t kTogether = 4;  // outputs whose sums are made side by side, so that none waits for its last addition

template <class A, class T, class I>
void tiled_product(const int64_t* ptr, const I* idx, const T* value, int64_t N, int64_t K, int64_t O, const A* bias, T* y,
                   const ByOutput<A>& weights) {
  constexpr int L = kLanesOf<A>;
  const int64_t wide = (O + L - 1) / L * L;
  parallel_range((N + L - 1) / L, 8, [&](int64_t first, int64_t last) {
    const Scratch<A> x(K * L), sums(wide * L);  // [K, L], [O, L]: a tile of x and of y, transposed
    for (int64_t o = O * L; o < wide * L; ++o) sums.get()[o] = A(0);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t n0 = tile * L, rows = std::min<int64_t>(L, N - n0);
      std::fill_n(x.get(), K * L, A(0));
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t s = ptr[n0 + r]; s < ptr[n0 + r + 1]; ++s) x.get()[int64_t(idx[s]) * L + r] += A(value[s]);
      for (int64_t j = 0; j < O; j += kTogether) {
        const int64_t together = std::min<int64_t>(kTogether, O - j);
        const Entry<A>* e[kTogether];
        Vec<A> sum[kTogether];
        for (int64_t i = 0; i < kTogether; ++i) {
          e[i] = weights.entries.data() + weights.begin[std::min(j + i, O - 1)];
          sum[i] = splat(bias ? bias[weights.output[std::min(j + i, O - 1)]] : A(0));
        }
        const auto add = [&](int64_t i) {
          sum[i] += load(x.get() + int64_t(e[i]->at) * L) * e[i]->value;
          ++e[i];
        };
        for (int64_t n = weights.begin[j + 1] - weights.begin[j]; n > 0; --n)
#pragma GCC unroll 8
          for (int64_t i = 0; i < kTogether; ++i) add(i);
        for (int64_t i = 1; i < together; ++i)
          while (e[i] < weights.entries.data() + weights.begin[j + i + 1]) add(i);
        for (int64_t i = 0; i < together; ++i) store(sums.get() + int64_t(weights.output[j + i]) * L, sum[i]);
      }
      for (int64_t o = 0; o < O; o += L) {
        Vec<A> block[L];
        for (int i = 0; i < L; ++i) block[i] = load(sums.get() + (o + i) * L);
        transpose<A>(block);
        T* to = y + n0 * O + o;
        if (o + L <= O)
          for (int64_t r = 0; r < rows; ++r) store(to + r * O, block[r]);
        else
          for (int64_t r = 0; r < rows; ++r) store_tail(to + r * O, block[r], int(O - o));
      }
    }
  });
}

Tensor masked_linear_kept(const Tensor& rowptr, const Tensor& col, const Tensor& value, const Tensor& colptr,
                          const Tensor& row, const Tensor& cvalue, const Tensor& weight, const Tensor& ptr_, const Tensor& out,
                          const Tensor& place, const OptTensor& bias, int64_t outputs, bool tiled) {
  const char* op = "masked_linear_kept";
  const auto [N, K, P] = check_kept(op, rowptr, col, value, colptr, row, cvalue, weight, ptr_, out, place);
  check_optional(op, "bias", bias, col, acc_type(weight.scalar_type()), {outputs});
  Tensor y = new_output(weight, {N, outputs}, weight.scalar_type());
  dispatch_float(op, weight.scalar_type(), [&, N = N, K = K, P = P](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    dispatch_index(op, col.scalar_type(), [&](auto index) {
      using I = typename decltype(index)::type;
      if (tiled)
        tiled_product<A>(ptr<int64_t>(rowptr), ptr<I>(col), ptr<T>(value), N, K, outputs, ptr<A>(bias), mutable_ptr<T>(y),
                         ByOutput<A>(ptr<T>(weight), ptr<int64_t>(ptr_), ptr<int32_t>(out), ptr<int64_t>(place), K, outputs));
      else
        kept_product<A>(ptr<int64_t>(rowptr), ptr<I>(col), ptr<T>(value), N, outputs, ptr<A>(bias), mutable_ptr<T>(y),
                        Entries<T>(ptr<T>(weight), ptr<int64_t>(ptr_), ptr<int32_t>(out), ptr<int64_t>(place), P));
    });
  });
  return y;
}

Tensor masked_linear_kept_bwd(const Tensor& rowptr, const Tensor& col, const Tensor& value, const Tensor& colptr,
                              const Tensor& row, const Tensor& cvalue, const Tensor& dy, const Tensor& weight,
                              const Tensor& ptr_, const Tensor& out, const Tensor& place) {
  const char* op = "masked_linear_kept_bwd";
  const auto [N, K, P] = check_kept(op, rowptr, col, value, colptr, row, cvalue, weight, ptr_, out, place);
  check(dy.dim() == 2, op, "dy must have two dimensions");
  check_tensor(op, "dy", dy, col, {N, dy.size(1)});
  check_dtype(op, "dy", dy, weight.scalar_type());
  const int64_t M = weight.size(0);
  Tensor dw = new_output(weight, {M}, weight.scalar_type());
  dispatch_float(op, weight.scalar_type(), [&, K = K, P = P](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Entries<T> list(ptr<T>(weight), ptr<int64_t>(ptr_), ptr<int32_t>(out), ptr<int64_t>(place), P);
    const int64_t *first = ptr<int64_t>(ptr_), *places = ptr<int64_t>(place);
    T* result = mutable_ptr<T>(dw);
    parallel_range(M, 1 << 16, [&](int64_t begin, int64_t end) {
      std::memset(static_cast<void*>(result + begin), 0, size_t(end - begin) * sizeof(T));
    });
    dispatch_index(op, row.scalar_type(), [&](auto index) {
      using I = typename decltype(index)::type;
      kept_gradient<A>(ptr<int64_t>(colptr), ptr<I>(row), ptr<T>(cvalue), K, dy.size(1), ptr<T>(dy), list,
                       [&](int64_t k, int64_t e, const Entry<A>&, A sum) { result[places[first[k] + e]] = T(sum); });
    });
  });
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("masked_linear_kept", TORCH_BOX(&masked_linear_kept));
  m.impl("masked_linear_kept_bwd", TORCH_BOX(&masked_linear_kept_bwd));
}

}  // namespace acefast

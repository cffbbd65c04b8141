// masked_linear_kept on the CPU: see csrc/ops.h. Each entry of x adds its value times the kept entries of its column.
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

Tensor masked_linear_kept(const Tensor& rowptr, const Tensor& col, const Tensor& value, const Tensor& colptr,
                          const Tensor& row, const Tensor& cvalue, const Tensor& weight, const Tensor& ptr_, const Tensor& out,
                          const Tensor& place, const OptTensor& bias, int64_t outputs) {
  const char* op = "masked_linear_kept";
  const auto [N, K, P] = check_kept(op, rowptr, col, value, colptr, row, cvalue, weight, ptr_, out, place);
  check_optional(op, "bias", bias, col, acc_type(weight.scalar_type()), {outputs});
  Tensor y = new_output(weight, {N, outputs}, weight.scalar_type());
  dispatch_float(op, weight.scalar_type(), [&, N = N, P = P](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Entries<T> list(ptr<T>(weight), ptr<int64_t>(ptr_), ptr<int32_t>(out), ptr<int64_t>(place), P);
    dispatch_index(op, col.scalar_type(), [&](auto index) {
      using I = typename decltype(index)::type;
      kept_product<A>(ptr<int64_t>(rowptr), ptr<I>(col), ptr<T>(value), N, outputs, ptr<A>(bias), mutable_ptr<T>(y), list);
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

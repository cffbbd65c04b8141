// masked_linear for a constant sparse x (CSR) on the CPU: see csrc/ops.h.
//
// Many kept weights: y_n = sum over the entries (c, v) of row n of v * (W * m)^T[c, :], a gather of rows of the
// transposed masked weight, made once per call in panels that fit the L2 cache. Few: each entry adds its v times the
// kept entries of column c only. The backward does the same over x's transpose, with dy's rows, and writes dw
// transposed back.
#include "cpu/gather.h"
#include "cpu/masked_weight.h"

namespace acefast {
namespace {

// Below these shares of kept weights the lists win over vectors: measured at 2708 x 1433 -> 512, 3327 x 3703 -> 512 (1
// % of x nonzero) and 19717 x 500 -> 256 (10 %) with AVX-512.
constexpr double kSparseForward = 0.04, kSparseBackward = 0.02;
constexpr int64_t kPanel = 128;  // columns of W^T per panel

void check_x(const char* op, const Tensor& rowptr, const Tensor& col, const Tensor& value, const Tensor& colptr,
             const Tensor& row, const Tensor& cvalue, const Tensor& weight, const OptTensor& mask,
             const OptTensor& keep) {
  check(rowptr.dim() == 1 && rowptr.size(0) >= 1 && colptr.dim() == 1, op, "rowptr and colptr must have one dimension");
  check(weight.dim() == 2, op, "weight must have two dimensions");
  const int64_t O = weight.size(0), K = weight.size(1);
  const ScalarType dtype = weight.scalar_type();
  check_dtype(op, "rowptr", rowptr, ScalarType::Long);
  check_dtype(op, "colptr", colptr, ScalarType::Long);
  check(col.dim() == 1, op, "col must have one dimension");
  check_tensor(op, "rowptr", rowptr, col, {rowptr.size(0)});
  check_tensor(op, "colptr", colptr, col, {K + 1});
  check_tensor(op, "col", col, col, {col.size(0)});
  check_tensor(op, "row", row, col, {col.size(0)});
  check_dtype(op, "row", row, col.scalar_type());
  check_tensor(op, "value", value, col, {col.size(0)});
  check_tensor(op, "cvalue", cvalue, col, {col.size(0)});
  check_dtype(op, "value", value, dtype);
  check_dtype(op, "cvalue", cvalue, dtype);
  check_tensor(op, "weight", weight, col, {O, K});
  check_optional(op, "mask", mask, col, acc_type(dtype), {O, K});
  check_optional(op, "keep", keep, col, ScalarType::Bool, {O, K});
}

// out[r, :] = sum over slots s of row r of value_s * src[idx_s, :] (+ bias) for `width` columns, rows of out `stride`
// apart.
template <class S, class T, class V, class I>
void gather_product(const int64_t* ptr, const I* idx, const V* value, int64_t n, const S* src, int64_t src_stride,
                    T* out, int64_t stride, int64_t width, const acc_t<T>* bias) {
  gather_plan<S, T, true>(
      ptr, n, width,
      [&](Batch<S, T>& b) {
        b.src = src;
        b.F = width;
        b.stride = stride;
        b.out = out;
        b.scale = b.self = nullptr;
        b.bias = bias;
      },
      [&](Batch<S, T>& b, int64_t s0, int64_t s1) {
        b.begin[0] = 0;
        for (int64_t r = 0; r < b.rows; ++r) b.begin[r + 1] = std::min(ptr[b.row0 + r + 1], s1) - s0;
        for (int64_t s = s0; s < s1; ++s) {
          b.off[s - s0] = int64_t(idx[s]) * src_stride;
          b.coef[s - s0] = acc_t<T>(value[s]);
        }
        gather_batch<S, T, true, false>(b);
      });
}

Tensor masked_linear_csr(const Tensor& rowptr, const Tensor& col, const Tensor& value, const Tensor& colptr,
                         const Tensor& row, const Tensor& cvalue, const Tensor& weight, const OptTensor& mask,
                         const OptTensor& bias, const OptTensor& keep, bool /*all_weights: of the backward*/) {
  const char* op = "masked_linear_csr";
  check_x(op, rowptr, col, value, colptr, row, cvalue, weight, mask, keep);
  const int64_t N = rowptr.size(0) - 1, O = weight.size(0), K = weight.size(1);
  check_optional(op, "bias", bias, col, acc_type(weight.scalar_type()), {O});
  Tensor y = new_output(weight, {N, O}, weight.scalar_type());
  dispatch_float(op, weight.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const MaskedWeight<T> w{ptr<T>(weight), ptr<A>(mask), ptr<uint8_t>(keep), O, K};
    const T* v = ptr<T>(value);
    const int64_t* rp = ptr<int64_t>(rowptr);
    T* out = mutable_ptr<T>(y);
    const A* b = ptr<A>(bias);
    dispatch_index(op, col.scalar_type(), [&](auto index) {
      const auto* idx = ptr<typename decltype(index)::type>(col);
      if (w.density() < kSparseForward) {
        const auto lists = KeptLists<A>::by_column(w);
        kept_product<A>(rp, idx, v, N, O, b, out, [&](int64_t k) { return EntryList<A>{lists.begin[k], lists.end[k]}; });
        return;
      }
      const Scratch<A> wt(O * K);
      w.transposed(wt.get(), kPanel);
      for (int64_t o = 0; o < O; o += kPanel) {
        const int64_t width = std::min(kPanel, O - o);
        gather_product<A, T>(rp, idx, v, N, wt.get() + o * K, width, out + o, O, width, b ? b + o : nullptr);
      }
    });
  });
  return y;
}

Tensor masked_linear_csr_bwd(const Tensor& rowptr, const Tensor& col, const Tensor& value, const Tensor& colptr,
                             const Tensor& row, const Tensor& cvalue, const Tensor& dy, const Tensor& weight,
                             const OptTensor& mask, const OptTensor& keep, bool all_weights) {
  const char* op = "masked_linear_csr_bwd";
  check_x(op, rowptr, col, value, colptr, row, cvalue, weight, mask, keep);
  const int64_t N = rowptr.size(0) - 1, O = weight.size(0), K = weight.size(1);
  const ScalarType dtype = weight.scalar_type();
  check_tensor(op, "dy", dy, col, {N, O});
  check_dtype(op, "dy", dy, dtype);
  Tensor dw = new_output(weight, {O, K}, dtype);
  dispatch_float(op, dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const MaskedWeight<T> w{ptr<T>(weight), ptr<A>(mask), all_weights ? nullptr : ptr<uint8_t>(keep), O, K};
    const T *v = ptr<T>(cvalue), *grad = ptr<T>(dy);
    const int64_t* cp = ptr<int64_t>(colptr);
    T* out = mutable_ptr<T>(dw);
    constexpr int64_t B = 64;  // columns of dw handled together when dw^T is turned
    dispatch_index(op, row.scalar_type(), [&](auto index) {
      const auto* idx = ptr<typename decltype(index)::type>(row);
      const Scratch<A> turned(O * K);  // dw^T [K, O]
      A* dwt = turned.get();
      if (w.density() < kSparseBackward) {
        const auto lists = KeptLists<A>::by_column(w);
        parallel_range(O, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(K, 1)), [&](int64_t o0, int64_t o1) {
          std::memset(static_cast<void*>(out + o0 * K), 0, size_t((o1 - o0) * K) * sizeof(T));
        });
        kept_gradient<A>(
            cp, idx, v, K, O, grad, [&](int64_t k) { return EntryList<A>{lists.begin[k], lists.end[k]}; },
            [&](int64_t k, int64_t, const Entry<A>& e, A sum) { out[e.at * K + k] = T(sum); });
        return;
      }
      for (int64_t o = 0; o < O; o += kPanel) {
        const int64_t width = std::min(kPanel, O - o);
        gather_product<T, A>(cp, idx, v, K, grad + o, O, dwt + o, O, width, nullptr);
      }
      const int64_t k_blocks = (K + B - 1) / B;
      parallel_tasks(k_blocks, [&](int64_t block, int64_t) {
        const int64_t k0 = block * B, n = std::min(B, K - k0);
        A tile[B][B + 1];
        for (int64_t o0 = 0; o0 < O; o0 += B) {
          const int64_t m = std::min(B, O - o0);
          for (int64_t k = 0; k < n; ++k)
            for (int64_t o = 0; o < m; ++o) tile[o][k] = dwt[(k0 + k) * O + o0 + o];
          for (int64_t o = 0; o < m; ++o) {
            const int64_t at = (o0 + o) * K + k0;
            if (w.keep) {
              for (int64_t k = 0; k < n; ++k) out[at + k] = T(w.keep[at + k] ? tile[o][k] : A(0));
            } else {
              for (int64_t k = 0; k < n; ++k) out[at + k] = T(tile[o][k]);
            }
          }
        }
      });
    });
  });
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("masked_linear_csr", TORCH_BOX(&masked_linear_csr));
  m.impl("masked_linear_csr_bwd", TORCH_BOX(&masked_linear_csr_bwd));
}

}  // namespace acefast

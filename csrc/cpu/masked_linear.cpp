// masked_linear for a dense x on the CPU: see csrc/ops.h.
//
// Many kept weights: the masked weight is made once and a dense product follows. Few, and a wide layer: blocks of rows
// of x are turned so that rows are the vector lanes, and each kept weight costs one multiply-add per lane; the gradient
// of W is then taken for the kept weights only. Turning costs as much as about kTurn outputs, so narrow layers stay
// dense.
#include "cpu/gemm.h"
#include "cpu/masked_weight.h"

namespace acefast {
namespace {

// Shares of kept weights above which dense wins, for wide layers; measured at 19717 x 500 -> 256 with AVX-512.
constexpr double kSparseProduct = 0.5, kSparseGradient = 0.13, kTurn = 16;
constexpr int64_t kTurnVecs = 4;  // lanes of a turned block, in vectors

bool sparse_pays(double density, double limit, int64_t width) {
  return density < limit - kTurn / double(std::max<int64_t>(width, 1));
}

// turned[c][r] = in[r][c] for a block of `rows` <= lanes rows of `columns` (row stride `stride`); missing rows are 0.
template <class T, class A>
void turn(const T* in, int64_t stride, int64_t rows, int64_t columns, A* turned, int64_t lanes) {
  constexpr int64_t B = 16;
  for (int64_t c0 = 0; c0 < columns; c0 += B) {
    const int64_t n = std::min(B, columns - c0);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; ++c) turned[(c0 + c) * lanes + r] = A(in[r * stride + c0 + c]);
    for (int64_t c = 0; c < n; ++c)
      for (int64_t r = rows; r < lanes; ++r) turned[(c0 + c) * lanes + r] = A(0);
  }
}

// out[r][c] = turned[c][r]
template <class T, class A>
void turn_back(const A* turned, int64_t lanes, int64_t rows, int64_t columns, T* out, int64_t stride) {
  constexpr int64_t B = 16;
  for (int64_t c0 = 0; c0 < columns; c0 += B) {
    const int64_t n = std::min(B, columns - c0);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; ++c) out[r * stride + c0 + c] = T(turned[(c0 + c) * lanes + r]);
  }
}

// out [N, J] = in [N, I] times the sparse matrix whose list j holds (i, value), plus bias [J].
template <class T, class A = acc_t<T>>
void sparse_product(const T* in, int64_t N, int64_t I, int64_t J, const KeptLists<A>& lists, const A* bias, T* out) {
  constexpr int64_t L = kLanesOf<A>, lanes = L * kTurnVecs;
  parallel_tasks((N + lanes - 1) / lanes, [&](int64_t block, int64_t) {
    const int64_t n0 = block * lanes, rows = std::min(lanes, N - n0);
    const Scratch<A> x(I * lanes), y(J * lanes);
    turn(in + n0 * I, I, rows, I, x.get(), lanes);
    for (int64_t j = 0; j < J; ++j) {
      Vec<A> acc[kTurnVecs];
      for (auto& a : acc) a = splat(bias ? bias[j] : A(0));
      for (const auto *e = lists.begin[j], *end = lists.end[j]; e < end; ++e) {
        const A* p = x.get() + e->at * lanes;
        for (int v = 0; v < kTurnVecs; ++v) acc[v] += e->value * load(p + v * L);
      }
      for (int v = 0; v < kTurnVecs; ++v) store(y.get() + j * lanes + v * L, acc[v]);
    }
    turn_back(y.get(), lanes, rows, J, out + n0 * J, J);
  });
}

void check_weight(const char* op, const Tensor& x, const Tensor& weight, const OptTensor& mask, const OptTensor& keep) {
  check(x.dim() == 2 && weight.dim() == 2, op, "x and weight must have two dimensions");
  const int64_t O = weight.size(0), K = weight.size(1);
  check_tensor(op, "x", x, weight, {x.size(0), K});
  check_tensor(op, "weight", weight, weight, {O, K});
  check_dtype(op, "x", x, weight.scalar_type());
  check_optional(op, "mask", mask, weight, acc_type(weight.scalar_type()), {O, K});
  check_optional(op, "keep", keep, weight, ScalarType::Bool, {O, K});
}

Tensor masked_linear(const Tensor& x, const Tensor& weight, const OptTensor& mask, const OptTensor& bias,
                     const OptTensor& keep, bool /*all_weights: of the backward*/) {
  const char* op = "masked_linear";
  check_weight(op, x, weight, mask, keep);
  const int64_t N = x.size(0), O = weight.size(0), K = weight.size(1);
  check_optional(op, "bias", bias, weight, acc_type(weight.scalar_type()), {O});
  Tensor y = new_output(x, {N, O}, x.scalar_type());
  dispatch_float(op, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const MaskedWeight<T> w{ptr<T>(weight), ptr<A>(mask), ptr<uint8_t>(keep), O, K};
    const A* add = ptr<A>(bias);
    if (keep && sparse_pays(w.density(), kSparseProduct, O)) {
      sparse_product(ptr<T>(x), N, K, O, KeptLists<A>::by_row(w), add, mutable_ptr<T>(y));
      return;
    }
    const Scratch<A> wt(K * O);
    if (O >= 1 && O <= kNarrow) {
      w.dense(wt.get());
      narrow_product<T, kNarrow>(O, ptr<T>(x), N, K, wt.get(), add, mutable_ptr<T>(y));
      return;
    }
    w.transposed(wt.get(), std::max<int64_t>(O, 1));
    std::unique_ptr<Scratch<A>> wide;
    const A* in = as_acc<T, A>(ptr<T>(x), N * K, wide);
    const AccOutput<T> out(y);
    gemm<A>(N, O, K, {in, K, 1}, wt.get(), O, out.get(), O, add);
    out.finish();
  });
  return y;
}

// dw_ok = <dy[:, o], x[:, k]> for kept (o, k), 0 elsewhere. x and dy are turned once; rows are summed in blocks.
template <class T, class A = acc_t<T>>
void sparse_gradient(const T* dy, const T* x, const MaskedWeight<T>& w, int64_t N, A* dw) {
  constexpr int64_t L = kLanesOf<A>, lanes = L * kTurnVecs;
  const int64_t blocks = (N + lanes - 1) / lanes;
  const auto lists = KeptLists<A>::by_row(w);
  const Scratch<A> xt(blocks * w.K * lanes), gt(blocks * w.O * lanes);
  parallel_tasks(blocks, [&](int64_t block, int64_t) {
    const int64_t n0 = block * lanes, rows = std::min(lanes, N - n0);
    turn(x + n0 * w.K, w.K, rows, w.K, xt.get() + block * w.K * lanes, lanes);
    turn(dy + n0 * w.O, w.O, rows, w.O, gt.get() + block * w.O * lanes, lanes);
  });
  constexpr int64_t kGroup = 8;  // outputs per task
  parallel_tasks((w.O + kGroup - 1) / kGroup, [&](int64_t task, int64_t) {
    const int64_t o0 = task * kGroup, o1 = std::min(w.O, o0 + kGroup);
    std::fill(dw + o0 * w.K, dw + o1 * w.K, A(0));
    for (int64_t block = 0; block < blocks; ++block) {
      const A* xb = xt.get() + block * w.K * lanes;
      for (int64_t o = o0; o < o1; ++o) {
        const A* g = gt.get() + (block * w.O + o) * lanes;
        Vec<A> gv[kTurnVecs];
        for (int v = 0; v < kTurnVecs; ++v) gv[v] = load(g + v * L);
        for (const auto *e = lists.begin[o], *end = lists.end[o]; e < end; ++e) {
          const A* p = xb + e->at * lanes;
          Vec<A> dot = gv[0] * load(p), dot1 = gv[1] * load(p + L);
          for (int v = 2; v < kTurnVecs; v += 2) {
            dot += gv[v] * load(p + v * L);
            dot1 += gv[v + 1] * load(p + (v + 1) * L);
          }
          dw[o * w.K + e->at] += hsum<A>(dot + dot1);
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> masked_linear_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                             const OptTensor& mask, const OptTensor& keep, bool need_dx, bool need_dw,
                                             bool all_weights) {
  const char* op = "masked_linear_bwd";
  check_weight(op, x, weight, mask, keep);
  const int64_t N = x.size(0), O = weight.size(0), K = weight.size(1);
  const ScalarType dtype = x.scalar_type();
  check_tensor(op, "dy", dy, weight, {N, O});
  check_dtype(op, "dy", dy, dtype);
  Tensor dx = need_dx ? new_output(x, {N, K}, dtype) : none_tensor(x, dtype);
  Tensor dw = need_dw ? new_output(x, {O, K}, dtype) : none_tensor(x, dtype);
  dispatch_float(op, dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const MaskedWeight<T> w{ptr<T>(weight), ptr<A>(mask), ptr<uint8_t>(keep), O, K};
    const double density = w.density();
    const bool sparse_dx = need_dx && keep && sparse_pays(density, kSparseProduct, O);
    const bool sparse_dw = need_dw && keep && !all_weights && sparse_pays(density, kSparseGradient, O);
    if (sparse_dx)
      sparse_product(ptr<T>(dy), N, O, K, KeptLists<A>::by_column(w), static_cast<const A*>(nullptr),
                     mutable_ptr<T>(dx));
    const AccOutput<T> dw_out(dw);
    if (sparse_dw) sparse_gradient(ptr<T>(dy), ptr<T>(x), w, N, dw_out.get());
    std::unique_ptr<Scratch<A>> wide_dy, wide_x;
    const bool dense_dx = need_dx && !sparse_dx, dense_dw = need_dw && !sparse_dw;
    const A* g = dense_dx || dense_dw ? as_acc<T, A>(ptr<T>(dy), N * O, wide_dy) : nullptr;
    if (dense_dx) {
      const Scratch<A> product(O * K);
      w.dense(product.get());
      const AccOutput<T> out(dx);
      gemm<A>(N, K, O, {g, O, 1}, product.get(), K, out.get(), K, nullptr);
      out.finish();
    }
    if (dense_dw) {
      A* out = dw_out.get();
      const A* in = as_acc<T, A>(ptr<T>(x), N * K, wide_x);
      gemm<A>(O, K, N, {g, 1, O}, in, K, out, K, nullptr);
      if (keep && !all_weights) {
        parallel_range(O * K, 1 << 15, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) out[i] = w.keep[i] ? out[i] : A(0);
        });
      }
    }
    dw_out.finish();
  });
  return {dx, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&masked_linear));
  m.impl("masked_linear_bwd", TORCH_BOX(&masked_linear_bwd));
}

}  // namespace acefast

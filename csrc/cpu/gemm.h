// A small dense product for the ops: C[M, N] = A[M, K] B[K, N] (+ bias), blocked for registers and cache, parallel over
// tiles of C, each summed over K in one fixed order. (BLAS gives other bits for other thread counts.)
#pragma once

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace acefast {

#if defined(__AVX512F__)
inline constexpr int kGemmVecs = 4, kGemmRows = 6;  // 24 accumulators of 32 registers
#else
inline constexpr int kGemmVecs = 2, kGemmRows = 6;  // 12 of 16
#endif
inline constexpr int64_t kGemmDepth = 256;  // summed in registers, then added to C

// Element (m, k) of A is a[m * row + k * col].
template <class A>
struct Strided {
  const A* a;
  int64_t row, col;
};

// C tile of MR rows and NV vectors; the last vector has `tail` columns (0: full). init: what the sum is added to, row
// by row init_stride apart; nullptr for 0.
template <class A, int MR, int NV, bool TAIL>
void gemm_tile(Strided<A> a, const A* b, int64_t ldb, A* c, int64_t ldc, const A* init, int64_t init_stride,
               int64_t depth, int tail) {
  using V = Vec<A>;
  constexpr int L = kLanesOf<A>;
  V acc[MR][NV] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      bv[v] = TAIL && v == NV - 1 ? load_tail(b + k * ldb + v * L, tail) : load(b + k * ldb + v * L);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const V av = splat(a.a[m * a.row + k * a.col]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] += av * bv[v];
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int v = 0; v < NV; ++v) {
      const bool last = TAIL && v == NV - 1;
      V s = acc[m][v];
      if (init) {
        const A* p = init + m * init_stride + v * L;
        s += last ? load_tail(p, tail) : load(p);
      }
      A* out = c + m * ldc + v * L;
      last ? store_tail(out, s, tail) : store(out, s);
    }
  }
}

// The same for rows <= MR and columns <= NV * L, chosen at run time.
template <class A, int MR, int NV>
void gemm_edge(int64_t rows, int64_t columns, Strided<A> a, const A* b, int64_t ldb, A* c, int64_t ldc, const A* init,
               int64_t init_stride, int64_t depth) {
  constexpr int L = kLanesOf<A>;
  if constexpr (MR > 1) {
    if (rows < MR) return gemm_edge<A, MR - 1, NV>(rows, columns, a, b, ldb, c, ldc, init, init_stride, depth);
  }
  if constexpr (NV > 1) {
    if (columns <= (NV - 1) * L)
      return gemm_edge<A, MR, NV - 1>(rows, columns, a, b, ldb, c, ldc, init, init_stride, depth);
  }
  const int tail = int(columns - (NV - 1) * L);
  if (tail == L)
    gemm_tile<A, MR, NV, false>(a, b, ldb, c, ldc, init, init_stride, depth, 0);
  else
    gemm_tile<A, MR, NV, true>(a, b, ldb, c, ldc, init, init_stride, depth, tail);
}

// bias [N] or nullptr.
template <class A>
void gemm(int64_t M, int64_t N, int64_t K, Strided<A> a, const A* b, int64_t ldb, A* c, int64_t ldc, const A* bias) {
  constexpr int L = kLanesOf<A>;
  if (M == 0 || N == 0) return;
  const int64_t nr = std::min<int64_t>(kGemmVecs * L, (N + L - 1) / L * L);
  const int64_t max_rows = nr <= L ? 12 : kGemmRows;
  const int64_t shares = (M + max_rows - 1) / max_rows,
                mr = (M + shares - 1) / shares;  // even shares, at most max_rows
  // A long sum (a weight gradient) takes one panel of B per task, copied so that it is aligned and read from the cache;
  // else a task takes few rows of A and many columns, and A is read once.
  const bool deep = K > 4 * std::max(M, N) && M >= 8 * kGemmRows;
  const int64_t panels = (N + nr - 1) / nr;
  const int64_t mb = deep ? std::max<int64_t>(1, shares * panels / 16) * mr : mr * 8;
  const int64_t m_tiles = (M + mb - 1) / mb;
  const int64_t nb = !deep && m_tiles * ((N + 4 * nr - 1) / (4 * nr)) >= 16 ? 4 * nr : nr;
  const int64_t n_tiles = (N + nb - 1) / nb;
  parallel_tasks(m_tiles * n_tiles, [&](int64_t task, int64_t) {
    const int64_t m0 = task / n_tiles * mb, m1 = std::min(M, m0 + mb), n0 = task % n_tiles * nb,
                  n1 = std::min(N, n0 + nb);
    std::vector<A> panel(deep ? kGemmDepth * nr : 0);
    for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += kGemmDepth) {
      const int64_t depth = std::min(kGemmDepth, K - k0);
      for (int64_t n = n0; n < n1; n += nr) {
        const int64_t columns = std::min(nr, n1 - n);
        const A* bp = b + k0 * ldb + n;
        int64_t ld = ldb;
        if (deep) {
          for (int64_t k = 0; k < depth; ++k) std::copy_n(bp + k * ldb, columns, panel.data() + k * nr);
          bp = panel.data();
          ld = nr;
        }
        for (int64_t m = m0; m < m1; m += mr) {
          const Strided<A> tile{a.a + m * a.row + k0 * a.col, a.row, a.col};
          A* out = c + m * ldc + n;
          const A* init = k0 ? out : bias ? bias + n : nullptr;
          const int64_t rows = std::min(mr, m1 - m);
          if (nr <= L)
            gemm_edge<A, 12, 1>(rows, columns, tile, bp, ld, out, ldc, init, k0 ? ldc : 0, depth);
          else
            gemm_edge<A, kGemmRows, kGemmVecs>(rows, columns, tile, bp, ld, out, ldc, init, k0 ? ldc : 0, depth);
        }
      }
    }
  });
}

// y[n, o] = <x_n, w_o> + bias_o for O <= 8 outputs: rows of x are read as vectors, so no lane is lost to a narrow
// output.
inline constexpr int kNarrow = 8;

template <class T, int O>
void narrow_product(int64_t outputs, const T* x, int64_t N, int64_t K, const acc_t<T>* w, const acc_t<T>* bias, T* y) {
  using A = acc_t<T>;
  constexpr int L = kLanesOf<A>;
  if constexpr (O > 1) {
    if (outputs < O) return narrow_product<T, O - 1>(outputs, x, N, K, w, bias, y);
  }
  parallel_range(N, std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(K, 1)), [&](int64_t n0, int64_t n1) {
    for (int64_t n = n0; n < n1; ++n) {
      const T* row = x + n * K;
      Vec<A> acc[O] = {};
      int64_t k = 0;
      for (; k + L <= K; k += L) {
        const Vec<A> v = load(row + k);
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) acc[o] += v * load(w + o * K + k);
      }
      if (k < K) {
        const Vec<A> v = load_tail(row + k, int(K - k));
        for (int o = 0; o < O; ++o) acc[o] += v * load_tail(w + o * K + k, int(K - k));
      }
      for (int o = 0; o < O; ++o) y[n * O + o] = T(hsum<A>(acc[o]) + (bias ? bias[o] : A(0)));
    }
  });
}

}  // namespace acefast

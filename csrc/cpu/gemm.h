// A small dense product for the ops: C[M, N] = A[M, K] B[K, N] (+ bias), blocked for registers and cache, parallel over
// tiles of C, each summed over K in one fixed order. (BLAS gives other bits for other thread counts.)
#pragma once

#include "cpu/memory.h"
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

// A long sum, such as a weight gradient over all nodes: pieces of K, cut by the shapes alone, each with a C of its own,
// that are added in their order. Rows of B are copied a panel at a time, so that they are aligned and read from the cache;
// A and B are read once.
template <class A>
void gemm_deep(int64_t M, int64_t N, int64_t K, Strided<A> a, const A* b, int64_t ldb, A* c, int64_t ldc,
               const A* bias) {
  constexpr int64_t nr = kGemmVecs * kLanesOf<A>, kPieces = 64, kPartial = int64_t(1) << 24;
  const int64_t wanted = std::max<int64_t>(1, std::min({K / (2 * kGemmDepth), kPieces, kPartial / (M * N)}));
  const int64_t piece = ((K + wanted - 1) / wanted + kGemmDepth - 1) / kGemmDepth * kGemmDepth;
  const int64_t pieces = (K + piece - 1) / piece;
  const Scratch<A> partial(pieces * M * N);
  parallel_tasks(pieces, [&](int64_t task, int64_t) {
    const Scratch<A> panel(kGemmDepth * nr);
    A* sum = partial.get() + task * M * N;
    for (int64_t k0 = task * piece; k0 < std::min(K, (task + 1) * piece); k0 += kGemmDepth) {
      const int64_t depth = std::min(kGemmDepth, K - k0);
      for (int64_t n = 0; n < N; n += nr) {
        const int64_t columns = std::min(nr, N - n);
        for (int64_t k = 0; k < depth; ++k) std::copy_n(b + (k0 + k) * ldb + n, columns, panel.get() + k * nr);
        for (int64_t m = 0; m < M; m += kGemmRows) {
          A* out = sum + m * N + n;
          gemm_edge<A, kGemmRows, kGemmVecs>(std::min<int64_t>(kGemmRows, M - m), columns,
                                             {a.a + m * a.row + k0 * a.col, a.row, a.col}, panel.get(), nr, out, N,
                                             k0 > task * piece ? out : nullptr, N, depth);
        }
      }
    }
  });
  parallel_range(M, std::max<int64_t>(1, (int64_t(1) << 14) / N), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        A s = bias ? bias[n] : A(0);
        for (int64_t p = 0; p < pieces; ++p) s += partial.get()[(p * M + m) * N + n];
        c[m * ldc + n] = s;
      }
    }
  });
}

// bias [N] or nullptr.
template <class A>
void gemm(int64_t M, int64_t N, int64_t K, Strided<A> a, const A* b, int64_t ldb, A* c, int64_t ldc, const A* bias) {
  constexpr int L = kLanesOf<A>;
  if (M == 0 || N == 0) return;
  if (K > 4 * std::max(M, N) && M >= 8 * kGemmRows) return gemm_deep(M, N, K, a, b, ldb, c, ldc, bias);
  const int64_t nr = std::min<int64_t>(kGemmVecs * L, (N + L - 1) / L * L);
  const int64_t max_rows = nr <= L ? 12 : kGemmRows;
  const int64_t shares = (M + max_rows - 1) / max_rows,
                mr = (M + shares - 1) / shares;  // even shares, at most max_rows
  // A task takes few rows of A and many columns, and A is read once.
  const int64_t mb = mr * 8, m_tiles = (M + mb - 1) / mb;
  const int64_t nb = m_tiles * ((N + 4 * nr - 1) / (4 * nr)) >= 16 ? 4 * nr : nr;
  const int64_t n_tiles = (N + nb - 1) / nb;
  parallel_tasks(m_tiles * n_tiles, [&](int64_t task, int64_t) {
    const int64_t m0 = task / n_tiles * mb, m1 = std::min(M, m0 + mb), n0 = task % n_tiles * nb,
                  n1 = std::min(N, n0 + nb);
    for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += kGemmDepth) {
      const int64_t depth = std::min(kGemmDepth, K - k0);
      for (int64_t n = n0; n < n1; n += nr) {
        const int64_t columns = std::min(nr, n1 - n);
        const A* bp = b + k0 * ldb + n;
        for (int64_t m = m0; m < m1; m += mr) {
          const Strided<A> tile{a.a + m * a.row + k0 * a.col, a.row, a.col};
          A* out = c + m * ldc + n;
          const A* init = k0 ? out : bias ? bias + n : nullptr;
          const int64_t rows = std::min(mr, m1 - m);
          if (nr <= L)
            gemm_edge<A, 12, 1>(rows, columns, tile, bp, ldb, out, ldc, init, k0 ? ldc : 0, depth);
          else
            gemm_edge<A, kGemmRows, kGemmVecs>(rows, columns, tile, bp, ldb, out, ldc, init, k0 ? ldc : 0, depth);
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

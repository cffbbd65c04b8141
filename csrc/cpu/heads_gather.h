// The gather with a coefficient per entry and head: a source row of H * F columns is read once for all heads,
//   out_r = sum_k coef_k,h * src[off_k],   out2_r = sum_k coef2_k,h * src[off_k],   dot_k,h = <src[off_k], center_r>_h
#pragma once

#include "cpu/heads.h"

namespace acefast {

// What a dot of one head is a sum of: nothing (no dots), half a vector, one or two vectors.
enum class Dots { kNone, kHalf, kOne, kTwo };

template <class T>
struct HeadsGather {
  using A = acc_t<T>;
  const T* src;     // [.., H, F]
  const T* center;  // [rows of all batches, H, F], for dots
  T *out, *out2;    // like center
  int64_t H, F, pitch;
  const A *coef, *coef2;  // [entries, pitch]
  A* dot;                 // [entries, pitch]
};

template <class A, int... I>
inline Vec<A> pair_sums(Vec<A> a, Vec<A> b, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(a, b, IntVec<A>{2 * I...}) + __builtin_shuffle(a, b, IntVec<A>{2 * I + 1 ...});
}

// v[0] = the sums of each `lanes` neighbouring lanes of the N vectors, in order; N <= lanes.
template <int N, int lanes, class A>
inline Vec<A> lane_sums(Vec<A>* v) {
  if constexpr (lanes == 1) {
    return v[0];
  } else {
    constexpr auto lane = std::make_integer_sequence<int, kLanesOf<A>>{};
    if constexpr (N == 1) {
      v[0] = pair_sums<A>(v[0], v[0], lane);
      return lane_sums<1, lanes / 2, A>(v);
    } else {
      for (int i = 0; i < N / 2; ++i) v[i] = pair_sums<A>(v[2 * i], v[2 * i + 1], lane);
      return lane_sums<N / 2, lanes / 2, A>(v);
    }
  }
}

// Columns [f0, f0 + NV vectors). WHOLE: F is a multiple of a vector, so that each vector belongs to one head.
template <int NV, bool WHOLE, bool TWO, Dots DOTS, bool TAIL, class T>
void heads_block(const Batch<T, T>& b, const HeadsGather<T>& w, int64_t f0, int tail) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int L = kLanesOf<A>;
  constexpr int lines = (NV * L * int(sizeof(T)) + 63) / 64;
  const int64_t C = w.H * w.F;
  int64_t head[NV];
  IntVec<A> lane_head[NV];  // of each lane, counted from head
  for (int v = 0; v < NV; ++v) {
    head[v] = (f0 + v * L) / w.F;
    for (int l = 0; l < L; ++l) lane_head[v][l] = std::min((f0 + v * L + l) / w.F, w.H - 1) - head[v];
  }
  const T* __restrict src = w.src + f0;
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t row = (b.row0 + r) * C + f0;
    V acc[NV], acc2[TWO ? NV : 1], center[NV];
    for (int v = 0; v < NV; ++v) {
      const A* carry = b.carry + f0 + v * L;
      acc[v] = !b.carry_in ? V{} : TAIL ? load_tail(carry, tail) : load(carry);
      if (TWO) acc2[v] = !b.carry_in ? V{} : TAIL ? load_tail(carry + C, tail) : load(carry + C);
      if (DOTS != Dots::kNone)
        center[v] = TAIL ? load_tail(w.center + row + v * L, tail) : load(w.center + row + v * L);
    }
    for (int64_t k = b.begin[r]; k < b.begin[r + 1]; ++k) {
      const char* next = reinterpret_cast<const char*>(src + b.off[k + kAhead]);
      for (int line = 0; line < lines; ++line) __builtin_prefetch(next + 64 * line);
      const T* p = src + b.off[k];
      const A* coef = w.coef + k * w.pitch;
      const A* coef2 = w.coef2 + (TWO ? k * w.pitch : 0);
      V product[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const V s = TAIL ? load_tail(p + v * L, tail) : load(p + v * L);
        const auto of_heads = [&](const A* c) {
          if constexpr (WHOLE) return splat(c[head[v]]);
          return __builtin_shuffle(load(c + head[v]), lane_head[v]);
        };
        acc[v] += of_heads(coef) * s;
        if (TWO) acc2[v] += of_heads(coef2) * s;
        if (DOTS != Dots::kNone) product[v] = s * center[v];
      }
      A* dot = w.dot + (DOTS == Dots::kNone ? 0 : k * w.pitch);
      if constexpr (DOTS == Dots::kHalf) {
        const V sums = lane_sums<NV, L / 2, A>(product);
        if (!TAIL) {
          std::memcpy(dot + head[0], &sums, 2 * NV * sizeof(A));
        } else {
          for (int h = 0; h < tail / (L / 2); ++h) dot[head[0] + h] = sums[h];
        }
      } else if constexpr (DOTS == Dots::kOne || DOTS == Dots::kTwo) {
        constexpr int M = DOTS == Dots::kTwo ? 2 : 1, groups = NV / M;
        if (M == 2)
          for (int g = 0; g < groups; ++g) product[g] = product[2 * g] + product[2 * g + 1];
        const V sums = lane_sums<groups, L, A>(product);
        if (w.F == M * L) {
          std::memcpy(dot + head[0], &sums, groups * sizeof(A));
        } else {
          for (int g = 0; g < groups; ++g) dot[head[M * g]] += sums[g];
        }
      }
    }
    for (int v = 0; v < NV; ++v) {
      const auto put = [&](A* carry, T* out, V y) {
        if (b.carry_out)
          TAIL ? store_tail(carry + f0 + v * L, y, tail) : store(carry + f0 + v * L, y);
        else
          TAIL ? store_tail(out + row + v * L, y, tail) : store(out + row + v * L, y);
      };
      put(b.carry, w.out, acc[v]);
      if (TWO) put(b.carry + C, w.out2, acc2[v]);
    }
  }
}

template <bool WHOLE, bool TWO, Dots DOTS, class T>
void heads_columns(Batch<T, T>& b, const HeadsGather<T>& w) {
  constexpr int64_t L = kLanesOf<acc_t<T>>;
  // Two sums or dots take twice the registers; the dots of a block fill at most one vector.
  constexpr int registers = kVecBytes == 64 ? 8 : TWO || DOTS != Dots::kNone ? 4 : kMaxVecs;
  constexpr int dots = DOTS == Dots::kHalf ? L / 2 : DOTS == Dots::kOne ? L : 2 * L;
  constexpr int wide = std::min(registers, dots), least = DOTS == Dots::kTwo ? 2 : 1;
  const int64_t n = b.begin[b.rows], C = w.H * w.F;
  for (int64_t k = 0; k < kAhead; ++k) b.off[n + k] = n ? b.off[n - 1] : 0;
  int64_t f0 = 0;
  for (; f0 + wide * L <= C; f0 += wide * L) heads_block<wide, WHOLE, TWO, DOTS, false>(b, w, f0, 0);
  if constexpr (wide > 4)
    for (; f0 + 4 * L <= C; f0 += 4 * L) heads_block<4, WHOLE, TWO, DOTS, false>(b, w, f0, 0);
  for (; f0 + least * L <= C; f0 += least * L) heads_block<least, WHOLE, TWO, DOTS, false>(b, w, f0, 0);
  if constexpr (!WHOLE)
    if (f0 < C) heads_block<1, WHOLE, TWO, DOTS, true>(b, w, f0, int(C - f0));
}

// out and, where given, out2.
template <class T>
void gather_heads(Batch<T, T>& b, const HeadsGather<T>& w) {
  const bool whole = w.F % kLanesOf<acc_t<T>> == 0;
  if (w.out2)
    whole ? heads_columns<true, true, Dots::kNone>(b, w) : heads_columns<false, true, Dots::kNone>(b, w);
  else
    whole ? heads_columns<true, false, Dots::kNone>(b, w) : heads_columns<false, false, Dots::kNone>(b, w);
}

// Whether gather_heads_dots takes heads of F columns.
template <class T>
bool has_heads_dots(int64_t F) {
  constexpr int64_t L = kLanesOf<acc_t<T>>;
  return F > 0 && (F % L == 0 || F == L / 2);
}

// out and dot.
template <class T>
void gather_heads_dots(Batch<T, T>& b, const HeadsGather<T>& w) {
  constexpr int64_t L = kLanesOf<acc_t<T>>;
  if (w.F > L) std::fill(w.dot, w.dot + b.begin[b.rows] * w.pitch, acc_t<T>(0));
  if (w.F == L / 2)
    heads_columns<false, false, Dots::kHalf>(b, w);
  else if (w.F / L % 2)
    heads_columns<true, false, Dots::kOne>(b, w);
  else
    heads_columns<true, false, Dots::kTwo>(b, w);
}

}  // namespace acefast

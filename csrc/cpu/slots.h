// Turns slots of a graph's CSR or CSC into the entries of a gather batch.
#pragma once

#include "cpu/gather.h"

namespace acefast {

// One side of a graph: ptr [n + 1], idx [S] the other end of each slot, eid [S] the caller's edge id (nullptr: the slot
// itself).
template <class I>
struct Side {
  const int64_t* ptr;
  const I* idx;
  const I* eid;
  int64_t n;
};

template <class I>
Side<I> by_destination(const GraphArgs& g) {
  return {g.rowptr, static_cast<const I*>(g.col), static_cast<const I*>(g.eid), g.n_dst};
}
template <class I>
Side<I> by_source(const GraphArgs& g) {
  return {g.colptr, static_cast<const I*>(g.row), static_cast<const I*>(g.ceid), g.n_src};
}

// Entries for slots [s0, s1), only those with keep[id] == want where keep is given; off, idx, id and begin are set.
template <class B, class I>
void fill_slots(B& b, const Side<I>& side, int64_t s0, int64_t s1, int64_t stride, const uint8_t* keep, bool want) {
  const I* idx = side.idx;
  const I* eid = side.eid;
  b.begin[0] = 0;
  if (!keep) {
    for (int64_t s = s0; s < s1; ++s) {
      b.idx[s - s0] = int64_t(idx[s]);
      b.off[s - s0] = int64_t(idx[s]) * stride;
      b.id[s - s0] = eid ? int64_t(eid[s]) : s;
    }
    for (int64_t r = 0; r < b.rows; ++r) b.begin[r + 1] = std::min(side.ptr[b.row0 + r + 1], s1) - s0;
    return;
  }
  int64_t n = 0, s = s0;
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t end = std::min(side.ptr[b.row0 + r + 1], s1);
    for (; s < end; ++s) {  // an entry that is not wanted is overwritten by the next
      const int64_t id = eid ? int64_t(eid[s]) : s;
      b.idx[n] = int64_t(idx[s]);
      b.off[n] = int64_t(idx[s]) * stride;
      b.id[n] = id;
      n += (keep[id] != 0) == want;
    }
    b.begin[r + 1] = n;
  }
}

// Asks for the per-edge values of the slots after [s0, s1), as many: where the caller's order is not the slots', each
// is a cache miss, which the current batch's work then hides.
template <class I, class A>
void prefetch_slots(const Side<I>& side, int64_t s0, int64_t s1, const A* weight, const A* mask, const uint8_t* keep,
                    int64_t H) {
  if (!side.eid) return;
  const int64_t end = std::min(2 * s1 - s0, side.ptr[side.n]);
  for (int64_t s = s1; s < end; ++s) {
    const int64_t id = side.eid[s];
    if (weight) __builtin_prefetch(weight + id * H);
    if (mask) __builtin_prefetch(mask + id * H);
    if (keep) __builtin_prefetch(keep + id);
  }
}

// coef = weight[id] * mask[id] * scale[idx] of head h of H, absent factors counting 1. weight and mask [E, H].
template <class B, class A>
void fill_coef(B& b, const A* weight, const A* mask, const A* scale, int64_t h, int64_t H) {
  const int64_t n = b.begin[b.rows];
  if (weight) {
    for (int64_t k = 0; k < n; ++k) b.coef[k] = weight[b.id[k] * H + h];
  } else {
    std::fill(b.coef, b.coef + n, A(1));
  }
  if (mask) {
    for (int64_t k = 0; k < n; ++k) b.coef[k] *= mask[b.id[k] * H + h];
  }
  if (scale) {
    for (int64_t k = 0; k < n; ++k) b.coef[k] *= scale[b.idx[k]];
  }
}

}  // namespace acefast

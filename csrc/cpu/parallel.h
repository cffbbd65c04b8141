// Work sharing on the CPU through the stable ABI (torch.set_num_threads is obeyed). Work is cut by the data into tasks;
// which thread runs a task never changes a result.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace acefast {

// Calls f(task, worker) once for each task in [0, tasks); workers take tasks as they become free. worker < number of
// workers.
template <class F>
void parallel_tasks(int64_t tasks, const F& f) {
  if (tasks <= 0) return;
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  if (workers <= 1) {
    for (int64_t t = 0; t < tasks; ++t) f(t, int64_t(0));
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t) {
    for (int64_t t = next.fetch_add(1, std::memory_order_relaxed); t < tasks;
         t = next.fetch_add(1, std::memory_order_relaxed))
      f(t, begin);
  });
}

// Calls f(begin, end) over [0, n) in pieces of `piece` elements.
template <class F>
void parallel_range(int64_t n, int64_t piece, const F& f) {
  parallel_tasks((n + piece - 1) / piece, [&](int64_t t, int64_t) { f(t * piece, std::min(n, (t + 1) * piece)); });
}

template <class A>
void parallel_zero(A* out, int64_t n) {
  parallel_range(n, int64_t(1) << 16, [&](int64_t begin, int64_t end) { std::fill(out + begin, out + end, A(0)); });
}

// Cuts rows [0, n) at bounds b[0] = 0 .. b[last] = n so that each piece has about `piece` units of work, where row i
// costs ptr[i + 1] - ptr[i] + row_cost. A row is never cut here.
inline std::vector<int64_t> split_rows(const int64_t* ptr, int64_t n, int64_t piece, int64_t row_cost) {
  const int64_t total = (n ? ptr[n] - ptr[0] : 0) + n * row_cost;
  const int64_t pieces = std::max<int64_t>(1, (total + piece - 1) / piece);
  std::vector<int64_t> bounds(pieces + 1, n);
  bounds[0] = 0;
  for (int64_t p = 1; p < pieces; ++p) {
    const int64_t target = total / pieces * p + total % pieces * p / pieces;
    int64_t lo = bounds[p - 1], hi = n;  // the first row whose work before it reaches the target
    while (lo < hi) {
      const int64_t mid = lo + (hi - lo) / 2;
      if (ptr[mid] - ptr[0] + mid * row_cost < target)
        lo = mid + 1;
      else
        hi = mid;
    }
    bounds[p] = lo;
  }
  return bounds;
}

}  // namespace acefast

// Outputs on the CPU. A large fresh output costs more in page faults than a product that fills it, so huge pages are
// asked for.
#pragma once

#include <sys/mman.h>

#include <cstdint>

#include "common/tensor.h"

namespace acefast {

inline constexpr int64_t kHugePage = int64_t(1) << 21;

inline void advise_huge(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~uintptr_t(kHugePage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~uintptr_t(kHugePage - 1);
  if (end > begin)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal costs nothing
#endif
}

// A fresh tensor, on huge pages where it is large enough for them.
inline Tensor on_huge_pages(Tensor t) {
  const int64_t bytes = t.numel() * int64_t(t.element_size());
  if (bytes >= 2 * kHugePage) advise_huge(t.mutable_data_ptr(), bytes);
  return t;
}

// A contiguous uninitialised tensor.
inline Tensor new_output(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return on_huge_pages(new_tensor(like, sizes, dtype));
}

}  // namespace acefast

// Outputs on the CPU. A large fresh output costs more in page faults than a product that fills it, so huge pages are
// asked for.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <memory>
#include <new>

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

// Uninitialised scratch, on huge pages where large.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data_(static_cast<A*>(::operator new(size_t(n > 0 ? n : 1) * sizeof(A), std::align_val_t(64)))) {
    if (n * int64_t(sizeof(A)) >= 2 * kHugePage) advise_huge(data_.get(), n * int64_t(sizeof(A)));
  }
  A* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(A* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<A, Free> data_;
};

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

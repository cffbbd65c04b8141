// Helpers on libtorch's stable ABI, shared by the CPU and the CUDA ops: short memory-protecting checks, optional
// tensors, dtype and index dispatch, contiguous allocation. Checks that users meet are made in Python, in a full
// sentence.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace acefast {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using ScalarType = torch::headeronly::ScalarType;
using Half = c10::Half;
using BFloat16 = c10::BFloat16;

// ---- checks ----

[[noreturn]] inline void fail(const char* op, const std::string& what) {
  throw std::runtime_error(std::string("acefast::") + op + ": " + what);
}

inline void check(bool ok, const char* op, const char* what) {
  if (__builtin_expect(!ok, 0)) fail(op, what);
}

inline std::string shape_string(const Tensor& t) {
  std::string s = "[";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + "]";
}

// t is contiguous, on like's device and of the given sizes.
inline void check_tensor(const char* op, const char* name, const Tensor& t, const Tensor& like,
                         std::initializer_list<int64_t> sizes) {
  if (t.is_cuda() != like.is_cuda() || t.get_device_index() != like.get_device_index())
    fail(op, std::string(name) + " is on another device");
  if (!t.is_contiguous()) fail(op, std::string(name) + " is not contiguous");
  bool same = t.dim() == int64_t(sizes.size());
  int64_t d = 0;
  for (const int64_t size : sizes) same = same && t.size(d++) == size;
  if (same) return;
  std::string expected;
  for (const int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  fail(op, std::string(name) + " has shape " + shape_string(t) + ", expected [" + expected + "]");
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() != dtype) fail(op, std::string(name) + " has the wrong dtype");
}

// The list has, in each position, a contiguous tensor of the dtype with as many elements as `like`'s, on one device.
inline void check_list(const char* op, const char* name, const Tensors& list, const Tensors& like, ScalarType dtype) {
  if (list.size() != like.size()) fail(op, std::string(name) + " has the wrong number of tensors");
  for (size_t n = 0; n < list.size(); ++n) {
    const Tensor& t = list[n];
    if (t.is_cuda() != like[0].is_cuda() || t.get_device_index() != like[0].get_device_index())
      fail(op, std::string(name) + " is on another device");
    if (!t.is_contiguous() || t.numel() != like[n].numel())
      fail(op, std::string(name) + " is not contiguous or has the wrong number of elements");
    check_dtype(op, name, t, dtype);
  }
}

// ---- data pointers (nullptr for an absent optional) ----

template <class T>
const T* ptr(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* ptr(const OptTensor& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}
template <class T>
T* mutable_ptr(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// ---- dtypes ----

// What sums are kept in: fp64 for fp64, fp32 for all others.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType acc_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for T = float, double, Half, BFloat16.
template <class F>
decltype(auto) dispatch_float(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::Double: return f(Type<double>{});
    case ScalarType::Half: return f(Type<Half>{});
    case ScalarType::BFloat16: return f(Type<BFloat16>{});
    default: fail(op, "dtype must be float32, float64, float16 or bfloat16");
  }
}

// Calls f(Type<A>{}) for A = float, double.
template <class F>
decltype(auto) dispatch_acc(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::Double: return f(Type<double>{});
    default: fail(op, "dtype must be float32 or float64");
  }
}

// Calls f(Type<I>{}) for I = int32_t, int64_t.
template <class F>
decltype(auto) dispatch_index(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Int: return f(Type<int32_t>{});
    case ScalarType::Long: return f(Type<int64_t>{});
    default: fail(op, "indices must be int32 or int64");
  }
}

// Calls f(std::bool_constant<flag>{}).
template <class F>
decltype(auto) dispatch_bool(bool flag, F&& f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}

// ---- allocation ----

// A contiguous uninitialised tensor on like's device.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// What an output that was not asked for is: one dimension, no element.
inline Tensor none_tensor(const Tensor& like, ScalarType dtype) {
  return new_tensor(like, {0}, dtype);
}

// ---- the six graph arguments ----

// Borrowed pointers to a checked graph. Indices col, row, eid, ceid are all int32 or all int64 (index_type); eid and
// ceid are nullptr where a slot's number is the caller's edge id. n_edges counts slots; a prepared selection has fewer
// of them than its per-edge tensors have edges (edge_count).
struct GraphArgs {
  const int64_t* rowptr;  // [n_dst + 1]
  const void* col;        // [n_edges] source of each CSR slot
  const void* eid;        // [n_edges] CSR slot -> caller's edge id
  const int64_t* colptr;  // [n_src + 1]
  const void* row;        // [n_edges] destination of each CSC slot
  const void* ceid;       // [n_edges] CSC slot -> caller's edge id
  int64_t n_dst, n_src, n_edges;
  ScalarType index_type;
};

// Checks devices, dtypes, lengths and contiguity. That indices are in range was checked when the Graph was built.
inline GraphArgs graph_args(const char* op, const Tensor& rowptr, const Tensor& col, const OptTensor& eid,
                            const Tensor& colptr, const Tensor& row, const OptTensor& ceid) {
  check(rowptr.dim() == 1 && rowptr.size(0) >= 1, op, "rowptr must have one dimension and at least one entry");
  check(colptr.dim() == 1 && colptr.size(0) >= 1, op, "colptr must have one dimension and at least one entry");
  check_dtype(op, "rowptr", rowptr, ScalarType::Long);
  check_dtype(op, "colptr", colptr, ScalarType::Long);
  check(col.dim() == 1, op, "col must have one dimension");
  const int64_t n_edges = col.size(0);
  const ScalarType index = col.scalar_type();
  check(index == ScalarType::Int || index == ScalarType::Long, op, "col must be int32 or int64");
  check_tensor(op, "rowptr", rowptr, col, {rowptr.size(0)});
  check_tensor(op, "colptr", colptr, col, {colptr.size(0)});
  check_tensor(op, "col", col, col, {n_edges});
  check_tensor(op, "row", row, col, {n_edges});
  check_dtype(op, "row", row, index);
  if (eid) {
    check_tensor(op, "eid", *eid, col, {n_edges});
    check_dtype(op, "eid", *eid, index);
  }
  if (ceid) {
    check_tensor(op, "ceid", *ceid, col, {n_edges});
    check_dtype(op, "ceid", *ceid, index);
  }
  return {ptr<int64_t>(rowptr),
          ptr<void>(col),
          ptr<void>(eid),
          ptr<int64_t>(colptr),
          ptr<void>(row),
          ptr<void>(ceid),
          rowptr.size(0) - 1,
          colptr.size(0) - 1,
          n_edges,
          index};
}

// E, the length of the call's per-edge tensors: that of the first one given, the number of slots where there is none.
// Only a graph that names its edges on both sides, which a prepared selection does, may have fewer slots than edges.
inline int64_t edge_count(const char* op, const GraphArgs& g, std::initializer_list<const OptTensor*> per_edge) {
  int64_t n = g.n_edges;
  for (const OptTensor* t : per_edge) {
    if (!*t) continue;
    check((*t)->dim() >= 1, op, "a per-edge tensor must have at least one dimension");
    n = (*t)->size(0);
    break;
  }
  const bool named = g.n_edges == 0 || (g.eid && g.ceid);  // an empty tensor has no address
  check(n == g.n_edges || (n > g.n_edges && named), op, "a per-edge tensor has the wrong length");
  return n;
}

// An optional tensor of one dtype and shape on like's device.
inline void check_optional(const char* op, const char* name, const OptTensor& t, const Tensor& like, ScalarType dtype,
                           std::initializer_list<int64_t> sizes) {
  if (!t) return;
  check_tensor(op, name, *t, like, sizes);
  check_dtype(op, name, *t, dtype);
}

}  // namespace acefast

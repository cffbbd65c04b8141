// What the selection ops share. Each function is defined in the file of the op that it is the heart of.
#pragma once

#include "common.cuh"

#include <optional>
#include <vector>

namespace acefast {

// topk_mask.cu: csrc/ops.h's topk_mask of the elements whose flag equals `living` (of all without flags), written into keep.
// Its status bits are joined to *status, on the device.
void select(const Tensors& scores, int64_t k, const std::optional<Tensors>& flags, bool living, bool largest, bool magnitude,
            const Tensors& keep, int* status, const DeviceScope& scope);

// gumbel_topk.cu: the keys of csrc/ops.h's gumbel_topk, float32, with noise of the given stream.
Tensors gumbel_keys(const Tensors& scores, double tau, int64_t seed, int64_t stream, bool largest, const DeviceScope& scope);

// Scores of one dtype and, where given, flags of their sizes.
inline void check_selection(const char* op, const Tensors& scores, const std::optional<Tensors>& flags) {
  check(!scores.empty(), op, "scores must not be empty");
  check_list(op, "scores", scores, scores, scores[0].scalar_type());
  if (flags) check_list(op, "the flags", *flags, scores, ScalarType::Bool);
}

inline Tensors new_masks(const Tensors& like) {
  Tensors masks;
  for (const Tensor& t : like) masks.push_back(torch::stable::new_empty(t, t.sizes(), ScalarType::Bool));
  return masks;
}

// int32 [1], no bit set.
inline Tensor new_status(const Tensor& like) {
  const Tensor status = new_tensor(like, {1}, ScalarType::Int);
  zero(status);
  return status;
}

}  // namespace acefast

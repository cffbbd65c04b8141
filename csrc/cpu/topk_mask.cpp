// topk_mask and topk_mask_out on the CPU: see csrc/ops.h.
#include "cpu/selection.h"

namespace acefast {
namespace {

Tensor topk_mask_out(const std::vector<Tensor>& scores, int64_t k, const std::optional<std::vector<Tensor>>& alive,
                     bool largest, bool magnitude, const std::vector<Tensor>& out) {
  const char* op = "topk_mask";
  check_lists(op, scores, alive ? &*alive : nullptr);
  check_lists(op, scores, &out);
  Tensor status = new_tensor(scores[0], {1}, ScalarType::Int);
  dispatch_float(op, scores[0].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_bool(magnitude, [&](auto by_magnitude) {
      *mutable_ptr<int32_t>(status) = Selection<T, decltype(by_magnitude)::value>(scores, alive, out, largest).run(k);
    });
  });
  return status;
}

std::tuple<std::vector<Tensor>, Tensor> topk_mask(const std::vector<Tensor>& scores, int64_t k,
                                                  const std::optional<std::vector<Tensor>>& alive, bool largest,
                                                  bool magnitude) {
  check_lists("topk_mask", scores, alive ? &*alive : nullptr);
  std::vector<Tensor> keep = new_masks(scores);
  Tensor status = topk_mask_out(scores, k, alive, largest, magnitude, keep);
  return {keep, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("topk_mask", TORCH_BOX(&topk_mask));
  m.impl("topk_mask_out", TORCH_BOX(&topk_mask_out));
}

}  // namespace acefast

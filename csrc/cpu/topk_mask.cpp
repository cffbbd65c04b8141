// topk_mask on the CPU: see csrc/ops.h.
#include "cpu/selection.h"

namespace acefast {
namespace {

std::tuple<std::vector<Tensor>, Tensor> topk_mask(const std::vector<Tensor>& scores, int64_t k,
                                                  const std::optional<std::vector<Tensor>>& alive, bool largest,
                                                  bool magnitude) {
  const char* op = "topk_mask";
  check_lists(op, scores, alive ? &*alive : nullptr);
  std::vector<Tensor> keep = new_masks(scores);
  Tensor status = new_tensor(scores[0], {1}, ScalarType::Int);
  dispatch_float(op, scores[0].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_bool(magnitude, [&](auto by_magnitude) {
      *mutable_ptr<int32_t>(status) = Selection<T, decltype(by_magnitude)::value>(scores, alive, keep, largest).run(k);
    });
  });
  return {keep, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("topk_mask", TORCH_BOX(&topk_mask));
}

}  // namespace acefast

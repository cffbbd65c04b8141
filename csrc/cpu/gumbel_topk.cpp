// gumbel_topk on the CPU: see csrc/ops.h.
#include "cpu/gumbel.h"
#include "cpu/selection.h"

namespace acefast {
namespace {

std::tuple<std::vector<Tensor>, Tensor> gumbel_topk(const std::vector<Tensor>& scores, int64_t k, double tau, int64_t seed,
                                                    const std::optional<std::vector<Tensor>>& alive, bool largest) {
  const char* op = "gumbel_topk";
  check_lists(op, scores, alive ? &*alive : nullptr);
  const std::vector<Tensor> keys = gumbel_keys(op, scores, tau, seed, 0, largest), keep = new_masks(scores);
  Tensor status = new_tensor(scores[0], {1}, ScalarType::Int);
  *mutable_ptr<int32_t>(status) = Selection<float, false>(keys, alive, keep, true).run(k);
  return {keep, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("gumbel_topk", TORCH_BOX(&gumbel_topk));
}

}  // namespace acefast

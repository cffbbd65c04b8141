// exchange on the CPU: see csrc/ops.h.
#include "cpu/gumbel.h"
#include "cpu/selection.h"

namespace acefast {
namespace {

// Calls f(tensor, begin, end) over the elements of a list of tensors in parallel pieces.
template <class F>
void each_piece(const std::vector<Tensor>& list, const F& f) {
  for (size_t t = 0; t < list.size(); ++t)
    parallel_range(list[t].numel(), 1 << 16, [&](int64_t begin, int64_t end) { f(t, begin, end); });
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor> exchange(
    const std::vector<Tensor>& keep, const std::vector<Tensor>& kept_scores, const std::vector<Tensor>& pruned_scores,
    int64_t k, double tau, int64_t seed) {
  const char* op = "exchange";
  check_lists(op, kept_scores, &keep);
  check_lists(op, pruned_scores, &keep);
  const std::vector<Tensor> removed = new_masks(keep), erased = new_masks(keep), mined = new_masks(keep),
                            result = new_masks(keep);
  each_piece(keep, [&](size_t t, int64_t begin, int64_t end) {
    const uint8_t* kept = ptr<uint8_t>(keep[t]);
    uint8_t* gone = mutable_ptr<uint8_t>(removed[t]);
    for (int64_t i = begin; i < end; ++i) gone[i] = !kept[i];
  });
  int32_t status = 0;
  {
    const std::vector<Tensor> keys = gumbel_keys(op, kept_scores, tau, seed, 1, false);
    status |= Selection<float, false>(keys, keep, erased, true).run(k);
  }
  {
    const std::vector<Tensor> keys = gumbel_keys(op, pruned_scores, tau, seed, 2, true);
    status |= Selection<float, false>(keys, removed, mined, true).run(k);
  }
  each_piece(keep, [&](size_t t, int64_t begin, int64_t end) {
    const uint8_t *kept = ptr<uint8_t>(keep[t]), *out = ptr<uint8_t>(erased[t]), *in = ptr<uint8_t>(mined[t]);
    uint8_t* now = mutable_ptr<uint8_t>(result[t]);
    for (int64_t i = begin; i < end; ++i) now[i] = status ? kept[i] : (kept[i] & !out[i]) | in[i];
  });
  Tensor flag = new_tensor(keep[0], {1}, ScalarType::Int);
  *mutable_ptr<int32_t>(flag) = status;
  return {result, erased, mined, flag};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("exchange", TORCH_BOX(&exchange));
}

}  // namespace acefast

// exchange on CUDA: two selections by scores with Gumbel noise and one pass that joins them, see csrc/ops.h.
#include "list.cuh"
#include "selection.cuh"

namespace acefast {
namespace {

constexpr int kFlags = 16;  // bool values at once

struct Exchanged {
  const bool *keep, *erased, *mined;
  bool* result;
  int64_t count;
  bool vector;
};

__global__ void __launch_bounds__(kThreads)
    exchange_join_kernel(const __grid_constant__ Batch<Exchanged> batch, const int* status) {
  const bool refused = *status != 0;
  each_element<kFlags>(batch, [&](const Exchanged& part, int64_t i) {
    const int64_t left = part.count - i;
    Pack<bool, kFlags> now = load_part<kFlags>(part.keep + i, left, part.vector);
    const Pack<bool, kFlags> out = load_part<kFlags>(part.erased + i, left, part.vector);
    const Pack<bool, kFlags> in = load_part<kFlags>(part.mined + i, left, part.vector);
#pragma unroll
    for (int v = 0; v < kFlags; ++v) now.v[v] = refused ? now.v[v] : (now.v[v] && !out.v[v]) || in.v[v];
    store_part(part.result + i, now, left, part.vector);
  });
}

std::tuple<Tensors, Tensors, Tensors, Tensor> exchange(Tensors keep, Tensors kept_scores, Tensors pruned_scores, int64_t k,
                                                       double tau, int64_t seed) {
  check_selection("exchange", kept_scores, keep);
  check_selection("exchange", pruned_scores, keep);
  const DeviceScope scope(keep[0]);
  const Tensors erased = new_masks(keep), mined = new_masks(keep), result = new_masks(keep);
  const Tensor status = new_status(keep[0]);
  int* bits = mutable_ptr<int>(status);
  select(gumbel_keys(kept_scores, tau, seed, 1, false, scope), k, keep, true, true, false, erased, bits, scope);
  select(gumbel_keys(pruned_scores, tau, seed, 2, true, scope), k, keep, false, true, false, mined, bits, scope);
  const auto batches = make_batches(keep.size(), [&](size_t i) {
    const bool* flags = ptr<bool>(keep[i]);
    return Exchanged{flags, ptr<bool>(erased[i]), ptr<bool>(mined[i]), mutable_ptr<bool>(result[i]), keep[i].numel(),
                     aligned16(flags)};
  });
  for (const auto& b : batches)
    ACEFAST_LAUNCH((exchange_join_kernel), tile_grid(b, scope), kThreads, 0, scope.stream(), b, bits);
  return {result, erased, mined, status};
}

ACEFAST_REGISTER_CUDA(m) { m.impl("exchange", TORCH_BOX(&exchange)); }

}  // namespace
}  // namespace acefast

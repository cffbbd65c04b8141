// masked_linear on CUDA for dense x: the masked weight is formed once and the products are torch's (cuBLAS), see csrc/ops.h.
#include "common.cuh"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <array>

namespace acefast {
namespace {

// out = W * m where kept, else 0, in the accumulator's precision before the one rounding to T.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    masked_linear_product_kernel(const T* weight, const acc_t<T>* mask, const bool* keep, T* out, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    acc_t<T> v = to_acc(weight[i]);
    if (mask) v *= mask[i];
    out[i] = static_cast<T>(keep && !keep[i] ? acc_t<T>(0) : v);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    masked_linear_bias_kernel(T* y, const acc_t<T>* bias, int64_t outputs, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads)
    y[i] = static_cast<T>(to_acc(y[i]) + bias[i % outputs]);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) masked_linear_bwd_drop_kernel(T* dw, const bool* keep, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads)
    if (!keep[i]) dw[i] = static_cast<T>(acc_t<T>(0));
}

template <typename T>
Tensor launch_masked_linear_product(const Tensor& weight, const OptTensor& mask, const OptTensor& keep, const DeviceScope& scope) {
  if (!mask && !keep) return weight;
  const Tensor out = torch::stable::empty_like(weight);
  if (weight.numel() > 0)
    ACEFAST_LAUNCH((masked_linear_product_kernel<T>), grid_of(weight.numel(), kThreads), kThreads, 0, scope.stream(), ptr<T>(weight),
                   ptr<acc_t<T>>(mask), ptr<bool>(keep), mutable_ptr<T>(out), weight.numel());
  return out;
}

// out = a b through torch. The out variant is the one that autocast leaves alone: out keeps its dtype.
void matrix_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  if (torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION) != 0) fail("masked_linear", "torch's product failed");
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference
}

// out = a b + bias, in one pass over out where cuBLAS can.
void biased_product(const Tensor& a, const Tensor& b, const Tensor& bias, const Tensor& out) {
#ifdef ACEFAST_SIMT
  const auto addmm = aoti_torch_cpu_addmm_out;
#else
  const auto addmm = aoti_torch_cuda_addmm_out;
#endif
  if (addmm(out.get(), bias.get(), a.get(), b.get(), 1, 1) != 0) fail("masked_linear", "torch's product failed");
}

void check_masked_linear(const char* op, const Tensor& x, const Tensor& weight, const OptTensor& mask, const OptTensor& keep) {
  check(x.dim() == 2 && weight.dim() == 2, op, "x and weight must have two dimensions");
  check_tensor(op, "x", x, x, {x.size(0), weight.size(1)});
  check_tensor(op, "weight", weight, x, {weight.size(0), weight.size(1)});
  check_dtype(op, "weight", weight, x.scalar_type());
  check_optional(op, "mask", mask, x, acc_type(x.scalar_type()), {weight.size(0), weight.size(1)});
  check_optional(op, "keep", keep, x, ScalarType::Bool, {weight.size(0), weight.size(1)});
}

Tensor masked_linear(Tensor x, Tensor weight, OptTensor mask, OptTensor bias, OptTensor keep, bool) {
  check_masked_linear("masked_linear", x, weight, mask, keep);
  check_optional("masked_linear", "bias", bias, x, acc_type(x.scalar_type()), {weight.size(0)});
  const DeviceScope scope(x);
  return dispatch_float("masked_linear", x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const Tensor y = new_tensor(x, {x.size(0), weight.size(0)}, x.scalar_type());
    const Tensor product = launch_masked_linear_product<T>(weight, mask, keep, scope);
    const Tensor turned = torch::stable::transpose(product, 0, 1);
    if (std::is_same_v<T, acc_t<T>> && bias && y.numel() > 0) {
      biased_product(x, turned, *bias, y);
      return y;
    }
    matrix_product(x, turned, y);
    if (bias && y.numel() > 0)
      ACEFAST_LAUNCH((masked_linear_bias_kernel<T>), grid_of(y.numel(), kThreads), kThreads, 0, scope.stream(), mutable_ptr<T>(y),
                     ptr<acc_t<T>>(bias), y.size(1), y.numel());
    return y;
  });
}

std::tuple<Tensor, Tensor> masked_linear_bwd(Tensor dy, Tensor x, Tensor weight, OptTensor mask, OptTensor keep, bool need_dx,
                                             bool need_dw, bool all_weights) {
  check_masked_linear("masked_linear_bwd", x, weight, mask, keep);
  check_tensor("masked_linear_bwd", "dy", dy, x, {x.size(0), weight.size(0)});
  check_dtype("masked_linear_bwd", "dy", dy, x.scalar_type());
  const DeviceScope scope(x);
  const Tensor dx = need_dx ? torch::stable::empty_like(x) : none_tensor(x, x.scalar_type());
  const Tensor dw = need_dw ? torch::stable::empty_like(weight) : none_tensor(x, x.scalar_type());
  dispatch_float("masked_linear_bwd", x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    if (need_dx) matrix_product(dy, launch_masked_linear_product<T>(weight, mask, keep, scope), dx);
    if (need_dw) {
      matrix_product(torch::stable::transpose(dy, 0, 1), x, dw);
      if (keep && !all_weights && dw.numel() > 0)
        ACEFAST_LAUNCH((masked_linear_bwd_drop_kernel<T>), grid_of(dw.numel(), kThreads), kThreads, 0, scope.stream(), mutable_ptr<T>(dw),
                       ptr<bool>(keep), dw.numel());
    }
  });
  return {dx, dw};
}

ACEFAST_REGISTER_CUDA(m) {
  m.impl("masked_linear", TORCH_BOX(&masked_linear));
  m.impl("masked_linear_bwd", TORCH_BOX(&masked_linear_bwd));
}

}  // namespace
}  // namespace acefast

// The checks of masked_adam's arguments (csrc/ops.h), the same for the CPU and the CUDA op.
#pragma once

#include "common/tensor.h"

namespace acefast {

inline void check_masked_adam(const char* op, const Tensors& grad, const std::optional<Tensors>& place,
                              const std::optional<Tensors>& keep, const Tensors& theta, const Tensors& mask,
                              const Tensors& theta_mean, const Tensors& theta_square, const Tensors& mask_mean,
                              const Tensors& mask_square, const Tensors& weight, const Tensor& step,
                              const std::vector<double>& theta_settings, const std::vector<double>& mask_settings) {
  check(!theta.empty(), op, "theta is empty");
  check(theta_settings.size() == 6 && mask_settings.size() == 6, op, "settings must be six numbers");
  const ScalarType dtype = theta[0].scalar_type();
  check_tensor(op, "step", step, theta[0], {1});
  check_dtype(op, "step", step, ScalarType::Long);
  for (const Tensors* list : {&theta, &theta_mean, &theta_square}) check_list(op, "theta or a moment of it", *list, theta, dtype);
  if (!mask.empty())
    for (const Tensors* list : {&mask, &mask_mean, &mask_square}) check_list(op, "mask or a moment of it", *list, theta, dtype);
  if (keep) check_list(op, "keep", *keep, theta, ScalarType::Bool);
  check(grad.size() == theta.size() && (!place || place->size() == theta.size()), op, "the lists must be of one length");
  if (place) check_list(op, "place", *place, theta, (*place)[0].scalar_type());
  check(grad[0].is_cuda() == step.is_cuda() && grad[0].get_device_index() == step.get_device_index(), op,
        "grad is on another device");
  check_list(op, "grad", grad, place ? grad : theta, dtype);  // with place, of any size
  if (!weight.empty()) check_list(op, "weight", weight, grad, dtype);
}

}  // namespace acefast

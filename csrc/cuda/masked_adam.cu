// masked_adam on CUDA: one step of Adam on both factors of masked parameters, see csrc/ops.h.
#include "common/masked_adam.h"
#include "list.cuh"

#include <cmath>

namespace acefast {
namespace {

template <typename A>
constexpr int kVec = 16 / sizeof(A);

// Bias corrections of both factors at the step that is taken.
struct Corrections {
  double theta_rate, theta_root, mask_rate, mask_root;
};

struct Betas {
  double lr, beta1, beta2;
};

// One thread: raises the step and takes the corrections from it.
__global__ void masked_adam_step_kernel(int64_t* step, Betas theta, Betas mask, Corrections* corrections) {
  const int64_t t = *step + 1;
  *step = t;
  const auto rate = [&](const Betas& b) { return b.lr / (1.0 - pow(b.beta1, static_cast<double>(t))); };
  const auto root = [&](const Betas& b) { return 1.0 / sqrt(1.0 - pow(b.beta2, static_cast<double>(t))); };
  *corrections = {rate(theta), root(theta), rate(mask), root(mask)};
}

// The settings of one factor.
template <typename A>
struct Adam {
  A beta1, beta2, one_less_beta1, one_less_beta2, eps, decay, l1;
};

// p after the step, given the gradient of the loss; updates the moments.
template <typename A>
__device__ __forceinline__ A adam(const Adam<A>& s, A rate, A root, A p, A gradient, A& mean, A& square) {
  const A sign = static_cast<A>(p > 0) - static_cast<A>(p < 0);
  gradient += s.decay * p + s.l1 * sign;
  mean = s.beta1 * mean + s.one_less_beta1 * gradient;
  square = s.beta2 * square + s.one_less_beta2 * gradient * gradient;
  return p - rate * mean / (sqrt(square) * root + s.eps);
}

template <typename A>
struct Factor {
  A *value, *mean, *square;
};

template <typename A>
struct Parameter {
  const A* grad;
  A* weight;          // or nullptr
  const void* place;  // or nullptr
  const bool* keep;   // or nullptr
  Factor<A> theta, mask;
  int64_t count;
  bool vector;
};

// kVec values of one factor in registers.
template <typename A>
struct Values {
  Pack<A, kVec<A>> value, mean, square;

  __device__ __forceinline__ Values(const Factor<A>& f, int64_t i, int64_t left, bool vector)
      : value(load_part<kVec<A>>(f.value + i, left, vector)),
        mean(load_part<kVec<A>>(f.mean + i, left, vector)),
        square(load_part<kVec<A>>(f.square + i, left, vector)) {}

  __device__ __forceinline__ void store(const Factor<A>& f, int64_t i, int64_t left, bool vector) const {
    store_part(f.value + i, value, left, vector);
    store_part(f.mean + i, mean, left, vector);
    store_part(f.square + i, square, left, vector);
  }

  __device__ __forceinline__ void update(int v, const Adam<A>& settings, A rate, A root, A gradient) {
    value.v[v] = adam(settings, rate, root, value.v[v], gradient, mean.v[v], square.v[v]);
  }
};

template <typename A, bool kMask>
__global__ void __launch_bounds__(kThreads)
    masked_adam_kernel(const __grid_constant__ Batch<Parameter<A>> batch, const Corrections* corrections, Adam<A> of_theta,
                       Adam<A> of_mask, bool wide_place) {
  constexpr int V = kVec<A>;
  const A theta_rate = static_cast<A>(corrections->theta_rate), theta_root = static_cast<A>(corrections->theta_root);
  const A mask_rate = static_cast<A>(corrections->mask_rate), mask_root = static_cast<A>(corrections->mask_root);
  each_element<V>(batch, [&](const Parameter<A>& part, int64_t i) {
    const int64_t left = part.count - i;
    int64_t at[V];  // positions in grad and weight, with place
    Pack<A, V> grad{}, product;
    if (part.place) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v >= left) continue;
        at[v] = wide_place ? static_cast<const int64_t*>(part.place)[i + v] : static_cast<const int32_t*>(part.place)[i + v];
        grad.v[v] = part.grad[at[v]];
      }
    } else {
      grad = load_part<V>(part.grad + i, left, part.vector);
    }
    Pack<bool, V> keep;
#pragma unroll
    for (int v = 0; v < V; ++v) keep.v[v] = true;
    if (part.keep) keep = load_part<V>(part.keep + i, left, part.vector);
    Values<A> theta(part.theta, i, left, part.vector);
    if constexpr (kMask) {
      Values<A> mask(part.mask, i, left, part.vector);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A p = theta.value.v[v], m = mask.value.v[v];
        if (keep.v[v]) {
          theta.update(v, of_theta, theta_rate, theta_root, grad.v[v] * m);
          mask.update(v, of_mask, mask_rate, mask_root, grad.v[v] * p);
        }
        product.v[v] = keep.v[v] ? theta.value.v[v] * mask.value.v[v] : A(0);
      }
      mask.store(part.mask, i, left, part.vector);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (keep.v[v]) theta.update(v, of_theta, theta_rate, theta_root, grad.v[v]);
        product.v[v] = keep.v[v] ? theta.value.v[v] : A(0);
      }
    }
    theta.store(part.theta, i, left, part.vector);
    if (!part.weight) return;
    if (part.place) {
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (v < left) part.weight[at[v]] = product.v[v];
    } else {
      store_part(part.weight + i, product, left, part.vector);
    }
  });
}

template <typename A>
Adam<A> settings_of(const std::vector<double>& s) {
  return {static_cast<A>(s[1]), static_cast<A>(s[2]), static_cast<A>(1 - s[1]), static_cast<A>(1 - s[2]),
          static_cast<A>(s[3]), static_cast<A>(s[4]), static_cast<A>(s[5])};
}

void masked_adam(Tensors grad, std::optional<Tensors> place, std::optional<Tensors> keep, Tensors theta, Tensors mask,
                 Tensors theta_mean, Tensors theta_square, Tensors mask_mean, Tensors mask_square, Tensors weight, Tensor step,
                 std::vector<double> theta_settings, std::vector<double> mask_settings) {
  check_masked_adam("masked_adam", grad, place, keep, theta, mask, theta_mean, theta_square, mask_mean, mask_square, weight, step,
                    theta_settings, mask_settings);
  const bool wide = place && (*place)[0].scalar_type() == ScalarType::Long;
  check(!place || wide || (*place)[0].scalar_type() == ScalarType::Int, "masked_adam", "place must be int32 or int64");
  const DeviceScope scope(step);
  const Tensor memory = new_tensor(step, {sizeof(Corrections) / 8}, ScalarType::Double);
  auto* corrections = static_cast<Corrections*>(memory.mutable_data_ptr());
  const auto betas = [](const std::vector<double>& s) { return Betas{s[0], s[1], s[2]}; };
  ACEFAST_LAUNCH((masked_adam_step_kernel), dim3(1), 1, 0, scope.stream(), mutable_ptr<int64_t>(step), betas(theta_settings),
                 betas(mask_settings), corrections);
  dispatch_acc("masked_adam", theta[0].scalar_type(), [&](auto type) {
    using A = typename decltype(type)::type;
    const auto factor = [](const Tensors& value, const Tensors& mean, const Tensors& square, size_t n) {
      return Factor<A>{mutable_ptr<A>(value[n]), mutable_ptr<A>(mean[n]), mutable_ptr<A>(square[n])};
    };
    const auto batches = make_batches(theta.size(), [&](size_t n) {
      Parameter<A> part{ptr<A>(grad[n]),
                        weight.empty() ? nullptr : mutable_ptr<A>(weight[n]),
                        place ? ptr<void>((*place)[n]) : nullptr,
                        keep ? ptr<bool>((*keep)[n]) : nullptr,
                        factor(theta, theta_mean, theta_square, n),
                        mask.empty() ? Factor<A>{} : factor(mask, mask_mean, mask_square, n),
                        theta[n].numel(),
                        true};
      for (const void* p : std::initializer_list<const void*>{
               part.theta.value, part.theta.mean, part.theta.square, part.mask.value, part.mask.mean, part.mask.square,
               place ? nullptr : part.grad, place ? nullptr : part.weight})
        part.vector = part.vector && aligned16(p);
      part.vector = part.vector && reinterpret_cast<uintptr_t>(part.keep) % kVec<A> == 0;
      return part;
    });
    const Adam<A> of_theta = settings_of<A>(theta_settings), of_mask = settings_of<A>(mask_settings);
    for (const auto& b : batches)
      dispatch_bool(!mask.empty(), [&](auto masked) {
        ACEFAST_LAUNCH((masked_adam_kernel<A, decltype(masked)::value>), tile_grid(b, scope), kThreads, 0, scope.stream(), b,
                       corrections, of_theta, of_mask, wide);
      });
  });
}

ACEFAST_REGISTER_CUDA(m) { m.impl("masked_adam", TORCH_BOX(&masked_adam)); }

}  // namespace
}  // namespace acefast

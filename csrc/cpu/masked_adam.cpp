// masked_adam on the CPU: see csrc/ops.h.
#include <cmath>

#include "common/masked_adam.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace acefast {
namespace {

constexpr int64_t kAdamPiece = int64_t(1) << 14;  // elements per task
constexpr int64_t kAdamBlock = 512;               // elements whose gradient and product are brought together at once

// Adam of one factor at step t.
template <class A>
struct Adam {
  Adam(const std::vector<double>& settings, int64_t t)
      : beta1(A(settings[1])),
        beta2(A(settings[2])),
        one_less_beta1(A(1 - settings[1])),
        one_less_beta2(A(1 - settings[2])),
        eps(A(settings[3])),
        decay(A(settings[4])),
        l1(A(settings[5])),
        rate(A(settings[0] / (1 - std::pow(settings[1], double(t))))),
        root(A(1 / std::sqrt(1 - std::pow(settings[2], double(t))))) {}

  // p after the step, given the gradient of the loss; updates the moments.
  A operator()(A p, A gradient, A& mean, A& square) const {
    const A sign = A(p > 0) - A(p < 0);
    gradient += decay * p + l1 * sign;
    mean = beta1 * mean + one_less_beta1 * gradient;
    square = beta2 * square + one_less_beta2 * gradient * gradient;
    return p - rate * mean / (std::sqrt(square) * root + eps);
  }

  A beta1, beta2, one_less_beta1, one_less_beta2, eps, decay, l1, rate, root;
};

struct Piece {
  size_t tensor;
  int64_t begin, end;
};

template <class A>
struct Factor {
  A *value, *mean, *square;
  Factor at(int64_t i) const { return {value + i, mean + i, square + i}; }
};

// n elements; weight receives theta * mask. The settings come by value, or the stores might change them and nothing is vectorised.
template <class A, bool MASK>
void update(const A* __restrict grad, const uint8_t* __restrict keep, Factor<A> theta, Factor<A> mask, A* __restrict weight, int64_t n,
            const Adam<A> of_theta, const Adam<A> of_mask) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const bool there = keep[i];
    const A p = theta.value[i];
    const A m = MASK ? mask.value[i] : A(1);
    A mean = theta.mean[i], square = theta.square[i];
    const A new_p = of_theta(p, grad[i] * m, mean, square);
    theta.value[i] = there ? new_p : p;
    theta.mean[i] = there ? mean : theta.mean[i];
    theta.square[i] = there ? square : theta.square[i];
    if constexpr (MASK) {
      A mask_mean = mask.mean[i], mask_square = mask.square[i];
      const A new_m = of_mask(m, grad[i] * p, mask_mean, mask_square);
      mask.value[i] = there ? new_m : m;
      mask.mean[i] = there ? mask_mean : mask.mean[i];
      mask.square[i] = there ? mask_square : mask.square[i];
      weight[i] = there ? new_p * new_m : A(0);
    } else {
      weight[i] = there ? new_p : A(0);
    }
  }
}

// The flags of a block where all of it exists.
struct AllTrue {
  uint8_t flags[kAdamBlock];
  constexpr AllTrue() : flags() { std::fill_n(flags, kAdamBlock, uint8_t(1)); }
};

// Elements of one position of the lists, from `begin` on.
template <class A, class I>
struct Parameter {
  const A* grad;
  A* weight;            // or nullptr
  const I* place;       // or nullptr
  const uint8_t* keep;  // or nullptr
  Factor<A> theta, mask;

  template <bool MASK>
  void run(int64_t begin, int64_t end, const Adam<A>& of_theta, const Adam<A>& of_mask) const {
    for (int64_t i = begin; i < end; i += kAdamBlock) {
      const int64_t n = std::min(kAdamBlock, end - i);
      A near[kAdamBlock], product[kAdamBlock];
      static constexpr AllTrue all;
      if (place)
        for (int64_t k = 0; k < n; ++k) near[k] = grad[place[i + k]];
      const A* g = place ? near : grad + i;
      A* out = weight && !place ? weight + i : product;
      const Factor<A> m = MASK ? mask.at(i) : mask;
      update<A, MASK>(g, keep ? keep + i : all.flags, theta.at(i), m, out, n, of_theta, of_mask);
      if (weight && place)
        for (int64_t k = 0; k < n; ++k) weight[place[i + k]] = product[k];
    }
  }
};

void masked_adam(const Tensors& grad, const std::optional<Tensors>& place, const std::optional<Tensors>& keep,
                 const Tensors& theta, const Tensors& mask, const Tensors& theta_mean, const Tensors& theta_square,
                 const Tensors& mask_mean, const Tensors& mask_square, const Tensors& weight, const Tensor& step,
                 const std::vector<double>& theta_settings, const std::vector<double>& mask_settings) {
  const char* op = "masked_adam";
  check_masked_adam(op, grad, place, keep, theta, mask, theta_mean, theta_square, mask_mean, mask_square, weight, step,
                    theta_settings, mask_settings);
  const ScalarType dtype = theta[0].scalar_type(), index = place ? (*place)[0].scalar_type() : ScalarType::Long;
  const int64_t t = ++*mutable_ptr<int64_t>(step);
  std::vector<Piece> pieces;
  for (size_t n = 0; n < theta.size(); ++n)
    for (int64_t b = 0; b < theta[n].numel(); b += kAdamPiece) pieces.push_back({n, b, std::min(theta[n].numel(), b + kAdamPiece)});
  dispatch_acc(op, dtype, [&](auto type) {
    using A = typename decltype(type)::type;
    const Adam<A> of_theta(theta_settings, t), of_mask(mask_settings, t);
    dispatch_index(op, index, [&](auto index_type) {
      using I = typename decltype(index_type)::type;
      parallel_tasks(int64_t(pieces.size()), [&](int64_t task, int64_t) {
        const auto [n, begin, end] = pieces[task];
        Parameter<A, I> p{ptr<A>(grad[n]),
                          weight.empty() ? nullptr : mutable_ptr<A>(weight[n]),
                          place ? ptr<I>((*place)[n]) : nullptr,
                          keep ? ptr<uint8_t>((*keep)[n]) : nullptr,
                          {mutable_ptr<A>(theta[n]), mutable_ptr<A>(theta_mean[n]), mutable_ptr<A>(theta_square[n])},
                          {}};
        if (mask.empty()) return p.template run<false>(begin, end, of_theta, of_mask);
        p.mask = {mutable_ptr<A>(mask[n]), mutable_ptr<A>(mask_mean[n]), mutable_ptr<A>(mask_square[n])};
        p.template run<true>(begin, end, of_theta, of_mask);
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("masked_adam", TORCH_BOX(&masked_adam));
}

}  // namespace acefast

// spmm and its backward on the CPU: see csrc/ops.h. Heads are taken one after the other within a batch of slots.
#include "cpu/memory.h"
#include "cpu/slots.h"

namespace acefast {
namespace {

// Columns per head, heads (1 without them) and length of the per-edge tensors.
struct Sizes {
  int64_t F, H, E;
};

// x [n_src, F] or [n_src, H, F] and what goes with it.
Sizes check_spmm(const char* op, const GraphArgs& g, const Tensor& col, const Tensor& x, const OptTensor& weight,
                 const OptTensor& mask, const OptTensor& keep, const OptTensor& self_weight,
                 const OptTensor& row_scale) {
  check(x.dim() == 2 || x.dim() == 3, op, "x must have two or three dimensions");
  const bool heads = x.dim() == 3;
  const Sizes n{x.size(heads ? 2 : 1), heads ? x.size(1) : 1, edge_count(op, g, {&weight, &mask, &keep})};
  const ScalarType acc = acc_type(x.scalar_type());
  if (heads) {
    check_tensor(op, "x", x, col, {g.n_src, n.H, n.F});
    check_optional(op, "weight", weight, col, acc, {n.E, n.H});
    check_optional(op, "mask", mask, col, acc, {n.E, n.H});
  } else {
    check_tensor(op, "x", x, col, {g.n_src, n.F});
    check_optional(op, "weight", weight, col, acc, {n.E});
    check_optional(op, "mask", mask, col, acc, {n.E});
  }
  check_optional(op, "keep", keep, col, ScalarType::Bool, {n.E});
  check(!self_weight || g.n_src == g.n_dst, op, "self_weight needs as many sources as destinations");
  check_optional(op, "self_weight", self_weight, col, acc, {g.n_dst});
  check_optional(op, "row_scale", row_scale, col, acc, {g.n_dst});
  return n;
}

// Points a batch at head h of source rows, centers, outputs and carried sums that lie `columns` = H * F apart.
template <class T>
struct Heads {
  const T *src, *center;
  T* out;
  int64_t F, H;

  void take(Batch<T, T>& b, int64_t h) const {
    b.src = b.selfrow = src + h * F;
    if (center) b.center = center + h * F;
    if (out) b.out = out + h * F;
    if (h && b.carry) b.carry += F;
  }
};

Tensor spmm(const Tensor& rowptr, const Tensor& col, const OptTensor& eid, const Tensor& colptr, const Tensor& row,
            const OptTensor& ceid, const Tensor& x, const OptTensor& weight, const OptTensor& mask,
            const OptTensor& keep, const OptTensor& self_weight, const OptTensor& row_scale,
            bool /*all_edges: of the backward*/) {
  const char* op = "spmm";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  const auto [F, H, E] = check_spmm(op, g, col, x, weight, mask, keep, self_weight, row_scale);
  const ScalarType dtype = x.scalar_type();
  Tensor y = x.dim() == 3 ? new_output(x, {g.n_dst, H, F}, dtype) : new_output(x, {g.n_dst, F}, dtype);
  dispatch_float(op, dtype, [&, F = F, H = H](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    dispatch_index(op, g.index_type, [&](auto index) {
      const auto side = by_destination<typename decltype(index)::type>(g);
      const A *weights = ptr<A>(weight), *masks = ptr<A>(mask);
      const uint8_t* kept = ptr<uint8_t>(keep);
      const Heads<T> heads{ptr<T>(x), nullptr, mutable_ptr<T>(y), F, H};
      gather_plan<T, T, true>(
          side.ptr, side.n, H * F,
          [&](Batch<T, T>& b) {
            b.F = F;
            b.stride = H * F;
            b.scale = ptr<A>(row_scale);
            b.self = ptr<A>(self_weight);
          },
          [&](Batch<T, T>& b, int64_t s0, int64_t s1) {
            fill_slots(b, side, s0, s1, H * F, kept, true);
            prefetch_slots(side, s0, s1, weights, masks, kept, H);
            for (int64_t h = 0; h < H; ++h) {
              heads.take(b, h);
              fill_coef<Batch<T, T>, A>(b, weights, masks, nullptr, h, H);
              gather_batch<T, T, true, false>(b);
            }
          });
    });
  });
  return y;
}

// dself_j = <dy_j, x_j>
template <class T, class A = acc_t<T>>
void self_products(const T* dy, const T* x, A* dself, int64_t n, int64_t F) {
  constexpr int L = kLanesOf<A>;
  parallel_range(n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T *p = dy + i * F, *q = x + i * F;
      Vec<A> dot{};
      int64_t f = 0;
      for (; f + L <= F; f += L) dot += load(p + f) * load(q + f);
      if (f < F) dot += load_tail(p + f, int(F - f)) * load_tail(q + f, int(F - f));
      dself[i] = hsum<A>(dot);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> spmm_bwd(const Tensor& rowptr, const Tensor& col, const OptTensor& eid,
                                            const Tensor& colptr, const Tensor& row, const OptTensor& ceid,
                                            const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                            const OptTensor& mask, const OptTensor& keep, const OptTensor& self_weight,
                                            const OptTensor& row_scale, bool need_dx, bool need_dcoef, bool all_edges) {
  const char* op = "spmm_bwd";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  const auto [F, H, E] = check_spmm(op, g, col, x, weight, mask, keep, self_weight, row_scale);
  const ScalarType dtype = x.scalar_type(), acc = acc_type(dtype);
  const bool per_head = x.dim() == 3, need_dself = self_weight && need_dcoef;
  if (per_head)
    check_tensor(op, "dy", dy, col, {g.n_dst, H, F});
  else
    check_tensor(op, "dy", dy, col, {g.n_dst, F});
  check_dtype(op, "dy", dy, dtype);
  Tensor dx = !need_dx ? none_tensor(x, dtype)
              : per_head ? new_output(x, {g.n_src, H, F}, dtype)
                         : new_output(x, {g.n_src, F}, dtype);
  Tensor dcoef = !need_dcoef ? none_tensor(x, acc) : per_head ? new_output(x, {E, H}, acc) : new_output(x, {E}, acc);
  Tensor dself = new_tensor(x, {need_dself ? g.n_src : 0}, acc);
  dispatch_float(op, dtype, [&, F = F, H = H, E = E](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    if (need_dself) self_products(ptr<T>(dy), ptr<T>(x), mutable_ptr<A>(dself), g.n_src, H * F);
    if (!need_dx && !need_dcoef) return;
    dispatch_index(op, g.index_type, [&](auto index) {
      const auto side = by_source<typename decltype(index)::type>(g);
      const A *weights = ptr<A>(weight), *masks = ptr<A>(mask), *scale = ptr<A>(row_scale);
      const uint8_t* kept = ptr<uint8_t>(keep);
      const Heads<T> heads{ptr<T>(dy), ptr<T>(x), need_dx ? mutable_ptr<T>(dx) : nullptr, F, H};
      A* out = need_dcoef ? mutable_ptr<A>(dcoef) : nullptr;
      if (out && E > g.n_edges) parallel_zero(out, E * H);
      auto setup = [&](Batch<T, T>& b) {
        b.F = F;
        b.stride = H * F;
        b.scale = nullptr;
        b.self = ptr<A>(self_weight);
      };
      auto put_dots = [&](const Batch<T, T>& b, int64_t h) {
        const int64_t n = b.begin[b.rows];
        if (scale) {
          for (int64_t k = 0; k < n; ++k) out[b.id[k] * H + h] = scale[b.idx[k]] * b.dot[k];
        } else {
          for (int64_t k = 0; k < n; ++k) out[b.id[k] * H + h] = b.dot[k];
        }
      };
      auto dots_only = [&](Batch<T, T>& b) {
        std::fill(b.coef, b.coef + b.begin[b.rows], A(0));
        for (int64_t h = 0; h < H; ++h) {
          b.src = heads.src + h * F;
          b.center = heads.center + h * F;
          gather_batch<T, T, false, true>(b);
          put_dots(b, h);
        }
      };
      auto removed = [&](Batch<T, T>& b, int64_t s0, int64_t s1) {  // the dcoef of removed edges
        fill_slots(b, side, s0, s1, H * F, kept, false);
        if (all_edges) {
          dots_only(b);
        } else {
          for (int64_t k = 0; k < b.begin[b.rows]; ++k) std::fill_n(out + b.id[k] * H, H, A(0));
        }
      };
      if (need_dx && need_dcoef) {
        gather_plan<T, T, true>(side.ptr, side.n, H * F, setup, [&](Batch<T, T>& b, int64_t s0, int64_t s1) {
          if (kept) removed(b, s0, s1);
          fill_slots(b, side, s0, s1, H * F, kept, true);
          prefetch_slots(side, s0, s1, weights, masks, kept, H);
          for (int64_t h = 0; h < H; ++h) {
            heads.take(b, h);
            fill_coef<Batch<T, T>, A>(b, weights, masks, scale, h, H);
            gather_batch<T, T, true, true>(b);
            put_dots(b, h);
          }
        });
      } else if (need_dx) {
        gather_plan<T, T, true>(side.ptr, side.n, H * F, setup, [&](Batch<T, T>& b, int64_t s0, int64_t s1) {
          fill_slots(b, side, s0, s1, H * F, kept, true);
          prefetch_slots(side, s0, s1, weights, masks, kept, H);
          for (int64_t h = 0; h < H; ++h) {
            heads.take(b, h);
            fill_coef<Batch<T, T>, A>(b, weights, masks, scale, h, H);
            gather_batch<T, T, true, false>(b);
          }
        });
      } else {
        gather_plan<T, T, false>(side.ptr, side.n, H * F, setup, [&](Batch<T, T>& b, int64_t s0, int64_t s1) {
          if (kept) removed(b, s0, s1);
          fill_slots(b, side, s0, s1, H * F, kept, true);
          dots_only(b);
        });
      }
    });
  });
  return {dx, dcoef, dself};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("spmm", TORCH_BOX(&spmm));
  m.impl("spmm_bwd", TORCH_BOX(&spmm_bwd));
}

}  // namespace acefast

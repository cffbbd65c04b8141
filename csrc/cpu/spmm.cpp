// spmm and its backward on the CPU: see csrc/ops.h.
#include "cpu/memory.h"
#include "cpu/slots.h"

namespace acefast {
namespace {

Tensor spmm(const Tensor& rowptr, const Tensor& col, const OptTensor& eid, const Tensor& colptr, const Tensor& row,
            const OptTensor& ceid, const Tensor& x, const OptTensor& weight, const OptTensor& mask,
            const OptTensor& keep, const OptTensor& self_weight, const OptTensor& row_scale,
            bool /*all_edges: of the backward*/) {
  const char* op = "spmm";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  check(x.dim() == 2, op, "x must have two dimensions");
  const int64_t F = x.size(1);
  const ScalarType acc = acc_type(x.scalar_type());
  check_tensor(op, "x", x, col, {g.n_src, F});
  check_optional(op, "weight", weight, col, acc, {g.n_edges});
  check_optional(op, "mask", mask, col, acc, {g.n_edges});
  check_optional(op, "keep", keep, col, ScalarType::Bool, {g.n_edges});
  check(!self_weight || g.n_src == g.n_dst, op, "self_weight needs as many sources as destinations");
  check_optional(op, "self_weight", self_weight, col, acc, {g.n_dst});
  check_optional(op, "row_scale", row_scale, col, acc, {g.n_dst});
  Tensor y = new_output(x, {g.n_dst, F}, x.scalar_type());
  dispatch_float(op, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    dispatch_index(op, g.index_type, [&](auto index) {
      const auto side = by_destination<typename decltype(index)::type>(g);
      gather_plan<T, T, true>(
          side.ptr, side.n, F,
          [&](Batch<T, T>& b) {
            b.src = b.selfrow = ptr<T>(x);
            b.F = b.stride = F;
            b.out = mutable_ptr<T>(y);
            b.scale = ptr<A>(row_scale);
            b.self = ptr<A>(self_weight);
          },
          [&](Batch<T, T>& b, int64_t s0, int64_t s1) {
            fill_slots(b, side, s0, s1, F, ptr<uint8_t>(keep), true);
            fill_coef<Batch<T, T>, A>(b, ptr<A>(weight), ptr<A>(mask), nullptr);
            prefetch_slots(side, s0, s1, ptr<A>(weight), ptr<A>(mask), ptr<uint8_t>(keep));
            gather_batch<T, T, true, false>(b);
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
  check(x.dim() == 2, op, "x must have two dimensions");
  const int64_t F = x.size(1);
  const ScalarType dtype = x.scalar_type(), acc = acc_type(dtype);
  check_tensor(op, "x", x, col, {g.n_src, F});
  check_tensor(op, "dy", dy, col, {g.n_dst, F});
  check_dtype(op, "dy", dy, dtype);
  check_optional(op, "weight", weight, col, acc, {g.n_edges});
  check_optional(op, "mask", mask, col, acc, {g.n_edges});
  check_optional(op, "keep", keep, col, ScalarType::Bool, {g.n_edges});
  check(!self_weight || g.n_src == g.n_dst, op, "self_weight needs as many sources as destinations");
  check_optional(op, "self_weight", self_weight, col, acc, {g.n_dst});
  check_optional(op, "row_scale", row_scale, col, acc, {g.n_dst});
  const bool need_dself = self_weight && need_dcoef;
  Tensor dx = need_dx ? new_output(x, {g.n_src, F}, dtype) : none_tensor(x, dtype);
  Tensor dcoef = need_dcoef ? new_output(x, {g.n_edges}, acc) : none_tensor(x, acc);
  Tensor dself = new_tensor(x, {need_dself ? g.n_src : 0}, acc);
  dispatch_float(op, dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    if (need_dself) self_products(ptr<T>(dy), ptr<T>(x), mutable_ptr<A>(dself), g.n_src, F);
    if (!need_dx && !need_dcoef) return;
    dispatch_index(op, g.index_type, [&](auto index) {
      const auto side = by_source<typename decltype(index)::type>(g);
      const uint8_t* kept = ptr<uint8_t>(keep);
      const A* scale = ptr<A>(row_scale);
      A* out = need_dcoef ? mutable_ptr<A>(dcoef) : nullptr;
      auto setup = [&](Batch<T, T>& b) {
        b.src = b.selfrow = ptr<T>(dy);
        b.center = ptr<T>(x);
        b.F = b.stride = F;
        b.out = need_dx ? mutable_ptr<T>(dx) : nullptr;
        b.scale = nullptr;
        b.self = ptr<A>(self_weight);
      };
      auto put_dots = [&](const Batch<T, T>& b) {
        const int64_t n = b.begin[b.rows];
        if (scale) {
          for (int64_t k = 0; k < n; ++k) out[b.id[k]] = scale[b.idx[k]] * b.dot[k];
        } else {
          for (int64_t k = 0; k < n; ++k) out[b.id[k]] = b.dot[k];
        }
      };
      auto removed = [&](Batch<T, T>& b, int64_t s0, int64_t s1) {  // the dcoef of removed edges
        fill_slots(b, side, s0, s1, F, kept, false);
        if (all_edges) {
          std::fill(b.coef, b.coef + b.begin[b.rows], A(0));
          gather_batch<T, T, false, true>(b);
          put_dots(b);
        } else {
          for (int64_t k = 0; k < b.begin[b.rows]; ++k) out[b.id[k]] = 0;
        }
      };
      if (need_dx && need_dcoef) {
        gather_plan<T, T, true>(side.ptr, side.n, F, setup, [&](Batch<T, T>& b, int64_t s0, int64_t s1) {
          if (kept) removed(b, s0, s1);
          fill_slots(b, side, s0, s1, F, kept, true);
          fill_coef<Batch<T, T>, A>(b, ptr<A>(weight), ptr<A>(mask), scale);
          prefetch_slots(side, s0, s1, ptr<A>(weight), ptr<A>(mask), kept);
          gather_batch<T, T, true, true>(b);
          put_dots(b);
        });
      } else if (need_dx) {
        gather_plan<T, T, true>(side.ptr, side.n, F, setup, [&](Batch<T, T>& b, int64_t s0, int64_t s1) {
          fill_slots(b, side, s0, s1, F, kept, true);
          fill_coef<Batch<T, T>, A>(b, ptr<A>(weight), ptr<A>(mask), scale);
          prefetch_slots(side, s0, s1, ptr<A>(weight), ptr<A>(mask), kept);
          gather_batch<T, T, true, false>(b);
        });
      } else {
        gather_plan<T, T, false>(side.ptr, side.n, F, setup, [&](Batch<T, T>& b, int64_t s0, int64_t s1) {
          if (kept) removed(b, s0, s1);
          fill_slots(b, side, s0, s1, F, kept, true);
          std::fill(b.coef, b.coef + b.begin[b.rows], A(0));
          gather_batch<T, T, false, true>(b);
          put_dots(b);
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

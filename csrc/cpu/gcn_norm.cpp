// gcn_norm and its backward on the CPU: see csrc/ops.h. Degrees are summed in double, in the row's order.
#include <cmath>

#include "cpu/memory.h"
#include "cpu/slots.h"

namespace acefast {
namespace {

// x where edge e is kept (all are without `kept`), else 0.
template <class A>
A select(const uint8_t* kept, int64_t e, A x) {
  const A either[2] = {A(0), x};
  return either[kept ? kept[e] != 0 : 1];
}

// Calls f(row, slot0, slot1) for every row, rows shared out by their slots.
template <class F>
void for_rows(const int64_t* ptr, int64_t n, const F& f) {
  const auto bounds = split_rows(ptr, n, 16384, 4);
  parallel_tasks(int64_t(bounds.size()) - 1, [&](int64_t t, int64_t) {
    for (int64_t i = bounds[t]; i < bounds[t + 1]; ++i) f(i, ptr[i], ptr[i + 1]);
  });
}

std::tuple<Tensor, Tensor, Tensor> gcn_norm(const Tensor& rowptr, const Tensor& col, const OptTensor& eid,
                                            const Tensor& colptr, const Tensor& row, const OptTensor& ceid,
                                            const OptTensor& mask, const OptTensor& keep, const OptTensor& loops,
                                            bool masked) {
  const char* op = "gcn_norm";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  check(g.n_src == g.n_dst, op, "the graph must have as many sources as destinations");
  const int64_t n = g.n_dst;
  const ScalarType dtype = mask ? mask->scalar_type() : ScalarType::Float;
  check_optional(op, "mask", mask, col, dtype, {g.n_edges});
  check_optional(op, "keep", keep, col, ScalarType::Bool, {g.n_edges});
  check_optional(op, "loops", loops, col, dtype, {n});
  Tensor c = new_output(col, {g.n_edges}, dtype), c_self = new_tensor(col, {loops ? n : 0}, dtype);
  Tensor dinv = new_tensor(col, {n}, dtype);
  dispatch_acc(op, dtype, [&](auto type) {
    using A = typename decltype(type)::type;
    dispatch_index(op, g.index_type, [&](auto index) {
      const auto side = by_destination<typename decltype(index)::type>(g);
      const A* m = masked ? ptr<A>(mask) : nullptr;
      const uint8_t* kept = masked ? ptr<uint8_t>(keep) : nullptr;
      A* inv = mutable_ptr<A>(dinv);
      const A* loop = ptr<A>(loops);
      A* self = loop ? mutable_ptr<A>(c_self) : nullptr;
      A* out = mutable_ptr<A>(c);
      for_rows(side.ptr, n, [&](int64_t i, int64_t s0, int64_t s1) {
        double d = 0;
        if (m || kept) {
          for (int64_t s = s0; s < s1; ++s) {  // removed edges add 0: no branch, which random patterns would mispredict
            const int64_t e = side.eid ? int64_t(side.eid[s]) : s;
            const double one = m ? double(m[e]) : 1.0;
            d += select(kept, e, one);
          }
        } else {
          d = double(s1 - s0);
        }
        if (loop) d += loop[i];
        inv[i] = d > 0 ? A(1 / std::sqrt(d)) : A(0);
        if (self) self[i] = inv[i] * inv[i] * loop[i];
      });
      for_rows(side.ptr, n, [&](int64_t i, int64_t s0, int64_t s1) {
        for (int64_t s = s0; s < s1; ++s) out[side.eid ? int64_t(side.eid[s]) : s] = inv[i] * inv[side.idx[s]];
      });
    });
  });
  return {c, c_self, dinv};
}

Tensor gcn_norm_bwd(const Tensor& rowptr, const Tensor& col, const OptTensor& eid, const Tensor& colptr,
                    const Tensor& row, const OptTensor& ceid, const Tensor& dinv, const Tensor& dc,
                    const OptTensor& dc_self, const OptTensor& loops, const OptTensor& keep) {
  const char* op = "gcn_norm_bwd";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  check(g.n_src == g.n_dst, op, "the graph must have as many sources as destinations");
  const int64_t n = g.n_dst;
  const ScalarType dtype = dinv.scalar_type();
  check_tensor(op, "dinv", dinv, col, {n});
  check_tensor(op, "dc", dc, col, {g.n_edges});
  check_dtype(op, "dc", dc, dtype);
  check_optional(op, "dc_self", dc_self, col, dtype, {n});
  check_optional(op, "loops", loops, col, dtype, {n});
  check(!dc_self || loops, op, "dc_self needs loops");
  check_optional(op, "keep", keep, col, ScalarType::Bool, {g.n_edges});
  Tensor dmask = new_output(col, {g.n_edges}, dtype);
  dispatch_acc(op, dtype, [&](auto type) {
    using A = typename decltype(type)::type;
    dispatch_index(op, g.index_type, [&](auto index) {
      using I = typename decltype(index)::type;
      const auto in = by_destination<I>(g), out = by_source<I>(g);
      const A *inv = ptr<A>(dinv), *grad = ptr<A>(dc), *grad_self = ptr<A>(dc_self), *loop = ptr<A>(loops);
      const uint8_t* kept = ptr<uint8_t>(keep);
      A* result = mutable_ptr<A>(dmask);
      std::vector<double> from_out(n);  // the part of g_i that comes from edges out of i
      for_rows(out.ptr, n, [&](int64_t j, int64_t s0, int64_t s1) {
        double sum = 0;
        for (int64_t s = s0; s < s1; ++s)
          sum += double(grad[out.eid ? int64_t(out.eid[s]) : s]) * double(inv[out.idx[s]]);
        from_out[j] = sum;
      });
      for_rows(in.ptr, n, [&](int64_t i, int64_t s0, int64_t s1) {
        double sum = from_out[i];
        for (int64_t s = s0; s < s1; ++s) sum += double(grad[in.eid ? int64_t(in.eid[s]) : s]) * double(inv[in.idx[s]]);
        if (grad_self) sum += 2 * double(grad_self[i]) * double(loop[i]) * double(inv[i]);
        const A dd = A(-0.5 * double(inv[i]) * double(inv[i]) * double(inv[i]) * sum);
        for (int64_t s = s0; s < s1; ++s) {
          const int64_t e = in.eid ? int64_t(in.eid[s]) : s;
          result[e] = select(kept, e, dd);
        }
      });
    });
  });
  return dmask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("gcn_norm", TORCH_BOX(&gcn_norm));
  m.impl("gcn_norm_bwd", TORCH_BOX(&gcn_norm_bwd));
}

}  // namespace acefast

// sddmm on the CPU: see csrc/ops.h.
#include "cpu/memory.h"
#include "cpu/slots.h"

namespace acefast {
namespace {

Tensor sddmm(const Tensor& rowptr, const Tensor& col, const OptTensor& eid, const Tensor& colptr, const Tensor& row,
             const OptTensor& ceid, const Tensor& p, const Tensor& q) {
  const char* op = "sddmm";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  check(p.dim() == 2 || p.dim() == 3, op, "p must have two or three dimensions");
  const bool heads = p.dim() == 3;
  const int64_t H = heads ? p.size(1) : 1, F = p.size(heads ? 2 : 1);
  if (heads) {
    check_tensor(op, "p", p, col, {g.n_dst, H, F});
    check_tensor(op, "q", q, col, {g.n_src, H, F});
  } else {
    check_tensor(op, "p", p, col, {g.n_dst, F});
    check_tensor(op, "q", q, col, {g.n_src, F});
  }
  check_dtype(op, "q", q, p.scalar_type());
  const ScalarType acc = acc_type(p.scalar_type());
  Tensor s = heads ? new_output(p, {g.n_edges, H}, acc) : new_output(p, {g.n_edges}, acc);
  dispatch_float(op, p.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    dispatch_index(op, g.index_type, [&](auto index) {
      const auto side = by_destination<typename decltype(index)::type>(g);
      A* out = mutable_ptr<A>(s);
      gather_plan<T, T, false>(
          side.ptr, side.n, F,
          [&](Batch<T, T>& b) {
            b.F = F;
            b.stride = H * F;
          },
          [&](Batch<T, T>& b, int64_t s0, int64_t s1) {
            fill_slots(b, side, s0, s1, H * F, nullptr, true);
            const int64_t n = b.begin[b.rows];
            std::fill(b.coef, b.coef + n, A(0));
            for (int64_t h = 0; h < H; ++h) {
              b.src = ptr<T>(q) + h * F;
              b.center = ptr<T>(p) + h * F;
              gather_batch<T, T, false, true>(b);
              for (int64_t k = 0; k < n; ++k) out[b.id[k] * H + h] = b.dot[k];
            }
          });
    });
  });
  return s;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("sddmm", TORCH_BOX(&sddmm));
}

}  // namespace acefast

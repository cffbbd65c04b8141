// spmm_max and its backward on the CPU: see csrc/ops.h.
#include "cpu/exp.h"
#include "cpu/memory.h"
#include "cpu/slots.h"

namespace acefast {
namespace {

constexpr int kMaxBlock = 4;  // vectors of columns whose extremes stay in registers

// The largest products of part of a row and the edges that gave them, -1 where there is none yet.
template <class A>
struct Extremes {
  std::vector<A> value;
  std::vector<int64_t> id;

  explicit Extremes(int64_t n = 0) : value(n), id(n, -1) {}
  void take(int64_t f, A other, int64_t other_id) {  // of edges that come later
    if (other_id < 0 || (id[f] >= 0 && !(other > value[f]))) return;
    value[f] = other;
    id[f] = other_id;
  }
};

template <class T>
struct MaxBatch : Batch<T, T> {
  Extremes<acc_t<T>> row;  // [F]
};

// For each row and the columns [f0, f0 + NV vectors): f(row of the batch, column, largest product, its entry or -1), a
// vector at a time. tail: columns of the last vector.
template <int NV, class T, class F, class A = acc_t<T>>
void max_block(const Batch<T, T>& b, int64_t f0, int tail, const F& f) {
  constexpr int L = kLanesOf<A>;
  const T* src = b.src + f0;
  for (int64_t r = 0; r < b.rows; ++r) {
    Vec<A> best[NV];
    IntVec<A> where[NV];
    for (int v = 0; v < NV; ++v) {
      best[v] = splat(-std::numeric_limits<A>::infinity());
      where[v] = IntVec<A>{} - 1;
    }
    for (int64_t k = b.begin[r]; k < b.begin[r + 1]; ++k) {
      for (int v = 0; v < NV; ++v) __builtin_prefetch(src + b.off[k + kAhead] + v * L);
      const T* p = src + b.off[k];
      const IntVec<A> here = IntVec<A>{} + int(k - b.begin[r]);
      for (int v = 0; v < NV; ++v) {
        const Vec<A> x = (v == NV - 1 && tail < L ? load_tail(p + v * L, tail) : load(p + v * L)) * b.coef[k];
        const IntVec<A> take = (x > best[v]) | (where[v] < 0);
        best[v] = take ? x : best[v];
        where[v] = take ? here : where[v];
      }
    }
    for (int v = 0; v < NV; ++v) f(r, f0 + v * L, v == NV - 1 ? tail : L, best[v], where[v]);
  }
}

template <class T, class F, class A = acc_t<T>>
void max_batch(Batch<T, T>& b, const F& f) {
  constexpr int64_t L = kLanesOf<A>;
  const int64_t n = b.begin[b.rows];
  for (int64_t k = 0; k < kAhead; ++k) b.off[n + k] = n ? b.off[n - 1] : 0;
  int64_t f0 = 0;
  for (; f0 + kMaxBlock * L <= b.F; f0 += kMaxBlock * L) max_block<kMaxBlock>(b, f0, int(L), f);
  for (; f0 < b.F; f0 += L) max_block<1>(b, f0, int(std::min(L, b.F - f0)), f);
}

template <class T, class I, class A = acc_t<T>>
void max_fwd(const Side<I>& side, int64_t F, const T* x, const A* weight, const A* mask, const uint8_t* keep,
             bool largest, T* y, I* arg) {
  const A sign = largest ? 1 : -1;
  const Plan plan = plan_rows(side.ptr, side.n);  // as gather_plan cuts them
  std::vector<Extremes<A>> partial(plan.partials, Extremes<A>(F));
  const auto finish = [&](int64_t i, const Extremes<A>& e) {
    for (int64_t f = 0; f < F; ++f) {
      y[i * F + f] = T(e.id[f] < 0 ? A(0) : sign * e.value[f]);
      arg[i * F + f] = I(e.id[f]);
    }
  };
  gather_plan<T, T, false, MaxBatch<T>>(
      side.ptr, side.n, 0,
      [&](MaxBatch<T>& b) {
        b.src = x;
        b.F = F;
      },
      [&](MaxBatch<T>& b, int64_t s0, int64_t s1) {
        fill_slots(b, side, s0, s1, F, keep, true);
        fill_coef<Batch<T, T>, A>(b, weight, mask, nullptr, 0, 1);
        prefetch_slots(side, s0, s1, weight, mask, keep, 1);
        for (int64_t k = 0; k < b.begin[b.rows]; ++k) b.coef[k] *= sign;
        if (!b.carry_in && !b.carry_out) {
          max_batch(b, [&](int64_t r, int64_t f0, int count, Vec<A> best, IntVec<A> where) {
            const int64_t at = (b.row0 + r) * F + f0;
            const Vec<A> v = where < 0 ? Vec<A>{} : best * sign;
            count == kLanesOf<A> ? store(y + at, v) : store_tail(y + at, v, count);
            for (int l = 0; l < count; ++l) arg[at + l] = where[l] < 0 ? I(-1) : I(b.id[b.begin[r] + where[l]]);
          });
          return;
        }
        Extremes<A>& e = b.hub >= 0 ? partial[b.hub] : b.row;
        if (!b.carry_in) e = Extremes<A>(F);
        max_batch(b, [&](int64_t, int64_t f0, int count, Vec<A> best, IntVec<A> where) {
          for (int l = 0; l < count; ++l) e.take(f0 + l, best[l], where[l] < 0 ? -1 : b.id[where[l]]);
        });
        if (!b.carry_out) finish(b.row0, e);
      });
  for (const Plan::Hub& hub : plan.hubs) {
    Extremes<A>& e = partial[hub.first];
    for (int64_t p = 1; p < hub.count; ++p)
      for (int64_t f = 0; f < F; ++f) e.take(f, partial[hub.first + p].value[f], partial[hub.first + p].id[f]);
    finish(hub.row, e);
  }
}

// dx and the dots of rows whose entries took part, for columns [f0, f0 + NV vectors).
template <int NV, class T, class I, class A = acc_t<T>>
void routed_block(Batch<T, T>& b, const I* arg, int64_t f0, int tail) {
  constexpr int L = kLanesOf<A>;
  typedef I IdVec __attribute__((vector_size(L * sizeof(I))));
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t row = (b.row0 + r) * b.F + f0;
    Vec<A> acc[NV], center[NV];
    for (int v = 0; v < NV; ++v) {
      const bool last = v == NV - 1 && tail < L;
      acc[v] = Vec<A>{};
      if (b.carry_in) acc[v] = last ? load_tail(b.carry + f0 + v * L, tail) : load(b.carry + f0 + v * L);
      center[v] = last ? load_tail(b.center + row + v * L, tail) : load(b.center + row + v * L);
    }
    for (int64_t k = b.begin[r]; k < b.begin[r + 1]; ++k) {
      for (int v = 0; v < NV; ++v) {
        __builtin_prefetch(b.src + f0 + b.off[k + kAhead] + v * L);
        __builtin_prefetch(arg + f0 + b.off[k + kAhead] + v * L);
      }
      const int64_t at = b.off[k] + f0;
      Vec<A> dot{};
      for (int v = 0; v < NV; ++v) {
        const bool last = v == NV - 1 && tail < L;
        IdVec from = IdVec{} - 1;
        std::memcpy(&from, arg + at + v * L, (last ? tail : L) * sizeof(I));
        const IntVec<A> mine = __builtin_convertvector(from == I(b.id[k]), IntVec<A>);
        const Vec<A> g = mine ? (last ? load_tail(b.src + at + v * L, tail) : load(b.src + at + v * L)) : Vec<A>{};
        acc[v] += b.coef[k] * g;
        dot += g * center[v];
      }
      b.dot[k] += hsum<A>(dot);
    }
    if (!b.out) continue;
    for (int v = 0; v < NV; ++v) {
      const bool last = v == NV - 1 && tail < L;
      if (b.carry_out)
        last ? store_tail(b.carry + f0 + v * L, acc[v], tail) : store(b.carry + f0 + v * L, acc[v]);
      else
        last ? store_tail(b.out + row + v * L, acc[v], tail) : store(b.out + row + v * L, acc[v]);
    }
  }
}

template <class T, class I, class A = acc_t<T>>
void max_bwd(const Side<I>& side, int64_t F, const T* dy, const I* arg, const T* x, const A* weight, const A* mask,
             const uint8_t* keep, T* dx, A* dcoef) {
  constexpr int64_t L = kLanesOf<A>;
  gather_plan<T, T, true>(
      side.ptr, side.n, F,
      [&](Batch<T, T>& b) {
        b.src = dy;
        b.center = x;
        b.F = F;
        b.out = dx;
      },
      [&](Batch<T, T>& b, int64_t s0, int64_t s1) {
        fill_slots(b, side, s0, s1, F, keep, true);
        fill_coef<Batch<T, T>, A>(b, weight, mask, nullptr, 0, 1);
        prefetch_slots(side, s0, s1, weight, mask, keep, 1);
        const int64_t n = b.begin[b.rows];
        for (int64_t k = 0; k < kAhead; ++k) b.off[n + k] = n ? b.off[n - 1] : 0;
        std::fill(b.dot, b.dot + n, A(0));
        int64_t f0 = 0;
        for (; f0 + kMaxBlock * L <= F; f0 += kMaxBlock * L) routed_block<kMaxBlock>(b, arg, f0, int(L));
        for (; f0 < F; f0 += L) routed_block<1>(b, arg, f0, int(std::min(L, F - f0)));
        if (!dcoef) return;
        for (int64_t k = 0; k < n; ++k) dcoef[b.id[k]] = b.dot[k];
      });
}

// Checks the arguments that forward and backward share; returns E.
int64_t check_max(const char* op, const GraphArgs& g, const Tensor& col, const Tensor& x, const OptTensor& weight,
                  const OptTensor& mask, const OptTensor& keep) {
  check(x.dim() == 2, op, "x must have two dimensions");
  const int64_t E = edge_count(op, g, {&weight, &mask, &keep});
  const ScalarType acc = acc_type(x.scalar_type());
  check_tensor(op, "x", x, col, {g.n_src, x.size(1)});
  check_optional(op, "weight", weight, col, acc, {E});
  check_optional(op, "mask", mask, col, acc, {E});
  check_optional(op, "keep", keep, col, ScalarType::Bool, {E});
  return E;
}

std::tuple<Tensor, Tensor> spmm_max(const Tensor& rowptr, const Tensor& col, const OptTensor& eid,
                                    const Tensor& colptr, const Tensor& row, const OptTensor& ceid, const Tensor& x,
                                    const OptTensor& weight, const OptTensor& mask, const OptTensor& keep,
                                    bool largest) {
  const char* op = "spmm_max";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  check_max(op, g, col, x, weight, mask, keep);
  const int64_t F = x.size(1);
  Tensor y = new_output(x, {g.n_dst, F}, x.scalar_type()), arg = new_output(x, {g.n_dst, F}, g.index_type);
  dispatch_float(op, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    dispatch_index(op, g.index_type, [&](auto index) {
      using I = typename decltype(index)::type;
      max_fwd<T>(by_destination<I>(g), F, ptr<T>(x), ptr<A>(weight), ptr<A>(mask), ptr<uint8_t>(keep), largest,
                 mutable_ptr<T>(y), mutable_ptr<I>(arg));
    });
  });
  return {y, arg};
}

std::tuple<Tensor, Tensor> spmm_max_bwd(const Tensor& rowptr, const Tensor& col, const OptTensor& eid,
                                        const Tensor& colptr, const Tensor& row, const OptTensor& ceid,
                                        const Tensor& dy, const Tensor& arg, const Tensor& x, const OptTensor& weight,
                                        const OptTensor& mask, const OptTensor& keep, bool need_dx, bool need_dcoef) {
  const char* op = "spmm_max_bwd";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  const int64_t E = check_max(op, g, col, x, weight, mask, keep), F = x.size(1);
  const ScalarType dtype = x.scalar_type(), acc = acc_type(dtype);
  check_tensor(op, "dy", dy, col, {g.n_dst, F});
  check_dtype(op, "dy", dy, dtype);
  check_tensor(op, "arg", arg, col, {g.n_dst, F});
  check_dtype(op, "arg", arg, g.index_type);
  Tensor dx = need_dx ? new_output(x, {g.n_src, F}, dtype) : none_tensor(x, dtype);
  Tensor dcoef = need_dcoef ? new_output(x, {E}, acc) : none_tensor(x, acc);
  if (!need_dx && !need_dcoef) return {dx, dcoef};
  dispatch_float(op, dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    if (need_dcoef && (keep || E > g.n_edges)) parallel_zero(mutable_ptr<A>(dcoef), E);
    dispatch_index(op, g.index_type, [&](auto index) {
      using I = typename decltype(index)::type;
      max_bwd<T>(by_source<I>(g), F, ptr<T>(dy), ptr<I>(arg), ptr<T>(x), ptr<A>(weight), ptr<A>(mask),
                 ptr<uint8_t>(keep), need_dx ? mutable_ptr<T>(dx) : nullptr,
                 need_dcoef ? mutable_ptr<A>(dcoef) : nullptr);
    });
  });
  return {dx, dcoef};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("spmm_max", TORCH_BOX(&spmm_max));
  m.impl("spmm_max_bwd", TORCH_BOX(&spmm_max_bwd));
}

}  // namespace acefast

// edge_softmax and its backward on the CPU: see csrc/ops.h. Rows longer than a batch have their sums made beforehand.
#include "cpu/heads.h"
#include "cpu/memory.h"
#include "cpu/slots.h"

namespace acefast {
namespace {

template <class A>
struct SoftmaxBatch : Batch<A, A> {
  std::vector<A> in, other, out;  // per entry and head
  std::vector<A> top, sum;        // [H], of one row

  void make(const HeadLanes<A>& lanes) {
    for (auto* buffer : {&in, &other, &out}) *buffer = lanes.buffer();
    top.resize(lanes.H);
    sum.resize(lanes.H);
  }
};

// Two numbers per head of a row, for the rows with more than lanes.entries() slots: the largest s and the sum of
// exp(s - largest) forward; backward the second is the sum of a * da and the first is not used.
template <class A>
struct LongRows {
  int64_t H;
  std::vector<int64_t> row;
  std::vector<A> top, sum;  // [rows, H]

  const A* of(const std::vector<A>& values, int64_t i) const {
    return values.data() + (std::lower_bound(row.begin(), row.end(), i) - row.begin()) * H;
  }
};

template <class A>
void write_edges(const SoftmaxBatch<A>& b, const HeadLanes<A>& lanes, A* out) {
  for (int64_t k = 0; k < b.begin[b.rows]; ++k)
    std::copy_n(b.out.data() + k * lanes.pitch, lanes.H, out + b.id[k] * lanes.H);
}

// Walks the rows: fill(batch) brings the values of a batch's entries; statistics(batch, row of the batch) makes b.top
// and b.sum; finish(batch, row, top, sum) the row's part of b.out; join(top, sum, other top, other sum) joins parts of
// a row.
template <class A, class I, class Fill, class Statistics, class Join, class Finish>
void softmax_rows(const Side<I>& side, const HeadLanes<A>& lanes, const uint8_t* keep, A* out, const Fill& fill,
                  const Statistics& statistics, const Join& join, const Finish& finish) {
  const int64_t H = lanes.H;
  const auto pieces = long_row_pieces(side.ptr, side.n, lanes.entries());
  const A none = -std::numeric_limits<A>::infinity();
  std::vector<A> tops(pieces.size() * H, none), sums(pieces.size() * H);
  parallel_tasks(int64_t(pieces.size()), [&](int64_t task, int64_t) {
    const Piece& piece = pieces[task];
    auto b = std::make_unique<SoftmaxBatch<A>>();
    b->make(lanes);
    b->row0 = piece.row0;
    b->rows = 1;
    for (int64_t s = piece.slot0; s < piece.slot1; s += lanes.entries()) {
      fill_slots(*b, side, s, std::min(s + lanes.entries(), piece.slot1), 0, keep, true);
      fill(*b);
      statistics(*b, 0);
      for (int64_t h = 0; h < H; ++h) join(tops[task * H + h], sums[task * H + h], b->top[h], b->sum[h]);
    }
  });
  LongRows<A> rows{H, {}, {}, {}};
  for (size_t p = 0; p < pieces.size(); ++p) {
    if (rows.row.empty() || rows.row.back() != pieces[p].row0) {
      rows.row.push_back(pieces[p].row0);
      rows.top.resize(rows.top.size() + H, none);
      rows.sum.resize(rows.sum.size() + H);
    }
    const size_t last = (rows.row.size() - 1) * H;
    for (int64_t h = 0; h < H; ++h) join(rows.top[last + h], rows.sum[last + h], tops[p * H + h], sums[p * H + h]);
  }
  gather_plan<A, A, false, SoftmaxBatch<A>>(
      side.ptr, side.n, 0, [&](SoftmaxBatch<A>& b) { b.make(lanes); },
      [&](SoftmaxBatch<A>& b, int64_t s0, int64_t s1) {
        fill_slots(b, side, s0, s1, 0, keep, true);
        fill(b);
        const bool part = b.carry_in || b.carry_out;
        for (int64_t r = 0; r < b.rows; ++r) {
          if (!part) statistics(b, r);
          if (part)
            finish(b, r, rows.of(rows.top, b.row0), rows.of(rows.sum, b.row0));
          else
            finish(b, r, b.top.data(), b.sum.data());
        }
        write_edges(b, lanes, out);
      },
      lanes.entries());
}

template <class A, class I>
void softmax_fwd(const Side<I>& side, const HeadLanes<A>& lanes, const A* s, const uint8_t* keep, A* a) {
  constexpr int64_t L = HeadLanes<A>::L;
  const A none = -std::numeric_limits<A>::infinity();
  softmax_rows(
      side, lanes, keep, a,
      [&](SoftmaxBatch<A>& b) { lanes.copy(s, lanes.H, b.id, b.begin[b.rows], b.in.data()); },
      [&](SoftmaxBatch<A>& b, int64_t r) {
        for (int64_t block = 0; block < lanes.blocks; ++block) {
          Vec<A> best = splat(none), total{};
          for (int64_t k = b.begin[r]; k < b.begin[r + 1]; k += lanes.step)
            best = vmax<A>(
                best, lanes.first(load(b.in.data() + k * lanes.pitch + block * L), b.begin[r + 1] - k, none));
          A shift[L];
          lanes.fold_max(best, block, b.top.data() + block * L);
          for (int64_t h = 0; h < lanes.heads_of(block); ++h) shift[h] = finite_or_zero(b.top[block * L + h]);
          const Vec<A> shifts = lanes.repeat(shift, block);
          for (int64_t k = b.begin[r]; k < b.begin[r + 1]; k += lanes.step) {
            const Vec<A> e = vexp<A>(load(b.in.data() + k * lanes.pitch + block * L) - shifts);
            total += lanes.first(e, b.begin[r + 1] - k, A(0));
          }
          lanes.fold_sum(total, block, b.sum.data() + block * L);
        }
      },
      [](A& top, A& sum, A other_top, A other_sum) {
        const A best = std::max(top, other_top), shift = finite_or_zero(best);
        sum = sum * std::exp(top - shift) + other_sum * std::exp(other_top - shift);
        top = best;
      },
      [&](SoftmaxBatch<A>& b, int64_t r, const A* top, const A* sum) {
        for (int64_t block = 0; block < lanes.blocks; ++block) {
          A shift[L], factor[L];
          for (int64_t h = 0; h < lanes.heads_of(block); ++h) {
            shift[h] = finite_or_zero(top[block * L + h]);
            factor[h] = sum[block * L + h] == 0 ? A(0) : 1 / sum[block * L + h];
          }
          const Vec<A> shifts = lanes.repeat(shift, block), factors = lanes.repeat(factor, block);
          for (int64_t k = b.begin[r]; k < b.begin[r + 1]; k += lanes.step) {
            const int64_t at = k * lanes.pitch + block * L;
            store(b.out.data() + at, vexp<A>(load(b.in.data() + at) - shifts) * factors);
          }
        }
      });
}

template <class A, class I>
void softmax_bwd(const Side<I>& side, const HeadLanes<A>& lanes, const A* a, const A* da, const uint8_t* keep, A* ds) {
  constexpr int64_t L = HeadLanes<A>::L;
  softmax_rows(
      side, lanes, keep, ds,
      [&](SoftmaxBatch<A>& b) {
        lanes.copy(a, lanes.H, b.id, b.begin[b.rows], b.in.data());
        lanes.copy(da, lanes.H, b.id, b.begin[b.rows], b.other.data());
      },
      [&](SoftmaxBatch<A>& b, int64_t r) {
        for (int64_t block = 0; block < lanes.blocks; ++block) {
          Vec<A> total{};
          for (int64_t k = b.begin[r]; k < b.begin[r + 1]; k += lanes.step) {
            const int64_t at = k * lanes.pitch + block * L;
            total += lanes.first(load(b.in.data() + at) * load(b.other.data() + at), b.begin[r + 1] - k, A(0));
          }
          lanes.fold_sum(total, block, b.sum.data() + block * L);
        }
      },
      [](A&, A& sum, A, A other_sum) { sum += other_sum; },
      [&](SoftmaxBatch<A>& b, int64_t r, const A*, const A* sum) {
        for (int64_t block = 0; block < lanes.blocks; ++block) {
          const Vec<A> sums = lanes.repeat(sum + block * L, block);
          for (int64_t k = b.begin[r]; k < b.begin[r + 1]; k += lanes.step) {
            const int64_t at = k * lanes.pitch + block * L;
            store(b.out.data() + at, load(b.in.data() + at) * (load(b.other.data() + at) - sums));
          }
        }
      });
}

// Checks s-like tensors [E] or [E, H] of one shape; returns the output, 0 at edges that do not exist.
Tensor check_softmax(const char* op, const GraphArgs& g, const Tensor& col, const char* name, const Tensor& s,
                     const OptTensor& keep) {
  check(s.dim() == 1 || s.dim() == 2, op, "scores must have one or two dimensions");
  const OptTensor scores = s;
  const int64_t E = edge_count(op, g, {&scores});
  check_optional(op, "keep", keep, col, ScalarType::Bool, {E});
  if (s.dim() == 1)
    check_tensor(op, name, s, col, {E});
  else
    check_tensor(op, name, s, col, {E, s.size(1)});
  Tensor out = s.dim() == 1 ? new_output(s, {E}, s.scalar_type()) : new_output(s, {E, s.size(1)}, s.scalar_type());
  if (keep || E > g.n_edges)
    dispatch_acc(op, s.scalar_type(), [&](auto type) {
      parallel_zero(mutable_ptr<typename decltype(type)::type>(out), out.numel());
    });
  return out;
}

Tensor edge_softmax(const Tensor& rowptr, const Tensor& col, const OptTensor& eid, const Tensor& colptr,
                    const Tensor& row, const OptTensor& ceid, const Tensor& s, const OptTensor& keep) {
  const char* op = "edge_softmax";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  Tensor a = check_softmax(op, g, col, "s", s, keep);
  if (a.numel() == 0) return a;
  dispatch_acc(op, s.scalar_type(), [&](auto type) {
    using A = typename decltype(type)::type;
    dispatch_index(op, g.index_type, [&](auto index) {
      softmax_fwd<A>(by_destination<typename decltype(index)::type>(g), HeadLanes<A>(s.dim() == 1 ? 1 : s.size(1)),
                     ptr<A>(s), ptr<uint8_t>(keep), mutable_ptr<A>(a));
    });
  });
  return a;
}

Tensor edge_softmax_bwd(const Tensor& rowptr, const Tensor& col, const OptTensor& eid, const Tensor& colptr,
                        const Tensor& row, const OptTensor& ceid, const Tensor& a, const Tensor& da,
                        const OptTensor& keep) {
  const char* op = "edge_softmax_bwd";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  Tensor ds = check_softmax(op, g, col, "a", a, keep);
  if (a.dim() == 1)
    check_tensor(op, "da", da, col, {a.size(0)});
  else
    check_tensor(op, "da", da, col, {a.size(0), a.size(1)});
  check_dtype(op, "da", da, a.scalar_type());
  if (ds.numel() == 0) return ds;
  dispatch_acc(op, a.scalar_type(), [&](auto type) {
    using A = typename decltype(type)::type;
    dispatch_index(op, g.index_type, [&](auto index) {
      softmax_bwd<A>(by_destination<typename decltype(index)::type>(g), HeadLanes<A>(a.dim() == 1 ? 1 : a.size(1)),
                     ptr<A>(a), ptr<A>(da), ptr<uint8_t>(keep), mutable_ptr<A>(ds));
    });
  });
  return ds;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("edge_softmax", TORCH_BOX(&edge_softmax));
  m.impl("edge_softmax_bwd", TORCH_BOX(&edge_softmax_bwd));
}

}  // namespace acefast

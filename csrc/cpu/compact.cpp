// compact on the CPU: see csrc/ops.h. Slots are cut into chunks; the kept ones of each are counted, the counts summed,
// and each chunk is then packed to where its first kept slot belongs.
#include "cpu/memory.h"
#include "cpu/slots.h"

namespace acefast {
namespace {

constexpr int64_t kChunk = 1 << 14;
constexpr int64_t kPacked = 1024;  // elements packed at once

// Elements of [0, n) for which flag(k) is true, before each chunk; the total in the last entry.
template <class Flag>
std::vector<int64_t> count_chunks(int64_t n, const Flag& flag) {
  std::vector<int64_t> before((n + kChunk - 1) / kChunk + 1, 0);
  parallel_range(n, kChunk, [&](int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t k = begin; k < end; ++k) count += flag(k);
    before[begin / kChunk + 1] = count;
  });
  for (size_t c = 1; c < before.size(); ++c) before[c] += before[c - 1];
  return before;
}

// The kept slots of one side of a graph. name: id -> the id written, only where `named`.
template <class I, class Name>
void compact_side(const char* op, const Side<I>& side, int64_t slots, const uint8_t* keep, int64_t num_kept,
                  int64_t* ptr, I* idx, I* ids, const Name& name) {
  const auto kept = [&](int64_t s) { return keep[side.eid ? int64_t(side.eid[s]) : s] != 0; };
  const auto before = count_chunks(slots, kept);
  check(before.back() == num_kept, op, "num_kept is not the number of true in keep");
  parallel_range(slots, kChunk, [&](int64_t begin, int64_t end) {
    int64_t row = std::lower_bound(side.ptr, side.ptr + side.n + 1, begin) - side.ptr;
    int64_t first = before[begin / kChunk];
    I some_idx[kPacked], some_ids[kPacked];
    for (int64_t part = begin; part < end; part += kPacked) {
      int64_t n = 0;
      for (int64_t s = part; s < std::min(part + kPacked, end); ++s) {
        for (; side.ptr[row] == s; ++row) ptr[row] = first + n;
        some_idx[n] = side.idx[s];
        if (ids) some_ids[n] = name(side.eid ? side.eid[s] : I(s));
        n += kept(s);
      }
      std::copy_n(some_idx, n, idx + first);
      if (ids) std::copy_n(some_ids, n, ids + first);
      first += n;
    }
  });
  for (int64_t i = side.n; i >= 0 && side.ptr[i] == slots; --i) ptr[i] = num_kept;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> compact(
    const Tensor& rowptr, const Tensor& col, const OptTensor& eid, const Tensor& colptr, const Tensor& row,
    const OptTensor& ceid, const Tensor& keep, int64_t num_kept, bool renumber) {
  const char* op = "compact";
  const GraphArgs g = graph_args(op, rowptr, col, eid, colptr, row, ceid);
  check_tensor(op, "keep", keep, col, {g.n_edges});
  check_dtype(op, "keep", keep, ScalarType::Bool);
  check(num_kept >= 0 && num_kept <= g.n_edges, op, "num_kept is not the number of true in keep");
  const auto outputs = [&](int64_t rows, bool named, Tensor& ptrs, Tensor& idx, Tensor& ids) {
    ptrs = new_tensor(col, {rows + 1}, ScalarType::Long);
    idx = new_output(col, {num_kept}, g.index_type);
    ids = named ? new_output(col, {num_kept}, g.index_type) : none_tensor(col, g.index_type);
  };
  Tensor new_rowptr, new_col, new_eid, new_colptr, new_row, new_ceid;
  outputs(g.n_dst, !renumber || eid, new_rowptr, new_col, new_eid);
  outputs(g.n_src, !renumber || ceid, new_colptr, new_row, new_ceid);
  Tensor edge_ids = new_output(col, {renumber ? num_kept : 0}, ScalarType::Long);
  dispatch_index(op, g.index_type, [&](auto index) {
    using I = typename decltype(index)::type;
    const uint8_t* kept = ptr<uint8_t>(keep);
    const auto sides = [&](const auto& name) {
      compact_side<I>(op, by_destination<I>(g), g.n_edges, kept, num_kept, mutable_ptr<int64_t>(new_rowptr),
                      mutable_ptr<I>(new_col), new_eid.numel() ? mutable_ptr<I>(new_eid) : nullptr, name);
      compact_side<I>(op, by_source<I>(g), g.n_edges, kept, num_kept, mutable_ptr<int64_t>(new_colptr),
                      mutable_ptr<I>(new_row), new_ceid.numel() ? mutable_ptr<I>(new_ceid) : nullptr, name);
    };
    if (!renumber) return sides([](I id) { return id; });
    const auto before = count_chunks(g.n_edges, [&](int64_t e) { return kept[e] != 0; });
    check(before.back() == num_kept, op, "num_kept is not the number of true in keep");
    std::vector<I> rank(eid || ceid ? g.n_edges : 0);
    int64_t* names = mutable_ptr<int64_t>(edge_ids);
    parallel_range(g.n_edges, kChunk, [&](int64_t begin, int64_t end) {
      int64_t n = before[begin / kChunk];
      for (int64_t e = begin; e < end; ++e) {
        if (!kept[e]) continue;
        names[n] = e;
        if (!rank.empty()) rank[e] = I(n);
        ++n;
      }
    });
    sides([&](I id) { return rank[id]; });
  });
  return {new_rowptr, new_col, new_eid, new_colptr, new_row, new_ceid, edge_ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acefast_native, CPU, m) {
  m.impl("compact", TORCH_BOX(&compact));
}

}  // namespace acefast

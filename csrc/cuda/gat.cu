// gat on CUDA: attention, mask, dropout and aggregation in one pass over a row's edges, see csrc/ops.h.
//
// A warp takes one segment of a row and one block of heads. It works through the edges 32 at a time in two roles: first lane l
// holds head l % slots of every (32 / slots)-th edge and computes logits, once per edge and head, leaving the coefficients in
// shared memory; then the warp splits into groups that gather one edge each, a group made of `slots` heads of `lanes` lanes.
// The softmax is kept online: a running maximum per head, in powers of two. Pieces of long rows leave (maximum, sum,
// unnormalised columns), which a second kernel joins in order. The backward visits each edge once, by source over the CSC.
#include "gather.cuh"
#include "rows.cuh"

namespace acefast {
namespace {

// Most heads of a block, and the values of 32 edges and these heads that a warp keeps in shared memory.
template <typename A>
constexpr int kHeads = sizeof(A) == 8 ? 4 : 8;
template <typename A>
constexpr int kLogits = kWarp * kHeads<A>;

// How the columns [heads, features] are spread over a warp.
struct HeadLayout {
  int lanes;                           // lanes of a head, a power of two
  int heads, slots;                    // heads of a block, and the power of two that holds them
  int64_t head_blocks, column_blocks;  // a head of more than 32 lanes' columns is cut into column blocks

  HeadLayout() = default;
  HeadLayout(int64_t all_heads, int64_t features, int vec, int most_heads) : lanes(group_lanes(features, vec)) {
    const int repeat = vec == 1 ? 4 : 1;
    if (vec == 1 && features > 32 && features <= 48) lanes = 16;  // three repeats of 16 lanes waste less than two of 32
    heads = static_cast<int>(std::min<int64_t>({all_heads, kWarp / lanes, most_heads}));
    slots = power_of_two(heads, most_heads);
    head_blocks = ceil_div(all_heads, heads);
    column_blocks = std::max<int64_t>(1, ceil_div(features, int64_t{lanes} * repeat * vec));
  }
};

template <typename T, typename A, typename I>
struct GatArgs {
  const int64_t* ptr;  // rowptr [rows + 1]; backward: colptr
  const I* idx;        // [edges]
  const I* eid;        // [edges] or nullptr
  const T* in;         // gathered rows [*, heads, features]: z; backward: dy
  const T* own;        // backward: z
  T* out;              // [rows, heads, features]: y; backward: dz
  T* slope_y;          // forward, with save
  A* slope_sum;        // [rows, heads], with save, else nullptr
  A* lse;              // forward
  const A* a_src;      // [n_src, heads]
  const A* a_dst;      // [n_dst, heads]
  const A* stat;       // backward: [n_dst, heads, 4]: a_dst, lse in powers of two, D, unused
  A* da_src;           // backward
  A* dmask;            // backward: like mask, or nullptr
  const A* mask;       // [E] or [E, heads] or nullptr
  const bool* keep;    // [E] or nullptr
  A* partial;          // [partials, heads, features]
  A* partial_slope;    // the same, with save
  A* partial_stat;     // forward: [partials, 3, heads]: maximum, sum, slope_sum; backward: [partials, heads]: da_src
  A negative_slope;
  Dropout<A> dropout;
  int64_t rows, edges, heads, features;
  Pieces pieces;
  HeadLayout layout;
  bool mask_per_head, mask_on_logit;  // mask_on_logit: there is a mask and it acts there
  bool heads_in_turn;                 // backward: one warp takes all blocks of heads, to sum a mask's gradient over them
};

// The lane's places in a block of heads.
struct HeadLane {
  int lane, slots, edge_step, logit_head, first_edge;  // logits: edges first_edge, first_edge + edge_step, ... of one head
  int lanes, group, groups, my_group, head, in_head;   // gather: columns of one head of every groups-th edge

  __device__ explicit HeadLane(const HeadLayout& layout)
      : lane(lane_index()), slots(layout.slots), edge_step(kWarp / slots), logit_head(lane % slots), first_edge(lane / slots),
        lanes(layout.lanes), group(slots * lanes), groups(kWarp / group), my_group(lane / group), head(lane % group / lanes),
        in_head(lane % lanes) {}
};

template <typename T, typename A, typename I>
__device__ __forceinline__ A mask_of(const GatArgs<T, A, I>& a, int64_t e, int64_t head) {
  return a.mask ? a.mask[a.mask_per_head ? e * a.heads + head : e] : A(1);
}

template <typename T, typename A, int VEC>
__device__ __forceinline__ void store_columns(T* out, const A* acc, A scale) {
  Pack<T, VEC> result;
#pragma unroll
  for (int v = 0; v < VEC; ++v) result.v[v] = static_cast<T>(acc[v] * scale);
  store_pack(out, result);
}

template <typename A, int N>
__device__ __forceinline__ void sum_groups(A (&acc)[N], int group) {
  for (int offset = group; offset < kWarp; offset *= 2) {
#pragma unroll
    for (int v = 0; v < N; ++v) acc[v] += __shfl_xor_sync(kFullMask, acc[v], offset);
  }
}

template <typename T, typename A, typename I, int VEC>
__global__ void __launch_bounds__(kRowThreads, 8) gat_fwd_kernel(const GatArgs<T, A, I> a) {
  constexpr int R = kRepeat<VEC>;
  ACEFAST_SHARED(shared_index, I, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_id, I, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_coef, A, [kRowWarps][kLogits<A>]);
  ACEFAST_SHARED(shared_slope_coef, A, [kRowWarps][kLogits<A>]);
  ACEFAST_SHARED(shared_factor, A, [kRowWarps][kLogits<A>]);
  const HeadLane my(a.layout);
  const int warp = warp_index();
  I *index = shared_index[warp], *id = shared_id[warp];
  A *coef = shared_coef[warp], *slope_coef = shared_slope_coef[warp], *factors = shared_factor[warp];
  const bool save = a.slope_sum != nullptr;
  const int64_t blocks = a.layout.head_blocks * a.layout.column_blocks, items = (a.pieces.partials() + a.rows) * blocks;
  for (int64_t item = int64_t{blockIdx.x} * kRowWarps + warp; item < items; item += int64_t{gridDim.x} * kRowWarps) {
    const Segment seg = segment_of(item / blocks, a.ptr, a.rows, a.edges, a.pieces);
    if (seg.partial >= 0 && seg.begin == seg.end) continue;
    const int64_t column_block = item % blocks % a.layout.column_blocks;
    const int64_t first_head = item % blocks / a.layout.column_blocks * a.layout.heads;
    const int heads = static_cast<int>(min(int64_t{a.layout.heads}, a.heads - first_head));
    const bool has_logits = my.logit_head < heads;
    const int64_t logit_head = first_head + my.logit_head, head = first_head + my.head;
    const int64_t first_column = (column_block * R * my.lanes + my.in_head) * VEC;  // of repeat 0; the next follow at lanes * VEC
    const int64_t columns = my.head < heads ? a.features : 0;
    const A dst = has_logits ? a.a_dst[seg.row * a.heads + logit_head] : A(0);
    A top = -kInfinity<A>, sum = 0, slope_sum = 0;
    A acc[R * VEC] = {}, slope_acc[R * VEC] = {};
    for (int64_t base = seg.begin; base < seg.end; base += kWarp) {
      const int count = pack_edges(a.idx, a.eid, a.keep, base + my.lane, seg.end, index, id, my.lane, [](int64_t) {});
      if (a.dropout.active) {
        fill_drop(a.dropout, coef, id, count, my.slots, a.heads, first_head, heads, my.lane);
        __syncwarp();
      }
      A chunk_top = -kInfinity<A>;
      unsigned negative = 0;  // bit t: the slope of the lane's t-th edge
#pragma unroll 4
      for (int t = 0; t < my.slots; ++t) {
        const int edge = t * my.edge_step + my.first_edge, k = t * kWarp + my.lane;
        if (edge >= count || !has_logits) break;
        const A reach = dst + a.a_src[static_cast<int64_t>(index[edge]) * a.heads + logit_head];
        const A factor = mask_of(a, static_cast<int64_t>(id[edge]), logit_head);
        const A s = reach < 0 ? reach * a.negative_slope : reach;
        const A logit = (a.mask_on_logit ? s * factor : s) * A(kLog2e);
        negative |= static_cast<unsigned>(reach < 0) << t;
        chunk_top = max(chunk_top, logit);
        slope_coef[k] = logit;
        factors[k] = factor;
      }
      const A new_top = max(top, strided_max(chunk_top, my.slots)), reference = exponent_base(new_top);
      const A rescale = exp_2(top - reference);
      top = new_top;
      sum *= rescale;
      slope_sum *= rescale;
#pragma unroll 4
      for (int t = 0; t < my.slots; ++t) {
        const int k = t * kWarp + my.lane;
        if (t * my.edge_step + my.first_edge >= count || !has_logits) break;
        const A p = exp_2(slope_coef[k] - reference), factor = factors[k], drop = a.dropout.active ? coef[k] : A(1);
        const A sloped = negative >> t & 1 ? p * a.negative_slope : p;
        sum += p;
        slope_sum += a.mask_on_logit ? sloped * factor : sloped;
        coef[k] = (a.mask_on_logit ? p : p * factor) * drop;
        slope_coef[k] = sloped * factor * drop;
      }
      const A mine = __shfl_sync(kFullMask, rescale, my.head);
#pragma unroll
      for (int v = 0; v < R * VEC; ++v) {
        acc[v] *= mine;
        slope_acc[v] *= mine;
      }
      __syncwarp();
      for (int turn = my.my_group; turn < count; turn += my.groups * kUnroll) {
        Pack<T, VEC> value[kUnroll][R];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int edge = turn + u * my.groups;
          if (edge < count) {
            const T* source = a.in + (static_cast<int64_t>(index[edge]) * a.heads + head) * a.features;
#pragma unroll
            for (int r = 0; r < R; ++r) {
              const int64_t c = first_column + r * my.lanes * VEC;
              if (c < columns) value[u][r] = load_pack<VEC>(source + c);
            }
          }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int edge = turn + u * my.groups;
          if (edge < count && columns > 0) {
            const A weight = coef[edge * my.slots + my.head], sloped = save ? slope_coef[edge * my.slots + my.head] : A(0);
#pragma unroll
            for (int r = 0; r < R; ++r) {
              if (first_column + r * my.lanes * VEC < columns) {
#pragma unroll
                for (int v = 0; v < VEC; ++v) {
                  acc[r * VEC + v] += weight * to_acc(value[u][r].v[v]);
                  if (save) slope_acc[r * VEC + v] += sloped * to_acc(value[u][r].v[v]);
                }
              }
            }
          }
        }
      }
      __syncwarp();
    }
    sum_groups(acc, my.group);
    if (save) sum_groups(slope_acc, my.group);
    sum = strided_sum(sum, my.slots);
    slope_sum = strided_sum(slope_sum, my.slots);
    const A scale = sum == 0 ? A(0) : A(1) / sum;
    const A my_scale = __shfl_sync(kFullMask, scale, my.head);
    if (my.lane < heads && column_block == 0) {
      if (seg.partial >= 0) {
        A* stat = a.partial_stat + seg.partial * 3 * a.heads + logit_head;
        stat[0] = top;
        stat[a.heads] = sum;
        stat[2 * a.heads] = slope_sum;
      } else {
        a.lse[seg.row * a.heads + logit_head] = (top + log_2(sum)) * A(kLn2);
        if (save) a.slope_sum[seg.row * a.heads + logit_head] = slope_sum * scale;
      }
    }
    if (my.my_group != 0) continue;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t c = first_column + r * my.lanes * VEC;
      if (c >= columns) continue;
      if (seg.partial >= 0) {
        const int64_t place = (seg.partial * a.heads + head) * a.features + c;
        for (int v = 0; v < VEC; ++v) {
          a.partial[place + v] = acc[r * VEC + v];
          if (save) a.partial_slope[place + v] = slope_acc[r * VEC + v];
        }
      } else {
        const int64_t place = (seg.row * a.heads + head) * a.features + c;
        store_columns<T, A, VEC>(a.out + place, acc + r * VEC, my_scale);
        if (save) store_columns<T, A, VEC>(a.slope_y + place, slope_acc + r * VEC, my_scale);
      }
    }
  }
}

// Joins the pieces of every long row in the order of its slots; the last `heads` columns stand for the heads' statistics.
template <typename T, typename A, typename I>
__global__ void __launch_bounds__(kRowThreads) gat_join_kernel(const GatArgs<T, A, I> a) {
  const int64_t columns = a.heads * a.features;
  join_long_rows(a.ptr, a.rows, columns + a.heads, a.pieces, [&](int64_t row, int64_t c, int64_t first, int64_t second, int64_t last) {
    const bool statistics = c >= columns;
    const int64_t head = statistics ? c - columns : c / a.features;
    const A* stat = a.partial_stat + head;
    A top = stat[first * 3 * a.heads];
    for (int64_t p = second; p <= last; p += 2) top = max(top, stat[p * 3 * a.heads]);
    const A reference = exponent_base(top);
    A sum = 0, slope_sum = 0, y = 0, slope_y = 0;
    for (int64_t p = first; p <= last; p = p == first ? second : p + 2) {
      const A* piece = stat + p * 3 * a.heads;
      const A scale = exp_2(piece[0] - reference);
      sum += piece[a.heads] * scale;
      if (statistics) {
        slope_sum += piece[2 * a.heads] * scale;
      } else {
        y += a.partial[p * columns + c] * scale;
        if (a.slope_sum) slope_y += a.partial_slope[p * columns + c] * scale;
      }
    }
    const A scale = sum == 0 ? A(0) : A(1) / sum;
    if (statistics) {
      a.lse[row * a.heads + head] = (top + log_2(sum)) * A(kLn2);
      if (a.slope_sum) a.slope_sum[row * a.heads + head] = slope_sum * scale;
    } else {
      a.out[row * columns + c] = static_cast<T>(y * scale);
      if (a.slope_sum) a.slope_y[row * columns + c] = static_cast<T>(slope_y * scale);
    }
  });
}

template <typename T, typename A>
struct GatRowArgs {
  const T *dy, *y, *slope_y;         // [n_dst, heads, features]
  const A *lse, *slope_sum, *a_dst;  // [n_dst, heads]
  A *da_dst, *stat;                  // [n_dst, heads], [n_dst, heads, 4]
  int64_t items, features;           // items: n_dst * heads
  int lanes;
};

// D and da_dst of every row and head, and the record that the edges of the row read. A row without attention gets lse = +inf,
// which makes every alpha of its edges 0.
template <typename T, typename A, int VEC>
__global__ void __launch_bounds__(kRowThreads) gat_bwd_rows_kernel(const GatRowArgs<T, A> a) {
  const int in_item = lane_index() % a.lanes, per_block = kRowThreads / a.lanes, per_warp = kWarp / a.lanes;
  for (int64_t first = int64_t{blockIdx.x} * per_block + warp_index() * per_warp; first < a.items;
       first += int64_t{gridDim.x} * per_block) {
    const int64_t item = first + lane_index() / a.lanes;
    A mean = 0, sloped = 0;
    if (item < a.items) {
      for (int64_t c = in_item * VEC; c < a.features; c += a.lanes * VEC) {
        const int64_t place = item * a.features + c;
        const Pack<T, VEC> dy = load_pack<VEC>(a.dy + place), y = load_pack<VEC>(a.y + place);
        const Pack<T, VEC> slope_y = load_pack<VEC>(a.slope_y + place);
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          mean += to_acc(dy.v[v]) * to_acc(y.v[v]);
          sloped += to_acc(dy.v[v]) * to_acc(slope_y.v[v]);
        }
      }
    }
    mean = group_sum(mean, a.lanes);
    sloped = group_sum(sloped, a.lanes);
    if (item >= a.items || in_item != 0) continue;
    const A lse = a.lse[item];
    a.da_dst[item] = sloped - mean * a.slope_sum[item];
    store_pack(a.stat + item * 4, Pack<A, 4>{{a.a_dst[item], lse == -kInfinity<A> ? kInfinity<A> : lse * A(kLog2e), mean, A(0)}});
  }
}

// dz, da_src and dmask. Only the item of a head's first column block computes the head's dot products <dy_i, z_j>, over all
// columns; the others add their columns of dz.
template <typename T, typename A, typename I, int VEC>
__global__ void __launch_bounds__(kRowThreads, 8) gat_bwd_edges_kernel(const GatArgs<T, A, I> a) {
  constexpr int R = kRepeat<VEC>;
  ACEFAST_SHARED(shared_index, I, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_id, I, [kRowWarps][kWarp]);
  ACEFAST_SHARED(shared_coef, A, [kRowWarps][kLogits<A>]);
  ACEFAST_SHARED(shared_dot, A, [kRowWarps][kLogits<A>]);
  ACEFAST_SHARED(shared_alpha_mean, A, [kRowWarps][kLogits<A>]);
  ACEFAST_SHARED(shared_to_reach, A, [kRowWarps][kLogits<A>]);
  ACEFAST_SHARED(shared_to_mask, A, [kRowWarps][kLogits<A>]);
  const HeadLane my(a.layout);
  const int warp = warp_index();
  I *index = shared_index[warp], *id = shared_id[warp];
  A *coef = shared_coef[warp], *dots = shared_dot[warp];
  A *alpha_mean = shared_alpha_mean[warp], *to_reach = shared_to_reach[warp], *to_mask = shared_to_mask[warp];
  const int64_t head_blocks = a.heads_in_turn ? 1 : a.layout.head_blocks, blocks = head_blocks * a.layout.column_blocks;
  const int64_t items = (a.pieces.partials() + a.rows) * blocks;
  for (int64_t item = int64_t{blockIdx.x} * kRowWarps + warp; item < items; item += int64_t{gridDim.x} * kRowWarps) {
    const Segment seg = segment_of(item / blocks, a.ptr, a.rows, a.edges, a.pieces);
    if (seg.partial >= 0 && seg.begin == seg.end) continue;
    const int64_t column_block = item % blocks % a.layout.column_blocks;
    const bool needs_dots = column_block == 0;
    const int64_t begin_head = item % blocks / a.layout.column_blocks * a.layout.heads;
    const int64_t end_head = a.heads_in_turn ? a.heads : begin_head + 1;
    for (int64_t first_head = begin_head; first_head < end_head; first_head += a.layout.heads) {
      const int heads = static_cast<int>(min(int64_t{a.layout.heads}, a.heads - first_head));
      const bool has_logits = my.logit_head < heads;
      const int64_t logit_head = first_head + my.logit_head, head = first_head + my.head;
      const int64_t first_column = (column_block * R * my.lanes + my.in_head) * VEC;
      const int64_t columns = my.head < heads ? a.features : 0;
      const A src = has_logits ? a.a_src[seg.row * a.heads + logit_head] : A(0);
      const T* own = a.own + (seg.row * a.heads + head) * a.features;
      A acc[R * VEC] = {}, mine[R * VEC] = {}, da = 0;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t c = first_column + r * my.lanes * VEC;
        if (c < columns) {
          const Pack<T, VEC> pack = load_pack<VEC>(own + c);
#pragma unroll
          for (int v = 0; v < VEC; ++v) mine[r * VEC + v] = to_acc(pack.v[v]);
        }
      }
      for (int64_t base = seg.begin; base < seg.end; base += kWarp) {
        const int count = pack_edges(a.idx, a.eid, a.keep, base + my.lane, seg.end, index, id, my.lane, [&](int64_t e) {
          if (!a.dmask || !needs_dots) return;
          if (a.mask_per_head) {
            for (int h = 0; h < heads; ++h) a.dmask[e * a.heads + first_head + h] = 0;
          } else if (first_head == 0) {
            a.dmask[e] = 0;
          }
        });
        if (a.dropout.active) {
          fill_drop(a.dropout, coef, id, count, my.slots, a.heads, first_head, heads, my.lane);
          __syncwarp();
        }
        // Per edge and head, with q = <dy_i, z_j>: dlogit = coef q - alpha D, t = dlogit * to_reach, and dmask is
        // dlogit * to_mask (mask on the logit) or q * to_mask (on the message).
#pragma unroll 4
        for (int t = 0; t < my.slots; ++t) {
          const int edge = t * my.edge_step + my.first_edge, k = t * kWarp + my.lane;
          if (edge >= count || !has_logits) break;
          const Pack<A, 4> stat = load_pack<4>(a.stat + (static_cast<int64_t>(index[edge]) * a.heads + logit_head) * 4);
          const A reach = stat.v[0] + src, slope = reach < 0 ? a.negative_slope : A(1), s = reach * slope;
          const A factor = mask_of(a, static_cast<int64_t>(id[edge]), logit_head), drop = a.dropout.active ? coef[k] : A(1);
          const A alpha = exp_2((a.mask_on_logit ? s * factor : s) * A(kLog2e) - stat.v[1]);
          coef[k] = (a.mask_on_logit ? alpha : alpha * factor) * drop;
          alpha_mean[k] = alpha * stat.v[2];
          to_reach[k] = a.mask_on_logit ? slope * factor : slope;
          to_mask[k] = a.mask_on_logit ? s : alpha * drop;
        }
        __syncwarp();
        // Every lane makes every turn: the dot products are summed across the lanes of a head.
        for (int turn = 0; turn < count; turn += my.groups * kUnroll) {
          Pack<T, VEC> value[kUnroll][R];
          A dot[kUnroll] = {};
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int edge = turn + my.my_group + u * my.groups;
            if (edge < count) {
              const T* source = a.in + (static_cast<int64_t>(index[edge]) * a.heads + head) * a.features;
#pragma unroll
              for (int r = 0; r < R; ++r) {
                const int64_t c = first_column + r * my.lanes * VEC;
                if (c < columns) value[u][r] = load_pack<VEC>(source + c);
              }
            }
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int edge = turn + my.my_group + u * my.groups;
            if (edge < count && columns > 0) {
              const A weight = coef[edge * my.slots + my.head];
#pragma unroll
              for (int r = 0; r < R; ++r) {
                if (first_column + r * my.lanes * VEC < columns) {
#pragma unroll
                  for (int v = 0; v < VEC; ++v) {
                    const A d = to_acc(value[u][r].v[v]);
                    dot[u] += d * mine[r * VEC + v];
                    acc[r * VEC + v] += weight * d;
                  }
                }
              }
            }
          }
          if (!needs_dots) continue;
          // The columns of the head beyond this block.
          for (int64_t c = first_column + R * my.lanes * VEC; c < columns; c += my.lanes * VEC) {
            const Pack<T, VEC> z = load_pack<VEC>(own + c);
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
              const int edge = turn + my.my_group + u * my.groups;
              if (edge < count) {
                const int64_t place = (static_cast<int64_t>(index[edge]) * a.heads + head) * a.features + c;
                const Pack<T, VEC> dy = load_pack<VEC>(a.in + place);
#pragma unroll
                for (int v = 0; v < VEC; ++v) dot[u] += to_acc(dy.v[v]) * to_acc(z.v[v]);
              }
            }
          }
          sum_edges(dot, my.lanes, my.in_head, [&](int u, A total) {
            const int edge = turn + my.my_group + u * my.groups;
            if (edge < count) dots[edge * my.slots + my.head] = total;
          });
        }
        __syncwarp();
        if (!needs_dots) continue;
        for (int t = 0; t * my.edge_step < count; ++t) {
          const int edge = t * my.edge_step + my.first_edge, k = t * kWarp + my.lane;
          A dmask = 0;
          if (edge < count && has_logits) {
            const A dlogit = coef[k] * dots[k] - alpha_mean[k];
            da += dlogit * to_reach[k];
            dmask = to_mask[k] * (a.mask_on_logit ? dlogit : dots[k]);
            if (a.dmask && a.mask_per_head) a.dmask[static_cast<int64_t>(id[edge]) * a.heads + logit_head] = dmask;
          }
          if (!a.dmask || a.mask_per_head) continue;
          dmask = group_sum(dmask, my.slots);
          if (edge < count && my.logit_head == 0) {
            A* target = a.dmask + static_cast<int64_t>(id[edge]);
            *target = first_head == 0 ? dmask : *target + dmask;
          }
        }
        __syncwarp();
      }
      sum_groups(acc, my.group);
      da = strided_sum(da, my.slots);
      if (my.lane < heads && needs_dots) {
        if (seg.partial >= 0) {
          a.partial_stat[seg.partial * a.heads + logit_head] = da;
        } else {
          a.da_src[seg.row * a.heads + logit_head] = da;
        }
      }
      if (my.my_group != 0) continue;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t c = first_column + r * my.lanes * VEC;
        if (c >= columns) continue;
        if (seg.partial >= 0) {
          for (int v = 0; v < VEC; ++v) a.partial[(seg.partial * a.heads + head) * a.features + c + v] = acc[r * VEC + v];
        } else {
          store_columns<T, A, VEC>(a.out + (seg.row * a.heads + head) * a.features + c, acc + r * VEC, A(1));
        }
      }
    }
  }
}

// The arguments that both directions share; the layout is set when the vector width is known.
template <typename T, typename A, typename I>
GatArgs<T, A, I> common_args(const GraphArgs& g, const Tensor& z, const Tensor& a_src, const Tensor& a_dst,
                             const OptTensor& mask, const OptTensor& keep, bool mask_on_logit, double negative_slope,
                             double dropout, int64_t seed, int64_t step, const OptTensor& step_at) {
  GatArgs<T, A, I> a{};
  a.a_src = ptr<A>(a_src);
  a.a_dst = ptr<A>(a_dst);
  a.mask = ptr<A>(mask);
  a.keep = ptr<bool>(keep);
  a.negative_slope = static_cast<A>(negative_slope);
  a.dropout = make_dropout<A>(dropout, seed, step, step_at);
  a.edges = g.n_edges;
  a.pieces = pieces_of(g.n_edges);
  a.heads = z.size(1);
  a.features = z.size(2);
  a.mask_per_head = mask && mask->dim() == 2;
  a.mask_on_logit = mask && mask_on_logit;
  return a;
}

template <typename T, typename A, typename I>
void launch_gat_fwd(const GraphArgs& g, GatArgs<T, A, I> a, const Tensor& z, const Tensor& y, const Tensor& lse,
                    const Tensor& slope_y, const Tensor& slope_sum, bool save, const DeviceScope& scope) {
  a.ptr = g.rowptr;
  a.idx = static_cast<const I*>(g.col);
  a.eid = static_cast<const I*>(g.eid);
  a.rows = g.n_dst;
  a.in = ptr<T>(z);
  a.out = mutable_ptr<T>(y);
  a.lse = mutable_ptr<A>(lse);
  a.slope_y = save ? mutable_ptr<T>(slope_y) : nullptr;
  a.slope_sum = save ? mutable_ptr<A>(slope_sum) : nullptr;
  const Tensor partial = new_tensor(z, {a.pieces.partials(), a.heads, a.features}, lse.scalar_type());
  const Tensor partial_slope = new_tensor(z, {save ? a.pieces.partials() : 0, a.heads, a.features}, lse.scalar_type());
  const Tensor partial_stat = new_tensor(z, {a.pieces.partials(), 3, a.heads}, lse.scalar_type());
  a.partial = mutable_ptr<A>(partial);
  a.partial_slope = mutable_ptr<A>(partial_slope);
  a.partial_stat = mutable_ptr<A>(partial_stat);
  dispatch_vector<T>(a.features, {a.in, a.out, a.slope_y}, [&](auto vec) {
    constexpr int VEC = decltype(vec)::value;
    a.layout = HeadLayout(a.heads, a.features, VEC, kHeads<A>);
    const int64_t items = (a.pieces.partials() + a.rows) * a.layout.head_blocks * a.layout.column_blocks;
    ACEFAST_LAUNCH((gat_fwd_kernel<T, A, I, VEC>), grid_of(items, kRowWarps), kRowThreads, 0, scope.stream(), a);
  });
  if (a.pieces.count > 0) {
    ACEFAST_LAUNCH((gat_join_kernel<T, A, I>), join_grid(a.rows, a.heads * (a.features + 1)), kRowThreads, 0, scope.stream(), a);
  }
}

template <typename T, typename A, typename I>
void launch_gat_bwd(const GraphArgs& g, GatArgs<T, A, I> a, const Tensor& dy, const Tensor& y, const Tensor& lse,
                    const Tensor& slope_y, const Tensor& slope_sum, const Tensor& z, bool need_dmask, const Tensor& dz,
                    const Tensor& da_src, const Tensor& da_dst, const Tensor& dmask, const DeviceScope& scope) {
  const ScalarType acc = lse.scalar_type();
  const Tensor stat = new_tensor(z, {g.n_dst, a.heads, 4}, acc);
  if (g.n_dst > 0) {
    GatRowArgs<T, A> rows{ptr<T>(dy), ptr<T>(y), ptr<T>(slope_y), ptr<A>(lse), ptr<A>(slope_sum), a.a_dst,
                          mutable_ptr<A>(da_dst), mutable_ptr<A>(stat), g.n_dst * a.heads, a.features, 1};
    dispatch_vector<T>(a.features, {rows.dy, rows.y, rows.slope_y}, [&](auto vec) {
      constexpr int VEC = decltype(vec)::value;
      rows.lanes = group_lanes(a.features, VEC);
      ACEFAST_LAUNCH((gat_bwd_rows_kernel<T, A, VEC>), grid_of(rows.items, kRowThreads / rows.lanes), kRowThreads, 0, scope.stream(),
                     rows);
    });
  }
  if (g.n_src == 0) return;
  a.ptr = g.colptr;
  a.idx = static_cast<const I*>(g.row);
  a.eid = static_cast<const I*>(g.ceid);
  a.rows = g.n_src;
  a.in = ptr<T>(dy);
  a.own = ptr<T>(z);
  a.out = mutable_ptr<T>(dz);
  a.stat = ptr<A>(stat);
  a.da_src = mutable_ptr<A>(da_src);
  a.dmask = need_dmask ? mutable_ptr<A>(dmask) : nullptr;
  a.heads_in_turn = need_dmask && !a.mask_per_head;
  const Tensor partial = new_tensor(z, {a.pieces.partials(), a.heads, a.features}, acc);
  const Tensor partial_src = new_tensor(z, {a.pieces.partials(), a.heads}, acc);
  a.partial = mutable_ptr<A>(partial);
  a.partial_stat = mutable_ptr<A>(partial_src);
  dispatch_vector<T>(a.features, {a.in, a.own, a.out}, [&](auto vec) {
    constexpr int VEC = decltype(vec)::value;
    a.layout = HeadLayout(a.heads, a.features, VEC, kHeads<A>);
    const int64_t blocks = (a.heads_in_turn ? 1 : a.layout.head_blocks) * a.layout.column_blocks;
    ACEFAST_LAUNCH((gat_bwd_edges_kernel<T, A, I, VEC>), grid_of((a.pieces.partials() + a.rows) * blocks, kRowWarps), kRowThreads, 0,
                   scope.stream(), a);
  });
  if (a.pieces.count == 0) return;
  const auto join = [&](auto* out, const A* pieces, int64_t columns) {
    using TOut = std::remove_pointer_t<decltype(out)>;
    if (columns == 0) return;
    ACEFAST_LAUNCH((spmm_join_kernel<TOut, TOut, A>), join_grid(a.rows, columns), kRowThreads, 0, scope.stream(), a.ptr, a.rows,
                   columns, a.pieces, pieces, static_cast<const TOut*>(nullptr), out, static_cast<const A*>(nullptr),
                   static_cast<const A*>(nullptr));
  };
  join(a.out, a.partial, a.heads * a.features);
  join(a.da_src, a.partial_stat, a.heads);
}

// Returns E.
int64_t check_gat(const char* op, const GraphArgs& g, const Tensor& col, const Tensor& z, const Tensor& a_src,
                  const Tensor& a_dst, const OptTensor& mask, const OptTensor& keep, double dropout,
                  const OptTensor& step_at) {
  check(z.dim() == 3, op, "z must have three dimensions");
  const int64_t heads = z.size(1), edges = edge_count(op, g, {&mask, &keep});
  const ScalarType acc = acc_type(z.scalar_type());
  check_tensor(op, "col", col, z, {g.n_edges});
  check_tensor(op, "z", z, z, {g.n_src, heads, z.size(2)});
  check_tensor(op, "a_src", a_src, z, {g.n_src, heads});
  check_dtype(op, "a_src", a_src, acc);
  check_tensor(op, "a_dst", a_dst, z, {g.n_dst, heads});
  check_dtype(op, "a_dst", a_dst, acc);
  if (mask && mask->dim() == 2) {
    check_optional(op, "mask", mask, z, acc, {edges, heads});
  } else {
    check_optional(op, "mask", mask, z, acc, {edges});
  }
  check_optional(op, "keep", keep, z, ScalarType::Bool, {edges});
  check(dropout >= 0 && dropout <= 1, op, "dropout must lie in [0, 1]");
  check_optional(op, "step_at", step_at, z, ScalarType::Long, {1});
  return edges;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gat(Tensor rowptr, Tensor col, OptTensor eid, Tensor colptr, Tensor row,
                                               OptTensor ceid, Tensor z, Tensor a_src, Tensor a_dst, OptTensor mask,
                                               OptTensor keep, bool mask_on_logit, double negative_slope, double dropout,
                                               int64_t seed, int64_t step, OptTensor step_at, bool save) {
  const GraphArgs g = graph_args("gat", rowptr, col, eid, colptr, row, ceid);
  check_gat("gat", g, col, z, a_src, a_dst, mask, keep, dropout, step_at);
  const DeviceScope scope(z);
  const ScalarType dtype = z.scalar_type(), acc = acc_type(dtype);
  const int64_t heads = z.size(1), features = z.size(2);
  const Tensor y = new_tensor(z, {g.n_dst, heads, features}, dtype), lse = new_tensor(z, {g.n_dst, heads}, acc);
  const Tensor slope_y = save ? new_tensor(z, {g.n_dst, heads, features}, dtype) : none_tensor(z, dtype);
  const Tensor slope_sum = save ? new_tensor(z, {g.n_dst, heads}, acc) : none_tensor(z, acc);
  if (g.n_dst > 0 && heads > 0) {
    dispatch_float("gat", dtype, [&](auto t) {
      dispatch_index("gat", g.index_type, [&](auto i) {
        using T = typename decltype(t)::type;
        using I = typename decltype(i)::type;
        const auto a = common_args<T, acc_t<T>, I>(g, z, a_src, a_dst, mask, keep, mask_on_logit, negative_slope, dropout,
                                                    seed, step, step_at);
        launch_gat_fwd(g, a, z, y, lse, slope_y, slope_sum, save, scope);
      });
    });
  }
  return {y, lse, slope_y, slope_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gat_bwd(Tensor rowptr, Tensor col, OptTensor eid, Tensor colptr, Tensor row,
                                                   OptTensor ceid, Tensor dy, Tensor y, Tensor lse, Tensor slope_y,
                                                   Tensor slope_sum, Tensor z, Tensor a_src, Tensor a_dst, OptTensor mask,
                                                   OptTensor keep, bool mask_on_logit, double negative_slope, double dropout,
                                                   int64_t seed, int64_t step, OptTensor step_at, bool need_dmask) {
  const GraphArgs g = graph_args("gat_bwd", rowptr, col, eid, colptr, row, ceid);
  const int64_t edges = check_gat("gat_bwd", g, col, z, a_src, a_dst, mask, keep, dropout, step_at);
  const ScalarType dtype = z.scalar_type(), acc = acc_type(dtype);
  const int64_t heads = z.size(1), features = z.size(2);
  for (const auto& [name, t] : {std::pair{"dy", &dy}, {"y", &y}, {"slope_y", &slope_y}}) {
    check_tensor("gat_bwd", name, *t, z, {g.n_dst, heads, features});
    check_dtype("gat_bwd", name, *t, dtype);
  }
  for (const auto& [name, t] : {std::pair{"lse", &lse}, {"slope_sum", &slope_sum}}) {
    check_tensor("gat_bwd", name, *t, z, {g.n_dst, heads});
    check_dtype("gat_bwd", name, *t, acc);
  }
  check(!need_dmask || mask, "gat_bwd", "need_dmask without a mask");
  const DeviceScope scope(z);
  const Tensor dz = new_tensor(z, {g.n_src, heads, features}, dtype), da_src = new_tensor(z, {g.n_src, heads}, acc);
  const Tensor da_dst = new_tensor(z, {g.n_dst, heads}, acc);
  const Tensor dmask = need_dmask ? torch::stable::empty_like(*mask) : none_tensor(z, acc);
  if (need_dmask && edges > g.n_edges) zero(dmask);
  if (heads > 0) {
    dispatch_float("gat_bwd", dtype, [&](auto t) {
      dispatch_index("gat_bwd", g.index_type, [&](auto i) {
        using T = typename decltype(t)::type;
        using I = typename decltype(i)::type;
        const auto a = common_args<T, acc_t<T>, I>(g, z, a_src, a_dst, mask, keep, mask_on_logit, negative_slope, dropout,
                                                    seed, step, step_at);
        launch_gat_bwd(g, a, dy, y, lse, slope_y, slope_sum, z, need_dmask, dz, da_src, da_dst, dmask, scope);
      });
    });
  } else if (need_dmask) {
    zero(dmask);
  }
  return {dz, da_src, da_dst, dmask};
}

ACEFAST_REGISTER_CUDA(m) {
  m.impl("gat", TORCH_BOX(&gat));
  m.impl("gat_bwd", TORCH_BOX(&gat_bwd));
}

}  // namespace
}  // namespace acefast

// The ops: what every implementation (csrc/cpu/<op>.cpp, csrc/cuda/<op>.cu) computes. The schemas are defined in Python
// (acefast/ops/backend.py) and implemented in the namespace acefast_native by the op libraries. No code is here.
//
// Terms
//   Edge e goes from source j = src(e) in [0, n_src) to destination i = dst(e) in [0, n_dst). Self-loops, multi-edges
//   (separate edges with separate masks), isolated nodes and an empty edge set are valid.
//   graph := rowptr int64 [n_dst + 1], col [E], eid? [E]      CSR by destination; eid: CSR slot -> caller's edge id
//            colptr int64 [n_src + 1], row [E], ceid? [E]     CSC by source; ceid: CSC slot -> caller's edge id
//     col, row, eid, ceid are all int32 or all int64. An absent eid or ceid is the identity.
//   T: float32, float64, float16 or bfloat16. A: what sums are kept in, float64 for float64, else float32.
//   Per-edge tensors are indexed by the caller's edge id, whatever the slot order.
//   keep bool: an element with keep = false does not exist for the call. mask A: multiplies.
//   Every tensor is contiguous and on one device. An output that is not needed is returned with shape [0].
//   Results are the same to the bit for any number of threads or order of blocks: work is split by the data.
//   all_edges, all_weights of a forward concern its backward only.
//
// spmm(graph, x, weight?, mask?, keep?, self_weight?, row_scale?, all_edges) -> y
//   y_i = row_scale_i * sum over kept e: j -> i of weight_e * mask_e * x_j + self_weight_i * x_i
//   x T [n_src, F], weight and mask A [E], keep bool [E], self_weight A [n_dst] (only where n_src = n_dst),
//   row_scale A [n_dst]; y T [n_dst, F]. A row without kept edges is self_weight_i * x_i, or 0.
//
// spmm_bwd(graph, dy, x, weight?, mask?, keep?, self_weight?, row_scale?, need_dx, need_dcoef, all_edges)
//     -> (dx, dcoef, dself)
//   One visit of each edge, by source over the CSC.
//   dx T [n_src, F]: dx_j = sum over kept e: j -> i of row_scale_i * weight_e * mask_e * dy_i + self_weight_j * dy_j.
//   dcoef A [E], the gradient with respect to the product weight_e * mask_e: row_scale_i * <dy_i, x_j>; 0 where keep is
//   false unless all_edges. dself A [n_dst] = <dy_j, x_j>, with self_weight and need_dcoef only.
//
// sddmm(graph, p, q) -> s
//   s_e = <p_i, q_j>; p T [n_dst, F], q T [n_src, F], s A [E];
//   or per head p T [n_dst, H, F], q T [n_src, H, F], s A [E, H].
//
// gcn_norm(graph, mask?, keep?, add_self_loops, masked) -> (c, c_self, dinv)
//   d_i = (masked ? sum over kept e into i of mask_e : number of all edges into i) + (add_self_loops ? 1 : 0);
//   dinv_i = d_i > 0 ? d_i^-1/2 : 0; c_e = dinv_i * dinv_j for every edge, removed ones too; c_self_i = dinv_i^2
//   (shape [0] without add_self_loops). Square graphs only. dtype: mask's, float32 without mask; an absent mask counts
//   1; keep acts only where masked.
// gcn_norm_bwd(graph, dinv, dc, dc_self?, keep?) -> dmask
//   g_i = sum over e: j -> i of dc_e * dinv_j + sum over e: i -> k of dc_e * dinv_k + 2 * dc_self_i * dinv_i;
//   dmask_e = -1/2 * dinv_i^3 * g_i with i = dst(e); 0 where keep is false.
//
// relu_dropout(x, p, seed, step) -> y
//   y_n = x_n > 0 and r_n >= floor(p * 2^32) ? x_n / (1 - p) : 0, n the flat index, r_n word n % 4 of Philox4x32-10,
//   counter (n / 4, step), key seed (common/philox.h). p = 1 gives 0, NaN gives 0. 1 / (1 - p) is taken in double.
// relu_dropout_bwd(dy, y, p) -> dx:  dx_n = y_n > 0 ? dy_n / (1 - p) : 0
//
// masked_linear(x, weight, mask?, bias?, keep?, all_weights) -> y
//   y = x (W * m * keep)^T + b; x T [N, K], W T [O, K], m A [O, K], keep bool [O, K], b A [O]; y T [N, O].
// masked_linear_bwd(dy, x, weight, mask?, keep?, need_dx, need_dw, all_weights) -> (dx, dw)
//   dx T [N, K] = dy (W * m * keep); dw T [O, K] = dy^T x, the gradient with respect to the product W * m; 0 where keep
//   is false unless all_weights.
// masked_linear_csr(rowptr, col, value, colptr, row, cvalue, weight, mask?, bias?, keep?, all_weights) -> y
//   The same for a constant sparse x [N, K]: rowptr int64 [N + 1], col [nnz], value T [nnz] and the arrays of its
//   transpose, colptr int64 [K + 1], row [nnz], cvalue T [nnz].
// masked_linear_csr_bwd(rowptr, col, value, colptr, row, cvalue, dy, weight, mask?, keep?, all_weights) -> dw T [O, K]
//
// topk_mask(scores[], k, alive[]?, largest, magnitude) -> (keep[], status)
//   Selects exactly k of the alive elements of a list of tensors as if concatenated: the largest or the smallest, by
//   value or by magnitude; of equal ones the lowest index of the concatenation. -0 equals 0. keep: bool tensors of the
//   scores' shapes; status int32 [1]: bit 0 = a NaN among the alive scores, bit 1 = k not in [0, number alive]; with
//   any bit set every keep is false. All scores have one dtype T. No host synchronisation.
#pragma once

// The ops: what every implementation (csrc/cpu/<op>.cpp, csrc/cuda/<op>.cu) computes. The schemas are defined in Python
// (acefast/ops/backend.py) and implemented in the namespace acefast_native by the op libraries. No code is here.
//
// Terms
//   Edge e goes from source j = src(e) in [0, n_src) to destination i = dst(e) in [0, n_dst). Self-loops, multi-edges
//   (separate edges with separate masks), isolated nodes and an empty edge set are valid.
//   graph := rowptr int64 [n_dst + 1], col [S], eid? [S]      CSR by destination; eid: CSR slot -> caller's edge id
//            colptr int64 [n_src + 1], row [S], ceid? [S]     CSC by source; ceid: CSC slot -> caller's edge id
//     col, row, eid, ceid are all int32 or all int64. An absent eid or ceid is the identity. Within a row and within a
//     column the ids ascend.
//   E is the length of the per-edge tensors. A whole graph has S = E slots. A prepared selection (Graph.select) has S <= E
//   slots with eid and ceid given: an edge that no slot names does not exist for the call, and a per-edge output is 0 there.
//   Where an op has no per-edge input, E = S.
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
//   Or per head: x T [n_src, H, F], weight and mask A [E, H], y T [n_dst, H, F]; the rest as above.
//
// spmm_bwd(graph, dy, x, weight?, mask?, keep?, self_weight?, row_scale?, need_dx, need_dcoef, all_edges)
//     -> (dx, dcoef, dself)
//   One visit of each edge, by source over the CSC.
//   dx T [n_src, F]: dx_j = sum over kept e: j -> i of row_scale_i * weight_e * mask_e * dy_i + self_weight_j * dy_j.
//   dcoef A [E] (or [E, H]), the gradient with respect to the product weight_e * mask_e: row_scale_i * <dy_i, x_j>; 0
//   where keep is false unless all_edges. dself A [n_dst] = <dy_j, x_j> (over all heads), with self_weight and need_dcoef only.
//
// spmm_max(graph, x, weight?, mask?, keep?, largest) -> (y, arg)
//   y_i = largest ? max : min over kept e: j -> i of weight_e * mask_e * x_j, per column; a row without kept edges is 0.
//   arg [n_dst, F], dtype of col: the edge id of the first of equal extremes (the lowest id), -1 in a row without kept edges.
//   x T [n_src, F], weight and mask A [E], y T [n_dst, F]. Products are compared in A.
// spmm_max_bwd(graph, dy, arg, x, weight?, mask?, keep?, need_dx, need_dcoef) -> (dx T [n_src, F], dcoef A [E])
//   dx_jc = sum over kept e: j -> i with arg_ic = e of weight_e * mask_e * dy_ic; dcoef_e = sum over c with arg_ic = e of
//   dy_ic * x_jc. By source over the CSC.
//
// edge_softmax(graph, s, keep?) -> a
//   a_e = exp(s_e - max) / sum over the kept edges into i, per head; 0 where keep is false. s, a A [E] or [E, H].
// edge_softmax_bwd(graph, a, da, keep?) -> ds:  ds_e = a_e * (da_e - sum over kept e' into i of a_e' * da_e')
//
// gat(graph, z, a_src, a_dst, mask?, keep?, mask_on_logit, negative_slope, dropout, seed, step, step_at?, save)
//     -> (y, lse, slope_y, slope_sum)
//   z T [n_src, H, F], a_src A [n_src, H], a_dst A [n_dst, H], mask A [E] or [E, H], keep bool [E].
//   s_e = leaky_relu(a_dst_i + a_src_j) (slope negative_slope where the sum is < 0; slope_e = that slope, or 1);
//   logit_e = mask_on_logit ? s_e * mask_e : s_e;  alpha_e = softmax of logit over the kept edges into i, per head;
//   y_i = sum over kept e of alpha_e * (mask_on_logit ? 1 : mask_e) * drop_e * z_j;  y T [n_dst, H, F].
//   drop of edge e and head h: r_n >= floor(dropout * 2^32) ? 1 / (1 - dropout) : 0 with n = e * H + h (e the caller's id),
//   r_n word n % 4 of Philox4x32-10, counter (n / 4, step), key seed (common/philox.h); dropout = 0 takes no word; dropout =
//   1 gives 0. step_at int64 [1], where it is given, holds the step when the kernel runs, in place of `step`.
//   lse A [n_dst, H]: log of the sum over the kept edges of exp(logit); -inf in a row without kept edges, where y is 0.
//   With save also slope_y T [n_dst, H, F] = sum of alpha_e * slope_e * mask_e * drop_e * z_j and slope_sum A [n_dst, H] =
//   sum of alpha_e * slope_e * (mask_on_logit ? mask_e : 1), which the gradient of a_dst needs; else both have shape [0].
// gat_bwd(graph, dy, y, lse, slope_y, slope_sum, z, a_src, a_dst, mask?, keep?, mask_on_logit, negative_slope, dropout, seed,
//         step, step_at?, need_dmask) -> (dz, da_src, da_dst, dmask)
//   With D_i = <dy_i, y_i> and p_e = drop_e * <dy_i, z_j>, per head:
//   message: dlogit_e = alpha_e * (mask_e * p_e - D_i), dmask_e = alpha_e * p_e, t_e = dlogit_e * slope_e;
//   logit:   dlogit_e = alpha_e * (p_e - D_i), dmask_e = dlogit_e * s_e, t_e = dlogit_e * slope_e * mask_e;
//   da_src_j = sum over kept e out of j of t_e; da_dst_i = sum over kept e into i of t_e = <dy_i, slope_y_i> - D_i * slope_sum_i;
//   dz_j = sum over kept e of alpha_e * (mask_on_logit ? 1 : mask_e) * drop_e * dy_i.
//   dz T, da_src A [n_src, H], da_dst A [n_dst, H], dmask A like mask (a mask [E] collects all heads), 0 where keep is false.
//
// gen(graph, x, edge?, weight?, bias?, mask?, keep?, param?, row_scale?, removed?, aggr, eps, all_edges) -> (y, stat)
//   r_e = relu(x_j + edge_e) + eps, msg_e = r_e * mask_e, all in A. x T [n_src, F], mask A [E], keep bool [E].
//   Without weight, edge T [E, F] is edge_e itself (absent: 0). With weight A [F, D], edge T [E, D] holds raw features and
//   edge_e = weight edge_e + bias (bias A [F]); the product exists in registers only.
//   param A [F]: t of the softmax, p of the power mean. row_scale A [n_dst]. removed int64 [n_dst]: the number of removed
//   edges of each row that stay as edges with message 0 (pruned = "in_denominator"); absent: none do.
//   aggr 0 sum:     y_i = row_scale_i * sum of msg_e (an absent row_scale counts 1; the mean gives 1 / count)
//   aggr 1 softmax: y_i = sum of beta_e msg_e, beta_e = exp(t msg_e - lse_i), per column, lse_i = log(sum over kept e of
//                   exp(t msg_e) + removed_i); stat = lse A [n_dst, F], -inf where nothing is summed (y = 0 there)
//   aggr 2 softmax_sg: the forward of 1; its backward takes beta as constant
//   aggr 3 power:   y_i = (row_scale_i * (sum of c_e^p + removed_i * (1e-7)^p))^(1/p), c_e = clamp(msg_e, 1e-7, 10);
//                   0 where that sum is 0
//   aggr 4 max:     y_i = max of msg_e, and of 0 where removed_i > 0; stat = arg [n_dst, F], dtype of col: edge id of the
//                   first maximum (lowest id), -1 where the row has none or where the removed edges' 0 is larger; a row
//                   without any is 0
//   y T [n_dst, F]; stat of 0 and 3 has shape [0].
// gen_bwd(graph, dy, y, stat, x, edge?, weight?, bias?, mask?, keep?, param?, row_scale?, removed?, aggr, eps, need_dx,
//         need_dmask, need_dedge, need_dparam, all_edges) -> (dx, dmask, dedge, dbias, dparam)
//   dmsg_e, per column, g = dy_i:
//     sum: row_scale_i g;  softmax: beta g (1 + t (msg - y_i));  softmax_sg: beta g;  max: arg_i = e ? g : 0;
//     power: msg in [1e-7, 10] ? g row_scale_i y_i^(1 - p) c^(p - 1) : 0 (0 where y_i = 0).
//   dr = dmsg * mask; dpre = x_j + edge_e > 0 ? dr : 0; dx_j = sum of dpre; dmask_e = sum over columns of dmsg * r.
//   dedge: without weight T [E, F] = dpre (0 where removed); with weight A [F, D] = sum over e of dpre_e (x) edge_e, and
//   dbias A [F] = sum of dpre_e (with bias and need_dedge; else [0]).
//   dparam A [F]: softmax: sum over i and e of g beta msg (msg - y_i); power, with q = c^p row_scale_i y_i^-p:
//     sum over i of g y_i / p (sum of q log c + removed_i row_scale_i (1e-7 / y_i)^p log 1e-7 - log y_i); others 0.
//   all_edges (aggr 0, or 1 and 2 with removed): dmask of a removed edge is sum over columns of r times: sum: row_scale_i g;
//     softmax: g exp(-lse_i) (1 - t y_i); softmax_sg: g exp(-lse_i). Else 0.
//   One visit of each edge by source over the CSC.
//
// sddmm(graph, p, q) -> s
//   s_e = <p_i, q_j>; p T [n_dst, F], q T [n_src, F], s A [E];
//   or per head p T [n_dst, H, F], q T [n_src, H, F], s A [E, H].
//
// gcn_norm(graph, mask?, keep?, loops?, masked) -> (c, c_self, dinv)
//   d_i = (masked ? sum over kept e into i of mask_e : number of all edges into i) + loops_i, loops the weights of the
//   self-loops that are not edges of the graph (absent: 0);
//   dinv_i = d_i > 0 ? d_i^-1/2 : 0; c_e = dinv_i * dinv_j for every edge, removed ones too; c_self_i = dinv_i^2 * loops_i
//   (shape [0] without loops). Square graphs only. dtype: mask's, float32 without mask; an absent mask counts
//   1; keep acts only where masked.
// gcn_norm_bwd(graph, dinv, dc, dc_self?, loops?, keep?) -> dmask
//   g_i = sum over e: j -> i of dc_e * dinv_j + sum over e: i -> k of dc_e * dinv_k + 2 * dc_self_i * loops_i * dinv_i;
//   dmask_e = -1/2 * dinv_i^3 * g_i with i = dst(e); 0 where keep is false.
//
// compact(graph, keep, num_kept, renumber) -> (rowptr, col, eid, colptr, row, ceid, edge_ids)
//   The slots of the graph whose edge is kept, num_kept of them (the number of true in keep), in CSR and CSC. renumber: eid
//   and ceid (shape [0] where the graph has none) name the kept edges by rank, and edge_ids int64 [num_kept] holds the ids
//   of the kept edges in order. Without renumber they keep the caller's ids and are always given; edge_ids has shape [0].
//
// relu_dropout(x, rows?, p, seed, step, step_at?) -> y
//   y_n = x_n > 0 and r_n >= floor(p * 2^32) ? x_n / (1 - p) : 0, n the flat index, r_n word n % 4 of Philox4x32-10,
//   counter (n / 4, step), key seed (common/philox.h). p = 1 gives 0, NaN gives 0. 1 / (1 - p) is taken in double.
//   step_at int64 [1], where it is given, holds the step when the kernel runs, in place of `step`.
//   rows int64 [N], >= 0: x [N, F] is those rows of a larger matrix, and n of element (r, c) is rows_r * F + c.
// relu_dropout_bwd(dy, y, p) -> dx:  dx_n = y_n > 0 ? dy_n / (1 - p) : 0
// elu_dropout(x, rows?, p, seed, step, step_at?) -> y
//   The same with elu(x_n) = x_n > 0 ? x_n : exp(x_n) - 1. A dropped element is +0, a kept zero -0. NaN stays NaN.
// elu_dropout_bwd(dy, y, p) -> dx
//   dx_n = y_n > 0 ? dy_n / (1 - p) : y_n is +0 ? 0 : dy_n (y_n + 1 / (1 - p))
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
// masked_linear_kept(rowptr, col, value, colptr, row, cvalue, weight, ptr, out, place, bias?, outputs, tiled) -> y
//   The same for a weight of which few entries exist, listed by column: y = x W^T + b with W [O, K], O = outputs, holding
//   weight[place_e] at (out_e, k) for ptr_k <= e < ptr_(k+1), 0 elsewhere. weight T [M] in any memory order; ptr int64
//   [K + 1]; out int32 [P], in [0, O), ascending within a column; place int64 [P], in [0, M), no number twice.
//   tiled: goes by kept weights in place of entries of x; absent entries then count as the zeros that they are.
// masked_linear_kept_bwd(rowptr, col, value, colptr, row, cvalue, dy, weight, ptr, out, place) -> dw T [M]
//   dw[place_e] = sum over n of dy[n, out_e] x[n, k]; 0 elsewhere.
//
// topk_mask(scores[], k, alive[]?, largest, magnitude) -> (keep[], status)
//   Selects exactly k of the alive elements of a list of tensors as if concatenated: the largest or the smallest, by
//   value or by magnitude; of equal ones the lowest index of the concatenation. -0 equals 0. keep: bool tensors of the
//   scores' shapes; status int32 [1]: bit 0 = a NaN among the alive scores, bit 1 = k not in [0, number alive]; with
//   any bit set every keep is false. All scores have one dtype T. No host synchronisation.
// topk_mask_out(scores[], k, alive[]?, largest, magnitude, out[]) -> status: the same, written into the bool tensors out,
//   which overlap neither each other nor alive.
//
// gumbel_topk(scores[], k, tau, seed, alive[]?, largest) -> (keep[], status)
//   topk_mask, largest by value, of key_n = +-score_n * float32(1 / tau) + noise_n (+-score_n for tau = 0), minus where not
//   largest, all in float32 without contraction. noise_n = -log(-log u), u = (r_n + 1/2) / 2^32, r_n word n % 4 of Philox
//   with counter (n / 4, stream 0), key seed, n the index in the concatenation; log by the polynomial of cpu/gumbel.h.
// exchange(keep[], kept_scores[], pruned_scores[], k, tau, seed) -> (keep'[], erased[], mined[], status)
//   erased: gumbel_topk of kept_scores among keep, smallest, stream 1; mined: of pruned_scores among the rest, largest,
//   stream 2; keep' = keep and not erased, or mined; keep where status is not 0.
//
// masked_adam(grad[], place[]?, keep[]?, theta[], mask[], theta_mean[], theta_square[], mask_mean[], mask_square[],
//             weight[], step, theta_settings, mask_settings) -> ()
//   One step of Adam on both factors of w = theta * mask, in place, in one pass. grad = dL/dw; the tensors of one position
//   of the lists have one number of elements P and one dtype A (float32 or float64); step int64 [1] counts the steps taken
//   and is raised by 1 to t. settings = (lr, beta1, beta2, eps, weight_decay, l1) of each factor.
//   mask, mask_mean, mask_square empty lists: no mask (mask = 1, nothing of it is updated).
//   weight, unless an empty list: receives theta * mask as they are after the step, 0 where keep is false.
//   place int32 or int64 [P], no number twice: grad and weight are larger tensors, of one number of elements each, and hold
//   element n at flat position place_n; what no place names is neither read nor written. Absent: the identity.
//   For each element that exists (keep absent or true)
//     g_theta = grad mask + wd theta + l1 sign(theta), g_mask = grad theta + wd mask + l1 sign(mask), with the old values,
//   and for each factor p with its g
//     mean = beta1 mean + (1 - beta1) g; square = beta2 square + (1 - beta2) g^2;
//     p -= lr / (1 - beta1^t) * mean / (sqrt(square) / sqrt(1 - beta2^t) + eps).
//   sign(0) = 0. Nothing of an element with keep = false is changed. 1 - beta^t is taken in double. No synchronisation.
#pragma once

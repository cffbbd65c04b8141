"""exchange: one step of regrouping, k kept elements against k removed ones."""

import torch
from torch import Tensor

from acefast.ops import backend, checks
from acefast.ops.gumbel_topk import check_temperature
from acefast.ops.topk_mask import _check_flags, _check_scores, _contiguous, _detached, _fake_masks, read_status


def exchange(
    keep: list[Tensor],
    kept_scores: list[Tensor],
    pruned_scores: list[Tensor],
    k: int,
    tau: float = 1.0,
    *,
    seed: int,
    check: bool | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Erase and mine (ACE-GLT, Wang et al., ECAI 2023): k kept elements leave, k removed ones enter.

    erased: k of the kept, without replacement, P proportional to softmax(-kept_score / tau);
    mined: k of the removed, P proportional to softmax(+pruned_score / tau); both as `gumbel_topk`, with noise streams 1
    and 2 of `seed`. keep' = (keep minus erased) plus mined, so the number kept does not change.

    Args:
        keep: bool tensors; kept_scores is read where keep is True, pruned_scores where it is False, shaped like keep.
        k: at most the number of kept and of removed elements.
    Returns: (keep', erased, mined), lists of bool tensors. Raises InputError as `gumbel_topk`.
    """
    _check_scores("exchange", "kept_scores", kept_scores)
    _check_scores("exchange", "pruned_scores", pruned_scores)
    _check_flags("exchange", "keep", keep, kept_scores)
    _check_flags("exchange", "keep", keep, pruned_scores)
    check_temperature("exchange", tau)
    checks.integer("exchange", "k", k, 0, sum(part.numel() for part in keep))
    checks.integer("exchange", "seed", seed, 0, 2**63 - 1)
    args = _contiguous(keep), _detached(kept_scores), _detached(pruned_scores), k, float(tau), seed
    new_keep, erased, mined, status = backend.call("exchange", *args)
    read_status("exchange", status, k, check)
    return new_keep, erased, mined


@torch.library.register_fake("acefast::exchange")
def _(keep, kept_scores, pruned_scores, k, tau, seed):
    status = keep[0].new_empty(1, dtype=torch.int32)
    return _fake_masks(keep), _fake_masks(keep), _fake_masks(keep), status

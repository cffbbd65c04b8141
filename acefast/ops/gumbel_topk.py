"""gumbel_topk: k draws without replacement from a softmax over a list of tensors."""

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.ops import backend, checks
from acefast.ops.topk_mask import _check_flags, _check_scores, _contiguous, _detached, _fake_masks, read_status


def gumbel_topk(
    scores: list[Tensor],
    k: int,
    tau: float = 1.0,
    *,
    seed: int,
    alive: list[Tensor] | None = None,
    largest: bool = True,
    check: bool | None = None,
) -> list[Tensor]:
    """Bool tensors shaped like `scores` with exactly k True in all: k samples without replacement from
    softmax(score / tau) (softmax(-score / tau) with largest=False) over the alive elements, drawn as the k largest of
    score / tau + Gumbel noise (Kool et al., ICML 2019). tau = 0 takes the k largest (smallest) scores.

    The noise of element n (its index in the concatenation) depends on `seed` and n alone: u = (r + 1/2) / 2^32 with r
    word n mod 4 of Philox4x32-10(counter n div 4, key seed), noise -log(-log u) by one fixed float32 polynomial; scores
    enter in float32. So every backend, thread count and shard makes the same picks.

    Args: as `topk_mask`; tau >= 0; 0 <= seed < 2^63. Raises InputError as `topk_mask` does, and for tau or seed out of range.
    """
    _check_scores("gumbel_topk", "scores", scores)
    _check_flags("gumbel_topk", "alive", alive, scores)
    check_temperature("gumbel_topk", tau)
    checks.integer("gumbel_topk", "k", k, 0, sum(s.numel() for s in scores))
    checks.integer("gumbel_topk", "seed", seed, 0, 2**63 - 1)
    args = _detached(scores), k, float(tau), seed, _contiguous(alive), largest
    keep, status = backend.call("gumbel_topk", *args)
    read_status("gumbel_topk", status, k, check)
    return keep


def check_temperature(op: str, tau: float) -> None:
    if not 0.0 <= tau < float("inf"):
        raise InputError(f"{op}: tau must be a finite number >= 0, got {tau}")


@torch.library.register_fake("acefast::gumbel_topk")
def _(scores, k, tau, seed, alive, largest):
    return _fake_masks(scores), scores[0].new_empty(1, dtype=torch.int32)

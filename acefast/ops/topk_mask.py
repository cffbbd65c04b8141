"""topk_mask: exactly k elements of a list of tensors, as if concatenated, by one radix selection."""

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.ops import backend, checks
from acefast.ops.reference import BAD_K, NAN_SCORE


def topk_mask(
    scores: list[Tensor],
    k: int,
    alive: list[Tensor] | None = None,
    largest: bool = True,
    by: str = "magnitude",
    check: bool | None = None,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """Bool tensors shaped like `scores` with exactly k True in all: the k largest (or smallest) of |score|
    (by="magnitude") or score (by="value") among the elements with alive True, the lowest index first among equals.

    The same picks on every backend and thread count; -0 equals +0; infinities and denormals are ordinary scores.

    Args:
        scores: tensors of one dtype (float32, float64, float16, bfloat16) and device, any shapes.
        k: 0 <= k <= number of alive elements. alive: bool tensors shaped like scores.
        check: read the status and raise InputError for NaN among the alive scores or for k out of range. None reads it on
            the CPU and not on CUDA, where reading waits for the device; unread, such a call selects nothing.
        out: contiguous bool tensors shaped like scores that receive the picks (False where the status refuses) and are
            returned; they may be the alive tensors themselves, which are then copied first.
    Raises InputError for wrong shapes, dtypes or devices, and as `check` says.
    """
    _check_scores("topk_mask", "scores", scores)
    _check_flags("topk_mask", "alive", alive, scores)
    checks.choice("topk_mask", "by", by, ("magnitude", "value"))
    checks.integer("topk_mask", "k", k, 0, sum(s.numel() for s in scores))
    args = _detached(scores), k, _contiguous(alive), largest, by == "magnitude"
    if out is None:
        out, status = backend.call("topk_mask", *args)
    else:
        _check_out(out, scores)
        status = backend.call("topk_mask_out", *args[:2], _apart(args[2], out), *args[3:], out)
    read_status("topk_mask", status, k, check)
    return out


def _check_out(out, scores) -> None:
    _check_flags("topk_mask", "out", out, scores)
    for position, part in enumerate(out):
        if not part.is_contiguous():
            raise InputError(f"topk_mask: out[{position}] must be contiguous, got strides {part.stride()}")
    used = sorted((part.data_ptr(), part.numel()) for part in out if part.numel())
    if any(start + length > after for (start, length), (after, _) in zip(used, used[1:], strict=False)):
        raise InputError("topk_mask: out must be tensors that do not overlap each other")


def _apart(alive, out):
    """`alive` without a tensor that shares its storage with one of `out`."""
    if alive is None:
        return None
    written = {part.untyped_storage().data_ptr() for part in out}
    return [a.clone() if a.untyped_storage().data_ptr() in written else a for a in alive]


def _check_scores(op: str, name: str, scores) -> None:
    if not isinstance(scores, list | tuple) or not scores or not all(isinstance(s, Tensor) for s in scores):
        raise InputError(f"{op}: {name} must be a non-empty list of tensors, got {type(scores).__name__}")
    first = scores[0]
    if first.dtype not in checks.FEATURE_DTYPES:
        raise InputError(f"{op}: {name} must be float32, float64, float16 or bfloat16, got {first.dtype}")
    for position, s in enumerate(scores):
        if s.dtype != first.dtype or s.device != first.device:
            raise InputError(
                f"{op}: {name} must share dtype and device, {name}[{position}] is {s.dtype} on {s.device} and {name}[0]"
                f" is {first.dtype} on {first.device}"
            )


def _check_flags(op: str, name: str, flags, scores) -> None:
    if flags is None:
        return
    if not isinstance(flags, list | tuple) or len(flags) != len(scores):
        raise InputError(f"{op}: {name} must be a list of {len(scores)} bool tensors like scores, got {type(flags).__name__}")
    for position, (flag, score) in enumerate(zip(flags, scores, strict=True)):
        checks.vector(op, f"{name}[{position}]", flag, score.shape, torch.bool, score.device)


def _contiguous(tensors):
    return None if tensors is None else [t.contiguous() for t in tensors]


def _detached(scores):
    return [s.detach().contiguous() for s in scores]


def read_status(op: str, status: Tensor, k: int, check: bool | None) -> None:
    """Raise InputError for what a selection's status says; None reads it where that needs no wait for a device."""
    if torch.compiler.is_compiling() or not (status.device.type == "cpu" if check is None else check):
        return
    value = int(status)
    if value & NAN_SCORE:
        raise InputError(f"{op}: scores must not contain NaN")
    if value & BAD_K:
        raise InputError(f"{op}: k must not exceed the number of selectable elements, got {k}")


@torch.library.register_fake("acefast::topk_mask")
def _(scores, k, alive, largest, magnitude):
    return _fake_masks(scores), scores[0].new_empty(1, dtype=torch.int32)


@torch.library.register_fake("acefast::topk_mask_out")
def _(scores, k, alive, largest, magnitude, out):
    return scores[0].new_empty(1, dtype=torch.int32)


def _fake_masks(like):
    return [torch.empty_like(t, dtype=torch.bool) for t in like]

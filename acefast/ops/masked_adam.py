"""masked_adam: one step of Adam on both factors of masked parameters, in one pass."""

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.ops import backend, checks  # noqa: F401  (backend defines the schemas)


@dataclass(frozen=True)
class AdamSettings:
    """Adam of one factor, as torch.optim.Adam names it; ``l1`` weighs the subgradient sign(p) (0 at p = 0)."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    l1: float = 0.0

    def __post_init__(self):
        for name in ("lr", "eps", "weight_decay", "l1"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise InputError(f"AdamSettings: {name} must be a finite number >= 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"AdamSettings: {name} must lie in [0, 1), got {getattr(self, name)}")


def masked_adam(
    grad: list[Tensor],
    theta: list[Tensor],
    mask: list[Tensor],
    theta_moments: tuple[list[Tensor], list[Tensor]],
    mask_moments: tuple[list[Tensor], list[Tensor]],
    step: Tensor,
    theta_settings: AdamSettings,
    mask_settings: AdamSettings,
    keep: list[Tensor] | None = None,
) -> None:
    """One step of Adam (Kingma and Ba, ICLR 2015) on theta and mask of parameters w = theta * mask, in place, given
    grad = dL/dw: the product rule, the decay, the L1 subgradients and both updates in one pass over memory.

    g_theta = grad mask + weight_decay theta + l1 sign(theta), g_mask = grad theta + weight_decay mask + l1 sign(mask),
    both with the values before the step, then torch.optim.Adam's update of each with its own settings. Elements with keep
    False do not exist: nothing of them changes, their moments and decay included.

    Args: lists of contiguous tensors, of one shape in each place; all float32 or all float64, on one device.
        theta_moments, mask_moments: (means, means of squares), zero before the first step.
        step: int64 [1] on that device, the number of steps taken; raised by 1. keep: bool tensors.
    Raises InputError for wrong lengths, shapes, dtypes, devices or layouts. No host synchronisation.
    `acefast.optim.MaskedAdam` holds the state.
    """
    lists = {
        "grad": grad, "theta": theta, "mask": mask, "theta_moments[0]": theta_moments[0],
        "theta_moments[1]": theta_moments[1], "mask_moments[0]": mask_moments[0], "mask_moments[1]": mask_moments[1],
    }  # fmt: skip
    if not theta:
        raise InputError("masked_adam: theta must be a non-empty list of tensors")
    first = theta[0]
    if first.dtype not in (torch.float32, torch.float64):
        raise InputError(f"masked_adam: theta must be float32 or float64, got {first.dtype}")
    for name, tensors in lists.items():
        _check_list(name, tensors, theta, first.dtype, first.device)
    if keep is not None:
        _check_list("keep", keep, theta, torch.bool, first.device)
    checks.vector("masked_adam", "step", step, (1,), torch.int64, first.device)
    with torch.no_grad():
        torch.ops.acefast.masked_adam(
            grad, keep, theta, mask, *theta_moments, *mask_moments, step, astuple(theta_settings), astuple(mask_settings)
        )


def _check_list(name: str, tensors, like, dtype, device) -> None:
    if len(tensors) != len(like):
        raise InputError(f"masked_adam: {name} must have {len(like)} tensors like theta, got {len(tensors)}")
    for position, (t, other) in enumerate(zip(tensors, like, strict=True)):
        checks.vector("masked_adam", f"{name}[{position}]", t, other.shape, dtype, device)
        if not t.is_contiguous():
            raise InputError(f"masked_adam: {name}[{position}] must be contiguous, got strides {t.stride()}")


@torch.library.register_fake("acefast::masked_adam")
def _(grad, keep, theta, mask, theta_mean, theta_square, mask_mean, mask_square, step, theta_settings, mask_settings):
    return None

"""masked_adam: one step of Adam on both factors of masked parameters, in one pass."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.ops import backend, checks


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

    def values(self) -> list[float]:
        """As the schema of `masked_adam` takes them."""
        return [self.lr, self.beta1, self.beta2, self.eps, self.weight_decay, self.l1]


def masked_adam(
    grad: list[Tensor],
    theta: list[Tensor],
    mask: list[Tensor] | None,
    theta_moments: tuple[list[Tensor], list[Tensor]],
    mask_moments: tuple[list[Tensor], list[Tensor]] | None,
    step: Tensor,
    theta_settings: AdamSettings,
    mask_settings: AdamSettings | None = None,
    keep: list[Tensor] | None = None,
    place: list[Tensor] | None = None,
    weight: list[Tensor] | None = None,
) -> None:
    """One step of Adam (Kingma and Ba, ICLR 2015) on theta and mask of parameters w = theta * mask, in place, given
    grad = dL/dw: the product rule, the decay, the L1 subgradients, both updates and the new product in one pass over memory.

    g_theta = grad mask + weight_decay theta + l1 sign(theta), g_mask = grad theta + weight_decay mask + l1 sign(mask),
    both with the values before the step, then torch.optim.Adam's update of each with its own settings. Elements with keep
    False do not exist: nothing of them changes, their moments and decay included.

    Args: lists of contiguous tensors, of one shape in each position; all float32 or all float64, on one device.
        mask, mask_moments, mask_settings: None for parameters without masks, w = theta.
        theta_moments, mask_moments: (means, means of squares), zero before the first step.
        step: int64 [1] on that device, the number of steps taken; raised by 1. keep: bool tensors.
        weight: receives w as it is after the step, 0 where keep is False.
        place: int32 or int64 tensors of theta's shapes, for theta that holds some elements of a larger parameter: their flat
            positions in grad and weight, which then are of one larger size; no position twice; other positions are neither
            read nor written. Positions are not checked against that size.
    Raises InputError for wrong lengths, shapes, dtypes, devices or layouts. No host synchronisation.
    `acefast.optim.MaskedAdam` holds the state.
    """
    if not isinstance(theta, list | tuple) or not theta or not all(isinstance(t, Tensor) for t in theta):
        raise InputError(f"masked_adam: theta must be a non-empty list of tensors, got {type(theta).__name__}")
    first = theta[0]
    if first.dtype not in (torch.float32, torch.float64):
        raise InputError(f"masked_adam: theta must be float32 or float64, got {first.dtype}")
    if (mask is None) != (mask_moments is None) or (mask is None) != (mask_settings is None):
        raise InputError("masked_adam: mask, mask_moments and mask_settings must be given together or not at all")
    shapes = [t.shape for t in theta]
    spread = shapes if place is None else [getattr(g, "shape", None) for g in grad]
    index = place[0].dtype if place else None
    if place is not None and index not in (torch.int32, torch.int64):
        raise InputError(f"masked_adam: place must hold int32 or int64 tensors, got {index}")
    moments = {"theta_moments": theta_moments, "mask_moments": mask_moments or ()}
    for name, tensors, like, dtype in (
        ("theta", theta, shapes, first.dtype),
        ("mask", mask, shapes, first.dtype),
        *((f"{name}[{n}]", part, shapes, first.dtype) for name, pair in moments.items() for n, part in enumerate(pair)),
        ("grad", grad, spread, first.dtype),
        ("weight", weight, spread, first.dtype),
        ("place", place, shapes, index),
        ("keep", keep, shapes, torch.bool),
    ):
        if tensors is not None:
            _check_list(name, tensors, like, dtype, first.device, len(theta))
    checks.vector("masked_adam", "step", step, (1,), torch.int64, first.device)
    with torch.no_grad():
        backend.call(
            "masked_adam", grad, place, keep, theta, mask or [], *theta_moments, *(mask_moments or ([], [])), weight or [], step,
            theta_settings.values(), (mask_settings or theta_settings).values(),
        )  # fmt: skip


def _check_list(name: str, tensors, shapes, dtype, device, length: int) -> None:
    if len(tensors) != length:
        raise InputError(f"masked_adam: {name} must have {length} tensors like theta, got {len(tensors)}")
    for position, (t, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if not isinstance(t, Tensor):
            raise InputError(f"masked_adam: {name}[{position}] must be a tensor, got {type(t).__name__}")
        if t.dtype is not dtype or t.shape != shape or t.device != device:
            checks.vector("masked_adam", f"{name}[{position}]", t, shape, dtype, device)
        if not t.is_contiguous():
            raise InputError(f"masked_adam: {name}[{position}] must be contiguous, got strides {t.stride()}")


@torch.library.register_fake("acefast::masked_adam")
def _(grad, place, keep, theta, mask, theta_mean, theta_square, mask_mean, mask_square, weight, step, theta_settings,
      mask_settings):  # fmt: skip
    return None

"""One training loop for all: Adam over weights and soft masks, evaluation after each epoch, best epoch kept."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from acefast.data import Dataset
from acefast.errors import InputError
from acefast.pruning import Pattern, SoftMasks


@dataclass(frozen=True)
class Schedule:
    """Epochs and optimiser settings of one training.

    Adam as torch.optim.Adam; weight decay is L2 inside Adam; s1 and s2 weigh the L1 terms |m_g| and |m_w|, whose
    subgradient s * sign(m) is added to the masks' gradients (UGS, Chen et al. 2021, code).
    """

    epochs: int
    lr: float
    weight_decay: float = 0.0
    mask_lr: float = 0.0
    mask_weight_decay: float = 0.0
    s1: float = 0.0
    s2: float = 0.0


@dataclass(eq=False)
class Fit:
    """What a training gives: accuracies (fractions) at the best epoch, the first of highest validation accuracy.

    best_epoch counts from 0; val_loss is the mean cross-entropy on the validation nodes there; masks and weights are
    copies from after that epoch's step (weights only where they were asked for).
    """

    best_epoch: int
    val: float
    val_loss: float
    test: float
    masks: SoftMasks | None = None
    weights: dict[str, Tensor] | None = None


class Evaluator:
    """Accuracy on the validation and test nodes of a data set."""

    def __init__(self, data: Dataset):
        self.nodes = torch.cat([data.val, data.test])
        self.labels = data.y[self.nodes]
        self.num_val = data.val.numel()
        self.num_test = data.test.numel()

    def __call__(self, logits: Tensor) -> tuple[Tensor, int, int]:
        """(logits of the evaluated nodes, number right in validation, number right in test); waits for the device."""
        rows = logits.index_select(0, self.nodes)
        right = rows.argmax(1) == self.labels
        return rows, *torch.stack([right[: self.num_val].sum(), right[self.num_val :].sum()]).tolist()

    def val_loss(self, rows: Tensor) -> float:
        return float(F.cross_entropy(rows[: self.num_val], self.labels[: self.num_val]))


def train(
    model: torch.nn.Module,
    data: Dataset,
    schedule: Schedule,
    start: dict[str, Tensor],
    pattern: Pattern | None = None,
    masks: SoftMasks | None = None,
    seed: int = 0,
    keep_weights: bool = False,
    on_epoch: Callable[[int, float, float], None] | None = None,
) -> Fit:
    """Train ``model`` from the weights ``start`` on the existing elements of ``pattern`` (None: all of them).

    ``masks`` are trained along with the weights (they are changed in place); without them the pattern alone acts.
    ``seed`` names the dropout noise. After each epoch the model is evaluated without dropout and
    ``on_epoch(epoch, val, test)`` is called. A model with ``before_noise`` (see ``acefast.nn.GCN``) shares that part of
    its forward between the evaluation and the next epoch: the same numbers, computed once. Raises InputError when the
    loss, a weight or a mask stops being finite.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    keep_edges, keep_weights_by_name = _existing(pattern)
    edge_mask = None if masks is None or masks.edges is None else masks.edges.requires_grad_()
    weight_masks = {} if masks is None else {name: m.requires_grad_() for name, m in masks.weights.items()}
    step, leaves = _optimizer(schedule, list(parameters.values()), edge_mask, list(weight_masks.values()))
    inputs = (data.graph, data.x, edge_mask, keep_edges, weight_masks, keep_weights_by_name)
    labels = data.y[data.train]
    evaluate = Evaluator(data)

    tracked = [m for m in (edge_mask, *weight_masks.values()) if m is not None]
    tracked += list(parameters.values()) if keep_weights else []
    snapshot = [torch.empty_like(t, requires_grad=False) for t in tracked]
    best = Fit(-1, -1.0, 0.0, 0.0)
    share = getattr(model, "before_noise", None)
    shared = {} if share is None else {"before_noise": share(*inputs)}
    loss = torch.zeros(())
    for epoch in range(schedule.epochs):
        model.train()
        logits = model(*inputs, seed, epoch, **shared)
        loss = F.cross_entropy(logits.index_select(0, data.train), labels)
        gradients = torch.autograd.grad(loss, leaves)
        step(gradients)
        if share is not None:
            shared["before_noise"] = share(*inputs)
        model.eval()
        with torch.no_grad():
            rows, val_right, test_right = evaluate(model(*inputs, seed, epoch, **shared))
            val, test = val_right / evaluate.num_val, test_right / evaluate.num_test
            if val > best.val:
                best = Fit(epoch, val, evaluate.val_loss(rows), test)
                if tracked:
                    torch._foreach_copy_(snapshot, [t.detach() for t in tracked])
        if on_epoch is not None:
            on_epoch(epoch, val, test)
    if not all(bool(torch.isfinite(t).all()) for t in (loss, *leaves)):
        raise InputError(
            f"training diverged within {schedule.epochs} epochs (a weight, mask or loss is not finite): lower lr"
        )
    return _with_snapshot(best, snapshot, masks, parameters if keep_weights else {})


def _existing(pattern: Pattern | None) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The keep arguments of the model: nothing where all elements exist, which the ops serve faster."""
    if pattern is None:
        return None, {}
    edges = None if bool(pattern.edges.all()) else pattern.edges
    return edges, {name: keep for name, keep in pattern.weights.items() if not bool(keep.all())}


def _optimizer(schedule: Schedule, parameters, edge_mask, weight_masks):
    """(step, leaves): the function that takes one step of fused Adam given the leaves' gradients, and the leaves."""
    edges = [] if edge_mask is None else [edge_mask]
    masks = [*edges, *weight_masks]
    groups = [{"params": parameters, "lr": schedule.lr, "weight_decay": schedule.weight_decay}]
    if masks:
        groups.append({"params": masks, "lr": schedule.mask_lr, "weight_decay": schedule.mask_weight_decay})
    optimizer = torch.optim.Adam(groups, lr=schedule.lr, fused=True)
    leaves = [*parameters, *masks]
    penalties = [schedule.s1] * len(edges) + [schedule.s2] * len(weight_masks)

    def step(gradients):
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        with torch.no_grad():
            for mask, penalty in zip(masks, penalties, strict=True):
                if penalty:
                    mask.grad.add_(mask.sign(), alpha=penalty)
        optimizer.step()

    return step, leaves


def _with_snapshot(fit: Fit, snapshot: list[Tensor], masks: SoftMasks | None, parameters) -> Fit:
    copies = iter(snapshot)
    if masks is not None:
        fit.masks = masks.map(lambda m: next(copies))
    if parameters:
        fit.weights = {name: next(copies) for name in parameters}
    return fit

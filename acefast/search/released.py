"""ACE-GLT as its released code does it for GCN (weights only), with one repair.

The repair: where the released code recomputes its picks after too large an overlap, it builds the retained mask from
the complement model; here it is built from the retained model.
"""

from functools import partial

import torch
from torch import Tensor

from acefast.pruning import Pattern, SoftMasks
from acefast.search.search import Search
from acefast.search.stages import fit_fields, log, retrain
from acefast.search.state import State


def stages(config) -> list:
    rounds = [(f"ace-{number}", partial(ace_round, number=number)) for number in range(1, config.ace_rounds + 1)]
    return [("imp", imp), *rounds, ("retrain", finish)]


def imp(search: Search, state: State) -> None:
    """Keep the weights whose |m| is strictly above entry int(0.2 n) of the n sorted nonzero ones; all edges stay."""
    before = state.get("keep")
    fit = search.train_masks(state, "imp", "imp", before, search.config.mask_epochs)
    masks = magnitudes(fit.masks)
    threshold = entry(masks, int(search.config.prune_weights * count_nonzero(masks)))
    keep = with_weights(before, {name: m > threshold for name, m in masks.items()})
    for name in ("keep", "imp", "retained"):
        state.put(name, keep)
    state.put("complement", keep.complement(("weights",)))
    log(search, state, "imp", **keep.counts(), **fit_fields(fit))


def ace_round(search: Search, state: State, number: int) -> None:
    """Train both models, pick by thresholds on |m|, regroup."""
    stage, epochs = f"ace-{number}", search.config.ace_epochs
    fit = search.train_masks(state, stage, "retained", state.get("retained"), epochs)
    other = search.train_masks(state, stage, "complement", state.get("complement"), epochs)
    full = state.get("imp")
    rate = search.config.exchange_weights * full.kept("weights") / full.total("weights")
    kept, lost = magnitudes(fit.masks), magnitudes(other.masks)
    important, useless = picks(kept, lost, rate)

    last = state.get("important")
    overlap = None if last is None else cosine(*(next(iter(p.values())) for p in (last.weights, useless)))
    fired = overlap is not None and overlap > search.config.stop_overlap
    if fired:
        rate = 2 * rate * (1 - rate)
        kept, lost = (state.get(f"accepted-{name}", SoftMasks).weights for name in ("retained", "complement"))
        important, useless = picks(kept, lost, rate)
    state.put("accepted-retained", SoftMasks(None, kept))
    state.put("accepted-complement", SoftMasks(None, lost))
    state.put("important", Pattern(None, important))
    retained, complement = regroup(kept, lost, important, useless)
    edges = full.edges
    state.put("retained", Pattern(edges, retained))
    state.put("complement", Pattern(edges, complement))

    best = state.values.get("best")
    better = best is None or fit.val > best["val"]
    if better:
        state.values["best"] = {"candidate": number, "val": fit.val}
        state.put("ticket", state.get("retained"))
    log(search, state, "ace_round", ace_round=number, weights_mined=count(important), weights_erased=count(useless),
        weights_exchanged=count(important), weights_overlap=overlap, weights_fired=fired, weights_rate=rate,
        best_so_far=better, **fit_fields(fit), **fit_fields(other, "complement_"))  # fmt: skip


def finish(search: Search, state: State) -> None:
    """Retrain the best refined mask; the next round goes on from the unrefined one."""
    state.values["candidate"] = state.values.pop("best")["candidate"] if "best" in state.values else 0
    retrain(search, state)
    state.values.pop("candidate")
    state.drop("imp", "ticket", "retained", "complement", "important", "accepted-retained", "accepted-complement")


def picks(kept: dict[str, Tensor], lost: dict[str, Tensor], rate: float) -> tuple[dict, dict]:
    """(important, useless). Important: removed weights with |m| strictly above entry int(n (1 - rate)) of the
    complement's n sorted nonzero |m|, k of them. Useless: kept weights with nonzero |m| strictly below entry k of the
    retained model's."""
    threshold = entry(lost, int(count_nonzero(lost) * (1 - rate)))
    important = {name: m > threshold for name, m in lost.items()}
    threshold = entry(kept, count(important))
    useless = {name: (m < threshold) & (m > 0) for name, m in kept.items()}
    return important, useless


def regroup(kept, lost, important, useless) -> tuple[dict, dict]:
    """(retained, complement): nonzero, plus what is won, minus what is lost."""
    retained = {name: ((m != 0) | important[name]) & ~useless[name] for name, m in kept.items()}
    complement = {name: ((m != 0) & ~important[name]) | useless[name] for name, m in lost.items()}
    return retained, complement


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two sets given as bool tensors; 0 where one is empty."""
    sizes = float(a.sum()) * float(b.sum())
    return float((a & b).sum()) / sizes**0.5 if sizes else 0.0


def entry(masks: dict[str, Tensor], index: int) -> float:
    """Entry ``index`` (at most the last) of the sorted nonzero values of all tensors; 0 where there are none."""
    values = torch.cat([m[m != 0] for m in masks.values()])
    return float(values.sort().values[min(index, values.numel() - 1)]) if values.numel() else 0.0


def magnitudes(masks: SoftMasks) -> dict[str, Tensor]:
    return {name: m.abs() for name, m in masks.weights.items()}


def count_nonzero(masks: dict[str, Tensor]) -> int:
    return sum(int(torch.count_nonzero(m)) for m in masks.values())


def count(flags: dict[str, Tensor]) -> int:
    return sum(int(f.sum()) for f in flags.values())


def with_weights(pattern: Pattern, weights: dict[str, Tensor]) -> Pattern:
    return Pattern(pattern.edges, weights)

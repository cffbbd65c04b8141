"""ACE-GLT (Wang et al., ECAI 2023): prune by trained masks, then exchange kept elements against removed ones.

In each ACE round a retained model and a complement model are trained from the first weights with soft masks. Kept
elements of low importance are erased, removed ones of high importance are mined, as many of each. A regroup is scored
by the retained model that the next ACE round trains on it; the best one (the unexchanged ticket among them) is
retrained. An axis whose mined elements are erased again is taken back and redrawn at half its rate.

With tie_directions the elements of the edge axis are pairs of edges, each with the mean of its two scores; an edge
without a reverse and a self-loop are not exchanged, so the number of kept edges stays.
"""

from functools import partial

from acefast.pruning import (
    AXES,
    Pairs,
    Pattern,
    SoftMasks,
    exchange,
    exchange_count,
    mean_rank_of_picks,
    standardise,
)
from acefast.search.search import Search
from acefast.search.stages import fit_fields, imp, log, remember_mined, retrain
from acefast.search.state import State


def stages(config, ace_round=None) -> list:
    ace_round = ace_round or train_and_exchange
    rounds = [(f"ace-{number}", partial(ace_round, number=number)) for number in range(1, config.ace_rounds + 1)]
    return [("imp", imp), *rounds, ("candidate", last_candidate), ("retrain", finish)]


def complement_epochs(config) -> int:
    """Epochs that a round's complement models take where each axis that is pruned is exchanged."""
    axes = 2 if config.axes == "joint" else 1
    return config.ace_rounds * config.ace_epochs * {"joint": 1, "crossed": axes, "none": 0}[config.complement]


def train_and_exchange(search: Search, state: State, number: int) -> None:
    """Train on the current regroup (which scores it as candidate ``number - 1``), then exchange."""
    stage = f"ace-{number}"
    keep = state.get("keep")
    fit = candidate(search, state, stage, number - 1)
    importance = search.scores(state, stage, "retained", fit, keep)
    fields = {}
    if search.config.complement == "none":
        lost = search.gains(fit, keep)
        for axis in exchangeable(search, keep):
            fields |= exchange_axis(search, state, number, axis, keep, importance, lost)
    for name, axes, pattern in _complements(search, keep, exchangeable(search, keep)):
        other = search.train_masks(state, stage, name, pattern, search.config.ace_epochs)
        fields |= fit_fields(other, f"{name}_")
        lost = search.scores(state, stage, name, other, pattern, axes)
        for axis in axes:
            fields |= exchange_axis(search, state, number, axis, keep, importance, lost)
    log(search, state, "ace_round", ace_round=number, **fit_fields(fit), **fields)


def exchangeable(search: Search, keep: Pattern) -> list[str]:
    """The axes that are pruned and have kept and removed elements."""
    return [axis for axis in search.axes if 0 < keep.kept(axis) < keep.total(axis)]


def _complements(search: Search, keep: Pattern, axes: list[str]):
    """(name, axes it scores, pattern) of the complement models: removed elements, kept ones only where said."""
    if not axes or search.config.complement == "none":
        return []
    if search.config.complement == "joint":
        return [("complement", axes, keep.complement(search.axes))]
    return [(f"complement_{axis}", [axis], keep.with_axis(axis, keep.complement().axis(axis))) for axis in axes]


def exchange_axis(search, state, number, axis, keep: Pattern, retained: SoftMasks, lost: SoftMasks) -> dict:
    """Erase and mine on one axis, or take the last exchange back; returns what the history tells of it."""
    config = search.config
    rates = state.values.setdefault("rates", {})
    rate = rates.setdefault(axis, getattr(config, f"exchange_{axis}"))
    present, inside, outside = keep.axis(axis), retained.axis(axis), lost.axis(axis)
    pairs = Pairs(search.data.graph) if config.tie_directions and axis == "edges" else None
    if pairs is not None:
        present, inside, outside = [pairs.keep(keep.edges)], [pairs.mean(retained.edges)], [pairs.mean(lost.edges)]
    removed = [~part for part in present]
    sizes = [sum(int(part.sum()) for part in parts) for parts in (present, removed)]
    inside = standardise(inside, present, config.standardise)
    outside = standardise(outside, removed, config.standardise)
    scores = [a.where(p, b) for a, b, p in zip(inside, outside, present, strict=True)]
    seed = search.seed(state.round, f"ace-{number}", "exchange", axis)
    k = exchange_count(rate, *sizes)
    new, erased, mined = exchange(present, scores, k, config.tau, seed)

    before = state.get(f"before-{axis}")
    overlap = None
    if before is not None and k:
        last_mined = state.get(f"mined-{axis}").axis(axis)
        overlap = sum(int((m & e).sum()) for m, e in zip(last_mined, erased, strict=True)) / k
    fired = overlap is not None and overlap > config.stop_overlap
    if fired:
        rates[axis] = rate / 2
        present = before.axis(axis)
        scores = state.get(f"scores-{axis}", SoftMasks).axis(axis)
        k = exchange_count(rates[axis], *sizes)
        new, erased, mined = exchange(present, scores, k, config.tau, search.seed(seed, "redraw"))
    else:
        state.put(f"before-{axis}", _only(axis, present, keep))
        state.put(f"scores-{axis}", _only(axis, scores, keep, SoftMasks))
    removed = [~part for part in present]
    state.put(f"mined-{axis}", _only(axis, mined, keep))
    if pairs is not None:
        new = [pairs.put(keep.edges, new[0])]
    state.put("keep", state.get("keep").with_axis(axis, new))
    return {
        f"{axis}_exchanged": k if pairs is None else 2 * k,
        f"{axis}_erased_rank": mean_rank_of_picks(scores, present, erased, largest=False),
        f"{axis}_mined_rank": mean_rank_of_picks(scores, removed, mined, largest=True),
        f"{axis}_overlap": overlap,
        f"{axis}_fired": fired,
        f"{axis}_rate": rates[axis],
    }


def _only(axis: str, tensors, like: Pattern, kind=Pattern):
    """Elements with this axis alone."""
    return kind(tensors[0], {}) if axis == "edges" else kind(None, dict(zip(like.weights, tensors, strict=True)))


def candidate(search: Search, state: State, stage: str, index: int):
    """Train the retained model on the current regroup and keep it if it is the best one so far."""
    keep = state.get("keep")
    fit = search.train_masks(state, stage, "retained", keep, search.config.ace_epochs)
    best = state.values.get("best")
    better = best is None or (fit.val, -fit.val_loss) > (best["val"], -best["val_loss"])
    if better:
        state.values["best"] = {"candidate": index, "val": fit.val, "val_loss": fit.val_loss}
        state.put("ticket", keep)
    log(search, state, "candidate", candidate=index, best_so_far=better, **keep.counts(), **fit_fields(fit))
    return fit


def last_candidate(search: Search, state: State) -> None:
    """Score the last regroup and choose."""
    candidate(search, state, "candidate", search.config.ace_rounds)
    choose(state)


def choose(state: State) -> None:
    """Make the best candidate so far the round's ticket."""
    state.values["candidate"] = state.values.pop("best")["candidate"]


def finish(search: Search, state: State) -> None:
    """Retrain the chosen ticket, which the next round prunes."""
    retrain(search, state)
    state.put("keep", state.get("ticket"))
    remember_mined(state)
    state.values.pop("candidate")
    state.values.pop("rates", None)
    state.drop("ticket", "imp", *(f"{name}-{axis}" for name in ("before", "scores", "mined") for axis in AXES))

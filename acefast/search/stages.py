"""Stages that several methods share: the dense baseline, pruning by trained masks, retraining the ticket."""

import torch

from acefast.pruning import AXES, Pattern, SoftMasks, prune, spread
from acefast.search.search import Search
from acefast.search.state import State


def log(search: Search, state: State, event: str, **fields) -> None:
    """Append a line to the history and show it."""
    line = {"event": event, "round": state.round, **fields}
    state.history.append(line)
    search.progress(line)


def metric_field(search: Search) -> dict:
    """What val and test of a round are, told where it is not the accuracy."""
    return {} if search.data.metric == "accuracy" else {"metric": search.data.metric}


def fit_fields(fit, prefix: str = "") -> dict:
    """A fit's reproducible numbers for the history."""
    return {f"{prefix}{name}": getattr(fit, name) for name in ("val", "val_loss", "test", "best_epoch")}


def dense(search: Search, state: State) -> None:
    """Train the dense baseline, which is round 0."""
    fit = search.retrain(state, "dense", None)
    full = search.full()
    state.put("keep", full)
    log(search, state, "round", **full.counts(), macs=search.macs(full), exchanged=None, **metric_field(search), **fit_fields(fit))


def imp(search: Search, state: State, epochs: int | None = None, keep_scores: bool = False) -> None:
    """Iterative magnitude pruning: train weights and soft masks together for ``epochs`` (default: mask_epochs), remove the
    lowest scores of each axis. ``keep_scores`` leaves in the state what it pruned ("before") and by which scores ("pruned
    by")."""
    before = state.get("keep")
    epochs = epochs or search.config.mask_epochs
    fit = search.train_masks(state, "imp", "imp", before, epochs)
    scores = search.scores(state, "imp", "imp", fit, before)
    mined = _recently_mined(state, before, max(1, search.config.protect))
    keep = _pruned(search, before, scores, mined)
    state.put("imp", keep)
    fields = {}
    for axis in search.axes:
        fields[f"{axis}_spread"] = spread(scores.axis(axis), before.axis(axis))
        fields[f"{axis}_survival"] = _survival(mined, keep, axis)
    if state.round <= search.config.noise_check:
        fields |= _agreement(search, state, before, keep, mined, epochs)
    if keep_scores:
        state.put("before", before)
        state.put("pruned by", scores.map(torch.clone))  # a checkpoint holds no tensor twice
    state.put("keep", keep)
    log(search, state, "imp", **keep.counts(), **fields, **fit_fields(fit))


def _pruned(search: Search, keep: Pattern, scores: SoftMasks, mined: Pattern | None) -> Pattern:
    """What the round's pruning leaves."""
    config = search.config
    return prune(
        keep, scores, {axis: getattr(config, f"prune_{axis}") for axis in search.axes}, mined if config.protect else None,
        tie_directions=config.tie_directions, graph=search.data.graph,
    )  # fmt: skip


def _agreement(search: Search, state: State, before: Pattern, keep: Pattern, mined: Pattern | None, epochs: int) -> dict:
    """Share of what was pruned that a training with a second draw of the masks' noise, and nothing else different, prunes
    as well; the share that chance would give is the pruned fraction."""
    fit = search.train_masks(state, "imp", "imp", before, epochs, noise="second mask")
    other = _pruned(search, before, search.scores(state.copy(), "imp", "imp", fit, before), mined)
    fields = {}
    for axis in search.axes:
        one, two = before.minus(keep).axis(axis), before.minus(other).axis(axis)
        count = sum(int(part.sum()) for part in one)
        both = sum(int((a & b).sum()) for a, b in zip(one, two, strict=True))
        fields[f"{axis}_agreement"] = both / count if count else None
    return fields


def edge_fields(search: Search, keep: Pattern) -> dict:
    """Of the kept and of the removed edges, without self-loops: homophily, the fraction whose ends are of one class, and
    degree, the mean over edges of the mean degree of the ends in the whole graph. Empty where edges are not pruned; None
    where there are none, and for homophily where nodes have no single class."""
    if "edges" not in search.axes:
        return {}
    labels, degrees = search.data.y, search.data.graph.in_degrees()
    single = labels is not None and labels.dim() == 1
    count, alike, ends = ({"kept": 0, "removed": 0} for _ in range(3))
    for edges, src, dst in search.data.graph.pieces():
        kept, apart = keep.edges[edges], src != dst
        same, both = labels[src] == labels[dst] if single else None, degrees[src] + degrees[dst]
        for name, chosen in (("kept", kept & apart), ("removed", ~kept & apart)):
            count[name] += int(chosen.sum())
            alike[name] += int(same[chosen].sum()) if single else 0
            ends[name] += int(both[chosen].sum())
    fields = {}
    for name in count:
        fields[f"edges_homophily_{name}"] = alike[name] / count[name] if count[name] and single else None
        fields[f"edges_degree_{name}"] = ends[name] / 2 / count[name] if count[name] else None
    return fields


def retrain(search: Search, state: State) -> None:
    """Rewind the round's ticket to the first weights, freeze its masks, train, report."""
    ticket = state.get("ticket") or state.get("keep")
    fit = search.retrain(state, "retrain", ticket)
    state.put("result", ticket)
    state.values["result"] = {"val": fit.val, "test": fit.test}
    exchanged = None
    if "candidate" in state.values:
        gained = ticket.minus(state.get("imp"))
        exchanged = sum(gained.kept(axis) for axis in AXES)
    fields = {"candidate": state.values["candidate"]} if "candidate" in state.values else {}
    fields |= {"macs": search.macs(ticket), **edge_fields(search, ticket), **metric_field(search)}
    log(search, state, "round", **ticket.counts(), exchanged=exchanged, **fields, **fit_fields(fit))


def remember_mined(state: State) -> None:
    """Note the round in which elements that this round's ticket won back were mined."""
    gained = state.get("keep").minus(state.get("imp"))
    age = state.get("mined_in")
    number = state.round
    mined = gained.map(lambda new: new.short() * number)
    state.put("mined_in", mined if age is None else mined.map(lambda new, old: new.where(new > 0, old), age))


def _recently_mined(state: State, keep: Pattern, rounds: int) -> Pattern | None:
    """Kept elements that were mined within the last ``rounds`` rounds; None where nothing was ever mined."""
    age = state.get("mined_in")
    if age is None:
        return None
    oldest = state.round - rounds
    return keep.map(lambda kept, mined_in: kept & (mined_in > 0) & (mined_in >= oldest), age)


def _survival(mined: Pattern | None, keep: Pattern, axis: str) -> float | None:
    """Fraction of the recently mined elements that pruning left in place; None without any."""
    if mined is None or not mined.kept(axis):
        return None
    left = sum(int((m & k).sum()) for m, k in zip(mined.axis(axis), keep.axis(axis), strict=True))
    return left / mined.kept(axis)

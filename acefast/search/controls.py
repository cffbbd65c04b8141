"""Controls for the claim that ACE's exchange finds better tickets than UGS with as much to spend.

more_epochs ("ugs-epochs"): UGS whose mask training has all of ACE's epochs. best_of_n ("ugs-best"): UGS with ACE's epochs and
ACE's choice by validation among as many candidates, drawn around UGS's own pruning. random_exchange ("ace-random"): ACE with
uniform importance in place of what its trained models say, exchanging as many elements.
"""

from functools import partial

from acefast import ops
from acefast.pruning import SoftMasks, prune_count, standardise
from acefast.search import ace
from acefast.search.random import random_scores
from acefast.search.search import Search
from acefast.search.stages import imp, log, retrain
from acefast.search.state import State


def more_epochs(config) -> list:
    epochs = config.mask_epochs + (config.ace_rounds + 1) * config.ace_epochs + ace.complement_epochs(config)
    return [("imp", partial(imp, epochs=epochs)), ("retrain", retrain)]


def best_of_n(config) -> list:
    candidates = [(f"candidate-{i}", partial(candidate, number=i)) for i in range(config.ace_rounds + 1)]
    epochs = config.mask_epochs + ace.complement_epochs(config)
    return [("imp", partial(imp, epochs=epochs, keep_scores=True)), *candidates, ("choose", choose), ("retrain", ace.finish)]


def candidate(search: Search, state: State, number: int) -> None:
    """Score candidate 0, what magnitude pruning leaves, or another one, whose removed elements are drawn by
    softmax(-I / tau), I the standardised scores of that pruning, without replacement."""
    if number:
        before, scores = state.get("before"), state.get("pruned by", SoftMasks)
        keep = before
        for axis in search.axes:
            present = before.axis(axis)
            count = prune_count(before.kept(axis), getattr(search.config, f"prune_{axis}"))
            importance = standardise(scores.axis(axis), present, search.config.standardise)
            picked = ops.gumbel_topk(
                importance, count, tau=search.config.tau, alive=present, largest=False,
                seed=search.seed(state.round, f"candidate-{number}", axis),
            )  # fmt: skip
            keep = keep.with_axis(axis, [k & ~p for k, p in zip(present, picked, strict=True)])
        state.put("keep", keep)
    ace.candidate(search, state, f"candidate-{number}", number)


def choose(search: Search, state: State) -> None:
    ace.choose(state)
    state.drop("before", "pruned by")


def random_exchange(config) -> list:
    return ace.stages(config, ace_round=random_round)


def random_round(search: Search, state: State, number: int) -> None:
    """An ACE round without a complement model: whatever is exchanged is drawn uniformly."""
    keep = state.get("keep")
    ace.candidate(search, state, f"ace-{number}", number - 1)
    scores = random_scores(search, state.round, f"ace-{number}", "random")
    fields = {}
    for axis in ace.exchangeable(search, keep):
        fields |= ace.exchange_axis(search, state, number, axis, keep, scores, scores)
    log(search, state, "ace_round", ace_round=number, **fields)

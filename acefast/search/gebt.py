"""GEBT, graph early-bird tickets (You et al., AAAI 2022): draw the ticket once it stops changing, retrain once.

At each rung, from the unpruned network: weights and soft masks are trained together, and after each epoch the elements that
the ladder leaves are drawn by their scores |m|. Training ends when any two of the last ``WINDOW`` draws differ in less than
``DISTANCE`` of an axis' elements, on each axis (normalised Hamming distance; published values), at mask_epochs at the latest; the
last draw is the ticket. Where a rung removes less than ``DISTANCE`` / 2 of the elements this holds as soon as there are
``WINDOW`` draws.
"""

from collections import deque
from itertools import combinations

from acefast.pruning import Pattern, SoftMasks, prune_to
from acefast.search.random import rung_counts
from acefast.search.search import Search
from acefast.search.stages import fit_fields, log, retrain
from acefast.search.state import State

WINDOW, DISTANCE = 3, 0.1


def stages(config) -> list:
    return [("early-bird", early_bird), ("retrain", retrain)]


def early_bird(search: Search, state: State) -> None:
    full, counts = search.full(), rung_counts(search, state.round)
    draws: deque[Pattern] = deque(maxlen=WINDOW)

    def draw(masks: SoftMasks) -> bool:
        scores = masks.map(lambda m: m.abs())
        draws.append(
            prune_to(full, scores, counts, tie_directions=search.config.tie_directions, graph=search.data.graph)
        )
        return len(draws) == WINDOW and distance(draws, search.axes) < DISTANCE

    fit = search.train_masks(state, "early-bird", "early-bird", full, search.config.mask_epochs, until=draw)
    state.put("keep", draws[-1])
    log(search, state, "early_bird", distance=distance(draws, search.axes), **draws[-1].counts(), **fit_fields(fit))


def distance(draws, axes) -> float:
    """Largest share of an axis' elements in which two of the draws differ."""
    pairs = combinations(draws, 2)
    return max(
        sum(int((a ^ b).sum()) for a, b in zip(one.axis(axis), two.axis(axis), strict=True)) / one.total(axis)
        for one, two in pairs for axis in axes
    )  # fmt: skip

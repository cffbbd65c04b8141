"""Uniformly random tickets: at each rung a fresh one-shot choice of as many elements as the ladder leaves."""

from acefast.pruning import SoftMasks, ladder, prune_to, score
from acefast.search.search import Search
from acefast.search.stages import log, retrain
from acefast.search.state import State


def stages(config) -> list:
    return [("draw", draw), ("retrain", retrain)]


def draw(search: Search, state: State) -> None:
    scores = random_scores(search, state.round, "draw")
    keep = prune_to(
        search.full(), scores, rung_counts(search, state.round),
        tie_directions=search.config.tie_directions, graph=search.data.graph,
    )  # fmt: skip
    state.put("keep", keep)
    log(search, state, "draw", **keep.counts())


def random_scores(search: Search, *names) -> SoftMasks:
    """Uniform scores of every element of the axes that are pruned, from generators under ``names``."""
    full = search.full()
    return score("random", SoftMasks.init(full, 0.0, search.make(*names), search.axes), make=search.make(*names))


def rung_counts(search: Search, rung: int) -> dict[str, int]:
    """Elements that the ladder leaves at a rung, for each axis that is pruned."""
    full = search.full()
    return {axis: ladder(full.total(axis), getattr(search.config, f"prune_{axis}"), rung)[-1] for axis in search.axes}

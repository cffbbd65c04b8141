"""Patterns and soft masks, scores, selection, schedules and tickets; usable without a search."""

from acefast.pruning.pattern import AXES, Elements, Pattern, SoftMasks
from acefast.pruning.schedule import exchange_count, ladder, prune_count
from acefast.pruning.scores import SCORES, mean_rank_of_picks, score, spread, standardise
from acefast.pruning.select import exchange, prune
from acefast.pruning.ticket import Ticket

__all__ = [
    "AXES",
    "SCORES",
    "Elements",
    "Pattern",
    "SoftMasks",
    "Ticket",
    "exchange",
    "exchange_count",
    "ladder",
    "mean_rank_of_picks",
    "prune",
    "prune_count",
    "score",
    "spread",
    "standardise",
]

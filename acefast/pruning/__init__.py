"""Pruning of any module by magnitude; patterns and soft masks, scores, selection, schedules and tickets; usable without
a search."""

from acefast.pruning.directions import Pairs, lowest_tied
from acefast.pruning.magnitude import global_magnitude_
from acefast.pruning.pattern import AXES, Elements, Pattern, SoftMasks
from acefast.pruning.schedule import cubic, exchange_count, ladder, one_shot, prune_count
from acefast.pruning.scores import SCORES, Inputs, Score, find_score, mean_rank_of_picks, score, spread, standardise
from acefast.pruning.select import exchange, prune, prune_to
from acefast.pruning.ticket import Ticket

__all__ = [
    "AXES",
    "SCORES",
    "Elements",
    "Inputs",
    "Pairs",
    "Pattern",
    "Score",
    "SoftMasks",
    "Ticket",
    "cubic",
    "exchange",
    "exchange_count",
    "find_score",
    "global_magnitude_",
    "ladder",
    "lowest_tied",
    "mean_rank_of_picks",
    "one_shot",
    "prune",
    "prune_count",
    "prune_to",
    "score",
    "spread",
    "standardise",
]

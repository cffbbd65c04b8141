"""The search for graph lottery tickets: configuration, the resumable round loop, and one short file per method.

A method is a function ``stages(config)`` that gives the stages of a round in order, as (name, function(search, state)):
``search`` trains, ``state`` holds what is known, and whatever a stage leaves in ``state`` is what a rerun goes on from.
``stages.imp`` and ``stages.retrain`` are the two that most methods share; see ``ugs`` for the shortest method.
"""

from acefast.search.config import SearchConfig, resolve_config
from acefast.search.folder import load_config
from acefast.search.rounds import METHODS, find_ticket, load_data, run_search
from acefast.search.run import Run
from acefast.search.transfer import retrain_ticket

__all__ = [
    "METHODS",
    "Run",
    "SearchConfig",
    "find_ticket",
    "load_config",
    "load_data",
    "resolve_config",
    "retrain_ticket",
    "run_search",
]

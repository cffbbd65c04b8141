"""The methods by name, and how to add one.

A method is a function ``stages(config)`` that gives the stages of a round in order, as (name, function(search, state)).
A stage trains through ``search`` (``train_masks``, ``scores``, ``retrain``), writes into ``state`` what the next stages
need, and ``log``s what the history shall tell; a rerun goes on with the stage that was stopped and repeats none of its
finished trainings. ``state.get("keep")`` is the pattern of kept edges and weights; ``stages.retrain`` ends a round with the
round's ticket. For one of your own:

    def stages(config):
        return [("prune", my_prune), ("retrain", retrain)]

    METHODS["mine"] = stages

after which ``find_ticket(..., method="mine")`` runs it with everything around it: settings, folder, resuming, tickets,
report. ``find_ticket(..., method=stages)`` does so without a name.
"""

from collections.abc import Callable

from acefast.errors import InputError
from acefast.search import ace, controls, dense, gebt, random, ugs

METHODS: dict[str, Callable] = {
    "dense": dense.stages,
    "random": random.stages,
    "ugs": ugs.stages,
    "gebt": gebt.stages,
    "ace": ace.stages,
    "ugs-epochs": controls.more_epochs,
    "ugs-best": controls.best_of_n,
    "ace-random": controls.random_exchange,
}


def find_method(name: str) -> Callable:
    """The method of a name in ``METHODS``. Raises InputError for an unknown one."""
    if name not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]

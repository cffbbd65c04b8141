"""The search for graph lottery tickets: configuration, the resumable round loop, and one short file per method.

``methods`` names them all and says how to add one; ``ugs`` is the shortest.
"""

from acefast.search.config import SearchConfig, resolve_config
from acefast.search.deploy import CompactNetwork, compact, time_inference
from acefast.search.folder import load_config
from acefast.search.methods import METHODS
from acefast.search.plan import Machine, look_ahead
from acefast.search.rounds import find_ticket, load_data, run_search
from acefast.search.run import Run
from acefast.search.transfer import export_ticket, retrain_ticket

__all__ = [
    "METHODS",
    "CompactNetwork",
    "Machine",
    "Run",
    "SearchConfig",
    "compact",
    "export_ticket",
    "find_ticket",
    "load_config",
    "load_data",
    "look_ahead",
    "resolve_config",
    "retrain_ticket",
    "run_search",
    "time_inference",
]

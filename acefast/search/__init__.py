"""The search for graph lottery tickets: configuration, the resumable round loop, and one short file per method."""

from acefast.search.config import SearchConfig, resolve_config
from acefast.search.folder import load_config
from acefast.search.rounds import METHODS, find_ticket, load_data, run_search
from acefast.search.run import Run

__all__ = ["METHODS", "Run", "SearchConfig", "find_ticket", "load_config", "load_data", "resolve_config", "run_search"]

"""acefast: fast kernels for masked sparse message passing and exact mask selection, and the ACE-GLT search built on them."""

import importlib
import importlib.metadata

from acefast import ops
from acefast.csr import CSR
from acefast.errors import InputError
from acefast.graph import Graph, Selection
from acefast.ops.backend import backend, get_backend, set_backend

__version__ = importlib.metadata.version("acefast")

# Loaded when first used, so that importing the kernels costs no more than the kernels.
_LAZY = {"Ticket": "acefast.pruning.ticket", "compact": "acefast.search", "find_ticket": "acefast.search", "Run": "acefast.search"}
_LAZY_MODULES = ("data", "nn", "pruning", "report", "search")

__all__ = ["CSR", "Graph", "InputError", "Selection", "Ticket", "backend", "compact", "find_ticket", "get_backend", "ops", "set_backend"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"acefast.{name}")
    raise AttributeError(f"module 'acefast' has no attribute {name!r}")

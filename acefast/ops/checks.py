"""Checks of what callers pass, before any memory is touched: one sentence each, naming argument, expected and got."""

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.graph import Graph
from acefast.ops.reference import accumulator

FEATURE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def graph(op: str, g) -> None:
    if not isinstance(g, Graph):
        raise InputError(f"{op}: the first argument must be an acefast.Graph, got {type(g).__name__}")


def features(op: str, name: str, t, rows: int, device, dims: tuple[int, ...] = (2,)) -> None:
    """`t` is a feature tensor with `rows` rows."""
    if not isinstance(t, Tensor):
        raise InputError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in FEATURE_DTYPES:
        raise InputError(f"{op}: {name} must be float32, float64, float16 or bfloat16, got {t.dtype}")
    if t.dim() not in dims or t.size(0) != rows:
        shape = " or ".join(f"[{rows}{', *' * (d - 1)}]" for d in dims)
        raise InputError(f"{op}: {name} must have shape {shape}, got {list(t.shape)}")
    same_device(op, name, t, device)


def vector(op: str, name: str, t, shape: tuple[int, ...], dtype: torch.dtype, device) -> None:
    """`t` is None or a tensor of exactly this shape, dtype and device."""
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise InputError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype != dtype:
        raise InputError(f"{op}: {name} must be {dtype}, got {t.dtype}")
    if t.shape != shape:
        raise InputError(f"{op}: {name} must have shape {list(shape)}, got {list(t.shape)}")
    same_device(op, name, t, device)


def same_device(op: str, name: str, t: Tensor, device) -> None:
    if t.device != device:
        raise InputError(f"{op}: {name} must be on {device} like the rest, got {t.device}")


def choice(op: str, name: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def integer(op: str, name: str, value, low: int, high: int) -> None:
    """`value` is a whole number in [low, high]; symbolic ones come from the compiler."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise InputError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if not low <= value <= high:
        raise InputError(f"{op}: {name} must lie in [{low}, {high}], got {value}")


def probability(op: str, name: str, value) -> None:
    if not 0.0 <= value <= 1.0:
        raise InputError(f"{op}: {name} must lie in [0, 1], got {value}")


def square(op: str, g: Graph, what: str) -> None:
    if g.num_src != g.num_dst:
        raise InputError(f"{op}: {what} needs a square graph, this one is bipartite {g.num_nodes}")


__all__ = ["accumulator", "choice", "features", "graph", "integer", "probability", "same_device", "square", "vector"]

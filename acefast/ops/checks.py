"""Checks of what callers pass, before any memory is touched: one sentence each, naming argument, expected and got."""

import torch
from torch import Tensor

from acefast.errors import InputError
from acefast.graph import Graph, Selection
from acefast.ops.reference import accumulator as accumulator
from acefast.ops.reference import num_edges as num_edges

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


def keep_flags(op: str, g: Graph, keep) -> Tensor | None:
    """`keep`, a bool tensor [E] or a selection of g, as a tensor."""
    if isinstance(keep, Selection):
        if keep.graph is not g and not torch.compiler.is_compiling():  # a trace holds records of their tensors
            raise InputError(f"{op}: keep is a selection of another graph; make one by select() of the graph given")
        return keep.keep
    vector(op, "keep", keep, (g.num_edges,), torch.bool, g.device)
    return None if keep is None else keep.contiguous()


def kept_edges(op: str, g: Graph, keep, all_edges: bool = False) -> tuple[tuple, Tensor | None]:
    """(arrays, keep) as the schemas take them: a selection gives its own arrays, unless removed edges must be visited."""
    flags = keep_flags(op, g, keep)
    if isinstance(keep, Selection) and not all_edges:
        return keep.arrays, None
    return g.arrays, flags


def kept_in_degrees(g: Graph, keep) -> Tensor:
    """Number of kept edges into each destination, int64 [N_dst]; `keep` checked."""
    if keep is None:
        return g.in_degrees()
    if isinstance(keep, Selection):
        return keep.in_degrees()
    before = torch.zeros(g.num_edges + 1, dtype=torch.int64, device=g.device)
    before[1:] = torch.cumsum(keep if g.eid is None else keep[g.eid.long()], 0)
    return before[g.rowptr[1:]] - before[g.rowptr[:-1]]


def contiguous(*tensors):
    """Each tensor contiguous, None left as it is."""
    return [None if t is None else t.contiguous() for t in tensors]


def choice(op: str, name: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def integer(op: str, name: str, value, low: int, high: int) -> None:
    """`value` is a whole number in [low, high]; symbolic ones come from the compiler."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise InputError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if not low <= value <= high:
        raise InputError(f"{op}: {name} must lie in [{low}, {high}], got {value}")


def step(op: str, value, device) -> tuple[int, Tensor | None]:
    """(step, step_at) as the schemas take them of a whole number in [0, 2^63), or of an int64 tensor [1] that holds one."""
    if isinstance(value, Tensor):
        vector(op, "step", value, (1,), torch.int64, device)
        return 0, value
    integer(op, "step", value, 0, 2**63 - 1)
    return value, None


def probability(op: str, name: str, value) -> None:
    if not 0.0 <= value <= 1.0:
        raise InputError(f"{op}: {name} must lie in [0, 1], got {value}")


def square(op: str, g: Graph, what: str) -> None:
    if g.num_src != g.num_dst:
        raise InputError(f"{op}: {what} needs a square graph, this one is bipartite {g.num_nodes}")

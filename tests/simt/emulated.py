"""Calls of the CUDA ops for the case files: every call runs several times and must give the same bits; results are compared
with the float64 reference. In the sanitised process that test_simt.py starts, the calls run on the emulator, each under
another permutation seed; without the emulator's library they run on the GPU (tests/gpu)."""

import ctypes
import itertools
import os

import torch

from acefast import Graph
from acefast.ops import reference
from acefast.ops.backend import SCHEMAS
from tests.inputs import assert_close

SEEDS = (0, 1)  # an even and an odd one: see simt.h
EMULATED = "ACEFAST_SIMT_LIBRARY" in os.environ
DEVICE = "cpu" if EMULATED else "cuda"

if EMULATED:
    _library = torch.library.Library("acefast_simt", "FRAGMENT")
    for _op, _schema in SCHEMAS.items():
        _library.define(_op + _schema)
    torch.ops.load_library(os.environ["ACEFAST_SIMT_LIBRARY"])
    _set_seed = ctypes.CDLL(os.environ["ACEFAST_SIMT_LIBRARY"]).acefast_simt_set_seed
    _set_seed.argtypes = [ctypes.c_uint64]


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return list(itertools.chain.from_iterable(map(_tensors, value))) if isinstance(value, list | tuple) else []


def _bits(t):
    return t.contiguous().flatten().view(torch.uint8) if t.numel() else t


def _copied(value, device):
    """Copies of tensors, also in lists, on the device; one that was off a 16-byte boundary stays so."""
    if isinstance(value, list | tuple):
        return [_copied(part, device) for part in value]
    if not isinstance(value, torch.Tensor):
        return value
    return unaligned(value, device) if value.data_ptr() % 16 else value.to(device, copy=True)


def _call(op, seed, args):
    if EMULATED:
        _set_seed(seed)
        return getattr(torch.ops.acefast_simt, op)(*args)
    return _copied(getattr(torch.ops.acefast_native, op)(*args), "cpu")


def _one(op, results):
    """The first of the results; all have the same bits."""
    for other in results[1:]:
        for a, b in zip(_tensors(results[0]), _tensors(other), strict=True):
            assert a.shape == b.shape and torch.equal(_bits(a), _bits(b)), f"{op}: the bits depend on the order of threads"
    return results[0]


def run(op, *args, seeds=SEEDS):
    """The op's result, on the CPU; the same bits under every seed."""
    return _one(op, [_call(op, seed, args if EMULATED else _copied(args, DEVICE)) for seed in seeds])


def run_writing(op, *args, seeds=SEEDS):
    """(result, arguments after the call) of an op that writes into its arguments, on the CPU; `args` stay as they are."""

    def once(seed):
        own = _copied(args, DEVICE)
        result = _call(op, seed, own)
        return result, _copied(own, "cpu")

    return _one(op, [once(seed) for seed in seeds])


def check(op, *args, what=""):
    """Runs the op and compares each result with the reference on float64 inputs; dtypes as the reference has them."""
    actual = _tensors(run(op, *args))
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    expected = _tensors(getattr(reference, op)(*wide))
    dtypes = [t.dtype for t in _tensors(getattr(reference, op)(*args))]
    floats = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    coarsest = max(floats, key=lambda d: torch.finfo(d).eps, default=torch.float32)
    for position, (a, b, dtype) in enumerate(zip(actual, expected, dtypes, strict=True)):
        name = f"{op}[{position}] {what}"
        assert a.dtype == dtype, f"{name}: {a.dtype}, expected {dtype}"
        # What is kept in float32 comes from sums of exact products of the inputs, whatever their dtype.
        assert_close(a, b, dtype if dtype == torch.float32 and op in ("spmm_bwd", "sddmm") else coarsest, name)
    return actual


def arrays(graph: Graph, wide_indices: bool = False):
    """The graph's six arguments, optionally with int64 indices."""
    if not wide_indices:
        return graph.arrays
    return tuple(None if t is None else t.long() for t in graph.arrays)


def unaligned(t: torch.Tensor, device="cpu") -> torch.Tensor:
    """A contiguous copy whose memory starts one element past a 16-byte boundary."""
    storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)
    storage[1:] = t.flatten()
    return storage[1:].view(t.shape)


def long_rows() -> Graph:
    """Rows and columns just below, at and above whole numbers of pieces (32 slots at this size)."""
    counts = torch.tensor([32, 33, 0, 1, 1025, 511, 512, 31])
    long_side = torch.repeat_interleave(torch.arange(8), counts)
    other = torch.randint(0, 8, (long_side.numel(),), generator=torch.Generator().manual_seed(1))
    return Graph.from_edge_index(torch.stack((torch.cat((other, long_side)), torch.cat((long_side, other)))), num_nodes=8)

"""Timing, memory and equality for all benchmarks: nothing is timed that was not just checked to be equal.

Memory is measured with the allocator returning freed memory to the system at once, so that the high-water mark of a call is
what that call needs. Times are then taken with freed memory kept in the process (`kept_memory`), for all implementations
alike: a fresh output of 90 MB costs some 20,000 page faults, which take longer than the product that fills it and which a
training loop pays once, not at each step. An implementation that takes longer than `SLOW_S` runs once only: that call is
its check, its memory and its time, page faults included, and its row says so.
"""

import contextlib
import ctypes
import dataclasses
import gc
import importlib.metadata
import math
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import acefast
from acefast import memory
from acefast.ops import backend


SLOW_S = 5.0  # a first call above this is the only one
MAX_RESERVE = 6 * 2**30
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation's figures on one case."""

    op: str
    shape: str
    case: str
    dtype: str
    device: str
    impl: str
    median_s: float | None  # None: not timed, `note` says why
    min_s: float | None
    repeats: int
    peak_bytes: int | None
    equal: bool
    variant: str = ""
    bytes_moved: int | None = None  # the least that the case must read and write
    copy_fraction: float | None = None  # bytes_moved per second over a plain copy's in the same run
    ratio_to_fastest_peer: float | None = None
    note: str = ""
    nodes: int | None = None
    edges: int | None = None
    features: int | None = None

    def to_json(self) -> dict:
        row = dataclasses.asdict(self)
        row["pass"] = row.pop("case")
        return row

    @property
    def ours(self) -> bool:
        return self.impl.startswith("acefast")


def environment() -> dict:
    """Versions, hardware and commit, for the head of a results file; a peer that is not installed is None."""

    def output(*command):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else None

    def version(package):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)

    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        cpu = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), cpu)
    return {
        "acefast": acefast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "loaded": backend.loaded(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "modified": bool(output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
        "peers": {name: version(name) for name in ("torch_sparse", "torch_scatter", "torch_geometric", "dgl", "triton")},
    }


_RETURNED = {memory.MMAP_MAX: 65536, memory.MMAP_THRESHOLD: 128 * 1024, memory.TRIM_THRESHOLD: 128 * 1024}  # at once
_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_libc.free.restype, _libc.free.argtypes = None, [ctypes.c_void_p]


@contextlib.contextmanager
def kept_memory(reserve: int = 0):
    """Inside, the process keeps freed memory (CPU) and hands it out again without page faults, `reserve` bytes from the
    start: an aligned request seldom fits what the last one left. Outside, freed memory is returned."""
    memory.set_allocator(memory.KEPT)
    block = _libc.malloc(reserve)
    if block:
        ctypes.memset(block, 1, reserve)
        _libc.free(block)
    try:
        yield
    finally:
        memory.set_allocator(_RETURNED)


def limit_memory(fraction: float = 0.92) -> None:
    """Refuse allocations beyond this share of the memory that is available now, so that an implementation that needs more
    is reported as unable to run and does not end the process."""
    available = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")
    )
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(fraction * available) + status_bytes("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def status_bytes(field: str) -> int:
    """VmRSS, VmHWM or VmData of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measured(call: Callable, device: str) -> tuple:
    """(outputs, seconds, peak bytes): one call, and the largest memory in use during it above what was in use before, its
    outputs included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        outputs = call()
        torch.cuda.synchronize()
        return outputs, time.perf_counter() - start, torch.cuda.max_memory_allocated() - before
    memory.set_allocator(_RETURNED)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    outputs = call()
    seconds = time.perf_counter() - start
    return outputs, seconds, max(0, status_bytes("VmHWM") - before)


def timed(call: Callable, device: str, inner: int = 1) -> float:
    """Seconds per call, the device waited for; the mean of `inner` calls in a row."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(inner):
        outputs = call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del outputs
    return seconds / inner


def close(expected, found, dtype: torch.dtype) -> bool:
    """By norm, tensor by tensor; what cancels to nearly 0 (the gradient of one shared number) is held against 5 % of the
    largest norm."""
    expected, found = (t if isinstance(t, tuple | list) else (t,) for t in (expected, found))
    largest = max(float(t.double().norm()) for t in expected)
    return len(expected) == len(found) and all(
        a.shape == b.shape
        and float((a.double() - b.double()).norm()) <= TOLERANCE[dtype] * max(float(a.double().norm()), 5e-2 * largest)
        for a, b in zip(expected, found, strict=True)
    )


@dataclasses.dataclass
class _Candidate:
    """What was found out about one implementation so far."""

    call: Callable
    prepare: Callable
    equal: bool = False
    peak: int | None = None
    first_s: float = math.inf
    note: str = ""
    times: list = dataclasses.field(default_factory=list)


# What a peer raises where it lacks an op, a dtype or memory: a result, not a failure. Errors of the comparison are none of it.
PEER_LIMITS = (RuntimeError, TypeError, ValueError, MemoryError, AttributeError)


def _cannot_run(candidate: _Candidate, error: Exception, device: str) -> None:
    gc.collect()  # what the failed call held
    if device == "cuda":
        torch.cuda.empty_cache()
    candidate.equal = False
    candidate.note = f"cannot run: {type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def _first_calls(candidates: dict[str, _Candidate], equal: Callable | dict[str, Callable], device: str) -> None:
    """Check and memory of each; the slow ones are timed by the same call."""
    expected = None
    for name, candidate in candidates.items():
        check = equal[name] if isinstance(equal, dict) else equal
        for again in (False, True):  # without what only a first call needs
            try:
                candidate.prepare()
                found, candidate.first_s, candidate.peak = measured(candidate.call, device)
            except PEER_LIMITS as error:
                if name == next(iter(candidates)):
                    raise
                _cannot_run(candidate, error, device)
                break
            if not again:
                expected = found if expected is None else expected
                candidate.equal = bool(check(expected, found))
                candidate.note = "" if candidate.equal else "differs from acefast, so not timed"
            del found
            if not candidate.equal or (candidate.first_s >= SLOW_S and device != "cuda"):
                break
        if candidate.equal and candidate.first_s >= SLOW_S:
            candidate.times, candidate.note = [candidate.first_s], "one call, on fresh memory"


def _timed_rounds(candidates: list[_Candidate], device: str, budget: float, max_repeats: int, max_inner: int) -> None:
    """One timing of each in turn, so that drift of the machine meets all alike."""
    reserve = 0 if device == "cuda" else 2 * max((c.peak for c in candidates), default=0) + 2**26
    with kept_memory(min(reserve, MAX_RESERVE)):
        for turn in range(4):  # until what the calls need has found its places
            for candidate in candidates:
                if turn < 2 or candidate.first_s < 0.5:
                    candidate.prepare()
                    candidate.first_s = timed(candidate.call, device)
        plan = []
        for candidate in candidates:
            inner = max(1, min(max_inner, int(2e-3 / max(candidate.first_s, 1e-6))))
            plan.append((candidate, inner, int(min(max_repeats, max(3, budget / max(inner * candidate.first_s, 1e-6))))))
        for turn in range(max((repeats for *_, repeats in plan), default=0)):
            for candidate, inner, repeats in plan:
                if turn < repeats:
                    candidate.prepare()
                    candidate.times.append(timed(candidate.call, device, inner))


def compare(implementations: dict[str, Callable], equal: Callable | dict[str, Callable], device: str, budget: float, copy_bytes_per_s: float,
            bytes_moved: int | None = None, max_repeats: int = 15, prepare: Callable | None = None,
            **labels) -> list[Row]:  # fmt: skip
    """Run `implementations` (the first is ours) on one case: equality with ours by `equal(ours, theirs)` (one for all, or
    one per name), peak memory, then rounds of one timing each. `budget` is seconds per implementation beyond the first
    calls; a peer that cannot run is reported with the reason. `prepare` runs before each call, outside of its time and
    memory, where calls use up their inputs. `labels` are the row's op, shape, case and so on."""
    candidates = {name: _Candidate(call, prepare or (lambda: None)) for name, call in implementations.items()}
    _first_calls(candidates, equal, device)
    to_time = [c for c in candidates.values() if c.equal and not c.times]
    _timed_rounds(to_time, device, budget, max_repeats, max_inner=1 if prepare else 50)
    rows = []
    for name, candidate in candidates.items():
        median = statistics.median(candidate.times) if candidate.times else None
        fraction = bytes_moved / median / copy_bytes_per_s if bytes_moved and median else None
        rows.append(
            Row(
                impl=name, median_s=median, min_s=min(candidate.times, default=None), repeats=len(candidate.times),
                peak_bytes=candidate.peak if candidate.equal else None, equal=candidate.equal, note=candidate.note,
                device=device, bytes_moved=bytes_moved, copy_fraction=fraction, **labels,
            )
        )  # fmt: skip
    fastest = min((row.median_s for row in rows if row.median_s and not row.ours), default=None)
    if fastest is None:
        return rows
    return [
        dataclasses.replace(row, ratio_to_fastest_peer=row.median_s / fastest) if row.median_s else row for row in rows
    ]


def copy_bandwidth(device: str, megabytes: int = 256) -> float:
    """Bytes per second of a plain copy, read and write counted: what a kernel's traffic is held against."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(7))
    return 2 * source.numel() * 4 / seconds

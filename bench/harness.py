"""Timing, memory and equality for all benchmarks: nothing is timed that was not just checked to be equal."""

import ctypes
import dataclasses
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import acefast


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation's figures on one case."""

    op: str
    shape: str
    case: str
    dtype: str
    device: str
    impl: str
    median_s: float
    min_s: float
    repeats: int
    peak_bytes: int
    equal: bool
    note: str = ""

    def to_json(self) -> dict:
        row = dataclasses.asdict(self)
        row["pass"] = row.pop("case")
        return row


def environment() -> dict:
    """Versions, hardware and commit, for the head of a results file."""

    def output(*command):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else None

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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "modified": bool(output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
    }


def peak_bytes(call: Callable, device: str) -> int:
    """Largest memory in use during `call` above what was in use before it, its outputs included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = call()
        torch.cuda.synchronize()
        del outputs
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # freed pages that the allocator still holds would hide what the call needs
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = resident("VmRSS")
    outputs = call()
    after = resident("VmHWM")
    del outputs
    return max(0, after - before)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(call: Callable, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    outputs = call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del outputs
    return seconds


def compare(
    op: str, shape: str, case: str, dtype: str, device: str, implementations: dict[str, Callable], equal: Callable, budget: float = 20.0
) -> list[Row]:
    """Run `implementations` (the first is ours) on one case: equality with ours by `equal(ours, theirs)`, peak memory,
    then rounds of one timing each in turn, so that drift of the machine meets all alike. `budget` is seconds per
    implementation beyond the first calls; a peer that cannot run is reported with the reason."""
    names, notes, checks, peaks, times = list(implementations), {}, {}, {}, {}
    expected = None
    for name in names:
        try:
            found = implementations[name]()
            if expected is None:
                expected = found
            checks[name] = bool(equal(expected, found))
            del found
            peaks[name] = peak_bytes(implementations[name], device)
        except (RuntimeError, TypeError) as error:  # a peer's limit is a result, not a failure
            if name == names[0]:
                raise
            notes[name] = str(error).splitlines()[0][:200]
    del expected
    able = [name for name in names if checks.get(name)]
    first = {name: timed(implementations[name], device) for name in able}
    repeats = {name: int(min(15, max(3, budget / max(first[name], 1e-6)))) for name in able}
    for name in able:
        times[name] = []
    for turn in range(max(repeats.values(), default=0)):
        for name in able:
            if turn < repeats[name]:
                times[name].append(timed(implementations[name], device))
    rows = []
    for name in names:
        good = name in times
        rows.append(
            Row(
                op, shape, case, dtype, device, name,
                statistics.median(times[name]) if good else float("nan"),
                min(times[name]) if good else float("nan"),
                len(times[name]) if good else 0,
                peaks.get(name, 0), checks.get(name, False),
                notes.get(name, "" if checks.get(name) else "differs from ours, so not timed"),
            )
        )  # fmt: skip
    return rows


def copy_bandwidth(device: str, megabytes: int = 256) -> float:
    """Bytes per second of a plain copy, read and write counted: what a kernel's traffic is held against."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(7))
    return 2 * source.numel() * 4 / seconds

"""Builds what the emulator tests run: csrc/cuda/*.cu for the host, under the SIMT emulator, with the address and
undefined-behaviour sanitisers. ninja rebuilds only what changed; everything lies under build/simt."""

import fcntl
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "simt"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
BASE_FLAGS = "-std=c++20 -fPIC -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-parameter"
# No contraction: __fmul_rn and __fadd_rn are plain operators here and must round as they do on a GPU.
FLAGS = f"-O1 -g1 {SANITIZERS} -fno-omit-frame-pointer -fno-strict-aliasing -ffp-contract=off"
LIBRARY = BUILD / "libacefast_simt.so"
FAULTY = BUILD / "faulty"
CUDA_ARCHS = (80, 90)


def compiler() -> str:
    """g++: its sanitiser run-time is a shared library that can be preloaded into Python."""
    return shutil.which("g++") or os.environ.get("CXX", "g++")


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def find_nvcc() -> str | None:
    homes = [Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    found = [*homes, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((str(path) for path in found if path and Path(path).exists()), None)


def cubin(source: Path, arch: int) -> Path:
    return BUILD / f"{source.stem}.sm_{arch}.cubin"


def ninja_program() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise RuntimeError("the emulator's build needs ninja: pip install ninja") from None
        return found
    return str(Path(BIN_DIR) / "ninja")


def build(*targets: Path) -> None:
    """Builds the targets (LIBRARY, FAULTY, cubins); raises RuntimeError with the compiler's messages."""
    include, libraries = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    # The torch version is on the command line so that another torch rebuilds; its headers are not in the dependency files.
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    defines = f"-DACEFAST_SIMT -DACEFAST_LIBRARY=acefast_simt -DACEFAST_KEY=CPU {target} -DSIMT_TORCH={torch.__version__}"
    lines = [
        f"cxx = {compiler()}",
        f"base = {BASE_FLAGS} -I{HERE / 'include'} -I{ROOT / 'csrc'}",
        f"flags = {FLAGS}",
        "rule cxx",
        "  command = $cxx -x c++ $base $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule shared",
        f"  command = $cxx -shared {SANITIZERS} $in -o $out -L{libraries} -ltorch_cpu -Wl,--allow-shlib-undefined",
        "rule program",
        f"  command = $cxx {SANITIZERS} $in -o $out",
        f"build simt.o: cxx {HERE / 'simt.cpp'}",
        "  flags = -O2",
        f"build faulty.o: cxx {HERE / 'faulty.cu'}",
        f"build {FAULTY.name}: program faulty.o simt.o",
    ]
    for source in sources():
        lines += [f"build {source.stem}.o: cxx {source}", f"  more = {defines} -isystem {include}"]
    lines.append(f"build {LIBRARY.name}: shared simt.o " + " ".join(f"{s.stem}.o" for s in sources()))
    if find_nvcc():
        # -O3 as in setup.py; code for the device only, which is what the host compiler above has not seen.
        lines += [
            f"nvcc = {find_nvcc()} -ccbin $cxx -std=c++20 -O3 --expt-relaxed-constexpr -DUSE_CUDA {target} -I{ROOT / 'csrc'}",
            "rule nvcc",
            f"  command = $nvcc -isystem {include} -MMD -MF $out.d -cubin -arch=sm_$arch $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for source, arch in itertools.product(sources(), CUDA_ARCHS):
            lines += [f"build {cubin(source, arch).name}: nvcc {source}", f"  arch = {arch}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [ninja_program(), "-C", str(BUILD), "-j", str(os.cpu_count() or 1), *(t.name for t in targets)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulator's build failed:\n{done.stdout}{done.stderr}")


def sanitized_environment() -> dict[str, str]:
    """Environment of a Python process in which the sanitised library can be loaded: the sanitiser's run-time comes first, and
    fresh memory is filled with 0xff bytes (NaN in every float format)."""
    preload = [
        subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    options = "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255:abort_on_error=1"
    undefined = "print_stacktrace=1:halt_on_error=1"
    return os.environ | {
        "LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": undefined, "OMP_NUM_THREADS": "1",
        "ACEFAST_SIMT_LIBRARY": str(LIBRARY), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip


def sanitized_command(*command: str) -> list[str]:
    """The command, without address randomisation where that can be had: the sanitiser of older compilers fails now and then
    where the kernel randomises more than 28 bits."""
    prefix = ["setarch", "-R"]
    if shutil.which("setarch") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
        return [*prefix, *command]
    return list(command)


if __name__ == "__main__":
    build(*([LIBRARY, FAULTY] if len(sys.argv) < 2 else [BUILD / name for name in sys.argv[1:]]))

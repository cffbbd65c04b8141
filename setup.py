"""Build of acefast's native code; everything else of the package is in pyproject.toml.

Three kinds of shared objects are made, all with ninja through a generated build/native/build.ninja:
  acefast/_C*.so                                    pybind11 module with the build's facts, no tensor in it
  acefast/lib/libacefast_cpu_{default,avx2,avx512}.so  the CPU ops once per instruction set; one is loaded at run time
  acefast/lib/libacefast_cuda.so                    the CUDA ops, where nvcc is found
The op libraries use libtorch's stable ABI only: built once, they load in later torch releases and under every Python.

ACEFAST_BUILD = auto (default: cpu, and cuda where nvcc is found) | none (pure Python) | cpu | cpu,cuda | all
TORCH_CUDA_ARCH_LIST (default "8.0;9.0"), CUDA_HOME, CXX and MAX_JOBS are obeyed.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "native"
TORCH_TARGET = "0x020a000000000000"  # stable ABI of torch 2.10
X86_LEVELS = {"default": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
DEFAULT_ARCHS = "8.0;9.0"


def wanted() -> set:
    """The parts to build, from ACEFAST_BUILD."""
    value = os.environ.get("ACEFAST_BUILD", "auto").strip().lower()
    known = {"auto": {"cpu", "cuda"} if find_nvcc() else {"cpu"}, "all": {"cpu", "cuda"}, "none": set()}
    parts = known.get(value, set(value.split(",")))
    if not parts <= {"cpu", "cuda"}:
        raise SystemExit(f"acefast: ACEFAST_BUILD must be auto, none, cpu, cuda, 'cpu,cuda' or all, got {value!r}.")
    if "cuda" in parts and not find_nvcc():
        raise SystemExit(
            "acefast: ACEFAST_BUILD asks for CUDA but no nvcc was found; set CUDA_HOME or use ACEFAST_BUILD=cpu."
        )
    if parts and sys.platform != "linux":
        raise SystemExit(
            "acefast: native code is built on Linux only; set ACEFAST_BUILD=none for a pure-Python install."
        )
    return parts


def find_nvcc():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [Path(h) / "bin" / "nvcc" for h in homes if h] + [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((str(Path(p).resolve()) for p in found if p and Path(p).exists()), None)


def find_cxx() -> str:
    cxx = os.environ.get("CXX") or next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    if cxx is None:
        raise SystemExit("acefast: no C++ compiler was found; install g++ 11 or later, or set ACEFAST_BUILD=none.")
    return cxx


def import_build_tools():
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"acefast: the native build needs torch at build time ({error}); install torch >= 2.10 first and use "
            "pip install --no-build-isolation, or set ACEFAST_BUILD=none."
        ) from None
    if tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        raise SystemExit(f"acefast: the native build needs torch >= 2.10, found {torch.__version__}; upgrade torch.")
    try:
        from ninja import BIN_DIR, ninja_syntax
    except ImportError:
        raise SystemExit("acefast: the native build needs the ninja package; pip install ninja first.") from None
    return torch, ninja_syntax, str(Path(BIN_DIR) / "ninja")


def first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else ""


def cuda_archs() -> list:
    """Architectures as nvcc numbers, e.g. ["80", "90"]; PTX is added for the last one."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split() or DEFAULT_ARCHS.split(";")
    return [a.replace("+PTX", "").replace(".", "") for a in listed]


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


class NativeBuild(build_ext):
    """Writes build.ninja, runs ninja and copies the shared objects beside the Python files that load them."""

    def run(self):
        self.built = []  # paths relative to the package's parent
        parts = wanted()
        if not parts:
            return
        import fcntl  # not on every system; native code is for Linux

        torch, ninja_syntax, ninja = import_build_tools()
        BUILD.mkdir(parents=True, exist_ok=True)
        with open(BUILD / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one build at a time in this tree
            self.build_and_copy(torch, ninja_syntax, ninja, parts)

    def build_and_copy(self, torch, ninja_syntax, ninja, parts):
        targets = self.write_ninja(torch, ninja_syntax, parts)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if subprocess.run([ninja, "-C", str(BUILD), "-j", jobs]).returncode:
            raise SystemExit("acefast: the native build failed, see the compiler's messages above.")
        in_place = self.inplace or getattr(self, "editable_mode", False)
        for target, relative in targets.items():
            destination = (ROOT if in_place else Path(self.build_lib)) / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            source = BUILD / target
            if not destination.exists() or source.read_bytes() != destination.read_bytes():
                # Renamed into place: a process that has the old library mapped keeps it.
                shutil.copy2(source, destination.with_suffix(".tmp"))
                os.replace(destination.with_suffix(".tmp"), destination)
            self.built.append(str(destination))

    def write_ninja(self, torch, ninja_syntax, parts) -> dict:
        """Writes build.ninja; returns {file in BUILD: path relative to the source root}."""
        include = Path(torch.__file__).parent / "include"
        libdir = Path(torch.__file__).parent / "lib"
        cxx, nvcc = find_cxx(), find_nvcc()
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        levels = X86_LEVELS if x86 else {"default": []}
        base = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
        # -Wuninitialized is wrong about the intrinsics of g++ 12.
        base += ["-Wno-unused-parameter", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-DNDEBUG"]
        exact = {"gumbel_topk", "exchange"}  # their arithmetic is the same to the bit on every backend
        math = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
        stable = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{CSRC}", f"-isystem {include}"]
        map_file = BUILD / "exports.map"
        write_if_changed(map_file, "{ local: *; };\n")  # nothing is exported: ops register themselves when loaded
        link = [f"-Wl,--version-script={map_file}", "-Wl,--as-needed", "-Wl,-z,relro,-z,now", "-Wl,-s"]
        targets = {}
        with open(BUILD / "build.ninja.new", "w") as file:
            n = ninja_syntax.Writer(file, width=120)
            n.variable("ninja_required_version", "1.5")
            n.variable("cxx", cxx)
            compile_one = "$cxx -MMD -MF $out.d $flags -c $in -o $out"
            n.rule("cxx", compile_one, depfile="$out.d", description="CXX $out")
            n.rule("link", "$cxx -shared $in -o $out $flags", description="LINK $out")

            def library(name, sources, rule, flags, link_flags, relative, linker="link"):
                objects = []
                for source in sources:
                    obj = f"{name}/{source.stem}.o"
                    own = [*flags, "-ffp-contract=off"] if rule == "cxx" and source.stem in exact else flags
                    n.build(obj, rule, str(source), variables={"flags": " ".join(own)})
                    objects.append(obj)
                out = Path(relative).name
                n.build(out, linker, objects, implicit=[str(map_file)], variables={"flags": " ".join(link_flags)})
                targets[out] = relative

            cuda_sources = sorted((CSRC / "cuda").glob("*.cu")) if "cuda" in parts else []
            if cuda_sources:
                archs = cuda_archs()
                gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
                gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
                n.variable("nvcc", nvcc)
                compile_one = "$nvcc -ccbin $cxx -MMD -MF $out.d $flags -c $in -o $out"
                n.rule("nvcc", compile_one, depfile="$out.d", description="NVCC $out")
                host = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unused-parameter"
                flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "--extended-lambda", "-lineinfo"]
                flags += ["-DUSE_CUDA", "-DNDEBUG", host] + gencode + stable
                # nvcc links, since it knows where its static cudart lies (which shares torch's primary context through
                # the driver). libtorch.so is named as needed: in a CUDA build of torch it brings libtorch_cuda, which a
                # CPU build lacks, so symbols may stay undefined here.
                torch_cuda = [f"-L{libdir}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
                undefined = ["-Wl,--allow-shlib-undefined", "-Wl,--unresolved-symbols=ignore-all"]
                cuda_link = ["-Xlinker=" + f.removeprefix("-Wl,") for f in link + torch_cuda + undefined]
                n.rule("nvlink", "$nvcc -ccbin $cxx -shared -cudart=static $in -o $out $flags", description="LINK $out")
                name = "libacefast_cuda"
                library(name, cuda_sources, "nvcc", flags, cuda_link, f"acefast/lib/{name}.so", "nvlink")
            if "cpu" in parts:
                # libtorch_cpu is only named as needed, so that its symbols are found wherever torch was loaded from.
                torch_cpu = [f"-L{libdir}", "-ltorch_cpu", "-Wl,--no-undefined", "-lm"]
                for level, march in levels.items():
                    flags = base + math + march + [f"-DACEFAST_ISA={level}"] + stable
                    name = f"libacefast_cpu_{level}"
                    sources = sorted((CSRC / "cpu").glob("*.cpp"))
                    library(name, sources, "cxx", flags, link + torch_cpu, f"acefast/lib/{name}.so")
            facts = {
                "VERSION": self.distribution.get_version(),
                "COMPILER": first_line(cxx, "--version"),
                "FLAGS": " ".join(base + math),
                "LEVELS": ",".join(levels) if "cpu" in parts else "",
                "TORCH": torch.__version__,
                "TORCH_TARGET": "2.10",
                "CUDA_ARCHS": ",".join(cuda_archs()) if cuda_sources else "",
                "NVCC": nvcc_version(nvcc) if cuda_sources else "",
                "COMMIT": first_line("git", "rev-parse", "--short=12", "HEAD") or "unknown",
            }
            lines = [f"#define ACEFAST_{k} {quoted(v)}" for k, v in facts.items()]
            write_if_changed(BUILD / "build_facts.h", "\n".join(lines) + "\n")
            flags = base + [f"-isystem {d}" for d in (sysconfig.get_path("include"), pybind11_include(include), BUILD)]
            name, suffix = "_C", sysconfig.get_config_var("EXT_SUFFIX")
            library(name, [CSRC / "module.cpp"], "cxx", flags, ["-Wl,-s"], f"acefast/{name}{suffix}")
        os.replace(BUILD / "build.ninja.new", BUILD / "build.ninja")
        return targets

    def get_outputs(self):
        return list(getattr(self, "built", []))

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(p.relative_to(ROOT)) for d in ("*", "*/*") for p in CSRC.glob(d) if p.is_file()]


def pybind11_include(torch_include: Path) -> str:
    """pybind11's headers: the package if installed, else the copy that torch ships."""
    try:
        import pybind11
    except ImportError:
        return str(torch_include)
    return pybind11.get_include()


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return next(
        (word[1:] for word in text.replace(",", " ").split() if word[0] == "V" and word[1:2].isdigit()), "unknown"
    )


def write_if_changed(path: Path, text: str):
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


native = bool(wanted()) if os.environ.get("ACEFAST_BUILD", "auto").strip().lower() != "none" else False
setup(
    ext_modules=[Extension("acefast._C", [])] if native else [],
    cmdclass={"build_ext": NativeBuild},
    exclude_package_data={"acefast": ["*.so", "lib/*.so"]},  # leftovers of an in-place build; build_ext adds its own
)

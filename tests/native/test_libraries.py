"""The shared objects themselves: which symbols they need, what they export, and what _C says about the build."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from acefast.ops import backend
from tests.inputs import REPOSITORY

LIBRARIES = sorted(backend.native_library("cpu").parent.glob("libacefast_*.so"))

pytestmark = pytest.mark.skipif(not LIBRARIES, reason="nothing native was built (ACEFAST_BUILD=none)")


def symbols(library, which):
    assert shutil.which("nm"), "binutils' nm is part of every compiler installation"
    text = subprocess.run(["nm", "-D", "-C", which, str(library)], capture_output=True, text=True, check=True).stdout
    return [line.split(maxsplit=1)[1] if line[0] == " " else line.split(maxsplit=2)[2] for line in text.splitlines()]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.stem)
def test_needs_no_python_and_no_unstable_torch_symbol(library):
    names = [s.split(maxsplit=1)[-1] for s in symbols(library, "--undefined-only")]
    bad = [n for n in names if n.startswith(("at::", "c10::", "torch::", "Py", "_Py", "pybind11::")) or "c10::" in n]
    assert not bad
    assert any(n.startswith("aoti_torch_") for n in names)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.stem)
def test_exports_nothing(library):
    assert symbols(library, "--defined-only") == []


def test_every_native_op_is_implemented_for_the_cpu():
    for op in backend.SCHEMAS:
        assert backend.implementation(op, "cpu", "native") is not None


def test_build_info():
    module = pytest.importorskip("acefast._C")
    info = module.build_info()
    assert all(isinstance(v, str) for v in info.values())
    assert info["torch_target"] == "2.10" and info["compiler"]
    assert torch.backends.cpu.get_cpu_capability().lower() in info["cpu_levels"].split(",")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"ACEFAST_BUILD": "fast"}, "ACEFAST_BUILD must be auto, none, cpu, cuda, 'cpu,cuda' or all, got 'fast'"),
        ({"ACEFAST_BUILD": "cpu", "CXX": "", "PATH": "/nowhere"}, "no C++ compiler was found"),
    ],
)
def test_a_build_that_cannot_be_made_says_so(changes, said, tmp_path):
    environment = {**os.environ, **changes}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode != 0 and said in done.stderr
    assert "Traceback" not in done.stderr

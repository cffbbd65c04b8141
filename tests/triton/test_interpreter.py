"""Runs tests/triton/interpreted under TRITON_INTERPRET=1, one process per file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("test_*.py")), ids=lambda path: path.stem)
def test_interpreted(path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "ACEFAST_NO_SKIPS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5", str(path)]
    run = subprocess.run(command, cwd=FOLDER.parents[2], env=environment, capture_output=True, text=True)
    print(run.stdout[-1500:])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]

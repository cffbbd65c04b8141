"""Runs tests/triton/interpreted under TRITON_INTERPRET=1, one process per file, side by side."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(FOLDER.glob("test_*.py"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{file: (process, log)}"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "ACEFAST_NO_SKIPS": "1"}
    started = {}
    for path in FILES:
        log = tmp_path_factory.mktemp("interpreted") / f"{path.stem}.log"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5", str(path)]
        with log.open("w") as out:
            process = subprocess.Popen(
                command, cwd=FOLDER.parents[2], env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        started[path] = process, log
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path, runs):
    process, log = runs[path]
    code = process.wait(timeout=550)
    print(log.read_text()[-1500:])
    assert code == 0, log.read_text()[-6000:]

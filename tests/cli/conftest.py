"""The command line in processes of its own, and one small finished search."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = "--dataset synthetic-cora --hidden 8 --threads 1 --mask-epochs 2 --fix-epochs 2 --ace-epochs 1".split()
SMALL += ["--ace-rounds", "2"]


def command(*args) -> list[str]:
    return [sys.executable, "-m", "acefast.cli", *map(str, args)]


def environment() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@pytest.fixture(scope="session")
def acefast():
    """Run `acefast ARGS` in a process of its own; returns the finished process."""

    def call(*args):
        return subprocess.run(command(*args), capture_output=True, text=True, timeout=300, env=environment())

    return call


@pytest.fixture(scope="session")
def start():
    """Start `acefast ARGS` and return the running process."""

    def call(*args):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command(*args), env=environment(), **pipes)

    return call


@pytest.fixture(scope="session")
def small():
    """Options of a search of a second or two."""
    return SMALL


@pytest.fixture(scope="session")
def finished(acefast, tmp_path_factory):
    """(folder, process) of a finished search: UGS, two rounds."""
    folder = tmp_path_factory.mktemp("runs") / "ugs"
    process = acefast("search", *SMALL, "--method", "ugs", "--rounds", 2, "--out", folder)
    assert process.returncode == 0, process.stderr
    return folder, process


@pytest.fixture(scope="session")
def planetoid():
    """The folder of the raw Planetoid files."""
    default = Path(__file__).parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ.get("ACEFAST_DATA", default)) / "planetoid"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}; set ACEFAST_DATA to the folder that holds planetoid/")
    return folder

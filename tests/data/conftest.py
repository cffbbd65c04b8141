import os
import re
import shutil
from pathlib import Path

import pytest

from acefast.errors import InputError

DATA = Path(os.environ.get("ACEFAST_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(scope="session")
def planetoid() -> Path:
    """Folder of the raw Planetoid files."""
    folder = DATA / "planetoid"
    if not folder.is_dir():
        pytest.skip(f"no raw Planetoid files in {folder} (set ACEFAST_DATA)")
    return folder


@pytest.fixture
def cora(planetoid, tmp_path) -> Path:
    """A copy of Cora's files to damage."""
    for file in planetoid.glob("ind.cora.*"):
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


@pytest.fixture
def refusal():
    """refusal(f, *args): the text of the InputError that f(*args) must raise, which must be one sentence."""

    def call(f, *args, **kwargs) -> str:
        with pytest.raises(InputError) as caught:
            f(*args, **kwargs)
        text = str(caught.value)
        assert text and "\n" not in text and len(text) < 600 and not re.search(r"[.!?] [A-Z]", text), text
        return text

    return call


@pytest.fixture(scope="session")
def ogb() -> Path:
    """Folder of the data sets in OGB's layout; read-only, so tests name another folder for what is made of them."""
    folder = DATA / "ogb"
    if not folder.is_dir():
        pytest.skip(f"no OGB data sets in {folder} (set ACEFAST_DATA)")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")

"""The cases of the SIMT emulator (tests/simt/cases_*.py), run on a real GPU."""

import importlib
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

for _path in sorted((Path(__file__).parents[1] / "simt").glob("cases_*.py")):
    _module = importlib.import_module(f"tests.simt.{_path.stem}")
    for _name in [name for name in vars(_module) if name.startswith("test_")]:
        assert _name not in globals(), f"two case files have a {_name}"
        globals()[_name] = getattr(_module, _name)
